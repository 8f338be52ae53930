"""What every registered router promises. A new router is tested as soon as it is registered.

Shapes: T rows, D width, E experts; E is a size that nothing else has, so that dimensions of experts are recognised.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from torch import Tensor

import mmoe
from mmoe import Context, FFNExperts, MoE, Router, Routing
from mmoe.losses import balance_loss, entropy_loss, importance_loss, z_loss

T, D, E, HIDDEN = 24, 16, 5, 8


def no_context(rows: int) -> Context:
    return Context()


def given_routes(rows: int) -> Context:
    """Two slots per row, some unused."""
    return Context(expert_ids=torch.stack([torch.randint(0, E, (rows,)), torch.randint(0, E + 1, (rows,))], dim=1))


def modalities(rows: int) -> Context:
    return Context(modality=torch.arange(rows) % 4)


@dataclass(frozen=True)
class Case:
    """How a router is built and what it has to be told, where the defaults do not suffice.

    Weights of some jump where scores are nearly equal.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    context: Callable[[int], Context] = no_context
    jumps: bool = False


CASES = {
    "fixed": Case(context=given_routes),
    "by_modality": Case(context=modalities),
    "dynamic": Case({"num_shared": 1, "top_p": None}, jumps=True),  # the gate has its gradient from shared experts
}
VARIANTS = [
    "topk:top_k=1,weights=raw",
    "topk:score=sigmoid,scale=2.5,gate_bias=true",
    "topk:weights=softmax_topk,noise=0.5,bias_rate=0.1",
    "topk:capacity_factor=0.5",
    "dense:temperature=0.5",
    "expert_choice:capacity_factor=1.0",
    "dynamic:top_p=0.5",
]


def case_of(spec: str) -> Case:
    return CASES.get(spec.partition(":")[0], Case())


def build(spec: str) -> Router:
    options = {"dim": D, "num_experts": E, **case_of(spec).options}
    return mmoe.build_router(spec, **options).eval()


def build_moe(spec: str) -> MoE:
    return MoE(build(spec), FFNExperts(D, HIDDEN, E)).eval()


def take(context: Context, rows: Tensor) -> Context:
    """The context of some rows, given by index or mask."""
    given = {f.name: getattr(context, f.name) for f in fields(context)}
    return Context(**{name: value[rows] for name, value in given.items() if value is not None})


def assert_same(got: Routing, expected: Routing) -> None:
    torch.testing.assert_close(got.experts, expected.experts)
    torch.testing.assert_close(got.weights, expected.weights)


def differ(a: Routing, b: Routing) -> bool:
    return not torch.equal(a.experts, b.experts) or not torch.allclose(a.weights, b.weights, atol=1e-6)


@pytest.fixture(params=[*mmoe.list_routers(), *VARIANTS])
def spec(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def router(spec: str) -> Router:
    return build(spec)


@pytest.fixture
def moe(spec: str) -> MoE:
    return build_moe(spec)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, D)


@pytest.fixture
def context(spec: str) -> Context:
    return case_of(spec).context(T)


