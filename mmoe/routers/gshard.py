"""GShard's top-2 gating: the best expert, a second one, and places that first choices take before second ones.

    p = softmax(W_g x),  i = argmax p,  j = argmax of the other logits (plus Gumbel noise where it is sampled)
    w_i = p_i / (p_i + p_j),  w_j likewise; of the choices that found a place
    balance = E sum_e mean(p_e) mean(1[i = e])

Without dropped slots the weights are those of the softmax over the two logits. A row that lost one choice gives the
other a weight of 1. Paper: Lepikhin et al. 2020 (arXiv 2006.16668, algorithm 1); the form here is that of DeepSpeed,
which Uni-MoE's 8-expert code runs. There the second choice is sampled at inference too, since nobody turns it off, and
the noise stays in the logits; here it is an option, off, and logits stay as they are.
Shapes: T rows, D width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmoe.errors import BadOverride
from mmoe.options import check_bool, check_float, check_int
from mmoe.registry import routers
from mmoe.routers.capacity import groups_of, places, rank_in_group
from mmoe.routing import Context, LinearRouter, Routing, finish_routing
from mmoe.tally import Tally, tally_of


@routers.register("gshard")
class GShardRouter(LinearRouter):
    """Two experts per token.

    Args:
        dim: model width D.
        num_experts: E, at least 2.
        capacity_factor: an expert has max(ceil(2 n capacity_factor / E), min_capacity) places for a group of n rows,
            which the first rows get; None drops nothing.
        min_capacity: see `capacity_factor`.
        sample_second: draws the second expert in proportion to the probabilities of the others, at inference too.

    Example:
        >>> routing = GShardRouter(8, 4)(torch.randn(3, 8))
        >>> routing.weights.sum(-1).allclose(torch.ones(3))
        True
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        capacity_factor: float | None = None,
        min_capacity: int = 4,
        sample_second: bool = False,
    ) -> None:
        super().__init__(dim, num_experts)
        if num_experts < 2:
            raise BadOverride(f"num_experts={num_experts}", "there is no second choice", "num_experts=2")
        check_int("min_capacity", min_capacity, 1)
        check_bool("sample_second", sample_second)
        self.experts_per_token: float = 2
        if capacity_factor is not None:
            check_float("capacity_factor", capacity_factor, above=0)
            self.experts_per_token = min(2.0, 2 * capacity_factor)
            self.causal_safe, self.batch_dependent = False, True  # type: ignore[misc]  # of this instance
        self.capacity_factor, self.min_capacity, self.sample_second = capacity_factor, min_capacity, sample_second

    def select(self, logits: Tensor, context: Context | None = None) -> Routing:
        """The two choices of each row that found a place."""
        noise = -torch.empty_like(logits).exponential_().log() if self.sample_second else None
        return self.choose(logits, context, noise)

    def choose(self, logits: Tensor, context: Context | None = None, noise: Tensor | None = None) -> Routing:
        """As `select`, with given noise (T, E) on the second choice."""
        probs = logits.softmax(-1)  # (T, E)
        first = probs.argmax(-1, keepdim=True)
        others = (logits if noise is None else logits + noise).scatter(-1, first, -torch.inf)
        experts = torch.cat([first, others.argmax(-1, keepdim=True)], -1)  # (T, 2)
        tally = self._tally(probs, first, context)
        routing = Routing(
            experts=experts,
            weights=_shares(probs.gather(-1, experts)),
            num_experts=self.num_experts,
            logits=logits,
            probs=probs,
            all_used=True,
            losses={"balance": tally.loss()},
            tally=tally,
        )
        routing = finish_routing(routing, context)
        return routing if self.capacity_factor is None else self._dropped(routing, probs)

    def _tally(self, probs: Tensor, first: Tensor, context: Context | None) -> Tally:
        """What the loss of this router counts: first choices, before anything is dropped."""
        rows = probs.new_ones(len(probs)) if context is None or context.valid is None else context.valid.to(probs.dtype)
        chosen = torch.zeros_like(probs).scatter(-1, first, 1.0)
        return tally_of(rows, chosen, probs)

    def _dropped(self, routing: Routing, probs: Tensor) -> Routing:
        """Without the choices that found no place: first ones come before second ones, early rows before late ones."""
        assert self.capacity_factor is not None
        groups = groups_of(routing.context, routing.experts)
        limit = places(groups, routing.valid, 2 * self.capacity_factor, self.num_experts).clamp(min=self.min_capacity)
        used = routing.experts.t().flatten()  # first choices, then second ones
        order = -torch.arange(len(used), device=used.device, dtype=torch.float32)[:, None]
        lines = groups.repeat(2) * (self.num_experts + 1) + used
        kept = (rank_in_group(order, lines) < limit.repeat(2)[:, None]).view(2, -1).t()
        kept = kept & (routing.experts < self.num_experts)
        weights = _shares(probs.gather(-1, routing.experts.clamp(max=self.num_experts - 1)) * kept)
        experts = torch.where(kept, routing.experts, self.num_experts)
        return Routing(
            experts=experts,
            weights=weights,
            num_experts=self.num_experts,
            logits=routing.logits,
            probs=probs,
            context=routing.context,
            undropped=routing,
            losses=routing.losses,
            tally=routing.tally,
        )


def _shares(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
