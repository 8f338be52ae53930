"""Sparse upcycling on hosts of open_clip, timm and transformers: the start is the dense model, whatever the host.

Exactness: with copies and weights that sum to 1, outputs differ by rounding only. Measured in fp32, relative
to the largest output: at most 9e-7 over all hosts (tolerance 5e-6); in bf16 1.2e-2 (tolerance 3e-2).
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmoe
from mmoe.errors import BadOverride, LoadMismatch, Refused, UnknownName
from mmoe.surgery import HostedMoE, SwapReport, sites, upcycle
from tests.foreign_hosts import HOSTS, clip_call, open_clip_host, relative_gap, tokens

FP32, BF16 = (torch.float32, 5e-6), (torch.bfloat16, 3e-2)


@pytest.mark.parametrize(
    ("host", "dtype", "tolerance"),
    [(host, *FP32) for host in HOSTS] + [(host, *BF16) for host in ("open_clip", "timm swiglu", "hf llama", "hf gpt2")],
)
def test_starts_as_the_dense_model(host: str, dtype: torch.dtype, tolerance: float) -> None:
    build, call, num_sites, block = HOSTS[host]
    model = build().to(dtype)
    found = sites(model)
    assert len(found) == num_sites and {type(site.module).__name__ for site in found.values()} == {block}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparse, report = upcycle(model, num_experts=4, top_k=2)
    assert list(report.sites) == list(found) == list(mmoe.moe_layers(sparse)) and not report.refused
    with torch.no_grad():
        want, got = call(model), call(sparse)
        without = call(_broken(sparse))
    assert relative_gap(want, got) < tolerance
    assert relative_gap(want, without) > 0.1, "the blocks matter for the output"
    assert {p.dtype for p in sparse.parameters()} == {dtype}
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def _broken(sparse: nn.Module) -> nn.Module:
    broken = copy.deepcopy(sparse)
    for layer in mmoe.moe_layers(broken).values():
        nn.init.zeros_(layer.get_parameter("experts.down_proj"))
    return broken


@pytest.mark.parametrize("spec", ["topk:top_k=1", "topk:weights=softmax_topk", "dense", "topk:score=sigmoid"])
def test_any_weights_that_sum_to_one(spec: str) -> None:
    model = open_clip_host()
    sparse, _ = upcycle(model, num_experts=3, router=spec)
    with torch.no_grad():
        want, got = clip_call(model), clip_call(sparse)
    assert relative_gap(want, got) < 5e-6


def test_open_clip_still_knows_its_dtype() -> None:
    """Its text tower asks block 0 for the weight of `mlp.c_fc`, before and after copying and saving."""
    model = open_clip_host()
    sparse, _ = upcycle(model)
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    again = open_clip_host()
    again, _ = upcycle(again, inplace=True)
    again.load_state_dict(sparse.state_dict())
    copies = [copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), torch.load(buffer, weights_only=False), again]
    for other in copies:
        assert other.transformer.get_cast_dtype() == torch.float32
        assert torch.equal(clip_call(other), clip_call(sparse))
        assert other.bfloat16().transformer.get_cast_dtype() == torch.bfloat16
    keys = {key for key in sparse.state_dict() if ".mlp." in key}
    experts = ("up_proj", "up_bias", "down_proj", "down_bias")
    assert keys == {
        f"{name}.{part}" for name in sites(model) for part in ("router.weight", *(f"experts.{e}" for e in experts))
    }


def test_gradients_reach_experts_and_once_they_differ_the_router() -> None:
    for noise in (0.0, 0.2):
        sparse, _ = upcycle(open_clip_host(), noise=noise)
        sparse.visual.set_grad_checkpointing()
        with mmoe.trace(sparse) as routing:
            out = clip_call(sparse.train())
        (out * torch.randn_like(out)).sum().backward()
        for name, layer in mmoe.moe_layers(sparse).items():
            gate = layer.get_parameter("router.weight").grad.abs().max()
            experts = layer.get_parameter("experts.up_proj").grad.abs().max()
            assert gate > 1e-4 * experts if noise else gate < 1e-5 * experts, name
        name = routing.layers[0]  # all its tokens matter for the output
        for param in sparse.get_submodule(name).experts.packed_parameters().values():
            assert torch.equal(param.grad.flatten(1).abs().sum(1) > 0, routing[name].counts() > 0)


def test_experts_are_copies() -> None:
    model = HOSTS["hf gpt2"][0]()
    sparse, _ = upcycle(model, 3)
    layer = next(iter(mmoe.moe_layers(sparse).values()))
    dense = next(iter(sites(model).values())).module
    before, theirs = layer.experts.up_proj.detach().clone(), dense.c_fc.weight.detach().clone()
    assert layer.experts.up_proj.is_contiguous() and torch.equal(before[2], theirs.t())
    with torch.no_grad():
        layer.experts.up_proj[0].zero_()
    assert torch.equal(layer.experts.up_proj[1:], before[1:]) and torch.equal(dense.c_fc.weight, theirs)
    single, _ = upcycle(model, 1, top_k=1, inplace=True)
    with torch.no_grad():
        next(iter(mmoe.moe_layers(single).values())).experts.up_proj.zero_()
    assert torch.equal(dense.c_fc.weight, theirs), "E = 1 must copy too"


def test_inplace_and_copy() -> None:
    model = open_clip_host()
    attention = model.visual.transformer.resblocks[0].attn
    sparse, _ = upcycle(model)
    assert sparse is not model and not mmoe.moe_layers(model)
    assert sparse.visual.transformer.resblocks[0].attn is not attention
    same, _ = upcycle(model, inplace=True)
    assert same is model and len(mmoe.moe_layers(model)) == 5
    assert model.visual.transformer.resblocks[0].attn is attention


def test_dtype_device_mode_and_frozen_weights_are_the_hosts() -> None:
    model = open_clip_host().bfloat16()
    model.visual.requires_grad_(False)
    model.transformer.train()
    sparse, _ = upcycle(model, router="topk:bias_rate=0.1")
    assert {p.dtype for p in sparse.parameters()} == {torch.bfloat16}
    for name, layer in mmoe.moe_layers(sparse).items():
        assert layer.get_buffer("router.select_bias").dtype == torch.float32
        assert layer.training is layer.experts.training is not name.startswith("visual")
        assert all(p.requires_grad is not name.startswith("visual") for p in layer.experts.parameters())
        assert all(p.requires_grad for p in layer.router.parameters())


def test_meta_device() -> None:
    with torch.device("meta"):
        model = open_clip_host()
    sparse, report = upcycle(model, noise=0.1)
    real, expected = upcycle(open_clip_host(), noise=0.1)
    assert all(p.is_meta for p in sparse.parameters())
    assert report == expected and mmoe.count_params(sparse) == mmoe.count_params(real)
    sparse.load_state_dict(real.state_dict(), assign=True)
    assert {k: v.shape for k, v in sparse.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}


def test_dropout_is_the_hosts_or_given() -> None:
    model = HOSTS["hf gpt2"][0]()
    layer = next(iter(mmoe.moe_layers(upcycle(model)[0]).values()))
    assert layer.experts.dropout == 0.0 and layer.post.p == 0.1
    layer = next(iter(mmoe.moe_layers(upcycle(model, dropout=0.3)[0]).values()))
    assert layer.experts.dropout == 0.3 and layer.post.p == 0.1


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))


class Nested(nn.Module):
    """A stack whose members hold lists of their own, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList([nn.ModuleList([nn.Identity(), Layer()]) for _ in range(3)])
        self.pool = Layer()


