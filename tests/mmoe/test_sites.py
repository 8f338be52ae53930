"""The `Site` view: which blocks of a host are found, how their weights are packed, and what is refused and why."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmoe
from mmoe.errors import LoadMismatch, Refused, UnknownName
from mmoe.surgery import HostedMoE, Site, get_site, refused_sites, sites

D, F = 8, 12


class Host(nn.Module):
    """One residual block around a feed-forward."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(D), mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Named(nn.Module):
    """A feed-forward with layers of any names; the last one leads back."""

    def __init__(self, names: tuple[str, ...], act: Any = None, after: str = "") -> None:
        super().__init__()
        for name in names[:-1]:
            setattr(self, name, nn.Linear(D, F))
        setattr(self, names[-1], nn.Linear(F, D))
        self.names, self.after = names, after
        if act is not None:
            self.act = act

    def forward(self, x: Tensor) -> Tensor:
        first, *rest, last = (getattr(self, name) for name in self.names)
        hidden = getattr(self, "act", nn.functional.silu)(first(x))
        for layer in rest:
            hidden = hidden * layer(x)
        out = last(hidden)
        return {"": out, "residual": out + x, "clamp": out.clamp(-0.1, 0.1)}[self.after]


def only(block: nn.Module) -> Site:
    return sites(nn.ModuleList([Host(block)]))["0.mlp"]


def timm_block(name: str, **options: Any) -> nn.Module:
    import timm.layers

    return getattr(timm.layers, name)(D, 2 * F if name in ("GluMlp", "SwiGLUPacked") else F, **options)


def gpt2_block() -> nn.Module:
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    return GPT2MLP(F, GPT2Config(n_embd=D, resid_pdrop=0.25))


def phi3_block() -> nn.Module:
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    return Phi3MLP(Phi3Config(hidden_size=D, intermediate_size=F, pad_token_id=0))


def t5_block() -> nn.Module:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

    return T5DenseGatedActDense(T5Config(d_model=D, d_ff=F, feed_forward_proj="gated-gelu", dropout_rate=0.3))


