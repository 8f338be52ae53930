"""Fixed routing: the routes are given (by modality, task, hash or an earlier pass), nothing is learned.

Sources: Hash layers (arXiv 2106.04426), modality experts (BEiT-3, 2208.10442). Shapes: T rows, K slots, E experts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmoe.errors import BadInput
from mmoe.registry import routers
from mmoe.routing import Context, Router, Routing, finish_routing


@routers.register("fixed")
class FixedRouter(Router):
    """Takes the routes from `context.expert_ids`; K experts of a row are averaged.

    Args:
        num_experts: E.

    Example:
        >>> import torch
        >>> context = Context(expert_ids=torch.tensor([0, 2, 1]))
        >>> FixedRouter(3)(torch.randn(3, 8), context).experts.flatten().tolist()
        [0, 2, 1]
    """

    trainable = False

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.experts_per_token = 1

    def forward(self, x: Tensor, context: Context | None = None, state: Any = None) -> Routing:
        """Routes rows as given; ids equal to E are unused slots.

        Raises:
            BadInput: no routes were given, or an id lies outside 0..E.
        """
        if context is None or context.expert_ids is None:
            raise BadInput(
                "a fixed router was called without routes",
                "it reads them from the context",
                "moe(x, Context(expert_ids=ids))",
            )
        experts = context.expert_ids.long()
        if experts.ndim == 1:
            experts = experts[:, None]  # (T, K)
        if bool(((experts < 0) | (experts > self.num_experts)).any()):
            raise BadInput(
                f"routes from {int(experts.min())} to {int(experts.max())} with {self.num_experts} experts",
                f"ids must lie between 0 and {self.num_experts}, which marks an unused slot",
                f"Context(expert_ids=ids.clamp(0, {self.num_experts}))",
            )
        used = experts < self.num_experts  # (T, K)
        weights = used / used.sum(-1, keepdim=True).clamp(min=1)
        routing = Routing(experts=experts, weights=weights.to(x.dtype), num_experts=self.num_experts)
        return finish_routing(routing, context)
