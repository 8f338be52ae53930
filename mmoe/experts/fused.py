"""Routed feed-forward experts on a CPU in one autograd step: gather, two products, weigh and add up, block by block.

    y[t] += w * (act(x[t] W_up^T + b_up) W_down^T + b_down)        for the rows t of each expert in turn

What a mixture costs on a CPU besides its products are fresh large temporaries, which are faulted in page by page. Here
the rows of one block lie in small temporaries that the allocator hands out again, and of the whole layer only the inner
values stay that backward needs. Backward is written out, so that gradients of packed weights are written in place,
once; autograd would add up E tensors of full size.

A block is one expert. In half precision, whose products are too quick for their own calls, it is a few experts with
about as many rows each, filled up to the same number and multiplied as one batch; filled-up rows have weight 0.
Shapes: T rows, N used slots, E experts, I input width, O output width, H = F inner width (2F for gated experts),
n experts of a block, c rows of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmoe.dispatch import is_sharded

Activation = Callable[[Tensor], Tensor]
MOST_BYTES = 8 * 2**20  # of a block's inner values; glibc takes memory above 32 MB from the system every time


def fusable(x: Tensor, weight: Tensor) -> bool:
    """True where the fused step can run: plain eager tensors of one type on a CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and not is_sharded(weight)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def pays(slots: int, weight: Tensor) -> bool:
    """True where the fused step was mostly faster than grouped products on two cores; `mmoe bench` shows both."""
    return slots >= (4 if weight.itemsize == 2 else 128) * len(weight)


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


def routed_ffn(
    x: Tensor,
    weights: Tensor,
    token_idx: Tensor,
    counts: Tensor,
    ffn: FeedForward,
) -> Tensor:
    """Weighted sum of the chosen experts for every row.

    Args:
        x: (T, I) rows.
        weights: (N,) combine weight of each slot, sorted by expert.
        token_idx: (N,) row of each slot.
        counts: (E,) slots per expert, summing to N.
        ffn: packed weights.

    Returns:
        (T, O) in the type of x.
    """
    keep = torch.is_grad_enabled()
    out: Tensor = _RoutedFFN.apply(x, weights, *ffn[:4], token_idx, counts.tolist(), ffn.act, ffn.gated, keep)
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
    inner = torch.cat([F.linear(x, up[e], None if up_bias is None else up_bias[e]) for _, e in slots])  # (K, H)
    rows = _activated(inner, act, gated).split(1)
    biases = [None if down_bias is None else down_bias[e] for _, e in slots]
    out = [F.linear(row, down[e], bias) for row, (_, e), bias in zip(rows, slots, biases, strict=True)]
    return weights.to(x.dtype) @ torch.cat(out)


class _Block(NamedTuple):
    """Slots of a few experts, filled up to the same number of rows each.

    Attributes:
        experts: slice of the experts.
        slots: slice of the sorted slots.
        tokens: (n * c,) row of each place.
        scale: (n, c, 1) combine weight of each place, 0 where it is filled up.
        places: place of each slot, or None where every place is one.
        filled: places without a slot. Their rows are zero: a row that overflows in one expert must not reach another.
    """

    experts: slice
    slots: slice
    tokens: Tensor
    scale: Tensor
    places: Tensor | None = None
    filled: Tensor | None = None

    def rows(self, x: Tensor) -> Tensor:
        """Rows (T, W) -> (n, c, W)."""
        rows = x.index_select(0, self.tokens)
        if self.filled is not None:
            rows.index_fill_(0, self.filled, 0.0)
        return rows.view(*self.scale.shape[:2], -1)

    def of_slots(self, values: Tensor) -> Tensor:
        """Values of the places (n, c, ...) -> of the slots."""
        flat = values.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)


def _blocks(counts: list[int], token_idx: Tensor, weights: Tensor, inner: int) -> list[_Block]:
    """Blocks of all experts that got slots.

    Args:
        counts: slots per expert.
        token_idx: (N,) row of each slot.
        weights: (N,) combine weight of each slot, in the type of the rows.
        inner: H.
    """
    found, start, first = [], 0, 0
    most_rows = MOST_BYTES // (inner * weights.itemsize) if weights.itemsize == 2 else 0
    while first < len(counts):
        last, total, capacity = first + 1, counts[first], counts[first]
        while last < len(counts):
            filled = max(capacity, counts[last]) * (last + 1 - first)
            if filled > most_rows or filled > 1.3 * (total + counts[last]) + 16:
                break
            total, capacity, last = total + counts[last], max(capacity, counts[last]), last + 1
        if total:
            slots = slice(start, start + total)
            found.append(_block(slice(first, last), slots, counts[first:last], token_idx[slots], weights[slots]))
        start, first = start + total, last
    return found


