"""What stood around a call that gradient checkpointing computes again.

A checkpointed call is computed a second time in backward, after `with_context` and `override` have ended. What they
had set is kept here with the rows of the call, by which the second run is known.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from mmoe.errors import Refused
from mmoe.routing import Context

MOST = 256
_REENTRANT = CheckpointFunction.forward.__code__
_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Around = tuple[Context | None, Callable[..., Any] | None]
A = TypeVar("A")


def in_backward() -> bool:
    """True where backward runs, and with it what checkpoints compute again."""
    return torch._C._current_graph_task_id() != -1


def in_checkpoint() -> bool:
    """True where a forward runs that backward runs again."""
    return _has_hooks() if torch.is_grad_enabled() else _in_reentrant_checkpoint()


def _has_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _in_reentrant_checkpoint() -> bool:
    """Reentrant checkpoints only switch gradients off, as many others do; they show on the stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _REENTRANT:
            return True
        frame = frame.f_back
    return False


@dataclass
class _Call(Generic[A]):
    known_by: tuple[Any, ...]
    around: A
    ran_again: bool = False


@dataclass
class Calls(Generic[A]):
    """Calls of one layer that backward may run again, the latest last.

    Attributes:
        nothing: what stands around a call that needs nothing.
        calls: those that wait, and those that ran again since the last forward.
        dropped: some that had something around them are no longer there.
    """

    nothing: A | None = None
    calls: list[_Call[A]] = field(default_factory=list)
    dropped: bool = False

    def keep(self, rows: Tensor, around: A) -> None:
        """Notes what stands around a call with rows (T, D)."""
        calls = [*(call for call in self.calls if not call.ran_again), _Call(_known_by(rows), around)]
        gone = [*(call for call in self.calls if call.ran_again), *calls[:-MOST]]
        self.dropped |= any(call.around != self.nothing for call in gone)
        self.calls = calls[-MOST:]

    def find(self, rows: Tensor, now: A) -> A:
        """What stood around the first run of a call; what stands there now if it has none.

        Raises:
            Refused: it is not known which one it was.
        """
        known_by = _known_by(rows)
        found = [call for call in self.calls if call.known_by == known_by]
        if not found and not self.dropped:
            return now
        if not found or not all(_as_data(call.around) == _as_data(found[0].around) for call in found):
            none = f"its rows are not those of one of the last {MOST} calls that wait for backward"
            wrong = "the same rows came under different ones" if found else none
            asked = "tell which context and override a checkpointed call had"
            raise Refused(asked, wrong, "run backward after each forward, or the layer without checkpointing")
        for call in found:
            call.ran_again = True
        return found[0].around


def _known_by(rows: Tensor) -> tuple[Any, ...]:
    """Shape and exact checksum of each row."""
    bits = rows.detach().contiguous().view(_WHOLE_NUMBERS[rows.itemsize])
    return tuple(rows.shape), rows.dtype, hash(bits.sum(-1).cpu().numpy().tobytes())


def _as_data(value: Any) -> Any:
    """What can be compared: tensors inside a context cannot."""
    if isinstance(value, tuple):
        return [_as_data(item) for item in value]
    if isinstance(value, Context):
        return [_as_data(getattr(value, f.name)) for f in fields(value)]
    return (value.shape, value.tolist()) if isinstance(value, Tensor) else value
