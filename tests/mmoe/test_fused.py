"""The fused step of feed-forward experts: the same results and gradients as one product per expert, everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import mmoe
from mmoe import Context, FFNExperts, FixedRouter, GatedFFNExperts, MoE, Routing, TopKRouter, memory
from mmoe.experts import plan as plans
from mmoe.experts.activations import ACTIVATIONS, KERNELS
from mmoe.experts.fused import FeedForward, pays, routed_ffn
from mmoe.experts.plan import Plan

T, D, F, E = 24, 16, 12, 5
EXPERTS = {
    "plain": lambda: FFNExperts(D, F, E),
    "plain without bias": lambda: FFNExperts(D, F, E, bias=False, act="relu"),
    "plain to another width": lambda: FFNExperts(D, F, E, 8),
    "gated": lambda: GatedFFNExperts(D, F, E),
    "gated with bias": lambda: GatedFFNExperts(D, F, E, bias=True, act="gelu"),
}
ROUTES: dict[str, Callable[[], Tensor]] = {
    "one each": lambda: torch.randint(E, (T,)),
    "two each": lambda: torch.stack([torch.randperm(E)[:2] for _ in range(T)]),
    "some unused": lambda: torch.randint(E + 1, (T, 3)),
    "one expert has all": lambda: torch.full((T,), 3),
    "the same twice": lambda: torch.full((T, 2), 1),
    "nothing used": lambda: torch.full((T, 2), E),
}


def results(moe: MoE, backend: str, x: Tensor, context: Context | None = None) -> list[Tensor | None]:
    """Output and all gradients."""
    moe.experts.backend = backend  # type: ignore[assignment]  # any of the names
    moe.zero_grad()
    x = x.detach().requires_grad_()
    y = moe(x, context)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in moe.parameters())]


def check(moe: MoE, x: Tensor, context: Context | None = None) -> None:
    rows = x.reshape(-1, x.shape[-1])
    moe.experts.backend = "fused"
    flat = None if context is None else context.flatten(x.shape[:-1])
    assert moe.experts.fuses(rows, moe.route(rows, flat))
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if x.dtype == torch.float32 else {"atol": 0.15, "rtol": 0.05}
    for ours, reference in zip(results(moe, "fused", x, context), results(moe, "loop", x, context), strict=True):
        assert (ours is None) == (reference is None)
        if ours is not None and reference is not None:
            assert ours.dtype == reference.dtype
            torch.testing.assert_close(ours, reference, **tolerance)


@pytest.fixture(params=list(EXPERTS))
def experts(request: pytest.FixtureRequest) -> Any:
    return EXPERTS[request.param]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_router(experts: Any, dtype: torch.dtype) -> None:
    check(MoE(TopKRouter(D, E), experts).to(dtype), torch.randn(2, T, D, dtype=dtype))


@pytest.mark.parametrize("routes", list(ROUTES))
def test_any_routes(experts: Any, routes: str) -> None:
    check(MoE(FixedRouter(E), experts), torch.randn(T, D), Context(expert_ids=ROUTES[routes]()))


def test_padding(experts: Any) -> None:
    check(MoE(TopKRouter(D, E), experts), torch.randn(T, D), Context(valid=torch.rand(T) > 0.5))


@pytest.mark.parametrize("shape", [(0, D), (1, D), (2, 0, D)])
def test_few_rows(experts: Any, shape: tuple[int, ...]) -> None:
    check(MoE(TopKRouter(D, E), experts), torch.randn(shape))


def test_rows_that_are_not_contiguous(experts: Any) -> None:
    check(MoE(TopKRouter(D, E), experts), torch.randn(D, T).t())


@pytest.mark.parametrize("frozen", ["router", "experts", "experts.down", "experts.up", "experts.gate_up"])
def test_frozen_parts_get_no_gradient(experts: Any, frozen: str) -> None:
    moe = MoE(TopKRouter(D, E), experts)
    for name, parameter in moe.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    check(moe, torch.randn(T, D))


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_are_those_of_differences(gated: bool) -> None:
    def values(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.double, requires_grad=True)

    width, inner, experts = 3, 4, torch.tensor([[0, 3], [2, 3], [0, 2], [2, 2], [3, 3]])
    packed = (values(3, inner, width), values(3, inner), values(3, 2, inner // (1 + gated)), values(3, 2))

    def step(x: Tensor, weights: Tensor, *packed: Tensor) -> Tensor:
        routing = Routing(experts=experts, weights=weights, num_experts=3)
        return routed_ffn(x, routing, FeedForward(*packed, nn.functional.gelu, gated))

    assert torch.autograd.gradcheck(step, (values(5, width), values(5, 2), *packed))


SLOPE = nn.PReLU()


@pytest.mark.parametrize(
    "act",
    [
        SLOPE,
        SLOPE.forward,
        lambda x: nn.functional.prelu(x, SLOPE.weight),
        nn.LeakyReLU(0.1, inplace=True),
        lambda x: nn.functional.relu(x, inplace=True),
        lambda x: x,
    ],
)
def test_foreign_activations_keep_their_gradients(act: Callable[[Tensor], Tensor]) -> None:
    moe, x = MoE(TopKRouter(D, E), FFNExperts(D, F, E, act=act)), torch.randn(400, D)
    found = []
    for backend in ("auto", "fused", "loop"):
        SLOPE.weight.grad = None
        found.append([*results(moe, backend, x), SLOPE.weight.grad])
    for reference, *others in zip(*found[::-1], strict=True):
        for ours in others:
            assert (ours is None) == (reference is None)
            if ours is not None and reference is not None:
                torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_a_row_that_overflows_in_one_expert_does_not_reach_another(gated: bool) -> None:
    experts = (GatedFFNExperts if gated else FFNExperts)(D, F, 2, act="relu")
    moe = MoE(FixedRouter(2), experts).to(torch.float16)
    with torch.no_grad():
        for packed in experts.packed_parameters().values():
            packed.abs_()
            packed[0] /= 4096
    x = torch.full((7, D), 4096.0, dtype=torch.float16)
    x[4:] = 1.0
    context = Context(expert_ids=torch.tensor([0, 0, 0, 0, 1, 1, 1]))
    found, expected = results(moe, "fused", x, context), results(moe, "loop", x, context)
    for ours, reference in zip(found, expected, strict=True):
        assert ours is not None and reference is not None
        assert torch.equal(ours.isfinite(), reference.isfinite())


def test_inference_keeps_no_inner_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "CHUNK_BYTES", 0)
    taken: list[int] = []
    empty = memory.empty

    def watched(shape: tuple[int, ...], like: Tensor) -> Tensor:
        if shape[-1] == F:
            taken.append(shape[0])
        return empty(shape, like)

    monkeypatch.setattr(memory, "empty", watched)
    moe, x = MoE(TopKRouter(D, E), FFNExperts(D, F, E)), torch.randn(T, D)
    moe.backend = "fused"
    moe(x)
    assert max(taken) == 2 * T
    for mode in (torch.no_grad, torch.inference_mode):
        taken.clear()
        with mode():
            moe(x)
        assert max(taken) < 2 * T


@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.double, torch.bfloat16])
def test_kernels_of_activations(name: str, dtype: torch.dtype) -> None:
    act, kernel = ACTIVATIONS[name], KERNELS[ACTIVATIONS[name]]
    x = torch.linspace(-6, 6, 200, dtype=dtype).view(20, 10).t().requires_grad_()
    grad, value, slope = torch.randn_like(x), torch.empty_like(x), torch.empty_like(x)
    expected = act(x)
    (expected_slope,) = torch.autograd.grad(expected, x, grad)
    kernel.value(x.detach(), value)
    kernel.grad(grad, x.detach(), slope)
    assert torch.equal(value, expected)
    tolerance = {"atol": 1e-12, "rtol": 1e-9} if dtype == torch.double else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(slope, expected_slope, **tolerance)
    kernel.grad(grad, x.detach(), grad)
    assert torch.equal(grad, slope), "the gradient may be written over the one that came in"


@pytest.mark.parametrize("chunk_bytes", [0, 2000, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_of_any_size(
    experts: Any, chunk_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "CHUNK_BYTES", chunk_bytes)
    check(MoE(TopKRouter(D, E), experts).to(dtype), torch.randn(150, D, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routes", list(ROUTES))
@pytest.mark.parametrize("rows", [1, T])
def test_few_rows_without_a_graph(experts: Any, routes: str, rows: int, dtype: torch.dtype) -> None:
    moe, x = MoE(FixedRouter(E), experts).to(dtype), torch.randn(rows, D, dtype=dtype)
    context = Context(expert_ids=ROUTES[routes]()[:rows])
    with torch.no_grad():
        moe.backend = "loop"
        expected = moe(x, context)
        moe.backend = "auto"
        assert moe.experts.fuses(x, moe.route(x, context)) or rows > 1
        tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
        torch.testing.assert_close(moe(x, context), expected, **tolerance)


def test_the_same_bits_run_to_run(experts: Any) -> None:
    moe, x = MoE(TopKRouter(D, E), experts), torch.randn(T, D)
    for one, other in zip(results(moe, "fused", x), results(moe, "fused", x), strict=True):
        assert torch.equal(one, other)


def test_without_gradients(experts: Any) -> None:
    moe, x = MoE(TopKRouter(D, E), experts), torch.randn(T, D)
    expected = results(moe, "fused", x)[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(moe(x), expected)


def test_under_gradient_checkpointing(experts: Any) -> None:
    moe, x = MoE(TopKRouter(D, E), experts), torch.randn(T, D, requires_grad=True)
    expected = results(moe, "fused", x)
    moe.zero_grad()
    y = checkpoint(moe, x, use_reentrant=False)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    for got, want in zip([y, x.grad, *(p.grad for p in moe.parameters())], expected, strict=True):
        torch.testing.assert_close(got, want)


def test_second_derivatives(experts: Any) -> None:
    moe, x = MoE(TopKRouter(D, E), experts).double(), torch.randn(T, D, dtype=torch.double, requires_grad=True)
    found = []
    for backend in ("fused", "loop"):
        moe.backend = backend
        inputs = (x, *moe.parameters())
        first = torch.autograd.grad(moe(x).square().sum(), inputs, create_graph=True)
        penalty = sum((grad.square().sum() for grad in first), torch.zeros(()))
        found.append([*first, *torch.autograd.grad(penalty, inputs)])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-4)  # the router decides in fp32


def test_second_derivatives_of_what_is_not_frozen(experts: Any) -> None:
    moe, x = MoE(TopKRouter(D, E), experts.requires_grad_(False)), torch.randn(T, D, requires_grad=True)
    moe.backend = "fused"
    (first,) = torch.autograd.grad(moe(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()
    assert moe.router.weight.grad is not None and moe.router.weight.grad.any()
    assert all(parameter.grad is None for parameter in experts.parameters())


class TestFallsBack:
    """Where the fused step cannot run, the layer computes the same another way."""

    def fuses(self, moe: MoE, x: Tensor) -> bool:
        moe.experts.backend = "fused"
        return moe.experts.fuses(x, moe.route(x))

    def test_with_dropout_in_training(self) -> None:
        moe, x = MoE(TopKRouter(D, E), FFNExperts(D, F, E, dropout=0.5)), torch.randn(T, D)
        assert not self.fuses(moe.train(), x) and self.fuses(moe.eval(), x)

    def test_under_autocast(self) -> None:
        moe, x = MoE(TopKRouter(D, E), FFNExperts(D, F, E)), torch.randn(T, D)
        with torch.autocast("cpu", torch.bfloat16):
            assert not self.fuses(moe, x) and moe(x).dtype == torch.bfloat16

    def test_under_compile(self) -> None:
        moe, x = MoE(TopKRouter(D, E), FFNExperts(D, F, E)), torch.randn(T, D)
        moe.experts.backend = "fused"
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(moe, backend="eager", fullgraph=True)(x), moe(x))

    def test_under_functional_transforms(self) -> None:
        moe, x = MoE(TopKRouter(D, E), FFNExperts(D, F, E)), torch.randn(T, D)
        moe.experts.backend = "fused"
        parameters = dict(moe.named_parameters())
        grads = torch.func.grad(lambda p: torch.func.functional_call(moe, p, (x,)).square().sum())(parameters)
        moe(x).square().sum().backward()
        for name, parameter in moe.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad)

    def test_with_low_rank_adapters_on_packed_experts(self) -> None:
        host, x = nn.Sequential(MoE(TopKRouter(D, E), GatedFFNExperts(D, F, E))), torch.randn(T, D)
        host[0].experts.backend = "fused"
        before = host(x).detach()
        config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        adapted = get_peft_model(host, config)
        torch.testing.assert_close(adapted(x), before)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        y = adapted(x)
        assert (y - before).abs().max() > 0.1
        torch.testing.assert_close(adapted.merge_and_unload()(x), y, atol=1e-4, rtol=1e-4)

    def test_with_other_experts(self) -> None:
        moe = MoE(TopKRouter(D, E), mmoe.WithNullExperts(D, F, E))
        assert not self.fuses(moe, torch.randn(T, D))


def test_it_pays_for_large_gradients_half_precision_and_many_slots_of_one_expert() -> None:
    small, large = torch.empty(4, 64, 8), torch.empty(4, 1024, 512, device="meta")
    assert pays(512, small, trains=False) and not pays(511, small, trains=False)
    assert [pays(slots, large, trains=False) for slots in (47, 48, 160, 161)] == [False, True, True, False]
    assert [pays(slots, large, trains=True) for slots in (48, 511, 512)] == [False, False, True]
    assert pays(1, torch.empty(16, 1024, 512, device="meta"), trains=True), "32 MB of gradients"
    assert pays(1, small.half(), trains=False) and not pays(7, small.half(), trains=True)
    assert pays(8, small.half(), trains=True)


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("chunk_bytes", [0, 700, 2**22])
def test_every_slot_has_a_place_of_its_expert(unused: bool, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "CHUNK_BYTES", chunk_bytes)
    counts = [3, 4, 0, 4, 400, 5, 4, 0, 0, 2]
    ids = torch.arange(10).repeat_interleave(torch.tensor(counts))
    ids = torch.cat([ids, torch.full((10,), 10)]) if unused else ids
    order = torch.randperm(len(ids))
    routing = Routing(experts=ids[order].view(-1, 2), weights=torch.rand(len(ids) // 2, 2), num_experts=10)
    routing = replace(routing, all_used=not unused)
    x, factors = torch.randn(len(ids) // 2, 6), torch.arange(10.0)[:, None, None] * torch.eye(6)
    expected = torch.zeros_like(x)
    for row, (chosen, weights) in enumerate(zip(routing.experts.tolist(), routing.weights.tolist(), strict=True)):
        for expert, weight in zip(chosen, weights, strict=True):
            expected[row] += x[row] * expert * weight * (expert < 10)
    for half in (False, True):
        plan = Plan.make(routing, row_bytes=8, half=half)
        places = torch.zeros(len(plan.tokens), 6)
        for chunk in plan.chunks:
            rows = plan.gather(chunk, x, torch.empty(plan.most * 6))
            assert chunk.filled is None or not rows[chunk.filled].any(), "a filled place is zero"
            chunk.multiply(rows, factors, places[chunk.places])
        torch.testing.assert_close(plan.add_up(places, routing.weights), expected)
        torch.testing.assert_close(
            plan.of_slots(plan.scale(routing.weights, torch.float32), routing.weights),
            routing.weights * (routing.experts < 10),
        )
        used = [e for e, count in enumerate(counts) if count]
        assert [e for experts in plan.experts for e in range(experts.start, experts.stop)] == used
        assert len(plan.experts) == (len(used) if not half else 5)
        assert len(plan.chunks) == {0: len(plan.experts), 2**22: 1}.get(chunk_bytes, len(plan.chunks))


def test_neighbours_with_few_rows_share_a_product() -> None:
    ids = torch.arange(6).repeat_interleave(torch.tensor([1, 2, 3, 0, 3, 4]))
    routing = Routing(experts=ids[:, None], weights=torch.ones(len(ids), 1), num_experts=6, all_used=True)
    found = Plan.make(routing, row_bytes=8, half=False).experts
    assert found == [slice(0, 3), slice(4, 5), slice(5, 6)]


@pytest.mark.parametrize("width", [16, 6])
def test_many_experts_with_few_rows(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    grouped = torch.nn.functional.grouped_mm
    monkeypatch.setattr(plans.F, "grouped_mm", lambda *args, **kwargs: calls.append(args) or grouped(*args, **kwargs))
    counts = torch.tensor([0, 5, 9, 1, 1, 7, 0, 4, 8, 2, 5, 6, 3, 7, 5, 0])
    ids = torch.arange(len(counts)).repeat_interleave(counts)[torch.randperm(int(counts.sum()))]
    routing = Routing(experts=ids[:, None], weights=torch.rand(len(ids), 1), num_experts=len(counts))
    x, weights = torch.randn(len(ids), width), torch.randn(len(counts), 8, width)
    plan = Plan.make(routing, row_bytes=8, half=False)
    (chunk,) = plan.chunks
    places = torch.empty(len(plan.tokens), 8)
    chunk.multiply(plan.gather(chunk, x, torch.empty(plan.most * width)), weights.mT, places)
    expected = routing.weights * (weights[ids] @ x[:, :, None])[..., 0]
    torch.testing.assert_close(plan.add_up(places, routing.weights), expected)
    assert len(calls) == (width == 16), "one call, where its rules allow it"


def test_auto_takes_it_where_it_pays() -> None:
    moe, x = MoE(TopKRouter(D, 2, top_k=1), FFNExperts(D, 2**22 // D, 2)), torch.randn(256, D)
    few = x[:255]
    assert moe.experts.fuses(few, moe.route(few)), "large gradients will be asked for"
    with torch.no_grad():
        assert moe.experts.fuses(x, moe.route(x)) and not moe.experts.fuses(few[:4], moe.route(few[:4]))
    moe.requires_grad_(False)
    assert not moe.experts.fuses(few, moe.route(few))
    assert moe.experts.fuses(few.requires_grad_(), moe.route(few))


@pytest.mark.parametrize("rows", [4, 256])
def test_forward_mode_derivatives_are_those_of_backward_mode(rows: int) -> None:
    moe, x, v = mmoe.build_moe(D, F, E), torch.randn(rows, D), torch.randn(rows, D)
    moe.requires_grad_(False)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(moe(forward_ad.make_dual(x, v)))
    _, expected = torch.autograd.functional.jvp(moe, x, v)
    torch.testing.assert_close(y.tangent, expected, atol=1e-5, rtol=1e-4)
