"""GShard's top-2 gating: weights of two choices, places, and the sampled second choice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmoe import Context, GShardRouter, TopKRouter
from mmoe.errors import BadOverride
from mmoe.losses import balance_loss

T, D, E = 30, 8, 4


@pytest.fixture
def x() -> Tensor:
    return 2 * torch.randn(T, D)


def test_without_drops_it_is_top_2_of_a_softmax(x: Tensor) -> None:
    router, plain = GShardRouter(D, E), TopKRouter(D, E, top_k=2)
    plain.load_state_dict(router.state_dict())
    found, expected = router(x), plain(x)
    torch.testing.assert_close(found.dense_weights(), expected.dense_weights())
    torch.testing.assert_close(found.losses["balance"], balance_loss(expected, choices="first"))


def test_first_choices_take_places_before_second_ones(x: Tensor) -> None:
    router = GShardRouter(D, E, capacity_factor=0.5, min_capacity=1)
    routing, free = router(x), GShardRouter(D, E)
    free.load_state_dict(router.state_dict())
    before = free(x)
    places = -(-T * 2 * 0.5 // E)
    assert (routing.counts() <= places).all() and (before.counts() > places).any()
    for expert in range(E):
        first = (before.experts[:, 0] == expert).nonzero().flatten()[: int(places)]
        assert (routing.experts[first, 0] == expert).all(), "the earliest first choices"
        seconds = (routing.experts[:, 1] == expert).sum()
        assert seconds <= places - len(first)


def test_who_lost_a_choice_gives_the_other_all(x: Tensor) -> None:
    routing = GShardRouter(D, E, capacity_factor=0.5, min_capacity=1)(x)
    used, sums = routing.n_used(), routing.weights.sum(-1)
    assert {0, 1, 2} <= set(used.tolist())
    torch.testing.assert_close(sums[used > 0], torch.ones(int((used > 0).sum())))
    assert (sums[used == 0] == 0).all()


def test_padding_takes_no_place_and_counts_in_no_loss(x: Tensor) -> None:
    router = GShardRouter(D, E, capacity_factor=0.6, min_capacity=1)
    valid = torch.rand(T) < 0.6
    padded, bare = router(x, Context(valid=valid)), router(x[valid])
    torch.testing.assert_close(padded.dense_weights()[valid], bare.dense_weights())
    assert (padded.n_used()[~valid] == 0).all()
    torch.testing.assert_close(padded.losses["balance"], bare.losses["balance"])


def test_the_second_choice_is_drawn_by_its_probability() -> None:
    router = GShardRouter(D, 3, sample_second=True)
    logits = torch.tensor([[3.0, 1.0, 0.0]]).expand(4000, 3)
    routing = router.select(logits)
    assert (routing.experts[:, 0] == 0).all()
    share = (routing.experts[:, 1] == 1).float().mean().item()
    assert share == pytest.approx(torch.tensor([1.0, 0.0]).softmax(0)[0].item(), abs=0.03)
    assert torch.equal(routing.logits, logits)


@pytest.mark.parametrize(
    "options", [{"num_experts": 1}, {"capacity_factor": 0.0}, {"min_capacity": 0}, {"sample_second": 1}]
)
def test_options_that_cannot_be(options: dict[str, float]) -> None:
    with pytest.raises(BadOverride):
        GShardRouter(D, **{"num_experts": 4, **options})
