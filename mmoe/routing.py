"""What a router is told (`Context`), what it decides (`Routing`), and what a router is (`Router`).

Shapes: B batch, N tokens per sample, T = B*N rows, D model width, E routed experts, K slots per token.

A slot that is not used holds the sentinel E: it sorts behind every expert, so counting and sorting need no mask.
Names are contracts: `logits` are raw scores before any softmax, `probs` are what weights are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmoe.errors import BadInput
from mmoe.options import check_bool, check_int
from mmoe.tally import Tally, add_tallies


@dataclass(kw_only=True)
class Context:
    """Side input of a router; every field is optional, and (T, ...) or shaped like x: (B, N, ...) where x is (B, N, D).

    Attributes:
        group_ids: (T,) sample of each row; routers that choose inside a sample use it.
        valid: (T,) bool, False for padding; padding is never routed and counts in no loss.
        modality: (T,) integer ids of text, image, audio, ...; kept on the routing for analysis.
        cond: (T,) bool flag of conditional rows.
        expert_ids: (T,) or (T, K) given routes; E marks an unused slot.
        task_ids: (T,) task of each row.
        features: (T, C) what the router looks at when that is not x.
        row_weights: (T,) how much each row counts in the balance loss of routers that weigh rows.
    """

    group_ids: Tensor | None = None
    valid: Tensor | None = None
    modality: Tensor | None = None
    cond: Tensor | None = None
    expert_ids: Tensor | None = None
    task_ids: Tensor | None = None
    features: Tensor | None = None
    row_weights: Tensor | None = None

    def over(self, other: Context | None) -> Context:
        """This context, with the fields of another one where this one has none."""
        if other is None:
            return self
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(other, **{name: value for name, value in given.items() if value is not None})

    def flatten(self, shape: torch.Size) -> Context:
        """Brings every field to rows (T, ...) for x of shape (*shape, D).

        A field may have the leading dimensions `shape` or others in the same order, such as (T,) or (B, H * W) for
        (B, H, W).

        Raises:
            BadInput: a field does not fit, for example (B, N) where x is (N, B, D).
        """
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        rows = {name: _flat(name, value, shape) for name, value in given.items() if value is not None}
        if "valid" in rows:
            rows["valid"] = _truth(rows["valid"])
        return Context(**rows)


def _truth(mask: Tensor) -> Tensor:
    """A mask of truth values; attention masks often come as 0 and 1.

    Raises:
        BadInput: it holds other numbers, as masks that are added to scores do.
    """
    if mask.is_floating_point() and not torch.compiler.is_compiling() and not ((mask == 0) | (mask == 1)).all():
        wrong = "True marks what counts; a mask that is added to scores says the opposite"
        raise BadInput("context field 'valid' of other numbers than 0 and 1", wrong, "Context(valid=mask == 0)")
    return mask.bool()


_INNER_DIMS = {"features": (1,), "expert_ids": (1, 0)}


def _flat(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    rows = shape.numel()
    for inner in _INNER_DIMS.get(name, (0,)):
        lead = value.shape[: max(value.ndim - inner, 0)]
        if lead.numel() == rows and (len(lead) != len(shape) or lead == shape):
            return value.reshape(rows, *value.shape[len(lead) :])
    raise BadInput(
        f"context field '{name}' of shape {tuple(value.shape)} for rows of shape {tuple(shape)}",
        "its leading dimensions must be those of x, or flat",
        f"Context({name}=...) with leading shape {tuple(shape)}",
    )


@dataclass(kw_only=True)
class Routing:
    """What one router decided in one forward pass.

    Attributes:
        experts: (T, K) int64 expert of each slot; E marks an unused slot.
        weights: (T, K) combine weights, 0 in unused slots, differentiable.
        num_experts: E.
        logits: (T, E) raw scores in fp32 before any softmax, or None.
        probs: (T, E) scores in [0, 1] that the weights are made of, in fp32, or None.
        context: the side input that the router saw, with flat fields, or None.
        all_used: True promises that no slot holds the sentinel, which spares dispatch a device sync.
        undropped: the decision before slots beyond a capacity were dropped, which is what losses and balancing count;
            None where nothing can be dropped.
        losses: unweighted scalar losses of this router.
        tally: what its balance loss counts where that is not what `experts` and `probs` say, or None.
        state: what the router hands to the next layer, or None.
    """

    experts: Tensor
    weights: Tensor
    num_experts: int
    logits: Tensor | None = None
    probs: Tensor | None = None
    context: Context | None = None
    all_used: bool = False
    undropped: Routing | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    tally: Tally | None = None
    state: Any = None

    @property
    def valid(self) -> Tensor | None:
        """(T,) bool, False for padding; None when every row counts."""
        return None if self.context is None else self.context.valid

    def counts(self) -> Tensor:
        """Slots that each expert got, (E,) int64."""
        ids = self.experts.flatten()
        if not torch.compiler.is_compiling() and not ids.is_meta:  # they cannot know the length of the result
            return torch.bincount(ids, minlength=self.num_experts + 1)[: self.num_experts]
        counts = ids.new_zeros(self.num_experts + 1).index_add_(0, ids, torch.ones_like(ids))
        return counts[: self.num_experts]

    def load(self) -> Tensor:
        """Share of the used slots that each expert got, (E,) summing to 1 (all 0 without used slots)."""
        counts = self.counts()
        return counts / counts.sum().clamp(min=1)

    def use(self) -> Tensor:
        """How much each expert is used, (E,) summing to 1: its load, or where every row uses all, its share of the
        combine weights.

        >>> ids, weights = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
        >>> Routing(experts=ids, weights=weights, num_experts=2).use().tolist()
        [0.625, 0.375]
        """
        used = self.n_used()
        if not bool((used[used > 0] == self.num_experts).all()):
            return self.load()
        weights = self.dense_weights().sum(0)
        return weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)

    def n_used(self) -> Tensor:
        """Experts used per row, (T,) int64."""
        return (self.experts < self.num_experts).sum(-1)

    def used_probs(self) -> Tensor:
        """Probabilities of the rows that count, (T_valid, E), each row summing to 1.

        They are made of `probs` (sigmoid scores are not normalised; DeepSeek-V3, arXiv 2412.19437, eq. 19), or of the
        combine weights where a router has no scores.
        """
        probs = self.probs if self.probs is not None else self.dense_weights()
        probs = probs if self.valid is None else probs[self.valid]
        return probs / probs.sum(-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)

    def dense_weights(self) -> Tensor:
        """Combine weight of every expert for every row, (T, E) fp32."""
        table = self.weights.new_zeros(len(self.weights), self.num_experts + 1, dtype=torch.float32)
        table = table.scatter_add(1, self.experts, self.weights.float())  # (T, E + 1)
        return table[:, : self.num_experts]

    def importance(self) -> Tensor:
        """Mean probability of each expert over the rows that count, (E,)."""
        probs = self.used_probs()
        return probs.sum(0) / max(len(probs), 1)

    def entropy(self) -> Tensor:
        """Entropy of each counted row's probabilities in nats, (T_valid,)."""
        probs = self.used_probs()
        log_probs = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()  # entr() has an infinite gradient at 0
        return -(probs * log_probs).sum(-1)

    def detach(self) -> Routing:
        """The same routing without its graph."""
        return replace(self, **{f.name: _detached(getattr(self, f.name)) for f in fields(self)})


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Context | Routing | Tally):
        return replace(value, **{f.name: _detached(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return type(value)(map(_detached, value)) if type(value) in (list, tuple) else value


def concatenate(routings: Sequence[Routing]) -> Routing:
    """The rows of several routings of one router as one; of their contexts, what counts as valid is kept.

    >>> ids, weights = torch.tensor([[0], [1]]), torch.ones(2, 1)
    >>> one = Routing(experts=ids, weights=weights, num_experts=2)
    >>> concatenate([one, one]).counts().tolist()
    [2, 2]
    """
    first = routings[0]
    if len(routings) == 1:
        return first

    def rows(name: str) -> Any:
        found = [getattr(routing, name) for routing in routings]
        return None if any(value is None for value in found) else torch.cat(found)

    valid = None
    if any(routing.valid is not None for routing in routings):
        masks = [routing.valid for routing in routings]
        all_rows = [len(routing.experts) for routing in routings]
        full = [first.experts.new_ones(count, dtype=torch.bool) for count in all_rows]
        valid = torch.cat([whole if mask is None else mask for mask, whole in zip(masks, full, strict=True)])
    before, tallies = [routing.undropped for routing in routings], [routing.tally for routing in routings]
    return Routing(
        **{name: rows(name) for name in ("experts", "weights", "logits", "probs")},
        num_experts=first.num_experts,
        context=None if valid is None else Context(valid=valid),
        all_used=all(routing.all_used for routing in routings),
        undropped=None if None in before else concatenate([one for one in before if one is not None]),
        tally=None if None in tallies else add_tallies([one for one in tallies if one is not None]),
    )


def first_choice(routing: Routing) -> Tensor:
    """Expert with the largest weight of every row, (T,); E where none is used.

    Example:
        >>> ids, weights = torch.tensor([[2, 0], [3, 3]]), torch.tensor([[0.3, 0.7], [0.0, 0.0]])
        >>> first_choice(Routing(experts=ids, weights=weights, num_experts=3)).tolist()
        [0, 3]
    """
    used = routing.weights.masked_fill(routing.experts >= routing.num_experts, -torch.inf)
    return routing.experts.gather(1, used.argmax(1, keepdim=True)).squeeze(1)


class Router(nn.Module):
    """Decides which experts see a row and with which weight. Subclasses state what they are.

    A router with scores implements `scores` (x to raw logits) and `select` (logits to a `Routing`), so that tools can
    change the scores in between (switch experts off, steer). A router without scores overrides `forward`.

    Attributes:
        trainable: it has parameters that receive a gradient from the combine weights.
        causal_safe: the route of a row does not depend on rows behind it in the sequence.
        batch_dependent: the route of a row depends on other rows.
        num_experts: E.
        experts_per_token: experts that a row uses on average, or at most; makes the active parameter count.
        at_most: rows use as many experts as they need, up to `experts_per_token`.
        num_shared: experts at the end that every row uses.
    """

    trainable: ClassVar[bool] = True
    causal_safe: ClassVar[bool] = True
    batch_dependent: ClassVar[bool] = False
    num_experts: int
    experts_per_token: float
    at_most: bool = False
    num_shared: int = 0

    def scores(self, x: Tensor) -> Tensor:
        """Raw scores in fp32: x (T, D) -> logits (T, E)."""
        raise NotImplementedError(f"{type(self).__name__} computes no scores")

    def select(self, logits: Tensor, context: Context | None = None) -> Routing:
        """Chooses experts and weights from raw scores (T, E)."""
        raise NotImplementedError(f"{type(self).__name__} selects without scores")

    def forward(self, x: Tensor, context: Context | None = None, state: Any = None) -> Routing:
        """Routes rows.

        Args:
            x: (T, D) rows.
            context: side input with flat fields, or None.
            state: what the router of the layer before handed on, or None.
        """
        features = x if context is None or context.features is None else context.features
        return self.select(self.scores(features), context)

    def update(self, routing: Routing) -> None:
        """Optional step outside autograd after an optimiser step (for example bias balancing); nothing by default."""


class LinearRouter(Router):
    """A router with one linear gate, logits r = W_g x + b.

    The gate works in the precision of its own weight, outside autocast.

    Args:
        dim: model width D.
        num_experts: E.
        gate_bias: gives the gate an additive bias.

    Attributes:
        weight: (E, D).
        bias: (E,) or None.
    """

    bias: nn.Parameter | None

    def __init__(self, dim: int, num_experts: int, gate_bias: bool = False) -> None:
        super().__init__()
        check_int("num_experts", num_experts, 1)
        check_bool("gate_bias", gate_bias)
        self.num_experts = num_experts
        gate = nn.Linear(dim, num_experts, bias=gate_bias)
        self.weight = gate.weight
        self.register_parameter("bias", gate.bias)

    def scores(self, x: Tensor) -> Tensor:
        """Raw scores: x (T, D) -> logits (T, E) in fp32."""
        if in_autocast(x):
            with torch.autocast(x.device.type, enabled=False):
                return self.scores(x)
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias).float()


def in_autocast(x: Tensor) -> bool:
    """True where autocast changes the types of products with `x`; the meta device has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def over_processes(counts: Tensor) -> Tensor:
    """Sum of a count over all processes, where there are several."""
    if not (dist.is_available() and dist.is_initialized()):
        return counts
    total = counts.clone()
    dist.all_reduce(total)
    return total


def finish_routing(routing: Routing, context: Context | None) -> Routing:
    """Notes the context on a routing and takes its padding rows out (sentinel, weight 0)."""
    if context is None:
        return routing
    if context.valid is None:
        return replace(routing, context=context)
    padding = ~context.valid[:, None]
    return replace(
        routing,
        experts=routing.experts.masked_fill(padding, routing.num_experts),
        weights=routing.weights.masked_fill(padding, 0.0),
        context=context,
        all_used=False,
    )