LAST = {"visual": "visual.transformer.resblocks.{}.mlp", "text": "transformer.resblocks.{}.mlp"}


@pytest.mark.parametrize(
    ("layers", "visual", "text"),
    [
        (None, [0, 1], [0, 1, 2]),
        (1, [1], [2]),
        (2, [0, 1], [1, 2]),
        (99, [0, 1], [0, 1, 2]),
        ("visual.*", [0, 1], []),
        (["visual.*.1.*", "transformer.resblocks.0.mlp"], [1], [0]),
    ],
)
def test_which_layers(layers: Any, visual: list[int], text: list[int]) -> None:
    _, report = upcycle(open_clip_host(), layers=layers)
    want = [LAST["visual"].format(i) for i in visual] + [LAST["text"].format(i) for i in text]
    assert list(report.sites) == want and not report.refused


def test_layers_of_nested_stacks() -> None:
    model = Nested()
    assert list(upcycle(model, layers=1)[1].sites) == ["block.2.1.ffn"]
    assert list(upcycle(model, layers=2)[1].sites) == ["block.1.1.ffn", "block.2.1.ffn"]
    assert "pool.ffn" in upcycle(model)[1].sites


def test_wrong_layers() -> None:
    model = open_clip_host()
    with pytest.raises(UnknownName, match=r"did you mean: transformer\.resblocks\.0\.mlp"):
        upcycle(model, layers=["visual.*", "transformer.resblock.0.mlp"])
    with pytest.raises(BadOverride, match="layers=0"):
        upcycle(model, layers=0)
    with pytest.raises(Refused, match="no feed-forward block"):
        upcycle(nn.Linear(3, 3))


