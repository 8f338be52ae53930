"""Records the `Routing` of every MoE layer while a block of code runs; outside it nothing is stored.

A layer hands its routing to the open recorders itself. Forward hooks would not do: torch.compile does not run hooks
added later, and recomputation under gradient checkpointing would run them twice.
Shapes: L layers, E experts, T rows, K slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, overload

import torch
from torch import Tensor, nn

from mmoe.errors import UnknownName, did_you_mean
from mmoe.moe import MoE, moe_layers
from mmoe.routing import Routing, concatenate


class Trace(Sequence[Routing]):
    """Recorded routings in the order in which the layers ran.

    `trace[i]` is the i-th routing, `trace["name"]` the only one of a layer, `trace.select("visual.*")` the routings of
    some layers. A layer that ran several times is recorded several times; statistics put its runs together.

    Attributes:
        names: layer name of each recorded routing.
    """

    def __init__(self, names: list[str] | None = None, routings: list[Routing] | None = None) -> None:
        self.names = names if names is not None else []
        self._routings = routings if routings is not None else []

    def __len__(self) -> int:
        return len(self._routings)

    @overload
    def __getitem__(self, key: int | str) -> Routing: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[Routing]: ...
    def __getitem__(self, key: int | str | slice) -> Routing | Sequence[Routing]:
        if not isinstance(key, str):
            return self._routings[key]
        found = self.select(key)
        if len(found) != 1:
            raise UnknownName(
                f"routing of layer {key!r}",
                did_you_mean(key, self.layers) if not found else f"the layer ran {len(found)} times",
                "routing.layers" if not found else f"routing.select({key!r})",
            )
        return found[0]

    @property
    def layers(self) -> list[str]:
        """Names of the recorded layers, each once."""
        return list(dict.fromkeys(self.names))

    def select(self, pattern: str) -> Trace:
        """The routings of the layers whose name matches a pattern such as "visual.*"."""
        kept = [i for i, name in enumerate(self.names) if fnmatchcase(name, pattern)]
        return Trace([self.names[i] for i in kept], [self._routings[i] for i in kept])

    def detach(self) -> Trace:
        """The same routings without their graphs."""
        return Trace(list(self.names), [routing.detach() for routing in self._routings])

    def extend(self, other: Trace) -> None:
        """Appends the routings of another trace."""
        for name, routing in zip(other.names, other, strict=True):
            self.add(name, routing)

    def joined(self) -> Trace:
        """One routing for each layer, with the rows of all its runs."""
        found = Trace()
        for name in self.layers:
            found.add(name, concatenate(list(self.select(name))))
        return found

    def counts(self) -> Tensor:
        """Slots per layer and expert, (L, E) int64; layers with fewer experts are filled with 0."""
        width = max((routing.num_experts for routing in self), default=0)
        table = torch.zeros(len(self.layers), width, dtype=torch.int64)
        row = {name: i for i, name in enumerate(self.layers)}
        for name, routing in zip(self.names, self, strict=True):
            table[row[name], : routing.num_experts] += routing.counts().cpu()
        return table

    def load(self) -> Tensor:
        """Share of each layer's used slots by expert, (L, E); rows sum to 1."""
        counts = self.counts()
        return counts / counts.sum(-1, keepdim=True).clamp(min=1)

    def use(self) -> Tensor:
        """How much each layer uses its experts (`Routing.use`), (L, E); layers with fewer experts are filled with 0."""
        width = max((routing.num_experts for routing in self), default=0)
        table = torch.zeros(len(self.layers), width)
        row = {name: i for i, name in enumerate(self.layers)}
        for name, routing in zip(self.names, self, strict=True):
            slots = routing.counts().sum().cpu()
            table[row[name], : routing.num_experts] += slots * routing.use().detach().float().cpu()
        return table / table.sum(-1, keepdim=True).clamp(min=torch.finfo(table.dtype).tiny)

    def entropy(self) -> Tensor:
        """Mean entropy of the router's probabilities per layer in nats, (L,); 0 where no row counts."""
        values: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        for name, routing in zip(self.names, self, strict=True):
            values[name].append(routing.entropy().detach().cpu())
        rows = [torch.cat(found) for found in values.values()]
        return torch.stack([row.sum() / max(len(row), 1) for row in rows]) if rows else torch.zeros(0)

    def summary(self) -> list[dict[str, Any]]:
        """Per layer: name, experts, slots per row, load, use, max/mean load, dead experts, entropy, as plain data."""
        rows = []
        entropy, use = self.entropy().tolist(), self.use().tolist()
        for i, name in enumerate(self.layers):
            runs = list(self.select(name))
            num_experts = runs[0].num_experts
            load = torch.stack([run.counts() for run in runs]).sum(0).float()
            load = load / load.sum().clamp(min=1)
            used = torch.cat([run.n_used() if run.valid is None else run.n_used()[run.valid] for run in runs])
            rows.append(
                {
                    "layer": name,
                    "num_experts": num_experts,
                    "experts_per_token": round(used.sum().item() / max(len(used), 1), 3),
                    "load": [round(share, 4) for share in load.tolist()],
                    "use": [round(share, 4) for share in use[i][:num_experts]],
                    "max_over_mean": round(load.max().item() * num_experts, 3),
                    "dead": (load == 0).nonzero().flatten().tolist(),
                    "entropy": round(entropy[i], 4),
                }
            )
        return rows

    def add(self, name: str, routing: Routing) -> None:
        """Appends one routing."""
        self.names.append(name)
        self._routings.append(routing)


