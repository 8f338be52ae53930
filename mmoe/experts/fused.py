"""Routed feed-forward experts on a CPU in one autograd step: gather, two products, weigh and add up, chunk by chunk.

    y[t] = sum_k w[t, k] * (act(x[t] W_up^T + b_up) W_down^T + b_down)        with the weights of expert k of row t

What a mixture costs on a CPU besides its products are fresh large temporaries, which are faulted in page by page. Here
all of them lie in memory that is handed out again (`mmoe.memory`), those between the products are as small as a chunk,
and of the whole layer only the inner values stay that backward needs. Backward is written out, so that gradients of
packed weights are written in place, once; autograd would add up E tensors of full size.

Shapes: T rows, K slots per row, P places (`mmoe.experts.plan`), C places of a chunk, E experts, I input width, O output
width, H = F inner width (2F for gated experts).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmoe import memory
from mmoe.dispatch import combine, dispatch, grouped_linear, in_forward_mode, is_sharded
from mmoe.experts.activations import KERNELS, Activation
from mmoe.experts.plan import Plan
from mmoe.routing import Routing


def fusable(x: Tensor, weight: Tensor) -> bool:
    """True where the fused step can run: plain eager tensors of one type on a CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and not is_sharded(weight)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and not in_forward_mode()
    )


def pays(slots: int, weight: Tensor, trains: bool) -> bool:
    """True where the fused step was mostly faster than grouped products on two cores; `mmoe bench` shows both.

    Args:
        slots: N.
        weight: (E, H, I).
        trains: a gradient will be asked for. Fresh memory for large ones takes longer than their products.
    """
    if trains and weight.nbytes >= 2**25:
        return True
    if weight.itemsize == 2:
        return slots >= 8 or not trains
    rows, large = slots / len(weight), weight[0].numel() >= 2**19  # small experts are over too soon
    return rows >= 128 or (large and not trains and 12 <= rows <= 40)


class FeedForward(NamedTuple):
    """Packed weights of feed-forward experts.

    Attributes:
        up: (E, H, I), gate rows first where gated.
        up_bias: (E, H) or None.
        down: (E, O, F).
        down_bias: (E, O) or None.
        act: elementwise activation.
        gated: multiplies the activated first half of the inner values by the second.
    """

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    act: Activation
    gated: bool


def routed_ffn(x: Tensor, routing: Routing, ffn: FeedForward) -> Tensor:
    """Weighted sum of the chosen experts for every row.

    Args:
        x: (T, I) rows.
        routing: experts and weights (T, K).
        ffn: packed weights.

    Returns:
        (T, O) in the type of x.
    """
    plan = Plan.make(routing, ffn.up.shape[1] * ffn.up.itemsize, half=ffn.up.itemsize == 2)
    keep = torch.is_grad_enabled()
    out: Tensor = _RoutedFFN.apply(x, routing.weights, *ffn[:4], routing.experts, plan, *ffn[4:], keep)
    return out


def one_row(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    ffn: FeedForward,
) -> Tensor:
    """As `routed_ffn` for a single row (1, I), with its experts and weights (1, K): nothing is sorted.

    It is what decoding needs, where steps around the products cost as much as they do.
    """
    up, up_bias, down, down_bias, act, gated = ffn
    slots = [(slot, expert) for slot, expert in enumerate(experts[0].tolist()) if expert < len(up)]
    if not slots:
        return x.new_zeros(1, down.shape[1])
    if len(slots) < experts.shape[1]:
        weights = weights[:, [slot for slot, _ in slots]]
    columns = x.repeat(2, 1).t() if x.itemsize == 2 else x.t()  # a product with one column of half precision is slower
    inner = torch.cat([_linear(up[e], columns, None if up_bias is None else up_bias[e]) for _, e in slots], 1)  # (H, K)
    hidden = _activated(inner, act, gated, 0).split(columns.shape[1], 1)
    biases = [None if down_bias is None else down_bias[e] for _, e in slots]
    out = [_linear(down[e], h, bias)[:, :1] for h, (_, e), bias in zip(hidden, slots, biases, strict=True)]  # (O, 1)
    return weights.to(x.dtype) @ torch.cat(out, 1).t()


def _linear(weight: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """Weight (A, B) times columns (B, n) and bias (A,)."""
    return weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)


def _activated(inner: Tensor, act: Activation, gated: bool, dim: int) -> Tensor:
    """Inner values, H along a dimension -> F, in new memory."""
    if not gated:
        return act(inner)
    gate, up = inner.chunk(2, dim)
    return act(gate) * up


@torch.enable_grad()
def _gradients_by_autograd(ctx: Any, grad: Tensor, create_graph: bool) -> list[Tensor | None]:
    """Gradients of the step, of operations that have derivatives of any order and work under transforms."""
    inputs: Any = [None if value is None else value.view_as(value) for value in ctx.saved_tensors[:6]]
    x, weights, up, up_bias, down, down_bias = inputs  # views: x itself leads to the weights too, by the router
    sent = dispatch(Routing(experts=ctx.experts, weights=weights, num_experts=len(up)))
    inner = grouped_linear(x[sent.token_idx], up, sent.counts, up_bias, "loop")
    hidden = _activated(inner, ctx.act, ctx.gated, -1)
    y = combine(grouped_linear(hidden, down, sent.counts, down_bias, "loop"), sent, len(x))
    needed = ctx.needs_input_grad[: len(inputs)]
    wanted = [value for value, needs in zip(inputs, needed, strict=True) if needs]
    grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph))
    return [next(grads) if needs else None for needs in needed]