def test_sources_give_one_expert_each() -> None:
    model, first, second = open_clip_host(), open_clip_host(), open_clip_host()
    sparse, report = upcycle(model, 3, sources=[model, first, second.state_dict()], layers=1)
    for name in report.sites:
        layer = sparse.get_submodule(name)
        for e, source in enumerate((model, first, second)):
            theirs = source.get_submodule(name)
            assert torch.equal(layer.experts.up_proj[e], theirs.c_fc.weight)
            assert torch.equal(layer.experts.up_bias[e], theirs.c_fc.bias)
            assert torch.equal(layer.experts.down_proj[e], theirs.c_proj.weight)
            assert torch.equal(layer.experts.down_bias[e], theirs.c_proj.bias)
    dense = {key: value for key, value in model.state_dict().items() if key in sparse.state_dict()}
    assert all(torch.equal(value, sparse.state_dict()[key]) for key, value in dense.items())
    assert "one from each of 3 sources" in str(report)
    only_second = mmoe.override(sparse, mmoe.switch_off([0, 1]))
    with torch.no_grad(), only_second:
        got = clip_call(sparse)
    for name in report.sites:
        model.get_submodule(name).load_state_dict(second.get_submodule(name).state_dict())
    with torch.no_grad():
        want = clip_call(model)
    assert relative_gap(want, got) < 5e-6


def test_wrong_sources() -> None:
    model = open_clip_host()
    with pytest.raises(Refused, match=r"num_experts=1, sources=sources"):
        upcycle(model, 4, sources=[model])
    with pytest.raises(LoadMismatch, match="wrong shape"):
        upcycle(model, 2, sources=[model, {key: value[None] for key, value in model.state_dict().items()}])
    with pytest.raises(LoadMismatch, match=r"no 'transformer\.resblocks\.2\.mlp\.c_fc\.weight'"):
        upcycle(model, 2, sources=[model, open_clip_host(text_layers=2)])
    with pytest.raises(BadOverride, match="differ already"):
        upcycle(model, 1, top_k=1, sources=[model], noise=0.1)
    for count in (0, 2.5):
        with pytest.raises(BadOverride, match="num_experts is a whole number of at least 1"):
            upcycle(model, count)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(BadOverride, match="dropout=3\n  dropout is a finite number of at least 0 and below 1"):
        upcycle(model, 2, dropout=3)
    assert not mmoe.moe_layers(model)


def test_a_single_expert_is_the_block_itself() -> None:
    model = open_clip_host()
    sparse, _ = upcycle(model, 1)
    assert {layer.router.top_k for layer in mmoe.moe_layers(sparse).values()} == {1}
    with pytest.raises(BadOverride, match="top_k=2\n  top_k is a whole number from 1 to 1"):
        upcycle(model, 1, top_k=2)


def test_noise_is_relative_and_spares_the_first_copy() -> None:
    model = open_clip_host()
    sparse, report = upcycle(model, 4, noise=0.1)
    for name in report.sites:
        dense, experts = model.get_submodule(name), sparse.get_submodule(name).experts
        for packed, weight in ((experts.up_proj, dense.c_fc.weight), (experts.down_proj, dense.c_proj.weight)):
            gap = (packed - weight).detach()
            assert gap[0].abs().max() == 0
            torch.testing.assert_close(gap[1:].std() / weight.std(), torch.tensor(0.1), atol=0.01, rtol=0)
        assert torch.equal(experts.up_bias, dense.c_fc.bias.expand(4, -1))


