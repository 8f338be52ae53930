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

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmoe.errors import BadOverride, Refused, UnknownName, did_you_mean
from mmoe.options import check_float, check_int
from mmoe.profile import count_params
from mmoe.registry import build_router, parse_spec
from mmoe.routing import Router
from mmoe.surgery.site import ExpertWeights, HostedMoE, Site, refused_sites, sites

Model = TypeVar("Model", bound=nn.Module)
Source = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class UpcycledSite:
    """What became of one block.

    Attributes:
        num_experts: E.
        source: where the experts come from.
        params_before: parameters of the dense block.
        params_after: parameters of router and experts.
    """

    num_experts: int
    source: str
    params_before: int
    params_after: int


@dataclass(frozen=True, kw_only=True)
class UpcycleReport:
    """What `upcycle` did.

    Attributes:
        sites: the new MoE layers by name.
        refused: chosen blocks that stayed as they were, with the reason.
        params_before: parameters of the dense model.
        params_after: parameters of the new model.
        active_after: parameters of the new model that one token touches.
    """

    sites: dict[str, UpcycledSite]
    refused: dict[str, str]
    params_before: int
    params_after: int
    active_after: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{len(self.sites)} blocks upcycled, {self.params_before:,} -> {self.params_after:,} parameters "
            f"({self.active_after:,} active)"
        ]
        width = max(map(len, [*self.sites, *self.refused]), default=0)
        for name, site in self.sites.items():
            sizes = f"{site.params_before:,} -> {site.params_after:,}"
            lines.append(f"  {name:<{width}}  {site.num_experts} experts, {site.source}, {sizes}")
        lines += [f"  {name:<{width}}  unchanged: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


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
) -> tuple[Model, UpcycleReport]:
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
        1 blocks upcycled, 560 -> 1,432 parameters (872 active)
          1.ffn  4 experts, copies of the model's own, 280 -> 1,152
        >>> x = torch.randn(3, 8)
        >>> torch.allclose(sparse(x), dense(x), atol=1e-6)
        True
    """
    _check(num_experts, sources, noise)
    if dropout is not None:
        check_float("dropout", dropout, low=0, below=1)
    chosen, refused = _choose(model, layers)
    states = None if sources is None else [s.state_dict() if isinstance(s, nn.Module) else s for s in sources]
    spec = {**parse_spec(router), **(router_options or {})}
    blocks: dict[str, HostedMoE] = {}
    done: dict[str, UpcycledSite] = {}
    for site in chosen:
        try:
            parts = _expert_parts(site, num_experts, states)
        except Refused as error:
            refused[site.name] = error.wrong
            continue
        gate = _draw_router(spec, parts, min(2, num_experts) if top_k is None else top_k, generator)
        blocks[site.name] = block = _build(site, parts, gate, dropout, noise, generator)
        done[site.name] = UpcycledSite(
            num_experts=num_experts,
            source="copies of the model's own" if states is None else f"one from each of {num_experts} sources",
            params_before=_numel(site.module),
            params_after=_numel(block),
        )
    if not blocks:
        raise Refused("no block to upcycle", _reasons(refused), "list(mmoe.sites(model))")
    before = _numel(model)
    result = _swap(model, {site.name: site for site in chosen}, blocks, inplace)
    params = count_params(result)
    report = UpcycleReport(
        sites=done, refused=refused, params_before=before, params_after=params.total, active_after=params.active
    )
    return result, report


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


def _reasons(refused: Mapping[str, str]) -> str:
    """One line per reason, with the blocks it holds for."""
    names: dict[str, list[str]] = {}
    for name, reason in refused.items():
        names.setdefault(reason, []).append(name)
    lines = [
        f"{blocks[0]}{f' and {len(blocks) - 1} more' if len(blocks) > 1 else ''}: {reason}"
        for reason, blocks in names.items()
    ]
    return "\n".join(lines) or "the chosen layers have no feed-forward block"


def _choose(model: nn.Module, layers: int | str | Sequence[str] | None) -> tuple[list[Site], dict[str, str]]:
    """The chosen dense sites, and chosen blocks that cannot be upcycled with the reason."""
    found, refused = sites(model), refused_sites(model)
    refused |= {name: "it is a MoE already" for name, site in found.items() if site.kind == "moe"}
    hooked = "it has forward hooks, which a mixture in its place would not run; remove them first"
    refused |= {name: hooked for name, site in found.items() if _has_hooks(site.module)}
    names = [*found, *(name for name in refused if name not in found)]
    if isinstance(layers, int | float):
        check_int("layers", layers, 1)
        names = _last_layers(names, int(layers))
    elif layers is not None:
        patterns = [layers] if isinstance(layers, str) else list(layers)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UnknownName(
                    f"no feed-forward block named {pattern!r}", did_you_mean(pattern, names), "list(mmoe.sites(model))"
                )
        names = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    chosen = [found[name] for name in names if name not in refused]
    return chosen, {name: refused[name] for name in names if name in refused}


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _last_layers(names: Sequence[str], n: int) -> list[str]:
    places = {name: place for name, place in _stacks(names).items() if place is not None}
    depths = {stack: sorted({i for s, i in places.values() if s == stack}) for stack, _ in places.values()}
    return [name for name, (stack, index) in places.items() if index in depths[stack][-n:]]


def _stacks(names: Sequence[str]) -> dict[str, tuple[str, int] | None]:
    """Stack of layers and index in it by block name; None for blocks outside of one.

    A stack is the innermost list on the way to a block that leads to blocks by two or more of its members, so that
    T5's `encoder.block.3.layer.1.ff` is layer 3 of `encoder.block`; failing that, the outermost list.
    """
    lists = {}
    for name in names:
        parts = name.split(".")
        lists[name] = [(".".join(parts[:i]), int(part)) for i, part in enumerate(parts) if part.isdecimal()]
    members: dict[str, set[int]] = {}
    for stack, index in (pair for pairs in lists.values() for pair in pairs):
        members.setdefault(stack, set()).add(index)
    found: dict[str, tuple[str, int] | None] = {}
    for name, pairs in lists.items():
        shared = [pair for pair in pairs if len(members[pair[0]]) > 1]
        found[name] = shared[-1] if shared else (pairs[0] if pairs else None)
    return found


def _expert_parts(site: Site, num_experts: int, states: Sequence[Mapping[str, Tensor]] | None) -> list[ExpertWeights]:
    """The weights of each expert, E = 1 each."""
    own = site.weights()
    return [own] * num_experts if states is None else [site.weights(state) for state in states]


def _draw_router(
    spec: Mapping[str, Any], parts: list[ExpertWeights], top_k: int, generator: torch.Generator | None
) -> Router:
    """A router with random weights, drawn on the CPU so that they do not depend on the device."""
    options = {"dim": parts[0].dim, "num_experts": len(parts), "top_k": top_k}
    with torch.device("cpu"), torch.random.fork_rng(devices=[], enabled=generator is not None):
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        router: Router = build_router(spec, **options)
    weight = parts[0].up
    router.to(weight.device)
    for param in router.parameters():
        param.data = param.data.to(weight.dtype)  # buffers, such as selection biases, keep their precision
    return router


def _build(
    site: Site,
    parts: list[ExpertWeights],
    router: Router,
    dropout: float | None,
    noise: float,
    generator: torch.Generator | None,
) -> HostedMoE:
    first = parts[0]
    stacked = {name: _stack([part.tensors()[name] for part in parts]) for name in first.tensors()}
    if noise:
        for name in ("up", "down"):
            _add_noise(stacked[name], noise, generator)
    up, down = stacked["up"], stacked["down"]
    assert up is not None and down is not None
    packed = ExpertWeights(
        up=up,
        up_bias=stacked["up_bias"],
        down=down,
        down_bias=stacked["down_bias"],
        act=first.act,
        gated=first.gated,
        dropout=first.dropout,
    )
    post = nn.Dropout(first.out_dropout) if first.out_dropout else None
    block = HostedMoE(router, packed.experts(dropout=dropout), post=post)
    frozen = {name: not p.requires_grad for name, p in site.module.named_parameters()}
    block.experts.requires_grad_(not all(frozen.values()))
    return block.train(site.module.training)


def _stack(tensors: list[Tensor | None]) -> Tensor | None:
    first = tensors[0]
    if first is None:
        return None
    return torch.cat([t.to(first.device, first.dtype) for t in tensors if t is not None])


def _add_noise(weight: Tensor | None, noise: float, generator: torch.Generator | None) -> None:
    if weight is None or weight.is_meta:
        return
    for expert in weight[1:]:
        drawn = torch.randn(expert.shape, generator=generator, device="cpu").to(weight.device)
        expert += (noise * expert.float().std() * drawn).to(weight.dtype)


def _swap(model: Model, chosen: Mapping[str, Site], blocks: Mapping[str, HostedMoE], inplace: bool) -> Model:
    """Puts the blocks into the model, or into a copy for which the dense blocks are never copied."""
    if inplace:
        for name, block in blocks.items():
            chosen[name].replace(block)
        return model
    return copy.deepcopy(model, {id(chosen[name].module): block for name, block in blocks.items()})


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
