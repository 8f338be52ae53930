"""The property that defines each router, against formulas written out with torch operations.

Shapes: T rows, D width, E experts, K slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from mmoe import Context, DenseRouter, ExpertChoiceRouter, FFNExperts, FixedRouter, MoE, TopKRouter, build_router
from mmoe.errors import BadInput, BadOverride

T, D, E, K = 32, 16, 6, 3


def logits_of(router: TopKRouter | DenseRouter | ExpertChoiceRouter, x: Tensor) -> Tensor:
    return x @ router.weight.T


class TestTopK:
    @pytest.mark.parametrize(
        ("score", "weights", "formula"),
        [
            (
                "softmax",
                "renormalized",
                lambda r, i: r.softmax(-1).gather(1, i) / r.softmax(-1).gather(1, i).sum(1, True),
            ),
            ("softmax", "raw", lambda r, i: r.softmax(-1).gather(1, i)),
            ("softmax", "softmax_topk", lambda r, i: r.gather(1, i).exp() / r.gather(1, i).exp().sum(1, True)),
            ("sigmoid", "renormalized", lambda r, i: r.sigmoid().gather(1, i) / r.sigmoid().gather(1, i).sum(1, True)),
            ("sigmoid", "raw", lambda r, i: 1 / (1 + (-r.gather(1, i)).exp())),
        ],
    )
    def test_each_policy_is_its_formula(
        self, score: str, weights: str, formula: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        router = TopKRouter(D, E, top_k=K, score=score, weights=weights)
        x = torch.randn(T, D)
        logits = logits_of(router, x)
        routing = router(x)
        best = logits.sort(descending=True).indices[:, :K]
        assert torch.equal(routing.experts, best)
        torch.testing.assert_close(routing.weights, formula(logits, best))
        torch.testing.assert_close(routing.logits, logits)
        torch.testing.assert_close(routing.probs, logits.softmax(-1) if score == "softmax" else logits.sigmoid())

    def test_renormalised_softmax_is_softmax_over_the_chosen(self) -> None:
        renormalized = TopKRouter(D, E, top_k=K, weights="renormalized")
        over_chosen = TopKRouter(D, E, top_k=K, weights="softmax_topk")
        over_chosen.load_state_dict(renormalized.state_dict())
        x = 3 * torch.randn(T, D)
        torch.testing.assert_close(renormalized(x).weights, over_chosen(x).weights)

    def test_scale_multiplies_the_weights_only(self) -> None:
        plain, scaled = TopKRouter(D, E), TopKRouter(D, E, scale=2.5)
        scaled.load_state_dict(plain.state_dict())
        x = torch.randn(T, D)
        torch.testing.assert_close(scaled(x).weights, 2.5 * plain(x).weights)
        torch.testing.assert_close(scaled(x).probs, plain(x).probs)

    def test_gate_bias_is_added(self) -> None:
        router = TopKRouter(D, E, gate_bias=True)
        x = torch.randn(T, D)
        torch.testing.assert_close(router(x).logits, x @ router.weight.T + router.bias)

    def test_noise_is_off_by_default(self) -> None:
        router, x = TopKRouter(D, E).train(), torch.randn(T, D)
        assert all(torch.equal(router(x).experts, router(x).experts) for _ in range(5))

    def test_noise_changes_the_selection_in_training_only(self) -> None:
        router, x = TopKRouter(D, E, noise=3.0), torch.randn(T, D)
        clean = router.eval()(x)
        assert torch.equal(clean.experts, logits_of(router, x).topk(2).indices)
        noisy = router.train()(x)
        assert not torch.equal(noisy.experts, clean.experts)
        torch.testing.assert_close(noisy.logits, clean.logits)
        assert clean.probs is not None
        chosen = clean.probs.gather(1, noisy.experts)
        torch.testing.assert_close(noisy.weights, chosen / chosen.sum(1, keepdim=True), msg="weights are free of noise")

    @pytest.mark.parametrize("score", ["softmax", "sigmoid"])
    def test_bias_balancing_evens_out_a_skewed_load(self, score: str) -> None:
        router = TopKRouter(D, E, top_k=2, score=score, bias_rate=0.002)
        x = torch.randn(512, D) + 2 * router.weight[0].detach() / router.weight[0].norm()
        skewed = router(x).load().max()
        for _ in range(400):
            router.update(router(x))
        even = router(x)
        assert skewed * E > 1.4 and even.load().max() * E < 1.1
        assert even.probs is not None and not torch.equal(router.select_bias, torch.zeros(E))
        chosen = even.probs.gather(1, even.experts)
        torch.testing.assert_close(even.weights, chosen / chosen.sum(1, keepdim=True), msg="weights carry no bias")

    def test_update_steps_by_the_rate_against_the_load(self) -> None:
        router = TopKRouter(D, 4, top_k=1, bias_rate=0.1)
        with torch.no_grad():
            router.weight.zero_()
            router.weight[1] = 1.0
        router.update(router(torch.ones(8, D)))
        torch.testing.assert_close(router.select_bias, torch.tensor([0.1, -0.1, 0.1, 0.1]))

    def test_update_without_balancing_does_nothing(self) -> None:
        router = TopKRouter(D, E)
        router.update(router(torch.randn(T, D)))
        assert list(router.state_dict()) == ["weight"]

    @pytest.mark.parametrize("options", [{}, {"bias_rate": 0.1}, {"bias_rate": 0.1, "score": "sigmoid"}])
    def test_an_excluded_expert_is_not_chosen(self, options: dict[str, object]) -> None:
        router = TopKRouter(D, E, top_k=1, **options)
        if "bias_rate" in options:
            router.select_bias[2] = 100.0
        logits = router.scores(torch.randn(T, D)).clone()
        logits[:, 2] = -torch.inf
        assert router.select(logits).counts()[2] == 0

    def test_autocast_leaves_the_gate_in_its_own_precision(self) -> None:
        router, x = TopKRouter(D, E), torch.randn(T, D)
        expected = router(x)
        with torch.autocast("cpu", torch.bfloat16):
            routing = router(x)
        torch.testing.assert_close(routing.logits, expected.logits)
        assert torch.equal(routing.experts, expected.experts)


@pytest.mark.parametrize("router", [TopKRouter(D, E), DenseRouter(D, E)])
def test_routers_that_use_every_slot_say_so(router: TopKRouter | DenseRouter) -> None:
    x = torch.randn(T, D)
    assert router(x).all_used, "spares dispatch a device sync"
    torch._dynamo.reset()
    torch.compile(MoE(router, FFNExperts(D, 8, E)), backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize(("top_k", "works"), [(0, 1), (7, 6), (-1, 1), (1.5, 1), ("2", 1), (True, 1)])
def test_bad_top_k(top_k: Any, works: int) -> None:
    with pytest.raises(BadOverride) as error:
        TopKRouter(16, 6, top_k=top_k)
    assert str(error.value) == f"top_k={top_k!r}\n  top_k is a whole number from 1 to 6\n  try: top_k={works}"


@pytest.mark.parametrize(
    ("spec", "wrong"),
    [
        ("topk:scale=nan", "scale=nan\n  scale is a finite number above 0\n  try: scale=1"),
        ("topk:noise=-1", "noise=-1\n  noise is a finite number of at least 0\n  try: noise=0"),
        ("topk:bias_rate=inf", "bias_rate=inf\n  bias_rate is a finite number of at least 0"),
        ("dense:temperature=0", "temperature=0\n  temperature is a finite number above 0\n  try: temperature=1"),
        ("expert_choice:capacity_factor=-3", "capacity_factor=-3\n  capacity_factor is a finite number above 0"),
        ("expert_choice:capacity_factor=x", "capacity_factor='x'\n  capacity_factor is a finite number above 0"),
    ],
)
def test_options_without_a_meaning_are_refused(spec: str, wrong: str) -> None:
    with pytest.raises(BadOverride) as error:
        build_router(spec, dim=D, num_experts=E)
    assert str(error.value).startswith(wrong)


def test_the_balancing_bias_keeps_its_precision() -> None:
    moe = MoE(TopKRouter(D, E, bias_rate=1e-3), FFNExperts(D, 8, E))
    moe.router.select_bias.fill_(0.7)
    moe.to(torch.bfloat16)
    assert (moe.router.weight.dtype, moe.router.select_bias.dtype) == (torch.bfloat16, torch.float32)
    assert (moe.router.select_bias == torch.tensor(0.7)).all(), "bf16 would round it"
    moe.router.update(moe.route(torch.randn(T, D, dtype=torch.bfloat16)))
    assert ((moe.router.select_bias - 0.7).abs() > 0.9e-3).all(), "bf16 would swallow the step"


def test_unknown_policies() -> None:
    with pytest.raises(BadOverride) as error:
        TopKRouter(16, 6, score="sofmax")  # type: ignore[arg-type]  # wrong on purpose
    assert str(error.value) == "score='sofmax'\n  did you mean: softmax\n  try: score='softmax'"
    with pytest.raises(BadOverride) as error:
        TopKRouter(16, 6, weights="renormalised")  # type: ignore[arg-type]  # wrong on purpose
    assert str(error.value) == "weights='renormalised'\n  did you mean: renormalized\n  try: weights='renormalized'"


class TestDense:
    def test_output_is_the_sum_over_all_experts(self) -> None:
        router, experts = DenseRouter(D, E), FFNExperts(D, 8, E)
        x = torch.randn(T, D)
        weights = logits_of(router, x).softmax(-1)
        each = [experts(x, torch.tensor([T if e == chosen else 0 for e in range(E)])) for chosen in range(E)]
        expected = sum(weights[:, e, None] * each[e] for e in range(E))
        torch.testing.assert_close(MoE(router, experts)(x), expected)

    def test_temperature_sharpens(self) -> None:
        cold, warm = DenseRouter(D, E, temperature=0.1), DenseRouter(D, E)
        cold.load_state_dict(warm.state_dict())
        x = torch.randn(T, D)
        torch.testing.assert_close(cold(x).weights, (logits_of(warm, x) / 0.1).softmax(-1))
        torch.testing.assert_close(cold(x).logits, warm(x).logits)
        assert cold(x).entropy().mean() < warm(x).entropy().mean()


class TestExpertChoice:
    @pytest.mark.parametrize("capacity_factor", [0.5, 1.0, 2.0])
    def test_load_is_perfectly_balanced(self, capacity_factor: float) -> None:
        router = ExpertChoiceRouter(D, 4, capacity_factor=capacity_factor)
        skewed = torch.randn(T, D) + 5 * router.weight[1].detach()
        assert router(skewed).counts().tolist() == [int(T * capacity_factor / 4)] * 4

    def test_each_expert_takes_its_best_tokens(self) -> None:
        router, x = ExpertChoiceRouter(D, E, capacity_factor=1.5), torch.randn(T, D)
        probs = logits_of(router, x).softmax(-1)
        routing = router(x)
        best = probs.topk(math.ceil(T * 1.5 / E), dim=0).indices
        for e in range(E):
            assert set((routing.experts == e).nonzero()[:, 0].tolist()) == set(best[:, e].tolist())
        torch.testing.assert_close(routing.dense_weights(), torch.zeros(T, E).scatter(0, best, probs.gather(0, best)))

    @pytest.mark.parametrize("experts", [3, 7, 13])
    @pytest.mark.parametrize("factor", [1, 1.5, 0.1, 1e-7])
    def test_capacity_is_exact(self, experts: int, factor: float) -> None:
        router = ExpertChoiceRouter(D, experts, capacity_factor=factor)
        for rows in range(1, 60):
            expected = math.ceil(Fraction(str(factor)) * rows / experts)
            assert router(torch.randn(rows, D)).counts().tolist() == [expected] * experts

    @pytest.mark.parametrize("factor", [1 / 3, 2 / 3, 4 / 3, 0.1 * 3])
    def test_capacity_of_many_rows(self, factor: float) -> None:
        counts = ExpertChoiceRouter(D, 8, capacity_factor=factor)(torch.randn(4096, D)).counts()
        assert counts.tolist() == [math.ceil(round(4096 * factor / 8, 3))] * 8

    def test_padding_takes_no_capacity(self) -> None:
        router = ExpertChoiceRouter(D, 4, capacity_factor=1.0)
        routing = router(torch.randn(T, D), Context(valid=torch.arange(T) < 8))
        assert routing.counts().tolist() == [2, 2, 2, 2]

    @pytest.mark.parametrize("factor", [9.0, 1e19])
    def test_an_expert_takes_a_token_once_at_most(self, factor: float) -> None:
        assert ExpertChoiceRouter(D, 4, capacity_factor=factor)(torch.randn(T, D)).counts().tolist() == [T] * 4

    def test_every_group_gets_its_own_capacity(self) -> None:
        router, x = ExpertChoiceRouter(D, 4, capacity_factor=1.0), torch.randn(16, D)
        x[:8] += 50 * router.weight[0].detach()
        groups = torch.arange(16) // 8
        experts = router(x, Context(group_ids=groups)).experts
        assert [(experts[groups == g] < 4).sum().item() for g in (0, 1)] == [8, 8]
        alone = router(x[8:])
        assert torch.equal(experts[8:], alone.experts)


class TestFixed:
    def test_takes_the_given_routes(self) -> None:
        ids = torch.tensor([2, 0, 3])
        routing = FixedRouter(4)(torch.randn(3, D), Context(expert_ids=ids))
        assert routing.experts.tolist() == [[2], [0], [3]] and routing.weights.tolist() == [[1.0]] * 3

    def test_averages_the_used_slots_of_a_row(self) -> None:
        ids = torch.tensor([[0, 1], [2, 4], [4, 4]])
        routing = FixedRouter(4)(torch.randn(3, D), Context(expert_ids=ids))
        assert torch.equal(routing.experts, ids)
        assert routing.weights.tolist() == [[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]

    def test_output_is_the_given_expert(self) -> None:
        experts, x = FFNExperts(D, 8, 3), torch.randn(2, D)
        y = MoE(FixedRouter(3), experts)(x, Context(expert_ids=torch.tensor([1, 3])))
        torch.testing.assert_close(y[:1], experts(x[:1], torch.tensor([0, 1, 0])))
        assert (y[1] == 0).all()

    @pytest.mark.parametrize("context", [None, Context()])
    def test_without_routes(self, context: Context | None) -> None:
        with pytest.raises(BadInput) as error:
            FixedRouter(4)(torch.randn(3, D), context)
        assert str(error.value) == (
            "a fixed router was called without routes\n"
            "  it reads them from the context\n"
            "  try: moe(x, Context(expert_ids=ids))"
        )

    @pytest.mark.parametrize("ids", [[0, 5], [-1, 2]])
    def test_routes_to_experts_that_are_not_there(self, ids: list[int]) -> None:
        with pytest.raises(BadInput) as error:
            FixedRouter(4)(torch.randn(2, D), Context(expert_ids=torch.tensor(ids)))
        assert str(error.value) == (
            f"routes from {min(ids)} to {max(ids)} with 4 experts\n"
            "  ids must lie between 0 and 4, which marks an unused slot\n"
            "  try: Context(expert_ids=ids.clamp(0, 4))"
        )


def test_scores_that_vanish_leave_no_nan() -> None:
    router = TopKRouter(D, E, score="sigmoid")
    routing = router.select(torch.full((3, E), -200.0))
    assert routing.weights.isfinite().all()
