"""Sends rows to experts: one stable sort, then one grouped product per expert layer.

Shapes: T rows, K slots per row, E experts, N used slots, I input width, O output width of a linear layer.

Backends of `grouped_linear`: "grouped" is one `torch.nn.functional.grouped_mm`; "loop" is one product per expert and
serves as reference, and for shapes that grouped_mm forbids (rows must be multiples of 16 bytes).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mmoe.errors import BadOverride
from mmoe.options import check_choice
from mmoe.routing import Routing, in_autocast

Backend = Literal["auto", "fused", "grouped", "loop"]
_FEW = 64  # slots
_GROUPED = (torch.float32, torch.bfloat16, torch.float16)


class Dispatch(NamedTuple):
    """Used slots sorted by expert.

    Attributes:
        token_idx: (N,) row of each slot.
        counts: (E,) slots per expert; they sum to N.
        weights: (N,) combine weight of each slot, differentiable.
    """

    token_idx: Tensor
    counts: Tensor
    weights: Tensor


def dispatch(routing: Routing) -> Dispatch:
    """Sorts the used slots of a routing by expert (stable); sentinels are dropped.

    Example:
        >>> routing = Routing(experts=torch.tensor([[1, 2], [0, 1]]), weights=torch.ones(2, 2), num_experts=2)
        >>> token_idx, counts, _ = dispatch(routing)
        >>> token_idx.tolist(), counts.tolist()
        ([1, 0, 1], [1, 2])
    """
    slots, counts = sort_slots(routing)
    return Dispatch(slots // routing.experts.shape[1], counts, routing.weights.flatten()[slots])


def sort_slots(routing: Routing) -> tuple[Tensor, Tensor]:
    """Numbers of the used slots among all (T*K), sorted by expert (stable), (N,); slots of each expert, (E,)."""
    ids = routing.experts.flatten()  # (T*K,)
    if not torch.compiler.is_compiling() and ids.device.type == "cpu" and len(ids) <= _FEW:
        return _sort_few(ids.tolist(), routing.num_experts)
    if routing.num_experts < 256:
        ids = ids.to(torch.uint8)  # sorts several times as fast
    order, counts = ids.argsort(stable=True), routing.counts()
    return order if routing.all_used else order[: int(counts.sum())], counts


def _sort_few(ids: list[int], experts: int) -> tuple[Tensor, Tensor]:
    """For so few slots the steps of tensors cost more than the work."""
    order = sorted((slot for slot, expert in enumerate(ids) if expert < experts), key=ids.__getitem__)
    counts = [0] * experts
    for slot in order:
        counts[ids[slot]] += 1
    return torch.tensor(order, dtype=torch.long, device="cpu"), torch.tensor(counts, device="cpu")


def combine(out: Tensor, dispatched: Dispatch, rows: int) -> Tensor:
    """Weighted sum of the experts' outputs per row: (N, O) -> (rows, O)."""
    weighted = out * dispatched.weights.to(out.dtype)[:, None]
    return out.new_zeros(rows, out.shape[1]).index_add_(0, dispatched.token_idx, weighted)


def grouped_linear(
    x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Applies linear layer e to the e-th group of rows.

    Args:
        x: (N, I) rows sorted by expert.
        weight: (E, O, I) packed weights; of those that are sharded the part that is here, with its `counts`.
        counts: (E,) rows per expert, summing to N.
        bias: (E, O) packed biases, or None.
        backend: "auto" takes grouped_mm where its rules allow; so does "fused", which is no way to run one product.

    Returns:
        (N, O), under autocast in its dtype as `nn.Linear` does.

    Raises:
        BadOverride: "grouped" was asked for where its rules forbid it.
    """
    if is_sharded(weight):
        weight, bias = weight.to_local(), None if bias is None else bias.to_local()  # type: ignore[attr-defined]  # a DTensor
    if in_autocast(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    check_choice("backend", backend, get_args(Backend))
    if backend in ("auto", "fused"):
        backend = "grouped" if grouped_allowed(x, weight) else "loop"
    elif backend == "grouped" and not (_aligned(weight) and weight.dtype in _GROUPED):
        wrong = "grouped products want rows of a multiple of 16 bytes, in fp32, bf16 or fp16"
        asked = (
            f"backend='grouped' for experts of {weight.shape[2]} inputs and {weight.shape[1]} outputs in {weight.dtype}"
        )
        raise BadOverride(asked, wrong, "backend='auto'")
    if backend == "loop":
        return _loop(x, weight, counts, bias)
    out = _grouped_mm(x, weight.transpose(1, 2), counts.cumsum(0).to(torch.int32))
    if bias is None:
        return out
    return out + bias.repeat_interleave(counts, dim=0, output_size=len(x))


def is_sharded(weight: Tensor) -> bool:
    """True for a `DTensor` (`mmoe.parallel`), without the import of what makes them."""
    return hasattr(weight, "to_local")


def grouped_allowed(x: Tensor, weight: Tensor) -> bool:
    """True where `torch.nn.functional.grouped_mm` takes rows (N, I) and weights (E, O, I), or turned, and is quick."""
    quick = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.bfloat16)
    return quick and len(x) > 0 and _aligned(weight) and not in_forward_mode()


def _aligned(weight: Tensor) -> bool:
    """True where rows or columns lie one behind the other, in multiples of 16 bytes."""
    (rows, columns), (step, side) = weight.shape[1:], weight.stride()[1:]
    if side != 1:
        rows, columns, step, side = columns, rows, side, step
    return side == 1 and step >= columns and all(size * weight.itemsize % 16 == 0 for size in (rows, columns, step))


def in_forward_mode() -> bool:
    """True inside `torch.autograd.forward_ad.dual_level`, whose derivatives only plain operations have."""
    return bool(torch.autograd.forward_ad._current_level >= 0)


def _loop(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
    groups: tuple[Tensor, ...] = torch.split(x, counts.tolist())
    weights = weight.unbind()  # backward stacks their gradients once; indexing would add up E tensors of full size
    biases = [None] * len(weights) if bias is None else bias.unbind()
    products = [
        F.linear(rows, w, b)
        for rows, w, b in zip(groups, weights, biases, strict=True)
        if len(rows) or not len(x)  # without any row the empty products keep the graph: DDP wants all gradients
    ]
    return torch.cat(products)


def _grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """grouped_mm (N, I) x (E, I, O) -> (N, O); without shapes for fp32, so where only they count it is a custom op."""
    if (torch.compiler.is_compiling() or x.is_meta) and x.dtype == torch.float32:
        return _opaque_grouped_mm(x, weight, offsets)
    out: Tensor = F.grouped_mm(x.contiguous(), weight, offs=offsets)
    return out


@torch.library.custom_op("mmoe::grouped_mm", mutates_args=())
def _opaque_grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(x.contiguous(), weight, offs=offsets)


@_opaque_grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("mmoe::grouped_mm_weight_grad", mutates_args=())
def _opaque_weight_grad(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(x.t(), grad, offs=offsets)


@_opaque_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], x.shape[1], grad.shape[1])


def _opaque_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, offsets = ctx.saved_tensors  # type: ignore[attr-defined]  # FunctionCtx lacks it in torch's stubs
    grad = grad.contiguous()
    return (
        _opaque_grouped_mm(grad, weight.transpose(1, 2), offsets),
        _opaque_weight_grad(x, grad, offsets),
        None,
    )


def _save_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


_opaque_grouped_mm.register_autograd(_opaque_backward, setup_context=_save_for_backward)