BLOCKS = {
    "sequence": lambda: nn.Sequential(nn.Linear(D, F), nn.ReLU(), nn.Dropout(0.1), nn.Linear(F, D), nn.Dropout(0.2)),
    "no bias": lambda: nn.Sequential(nn.Linear(D, F, bias=False), nn.GELU("tanh"), nn.Linear(F, D)),
    "act as function": lambda: Named(("fc1", "fc2"), torch.tanh),
    "act in forward": lambda: Named(("wi", "wo")),
    "gated, act in forward": lambda: Named(("w1", "w3", "w2")),
    "llama": lambda: Named(("gate_proj", "up_proj", "down_proj"), nn.SiLU()),
    "ours": lambda: mmoe.FFN(D, F),
    "ours gated": lambda: mmoe.GatedFFN(D, F),
    "timm Mlp": lambda: timm_block("Mlp", drop=(0.1, 0.2)),
    "timm Mlp, one bias": lambda: timm_block("Mlp", bias=(False, True)),
    "timm GluMlp": lambda: timm_block("GluMlp"),
    "timm SwiGLUPacked": lambda: timm_block("SwiGLUPacked"),
    "timm SwiGLU": lambda: timm_block("SwiGLU", drop=0.1),
    "gpt2": gpt2_block,
    "phi3": phi3_block,
    "t5 gated": t5_block,
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_weights_compute_what_the_block_does(name: str, dtype: torch.dtype) -> None:
    block = BLOCKS[name]().to(dtype).eval()
    site = only(block)
    weights = site.weights()
    assert site.kind == "dense" and site.router() is None
    assert (weights.num_experts, weights.dim, weights.hidden_dim) == (1, D, F)
    assert weights.up.shape == (1, (2 if weights.gated else 1) * F, D) and weights.down.shape == (1, D, F)
    x = torch.randn(5, D, dtype=dtype)
    experts = weights.experts().eval()
    torch.testing.assert_close(
        experts(x, torch.tensor([5])), block(x), atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=1e-5
    )
    assert {p.dtype for p in experts.parameters()} == {dtype}
    assert all(p.is_contiguous() for p in experts.parameters())


@pytest.mark.parametrize(
    ("name", "inner", "outer"),
    [
        ("sequence", 0.1, 0.2),
        ("timm Mlp", 0.1, 0.2),
        ("timm SwiGLU", 0.1, 0.1),
        ("gpt2", 0, 0.25),
        ("t5 gated", 0.3, 0),
    ],
)
def test_dropouts_are_filed_by_where_they_run(name: str, inner: float, outer: float) -> None:
    weights = only(BLOCKS[name]()).weights()
    assert (weights.dropout, weights.out_dropout) == (inner, outer)
    assert weights.experts().dropout == inner and weights.experts(dropout=0.5).dropout == 0.5


def test_dropouts_kept_as_numbers() -> None:
    block = Named(("fc1", "fc2"), nn.GELU())
    block.activation_dropout, block.dropout = 0.1, 0.2
    weights = only(block).weights()
    assert (weights.dropout, weights.out_dropout) == (0.1, 0.2)


def test_known_activations_become_ours_others_stay() -> None:
    from transformers.activations import ACT2FN

    from mmoe.experts.activations import ACTIVATIONS

    for theirs, ours in [("quick_gelu", "quick_gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("silu", "silu")]:
        assert only(Named(("fc1", "fc2"), ACT2FN[theirs])).weights().act is ACTIVATIONS[ours]
    relu2 = ACT2FN["relu2"]
    weights = only(Named(("fc1", "fc2"), relu2)).weights()
    assert weights.act is relu2 and weights.experts().act is not relu2


def test_activations_in_place_are_read_without_it() -> None:
    from mmoe.experts.activations import ACTIVATIONS

    assert only(Named(("fc1", "fc2"), nn.SiLU(inplace=True))).weights().act is ACTIVATIONS["silu"]
    relu6 = nn.ReLU6(inplace=True)
    act, x = only(Named(("fc1", "fc2"), relu6)).weights().act, torch.tensor([-1.0, 3.0, 9.0])
    assert act(x).tolist() == [0, 3, 6] and x.tolist() == [-1, 3, 9] and relu6.inplace


def test_reading_leaves_no_trace() -> None:
    block = nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Dropout(0.5), nn.Linear(F, D))
    block[2].eval()
    calls: list[int] = []
    block.register_forward_hook(lambda *_: calls.append(1))
    site, state = only(block), torch.get_rng_state()
    site.weights().experts()
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in block] == [True, True, False, True] and block.training
    assert calls == [] and all(not m._forward_pre_hooks for m in block.modules())


REFUSED = {
    "a norm inside": (lambda: timm_block("Mlp", norm_layer=nn.LayerNorm), "`norm` stands between"),
    "convolutions": (lambda: timm_block("Mlp", use_conv=True), "convolves"),
    "no known layers": (lambda: Named(("a", "b")), "parts (a, b)"),
    "quantised": (lambda: Named(("fc1", "fc2"), nn.GELU()), "quantised (torch.int8)"),
    "two dtypes": (lambda: Named(("fc1", "fc2"), nn.GELU()), "different types (torch.bfloat16, torch.float32)"),
    "trained activation": (lambda: Named(("fc1", "fc2"), nn.PReLU()), "`act` stands between"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_structure(case: str) -> None:
    build, reason = REFUSED[case]
    block = build()
    if case == "quantised":
        block.fc1.weight = nn.Parameter(block.fc1.weight.to(torch.int8), requires_grad=False)
    if case == "two dtypes":
        block.fc2.to(torch.bfloat16)
    model = nn.ModuleList([Host(block)])
    assert sites(model) == {}
    assert reason in refused_sites(model)["0.mlp"]
    with pytest.raises(Refused, match=r"cannot read the feed-forward block '0\.mlp'"):
        get_site(model, "0.mlp")


@pytest.mark.parametrize("after", ["residual", "clamp"])
def test_refused_by_proof(after: str) -> None:
    site = only(Named(("fc1", "fc2"), nn.GELU(), after))
    with pytest.raises(Refused, match="computes something else"):
        site.weights()


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([nn.Dropout(0.5), nn.Linear(D, F), nn.GELU(), nn.Linear(F, D)], "a dropout on its input"),
        ([nn.Linear(D, F), nn.Dropout(0.3), nn.GELU(), nn.Linear(F, D)], "a dropout before its activation"),
        ([nn.Linear(D, F), nn.GELU(), nn.Dropout(0.1), nn.Dropout(0.2), nn.Linear(F, D)], "two dropouts in a row"),
        ([nn.Linear(D, F), nn.GELU(), nn.Linear(F, D), nn.Dropout(0.3), nn.Dropout(0.2)], "two dropouts in a row"),
    ],
)
def test_dropouts_that_experts_do_not_have_are_refused(layers: list[nn.Module], reason: str) -> None:
    site = only(nn.Sequential(*layers))
    with pytest.raises(Refused, match=reason):
        site.weights()


@pytest.mark.parametrize("change", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_computed_weights_are_refused(change: Callable[[nn.Module], nn.Module]) -> None:
    block = nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))
    change(block[0])
    with pytest.raises(Refused, match="its weights are computed from other tensors"):
        only(block).weights()


