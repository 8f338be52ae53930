"""Expert choice: each expert picks its best tokens, so the load is balanced by construction.

    S = softmax(X W_g^T) over experts;  expert e takes the C tokens with the largest S[:, e];  C = n * capacity / E

Paper: Zhou et al. 2022, arXiv 2202.09368 (equations 1 to 3). A token gets 0 to E experts. Choice looks at other tokens,
the later ones included: not for causal language models. Inside `context.group_ids` each sample chooses on its own.
Shapes: T rows, D width, E experts; K = E slots, slot e holds e or the sentinel.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from mmoe.options import check_float
from mmoe.registry import routers
from mmoe.routing import Context, LinearRouter, Routing, finish_routing


@routers.register("expert_choice")
class ExpertChoiceRouter(LinearRouter):
    """Each expert picks the tokens it scores highest.

    Args:
        dim: model width D.
        num_experts: E.
        capacity_factor: experts per token on average; an expert takes ceil(n * capacity_factor / E) of n tokens.

    Example:
        >>> routing = ExpertChoiceRouter(8, 4, capacity_factor=1.0)(torch.randn(12, 8))
        >>> routing.counts().tolist()
        [3, 3, 3, 3]
    """

    causal_safe = False
    batch_dependent = True

    def __init__(self, dim: int, num_experts: int, *, capacity_factor: float = 2.0) -> None:
        super().__init__(dim, num_experts)
        check_float("capacity_factor", capacity_factor, above=0)
        self.capacity_factor = capacity_factor
        self.experts_per_token = min(capacity_factor, num_experts)

    def select(self, logits: Tensor, context: Context | None = None) -> Routing:
        """The best rows of every expert inside each group; padding takes no capacity."""
        rows = len(logits)
        probs = logits.softmax(-1)  # (T, E)
        groups = torch.zeros(rows, dtype=torch.long, device=logits.device)
        if context is not None and context.group_ids is not None:
            groups = torch.unique(context.group_ids, return_inverse=True)[1]
        valid = torch.ones_like(groups, dtype=torch.bool)
        if context is not None and context.valid is not None:
            valid = context.valid
        sizes = groups.new_zeros(rows + 1).index_add_(0, groups, valid.long())  # valid rows per group
        factor = Fraction(self.experts_per_token).limit_denominator(10**6) or Fraction(1, 10**6)
        share = factor / self.num_experts
        capacity = -(-sizes * share.numerator // share.denominator)  # ceil, exact
        rank = _rank_in_group(probs.detach().masked_fill(~valid[:, None], -1.0), groups)  # (T, E)
        chosen = (rank < capacity[groups][:, None]) & valid[:, None]  # (T, E)
        routing = Routing(
            experts=torch.where(chosen, torch.arange(self.num_experts, device=logits.device), self.num_experts),
            weights=torch.where(chosen, probs, 0.0),
            num_experts=self.num_experts,
            logits=logits,
            probs=probs,
        )
        return finish_routing(routing, context)


def _rank_in_group(scores: Tensor, groups: Tensor) -> Tensor:
    """Rank of each row among its group by descending score, for every column: (T, E) -> (T, E)."""
    by_score = scores.argsort(dim=0, descending=True, stable=True)  # (T, E)
    by_group = groups[by_score].argsort(dim=0, stable=True)  # (T, E)
    order = by_score.gather(0, by_group)  # rows sorted by group, then by score
    position = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=order.device)[:, None].expand_as(order)
    )
    first = torch.searchsorted(groups.sort().values, groups)  # (T,) where a row's group begins
    return position - first[:, None]
