"""Expert choice: each expert picks its best tokens, so the load is balanced by construction.

    S = softmax(X W_g^T) over experts;  expert e takes the C tokens with the largest S[:, e];  C = n * capacity / E

Paper: Zhou et al. 2022, arXiv 2202.09368 (equations 1 to 3). A token gets 0 to E experts. Choice looks at other tokens,
the later ones included: not for causal language models. Inside `context.group_ids` each sample chooses on its own.
Shapes: T rows, D width, E experts; K = E slots, slot e holds e or the sentinel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmoe.options import check_float
from mmoe.registry import routers
from mmoe.routers.capacity import groups_of, places, rank_in_group
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
        probs = logits.softmax(-1)  # (T, E)
        valid = None if context is None else context.valid
        groups = groups_of(context, logits)
        most = places(groups, valid, self.capacity_factor, self.num_experts)[:, None]
        scores = probs.detach() if valid is None else probs.detach().masked_fill(~valid[:, None], -1.0)
        chosen = rank_in_group(scores, groups) < most  # (T, E)
        if valid is not None:
            chosen &= valid[:, None]
        routing = Routing(
            experts=torch.where(chosen, torch.arange(self.num_experts, device=logits.device), self.num_experts),
            weights=torch.where(chosen, probs, 0.0),
            num_experts=self.num_experts,
            logits=logits,
            probs=probs,
        )
        return finish_routing(routing, context)
