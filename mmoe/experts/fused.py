"""Routed feed-forward experts on a CPU in one autograd step: gather, two products, weigh and add up, expert by expert.

    y[t] += w * (act(x[t] W_up^T + b_up) W_down^T + b_down)        for the rows t of each expert in turn

What a mixture costs on a CPU besides its products are fresh large temporaries, which are faulted in page by page. Here
the rows of one expert live in small blocks that the allocator hands out again, and of the whole layer only the inner
values stay that backward needs. Backward is written out, so that gradients of packed weights are written in place,
once; autograd would add up E tensors of full size.
Shapes: T rows, N used slots, E experts, I input width, O output width, H = F inner width (2F for gated experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Activation = Callable[[Tensor], Tensor]


def fusable(x: Tensor, weight: Tensor) -> bool:
    """True where the fused step can run: plain eager tensors of one type on a CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def pays(slots: int, weight: Tensor) -> bool:
    """True where the fused step is faster than grouped products, measured with `mmoe bench`.

    Many slots per expert hide what its small steps cost. Half-precision products are so quick that it pays only where
    the inner values (N, H) are too large for the allocator to keep.
    """
    experts, inner, _ = weight.shape
    return slots >= 128 * experts and (weight.itemsize > 2 or slots * inner * weight.itemsize >= 32 * 2**20)


def routed_ffn(
    x: Tensor,
    weights: Tensor,
    token_idx: Tensor,
    counts: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    act: Activation,
    gated: bool,
) -> Tensor:
    """Weighted sum of the chosen experts for every row.

    Args:
        x: (T, I) rows.
        weights: (N,) combine weight of each slot, sorted by expert.
        token_idx: (N,) row of each slot.
        counts: (E,) slots per expert, summing to N.
        up: (E, H, I), gate rows first where gated.
        up_bias: (E, H) or None.
        down: (E, O, F).
        down_bias: (E, O) or None.
        act: elementwise activation.
        gated: multiplies the activated first half of the inner values by the second.

    Returns:
        (T, O) in the type of x.
    """
    out: Tensor = _RoutedFFN.apply(x, weights, up, up_bias, down, down_bias, token_idx, counts.tolist(), act, gated)
    return out


def _groups(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Experts that got slots, with their slots."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _activated(inner: Tensor, act: Activation, gated: bool) -> Tensor:
    """(c, H) inner values -> (c, F), in new memory."""
    if not gated:
        out = act(inner)
        return out.clone() if _shares_memory(out, inner) else out
    gate, up = inner.chunk(2, dim=-1)
    out = act(gate)
    return out * up if _shares_memory(out, inner) else out.mul_(up)


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


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
        token_idx: Tensor,
        counts: list[int],
        act: Activation,
        gated: bool,
    ) -> Tensor:
        y = x.new_zeros(len(x), down.shape[1])
        kept = x.new_empty(len(token_idx), up.shape[1]) if any(ctx.needs_input_grad) else None  # (N, H)
        scale = weights.to(x.dtype)[:, None]  # (N, 1)
        for e, slots in _groups(counts):
            tokens = token_idx[slots]
            rows = x.index_select(0, tokens)  # (c, I)
            inner = torch.mm(rows, up[e].t(), out=None if kept is None else kept[slots])  # (c, H)
            if up_bias is not None:
                inner += up_bias[e]
            weighted = _activated(inner, act, gated).mul_(scale[slots])  # (c, F)
            out = torch.mm(weighted, down[e].t())  # (c, O)
            if down_bias is not None:
                out.addcmul_(scale[slots], down_bias[e])
            y.index_add_(0, tokens, out)
        ctx.save_for_backward(x, weights, up, down, down_bias, token_idx, kept)
        ctx.counts, ctx.act, ctx.gated = counts, act, gated
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, up, down, down_bias, token_idx, kept = ctx.saved_tensors
        for_x, for_weights, for_up, for_up_bias, for_down, for_down_bias, *_ = ctx.needs_input_grad
        scale = weights.to(x.dtype)[:, None]  # (N, 1)
        grad_x = torch.zeros_like(x) if for_x else None
        grad_weights = torch.empty_like(weights) if for_weights else None
        grad_up, grad_down = _empty(up, for_up, ctx.counts), _empty(down, for_down, ctx.counts)
        grad_up_bias = x.new_zeros(up.shape[:2]) if for_up_bias else None
        grad_down_bias = x.new_zeros(down.shape[:2]) if for_down_bias else None
        for e, slots in _groups(ctx.counts):
            tokens, w, inner = token_idx[slots], scale[slots], kept[slots]
            g = grad.index_select(0, tokens)  # (c, O)
            weighted = torch.mm(g, down[e])  # (c, F), gradient of the weighted activation
            activated, to_inner = _activation_step(inner, ctx.act, ctx.gated)
            if grad_weights is not None:
                to_weight = (weighted * activated).sum(-1)
                if down_bias is not None:
                    to_weight = to_weight + torch.mv(g, down_bias[e])
                grad_weights[slots] = to_weight.to(weights.dtype)
            if grad_down is not None:
                torch.mm(g.t(), activated * w, out=grad_down[e])
            if grad_down_bias is not None:
                grad_down_bias[e] = torch.mm(w.t(), g)[0]
            if grad_x is None and grad_up is None and grad_up_bias is None:
                continue
            h = to_inner(weighted.mul_(w))  # (c, H), gradient of the inner values
            if grad_up is not None:
                torch.mm(h.t(), x.index_select(0, tokens), out=grad_up[e])
            if grad_up_bias is not None:
                grad_up_bias[e] = h.sum(0)
            if grad_x is not None:
                grad_x.index_add_(0, tokens, torch.mm(h, up[e]))
        return grad_x, grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias, None, None, None, None


def _empty(weight: Tensor, wanted: bool, counts: list[int]) -> Tensor | None:
    """Memory for a packed gradient, zero for experts without slots."""
    if not wanted:
        return None
    grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for expert, count in enumerate(counts):
        if not count:
            grad[expert].zero_()
    return grad


def _activation_step(inner: Tensor, act: Activation, gated: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Activated values (c, F), and the function from their gradient to that of the inner values (c, H)."""
    first, second = inner.chunk(2, dim=-1) if gated else (inner, None)
    first = first.detach().requires_grad_()
    with torch.enable_grad():
        value = act(first)
    activated = value.detach() if second is None else value.detach() * second

    def to_inner(grad: Tensor) -> Tensor:
        if second is None:
            return torch.autograd.grad(value, first, grad)[0]
        out = torch.empty_like(inner)
        torch.mul(grad, value.detach(), out=out[:, second.shape[1] :])
        out[:, : second.shape[1]] = torch.autograd.grad(value, first, grad.mul_(second))[0]
        return out

    return activated, to_inner
