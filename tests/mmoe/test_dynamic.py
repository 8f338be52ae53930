"""Dynamic-capacity routing: how many experts a token takes, what they weigh, and what is lost where places run out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mmoe
from mmoe import Context, DynamicRouter, MoE, WithNullExperts
from mmoe.errors import BadOverride
from mmoe.routers.dynamic import explore, sparse_mixer

T, D = 40, 16


@pytest.fixture
def x() -> Tensor:
    return 3 * torch.randn(T, D)


def layer(**options: Any) -> MoE:
    """4 real experts, 1 null one and 2 shared ones."""
    router = DynamicRouter(D, 7, num_null=1, num_shared=2, **options)
    return MoE(router, WithNullExperts(D, 8, 7, num_null=1, num_shared=2, shared_dim=4, real="gated_ffn"))


def test_a_token_takes_as_many_experts_as_hold_the_probability(x: Tensor) -> None:
    router = DynamicRouter(D, 6, top_p=0.8)
    routing = router(x)
    probs = routing.logits.softmax(-1)
    assert len(routing.n_used().unique()) > 2, "easy tokens take few experts, hard ones many"
    for row in range(T):
        taken = routing.experts[row][routing.experts[row] < 6]
        held = probs[row, taken].sort(descending=True).values
        assert held.sum() >= 0.8 > held[:-1].sum(), "one fewer would not hold it"


@pytest.mark.parametrize("top_p", [0.0, 1.0])
def test_at_least_one_and_never_more_than_there_are(x: Tensor, top_p: float) -> None:
    used = DynamicRouter(D, 6, top_p=top_p)(x).n_used()
    assert (used >= 1).all() and (used <= 6).all()
    assert (used == 1).all() if top_p == 0 else (used >= 5).all()


def test_chosen_experts_weigh_about_the_same(x: Tensor) -> None:
    weights = DynamicRouter(D, 6, top_p=None, top_k=3, eps=0.0)(x).weights[:, :3]
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3), atol=1e-5, rtol=0)


def test_the_share_of_null_experts_is_lost(x: Tensor) -> None:
    moe = layer(top_p=None, top_k=2)
    with mmoe.trace(moe) as (routing):
        y = moe(x)
    weights = routing[0].dense_weights()
    torch.testing.assert_close(weights.sum(-1), torch.ones(T), atol=1e-5, rtol=0)
    assert (weights[:, 4] > 0).any(), "some tokens take the null expert"
    one = [moe.experts.real(x, torch.tensor([T * (e == other) for other in range(4)])) for e in range(4)]
    side = [moe.experts.side(x, torch.tensor([T * (e == other) for other in range(2)])) for e in range(2)]
    outputs = torch.stack([*one, torch.zeros_like(one[0]), *side], 1)  # (T, E, D)
    torch.testing.assert_close(y, (weights[..., None] * outputs).sum(1), atol=1e-5, rtol=1e-4)


def test_shared_experts_take_every_token(x: Tensor) -> None:
    valid = torch.arange(T) < T - 5
    routing = layer().router(x, Context(valid=valid))
    weights = routing.dense_weights()
    assert (weights[valid][:, 5:] > 0).all() and (weights[~valid] == 0).all()
    assert (layer(padding_as_released=True).router(x, Context(valid=valid)).dense_weights()[~valid][:, 5:] > 0).all()


@pytest.mark.parametrize("drop", ["probs", "position"])
def test_places_are_limited(x: Tensor, drop: str) -> None:
    options = {"top_p": None, "top_k": 2, "capacity_factor": 1.0, "min_capacity": 1}
    free, tight = layer(**options), layer(drop=drop, **options)
    tight.load_state_dict(free.state_dict())
    before, after = (moe.router(x).dense_weights() > 0 for moe in (free, tight))
    places = T // 5
    assert (before.sum(0)[:5] > places).any() and (after.sum(0)[:5] <= places).all()
    assert not (after & ~before).any()
    over = int(before.sum(0)[:5].argmax())
    kept, dropped = after[:, over], before[:, over] & ~after[:, over]
    rank = tight.router.scores(x)[:, over] if drop == "probs" else -torch.arange(T)
    assert rank[kept].min() > rank[dropped].max()
    assert tight(x).isfinite().all()
    torch.testing.assert_close(tight.router(x).losses["balance"], free.router(x).losses["balance"])


def test_a_token_that_lost_all_experts_gets_nothing(x: Tensor) -> None:
    router = DynamicRouter(D, 4, drop="position", capacity_factor=0.2, min_capacity=1)
    routing = router(x)
    assert routing.weights.isfinite().all() and (routing.n_used() == 0).any()
    routing.weights.sum().backward()
    assert router.weight.grad is None or router.weight.grad.isfinite().all()


def test_groups_have_places_of_their_own(x: Tensor) -> None:
    router = DynamicRouter(D, 5, num_shared=1, drop="probs", min_capacity=1)
    groups = torch.arange(T) % 2
    together = router(x, Context(group_ids=groups)).dense_weights()
    for group in (0, 1):
        torch.testing.assert_close(together[groups == group], router(x[groups == group]).dense_weights())


def test_padding_takes_no_place(x: Tensor) -> None:
    router = DynamicRouter(D, 5, num_shared=1, drop="probs", min_capacity=1)
    valid = torch.rand(T) < 0.6
    padded, bare = router(x, Context(valid=valid)), router(x[valid])
    torch.testing.assert_close(padded.dense_weights()[valid], bare.dense_weights())
    torch.testing.assert_close(padded.losses["balance"], bare.losses["balance"])


@pytest.mark.parametrize("off", [[0, 1, 2], [4], [5, 6], [0, 1, 2, 3, 4]])
def test_experts_that_are_switched_off(x: Tensor, off: list[int]) -> None:
    moe = layer()
    with mmoe.override(moe, mmoe.switch_off(off)), mmoe.trace(moe) as routing:
        assert moe(x).isfinite().all()
    assert (routing[0].dense_weights()[:, off] == 0).all()
    left = [expert for expert in range(7) if expert not in off]
    assert (routing[0].dense_weights()[:, left].sum(-1) > 0).all()


def test_rows_weigh_in_the_loss(x: Tensor) -> None:
    router = DynamicRouter(D, 5)
    weights = (torch.arange(T) < 10).float()
    torch.testing.assert_close(
        router(x, Context(row_weights=weights)).losses["balance"], router(x[:10]).losses["balance"]
    )


def test_jitter_changes_what_the_gate_sees_and_not_what_experts_do(x: Tensor) -> None:
    moe, before = layer(jitter=0.3).train(), x.clone()
    assert not torch.equal(moe.router(x).logits, moe.router(x).logits)
    moe(x)
    assert torch.equal(x, before)
    assert torch.equal(moe.eval().router(x).logits, moe.router(x).logits)


@pytest.mark.parametrize("gate", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16])
def test_jitter_is_even_and_without_bias(rows: torch.dtype, gate: torch.dtype) -> None:
    router = DynamicRouter(1, 3, jitter=0.01).to(gate).train()
    torch.nn.init.ones_(router.weight)
    seen = router.scores(torch.ones(50_000, 1, dtype=rows))[:, 0]
    assert seen.mean().item() == pytest.approx(1, abs=5e-4)
    if gate == torch.float32:
        assert seen.std().item() == pytest.approx(0.02 / 12**0.5, rel=0.05) and len(seen.unique()) > 1000


def test_exploring_gives_the_gate_a_gradient_in_training(x: Tensor) -> None:
    router = DynamicRouter(D, 6, top_p=None, top_k=2, explore=True, eps=0.5)
    (router(x).weights * torch.randn(T, 6)).sum().backward()
    assert router.weight.grad.abs().sum() > 0
    other = {tuple(row) for row in router(x).experts.tolist()} ^ {tuple(row) for row in router(x).experts.tolist()}
    assert other, "picks differ from call to call"
    router.eval()
    assert torch.equal(router(x).experts, router(x).experts)


def test_without_noise_exploring_picks_the_best(x: Tensor) -> None:
    scores = torch.randn(9, 5)
    nothing = torch.zeros(5, 9, 5)
    experts, weights = explore(scores, 5, 0.01, nothing, torch.zeros(5, 9, 1))
    best = sparse_mixer(scores, 0.01)
    assert torch.equal(experts, best[0])
    torch.testing.assert_close(weights, best[1])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"top_p": 1.5}, "top_p=1.5\n  it is a share of the probability"),
        ({"top_p": -0.1}, "top_p=-0.1"),
        ({"num_null": 6}, "num_null=6"),
        ({"num_shared": 6}, "num_shared=6"),
        ({"top_k": 7, "top_p": None}, "top_k=7"),
        ({"drop": "last"}, "drop='last'"),
        ({"jitter": 1.0}, "jitter=1.0"),
        ({"explore": 1}, "explore=1"),
        ({"min_capacity": 0}, "min_capacity=0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], told: str) -> None:
    with pytest.raises(BadOverride) as error:
        DynamicRouter(D, 6, **options)
    assert told in str(error.value)