class TestForm:
    def test_types_and_shapes(self, router: Router, x: Tensor, context: Context) -> None:
        routing = router(x, context)
        assert isinstance(router, Router) and router.num_experts == routing.num_experts == E
        assert routing.experts.dtype == torch.int64 and routing.experts.shape == routing.weights.shape
        assert len(routing.experts) == T and routing.experts.ndim == 2
        assert ((routing.experts >= 0) & (routing.experts <= E)).all()
        for scores in (routing.logits, routing.probs):
            assert scores is None or (scores.shape == (T, E) and scores.dtype == torch.float32)

    def test_a_row_uses_an_expert_once(self, router: Router, x: Tensor, spec: str) -> None:
        if case_of(spec).context is given_routes:
            pytest.skip("the caller chooses the routes")
        experts = router(x).experts
        times = torch.nn.functional.one_hot(experts, E + 1).sum(1)[:, :E]
        assert times.max() == 1

    def test_slots_per_row_are_as_declared(self, router: Router, x: Tensor, spec: str) -> None:
        if case_of(spec).context is given_routes:
            pytest.skip("the caller chooses the routes")
        mean = router(x).n_used().float().mean().item()
        if router.at_most:
            assert mean <= router.experts_per_token
            return
        assert mean == pytest.approx(router.experts_per_token, abs=E / T)

    def test_probs_lie_between_0_and_1(self, router: Router, x: Tensor, context: Context) -> None:
        probs = router(5 * x, context).probs
        assert probs is None or ((probs >= 0) & (probs <= 1)).all()

    def test_logits_come_before_the_softmax(self, router: Router, x: Tensor, context: Context) -> None:
        routing = router(3 * x, context)
        if routing.logits is None:
            pytest.skip("no scores")
        for normalised in (routing.logits.sum(-1), routing.logits.exp().sum(-1)):
            assert not torch.allclose(normalised, torch.ones(T)), "logits are probs or log-probs"
        assert routing.probs is not None
        if not torch.allclose(routing.probs.sum(-1), torch.ones(T)):
            return  # no softmax
        shifted = router.select(routing.logits + torch.randn(T, 1), context)
        assert_same(shifted, routing)

    def test_forward_is_scores_then_select(self, router: Router, x: Tensor, context: Context) -> None:
        if type(router).scores is Router.scores:
            pytest.skip("no scores")
        assert_same(router.select(router.scores(x), context), router(x, context))

    def test_features_replace_x(self, router: Router, x: Tensor, context: Context) -> None:
        if type(router).scores is Router.scores:
            pytest.skip("no scores")
        context.features = torch.randn(T, D)
        assert_same(router(x, context), router(context.features, take(context, torch.arange(T))))
        assert differ(router(x, context), router(x, Context()))

    def test_routing_keeps_the_context(self, router: Router, x: Tensor, context: Context) -> None:
        context.modality = torch.arange(T) % 2
        kept = router(x, context).context
        assert kept is not None and kept.modality is context.modality


class TestCounts:
    def test_dispatch_takes_every_used_slot_once(self, router: Router, x: Tensor, context: Context) -> None:
        routing = router(x, context)
        used = routing.experts < E
        sent = mmoe.dispatch(routing)
        torch.testing.assert_close(sent.counts, routing.counts())
        assert sent.counts.sum() == used.sum() == routing.n_used().sum() == len(sent.token_idx)
        expert_of = torch.arange(E).repeat_interleave(sent.counts)
        got = sorted(zip(sent.token_idx.tolist(), expert_of.tolist(), strict=True))
        assert got == sorted((int(row), int(routing.experts[row, slot])) for row, slot in used.nonzero())

    def test_unused_slots_weigh_nothing(self, router: Router, x: Tensor, context: Context) -> None:
        context.valid = torch.rand(T) < 0.7
        routing = router(x, context)
        assert (routing.weights[routing.experts == E] == 0).all()

    def test_load_is_the_share_of_slots(self, router: Router, x: Tensor, context: Context) -> None:
        routing = router(x, context)
        expected = torch.bincount(routing.experts.flatten(), minlength=E + 1)[:E]
        torch.testing.assert_close(routing.load(), expected / expected.sum())

    def test_all_used_is_true_when_promised(self, router: Router, x: Tensor, context: Context) -> None:
        routing = router(x, context)
        assert not routing.all_used or (routing.experts < E).all()
        context.valid = torch.arange(T) > 0
        assert not router(x, context).all_used


