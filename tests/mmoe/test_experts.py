"""What every registered kind of experts promises, and the formula and layout of each.

Shapes: N sorted rows, D width, F inner width, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmoe
from mmoe import Context, Experts, FFNExperts, FixedRouter, GatedFFNExperts, MoE, TopKRouter, WithNullExperts
from mmoe.errors import BadOverride, UnknownName
from mmoe.experts import FFN, GatedFFN, activation

D, HIDDEN, E = 16, 8, 5
VARIANTS = [
    "ffn:bias=false,act=relu",
    "gated_ffn:bias=true",
    "with_null:kind=copy,num_null=2",
    "with_null:real=gated_ffn",
    "with_null:real=gated_ffn,num_shared=2,shared_dim=24",
]
COUNTS = {
    "even": [4, 4, 4, 4, 4],
    "empty_experts": [0, 7, 0, 5, 0],
    "one_expert_has_all": [0, 0, 9, 0, 0],
    "one_row": [0, 0, 0, 0, 1],
    "no_rows": [0, 0, 0, 0, 0],
}


def build(spec: str) -> Experts:
    return mmoe.build_experts(spec, dim=D, hidden_dim=HIDDEN, num_experts=E).eval()


@contextmanager
def using(experts: Experts, backend: str) -> Iterator[None]:
    """Sets the backend of experts and of those inside them."""
    parts = [module for module in experts.modules() if isinstance(module, Experts)]
    for part in parts:
        part.backend = backend
    yield
    for part in parts:
        part.backend = "auto"


@pytest.fixture(params=[*mmoe.list_experts(), *VARIANTS])
def experts(request: pytest.FixtureRequest) -> Experts:
    return build(request.param)


@pytest.fixture(params=list(COUNTS))
def counts(request: pytest.FixtureRequest) -> Tensor:
    return torch.tensor(COUNTS[request.param])


def run_and_grads(experts: Experts, x: Tensor, counts: Tensor) -> list[Tensor]:
    """Output, gradient of the input and of each parameter."""
    x = x.detach().clone().requires_grad_()
    experts.zero_grad()
    y = experts(x, counts)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in experts.parameters())]


class TestContract:
    def test_shape_and_type(self, experts: Experts, counts: Tensor) -> None:
        x = torch.randn(int(counts.sum()), D)
        assert isinstance(experts, Experts) and experts.num_experts == E
        assert experts(x, counts).shape == x.shape

    def test_every_row_sees_its_expert_alone(self, experts: Experts, counts: Tensor) -> None:
        x = torch.randn(int(counts.sum()), D)
        owner = torch.arange(E).repeat_interleave(counts)
        alone = [experts(row[None], F.one_hot(e, E)) for row, e in zip(x, owner, strict=True)]
        torch.testing.assert_close(experts(x, counts), torch.cat([x[:0], *alone]))

    @pytest.mark.parametrize("name", [name for name in COUNTS if name != "no_rows"])  # these are the loop's alone
    def test_grouped_and_loop_agree(self, experts: Experts, name: str) -> None:
        counts = torch.tensor(COUNTS[name])
        x = torch.randn(int(counts.sum()), D)
        with using(experts, "grouped"):
            grouped = run_and_grads(experts, x, counts)
        with using(experts, "loop"):
            loop = run_and_grads(experts, x, counts)
        for a, b in zip(grouped, loop, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    def test_grouped_and_loop_agree_in_bf16(self, experts: Experts) -> None:
        counts = torch.tensor([3, 0, 9, 1, 7])
        experts.to(torch.bfloat16)
        x = torch.randn(20, D, dtype=torch.bfloat16)
        with using(experts, "grouped"):
            grouped = run_and_grads(experts, x, counts)
        with using(experts, "loop"):
            loop = run_and_grads(experts, x, counts)
        for a, b in zip(grouped, loop, strict=True):
            assert a.dtype == torch.bfloat16
            torch.testing.assert_close(a, b, atol=0.02 * b.abs().max().item(), rtol=0.02)

    def test_zero_rows_give_every_parameter_a_gradient(self, experts: Experts) -> None:
        x = torch.randn(0, D, requires_grad=True)
        experts(x, torch.zeros(E, dtype=torch.long)).sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())

    @pytest.mark.parametrize("backend", ["loop", "grouped", "auto"])
    def test_non_contiguous_input(self, experts: Experts, backend: str) -> None:
        counts = torch.tensor([2, 3, 0, 4, 1])
        x = torch.randn(D, 10).t()
        with using(experts, backend):
            torch.testing.assert_close(experts(x, counts), experts(x.contiguous(), counts))
            torch.testing.assert_close(experts(x[:, :D], counts), experts(x.contiguous(), counts))

    def test_permuting_rows_of_one_expert_permutes_its_outputs(self, experts: Experts) -> None:
        counts = torch.tensor([0, 10, 0, 0, 0])
        x, perm = torch.randn(10, D), torch.randperm(10)
        torch.testing.assert_close(experts(x[perm], counts), experts(x, counts)[perm])

    def test_packed_parameters_lead_with_the_expert(self, experts: Experts) -> None:
        for part in (module for module in experts.modules() if isinstance(module, Experts)):
            packed = part.packed_parameters()
            assert all(value.shape[0] == part.num_experts for value in packed.values())
            own = {name for name, p in part.named_parameters(recurse=False) if p.shape[0] == part.num_experts}
            assert own == set(packed), "active parameters are counted by `packed`"

    def test_permuting_packed_parameters_permutes_experts(self, experts: Experts) -> None:
        if not experts.packed:
            pytest.skip("the packed parameters are inside")
        perm = torch.randperm(E)
        renamed = copy.deepcopy(experts)
        with torch.no_grad():
            for value in renamed.packed_parameters().values():
                value.copy_(value[perm])
        groups = torch.randn(E, 3, D)
        counts = torch.full((E,), 3)
        y = experts(groups.flatten(0, 1), counts).view(E, 3, D)
        torch.testing.assert_close(renamed(groups[perm].flatten(0, 1), counts).view(E, 3, D), y[perm])

    def test_autocast_computes_in_its_dtype_with_either_backend(self, experts: Experts) -> None:
        counts, x = torch.tensor([3, 0, 9, 1, 7]), torch.randn(20, D)
        expected = experts(x, counts)
        for backend in ("auto", "loop", "grouped"):
            with using(experts, backend), torch.autocast("cpu", torch.bfloat16):
                y = experts(x, counts)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.float(), expected, atol=0.03, rtol=0.03)

    def test_builds_on_the_meta_device(self, experts: Experts) -> None:
        assert all(p.is_meta for p in experts.to("meta").parameters())


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight.data
    if bias is not None:
        layer.bias.data = bias.data
    return layer


def row(packed: nn.Parameter | None, e: int) -> Tensor | None:
    return None if packed is None else packed[e]


class TestFormulas:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(("name", "act"), [("gelu", nn.GELU()), ("relu", nn.ReLU()), ("silu", nn.SiLU())])
    def test_ffn_is_a_loop_of_linear_layers(self, name: str, act: nn.Module, bias: bool) -> None:
        experts, counts = FFNExperts(D, HIDDEN, 3, act=name, bias=bias), [2, 0, 5]
        x = torch.randn(7, D)
        expected = []
        for e, rows in enumerate(x.split(counts)):
            up = linear(experts.up_proj[e], row(experts.up_bias, e))
            down = linear(experts.down_proj[e], row(experts.down_bias, e))
            expected.append(down(act(up(rows))))
        torch.testing.assert_close(experts(x, torch.tensor(counts)), torch.cat(expected))

    @pytest.mark.parametrize("bias", [False, True])
    def test_gated_ffn_is_a_loop_of_linear_layers(self, bias: bool) -> None:
        experts, counts = GatedFFNExperts(D, HIDDEN, 3, bias=bias), [2, 0, 5]
        x = torch.randn(7, D)
        expected = []
        for e, rows in enumerate(x.split(counts)):
            both = linear(experts.gate_up_proj[e], row(experts.gate_up_bias, e))(rows)
            hidden = F.silu(both[:, :HIDDEN]) * both[:, HIDDEN:]
            expected.append(linear(experts.down_proj[e], row(experts.down_bias, e))(hidden))
        torch.testing.assert_close(experts(x, torch.tensor(counts)), torch.cat(expected))

    def test_output_width_can_differ(self) -> None:
        experts = FFNExperts(D, HIDDEN, 3, out_dim=4)
        y = MoE(TopKRouter(D, 3), experts)(torch.randn(2, 7, D))
        assert y.shape == (2, 7, 4)

    @pytest.mark.parametrize("kind", [FFNExperts, GatedFFNExperts])
    def test_one_expert_is_the_dense_twin(self, kind: type[FFNExperts] | type[GatedFFNExperts]) -> None:
        experts, x = kind(D, HIDDEN, 1, bias=True), torch.randn(6, D)
        dense = (FFN if kind is FFNExperts else GatedFFN)(D, HIDDEN, bias=True)
        packed = {name.replace("_bias", "_proj.bias"): value[0] for name, value in experts.state_dict().items()}
        dense.load_state_dict({name if "." in name else f"{name}.weight": value for name, value in packed.items()})
        torch.testing.assert_close(dense(x), experts(x, torch.tensor([6])))

    def test_gate_of_a_shared_expert_scales_its_output(self) -> None:
        gated, x = GatedFFN(D, HIDDEN, gate=True), torch.randn(6, D)
        plain = GatedFFN(D, HIDDEN)
        plain.load_state_dict(gated.state_dict(), strict=False)  # it has no gate
        assert gated.gate is not None
        torch.testing.assert_close(gated(x), plain(x) * gated.gate(x).sigmoid())

    @pytest.mark.parametrize("kind", [FFNExperts, GatedFFNExperts])
    def test_dropout_is_active_in_training_only(self, kind: type[FFNExperts] | type[GatedFFNExperts]) -> None:
        experts, x, counts = kind(D, HIDDEN, 2, dropout=0.5, bias=False), torch.randn(6, D), torch.tensor([2, 4])
        assert not torch.equal(experts.train()(x, counts), experts(x, counts))
        exact = kind(D, HIDDEN, 2, bias=False)
        exact.load_state_dict(experts.state_dict())
        assert torch.equal(experts.eval()(x, counts), exact(x, counts))
        assert torch.equal(exact.train()(x, counts), exact.eval()(x, counts)), "off by default"

    def test_weights_start_like_linear_layers(self) -> None:
        experts = FFNExperts(64, 256, 4)
        twin = FFN(64, 256)
        for packed, single in [
            (experts.up_proj, twin.up_proj.weight),
            (experts.down_proj, twin.down_proj.weight),
            (experts.up_bias, twin.up_proj.bias),
            (experts.down_bias, twin.down_proj.bias),
        ]:
            assert packed is not None
            assert packed.std().item() == pytest.approx(single.std().item(), rel=0.2)
            assert packed.abs().max().item() == pytest.approx(single.abs().max().item(), rel=0.05)


class TestNull:
    def test_zero_and_copy(self) -> None:
        x, counts = torch.randn(6, D), torch.tensor([2, 1, 3])
        zero = WithNullExperts(D, HIDDEN, 3, num_null=1)
        copies = WithNullExperts(D, HIDDEN, 3, num_null=1, kind="copy")
        assert (zero(x, counts)[3:] == 0).all() and torch.equal(copies(x, counts)[3:], x[3:])
        real = FFNExperts(D, HIDDEN, 2)
        real.load_state_dict(zero.real.state_dict())
        torch.testing.assert_close(zero(x, counts)[:3], real(x[:3], counts[:2]))

    def test_null_rows_cost_nothing(self) -> None:
        moe = MoE(FixedRouter(4), WithNullExperts(D, HIDDEN, 4, num_null=2))
        x = torch.randn(6, D)

        def flops(ids: list[int]) -> int:
            return mmoe.profile(moe, moe, x, Context(expert_ids=torch.tensor(ids))).flops

        assert flops([2, 3, 2, 3, 2, 3]) == 0
        assert flops([0, 1, 2, 3, 2, 3]) == 2 * 2 * (2 * D * HIDDEN)

    def test_only_real_experts_have_parameters(self) -> None:
        experts = WithNullExperts(D, HIDDEN, 4, num_null=3, real="gated_ffn")
        assert {name: tuple(p.shape) for name, p in experts.named_parameters()} == {
            "real.gate_up_proj": (1, 2 * HIDDEN, D),
            "real.down_proj": (1, D, HIDDEN),
        }

    def test_bad_options(self) -> None:
        with pytest.raises(BadOverride, match="kind='coppy'\n  did you mean: copy"):
            WithNullExperts(D, HIDDEN, 4, kind="coppy")  # type: ignore[arg-type]  # wrong on purpose
        with pytest.raises(BadOverride, match="num_null=4\n  num_null is a whole number from 0 to 3"):
            WithNullExperts(D, HIDDEN, 4, num_null=4)


class TestLayoutOfTransformers:
    """Weights of transformers' blocks load by renaming, and whole blocks agree."""

    @pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen3_moe_raw"])
    def test_whole_block_agrees(self, family: str) -> None:
        theirs = mixtral_block() if family == "mixtral" else qwen3_block(norm_topk_prob=family == "qwen3_moe")
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.5)
        ours = mmoe.build_moe(D, HIDDEN, E, 2, **({"weights": "raw"} if family == "qwen3_moe_raw" else {}))
        state = theirs.state_dict()
        assert set(state) == {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}
        state["router.weight"] = state.pop("gate.weight")
        ours.load_state_dict(state)
        x = torch.randn(2, 7, D)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
        experts, weights = theirs.gate(x.flatten(0, 1))[2], theirs.gate(x.flatten(0, 1))[1]
        routing = ours.router(x.flatten(0, 1))
        assert torch.equal(routing.experts, experts)
        torch.testing.assert_close(routing.weights, weights)