def test_refused_transformers_hosts() -> None:
    import transformers as t

    sizes: dict[str, Any] = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": 1, "vocab_size": 9}
    sizes |= {"num_attention_heads": 2, "pad_token_id": 0}
    opt = {"word_embed_proj_dim": D, "ffn_dim": F, "hidden_size": D, "num_attention_heads": 2, "vocab_size": 9}
    hosts = {
        "split over `intermediate`": (t.BertModel(t.BertConfig(**sizes)), "encoder.layer.0"),
        "beside others (`self_attn`)": (t.OPTModel(t.OPTConfig(**opt, num_hidden_layers=1)), "decoder.layers.0"),
        "more than one input": (
            t.BloomModel(t.BloomConfig(hidden_size=D, n_layer=1, n_head=2, vocab_size=9)),
            "h.0.mlp",
        ),
        "host's own": (t.MixtralModel(t.MixtralConfig(**sizes, num_key_value_heads=2)), "layers.0.mlp"),
    }
    for reason, (model, name) in hosts.items():
        assert sites(model) == {}
        assert list(refused_sites(model)) == [name] and reason in refused_sites(model)[name]


def test_layers_with_adapters_are_refused() -> None:
    import peft

    model = nn.ModuleList([Host(Named(("fc1", "fc2"), nn.GELU()))])
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["fc1"]))
    assert "merge_and_unload" in next(iter(refused_sites(wrapped).values()))


def test_what_is_no_feed_forward_is_not_mentioned() -> None:
    projector = nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))
    model = nn.ModuleDict(
        {
            "connector": projector,  # only its name tells it from a feed-forward
            "mlp_head": nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, 3)),
            "attention": nn.MultiheadAttention(D, 2),
            "lora": nn.Sequential(nn.Linear(D, 2), nn.Linear(2, D)),
        }
    )
    assert sites(model) == {} and refused_sites(model) == {}


def test_meta_device_checks_the_order_only() -> None:
    with torch.device("meta"):
        known, hidden = timm_block("SwiGLUPacked", drop=0.1), Named(("wi", "wo"))
    weights = only(known).weights()
    assert weights.up.is_meta and weights.gated and weights.dropout == 0.1
    with pytest.raises(Refused, match="real weights"):
        only(hidden).weights()


