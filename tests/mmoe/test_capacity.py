"""Capacity: who gets a place, what dropped slots are, and that losses count them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import mmoe
from mmoe import Context, TopKRouter
from mmoe.errors import BadOverride
from mmoe.losses import balance_loss, importance_loss

T, D, E, K = 40, 16, 5, 2


def routers(capacity_factor: float, **options: Any) -> tuple[TopKRouter, TopKRouter]:
    """One that drops and its twin that does not."""
    limited = TopKRouter(D, E, top_k=K, capacity_factor=capacity_factor, **options)
    free = TopKRouter(D, E, top_k=K, **options)
    free.load_state_dict(limited.state_dict())
    return limited, free


@pytest.mark.parametrize("factor", [0.3, 0.5, 1.0, 1.25])
def test_no_expert_gets_more_than_its_places_and_none_is_wasted(factor: float) -> None:
    limited, free = routers(factor)
    x = torch.randn(T, D) + 0.5
    counts, wanted = limited(x).counts(), free(x).counts()
    capacity = int(torch.tensor(T * K * factor / E - 1e-9).ceil())
    assert counts.tolist() == wanted.clamp(max=capacity).tolist() and (wanted > capacity).any()


def test_the_most_probable_rows_get_the_places() -> None:
    limited, free = routers(0.5)
    x = torch.randn(T, D)
    got, wanted = limited(x), free(x)
    assert wanted.probs is not None
    for expert in range(E):
        kept, asked = (got.experts == expert).any(1), (wanted.experts == expert).any(1)
        dropped = asked & ~kept
        assert not (kept & ~asked).any()
        if dropped.any():
            assert wanted.probs[kept, expert].min() >= wanted.probs[dropped, expert].max()


def test_dropped_slots_hold_the_sentinel_and_the_others_keep_their_weights() -> None:
    limited, free = routers(0.5)
    x = torch.randn(T, D)
    got, wanted = limited(x), free(x)
    kept = got.experts < E
    assert torch.equal(got.weights, wanted.weights * kept) and not got.all_used and not kept.all()
    assert got.undropped is not None and torch.equal(got.undropped.experts, wanted.experts)


def test_room_for_all_drops_nothing() -> None:
    limited, free = routers(E / K)
    x = torch.randn(T, D)
    assert torch.equal(limited(x).experts, free(x).experts)


def test_losses_and_balancing_count_what_was_wanted() -> None:
    limited, free = routers(0.3, bias_rate=0.1)
    x = torch.randn(T, D) + 0.5
    got, wanted = limited(x), free(x)
    for choices in ("all", "first"):
        assert torch.equal(balance_loss(got, choices=choices), balance_loss(wanted, choices=choices))
    assert torch.equal(importance_loss(got), importance_loss(wanted))
    limited.update(got)
    free.update(wanted)
    assert limited.select_bias.any() and torch.equal(limited.select_bias, free.select_bias)
    assert got.detach().undropped is not None and not got.detach().undropped.weights.requires_grad


def test_losses_do_not_count_what_an_override_took_away() -> None:
    moe, x = mmoe.build_moe(D, 24, E, K, capacity_factor=0.5), torch.randn(T, D)

    def all_to_the_first(x: torch.Tensor, router: mmoe.Router, routing: mmoe.Routing) -> mmoe.Routing:
        return replace(routing, experts=torch.zeros_like(routing.experts))

    with mmoe.override(moe, mmoe.switch_off([1, 2, 3, 4])):
        routing = moe.route(x)
    assert routing.undropped is not None and routing.undropped.counts().tolist() == [T, 0, 0, 0, 0]
    with mmoe.override(moe, all_to_the_first):
        assert moe.route(x).undropped is None
    with mmoe.override(moe, lambda x, router, routing: routing):
        assert moe.route(x).undropped is not None


def test_samples_have_places_of_their_own() -> None:
    limited, _ = routers(0.5)
    one, other = torch.randn(30, D), torch.randn(10, D)
    groups = torch.tensor([7] * 30 + [3] * 10)
    together = limited(torch.cat([one, other]), Context(group_ids=groups))
    for part, alone in ((slice(0, 30), one), (slice(30, 40), other)):
        assert torch.equal(together.experts[part], limited(alone).experts)


def test_a_row_whose_slots_are_dropped_gets_nothing() -> None:
    moe = mmoe.build_moe(D, 24, E, K, capacity_factor=0.1)
    x = torch.randn(T, D)
    unused = (moe.route(x).experts == E).all(1)
    y = moe(x)
    assert unused.any() and not y[unused].any() and y[~unused].any()


def test_it_has_to_be_positive() -> None:
    with pytest.raises(BadOverride, match="capacity_factor"):
        TopKRouter(D, E, capacity_factor=0.0)
