"""The MoE layer around router and experts, its side input, and the context's shapes."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmoe
from mmoe import Context, FFNExperts, FixedRouter, GatedFFN, GatedFFNExperts, MoE, TopKRouter, with_context
from mmoe.errors import BadInput, BadOverride, Refused

D, E = 16, 4


def layer(**parts: nn.Module) -> MoE:
    return MoE(TopKRouter(D, E), FFNExperts(D, 8, E), **parts)


class TestForward:
    def test_is_the_weighted_sum_of_the_chosen_experts(self) -> None:
        moe, x = layer(), torch.randn(7, D)
        routing = moe.router(x)
        one_hot = torch.eye(E, dtype=torch.long)
        expected = torch.stack(
            [
                sum(w * moe.experts(row[None], one_hot[e])[0] for e, w in zip(ids, weights, strict=True))
                for row, ids, weights in zip(x, routing.experts, routing.weights, strict=True)
            ]
        )
        torch.testing.assert_close(moe(x), expected)

    def test_shared_pre_and_post(self) -> None:
        parts = {"shared": GatedFFN(D, 8), "pre": nn.Linear(D, 12), "post": nn.Linear(12, D)}
        moe = MoE(TopKRouter(D, E), FFNExperts(12, 8, E), **parts)
        x = torch.randn(7, D)
        bare = MoE(FixedRouter(E), moe.experts)
        routing = moe.router(x)
        slots = [
            bare(parts["pre"](x), Context(expert_ids=routing.experts[:, k])) * routing.weights[:, k, None]
            for k in range(2)
        ]
        torch.testing.assert_close(moe(x), parts["post"](sum(slots)) + parts["shared"](x))

    def test_a_row_without_experts_keeps_the_shared_one(self) -> None:
        moe, x = layer(shared=GatedFFN(D, 8)), torch.randn(4, D)
        y = moe(x, Context(valid=torch.tensor([True, False, True, False])))
        torch.testing.assert_close(y[1::2], moe.shared(x[1::2]))

    @pytest.mark.parametrize("lead", [(), (6,), (2, 3), (1, 6), (2, 1, 3), (0,), (2, 0)])
    def test_any_leading_shape(self, lead: tuple[int, ...]) -> None:
        moe, x = layer(), torch.randn(*lead, D)
        y = moe(x)
        assert y.shape == x.shape
        torch.testing.assert_close(y.reshape(-1, D), moe(x.reshape(-1, D)))

    def test_non_contiguous_input(self) -> None:
        moe, x = layer(), torch.randn(3, 2, D).transpose(0, 1)
        torch.testing.assert_close(moe(x), moe(x.contiguous()))

    def test_route_is_the_decision_of_forward(self) -> None:
        moe, x = layer(), torch.randn(6, D)
        with mmoe.trace(moe) as routing:
            alone = moe.route(x)
            moe(x)
        assert len(routing) == 2 and routing[0] is alone
        assert torch.equal(alone.experts, routing[1].experts)

    def test_number_of_experts_has_to_agree(self) -> None:
        with pytest.raises(BadOverride) as error:
            MoE(TopKRouter(D, 8), FFNExperts(D, 8, 4))
        assert str(error.value) == (
            "a router over 8 experts with 4 experts\n"
            "  both must have the same number\n"
            "  try: build the router with num_experts=4"
        )

    @pytest.mark.parametrize("hidden_dim", [8, 6], ids=["grouped", "loop"])
    def test_autocast(self, hidden_dim: int) -> None:
        moe = MoE(TopKRouter(D, E), GatedFFNExperts(D, hidden_dim, E), shared=GatedFFN(D, 8))
        x = torch.randn(2, 7, D)
        expected = moe(x)
        with torch.autocast("cpu", torch.bfloat16), mmoe.trace(moe) as routing:
            y = moe(x)
        assert y.dtype == torch.bfloat16 and routing[0].weights.dtype == torch.float32
        torch.testing.assert_close(y.float(), expected, atol=0.03, rtol=0.03)
        y.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.parameters())


class TestWithContext:
    def test_every_layer_of_a_host_gets_it(self) -> None:
        host, valid = nn.Sequential(layer(), nn.GELU(), layer()), torch.arange(10).view(2, 5) % 3 > 0
        x = torch.randn(2, 5, D)
        with with_context(host, Context(valid=valid)), mmoe.trace(host) as routing:
            host(x)
        assert all(torch.equal(one.valid, valid.flatten()) for one in routing)

    def test_the_caller_wins(self) -> None:
        moe, x = layer(), torch.randn(4, D)
        none, everything = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
        with with_context(moe, Context(valid=none)):
            assert moe(x, Context(valid=everything)).any() and not moe(x).any()

    def test_nests_and_restores(self) -> None:
        moe, x, valid = layer(), torch.randn(4, D), torch.tensor([True, True, False, True])

        def context_seen() -> Context | None:
            with mmoe.trace(moe) as routing:
                moe(x)
            return routing[0].context

        with with_context(moe, Context(valid=valid, task_ids=torch.zeros(4))):
            with with_context(moe, Context(task_ids=torch.ones(4))):
                inner = context_seen()
            with with_context(moe, None):
                outer = context_seen()
        assert inner.valid.equal(valid) and inner.task_ids.equal(torch.ones(4))
        assert outer.valid.equal(valid) and outer.task_ids.equal(torch.zeros(4))
        assert context_seen() is None

    def test_restores_after_an_exception(self) -> None:
        moe = layer()
        with pytest.raises(ZeroDivisionError), with_context(moe, Context()):
            raise ZeroDivisionError
        assert moe._context is None


def flat(shape: tuple[int, ...], **given: Tensor) -> Tensor:
    """The one given field after flattening for x of shape (*shape, D)."""
    (name,) = given
    found = getattr(Context(**given).flatten(torch.Size(shape)), name)
    assert isinstance(found, Tensor)
    return found


class TestObserved:
    def test_while_something_acts_on_a_layer(self) -> None:
        layer = mmoe.MoE(mmoe.TopKRouter(8, 4), mmoe.FFNExperts(8, 16, 4))
        around = (
            mmoe.trace(layer),
            mmoe.override(layer, mmoe.switch_off([0])),
            mmoe.with_context(layer, mmoe.Context(valid=torch.ones(3, dtype=torch.bool))),
        )
        for one in around:
            assert not layer.observed
            with one:
                assert layer.observed
        assert not layer.observed


class TestFlatten:
    @pytest.mark.parametrize(
        ("shape", "field"),
        [
            ((6,), (6,)),
            ((2, 3), (2, 3)),
            ((2, 3), (6,)),
            ((6,), (2, 3)),
            ((1, 3), (3,)),
            ((1, 3), (1, 3)),
            ((3, 1), (3,)),
            ((3, 1), (3, 1)),
            ((2, 2, 3), (2, 6)),
            ((2, 2, 3), (12,)),
            ((), ()),
            ((), (1,)),
            ((1, 1), (1, 1)),
            ((0,), (0,)),
            ((2, 0), (2, 0)),
        ],
    )
    def test_one_value_per_row(self, shape: tuple[int, ...], field: tuple[int, ...]) -> None:
        value = torch.arange(torch.Size(field).numel()).reshape(field)
        for name in ("group_ids", "modality", "cond", "task_ids"):
            assert torch.equal(flat(shape, **{name: value}), value.flatten())

    @pytest.mark.parametrize(
        ("shape", "field"), [((2, 3), (2, 3, 4)), ((2, 3), (6, 4)), ((3, 1), (3, 1)), ((3, 1), (3, 1, 1)), ((), (4,))]
    )
    def test_features_keep_their_last_dimension(self, shape: tuple[int, ...], field: tuple[int, ...]) -> None:
        value = torch.randn(field)
        assert torch.equal(flat(shape, features=value), value.reshape(-1, field[-1]))

    @pytest.mark.parametrize(
        ("shape", "field", "expected"),
        [
            ((2, 3), (2, 3), (6,)),
            ((2, 3), (6,), (6,)),
            ((2, 3), (2, 3, 2), (6, 2)),
            ((2, 3), (6, 2), (6, 2)),
            ((2, 3), (6, 1), (6, 1)),
            ((2, 2), (2, 2), (4,)),
            ((2, 2), (4, 4), (4, 4)),
        ],
    )
    def test_routes_may_have_slots(
        self, shape: tuple[int, ...], field: tuple[int, ...], expected: tuple[int, ...]
    ) -> None:
        value = torch.arange(torch.Size(field).numel()).reshape(field)
        assert torch.equal(flat(shape, expert_ids=value), value.reshape(expected))

    @pytest.mark.parametrize(
        ("shape", "field"), [((2, 3), (3, 2)), ((2, 3), (2, 4)), ((2, 3), (2,)), ((6,), (5,)), ((2, 3), (2, 3, 4))]
    )
    def test_a_field_that_does_not_fit_is_an_error(self, shape: tuple[int, ...], field: tuple[int, ...]) -> None:
        with pytest.raises(BadInput) as error:
            flat(shape, valid=torch.ones(field, dtype=torch.bool))
        assert str(error.value) == (
            f"context field 'valid' of shape {field} for rows of shape {shape}\n"
            "  its leading dimensions must be those of x, or flat\n"
            f"  try: Context(valid=...) with leading shape {shape}"
        )

    def test_features_of_another_order_are_an_error(self) -> None:
        with pytest.raises(BadInput, match="context field 'features'"):
            flat((2, 3), features=torch.randn(3, 2, 4))

    def test_a_mask_of_numbers_is_one_of_truth_values(self) -> None:
        mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
        assert torch.equal(flat((2, 3), valid=mask), mask.flatten() > 0)

    def test_a_mask_that_is_added_to_scores_is_an_error(self) -> None:
        with pytest.raises(BadInput, match="a mask that is added to scores says the opposite"):
            flat((3,), valid=torch.tensor([0.0, 0.0, -1e9]))

    def test_absent_fields_stay_absent(self) -> None:
        assert Context().flatten(torch.Size((2, 3))) == Context()


class TestCopies:
    """What `trace`, `override` and `with_context` set belongs to the layer, not to its copies."""

    @pytest.mark.parametrize("make", [copy.deepcopy, lambda moe: pickle.loads(pickle.dumps(moe))])
    def test_made_inside_they_are_free(self, make: Callable[[MoE], MoE]) -> None:
        moe, x = layer(), torch.randn(5, D)
        context = Context(valid=torch.zeros(5, dtype=torch.bool))
        with mmoe.override(moe, mmoe.switch_off([0])), mmoe.trace(moe) as routing, with_context(moe, context):
            twin = make(moe)
            y = twin(x)
        assert not len(routing) and torch.equal(y, moe(x))
        with mmoe.trace(twin) as routing:
            twin(x)
        assert len(routing) == 1


class TestCheckpointing:
    """A forward that backward computes again has the context and the override that it had, though they have ended."""

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("around", ["context", "override"])
    @pytest.mark.parametrize("backward", ["one loss", "first loss first", "last loss first"])
    def test_gradients_are_those_without(self, reentrant: bool, around: str, backward: str) -> None:
        moe, inputs = layer(), [torch.randn(5, D, requires_grad=True) for _ in range(2)]
        expected = self.grads(moe, moe, inputs, around, backward)
        found = self.grads(moe, lambda x: checkpoint(moe, x, use_reentrant=reentrant), inputs, around, backward)
        for ours, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, reference)  # without a graph the forward takes another way
        assert moe._calls and copy.deepcopy(moe)._calls is None

    @staticmethod
    def grads(
        moe: MoE, call: Callable[[Tensor], Tensor], inputs: list[Tensor], around: str, backward: str
    ) -> list[Tensor]:
        moe.zero_grad()
        losses = []
        for i, x in enumerate(inputs):
            x.grad = None
            if around == "context":
                with with_context(moe, Context(valid=torch.arange(5) > i)):
                    losses.append(call(x).square().sum())
            else:
                with mmoe.override(moe, mmoe.switch_off([i])):
                    losses.append(call(x).square().sum())
        for loss in {"one loss": [sum(losses)], "first loss first": losses, "last loss first": losses[::-1]}[backward]:
            loss.backward()
        return [value.grad for value in [*inputs, *moe.parameters()]]

    def test_nothing_is_kept_without_checkpoints(self) -> None:
        moe, x = layer(), torch.randn(5, D, requires_grad=True)
        moe(x).sum().backward()
        with torch.no_grad():
            moe.eval()(x)
        assert moe._calls is None

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("kept", [0, 1])
    def test_the_same_rows_under_two_contexts_are_not_guessed(self, reentrant: bool, kept: int) -> None:
        moe, x, outputs = layer(), torch.randn(5, D, requires_grad=True), []
        for i in range(2):
            with with_context(moe, Context(valid=torch.arange(5) > i)):
                outputs.append(checkpoint(moe, x, use_reentrant=reentrant))
        with pytest.raises(Refused, match="the same rows came under different ones"):
            outputs[kept].sum().backward()

    def test_the_same_rows_again_after_backward(self) -> None:
        moe, x, found = layer(), torch.randn(5, D, requires_grad=True), []
        for i in range(2):
            with with_context(moe, Context(valid=torch.arange(5) > i)):
                y = checkpoint(moe, x, use_reentrant=False)
            found.append(torch.autograd.grad(y.sum(), x)[0])
        assert (found[0][1] != 0).any() and (found[1][1] == 0).all()

    def test_rows_are_known_by_every_value(self) -> None:
        moe, one = layer(), torch.randn(200, D)
        other = one.clone()
        other[1, 0] += 1e-3
        outputs, inputs = [], [x.requires_grad_() for x in (one, other)]
        for i, x in enumerate(inputs):
            with with_context(moe, Context(valid=torch.arange(200) > 99 * i)):
                outputs.append(checkpoint(moe, x, use_reentrant=True))
        sum(y.sum() for y in outputs).backward()
        grads = [x.grad for x in inputs]
        assert grads[0] is not None and (grads[0][2] != 0).any()
        assert grads[1] is not None and (grads[1][2] == 0).all()

    def test_passes_without_gradients_are_no_rivals(self) -> None:
        moe, x = layer().train(), torch.randn(5, D, requires_grad=True)
        for reentrant in (False, True):
            with torch.no_grad(), mmoe.override(moe, mmoe.switch_off([0])):
                moe(x)
            checkpoint(moe, x, use_reentrant=reentrant).sum().backward()

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_no_context_is_kept_longer_than_a_step(self, reentrant: bool) -> None:
        moe, alive = layer().train(), []
        for _ in range(5):
            context = Context(valid=torch.rand(5) > 0.2)
            alive.append(weakref.ref(context))
            with with_context(moe, context):
                y = checkpoint(moe, torch.randn(5, D, requires_grad=True), use_reentrant=reentrant)
            y.sum().backward()
            del context, y
        assert sum(one() is not None for one in alive) <= 1

    def test_more_calls_than_are_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mmoe.recompute.MOST", 3)
        moe, outputs = layer(), []
        for _ in range(4):
            with with_context(moe, Context(valid=torch.arange(5) > 1)):
                outputs.append(checkpoint(moe, torch.randn(5, D, requires_grad=True), use_reentrant=False))
        outputs[-1].sum().backward()
        with pytest.raises(Refused, match="its rows are not those of one of the last 3 calls"):
            outputs[0].sum().backward()