def mixtral_block() -> nn.Module:
    from transformers.models.mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    return MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=D, intermediate_size=HIDDEN, num_local_experts=E, num_experts_per_tok=2)
    )


def qwen3_block(norm_topk_prob: bool) -> nn.Module:
    from transformers.models.qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    return Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(
            hidden_size=D,
            moe_intermediate_size=HIDDEN,
            num_experts=E,
            num_experts_per_tok=2,
            norm_topk_prob=norm_topk_prob,
        )
    )


class TestActivations:
    def test_quick_gelu_and_gelu_tanh(self) -> None:
        x = torch.linspace(-3, 3, 13)
        torch.testing.assert_close(activation("quick_gelu")(x), x / (1 + (-1.702 * x).exp()))
        torch.testing.assert_close(activation("gelu_tanh")(x), nn.GELU(approximate="tanh")(x))

    def test_a_function_is_taken_as_it_is(self) -> None:
        assert activation(torch.tanh) is torch.tanh

    def test_unknown_activation(self) -> None:
        with pytest.raises(UnknownName) as error:
            FFNExperts(D, HIDDEN, 2, act="gelutanh")
        assert str(error.value) == (
            "no activation named 'gelutanh'\n  did you mean: gelu_tanh, gelu\n  try: act='gelu'"
        )