class TestRows:
    def test_permuting_tokens_permutes_outputs(self, moe: MoE, x: Tensor, context: Context) -> None:
        perm = torch.randperm(T)
        torch.testing.assert_close(moe(x[perm], take(context, perm)), moe(x, context)[perm])
        assert_same(moe.router(x[perm], take(context, perm)), rows_of(moe.router(x, context), perm))

    def test_padding_changes_nothing(self, moe: MoE, x: Tensor, context: Context) -> None:
        valid = torch.rand(T) < 0.6
        alone = take(context, valid)
        x = torch.where(valid[:, None], x, 100 * x)
        context.valid = valid
        y = moe(x, context)
        torch.testing.assert_close(y[valid], moe(x[valid], alone))
        assert (y[~valid] == 0).all()
        padded, bare = moe.router(x, context), moe.router(x[valid], alone)
        assert_same(rows_of(padded, valid), bare)
        assert (padded.experts[~valid] == E).all() and (padded.weights[~valid] == 0).all()

    def test_padding_counts_in_no_loss(self, router: Router, x: Tensor, context: Context) -> None:
        valid = torch.rand(T) < 0.6
        alone = take(context, valid)
        context.valid = valid
        padded = router(torch.where(valid[:, None], x, 100 * x), context)
        bare = router(x[valid], alone)
        for name, value in losses_of(bare).items():
            torch.testing.assert_close(losses_of(padded)[name], value, msg=name)
        torch.testing.assert_close(padded.importance(), bare.importance())
        torch.testing.assert_close(padded.entropy(), bare.entropy())
        torch.testing.assert_close(padded.load(), bare.load())

    def test_without_valid_rows(self, moe: MoE, x: Tensor, context: Context) -> None:
        context.valid = torch.zeros(T, dtype=torch.bool)
        assert (moe(x, context) == 0).all()
        assert all(value.isfinite() for value in losses_of(moe.router(x, context)).values())

    def test_groups_choose_alone(self, router: Router, x: Tensor, context: Context) -> None:
        groups = torch.randint(0, 3, (T,))
        alone = {int(g): router(x[groups == g], take(context, groups == g)) for g in groups.unique()}
        context.group_ids = groups * 7 - 3
        together = router(x, context)
        for g, expected in alone.items():
            assert_same(rows_of(together, groups == g), expected)

    def test_works_on_zero_rows(self, moe: MoE, spec: str) -> None:
        x = torch.randn(2, 0, D, requires_grad=True)
        y = moe(x, take(case_of(spec).context(1), torch.zeros(0, dtype=torch.long)))
        assert y.shape == x.shape
        y.sum().backward()
        assert all(p.grad is not None and (p.grad == 0).all() for p in moe.parameters()), "DDP wants all gradients"
        routing = moe.router(x.flatten(0, 1), take(case_of(spec).context(1), torch.zeros(0, dtype=torch.long)))
        assert all(value.isfinite() for value in losses_of(routing).values())


