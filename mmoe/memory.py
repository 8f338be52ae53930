"""Memory for large tensors on a CPU.

The C library takes what is larger than 32 MB from the system every time, and the system hands it out page by page when
it is first written, which takes several times as long as writing it. Here memory of a tensor that is gone is kept for
the next one of about its size.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

MOST_KEPT = 2**30  # bytes
LEAST = 2**20  # bytes; smaller tensors are left to torch
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if hasattr(mmap, "MAP_PRIVATE") else None  # not on Windows

_kept: deque[mmap.mmap] = deque()  # the oldest first; its methods need no lock


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of any values, of the type and on the device of another."""
    size = math.prod(shape) * like.itemsize
    if _PRIVATE is None or like.device.type != "cpu" or size < LEAST:
        return like.new_empty(shape)
    rounded = _rounded(size)
    return _tensor(_take(rounded) or mmap.mmap(-1, rounded, flags=_PRIVATE), shape, like, keep=True)


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of zeros, of the type and on the device of another; what is never written to takes no time."""
    size = math.prod(shape) * like.itemsize
    if _PRIVATE is None or like.device.type != "cpu" or size < LEAST:
        return like.new_zeros(shape)
    return _tensor(mmap.mmap(-1, size, flags=_PRIVATE), shape, like, keep=False)


def kept() -> int:
    """Bytes that are kept for tensors to come."""
    return sum(map(len, tuple(_kept)))


def release() -> None:
    """Gives all memory that is kept back to the system."""
    _kept.clear()


def _rounded(size: int) -> int:
    """Sizes of one class share memory; there are eight classes to a power of two."""
    step = 2 ** max(size.bit_length() - 4, 12)
    return -(-size // step) * step


def _take(size: int) -> mmap.mmap | None:
    for memory in reversed(tuple(_kept)):
        if len(memory) == size:
            with suppress(ValueError):  # another thread took it
                _kept.remove(memory)
                return memory
    return None


def _tensor(memory: mmap.mmap, shape: Sequence[int], like: Tensor, keep: bool) -> Tensor:
    lease = (ctypes.c_char * len(memory)).from_buffer(memory)
    if keep:
        weakref.finalize(lease, _keep, memory).atexit = False
    return torch.frombuffer(lease, dtype=like.dtype, count=math.prod(shape)).view(shape)


def _keep(memory: mmap.mmap) -> None:
    if len(memory) <= MOST_KEPT:
        _kept.append(memory)
    with suppress(IndexError):  # another thread emptied it
        while kept() > MOST_KEPT:
            _kept.popleft()
