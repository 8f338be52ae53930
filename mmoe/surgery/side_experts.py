"""Side experts: a dense feed-forward block stays as it is, and a learned share of experts is added to it.

    y = FFN_shared(x) + s * sum_e p_e(x) * FFN_e(x),   p = softmax(W_g x + b_g),   s = 0 at the start

Paper: Zhou et al. 2025, "Gamma: Toward Generic Image Assessment with Mixture of Assessment Experts", arXiv 2503.06678
(there in the last blocks of both towers of a CLIP, E = 3). Authors' code: github.com/zht8506/Gamma, CC BY-NC-SA 4.0;
written from the paper's formulas. Every FFN_e begins as a copy of the host's own block, which is the shared one.
At s = 0 the host computes what it did, bit for bit, and routers and experts get no gradient: only s moves at first.
Experts are equal then and drift apart by what their router weights them with, so expect a slow start. The softmax uses
every expert on every row: E + 1 blocks are run where there was one.
Shapes: E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmoe.options import check_bool, check_float, check_int
from mmoe.registry import parse_spec
from mmoe.scale import LearnedScale
from mmoe.surgery.site import HostedMoE, Site
from mmoe.surgery.swap import Model, SwapReport, draw_router, pack, swap


def add_side_experts(
    model: Model,
    num_experts: int = 3,
    *,
    layers: int | str | Sequence[str] | None = None,
    router: str | Mapping[str, Any] = "dense:gate_bias=true",
    scale: float = 0.0,
    freeze: bool = True,
    generator: torch.Generator | None = None,
    inplace: bool = False,
) -> tuple[Model, SwapReport]:
    """Adds scaled experts beside feed-forward blocks of a trained model.

    Device, dtype and training mode are those of the block; routers, experts and scales are always trainable.

    Args:
        model: host of any library; see `mmoe.sites` for the blocks that can be read.
        num_experts: E, each a copy of the block.
        layers: which blocks. None: all of them. An int n: those of the last n layers of each stack. Else one or
            several patterns on the names of `mmoe.sites`, such as "visual.*".
        router: name or spec of a registered router.
        scale: s at the start.
        freeze: freezes everything that the host had; False leaves its weights as they are, the shared blocks' too.
        generator: CPU generator of the routers; the global seed when None.
        inplace: changes `model` instead of a copy.

    Returns:
        The new model and a report.

    Raises:
        Refused: no chosen block can be read.
        UnknownName: a pattern names no block.

    Example:
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        ...
        ...     def forward(self, x):
        ...         return x + self.ffn(x)
        >>> dense = nn.Sequential(Block(), Block())
        >>> model, report = add_side_experts(dense, num_experts=3, layers=1)
        >>> print(report)
        1 block given side experts, 560 -> 1,428 parameters (1,428 active)
          1.ffn  3 experts, copies of the model's own, 280 -> 1,148
        >>> x = torch.randn(3, 8)
        >>> torch.equal(model(x), dense(x))
        True
    """
    check_int("num_experts", num_experts, 1)
    check_float("scale", scale)
    check_bool("freeze", freeze)
    spec = parse_spec(router)

    def make(site: Site) -> HostedMoE:
        parts = [site.weights()] * num_experts
        packed = pack(parts)
        gate = draw_router(spec, parts, min(2, num_experts), generator)
        post = LearnedScale(scale, dropout=packed.out_dropout).to(packed.up.device, packed.up.dtype)
        shared = site.module if inplace else copy.deepcopy(site.module)
        return HostedMoE(gate, packed.experts(), shared=shared, post=post).train(site.module.training)

    result, report = swap(
        model, layers, make, verb="given side experts", source="copies of the model's own", inplace=inplace
    )
    if freeze:
        result.requires_grad_(False)
        for name in report.sites:
            block = result.get_submodule(name)
            for part in ("router", "experts", "post"):
                block.get_submodule(part).requires_grad_(True)
    return result, report
