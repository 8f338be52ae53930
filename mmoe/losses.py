"""Router losses as plain functions of recorded routings; all return unweighted scalars.

    balance:  E * sum_e f_e P_e,   f_e share of rows (or slots) sent to e,  P_e mean probability of e
    z:        mean logsumexp(logits)^2
    entropy:  mean entropy of the router's probabilities
    importance:  squared coefficient of variation of the summed combine weights

Papers: Switch (arXiv 2101.03961, eq. 4 to 6), GShard (2006.16668), Mixtral's released loss, ST-MoE (2202.08906, eq. 5),
Shazeer et al. 2017 (1701.06538, eq. 6 to 7). Shapes: T rows, E experts, K slots. Padding rows count nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mmoe.errors import BadInput
from mmoe.routing import Routing, first_choice, over_processes
from mmoe.tally import Tally, add_tallies

Routings = Routing | Iterable[Routing]


def _as_list(routings: Routings) -> list[Routing]:
    found = [routings] if isinstance(routings, Routing) else list(routings)
    if not found:
        raise BadInput(
            "a router loss of no routing",
            "the model recorded no MoE layer",
            "with mmoe.trace(model) as routing",
        )
    return found


def _mean(values: Tensor) -> Tensor:
    """Mean that is 0, not NaN, where no row counts."""
    return values.sum() / max(values.numel(), 1)


def _hits(routing: Routing, choices: Literal["all", "first"]) -> tuple[Tensor, Tensor]:
    """How often each expert was chosen, or had the largest weight (E,), and the number of rows that count."""
    routing = routing.undropped or routing
    counted = routing if choices == "all" else replace(routing, experts=first_choice(routing)[:, None])
    rows = len(routing.experts) if routing.valid is None else routing.valid.sum()
    return counted.counts().float(), torch.as_tensor(rows, device=counted.experts.device)


def balance_loss(
    routings: Routings,
    *,
    choices: Literal["all", "first"] = "all",
    pool: bool = False,
    per_slot: bool = False,
    all_processes: bool = False,
) -> Tensor:
    """Load-balancing loss.

    A router that counts in its own way has the last word: of a routing with a `tally` (such as that of "dynamic", which
    counts its dynamic experts before any is dropped, and weighs rows by `Context.row_weights`) that is taken, whatever
    `choices` says; of one that has only a scalar `losses["balance"]`, that scalar, of this process alone.

    Args:
        routings: one routing or those of several layers.
        choices: counts "all" K slots (Mixtral, DeepSeek) or the "first" only, the one with the largest weight
            (Switch, GShard).
        pool: True takes the means over the rows of all layers together, so that one layer can make up for another
            (Mixtral, CLIP-MoE); False averages the losses of the layers.
        per_slot: divides by the mean number of slots per row, so that balance gives 1 (DeepSeek) instead of K.
        all_processes: f_e counts the rows of all processes; the mean of their losses is then that of one process with
            all rows, and so is the mean of their gradients.

    Returns:
        Scalar; with uniform probabilities and balanced load it is K for all slots, 1 for the first or `per_slot`.

    Raises:
        BadInput: layers that cannot be pooled.

    Example:
        >>> uniform = Routing(
        ...     experts=torch.tensor([[0, 1], [2, 3]]),
        ...     weights=torch.ones(2, 2),
        ...     num_experts=4,
        ...     probs=torch.full((2, 4), 0.25),
        ... )
        >>> balance_loss(uniform).item()
        2.0
    """
    layers = _as_list(routings)
    own = [one.losses["balance"] for one in layers if one.tally is None and "balance" in one.losses]
    counted = [_tally(one, choices) for one in layers if one.tally is not None or "balance" not in one.losses]
    if all_processes:
        counted = [replace(one, hits=over_processes(one.hits), rows=over_processes(one.rows)) for one in counted]
    if pool:
        counted = [_pooled(counted, scalars=len(own))]
    each = _processes() if all_processes else 1
    return torch.stack([*own, *(each * _balance(one, per_slot) for one in counted)]).mean()


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _tally(routing: Routing, choices: Literal["all", "first"]) -> Tally:
    """The router's own, or what `_hits` counts."""
    if routing.tally is not None:
        return routing.tally
    hits, rows = _hits(routing, choices)
    return Tally(hits=hits, rows=rows, probs=routing.used_probs().sum(0))


def _pooled(tallies: list[Tally], scalars: int) -> Tally:
    fix = "balance_loss(routings, pool=False)"
    if scalars:
        asked = "a pooled balance loss of a router with a scalar of its own"
        raise BadInput(asked, "only what routings count can be pooled, and this one has no tally", fix)
    widths = sorted({len(one.hits) for one in tallies})
    if len(widths) > 1:
        raise BadInput(
            f"a pooled balance loss over layers with {' and '.join(map(str, widths))} experts",
            "only layers with the same number of experts can be pooled",
            fix,
        )
    return add_tallies(tallies)


def _balance(tally: Tally, per_slot: bool) -> Tensor:
    if not per_slot:
        return tally.loss()
    tiny = torch.finfo(torch.float32).tiny
    slots = tally.hits.sum() / tally.rows.float().clamp(min=tiny)  # of a row
    return tally.loss() / torch.where(slots > 0, slots, 1.0)


def z_loss(routings: Routings, *, all_processes: bool = False) -> Tensor:
    """Router z-loss: mean over rows of logsumexp(logits)^2, averaged over layers; keeps logits small.

    Args:
        routings: one routing or those of several layers.
        all_processes: the mean of the losses of all processes is that of one process with all rows.

    Example:
        >>> routing = Routing(
        ...     experts=torch.tensor([[0]]),
        ...     weights=torch.ones(1, 1),
        ...     num_experts=1,
        ...     logits=torch.tensor([[2.0]]),
        ... )
        >>> z_loss(routing).item()
        4.0
    """
    losses = []
    for routing in _as_list(routings):
        if routing.logits is None:
            raise BadInput("a z-loss of a router without logits", "it has no scores to keep small", "use a topk router")
        logits = routing.logits if routing.valid is None else routing.logits[routing.valid]
        squares = logits.logsumexp(-1).square()
        if all_processes:
            rows = over_processes(torch.tensor(len(squares), device=squares.device)).clamp(min=1)
            losses.append(_processes() * squares.sum() / rows)
        else:
            losses.append(_mean(squares))
    return torch.stack(losses).mean()


def entropy_loss(routings: Routings) -> Tensor:
    """Mean entropy of the routers' probabilities in nats, averaged over layers; low entropy means sharp routing."""
    return torch.stack([_mean(routing.entropy()) for routing in _as_list(routings)]).mean()


def importance_loss(routings: Routings) -> Tensor:
    """Squared coefficient of variation of the summed combine weights per expert, averaged over layers."""
    losses = []
    for routing in _as_list(routings):
        importance = (routing.undropped or routing).dense_weights().sum(0)  # (E,)
        losses.append(importance.var(correction=0) / importance.mean().square().clamp(min=1e-10))
    return torch.stack(losses).mean()
