"""Sparse upcycling: turns the feed-forward blocks of a dense model into mixtures of experts.

    y = sum_k w_k * Expert_k(x),   Expert_e = FFN of source e,   router drawn at random

Papers: Komatsuzaki et al. 2022, arXiv 2212.05055 (every expert a copy of the model's own block); several sources:
Zhang et al. 2024, arXiv 2409.19291, section 3 (CLIP-MoE: expert e from the e-th dense model, all else from the first).
With copies and combine weights that sum to 1 the new model computes what the dense one did, to rounding, so training
goes on from there. As long as all experts of a layer agree, such weights pass no gradient of the task to the router:
the copies drift apart first, by the different tokens they get. No capacity limit is set: tokens are never dropped.
Shapes: E experts, F inner width, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmoe.errors import BadOverride, Refused
from mmoe.options import check_float, check_int
from mmoe.registry import parse_spec
from mmoe.routing import Router
from mmoe.surgery.site import ExpertWeights, HostedMoE, Site
from mmoe.surgery.swap import Model, SwapReport, draw_router, pack, swap

Source = nn.Module | Mapping[str, Tensor]


def upcycle(
    model: Model,
    num_experts: int = 4,
    *,
    top_k: int | None = None,
    layers: int | str | Sequence[str] | None = None,
    sources: Sequence[Source] | None = None,
    router: str | Mapping[str, Any] = "topk",
    router_options: Mapping[str, Any] | None = None,
    dropout: float | None = None,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    inplace: bool = False,
) -> tuple[Model, SwapReport]:
    """Replaces dense feed-forward blocks by mixtures of experts that start from trained weights.

    Device, dtype, training mode and whether weights are frozen are those of the block; routers are always trainable.

    Args:
        model: host of any library; see `mmoe.sites` for the blocks that can be read.
        num_experts: E.
        top_k: K, for routers that take it; 2 when None, or 1 where there is one expert.
        layers: which blocks. None: all of them. An int n: those of the last n layers of each stack (the visual and the
            text tower, say), all of a shorter stack; blocks outside a stack of layers are left alone. Else one or
            several patterns on the names of `mmoe.sites`, such as "visual.*".
        sources: None makes every expert a copy of the model's own block. Else E models or state dicts: expert e
            takes the block of source e, everything else stays from `model`; source 0 is usually `model` itself.
        router: name or spec of a registered router, "topk:score=sigmoid".
        router_options: more options of the router.
        dropout: inner dropout of the experts in training; the host's own when None.
        noise: standard deviation of Gaussian noise on the weights of the copies 1 and up, relative to that of the
            weight; 0 keeps the function of the dense model.
        generator: CPU generator of routers and noise; the global seed when None.
        inplace: changes `model` instead of a copy.

    Returns:
        The new model and a report.

    Raises:
        Refused: no chosen block can be upcycled, or the number of sources is not E.
        LoadMismatch: a source does not fit the model.
        UnknownName: a pattern names no block.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        ...
        ...     def forward(self, x):
        ...         return x + self.ffn(x)
        >>> dense = nn.Sequential(Block(), Block())
        >>> sparse, report = upcycle(dense, num_experts=4, layers=1)
        >>> print(report)
        1 block upcycled, 560 -> 1,432 parameters (872 active)
          1.ffn  4 experts, copies of the model's own, 280 -> 1,152
        >>> x = torch.randn(3, 8)
        >>> torch.allclose(sparse(x), dense(x), atol=1e-6)
        True
    """
    _check(num_experts, sources, noise)
    if dropout is not None:
        check_float("dropout", dropout, low=0, below=1)
    states = None if sources is None else [s.state_dict() if isinstance(s, nn.Module) else s for s in sources]
    spec = {**parse_spec(router), **(router_options or {})}
    k = min(2, num_experts) if top_k is None else top_k

    def make(site: Site) -> HostedMoE:
        parts = _expert_parts(site, num_experts, states)
        return _build(site, parts, draw_router(spec, parts, k, generator), dropout, noise, generator)

    source = "copies of the model's own" if states is None else f"one from each of {num_experts} sources"
    return swap(model, layers, make, verb="upcycled", source=source, inplace=inplace)


def assemble_experts(
    base: Model,
    ffns: Sequence[Source],
    *,
    top_k: int | None = None,
    layers: int | str | Sequence[str] | None = None,
    router: str | Mapping[str, Any] = "topk",
    generator: torch.Generator | None = None,
    inplace: bool = False,
) -> tuple[Model, SwapReport]:
    """A mixture from feed-forward blocks that were trained apart: expert e is the block of `ffns[e]`.

    This is `upcycle` with sources. A source may hold the tensors of feed-forward blocks alone, under the names that
    they have in the base; whatever else it holds is not looked at. So are the experts of Uni-MoE put together (Li et
    al. 2024, arXiv 2405.11273), and those of Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816).

    Args:
        base: a dense model of any library, from which all but the experts and routers comes.
        ffns: a model or a state dict for each expert.
        top_k, layers, router, generator, inplace: as for `upcycle`.

    Returns:
        The new model and a report.

    Raises:
        LoadMismatch: a source lacks a block, or its shapes are others. Refused, UnknownName: see `upcycle`.

    Example:
        >>> base = nn.ModuleDict({"ffn": nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))})
        >>> mixture, _ = assemble_experts(base, [base.state_dict()] * 3)
        >>> mixture["ffn"].num_experts
        3
    """
    options: dict[str, Any] = {"top_k": top_k, "layers": layers, "router": router}
    return upcycle(base, len(ffns), sources=ffns, generator=generator, inplace=inplace, **options)


def _check(num_experts: int, sources: Sequence[Source] | None, noise: float) -> None:
    check_int("num_experts", num_experts, 1)
    if sources is not None and len(sources) != num_experts:
        raise Refused(
            f"upcycle {len(sources)} sources to {num_experts} experts",
            "expert e takes the blocks of source e, so there must be as many",
            f"mmoe.upcycle(model, num_experts={len(sources)}, sources=sources)",
        )
    check_float("noise", noise, low=0)
    if noise and sources is not None:
        raise BadOverride(f"noise={noise}", "experts of several sources differ already", "noise=0.0")


def _expert_parts(site: Site, num_experts: int, states: Sequence[Mapping[str, Tensor]] | None) -> list[ExpertWeights]:
    """The weights of each expert, E = 1 each."""
    own = site.weights()
    return [own] * num_experts if states is None else [site.weights(state) for state in states]


def _build(
    site: Site,
    parts: list[ExpertWeights],
    router: Router,
    dropout: float | None,
    noise: float,
    generator: torch.Generator | None,
) -> HostedMoE:
    packed = pack(parts)
    if noise:
        for weight in (packed.up, packed.down):
            _add_noise(weight, noise, generator)
    post = nn.Dropout(packed.out_dropout) if packed.out_dropout else None
    block = HostedMoE(router, packed.experts(dropout=dropout), post=post)
    frozen = {name: not p.requires_grad for name, p in site.module.named_parameters()}
    block.experts.requires_grad_(not all(frozen.values()))
    return block.train(site.module.training)


def _add_noise(weight: Tensor, noise: float, generator: torch.Generator | None) -> None:
    if weight.is_meta:
        return
    for expert in weight[1:]:
        drawn = torch.randn(expert.shape, generator=generator, device="cpu").to(weight.device)
        expert += (noise * expert.float().std() * drawn).to(weight.dtype)