class _RoutedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        experts: Tensor,
        plan: Plan,
        act: Activation,
        gated: bool,
        keep: bool,
    ) -> Tensor:
        keep, kernel = keep and any(ctx.needs_input_grad), KERNELS[act]
        width, places, most = down.shape[2], len(plan.tokens), plan.most
        rows, hidden = memory.empty((most * x.shape[1],), x), memory.empty((most, width), x)
        inner = memory.empty((places if keep else most, up.shape[1]), x)
        out = memory.empty((places, down.shape[1]), x)
        for chunk in plan.chunks:
            h = inner[chunk.places] if keep else inner[: chunk.size]  # (C, H)
            chunk.multiply(plan.gather(chunk, x, rows), up.mT, h)
            if up_bias is not None:
                chunk.add_bias(h, up_bias)
            a = hidden[: chunk.size]  # (C, F)
            kernel.value(h[:, :width], a)
            if gated:
                a *= h[:, width:]
            chunk.multiply(a, down.mT, out[chunk.places])
            if down_bias is not None:
                chunk.add_bias(out[chunk.places], down_bias)
        ctx.save_for_backward(x, weights, up, up_bias, down, down_bias, inner if keep else None)
        ctx.experts, ctx.plan, ctx.act, ctx.gated = experts, plan, act, gated
        return plan.add_up(out, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        if create_graph or torch._C._functorch.is_legacy_batchedtensor(grad):  # is_grads_batched
            return *_gradients_by_autograd(ctx, grad, create_graph), *[None] * 5
        x, weights, up, _, down, down_bias, inner = ctx.saved_tensors
        kernel = KERNELS[ctx.act]
        for_x, for_weights, for_up, for_up_bias, for_down, for_down_bias, *_ = ctx.needs_input_grad
        plan: Plan = ctx.plan
        width, places, most = down.shape[2], len(plan.tokens), plan.most
        rows = memory.empty((most * max(x.shape[1], grad.shape[1]),), x)
        hidden, value, to_hidden = (memory.empty((most, width), x) for _ in range(3))
        to_inner = memory.empty((most, up.shape[1]), x)
        to_rows = memory.empty((places, x.shape[1]), x) if for_x else None
        to_weights = memory.empty((places, 1), x) if for_weights else None
        to_up, to_down = (_gradient(w, plan) if wanted else None for w, wanted in ((up, for_up), (down, for_down)))
        to_up_bias = x.new_zeros(up.shape[:2]) if for_up_bias else None
        to_down_bias = x.new_zeros(down.shape[:2]) if for_down_bias else None
        scale = plan.scale(weights, x.dtype)  # (P, 1)
        for chunk in plan.chunks:
            h, s, g = inner[chunk.places], scale[chunk.places], plan.gather(chunk, grad, rows)  # (C, H), (C, 1), (C, O)
            a, v, to_a, to_h = (of_chunk[: chunk.size] for of_chunk in (hidden, value, to_hidden, to_inner))
            chunk.multiply(g, down, to_a)
            kernel.value(h[:, :width], v)
            a = torch.mul(v, h[:, width:], out=a) if ctx.gated else v
            if to_weights is not None:
                to_weight = torch.mul(to_a, a, out=to_h[:, :width]).sum(1, keepdim=True)  # (C, 1)
                if down_bias is not None:
                    to_weight += chunk.dot(g, down_bias)
                to_weights[chunk.places] = to_weight
            to_a *= s
            if ctx.gated:
                torch.mul(to_a, v, out=to_h[:, width:])
                to_a *= h[:, width:]
            kernel.grad(to_a, h[:, :width], to_h[:, :width])
            if to_down is not None:
                chunk.weight_grad(g, a.mul_(s), to_down)
            if to_down_bias is not None:
                chunk.bias_grad(g, s, to_down_bias)
            if to_up is not None:
                chunk.weight_grad(to_h, plan.gather(chunk, x, rows), to_up)
            if to_up_bias is not None:
                chunk.bias_grad(to_h, None, to_up_bias)
            if to_rows is not None:
                chunk.multiply(to_h, up, to_rows[chunk.places])
        to_x = None if to_rows is None else plan.add_up(to_rows)
        to_weights = None if to_weights is None else plan.of_slots(to_weights, weights)
        return to_x, to_weights, to_up, to_up_bias, to_down, to_down_bias, *[None] * 5


def _gradient(weight: Tensor, plan: Plan) -> Tensor:
    """Memory for the gradient of a packed weight (E, ...): zero for experts without rows, to be written for others."""
    written = plan.experts
    if 5 * sum(e.stop - e.start for e in written) < len(weight):  # fresh pages cost as much as writing zeros to five
        return memory.zeros(weight.shape, weight)
    grad = memory.empty(weight.shape, weight)
    first = 0
    for e in written:
        grad[first : e.start].zero_()
        first = e.stop
    grad[first:].zero_()
    return grad