class _Tap:
    """Hands one layer's routings to a trace under the layer's name."""

    def __init__(self, name: str, trace: Trace) -> None:
        self.name, self.trace = name, trace

    def add(self, layer: MoE, routing: Routing) -> None:
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # gradient checkpointing recomputes the forward during backward: it was recorded already
        self.trace.add(self.name, routing)


def update_routers(model: nn.Module, routing: Trace) -> None:
    """Lets every router take its step outside autograd (`Router.update`); call it after the optimiser's step.

    Args:
        model: the traced model.
        routing: of the training step; a layer that ran several times takes a step for each run.

    Example:
        >>> from mmoe import FFNExperts, TopKRouter
        >>> moe = MoE(TopKRouter(8, 4, top_k=1, bias_rate=0.1), FFNExperts(8, 16, 4))
        >>> with trace(moe) as routing:
        ...     y = moe(torch.ones(6, 8))
        >>> update_routers(moe, routing)
        >>> sorted(round(bias, 1) for bias in moe.router.select_bias.tolist())
        [-0.1, 0.1, 0.1, 0.1]
    """
    layers = moe_layers(model)
    for name, taken in zip(routing.names, routing, strict=True):
        _inside(layers[name].router).update(taken)


def _inside(router: Any) -> Any:
    """A router, where peft's adapters stand around it or peft keeps it beside a copy that is trained whole."""
    if hasattr(router, "modules_to_save"):
        return router.modules_to_save[router.active_adapter]
    return router.get_base_layer() if hasattr(router, "get_base_layer") else router


@contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Records the routing of every MoE layer of `model` that runs inside the block.

    The recorded tensors are part of the graph, so losses can be made of them. Traces may be nested.

    Example:
        >>> from mmoe import FFNExperts, TopKRouter
        >>> moe = MoE(TopKRouter(8, 4, top_k=1), FFNExperts(8, 16, 4))
        >>> with trace(moe) as routing:
        ...     y = moe(torch.randn(6, 8))
        >>> len(routing), int(routing[0].counts().sum())
        (1, 6)
    """
    recorded = Trace()
    layers = moe_layers(model)
    taps = {name: _Tap(name, recorded) for name in layers}
    for name, layer in layers.items():
        layer._recorders = (*layer._recorders, taps[name])
    try:
        yield recorded
    finally:
        for name, layer in layers.items():
            layer._recorders = tuple(tap for tap in layer._recorders if tap is not taps[name])
