"""New processes for tests, forked from a server that has the libraries in memory, so that each starts in a moment.

They are not quite a user's: modules are there before they are imported, and atexit is not run. What depends on that,
and how long a start takes, is tested with `python -m mmoe`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mmoe.parallel", "zoo.clip_moe.model", "train.stages", "peft", "tests.frozen"])
SECONDS = 240


def start(job: Callable[..., Any], *args: Any) -> int:
    """Runs job(*args) in a new process; returns its exit code, or the number of the signal that killed it, negative.

    Raises:
        TimeoutError: it hangs.
    """
    process = CONTEXT.Process(target=job, args=args)
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"it takes more than {SECONDS} s")
    return process.exitcode


def command(words: Sequence[str], folder: Path) -> CompletedProcess[str]:
    """Runs `mmoe` with these words in a folder, in a new process."""
    return _captured(folder, _mmoe, list(words))


def _captured(folder: Path, job: Callable[..., Any], *args: Any) -> CompletedProcess[str]:
    streams = [folder / f".{name}_{time.monotonic_ns()}" for name in ("stdout", "stderr")]
    for stream in streams:
        stream.touch()
    try:
        code = start(_there, folder, streams, dict(os.environ), job, args)
        texts = [stream.read_text(encoding="utf-8") for stream in streams]
    except TimeoutError as error:
        error.add_note(streams[1].read_text(encoding="utf-8"))
        raise
    finally:
        for stream in streams:
            stream.unlink()
    return CompletedProcess(args, code, *texts)


def _there(
    folder: Path, streams: Sequence[Path], environment: dict[str, str], job: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with ExitStack() as stack:
        for number, (own, stream) in enumerate(zip((sys.stdout, sys.stderr), streams, strict=True), 1):
            os.dup2(stack.enter_context(stream.open("wb")).fileno(), number)
            stack.callback(own.flush)
        job(*args)


def _mmoe(words: list[str]) -> None:
    from mmoe.cli import main

    sys.argv = ["mmoe", *words]
    sys.exit(main())


def run(world: int, job: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Runs job(rank, world, *args) in processes of one group; returns what they return, or the error they end with.

    Those that died return None.
    """
    meeting = folder / f"meeting_{time.monotonic_ns()}"
    processes = [CONTEXT.Process(target=_work, args=(rank, world, meeting, job, args)) for rank in range(world)]
    for process in processes:
        process.start()
    end = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not hung, f"processes {hung} hang"
    import torch

    files = [Path(f"{meeting}.{rank}") for rank in range(world)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _work(rank: int, world: int, meeting: Path, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    patience = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=patience)
    try:
        result: Any = job(rank, world, *args)
    except Exception as error:  # the parent tells it
        traceback.print_exc()
        result = error
    _save(result, Path(f"{meeting}.{rank}"))
    others = [Path(f"{meeting}.{other}") for other in range(world)]
    while not isinstance(result, Exception) and not all(file.exists() for file in others):
        time.sleep(0.01)  # they may still read what this one has sent
    os._exit(0)  # without the farewell to processes that may be gone


def _save(result: Any, file: Path) -> None:
    import torch

    temporary = file.with_suffix(f"{file.suffix}.tmp")
    torch.save(result, temporary)
    temporary.rename(file)