def test_state_dict_of_another_model() -> None:
    model, other = (nn.ModuleList([Host(gpt2_block())]) for _ in range(2))
    site = sites(model)["0.mlp"]
    assert torch.equal(site.weights(other.state_dict()).up[0], other[0].mlp.c_fc.weight.t())
    with pytest.raises(LoadMismatch, match=r"no '0\.mlp\.c_fc\.weight'(.|\n)*did you mean: a\.0\.mlp"):
        site.weights({f"a.{key}": value for key, value in other.state_dict().items()})
    with pytest.raises(LoadMismatch, match=r"it is \(3, 12\), the model's is \(8, 12\)"):
        site.weights({**other.state_dict(), "0.mlp.c_fc.weight": torch.zeros(3, F)})


def test_moe_sites() -> None:
    router = mmoe.TopKRouter(D, 4, top_k=3, score="sigmoid", scale=2.0, bias_rate=0.1)
    moe = mmoe.MoE(router, mmoe.GatedFFNExperts(D, F, 4), shared=mmoe.FFN(D, F))
    model = nn.ModuleList([Host(moe)])
    assert list(sites(model)) == ["0.mlp"], "shared experts are part of the layer"
    site = sites(model)["0.mlp"]
    weights, found = site.weights(), site.router()
    assert site.kind == "moe" and weights.gated and weights.num_experts == 4
    assert torch.equal(weights.up, moe.experts.gate_up_proj) and weights.up_bias is None
    assert found is not None and torch.equal(found.weight, router.weight)
    assert (found.top_k, found.score, found.weights, found.scale) == (3, "sigmoid", "renormalized", 2.0)
    assert found.bias is None and found.select_bias is not None
    null = nn.ModuleList([mmoe.MoE(mmoe.TopKRouter(D, 4), mmoe.WithNullExperts(D, F, 4))])
    with pytest.raises(Refused, match="WithNullExperts"):
        sites(null)["0"].weights()
    assert sites(nn.ModuleList([mmoe.MoE(mmoe.FixedRouter(2), mmoe.FFNExperts(D, F, 2))]))["0"].router() is None


def test_replace_reaches_every_place() -> None:
    shared = Host(nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D)))
    model = nn.ModuleList([shared, Host(shared.mlp)])
    (site,) = sites(model).values()
    block = nn.Identity()
    site.replace(block)
    assert model[0].mlp is block and model[1].mlp is block
    with pytest.raises(Refused, match="whole model"):
        sites(mmoe.FFN(D, F))[""].replace(block)


def test_get_site_suggests() -> None:
    model = nn.ModuleList([Host(mmoe.FFN(D, F))])
    assert get_site(model, "0.mlp").name == "0.mlp"
    with pytest.raises(UnknownName, match=r"did you mean: 0\.mlp"):
        get_site(model, "0.mpl")


def test_hosted_moe_answers_its_host() -> None:
    moe = HostedMoE(mmoe.TopKRouter(D, 4), mmoe.FFNExperts(D, F, 4))
    plain = mmoe.MoE(mmoe.TopKRouter(D, 4), mmoe.FFNExperts(D, F, 4))
    assert moe.state_dict().keys() == plain.state_dict().keys()
    assert dict(moe.named_modules()).keys() == dict(plain.named_modules()).keys()
    for again in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)), moe):
        assert again.c_fc.weight is again.experts.up_proj is again.fc1.weight
        assert again.c_proj.weight is again.experts.down_proj is again.fc2.weight
        assert not hasattr(again.c_fc, "int8_original_dtype")
        assert again.to(torch.bfloat16).c_fc.weight.dtype == torch.bfloat16
    gated = HostedMoE(mmoe.TopKRouter(D, 4), mmoe.GatedFFNExperts(D, F, 4))
    assert gated.fc1.weight is gated.experts.gate_up_proj
