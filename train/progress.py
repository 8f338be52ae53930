"""Progress of long work, and its interruption at a good moment.

Progress is a bar with ETA on a terminal, a line now and then elsewhere, and nothing with MMOE_QUIET=1.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

_AT_ONCE = 2.0  # seconds


class Progress:
    """Counts steps of a task.

    Args:
        name: what is being done.
        total: number of steps.
        done: steps that were done before.
        unit: what a step is.
        quiet: shows nothing.
        every: seconds between lines where there is no terminal.
    """

    def __init__(
        self, name: str, total: int, done: int = 0, *, unit: str = "steps", quiet: bool = False, every: float = 15.0
    ) -> None:
        self.name, self.total, self.done, self.unit, self.every = name, total, done, unit, every
        self.quiet = quiet or os.environ.get("MMOE_QUIET", "") not in ("", "0")
        self._bar: Any = None
        self._started = self._printed = time.monotonic()
        self._first = done

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich import console, progress

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}"),
            )
            self._bar = progress.Progress(*columns, console=console.Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.total, completed=self.done, note="")
        return self

    def update(self, done: int, **values: float) -> None:
        """Sets how many steps are done and the values shown beside."""
        self.done = done
        now = time.monotonic()
        rate = (done - self._first) / max(1e-9, now - self._started)
        note = "  ".join([f"{rate:.1f} {self.unit}/s", *(f"{key} {value:.3f}" for key, value in values.items())])
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif not self.quiet and (now - self._printed > self.every or done == self.total):
            left = timedelta(seconds=round((self.total - done) / rate)) if rate else "unknown"
            print(f"{self.name}: {done}/{self.total}  {note}  ETA {left}", file=sys.stderr, flush=True)
            self._printed = now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def interrupts_raise(error: type[BaseException]) -> Iterator[None]:
    """Ctrl-C and SIGTERM raise an error: for work after which nothing is lost, as the state is on the disk."""

    def stop(number: int, frame: object) -> None:
        raise error

    with _handled(stop):
        yield


@contextmanager
def _handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to a function, except where shells start background jobs with Ctrl-C ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def interrupts_held() -> Iterator[Callable[[], bool]]:
    """Holds Ctrl-C and SIGTERM back until the caller asks for them, so that they never stop half of a step.

    Another Ctrl-C does not wait, unless it comes at once: launchers send one more to their processes.

    >>> with interrupts_held() as interrupted:
    ...     interrupted()
    False
    """
    held: list[float] = []

    def hold(number: int, frame: object) -> None:
        now = time.monotonic()
        if held and number == signal.SIGINT and now - held[0] > _AT_ONCE:
            raise KeyboardInterrupt
        held.append(now)

    with _handled(hold):
        yield lambda: bool(held)
