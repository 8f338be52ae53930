"""How many rows an expert has places for, and which of them get one.

Places belong to the rows of one group (`context.group_ids`), or to all rows; padding takes none. Shapes: T rows, E
experts, K slots.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from mmoe.routing import Context, Routing


def groups_of(context: Context | None, like: Tensor) -> Tensor:
    """Number of each row's group, (T,), for `like` (T, ...)."""
    if context is None or context.group_ids is None:
        return torch.zeros(len(like), dtype=torch.long, device=like.device)
    return torch.unique(context.group_ids, return_inverse=True)[1]


def places(groups: Tensor, valid: Tensor | None, per_row: float, num_experts: int) -> Tensor:
    """Places that an expert has for each row's group, (T,): C = ceil(n * per_row / E) for n rows that count.

    Args:
        groups: (T,).
        valid: (T,) bool, or None where every row counts.
        per_row: places of all experts for one row, on average; more than E are none more.
        num_experts: E.
    """
    counted = torch.ones_like(groups) if valid is None else valid.long()
    sizes = groups.new_zeros(len(groups) + 1).index_add_(0, groups, counted)  # rows that count, per group
    factor = Fraction(min(per_row, num_experts)).limit_denominator(10**6) or Fraction(1, 10**6)
    share = factor / num_experts
    return -(-sizes * share.numerator // share.denominator)[groups]  # ceil, exact


def rank_in_group(scores: Tensor, groups: Tensor) -> Tensor:
    """Rank of each row among its group by descending score, for every column: (T, E) and (T,) -> (T, E)."""
    by_score = scores.argsort(dim=0, descending=True, stable=True)  # (T, E)
    by_group = groups[by_score].argsort(dim=0, stable=True)  # (T, E)
    order = by_score.gather(0, by_group)  # rows sorted by group, then by score
    position = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=order.device)[:, None].expand_as(order)
    )
    first = torch.searchsorted(groups.sort().values, groups)  # (T,) where a row's group begins
    return position - first[:, None]


def drop_beyond_capacity(routing: Routing, capacity_factor: float) -> Routing:
    """Drops the slots that an expert has no place for, those with the smallest probabilities.

    An expert has ceil(n K capacity_factor / E) places for n rows (Switch, arXiv 2101.03961, eq. 3). The rows with the
    largest probabilities get them (V-MoE's priority, 2106.05974, section 4; Megatron's policy "probs"), so the order of
    the rows does not matter. Dropped slots hold the sentinel and weight 0; the other weights stay as they are.

    Example:
        >>> ids, probs = torch.tensor([[0], [0], [0], [1]]), torch.tensor([[0.5], [0.9], [0.7], [0.4]])
        >>> probs = torch.cat([probs, 1 - probs], 1)
        >>> routing = Routing(experts=ids, weights=torch.ones(4, 1), num_experts=2, probs=probs)
        >>> drop_beyond_capacity(routing, 1.0).experts.tolist()
        [[2], [0], [0], [1]]
    """
    experts, slots = routing.experts, routing.experts.shape[1]
    groups = groups_of(routing.context, experts)
    lines = groups[:, None] * (routing.num_experts + 1) + experts  # (T, K), one for each expert and group
    scores = routing.weights if routing.probs is None else routing.probs.gather(1, experts % routing.num_experts)
    rank = rank_in_group(scores.detach().reshape(-1, 1), lines.flatten()).view_as(experts)
    dropped = rank >= places(groups, routing.valid, slots * capacity_factor, routing.num_experts)[:, None]
    return replace(
        routing,
        experts=experts.masked_fill(dropped, routing.num_experts),
        weights=routing.weights.masked_fill(dropped, 0.0),
        all_used=False,
        undropped=routing,
    )
