"""Counts parameters and floating-point operations of models with MoE layers.

Active parameters are those that one token touches: all parameters outside the experts, and of the E experts of a layer
the K that its router uses. Experts that every row uses count whole, and of the others each as often as any, null ones
included: so where they differ in size the number is a mean. Where a router takes as many experts as a row needs it is
an upper bound, and `Params.at_most` says so. FLOPs are counted while the model runs, so they follow the recorded
routing (dropped slots, padding and variable K cost nothing), never the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmoe.experts.base import Experts
from mmoe.moe import MoE, moe_layers
from mmoe.trace import Trace, trace


@dataclass(frozen=True, kw_only=True)
class Params:
    """Parameter counts of a model.

    Attributes:
        total: all parameters, shared ones once.
        active: parameters that one token touches, see above.
        trainable: parameters with `requires_grad`.
        routed: parameters inside routed experts.
        routers: parameters of the routers.
        at_most: `active` is an upper bound, since a router takes as many experts as a row needs.
    """

    total: int
    active: int
    trainable: int
    routed: int
    routers: int
    at_most: bool = False


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What one call cost.

    Attributes:
        params: parameter counts.
        flops: multiply-adds times two of the call.
        routing: what the routers decided.
    """

    params: Params
    flops: int
    routing: Trace

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self.params), "flops": self.flops, "layers": self.routing.summary()}


def count_params(model: nn.Module) -> Params:
    """Counts parameters; works on the meta device.

    Example:
        >>> from mmoe import FFNExperts, MoE, TopKRouter
        >>> params = count_params(MoE(TopKRouter(8, 4, top_k=1), FFNExperts(8, 16, 4, bias=False)))
        >>> params.total, params.active
        (1056, 288)
    """
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = moe_layers(model).values()
    routers = sum(p.numel() for p in nn.ModuleList(layer.router for layer in layers).parameters())
    used: dict[Experts, float] = {}  # layers may share their experts
    for layer in layers:
        for part, share in _shares(layer).items():
            used[part] = used.get(part, 0.0) + share
    routed = {part: _routed_params(part) for part in used}
    idle = sum(count - round(count * min(1.0, used[part])) for part, count in routed.items())
    return Params(
        total=total,
        active=total - idle,
        trainable=trainable,
        routed=sum(routed.values()),
        routers=routers,
        at_most=any(layer.router.at_most for layer in layers),
    )


def _shares(layer: MoE) -> dict[Experts, float]:
    """Share of each part of a layer's experts that a row uses."""
    experts = next(module for module in layer.experts.modules() if isinstance(module, Experts))  # peft wraps them
    fixed = layer.router.num_shared
    some = layer.num_experts - fixed  # experts of which a row uses some
    each = (layer.router.experts_per_token - fixed) / some
    found, begin = {}, 0
    for part, count in experts.routes():
        free = min(max(some - begin, 0), count)
        if part is not None:
            found[part] = (free * each + count - free) / count
        begin += count
    return found


def _routed_params(experts: Experts) -> int:
    parts = [module for module in experts.modules() if isinstance(module, Experts)]
    return sum(p.numel() for part in parts for p in part.packed_parameters().values())


def _grouped_mm_flops(
    x_shape: torch.Size, w_shape: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """2 N I O for rows (N, I) and weights (E, I, O); 2 N I O for the weight gradient (I, N) x (N, O)."""
    return int(2 * x_shape[0] * x_shape[1] * w_shape[-1])


def _attention_flops(
    q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Scores and weighted sum of queries (..., N, C), keys (..., M, C) and values (..., M, O): 2 N M (C + O) each."""
    return int(2 * q_shape.numel() // q_shape[-1] * k_shape[-2] * (k_shape[-1] + v_shape[-1]))


_NOT_IN_TORCH = {
    torch.ops.aten._grouped_mm: _grouped_mm_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


@torch.no_grad()
def profile(model: nn.Module, call: Callable[..., Any], *args: Any) -> Profile:
    """Runs `call(*args)`, which uses `model`, and counts what it cost.

    Args:
        model: holder of the MoE layers.
        call: the model itself or one of its methods.
        args: inputs of the call.

    Example:
        >>> from mmoe import FFNExperts, MoE, TopKRouter
        >>> moe = MoE(TopKRouter(8, 4, top_k=1), FFNExperts(8, 16, 4))
        >>> profile(moe, moe, torch.randn(10, 8)).flops  # 10 rows x (gate 8*4 + expert 2*8*16) x 2
        5760
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter cannot see into the fused attention block
    backends = {module: module.backend for module in model.modules() if isinstance(module, Experts)}
    try:
        for experts in backends:
            experts.backend = "loop"  # the fused step fills blocks up
        with trace(model) as routing, FlopCounterMode(display=False, custom_mapping=_NOT_IN_TORCH) as counter:
            call(*args)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for experts, backend in backends.items():
            experts.backend = backend
    return Profile(params=count_params(model), flops=int(counter.get_total_flops()), routing=routing.detach())
