"""A gate that sees each modality through a linear layer of its own, in front of any other router.

    r = gate(W_m x + b_m)     m the modality of the token (`context.modality`); experts still get x

Source: the option `use_fm_block` of Uni-MoE's 8-expert code (github.com/HITsz-TMG/Uni-MoE), a convolution of width 1
per modality. Tokens of no known modality, and all where nobody tells any, count as the first one, text there.
Shapes: T rows, D width, M modalities, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmoe.errors import BadOverride
from mmoe.options import check_int
from mmoe.registry import build_router, parse_spec, routers
from mmoe.routing import Context, Router, Routing


@routers.register("by_modality")
class ByModalityRouter(Router):
    """Another router behind a linear layer for each modality, which begin as what they get.

    Args:
        dim: model width D.
        num_experts: E.
        modalities: M.
        inner: name or spec of the router.
        top_k: of the inner router, where it takes it.

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
        self.trainable = self.inner.trainable  # type: ignore[misc]  # of this instance
        self.causal_safe, self.batch_dependent = self.inner.causal_safe, self.inner.batch_dependent  # type: ignore[misc]
        linear = [nn.Linear(dim, dim) for _ in range(modalities)]
        for layer in linear:
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(linear)

    def scores(self, x: Tensor) -> Tensor:
        """Raw scores (T, E) of rows (T, D) of the first modality."""
        return self.inner.scores(self.layers[0](x))

    def select(self, logits: Tensor, context: Context | None = None) -> Routing:
        """As the inner router does."""
        return self.inner.select(logits, context)

    def forward(self, x: Tensor, context: Context | None = None, state: Any = None) -> Routing:
        """Routes rows, each by the layer of its modality."""
        features = x if context is None or context.features is None else context.features
        if context is None or context.modality is None:
            return self.select(self.scores(features), context)
        known = (context.modality >= 0) & (context.modality < len(self.layers))
        kinds = torch.where(known, context.modality, 0)
        seen = sum(layer(features) * (kinds == number)[:, None] for number, layer in enumerate(self.layers))
        return self.select(self.inner.scores(seen), context)

    def update(self, routing: Routing) -> None:
        """As the inner router does."""
        self.inner.update(routing)
