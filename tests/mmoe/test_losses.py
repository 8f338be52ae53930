"""Router losses: values where balance is known, transformers' released loss, gradients, errors.

Shapes: T rows, E experts, K slots, L layers.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmoe import (
    Context,
    DenseRouter,
    DynamicRouter,
    ExpertChoiceRouter,
    FFNExperts,
    FixedRouter,
    GShardRouter,
    MoE,
    Router,
    Routing,
    TopKRouter,
    override,
    trace,
)
from mmoe.errors import BadInput
from mmoe.losses import balance_loss, entropy_loss, importance_loss, z_loss
from mmoe.routing import concatenate

T, D, E, K = 24, 16, 4, 2
LOSSES = [balance_loss, z_loss, entropy_loss, importance_loss]


def routing_of(ids: list[list[int]], probs: Tensor | None = None, num_experts: int = E) -> Routing:
    experts = torch.tensor(ids)
    used = (experts < num_experts).float()
    return Routing(experts=experts, weights=used, num_experts=num_experts, probs=probs)


def peaked(expert: int, rows: int) -> Tensor:
    """Probabilities 0.7 for one expert and 0.1 for each other, (rows, 4)."""
    return torch.full((rows, E), 0.1).index_fill(1, torch.tensor([expert]), 0.7)


EVEN = routing_of([[0, 1], [2, 3], [1, 2], [3, 0]], torch.full((4, E), 1 / E))


class TestBalance:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, 2.0),
            ({"choices": "first"}, 1.0),
            ({"per_slot": True}, 1.0),
            ({"pool": True}, 2.0),
            ({"pool": True, "per_slot": True}, 1.0),
        ],
    )
    def test_balance_gives_k_or_1(self, options: dict[str, object], expected: float) -> None:
        assert balance_loss(EVEN, **options).item() == pytest.approx(expected)
        assert balance_loss([EVEN, EVEN, EVEN], **options).item() == pytest.approx(expected)

    def test_collapse_gives_e_times_its_probability(self) -> None:
        collapsed = routing_of([[0], [0], [0]], peaked(0, 3))
        assert balance_loss(collapsed).item() == pytest.approx(E * 0.7)

    @pytest.mark.parametrize("router", [DenseRouter, ExpertChoiceRouter])
    def test_the_first_choice_of_routers_that_order_by_expert(self, router: type[Router]) -> None:
        routing = router(8, E)(torch.randn(200, 8))  # type: ignore[call-arg]  # sizes of both
        best = routing.weights.argmax(1)[routing.n_used() > 0].bincount(minlength=E)
        assert routing.probs is not None
        expected = E * (best / 200 * routing.probs.mean(0)).sum()
        torch.testing.assert_close(balance_loss(routing, choices="first"), expected)

    def test_pooled_means_weigh_layers_by_their_rows(self) -> None:
        few, many = (TopKRouter(8, E)(torch.randn(rows, 8)) for rows in (3, 90))
        hits = sum(r.counts() for r in (few, many)) / 93
        probs = sum(r.probs.sum(0) for r in (few, many)) / 93
        torch.testing.assert_close(balance_loss([few, many], pool=True), E * (hits * probs).sum())

    def test_first_choice_ignores_the_others(self) -> None:
        routing = routing_of([[0, 1], [0, 2], [0, 3]], peaked(0, 3))
        assert balance_loss(routing, choices="first").item() == pytest.approx(E * 0.7)
        assert balance_loss(routing).item() == pytest.approx(E * (0.7 + 0.1))

    def test_per_slot_divides_by_the_mean_number_of_slots(self) -> None:
        routing = routing_of([[0, 1], [2, E], [E, E]], torch.rand(3, E).softmax(-1))
        assert balance_loss(routing, per_slot=True).item() == pytest.approx(balance_loss(routing).item())
        more = routing_of([[0, 1], [2, 3], [E, E]], torch.rand(3, E).softmax(-1))
        assert balance_loss(more, per_slot=True).item() == pytest.approx(balance_loss(more).item() * 3 / 4)

    def test_pooling_lets_layers_make_up_for_each_other(self) -> None:
        layers = [routing_of([[e], [e]], peaked(e, 2)) for e in range(E)]
        assert balance_loss(layers, pool=True).item() == pytest.approx(1.0)
        assert balance_loss(layers, pool=False).item() == pytest.approx(E * 0.7)

    @pytest.mark.parametrize("masked", [False, True])
    def test_pooled_is_mixtrals_released_function(self, masked: bool) -> None:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        mask = torch.rand(3, 8) < 0.7 if masked else None
        context = None if mask is None else Context(valid=mask.flatten())
        layers = [TopKRouter(D, E, top_k=K)(3 * torch.randn(T, D), context) for _ in range(3)]
        logits = tuple(routing.logits for routing in layers)
        theirs = load_balancing_loss_func(logits, E, K, None if mask is None else mask.long())
        torch.testing.assert_close(balance_loss(layers, pool=True), theirs)

    def test_gradient_pushes_probability_off_the_overloaded_expert(self) -> None:
        logits = torch.zeros(2, E, requires_grad=True)
        balance_loss(routing_of([[0], [0]], logits.softmax(-1))).backward()
        assert logits.grad is not None
        assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()

    def test_layers_of_different_width_cannot_be_pooled(self) -> None:
        layers = [EVEN, routing_of([[0]], torch.full((1, 2), 0.5), num_experts=2)]
        assert balance_loss(layers, per_slot=True).item() == pytest.approx(1.0)
        with pytest.raises(BadInput) as error:
            balance_loss(layers, pool=True)
        assert str(error.value) == (
            "a pooled balance loss over layers with 2 and 4 experts\n"
            "  only layers with the same number of experts can be pooled\n"
            "  try: balance_loss(routings, pool=False)"
        )


class TestZ:
    def test_is_the_mean_squared_logsumexp(self) -> None:
        routing = TopKRouter(D, E)(torch.randn(T, D))
        assert routing.logits is not None
        expected = routing.logits.exp().sum(-1).log().pow(2).mean()
        torch.testing.assert_close(z_loss(routing), expected)

    def test_layers_are_averaged(self) -> None:
        a, b = (TopKRouter(D, E)(torch.randn(rows, D)) for rows in (T, 3))
        torch.testing.assert_close(z_loss([a, b]), (z_loss(a) + z_loss(b)) / 2)

    def test_without_logits(self) -> None:
        routing = FixedRouter(E)(torch.randn(2, D), Context(expert_ids=torch.tensor([0, 1])))
        with pytest.raises(BadInput, match="a z-loss of a router without logits"):
            z_loss(routing)


class TestEntropy:
    def test_of_uniform_and_one_hot(self) -> None:
        assert entropy_loss(EVEN).item() == pytest.approx(math.log(E))
        one_hot = torch.eye(E, requires_grad=True)
        loss = entropy_loss(routing_of([[0]] * E, one_hot))
        assert loss.item() == pytest.approx(0, abs=1e-6)
        loss.backward()
        assert one_hot.grad is not None and one_hot.grad.isfinite().all()

    def test_is_minus_sum_p_log_p(self) -> None:
        probs = torch.randn(T, E).softmax(-1)
        expected = -(probs * probs.log()).sum(-1).mean()
        torch.testing.assert_close(entropy_loss(routing_of([[0]] * T, probs)), expected)

    def test_sigmoid_scores_are_normalised_first(self) -> None:
        probs = torch.rand(T, E)
        torch.testing.assert_close(
            entropy_loss(routing_of([[0]] * T, probs)), entropy_loss(routing_of([[0]] * T, probs / probs.sum(-1, True)))
        )


class TestOwnBalance:
    """Routers that count in their own way are balanced that way."""

    @pytest.mark.parametrize("options", [{}, {"choices": "first"}, {"pool": True}, {"all_processes": True}])
    @pytest.mark.parametrize(
        "router", [DynamicRouter(D, 6, num_null=1, num_shared=2, drop="probs"), GShardRouter(D, E, capacity_factor=0.5)]
    )
    def test_it_is_the_routers_own(self, router: Router, options: dict[str, object]) -> None:
        routing = router(torch.randn(T, D), Context(valid=torch.arange(T) < 20))
        torch.testing.assert_close(balance_loss(routing, **options), routing.losses["balance"])

    def test_layers_are_averaged_and_rows_weigh(self) -> None:
        router, x, weights = DynamicRouter(D, 5, num_shared=1), torch.randn(T, D), (torch.arange(T) < 10) * 0.03
        layers = [router(x, Context(row_weights=weights)), router(2 * x, Context(row_weights=weights))]
        expected = [router(some[:10]).losses["balance"] for some in (x, 2 * x)]
        torch.testing.assert_close(balance_loss(layers), torch.stack(expected).mean())

    @pytest.mark.parametrize("router", [DynamicRouter(D, 6, num_shared=2), GShardRouter(D, E)])
    def test_it_is_as_exact_under_autocast(self, router: Router) -> None:
        x = torch.randn(T, D)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = balance_loss(router(x))
        torch.testing.assert_close(found, balance_loss(router(x)))

    def test_runs_of_a_layer_that_are_put_together_count_as_one(self) -> None:
        router, x = DynamicRouter(D, 5, num_shared=1), torch.randn(T, D)
        whole = balance_loss(concatenate([router(x[:7]), router(x[7:])]))
        torch.testing.assert_close(whole, router(x).losses["balance"])

    def test_processes_together_count_as_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        router, x = DynamicRouter(D, 5, num_shared=1), torch.randn(T, D)
        parts, whole = [router(x[:7]), router(x[7:])], router(x)
        expected = torch.autograd.grad(balance_loss(whole), router.weight)
        sums = {1: whole.tally.hits, 0: whole.tally.rows}  # what an all-reduce of hits (N,) and of rows gives
        monkeypatch.setattr("mmoe.losses.over_processes", lambda counts: sums[counts.ndim])
        monkeypatch.setattr("mmoe.losses._processes", lambda: 2)
        mean = torch.stack([balance_loss(part, all_processes=True) for part in parts]).mean()
        torch.testing.assert_close(mean, whole.losses["balance"])
        torch.testing.assert_close(torch.autograd.grad(mean, router.weight), expected)

    def test_a_decision_that_is_overridden_counts_as_any(self) -> None:
        router, x = GShardRouter(D, E), torch.randn(T, D)
        moe = MoE(router, FFNExperts(D, 8, E))

        def first(x: Tensor, router: Router, routing: Routing) -> Routing:
            return replace(routing, experts=routing.experts * 0)

        with override(moe, first), trace(moe) as runs:
            moe(x)
        assert balance_loss(runs, choices="first").item() == pytest.approx(E * router(x).probs[:, 0].mean().item())

    def test_a_scalar_alone_is_taken_as_it_is(self) -> None:
        routing = replace(EVEN, losses={"balance": torch.tensor(3.0)})
        assert balance_loss([routing, EVEN]).item() == pytest.approx(2.5)
        with pytest.raises(BadInput, match="a pooled balance loss of a router with a scalar of its own"):
            balance_loss([routing, EVEN], pool=True)


class TestImportance:
    def test_is_the_squared_coefficient_of_variation(self) -> None:
        routing = DenseRouter(D, E)(torch.randn(T, D))
        summed = routing.weights.sum(0)
        torch.testing.assert_close(importance_loss(routing), (summed.std(correction=0) / summed.mean()) ** 2)

    def test_even_importance_gives_0(self) -> None:
        assert importance_loss(EVEN).item() == pytest.approx(0)


@pytest.mark.parametrize("loss", LOSSES)
class TestAll:
    @pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
    def test_gradients_are_finite(self, loss: object, scale: float) -> None:
        x = torch.randn(T, D, requires_grad=True)
        value = loss(TopKRouter(D, E)(scale * x))
        value.backward()
        assert value.isfinite() and x.grad is not None and x.grad.isfinite().all()

    def test_gradients_are_finite_where_an_expert_is_excluded(self, loss: object) -> None:
        logits = torch.randn(T, E, requires_grad=True)
        off = torch.zeros(T, E).index_fill(1, torch.tensor([1]), -torch.inf)
        loss(TopKRouter(D, E).select(logits + off)).backward()
        assert logits.grad is not None and logits.grad.isfinite().all()

    def test_scalar_in_fp32(self, loss: object) -> None:
        value = loss(TopKRouter(D, E).bfloat16()(torch.randn(T, D).bfloat16()))
        assert value.shape == () and value.dtype == torch.float32

    def test_no_routing_is_an_error(self, loss: object) -> None:
        with pytest.raises(BadInput) as error:
            loss([])
        assert str(error.value) == (
            "a router loss of no routing\n  the model recorded no MoE layer\n  try: with mmoe.trace(model) as routing"
        )

    def test_no_counted_row_gives_0(self, loss: object) -> None:
        routing = TopKRouter(D, E)(torch.randn(T, D), Context(valid=torch.zeros(T, dtype=torch.bool)))
        loss(routing).backward()
        assert loss(routing).item() == 0


def test_sigmoid_routers_balance_like_softmax_ones() -> None:
    router = TopKRouter(8, 16, top_k=2, score="sigmoid")
    routing = router.select(1e-4 * torch.randn(4096, 16))
    assert balance_loss(routing).item() == pytest.approx(2.0, rel=0.01)
    assert routing.importance().sum().item() == pytest.approx(1.0)
