"""Changes routing decisions while a block of code runs, and always restores them.

The hook of an override sees what the router saw and decided, and returns another decision: the base of expert ablation
and of test-time routing methods. Shapes: T rows, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from numbers import Integral

import torch
from torch import Tensor, nn

from mmoe.errors import BadInput, BadOverride, UnknownName, did_you_mean
from mmoe.moe import Override, moe_layers
from mmoe.routing import Router, Routing


@contextmanager
def override(model: nn.Module, hooks: Override | Mapping[str, Override]) -> Iterator[None]:
    """Replaces routing decisions inside the block; an override inside another one replaces it on the layers it names.

    Args:
        model: holder of MoE layers.
        hooks: function (x (T, D), router, routing) -> routing for every layer, or a mapping from layer name or pattern
            ("visual.*") to such a function.

    Raises:
        UnknownName: a pattern names no MoE layer. BadOverride: a hook is no function.
    """
    layers = moe_layers(model)
    by_pattern = hooks if isinstance(hooks, Mapping) else {"*": hooks}
    for hook in by_pattern.values():
        if not callable(hook):
            raise BadOverride(
                f"override with {hook!r}", "it is no function", "mmoe.override(model, mmoe.switch_off([0]))"
            )
    before = {name: layer._override for name, layer in layers.items()}
    try:
        for pattern, hook in by_pattern.items():
            matched = [name for name in layers if fnmatchcase(name, pattern)]
            if not matched:
                raise UnknownName(
                    f"no MoE layer named {pattern!r}", did_you_mean(pattern, layers), "mmoe.moe_layers(model)"
                )
            for name in matched:
                layers[name]._override = hook
        yield
    finally:
        for name, layer in layers.items():
            layer._override = before[name]


def switch_off(experts: int | Iterable[int] | Tensor) -> Override:
    """An override after which the named experts are never used: the router chooses among the others.

    Routers without scores lose the slots instead, and the other weights of a row are scaled up to the same sum.

    Example:
        >>> from mmoe import MoE, FFNExperts, TopKRouter, trace
        >>> moe = MoE(TopKRouter(8, 4), FFNExperts(8, 16, 4))
        >>> with override(moe, switch_off([0, 3])), trace(moe) as routing:
        ...     y = moe(torch.randn(5, 8))
        >>> routing[0].counts().tolist()
        [0, 5, 5, 0]
    """
    if isinstance(experts, Tensor):
        experts = experts.flatten().tolist()
    given = list(experts) if isinstance(experts, Iterable) and not isinstance(experts, str) else [experts]
    if not all(isinstance(expert, Integral) and not isinstance(expert, bool) for expert in given):
        raise BadInput(f"switch off experts {experts!r}", "experts are a list of whole numbers", "switch_off([0])")
    off = sorted({int(expert) for expert in given})

    def hook(x: Tensor, router: Router, routing: Routing) -> Routing:
        _check(off, router.num_experts)
        if routing.logits is None:
            return _drop(routing, off)
        logits = routing.logits.clone()
        logits[:, off] = -torch.inf
        chosen = router.select(logits, routing.context)
        return replace(_drop(chosen, off), losses=routing.losses, state=routing.state)

    return hook


def _check(off: list[int], num_experts: int) -> None:
    if any(not 0 <= e < num_experts for e in off):
        raise BadInput(f"switch off experts {off}", f"the layer has experts 0 to {num_experts - 1}", "switch_off([0])")
    if len(off) >= num_experts:
        raise BadInput(f"switch off all {num_experts} experts", "at least one must stay", "switch_off([0])")


def _drop(routing: Routing, off: list[int]) -> Routing:
    gone = torch.isin(routing.experts, torch.tensor(off, device=routing.experts.device))  # (T, K)
    kept = routing.weights.masked_fill(gone, 0.0)
    total, left = routing.weights.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
    scale = torch.where(left > 0, total / left.clamp(min=1e-9), 1.0)
    experts = routing.experts.masked_fill(gone, routing.num_experts)
    undropped = None if routing.undropped is None else _drop(routing.undropped, off)
    return replace(routing, experts=experts, weights=kept * scale, all_used=False, undropped=undropped)