class TestDeclarations:
    def test_batch_dependence(self, router: Router, x: Tensor, context: Context) -> None:
        if not router.batch_dependent:
            together = router(x, context)
            for row in torch.arange(T)[:, None]:
                assert_same(rows_of(together, row), router(x[row], take(context, row)))
            return
        keep = torch.arange(T) < T // 2
        assert any(
            differ(rows_of(router(x, context), keep), rows_of(router(other, context), keep))
            for other in (torch.where(keep[:, None], x, torch.randn(T, D)) for _ in range(20))
        ), "declared batch-dependent, but no other rows change a route"

    def test_causality(self, moe: MoE, x: Tensor, context: Context) -> None:
        before = moe(x, context)[:-1]
        leaks = []
        for scale in (1.0, -1.0, 10.0, -10.0, 100.0, -100.0):
            changed = x.clone()
            changed[-1] = scale * torch.randn(D)
            leaks.append(not torch.allclose(moe(changed, context)[:-1], before, atol=1e-6))
        assert any(leaks) != moe.router.causal_safe

    def test_gradient_reaches_a_trainable_router(self, moe: MoE, x: Tensor, context: Context) -> None:
        x.requires_grad_()
        routing = moe.router(x, context)
        if not moe.router.trainable:
            assert not routing.weights.requires_grad
            assert not [name for name, p in moe.router.named_parameters() if p.requires_grad]
            return
        (routing.weights * torch.randn_like(routing.weights)).sum().backward()
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()
        grads = {name: p.grad for name, p in moe.router.named_parameters()}
        assert grads and all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads.values())

    def test_gradient_reaches_experts_and_input(self, moe: MoE, x: Tensor, context: Context) -> None:
        x.requires_grad_()
        moe(x, context).square().sum().backward()
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()
        for name, parameter in moe.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name

    def test_permuting_experts_changes_nothing(self, moe: MoE, x: Tensor, context: Context) -> None:
        alike = getattr(moe.router, "num_dynamic", E)
        perm = torch.cat([torch.randperm(alike), torch.arange(alike, E)])
        for tensor in [*moe.router.parameters(), *moe.router.buffers()]:
            if tensor.is_floating_point():
                torch.nn.init.normal_(tensor)
        renamed = copy.deepcopy(moe)
        with torch.no_grad():
            for tensor in [*renamed.router.parameters(), *renamed.router.buffers()]:
                for dim in (dim for dim, size in enumerate(tensor.shape) if size == E):
                    tensor.copy_(tensor.index_select(dim, perm))
            for parameter in renamed.experts.packed_parameters().values():
                parameter.copy_(parameter[perm])
        moved = take(context, torch.arange(T))
        if moved.expert_ids is not None:
            moved.expert_ids = torch.cat([perm.argsort(), torch.tensor([E])])[moved.expert_ids]
        torch.testing.assert_close(renamed(x, moved), moe(x, context))
        torch.testing.assert_close(renamed.router(x, moved).counts(), moe.router(x, context).counts()[perm])


class TestPrecisionAndCopies:
    def test_bf16_agrees(self, spec: str) -> None:
        rows = 512
        x, context = torch.randn(rows, D).bfloat16(), case_of(spec).context(rows)
        low = build_moe(spec).bfloat16()
        high = copy.deepcopy(low).float()
        a, b = low.router(x, context), high.router(x.float(), context)
        assert a.logits is None or a.logits.dtype == torch.float32
        same = (a.experts.sort(-1).values == b.experts.sort(-1).values).all(-1)
        if case_of(spec).jumps:
            same &= ((a.dense_weights() - b.dense_weights()).abs() < 0.05).all(-1)
        assert same.float().mean() > 0.9
        y = low(x, context)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y[same].float(), high(x.float(), context)[same], atol=0.03, rtol=0.03)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
    def test_copies(self, router: Router, x: Tensor, context: Context, copied: Callable[[Router], Router]) -> None:
        again = copied(router)
        assert_same(again(x, context), router(x, context))
        assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in router.parameters()}

    def test_state_dict(self, router: Router, x: Tensor, context: Context, spec: str) -> None:
        for tensor in [*router.parameters(), *router.buffers()]:
            torch.nn.init.normal_(tensor) if tensor.is_floating_point() else None
        other = build(spec)
        other.load_state_dict(router.state_dict())
        assert_same(other(x, context), router(x, context))

    def test_builds_on_the_meta_device(self, spec: str) -> None:
        with torch.device("meta"):
            router = build(spec)
        assert all(tensor.is_meta for tensor in [*router.parameters(), *router.buffers()])

    def test_compiles(self, moe: MoE, x: Tensor, context: Context, spec: str) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(moe, backend="eager")
        torch.testing.assert_close(compiled(x, context), moe(x, context))


def rows_of(routing: Routing, rows: Tensor) -> Routing:
    """Some rows of a routing, given by index or mask."""
    return Routing(experts=routing.experts[rows], weights=routing.weights[rows], num_experts=E)


def losses_of(routing: Routing) -> dict[str, Tensor]:
    """All losses of a routing: the router's own and those of `mmoe.losses`."""
    found = dict(routing.losses)
    for loss in (balance_loss, entropy_loss, importance_loss):
        found[loss.__name__] = loss(routing)
    if routing.logits is not None:
        found["z_loss"] = z_loss(routing)
    return found
