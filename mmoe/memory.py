"""Memory for large tensors on a CPU.

The C library takes what is larger than 32 MB from the system every time, and the system hands it out page by page when
it is first written, which takes several times as long as writing it. Here memory of a tensor that is gone is kept for
the next one of about its size.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MOST_KEPT = 2**30  # bytes
LEAST = 2**23  # bytes; what is smaller stays with the C library, whose memory is in the cache more often
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if hasattr(mmap, "MAP_PRIVATE") else None  # not on Windows

_kept: list[mmap.mmap] = []  # the oldest first
_returned: deque[mmap.mmap] = deque()  # to be kept; the garbage collector appends at any moment, under the lock too
_lock = threading.Lock()  # of the list


def _renew_lock() -> None:
    """Another thread may have held the lock when this process was forked."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of any values, of the type and on the device of another."""
    size = math.prod(shape) * like.itemsize
    if _PRIVATE is None or like.device.type != "cpu" or size < LEAST:
        return like.new_empty(shape)
    rounded = _rounded(size)
    return _tensor(lambda: _take(rounded) or mmap.mmap(-1, rounded, flags=_PRIVATE), shape, like, _keep)


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of zeros, of the type and on the device of another; what is never written to takes no time."""
    size = math.prod(shape) * like.itemsize
    if _PRIVATE is None or like.device.type != "cpu" or size < LEAST:
        return like.new_zeros(shape)
    return _tensor(lambda: mmap.mmap(-1, size, flags=_PRIVATE), shape, like)


def kept() -> int:
    """Bytes that are kept for tensors to come."""
    with _lock:
        _settle()
        return sum(map(len, _kept))


def release() -> None:
    """Gives all memory that is kept back to the system."""
    with _lock:
        _settle()
        _kept.clear()


def _rounded(size: int) -> int:
    """Sizes of one class share memory; there are eight classes to a power of two."""
    step = 2 ** max(size.bit_length() - 4, 12)
    return -(-size // step) * step


def _take(size: int) -> mmap.mmap | None:
    with _lock:
        _settle()
        for place in reversed(range(len(_kept))):
            if len(_kept[place]) == size:
                return _kept.pop(place)
    return None


def _keep(memory: mmap.mmap) -> None:
    _returned.append(memory)
    if _lock.acquire(blocking=False):
        try:
            _settle()
        finally:
            _lock.release()


def _settle() -> None:
    """Takes over what was returned; whoever calls holds the lock."""
    while _returned:
        memory = _returned.popleft()
        if len(memory) <= MOST_KEPT:
            _kept.append(memory)
    while sum(map(len, _kept)) > MOST_KEPT:
        del _kept[0]


def _tensor(
    take: Callable[[], mmap.mmap],
    shape: Sequence[int],
    like: Tensor,
    give_back: Callable[[mmap.mmap], None] | None = None,
) -> Tensor:
    try:
        memory = take()
    except OSError:  # the system has no more
        release()
        return like.new_zeros(shape)
    lease = (ctypes.c_char * len(memory)).from_buffer(memory)
    if give_back is not None:
        weakref.finalize(lease, give_back, memory).atexit = False
    return torch.frombuffer(lease, dtype=like.dtype, count=math.prod(shape)).view(shape)
