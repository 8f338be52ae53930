"""All backends of the layer against its definition, written out: outputs and every gradient, whatever is routed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import mmoe
import mmoe.errors
from mmoe import Context, FFNExperts, FixedRouter, GatedFFN, GatedFFNExperts, MoE, Routing, TopKRouter
from mmoe.dispatch import Backend

T, D, F, E = 40, 16, 24, 6
BACKENDS = get_args(Backend)
EXPERTS: dict[str, Callable[[], Any]] = {
    "ffn": lambda: FFNExperts(D, F, E),
    "ffn without bias": lambda: FFNExperts(D, F, E, bias=False),
    "gated": lambda: GatedFFNExperts(D, F, E),
    "gated with bias": lambda: GatedFFNExperts(D, F, E, bias=True),
}
ROUTES: dict[str, Callable[[], Tensor]] = {
    "one each": lambda: torch.randint(E, (T,)),
    "two each": lambda: torch.stack([torch.randperm(E)[:2] for _ in range(T)]),
    "as many as they like": lambda: torch.randint(E + 1, (T, 3)),
    "only two of the experts": lambda: torch.randint(2, (T, 1)) * (E - 1),
    "one expert has all": lambda: torch.full((T,), 3),
    "nothing used": lambda: torch.full((T, 2), E),
}
TOLERANCES = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 0.05, "rtol": 0.05}}


@pytest.fixture(params=list(EXPERTS))
def experts(request: pytest.FixtureRequest) -> Any:
    return EXPERTS[request.param]()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    backend: Backend = request.param
    return backend


def written_out(moe: MoE, x: Tensor, routing: Routing) -> Tensor:
    """The definition: every expert sees every row, a table of weights (T, E) keeps what was routed."""
    experts: Any = moe.experts
    up, up_bias = experts._up()
    inner = torch.einsum("td,efd->tef", x, up)
    inner = inner if up_bias is None else inner + up_bias
    hidden = experts.act(inner[..., :F]) * inner[..., F:] if experts.gated else experts.act(inner)
    out = torch.einsum("tef,edf->ted", hidden, experts.down_proj)
    out = out if experts.down_bias is None else out + experts.down_bias
    table = torch.zeros(len(x), E + 1, dtype=x.dtype).scatter_add(1, routing.experts, routing.weights)[:, :E]
    y = torch.einsum("te,ted->td", table, out)
    return y if moe.shared is None else y + moe.shared(x)


def gradients(y: Tensor, x: Tensor, moe: MoE) -> list[Tensor]:
    probe = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    inputs = [x, *moe.parameters()]
    found = torch.autograd.grad((y * probe).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(value) if grad is None else grad for grad, value in zip(found, inputs, strict=True)]


def check(moe: MoE, x: Tensor, backend: Backend, context: Context | None = None) -> None:
    moe.backend = backend
    leaf = x.detach().requires_grad_()
    y = moe(leaf, context)
    got = [y, *gradients(y, leaf, moe)]

    exact = copy.deepcopy(moe).double()
    rows = x.detach().double().reshape(-1, x.shape[-1]).requires_grad_()
    decided = moe.route(x.reshape(-1, x.shape[-1]), None if context is None else context.flatten(x.shape[:-1]))
    weights = decided.weights.double()
    if isinstance(moe.router, TopKRouter):
        chosen = (decided.undropped or decided).experts.clamp(max=E - 1)
        weights = nn.functional.linear(rows, exact.router.weight).gather(1, chosen).softmax(-1)
    weights = weights.masked_fill(decided.experts == E, 0.0)
    routing = Routing(experts=decided.experts, weights=weights, num_experts=E)
    reference = written_out(exact, rows, routing)
    expected = [reference, *gradients(reference, rows, exact)]
    with torch.no_grad():
        inference = moe(x, context)
    torch.testing.assert_close(inference.double().flatten(), reference.flatten(), **TOLERANCES[x.dtype])
    for ours, exactly in zip(got, expected, strict=True):
        assert ours.dtype == x.dtype
        size = max([1.0, *exactly.abs().flatten().tolist()])
        torch.testing.assert_close(ours.double().flatten() / size, exactly.flatten() / size, **TOLERANCES[x.dtype])


@pytest.mark.parametrize("routes", list(ROUTES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_routes(experts: Any, routes: str, dtype: torch.dtype, backend: Backend) -> None:
    moe = MoE(FixedRouter(E), experts).to(dtype)
    check(moe, torch.randn(T, D, dtype=dtype), backend, Context(expert_ids=ROUTES[routes]()))


def test_a_router_with_a_shared_expert(experts: Any, backend: Backend) -> None:
    check(MoE(TopKRouter(D, E), experts, shared=GatedFFN(D, F)), torch.randn(2, T, D), backend)


def test_capacity_that_drops(experts: Any, backend: Backend) -> None:
    moe, x = MoE(TopKRouter(D, E, capacity_factor=0.5), experts), torch.randn(T, D)
    assert (moe.route(x).experts == E).any()
    check(moe, x, backend)


def test_padding(experts: Any, backend: Backend) -> None:
    check(MoE(TopKRouter(D, E), experts), torch.randn(T, D), backend, Context(valid=torch.rand(T) < 0.5))


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_rows(experts: Any, rows: int, backend: Backend) -> None:
    check(MoE(TopKRouter(D, E), experts), torch.randn(rows, D), backend)


def test_rows_that_are_not_contiguous(experts: Any, backend: Backend) -> None:
    check(MoE(TopKRouter(D, E), experts), torch.randn(D, T).t(), backend)
    check(MoE(TopKRouter(D, E), experts), torch.randn(T, 2 * D)[:, ::2], backend)


@pytest.mark.parametrize("router_dtype", [torch.float32, torch.bfloat16])
def test_experts_in_half_precision_under_a_router_in_full(
    experts: Any, router_dtype: torch.dtype, backend: Backend
) -> None:
    moe = MoE(TopKRouter(D, E).to(router_dtype), experts.bfloat16())
    moe.backend = backend
    x = torch.randn(T, D, dtype=torch.bfloat16, requires_grad=True)
    y = moe(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and moe.router.weight.grad.dtype == router_dtype
    routing = moe.route(x)
    assert routing.logits is not None and routing.logits.dtype == torch.float32
    exact = Routing(experts=routing.experts, weights=routing.weights.double(), num_experts=E)
    reference = written_out(copy.deepcopy(moe).double(), x.double(), exact)
    torch.testing.assert_close(y.double(), reference, **TOLERANCES[torch.bfloat16])


def test_autocast_computes_in_its_type(experts: Any, backend: Backend) -> None:
    moe, x = MoE(TopKRouter(D, E), experts), torch.randn(T, D, requires_grad=True)
    moe.backend = backend
    expected = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, **TOLERANCES[torch.bfloat16])
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.parameters())


def test_the_same_bits_run_to_run_in_deterministic_mode(experts: Any, backend: Backend) -> None:
    moe, x = MoE(TopKRouter(D, E, top_k=3), experts), torch.randn(400, D, requires_grad=True)
    moe.backend = backend
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, again = ([(y := moe(x)), *gradients(y, x, moe)] for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(before)


def test_without_a_graph(experts: Any, backend: Backend) -> None:
    moe, x = MoE(TopKRouter(D, E), experts), torch.randn(T, D)
    moe.backend = backend
    expected = moe(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = moe(x)
            assert not y.requires_grad
            torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)


def test_a_batch_of_gradients(experts: Any, backend: Backend) -> None:
    moe, x = MoE(TopKRouter(D, E), experts), torch.randn(T, D, requires_grad=True)
    moe.backend = backend
    y = moe(x)
    probes = torch.randn(3, *y.shape)
    (batched,) = torch.autograd.grad(y, x, probes, is_grads_batched=True, retain_graph=True)
    for probe, got in zip(probes, batched, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(y, x, probe, retain_graph=True)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [T, 4 * T])
def test_another_default_device(experts: Any, rows: int, backend: Backend) -> None:
    moe, x = MoE(TopKRouter(D, E), experts), torch.randn(rows, D)
    moe.backend = backend
    with torch.device("meta"):
        moe(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.device.type == "cpu" for p in moe.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_compute_the_same_with_the_same_backend(
    experts: Any, backend: Backend, copied: Callable[[MoE], MoE]
) -> None:
    moe, x = MoE(TopKRouter(D, E), experts), torch.randn(T, D)
    moe.backend = backend
    again = copied(moe)
    assert again.backend == backend and torch.equal(again(x), moe(x))


class TestCompiled:
    """torch.compile sees the grouped products: tracing, checkpoints and any number of rows go with it."""

    def host(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, MoE]:
        moe = mmoe.build_moe(D, F, E, 2).to(dtype)
        return nn.Sequential(nn.LayerNorm(D), moe).to(dtype), moe

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("train", [False, True])
    def test_no_new_graph_for_another_number_of_rows(self, dtype: torch.dtype, train: bool) -> None:
        host, _ = self.host(dtype)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(host, backend=counter, dynamic=True)
        graphs = []
        for rows in (20, 33, 64, 7, 128):
            x = torch.randn(rows, D, dtype=dtype, requires_grad=train)
            with torch.set_grad_enabled(train):
                y = compiled(x)
                torch.testing.assert_close(y, host(x), **TOLERANCES[dtype])
            if train:
                y.sum().backward()
            graphs.append(counter.frame_count)
        assert graphs == graphs[:1] * 5

    def test_under_checkpoints_gradients_and_loads_are_counted_once(self) -> None:
        host, moe = self.host()
        x = torch.randn(30, D, requires_grad=True)
        torch._dynamo.reset()
        compiled = torch.compile(host, backend="aot_eager")
        found = []
        for run in (host, lambda x: checkpoint(compiled, x, use_reentrant=False)):
            moe.zero_grad()
            x.grad = None
            with mmoe.trace(host) as routing:
                y = run(x)
                loss = y.square().sum() + mmoe.balance_loss(routing[0])
                loss.backward()
            assert len(routing) == 1 and int(routing[0].counts().sum()) == 60
            found.append([y.detach(), x.grad, *(p.grad for p in host.parameters() if p.grad is not None)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "cut out of wider rows": lambda weight: nn.functional.pad(weight, (0, 2))[..., :-2],
    "experts last": lambda weight: weight.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "transposed": lambda weight: weight.mT.contiguous().mT,
    "every other row": lambda weight: weight.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("rows", [1, 8, 100])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_weights_that_lie_apart(layout: str, rows: int, backend: Backend) -> None:
    moe = mmoe.build_moe(D, F, 16, 2)
    expected = moe(x := torch.randn(rows, D))
    for name, weight in moe.experts.packed_parameters().items():
        setattr(moe.experts, name, nn.Parameter(LAYOUTS[layout](weight.detach())))
    moe.backend = backend
    if backend == "grouped" and layout in ("cut out of wider rows", "experts last"):
        with pytest.raises(mmoe.errors.BadOverride, match="multiple of 16 bytes"):
            moe(x)
        return
    torch.testing.assert_close(moe(x), expected)


def test_shapes_on_the_meta_device() -> None:
    with torch.device("meta"):
        moe, x = mmoe.build_moe(D, F, E, 2), torch.randn(5, D)
    assert moe(x).shape == (5, D) and moe(x).is_meta
