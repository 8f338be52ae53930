"""Where the slots of a routing are computed: places in memory, in blocks that one product serves.

A block is one expert, or a few with about as many rows each, filled up to the same number and multiplied as one batch:
in half precision, and where experts have few rows, products are too quick for their own calls. What is elementwise is
done for a chunk of several blocks at once.

Shapes: T rows, K slots per row, N used slots, P places, E experts, n experts of a block.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmoe.dispatch import grouped_allowed, sort_slots
from mmoe.routing import Routing

CHUNK_BYTES = 4 * 2**20  # of a chunk's inner values; about what stays in a core's cache
_FEW = 3  # rows of each expert up to which a product in full precision is over sooner than its call
_GROUPED = (8, 15)  # least blocks of a chunk, and most rows of each, whose products are quicker in one grouped call
_FREE = 32  # rows by which an expert may be filled up in half precision: reading its weights costs more


class Block(NamedTuple):
    """Rows of one expert, or of a few neighbours with as many each.

    Attributes:
        experts: slice of the experts.
        size: rows of all of them.
    """

    experts: slice
    size: int

    @property
    def num_experts(self) -> int:
        """n."""
        n: int = self.experts.stop - self.experts.start
        return n


class Chunk(NamedTuple):
    """Places that are computed together.

    Attributes:
        places: slice of all places.
        blocks: of the experts that own them.
        filled: rows of the chunk that belong to no slot, or None. They are zero: a row that overflows in one expert
            must not reach another.
        ends: where the rows of each expert from the first to the last end, where grouped products are quicker.
    """

    places: slice
    blocks: list[Block]
    filled: Tensor | None
    ends: Tensor | None

    @property
    def size(self) -> int:
        """C."""
        return self.places.stop - self.places.start

    def _parts(self, values: Tensor) -> list[Tensor]:
        """Of a chunk's values (C, W) those of each block: (C', W) of one expert, (n, c, W) of several."""
        parts = values.split([block.size for block in self.blocks])
        width = values.shape[1]
        return [
            part if block.num_experts == 1 else part.view(block.num_experts, -1, width)
            for block, part in zip(self.blocks, parts, strict=True)
        ]

    def _of_experts(self, packed: Tensor) -> list[Tensor]:
        """Of packed values (E, ...) those of each block: (...) of one expert, (n, ...) of several."""
        first = self.blocks[0].experts.start
        singles = packed[first : self.blocks[-1].experts.stop].unbind()
        return [
            singles[block.experts.start - first] if block.num_experts == 1 else packed[block.experts]
            for block in self.blocks
        ]

    def multiply(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """Products with each expert's matrix, rows (C, A) and weights (E, A, B) -> (C, B)."""
        if self.ends is not None and grouped_allowed(rows, weights):
            first = self.blocks[0].experts.start
            out.copy_(F.grouped_mm(rows, weights[first : first + len(self.ends)], offs=self.ends))
            return
        for a, b, product in zip(self._parts(rows), self._of_experts(weights), self._parts(out), strict=True):
            _product(a, b, product)

    def weight_grad(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Products over each expert's rows, (C, A) and (C, B) -> (E, A, B), where it has rows."""
        for a, b, product in zip(self._parts(left), self._parts(right), self._of_experts(out), strict=True):
            columns = a.mT
            if columns.itemsize == 2 and columns.shape[-1] <= 288:  # its products want rows; of few the copy is cheap
                columns = columns.contiguous()
            _product(columns, b, product)

    def dot(self, values: Tensor, bias: Tensor) -> Tensor:
        """Product of each row (C, W) with its expert's bias (E, W), (C, 1)."""
        pairs = zip(self._parts(values), self._of_experts(bias), strict=True)
        return torch.cat([(rows @ of_expert[..., None]).flatten()[:, None] for rows, of_expert in pairs])

    def bias_grad(self, values: Tensor, scale: Tensor | None, out: Tensor) -> None:
        """Sums of each expert's rows (C, W), weighed by (C, 1) -> (E, W), where it has rows."""
        scale = values.new_ones(len(values), 1) if scale is None else scale
        for rows, weight, total in zip(self._parts(values), self._parts(scale), self._of_experts(out), strict=True):
            total.copy_((weight.mT @ rows)[..., 0, :])

    def add_bias(self, values: Tensor, bias: Tensor) -> None:
        """Adds each expert's bias (E, W) to its rows (C, W)."""
        for rows, of_expert in zip(self._parts(values), self._of_experts(bias), strict=True):
            rows += of_expert[..., None, :]


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Product (p, q) x (q, r), or a batch of them, in the quicker order."""
    if _turned(a, b):
        out.copy_(torch.matmul(b.mT, a.mT).mT)
    elif a.ndim == 3:
        torch.bmm(a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def _turned(a: Tensor, b: Tensor) -> bool:
    """True where few rows times a transposed matrix are quicker as that matrix times a few columns.

    The bounds are from timings on two cores: they depend on the matrix's size in full precision only.
    """
    rows, size = a.shape[-2], b.shape[-2] * b.shape[-1]
    if b.stride(-1) == 1:
        return False
    if b.itemsize == 2:
        return rows <= 64
    if size < 2**21:
        return size >= 2**19 and 16 <= rows <= 48
    return 8 <= rows <= (48 if size < 2**22 else 15)


class Plan(NamedTuple):
    """Where each slot is computed.

    Attributes:
        chunks: of all experts that got slots.
        most: places of the largest chunk.
        tokens: (P,) row of each place.
        slots: (N,) number of each sorted slot among the routing's (T * K).
        place: (N,) place of each sorted slot.
        bags: (T, K) places of each row, or (N,) of the used ones.
        starts: (T,) where each row's begin in `bags`; None where all are used.
        used: (N,) numbers of the used slots in their own order; None where all are used.
    """

    chunks: list[Chunk]
    most: int
    tokens: Tensor
    slots: Tensor
    place: Tensor
    bags: Tensor
    starts: Tensor | None
    used: Tensor | None

    @classmethod
    def make(cls, routing: Routing, row_bytes: int, half: bool) -> Plan:
        """Plan for a routing.

        Args:
            routing: experts (T, K).
            row_bytes: of the inner values of a place.
            half: they are of half precision.
        """
        slots, per_expert = sort_slots(routing)
        counts, per_row = per_expert.tolist(), routing.experts.shape[1]
        sizes = [count and max(count, 2) for count in counts] if half else counts  # one row is slower than two
        most = max(CHUNK_BYTES // row_bytes, 1)
        groups = _groups(sizes, most, half)
        starts = list(accumulate(((g.stop - g.start) * max(sizes[g]) for g in groups), initial=0))
        tokens, place, filled = slots // per_row, torch.arange(len(slots), device=slots.device), None
        if starts[-1] > len(slots):
            shifts = torch.tensor(_shifts(groups, starts, counts, sizes), device=slots.device)
            place += shifts.repeat_interleave(per_expert, output_size=len(slots))
            filled = slots.new_ones(starts[-1], dtype=torch.bool).index_fill_(0, place, False)
            tokens = tokens.new_zeros(starts[-1]).index_copy_(0, place, tokens)
        chunks = _chunks(groups, starts, most, filled, half)
        largest = max((chunk.size for chunk in chunks), default=0)
        bags = slots.new_empty(routing.experts.numel()).index_copy_(0, slots, place)
        if routing.all_used:
            return cls(chunks, largest, tokens, slots, place, bags.view(-1, per_row), None, None)
        taken = routing.experts < routing.num_experts
        used, per_token = taken.flatten().nonzero().flatten(), taken.sum(1)
        return cls(chunks, largest, tokens, slots, place, bags[used], per_token.cumsum(0) - per_token, used)

    @property
    def experts(self) -> list[slice]:
        """Experts that have rows, in order."""
        return [block.experts for chunk in self.chunks for block in chunk.blocks]

    def gather(self, chunk: Chunk, x: Tensor, buffer: Tensor) -> Tensor:
        """Rows (T, W) -> those of a chunk (C, W), in flat memory that is large enough."""
        rows = buffer[: chunk.size * x.shape[1]].view(chunk.size, x.shape[1])
        torch.index_select(x, 0, self.tokens[chunk.places], out=rows)
        return rows if chunk.filled is None else rows.index_fill_(0, chunk.filled, 0.0)

    def scale(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Combine weight (T, K) of each place, (P, 1), 0 where there is no slot."""
        of_slots = weights.flatten()[self.slots, None].to(dtype)
        return of_slots.new_zeros(len(self.tokens), 1).index_copy_(0, self.place, of_slots)

    def add_up(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """Weighted sums per row of the values of all places, (P, W) -> (T, W)."""
        if weights is not None:
            weights = (weights if self.used is None else weights.flatten()[self.used]).to(values.dtype)
        if not len(self.slots):
            return values.new_zeros(len(self.bags if self.starts is None else self.starts), values.shape[1])
        return F.embedding_bag(self.bags, values, self.starts, mode="sum", per_sample_weights=weights)

    def of_slots(self, values: Tensor, like: Tensor) -> Tensor:
        """Values of the places (P, 1) -> of the slots, in shape and type of `like` (T, K), 0 where unused."""
        found = torch.zeros_like(like, memory_format=torch.contiguous_format)
        found.view(-1)[self.slots] = values[self.place, 0].to(like.dtype)
        return found


def _groups(sizes: list[int], most: int, half: bool) -> list[slice]:
    """Neighbouring experts with rows, a few at a time: about as many each time, and about `most` rows.

    Args:
        sizes: rows per expert.
        most: rows.
    """
    used = sum(map(bool, sizes))
    at_once = max(most * used // max(sum(sizes), 1), 2 if half else 1)
    at_once = -(-used // -(-used // at_once)) if used else 0
    found, first = [], 0
    while first < len(sizes):
        last, total, capacity = first + 1, sizes[first], sizes[first]
        while last < min(first + at_once, len(sizes)) and sizes[first] and sizes[last]:
            size, filled = last + 1 - first, max(capacity, sizes[last]) * (last + 1 - first)
            if filled > (1.1 * (total + sizes[last]) + _FREE * size if half else _FEW * size):
                break
            total, capacity, last = total + sizes[last], max(capacity, sizes[last]), last + 1
        if total:
            found.append(slice(first, last))
        first = last
    return found


def _shifts(groups: list[slice], starts: list[int], counts: list[int], sizes: list[int]) -> list[int]:
    """How far the places of each expert lie behind its sorted slots."""
    first, shifts = [0, *accumulate(counts)], [0] * len(counts)
    for g, start in zip(groups, starts[:-1], strict=True):
        for e in range(g.start, g.stop):
            shifts[e] = start + (e - g.start) * max(sizes[g]) - first[e]
    return shifts


def _chunks(groups: list[slice], starts: list[int], most: int, filled: Tensor | None, half: bool) -> list[Chunk]:
    """Chunks of neighbouring blocks with at most so many rows, or of one block.

    Args:
        groups: experts of each block.
        starts: first place of each block, and the number of all.
        most: rows.
        filled: (P,) bool, places without a slot.
        half: values are of half precision.
    """
    chunks, first = [], 0
    while first < len(groups):
        last = first + 1
        while last < len(groups) and starts[last + 1] - starts[first] <= most:
            last += 1
        places = slice(starts[first], starts[last])
        blocks = [Block(groups[i], starts[i + 1] - starts[i]) for i in range(first, last)]
        empty = None if filled is None else filled[places].nonzero().flatten()
        few = starts[last] - starts[first] <= _GROUPED[1] * len(blocks)
        ends = _ends(blocks) if few and len(blocks) >= _GROUPED[0] and not half else None
        chunks.append(Chunk(places, blocks, empty if empty is not None and len(empty) else None, ends))
        first = last
    return chunks


def _ends(blocks: list[Block]) -> Tensor:
    """Where the rows of each expert end, of those without rows too."""
    sizes, first = [0] * (blocks[-1].experts.stop - blocks[0].experts.start), blocks[0].experts.start
    for block in blocks:
        for e in range(block.experts.start, block.experts.stop):
            sizes[e - first] = block.size // block.num_experts
    return torch.tensor(list(accumulate(sizes)), dtype=torch.int32, device="cpu")