def _block(experts: slice, slots: slice, counts: list[int], tokens: Tensor, weights: Tensor) -> _Block:
    size, capacity = len(counts), max(counts)
    if len(tokens) == size * capacity:
        return _Block(experts, slots, tokens, weights.view(size, capacity, 1))
    per_expert = torch.tensor(counts)
    expert = torch.repeat_interleave(torch.arange(size), per_expert, output_size=len(tokens))
    places = torch.arange(len(tokens)) - (per_expert.cumsum(0) - per_expert)[expert] + expert * capacity
    all_tokens = tokens.new_zeros(size * capacity).index_copy_(0, places, tokens)
    scale = weights.new_zeros(size * capacity).index_copy_(0, places, weights)
    filled = torch.ones(size * capacity, dtype=torch.bool).index_fill_(0, places, False).nonzero().flatten()
    return _Block(experts, slots, all_tokens, scale.view(size, capacity, 1), places, filled)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Batched product (n, p, q) x (n, q, r); one matrix takes the quicker way."""
    if len(a) > 1:
        return torch.bmm(a, b, out=out)
    return torch.mm(a[0], b[0], out=None if out is None else out[0])[None]


def _activated(inner: Tensor, act: Activation, gated: bool) -> Tensor:
    """Inner values (..., H) -> (..., F), in new memory."""
    if not gated:
        return act(inner)
    gate, up = inner.chunk(2, dim=-1)
    return act(gate).mul_(up)


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
        keep: bool,
    ) -> Tensor:
        y = x.new_zeros(len(x), down.shape[1])
        blocks = _blocks(counts, token_idx, weights.to(x.dtype), up.shape[1])
        kept = []
        for block in blocks:
            e = block.experts
            inner = _product(block.rows(x), up[e].mT)  # (n, c, H)
            if up_bias is not None:
                inner += up_bias[e, None]
            weighted = _activated(inner, act, gated).mul_(block.scale)  # (n, c, F)
            out = _product(weighted, down[e].mT)  # (n, c, O)
            if down_bias is not None:
                out.addcmul_(block.scale, down_bias[e, None])
            y.index_add_(0, token_idx[block.slots], block.of_slots(out))
            if keep and any(ctx.needs_input_grad):
                kept.append(inner)
        ctx.save_for_backward(x, weights, up, down, down_bias, token_idx, *kept)
        ctx.blocks, ctx.act, ctx.gated = blocks, act, gated
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, up, down, down_bias, token_idx, *kept = ctx.saved_tensors
        for_x, for_weights, for_up, for_up_bias, for_down, for_down_bias, *_ = ctx.needs_input_grad
        grad_x = torch.zeros_like(x) if for_x else None
        grad_weights = torch.empty_like(weights) if for_weights else None
        grad_up, grad_down = _empty(up, for_up, ctx.blocks), _empty(down, for_down, ctx.blocks)
        grad_up_bias = x.new_zeros(up.shape[:2]) if for_up_bias else None
        grad_down_bias = x.new_zeros(down.shape[:2]) if for_down_bias else None
        for block, inner in zip(ctx.blocks, kept, strict=True):
            e = block.experts
            g = block.rows(grad)  # (n, c, O)
            to_weighted = _product(g, down[e])  # (n, c, F)
            activated, to_inner = _activation_step(inner, ctx.act, ctx.gated)
            if grad_weights is not None:
                to_weight = (to_weighted * activated).sum(-1)  # (n, c)
                if down_bias is not None:
                    to_weight = to_weight + (g @ down_bias[e, :, None])[..., 0]
                grad_weights[block.slots] = block.of_slots(to_weight).to(weights.dtype)
            if grad_down is not None:
                _product(g.mT, activated * block.scale, out=grad_down[e])
            if grad_down_bias is not None:
                grad_down_bias[e] = (block.scale.mT @ g)[:, 0]
            if grad_x is None and grad_up is None and grad_up_bias is None:
                continue
            h = to_inner(to_weighted.mul_(block.scale))  # (n, c, H)
            if grad_up is not None:
                _product(h.mT, block.rows(x), out=grad_up[e])
            if grad_up_bias is not None:
                grad_up_bias[e] = h.sum(1)
            if grad_x is not None:
                grad_x.index_add_(0, token_idx[block.slots], block.of_slots(_product(h, up[e])))
        return grad_x, grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias, None, None, None, None, None


def _empty(weight: Tensor, wanted: bool, blocks: list[_Block]) -> Tensor | None:
    """Memory for a packed gradient that the blocks write, zero for the other experts."""
    if not wanted:
        return None
    grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    first = 0
    for block in blocks:
        grad[first : block.experts.start].zero_()
        first = block.experts.stop
    grad[first:].zero_()
    return grad


def _activation_step(inner: Tensor, act: Activation, gated: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Activated values (..., F), and the function from their gradient to that of the inner values (..., H)."""
    first, second = inner.chunk(2, dim=-1) if gated else (inner, None)
    first = first.detach().requires_grad_()
    with torch.enable_grad():
        value = act(first)
    activated = value.detach() if second is None else value.detach() * second

    def to_inner(grad: Tensor) -> Tensor:
        if second is None:
            return torch.autograd.grad(value, first, grad)[0]
        out = torch.empty_like(inner)
        to_first, to_second = out.chunk(2, dim=-1)
        torch.mul(grad, value.detach(), out=to_second)
        to_first.copy_(torch.autograd.grad(value, first, grad.mul_(second))[0])
        return out

    return activated, to_inner
