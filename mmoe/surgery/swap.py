"""What conversions of dense feed-forward blocks to mixtures share: which blocks, their new routers, the swap, a report.

Shapes: E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmoe.errors import BadInput, BadOverride, Refused, UnknownName, did_you_mean
from mmoe.options import check_int
from mmoe.profile import count_params
from mmoe.registry import build_router
from mmoe.routing import Router
from mmoe.surgery.site import ExpertWeights, HostedMoE, Site, refused_sites, sites

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class SwappedSite:
    """What became of one block.

    Attributes:
        num_experts: E.
        source: where the experts come from.
        params_before: parameters of the dense block.
        params_after: parameters of the mixture.
    """

    num_experts: int
    source: str
    params_before: int
    params_after: int


@dataclass(frozen=True, kw_only=True)
class SwapReport:
    """What a conversion of dense blocks to mixtures did.

    Attributes:
        verb: what became of the blocks, "upcycled".
        sites: the new MoE layers by name.
        refused: chosen blocks that stayed as they were, with the reason.
        params_before: parameters of the dense model.
        params_after: parameters of the new model.
        active_after: parameters of the new model that one token touches.
    """

    verb: str
    sites: dict[str, SwappedSite]
    refused: dict[str, str]
    params_before: int
    params_after: int
    active_after: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        count = f"{len(self.sites)} block{'s' if len(self.sites) != 1 else ''}"
        lines = [
            f"{count} {self.verb}, {self.params_before:,} -> {self.params_after:,} parameters "
            f"({self.active_after:,} active)"
        ]
        width = max(map(len, [*self.sites, *self.refused]), default=0)
        for name, site in self.sites.items():
            sizes = f"{site.params_before:,} -> {site.params_after:,}"
            lines.append(f"  {name:<{width}}  {site.num_experts} experts, {site.source}, {sizes}")
        lines += [f"  {name:<{width}}  unchanged: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def swap(
    model: Model,
    layers: int | str | Sequence[str] | None,
    make: Callable[[Site], HostedMoE],
    *,
    verb: str,
    source: str,
    inplace: bool,
) -> tuple[Model, SwapReport]:
    """Puts a mixture in the place of each chosen dense block.

    Args:
        model: host of any library.
        layers: see `choose`.
        make: the mixture of a block; blocks for which it raises `Refused` stay as they are.
        verb: for the report and for messages, "upcycled".
        source: where the experts come from, for the report.
        inplace: changes `model` instead of a copy.

    Raises:
        Refused: no chosen block can be made a mixture.
    """
    chosen, refused = choose(model, layers)
    before = _numel(model)
    blocks: dict[str, HostedMoE] = {}
    done: dict[str, SwappedSite] = {}
    for site in chosen:
        try:
            blocks[site.name] = block = make(site)
        except Refused as error:
            refused[site.name] = error.wrong
            continue
        done[site.name] = SwappedSite(
            num_experts=block.num_experts,
            source=source,
            params_before=_numel(site.module),
            params_after=_numel(block),
        )
    if not blocks:
        raise Refused(f"no block can be {verb}", _reasons(refused), "list(mmoe.sites(model))")
    result = _replaced(model, {site.name: site for site in chosen}, blocks, inplace)
    params = count_params(result)
    report = SwapReport(
        verb=verb,
        sites=done,
        refused=refused,
        params_before=before,
        params_after=params.total,
        active_after=params.active,
    )
    return result, report


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


def choose(model: nn.Module, layers: int | str | Sequence[str] | None) -> tuple[list[Site], dict[str, str]]:
    """The chosen dense sites, and chosen blocks that cannot be made mixtures with the reason.

    Args:
        model: host.
        layers: None for all blocks, an int n for those of the last n layers of each stack, or patterns on their names.

    Raises:
        BadInput: it is no model. BadOverride: an int below 1, or no patterns. UnknownName: a pattern names no block.
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"find the feed-forward blocks of a {type(model).__name__}", "it is no model", "a torch module")
    found, refused = sites(model), refused_sites(model)
    refused |= {name: "it is a MoE already" for name, site in found.items() if site.kind == "moe"}
    hooked = "it has forward hooks, which a mixture in its place would not run; remove them first"
    refused |= {name: hooked for name, site in found.items() if _has_hooks(site.module)}
    names = [*found, *(name for name in refused if name not in found)]
    if isinstance(layers, int | float):
        check_int("layers", layers, 1)
        names = _last_layers(names, int(layers))
    elif layers is not None:
        patterns = [layers] if isinstance(layers, str) else layers
        if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
            wrong = "layers are a number of last layers, or patterns on the names of blocks"
            raise BadOverride(f"layers={layers!r}", wrong, 'layers=2, or layers="visual.*"')
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


def draw_router(
    spec: Mapping[str, Any], parts: Sequence[ExpertWeights], top_k: int, generator: torch.Generator | None
) -> Router:
    """A router with random weights, drawn on the CPU so that they do not depend on the device.

    Args:
        spec: of a registered router.
        parts: weights of each expert, whose device and dtype it gets.
        top_k: for routers that take it.
        generator: CPU generator; the global seed when None.

    Raises:
        BadOverride: the generator is none.
    """
    if generator is not None and not (isinstance(generator, torch.Generator) and generator.device.type == "cpu"):
        asked, wrong = f"generator={generator!r}", "routers are drawn by a generator of the CPU"
        raise BadOverride(asked, wrong, "generator=torch.Generator().manual_seed(0)")
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


def pack(parts: Sequence[ExpertWeights]) -> ExpertWeights:
    """The weights of several experts, E = 1 each, as one, on the first one's device; the tensors are copies."""
    columns = zip(*([part.up, part.up_bias, part.down, part.down_bias] for part in parts), strict=True)
    up, up_bias, down, down_bias = (_stacked(tensors) for tensors in columns)
    assert up is not None and down is not None
    return replace(parts[0], up=up, up_bias=up_bias, down=down, down_bias=down_bias)


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    first = tensors[0]
    if first is None:
        return None
    return torch.cat([t.to(first.device, first.dtype) for t in tensors if t is not None])


def _replaced(model: Model, chosen: Mapping[str, Site], blocks: Mapping[str, HostedMoE], inplace: bool) -> Model:
    """Puts the blocks into the model, or into a copy for which the dense blocks are never copied."""
    if inplace:
        for name, block in blocks.items():
            chosen[name].replace(block)
        return model
    return copy.deepcopy(model, {id(chosen[name].module): block for name, block in blocks.items()})


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
