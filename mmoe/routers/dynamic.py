"""Dynamic-capacity routing: a token takes as many experts as its probabilities need, and some of them may be nothing.

    p = softmax(r_dyn),  k = 1 + #{cumulative sums of sorted p below top_p}
    u_j = 1 / sum_{i >= j, near j} exp(v_i - v_j)         v sorted r_dyn; near: v_j - v_i <= 2 eps max(|v_i|, |v_j|)
    G = softmax over the chosen dynamic experts and the shared ones of r
    w_j = (sum of G over dynamic experts) u_j / (sum of u + 1e-6),  w_shared = G_shared
    balance = N sum_e f_e P_e,   f share of rows that chose e,  P mean softmax of r_dyn over the chosen

Experts stand in this order: real ones, null ones (which give 0, `mmoe.experts.null`), shared ones, which every row
takes with a weight of its own. The first two are dynamic, N of them. Choice and u are SparseMixer's (arXiv 2310.00811):
experts are taken one by one, and u is the softmax among those that are left and nearly as good, so nearly always 1. So
the chosen experts get about the same weight each, not their probabilities; a null expert's share is lost.

Source: the released code of DCMoE and UniMoE-Audio (github.com/HITsz-TMG/Uni-MoE). The paper of the latter weighs
experts by their probabilities (equation 3). Where theirs fails we do not: k is at most N (theirs overflows it for top_p
near 1), noise never reaches the experts' input, and a row that lost all experts gets 0 (theirs NaN).
Shapes: T rows, D width, E experts of all kinds, N dynamic ones, S shared ones.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from mmoe.errors import BadOverride
from mmoe.options import check_bool, check_choice, check_float, check_int
from mmoe.registry import routers
from mmoe.routers.capacity import groups_of, places, rank_in_group
from mmoe.routing import Context, LinearRouter, Routing
from mmoe.tally import Tally, tally_of

Drop = Literal["probs", "position"]


def sparse_mixer(scores: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """All experts from the best to the worst, and how clearly each won among those that were left.

    Args:
        scores: (T, N).
        eps: half the relative distance at which two are nearly as good.

    Returns:
        Experts (T, N) and their weights (T, N) in (0, 1], 1 where no other is near.

    Example:
        >>> experts, weights = sparse_mixer(torch.tensor([[0.5, 2.0, 0.5]]), 0.01)
        >>> experts.tolist(), weights.tolist()
        ([[1, 0, 2]], [[1.0, 0.5, 1.0]])
    """
    values, experts = scores.sort(dim=-1, descending=True, stable=True)
    count = scores.shape[1]
    left = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu()  # (j, i)
    best, other = values[:, :, None], values[:, None, :]
    near = (best - other <= 2 * eps * torch.maximum(best.abs(), other.abs())) & left
    gaps = torch.where(near, other - best, -torch.inf)  # (T, j, i)
    return experts, 1 / gaps.exp().sum(-1).clamp(min=1)  # 0 for scores of -inf, of experts that are switched off


def explore(
    scores: Tensor, picks: int, eps: float, noise: Tensor, chance: Tensor, kept: float = 0.75
) -> tuple[Tensor, Tensor]:
    """The training form of `sparse_mixer`: experts are picked with noise, one by one, and weights pass gradients on.

    A weight counts a third where the pick was not the best one and chance did not keep it; its gradient is that of the
    whole weight (SparseMixer's estimate, arXiv 2310.00811, section 3).

    Args:
        scores: (T, N).
        picks: K.
        eps: as for `sparse_mixer`.
        noise: (K, T, N) from a Gumbel distribution.
        chance: (K, T, 1) uniform in [0, 1].
        kept: above which chance keeps a weight whole.

    Returns:
        Experts (T, K) and their weights (T, K).
    """
    taken = torch.zeros_like(scores, dtype=torch.bool)
    experts, weights = [], []
    for number in range(picks):
        left = scores.masked_fill(taken, -torch.inf)
        best, first = left.max(-1, keepdim=True)
        far = (best - scores > 2 * eps * torch.maximum(scores.abs(), best.abs())) | taken
        near = scores.masked_fill(far, -torch.inf)
        pick = (near + noise[number]).argmax(-1, keepdim=True)
        weight = near.softmax(-1).gather(-1, pick)
        whole = (pick == first) | (chance[number] > kept)
        scaled = torch.where(whole, weight, weight * 0.3333)
        weights.append(weight + (scaled - weight).detach())
        experts.append(pick)
        taken = taken.scatter(-1, pick, True)
    return torch.cat(experts, -1), torch.cat(weights, -1)


@routers.register("dynamic")
class DynamicRouter(LinearRouter):
    """Each token takes the experts that hold `top_p` of its probability, and the shared ones.

    Args:
        dim: model width D.
        num_experts: E, of all kinds.
        num_null: how many experts behind the real ones are null.
        num_shared: S, how many at the end are shared.
        top_p: probability that the chosen dynamic experts have to hold; None always takes `top_k`.
        top_k: dynamic experts of a token where `top_p` is None; otherwise `experts_per_token` is all, the upper bound.
        eps: see `sparse_mixer`.
        explore: picks with noise in training; see `explore`.
        jitter: what the gate sees in training is multiplied by numbers from 1 - jitter to 1 + jitter.
        drop: what a dynamic expert beyond its capacity gives up: the rows with the smallest scores ("probs"), or the
            last ones ("position", by which shared experts have a capacity too); None drops nothing.
        capacity_factor: an expert has max(ceil(n capacity_factor / N), min_capacity) places for a group of n rows.
        min_capacity: see `capacity_factor`.
        padding_as_released: lets padding rows have the shared experts, take part in the loss with the same probability
            for all experts, and make capacities larger, as the released code does.

    Example:
        >>> router = DynamicRouter(8, 7, num_null=1, num_shared=2, top_p=None, top_k=2)
        >>> router(torch.randn(3, 8)).n_used().tolist()
        [4, 4, 4]
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        num_null: int = 0,
        num_shared: int = 0,
        top_p: float | None = 0.7,
        top_k: int = 2,
        eps: float = 0.01,
        explore: bool = False,
        jitter: float = 0.0,
        drop: Drop | None = None,
        capacity_factor: float = 1.0,
        min_capacity: int = 8,
        padding_as_released: bool = False,
    ) -> None:
        super().__init__(dim, num_experts)
        check_int("num_shared", num_shared, 0, num_experts - 1)
        self.num_dynamic = num_experts - num_shared
        check_int("num_null", num_null, 0, self.num_dynamic - 1)
        if top_p is not None:
            check_float("top_p", top_p, low=0, usual=0.7)
            if top_p > 1:
                raise BadOverride(f"top_p={top_p}", "it is a share of the probability, 0 to 1", "top_p=0.7")
        check_int("top_k", top_k, 1, self.num_dynamic)
        check_float("eps", eps, low=0, usual=0.01)
        check_float("jitter", jitter, low=0, below=1, usual=0.01)
        check_float("capacity_factor", capacity_factor, above=0)
        check_int("min_capacity", min_capacity, 1)
        check_bool("explore", explore)
        check_bool("padding_as_released", padding_as_released)
        if drop is not None:
            check_choice("drop", drop, get_args(Drop))
            self.causal_safe, self.batch_dependent = False, True  # type: ignore[misc]  # of this instance
        self.num_null, self.num_shared, self.top_p, self.top_k = num_null, num_shared, top_p, top_k
        self.eps, self.explore, self.jitter = eps, explore, jitter
        self.drop, self.capacity_factor, self.min_capacity = drop, capacity_factor, min_capacity
        self.padding_as_released = padding_as_released
        self.experts_per_token = num_experts if top_p is not None else top_k + num_shared
        self.at_most = top_p is not None

    def scores(self, x: Tensor) -> Tensor:
        """Raw scores (T, E) in fp32 of rows (T, D)."""
        if self.jitter and self.training:
            noise = torch.empty_like(x, dtype=torch.float32).uniform_(1 - self.jitter, 1 + self.jitter)
            x = x.float() * noise  # bf16 has only a few numbers near 1, unevenly spread
        return super().scores(x)

    def select(self, logits: Tensor, context: Context | None = None) -> Routing:
        """Chooses dynamic experts, adds the shared ones, and weighs both."""
        count = self.num_dynamic
        dynamic = logits[:, :count]
        valid = None if context is None else context.valid
        experts, raw = self._ranked(dynamic)  # (T, N) from the best to the worst
        taken = torch.arange(count, device=logits.device) < self._how_many(dynamic)[:, None]
        taken = taken & (dynamic.gather(1, experts) > -torch.inf)
        if valid is not None:
            taken = taken & valid[:, None]
        before = torch.zeros_like(taken).scatter(1, experts, taken)  # by expert
        chosen, shared = self._kept(dynamic, before, context)
        taken = chosen.gather(1, experts)
        own = raw * taken
        own = own / (own.sum(-1, keepdim=True) + 1e-6)
        mass = _masked_softmax(logits, torch.cat([chosen, shared], -1))  # G
        weights = torch.cat([own * mass[:, :count].sum(-1, keepdim=True), mass[:, count:]], -1)
        slots = torch.cat([experts, torch.arange(count, self.num_experts, device=logits.device).expand_as(shared)], -1)
        used = torch.cat([taken, shared], -1)
        tally = self._tally(dynamic, before, context)
        return Routing(
            experts=torch.where(used, slots, self.num_experts),
            weights=weights,
            num_experts=self.num_experts,
            logits=logits,
            probs=mass,
            context=context,
            losses={"balance": tally.loss()},
            tally=tally,
        )

    def _ranked(self, dynamic: Tensor) -> tuple[Tensor, Tensor]:
        if not (self.explore and self.training):
            return sparse_mixer(dynamic, self.eps)
        shape = self.num_dynamic, *dynamic.shape
        noise = -torch.empty(shape, device=dynamic.device).exponential_().log()
        chance = torch.rand(*shape[:2], 1, device=dynamic.device)
        return explore(dynamic, self.num_dynamic, self.eps, noise, chance)

    def _how_many(self, dynamic: Tensor) -> Tensor:
        """Dynamic experts that each row takes, (T,)."""
        if self.top_p is None:
            return torch.full((len(dynamic),), self.top_k, device=dynamic.device)
        held = dynamic.detach().softmax(-1).sort(dim=-1, descending=True).values.cumsum(-1)
        return (1 + (held < self.top_p).sum(-1)).clamp(max=self.num_dynamic)

    def _kept(self, dynamic: Tensor, chosen: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        """Dynamic experts (T, N) and shared ones (T, S) that rows keep within the capacity."""
        valid = None if context is None else context.valid
        shared = chosen.new_ones(len(chosen), self.num_shared)
        if valid is not None and not self.padding_as_released:
            shared = shared & valid[:, None]
        if self.drop is None:
            return chosen, shared
        groups, counted = groups_of(context, dynamic), None if self.padding_as_released else valid
        limit = places(groups, counted, self.capacity_factor, self.num_dynamic).clamp(min=self.min_capacity)[:, None]
        if self.drop == "probs":
            return _first(chosen, dynamic.detach(), groups, limit), shared
        early = -torch.arange(len(chosen), device=chosen.device, dtype=torch.float32)[:, None]
        kept = _first(torch.cat([chosen, shared], -1), early, groups, limit)
        return kept[:, : self.num_dynamic], kept[:, self.num_dynamic :]

    def _tally(self, dynamic: Tensor, chosen: Tensor, context: Context | None) -> Tally:
        """What the loss of this router counts: dynamic experts before anything is dropped, rows by their weights."""
        probs = dynamic.masked_fill(~chosen, torch.finfo(dynamic.dtype).min).softmax(-1)
        counts = probs.new_ones(len(probs))
        if context is not None and context.row_weights is not None:
            counts = counts * context.row_weights
        if context is not None and context.valid is not None and not self.padding_as_released:
            counts = counts * context.valid
        return tally_of(counts, chosen, probs)


def _masked_softmax(logits: Tensor, used: Tensor) -> Tensor:
    """Softmax over the used columns of each row, 0 elsewhere and where none is used."""
    used = used & (logits > -torch.inf)
    none = ~used.any(-1, keepdim=True)
    return logits.masked_fill(~used, -torch.inf).masked_fill(none, 0.0).softmax(-1) * used


def _first(used: Tensor, scores: Tensor, groups: Tensor, limit: Tensor) -> Tensor:
    """Of the used rows of each column the `limit` (T, 1) with the largest scores in their group, (T, E) bool."""
    return used & (rank_in_group(torch.where(used, scores, -torch.inf), groups) < limit)
