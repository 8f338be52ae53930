"""Token-choice top-k routing with its published selection and weight policies.

    logits r = W_g x,  selection: top-k of score(r) + bias + noise,  weights: from score(r) of the chosen experts

Papers: Shazeer et al. 2017 (arXiv 1701.06538), Mixtral (2401.04088), DeepSeek-V3 (2412.19437, sigmoid scores and
bias balancing). Papers differ in how weights are made; the policy is an explicit option here:

| `score`   | `weights`      | weight of a chosen expert                          | used by              |
|-----------|----------------|----------------------------------------------------|----------------------|
| `softmax` | `renormalized` | softmax over all E, divided by the sum of the K    | Mixtral, CLIP-MoE    |
| `softmax` | `raw`          | softmax over all E                                 | Switch, DeepSeek-V2  |
| `softmax` | `softmax_topk` | softmax over the K chosen logits                   | Shazeer 2017, GPT-OSS|
| `sigmoid` | `renormalized` | sigmoid, divided by the sum of the K               | DeepSeek-V3          |
| `sigmoid` | `raw`          | sigmoid                                            | Llama 4              |

Shapes: T rows, D model width, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from mmoe.options import check_choice, check_float, check_int
from mmoe.registry import routers
from mmoe.routers.capacity import drop_beyond_capacity
from mmoe.routing import Context, LinearRouter, Routing, finish_routing, over_processes

Score = Literal["softmax", "sigmoid"]
Weights = Literal["renormalized", "raw", "softmax_topk"]


@routers.register("topk")
class TopKRouter(LinearRouter):
    """Each token picks its K best experts.

    Args:
        dim: model width D.
        num_experts: E.
        top_k: K.
        score: turns logits into `probs`: "softmax" over all experts or "sigmoid" of each.
        weights: "renormalized", "raw" or "softmax_topk"; see the table of this file.
        scale: factor on the combine weights (DeepSeek's routed scaling factor).
        noise: standard deviation of Gaussian noise on the selection in training; 0 turns it off.
        bias_rate: step of the loss-free bias balancing done by `mmoe.update_routers`; 0 turns it off and keeps no bias.
        gate_bias: gives the gate an additive bias.
        capacity_factor: drops the slots of an expert beyond its share times this factor
            (`mmoe.routers.capacity.drop_beyond_capacity`); None drops nothing.

    Example:
        >>> router = TopKRouter(8, 4, top_k=2)
        >>> routing = router(torch.randn(3, 8))
        >>> routing.weights.sum(-1).allclose(torch.ones(3))
        True
    """

    select_bias: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 2,
        score: Score = "softmax",
        weights: Weights = "renormalized",
        scale: float = 1.0,
        noise: float = 0.0,
        bias_rate: float = 0.0,
        gate_bias: bool = False,
        capacity_factor: float | None = None,
    ) -> None:
        super().__init__(dim, num_experts, gate_bias)
        check_int("top_k", top_k, 1, num_experts)
        check_choice("score", score, get_args(Score))
        check_choice("weights", weights, get_args(Weights))
        check_float("scale", scale, above=0)
        check_float("noise", noise, low=0)
        check_float("bias_rate", bias_rate, low=0)
        self.top_k = self.experts_per_token = top_k
        if capacity_factor is not None:
            check_float("capacity_factor", capacity_factor, above=0)
            self.experts_per_token = min(top_k, top_k * capacity_factor)
            self.causal_safe, self.batch_dependent = False, True  # type: ignore[misc]  # of this instance
        self.capacity_factor = capacity_factor
        self.score, self.weights, self.scale, self.noise = score, weights, scale, noise
        self.bias_rate = bias_rate
        if bias_rate:
            self.register_buffer("select_bias", torch.zeros(num_experts, dtype=torch.float32))

    def select(self, logits: Tensor, context: Context | None = None) -> Routing:
        """Top-k of the selection scores; weights from the unbiased, noise-free scores."""
        probs = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()  # (T, E)
        experts = self._selection(logits, probs).topk(self.top_k, dim=-1).indices  # (T, K)
        if self.weights == "softmax_topk" or (self.weights == "renormalized" and self.score == "softmax"):
            weights = logits.gather(-1, experts).softmax(-1)  # (T, K); the same, without the others' sum
        else:
            weights = probs.gather(-1, experts)  # (T, K)
            if self.weights == "renormalized":
                weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        routing = Routing(
            experts=experts,
            weights=weights * self.scale if self.scale != 1.0 else weights,
            num_experts=self.num_experts,
            logits=logits,
            probs=probs,
            all_used=True,
        )
        routing = finish_routing(routing, context)
        return routing if self.capacity_factor is None else drop_beyond_capacity(routing, self.capacity_factor)

    def _selection(self, logits: Tensor, probs: Tensor) -> Tensor:
        """What top-k ranks: the logits, or with bias balancing the probs plus the bias; a logit of -inf stays last."""
        selection = logits.detach()
        if self.bias_rate:
            selection = (probs.detach() + self.select_bias).masked_fill(selection == -torch.inf, -torch.inf)
        if self.noise and self.training:
            selection = selection + self.noise * torch.randn_like(selection)
        return selection

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TopKRouter:
        """As every module, except that the bias keeps fp32: bf16 would swallow the steps of `update`."""
        bias = self._buffers.get("select_bias")
        super()._apply(fn, recurse)
        if bias is not None and self.select_bias.dtype != bias.dtype:
            self.select_bias = bias.to(self.select_bias.device)
        return self

    @torch.no_grad()
    def update(self, routing: Routing) -> None:
        """Raises the selection bias of underloaded experts by `bias_rate` and lowers the others'."""
        if self.bias_rate:
            counts = over_processes((routing.undropped or routing).counts()).float()
            self.select_bias += self.bias_rate * (counts.mean() - counts).sign()