def test_routers_are_drawn_from_the_generator_or_the_global_seed() -> None:
    model = open_clip_host()

    def gates(**options: Any) -> Tensor:
        sparse, _ = upcycle(model, noise=0.1, **options)
        layers = mmoe.moe_layers(sparse).values()
        return torch.cat([p.detach().flatten() for layer in layers for p in layer.parameters()])

    torch.manual_seed(1)
    first, state = gates(generator=torch.Generator().manual_seed(5)), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()), "a generator leaves the global seed alone"
    torch.manual_seed(2)
    assert torch.equal(gates(generator=torch.Generator().manual_seed(5)), first)
    assert not torch.equal(gates(generator=torch.Generator().manual_seed(6)), first)
    torch.manual_seed(3)
    second = gates()
    torch.manual_seed(3)
    assert torch.equal(gates(), second) and not torch.equal(gates(), second)


def test_twice() -> None:
    model = open_clip_host()
    half, _ = upcycle(model, layers="visual.*")
    whole, report = upcycle(half)
    assert set(report.refused.values()) == {"it is a MoE already"} and len(report.refused) == 2
    assert len(report.sites) == 3 and len(mmoe.moe_layers(whole)) == 5
    with pytest.raises(Refused, match="and 4 more: it is a MoE already"):
        upcycle(whole)


def test_blocks_with_hooks_are_left_alone() -> None:
    model = open_clip_host()
    model.transformer.resblocks[0].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    sparse, report = upcycle(model)
    assert "forward hooks" in report.refused["transformer.resblocks.0.mlp"] and len(report.sites) == 4
    text = torch.tensor([[1, 5, 3, 63, 0, 0, 0, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(sparse.encode_text(text), model.encode_text(text), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [0, 1.5, True])
def test_a_number_of_layers_that_is_none(layers: Any) -> None:
    with pytest.raises(BadOverride, match=f"layers={layers}\n  layers is a whole number of at least 1"):
        upcycle(open_clip_host(), layers=layers)


def test_blocks_that_cannot_be_read_are_reported() -> None:
    model = nn.ModuleList([Layer(), nn.TransformerEncoderLayer(4, 2, 6)])
    _, report = upcycle(model)
    assert list(report.sites) == ["0.ffn"] and "beside others" in report.refused["1"]
    assert "1      unchanged: its layers stand beside" in str(report)
    with pytest.raises(Refused, match="beside others"):
        upcycle(model, layers="1")


def test_router_by_name_and_options() -> None:
    model = open_clip_host()
    sparse, _ = upcycle(model, router="topk:top_k=1", router_options={"score": "sigmoid"}, top_k=3)
    router = sparse.visual.transformer.resblocks[0].mlp.router
    assert (router.top_k, router.score) == (1, "sigmoid"), "a spec wins over top_k"
    with pytest.raises(BadOverride, match="did you mean: score"):
        upcycle(model, router_options={"scor": "sigmoid"})
    with pytest.raises(UnknownName, match="did you mean: topk"):
        upcycle(model, router="top_k")
    with pytest.raises(BadOverride, match="top_k=5"):
        upcycle(model, 4, top_k=5)


def test_report_trace_and_profile() -> None:
    model = open_clip_host()
    sparse, report = upcycle(model, num_experts=4, top_k=1)
    assert isinstance(report, SwapReport)
    data = json.loads(json.dumps(report.as_dict()))
    params = mmoe.count_params(sparse)
    assert data["params_before"] == mmoe.count_params(model).total
    assert (data["params_after"], data["active_after"]) == (params.total, params.active)
    site = data["sites"]["visual.transformer.resblocks.0.mlp"]
    dense = 64 * 256 * 2 + 256 + 64
    assert site == {
        "num_experts": 4,
        "source": "copies of the model's own",
        "params_before": dense,
        "params_after": 4 * dense + 4 * 64,
    }
    assert params.active == mmoe.count_params(model).total + params.routers, "top-1 costs the routers only"
    assert len(str(report).splitlines()) == 6
    with mmoe.trace(sparse) as routing:
        clip_call(sparse)
    assert routing.layers == list(report.sites)
    assert routing.counts().sum(1).tolist() == [10, 10, 24, 24, 24]
    cost = mmoe.profile(sparse, clip_call, sparse).flops
    assert cost == mmoe.profile(model, clip_call, model).flops + 2 * 4 * (64 * 20 + 32 * 72)
    assert all(isinstance(layer, HostedMoE) for layer in mmoe.moe_layers(sparse).values())


def test_generate_with_a_cache() -> None:
    model = HOSTS["hf llama"][0]()
    sparse, _ = upcycle(model)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(sparse.generate(tokens(), **options), model.generate(tokens(), **options))
