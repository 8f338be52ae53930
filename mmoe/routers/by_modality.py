"""A gate that sees each modality through a linear layer of its own, in front of any other router.

    r = gate(W_m x + b_m)     m the modality of the token (`context.modality`); experts still get x

Source: the option `use_fm_block` of Uni-MoE's 8-expert code (github.com/HITsz-TMG/Uni-MoE), a convolution of width 1
per modality. Tokens of no known modality (padding is -1; also M and above, so build with as many as there are), and all
where nobody tells any, count as the first one, text there. W and b work in their own precision, outside autocast, as
gates do, and each on the rows of its modality only.
Shapes: T rows, D width, M modalities, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmoe.dispatch import grouped_linear
from mmoe.errors import BadOverride
from mmoe.options import check_int
from mmoe.registry import build_router, parse_spec, routers
from mmoe.routing import Context, Router, Routing, in_autocast


@routers.register("by_modality")
class ByModalityRouter(Router):
    """Another router behind a linear layer for each modality, which begin as what they get.

    Args:
        dim: model width D.
        num_experts: E.
        modalities: M, one more than the largest number that `context.modality` may hold.
        inner: name or spec of the router.
        top_k: of the inner router, where it takes it.

    Attributes:
        modality_weight: (M, D, D).
        modality_bias: (M, D).

    Example:
        >>> router = ByModalityRouter(8, 4, modalities=2)
        >>> router(torch.randn(3, 8), Context(modality=torch.tensor([0, 1, 1]))).n_used().tolist()
        [2, 2, 2]
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        modalities: int = 4,
        inner: str | Mapping[str, Any] = "topk",
        top_k: int = 2,
    ) -> None:
        super().__init__()
        check_int("modalities", modalities, 1)
        if parse_spec(inner)["name"] == "by_modality":
            raise BadOverride("by_modality inside by_modality", "one tells modalities apart already", "inner=topk")
        self.inner: Router = build_router(inner, dim=dim, num_experts=num_experts, top_k=top_k)
        self.num_experts, self.experts_per_token = num_experts, self.inner.experts_per_token
        self.at_most, self.num_shared = self.inner.at_most, self.inner.num_shared
        self.trainable = self.inner.trainable  # type: ignore[misc]  # of this instance
        self.causal_safe, self.batch_dependent = self.inner.causal_safe, self.inner.batch_dependent  # type: ignore[misc]
        self.modality_weight = nn.Parameter(torch.eye(dim).repeat(modalities, 1, 1))
        self.modality_bias = nn.Parameter(torch.zeros(modalities, dim))

    def scores(self, x: Tensor) -> Tensor:
        """Raw scores (T, E) of rows (T, D) of the first modality."""
        return self.inner.scores(self._seen(x, None))

    def select(self, logits: Tensor, context: Context | None = None) -> Routing:
        """As the inner router does."""
        return self.inner.select(logits, context)

    def forward(self, x: Tensor, context: Context | None = None, state: Any = None) -> Routing:
        """Routes rows, each by the layer of its modality."""
        features = x if context is None or context.features is None else context.features
        kinds = None if context is None else context.modality
        return self.select(self.inner.scores(self._seen(features, kinds)), context)

    def _seen(self, x: Tensor, kinds: Tensor | None) -> Tensor:
        """Rows (T, D) through the layers of their modalities (T,), or through the first."""
        if in_autocast(x):
            with torch.autocast(x.device.type, enabled=False):
                return self._seen(x, kinds)
        weight, bias = self.modality_weight, self.modality_bias
        x = x.to(weight.dtype)
        if kinds is None:
            return nn.functional.linear(x, weight[0], bias[0])
        kinds = torch.where((kinds >= 0) & (kinds < len(weight)), kinds, 0)
        order = kinds.argsort(stable=True)
        counts = kinds.new_zeros(len(weight), dtype=torch.long).index_add_(0, kinds, torch.ones_like(kinds).long())
        seen = grouped_linear(x.index_select(0, order), weight, counts, bias)
        return torch.zeros_like(seen).index_copy(0, order, seen)

    def update(self, routing: Routing) -> None:
        """As the inner router does."""
        self.inner.update(routing)
