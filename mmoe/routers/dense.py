"""Dense softmax routing: every expert sees every token, weighted by a softmax ("soft" or "full" mixture).

    w = softmax(W_g x / temperature),  y = sum_e w_e * Expert_e(x)

Source: Jacobs et al. 1991, "Adaptive mixtures of local experts". Shapes: T rows, D width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmoe.options import check_float
from mmoe.registry import routers
from mmoe.routing import Context, LinearRouter, Routing, finish_routing


@routers.register("dense")
class DenseRouter(LinearRouter):
    """All experts, softmax weights.

    Args:
        dim: model width D.
        num_experts: E.
        temperature: divides the logits before the softmax.
        gate_bias: gives the gate an additive bias.

    Example:
        >>> DenseRouter(8, 4)(torch.randn(3, 8)).n_used().tolist()
        [4, 4, 4]
    """

    def __init__(self, dim: int, num_experts: int, *, temperature: float = 1.0, gate_bias: bool = False) -> None:
        super().__init__(dim, num_experts, gate_bias)
        check_float("temperature", temperature, above=0)
        self.experts_per_token = num_experts
        self.temperature = temperature

    def select(self, logits: Tensor, context: Context | None = None) -> Routing:
        """Every expert with its softmax weight."""
        probs = (logits / self.temperature).softmax(-1)  # (T, E)
        experts = torch.arange(self.num_experts, device=logits.device).expand(len(logits), -1)
        routing = Routing(
            experts=experts,
            weights=probs,
            num_experts=self.num_experts,
            logits=logits,
            probs=probs,
            all_used=True,
        )
        return finish_routing(routing, context)
