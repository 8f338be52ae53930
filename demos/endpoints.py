"""Handlers of the gallery's events: named parameters, errors as cards, and results that come step by step.

A job that is a generator shows each value it yields. All its steps run in one thread, since locks such as that of the
models belong to threads, and it is closed at its next step once its visitor has dropped it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from contextvars import copy_context
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

import gradio as gr

from demos import look
from demos.store import quiet
from mmoe.errors import MmoeError

log = logging.getLogger("mmoe.demo")
T = TypeVar("T")


def endpoint(
    work: Callable[..., Any], names: Sequence[str], blank: Callable[[Any], list[Any]], heavy: bool, chosen: int | None
) -> Any:
    """A handler with named parameters (the API shows them) that turns errors into cards.

    Args:
        work: the job, given a note and the inputs; a generator where its results come step by step.
        names: of the inputs.
        blank: the chosen model -> what the outputs become after an error.
        heavy: the job shows its progress.
        chosen: which of the inputs is the chosen model.
    """

    def started(args: Sequence[Any]) -> Any:
        progress = args[-1] if heavy else None
        note = quiet if progress is None else (lambda text, share: progress(share, desc=text))
        return work(note, *args[: len(names)])

    def shown(result: Any) -> list[Any]:
        return ["", *(result if isinstance(result, tuple) else [result])]

    def failed(error: Exception, args: Sequence[Any]) -> list[Any]:
        if not isinstance(error, MmoeError):  # the visitor gets a sentence, the server's log the traceback
            log.error("the job %s failed", work.__qualname__, exc_info=error)
            error = MmoeError("this did not work", "an unexpected error; the server's log has it", "try another input")
        return [look.message(error), *blank(None if chosen is None else args[chosen])]

    def handler(*args: Any) -> list[Any]:
        try:
            return shown(started(args))
        except Exception as error:
            return failed(error, args)

    def streaming(*args: Any) -> Iterator[list[Any]]:
        with closing(in_one_thread(lambda: started(args))) as steps:
            try:
                for step in steps:
                    yield shown(step)
            except Exception as error:
                yield failed(error, args)

    found: Any = streaming if inspect.isgeneratorfunction(work) else handler
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in names]
    if heavy:
        parameters.append(inspect.Parameter("progress", kind, default=gr.Progress()))
    found.__signature__ = inspect.Signature(parameters)  # gradio reads it
    found.__name__ = work.__name__
    return found


def in_one_thread(make: Callable[[], Iterator[T]]) -> Iterator[T]:
    """What an iterator gives, all of it made by one thread.

    Closing it waits for nothing: the thread closes the iterator at its next value.

    >>> list(in_one_thread(lambda: iter("abc")))
    ['a', 'b', 'c']
    """
    made: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    dropped = Event()

    def run() -> None:
        try:
            steps = make()
            try:
                for step in steps:
                    if dropped.is_set():
                        return
                    made.put(("step", step))
            finally:
                getattr(steps, "close", bool)()
        except BaseException as error:
            made.put(("error", error))
        else:
            made.put(("end", None))

    Thread(target=copy_context().run, args=(run,), daemon=True).start()
    try:
        while True:
            kind, value = made.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        dropped.set()
