"""Checkpoints of a stage: written whole or not at all, checked when they are read, the last few kept.

    checkpoints/step_00000100/state.pt        what the stage needs to go on to the same bits
                              weights/        of a sharded model weights and optimiser, each process its part
                              manifest.json   size and checksum of every file; written last

A folder has its name only once everything in it is on the disk. A damaged newest one is passed over for the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmoe.errors import BadInput, CorruptFile

STATE, MANIFEST, WEIGHTS = "state.pt", "manifest.json", "weights"
FREE_SPACE = "free space, then the same command with --resume"


@dataclass
class State:
    """What a stage knows besides weights and optimisers.

    Attributes:
        step: steps that are done.
        losses: of the last logged interval.
        seconds: of training so far, over all interruptions.
        best: value of the metric that is kept, and its step.
        best_metrics: all metrics of that step.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    best: tuple[float, int] | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        folder: that holds them.
        keep_last: so many stay.
        is_main: this process writes what is not sharded.
        wait: waits for the other processes.
    """

    def __init__(
        self, folder: Path, keep_last: int = 2, is_main: bool = True, wait: Callable[[], object] = lambda: None
    ) -> None:
        self.folder, self.keep_last, self.is_main, self.wait = folder, keep_last, is_main, wait

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, the last one first."""
        found = [path.name.removeprefix("step_") for path in self.folder.glob("step_*")]
        return sorted((int(number) for number in found if number.isdecimal()), reverse=True)

    def save(self, step: int, state: dict[str, Any], sharded: Callable[[Path], None] | None = None) -> Path:
        """Writes a checkpoint and removes the oldest.

        Args:
            step: steps that are done.
            state: plain values and tensors.
            sharded: writes the weights into a folder, called in every process.

        Raises:
            BadInput: it cannot be written; the others stay.
        """
        target = self._path(step)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            if self.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            self.wait()
            if sharded is not None:
                sharded(temporary / WEIGHTS)
            if self.is_main:
                with (temporary / STATE).open("wb") as file:  # told a path, torch hides why it could not write
                    torch.save(state, file)
                _close(temporary)
                shutil.rmtree(target, ignore_errors=True)
                temporary.rename(target)
                _sync(target.parent)
                self._remove_old()
        except (OSError, RuntimeError) as error:  # torch's zip writer hides the file's own error
            shutil.rmtree(temporary, ignore_errors=True)
            cause = _cause(error)
            if cause is None:
                raise
            kept = ", ".join(map(str, self.steps())) or "none"
            wrong = f"{cause.strerror or cause}; checkpoints that are there: {kept}"
            raise BadInput(f"cannot write '{target}'", wrong, FREE_SPACE) from error
        self.wait()
        return target

    def newest(self) -> tuple[int, Path, dict[str, Any]] | None:
        """The last checkpoint that is whole: its step, folder and state; None where there is none.

        Raises:
            CorruptFile: there are some, and all are damaged.
        """
        damaged = []
        for step in self.steps():
            path = self._path(step)
            try:
                check(path)
                state = torch.load(path / STATE, weights_only=True, map_location="cpu")
            except CorruptFile as error:
                damaged.append(error)
                continue
            for error in damaged:
                warnings.warn(f"{error.asked}: {error.wrong}; going on from step {step}", stacklevel=2)
            return step, path, state
        if damaged:
            raise damaged[0]
        return None

    def clear(self) -> None:
        """Removes all of them, when the stage is done."""
        if self.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _remove_old(self) -> None:
        for step in self.steps()[self.keep_last :]:
            shutil.rmtree(self._path(step), ignore_errors=True)


def _cause(error: BaseException | None) -> OSError | None:
    """What the system said, behind the errors of torch's zip writer."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _close(folder: Path) -> None:
    """Writes the manifest, and everything to the disk."""
    files = {str(path.relative_to(folder)): [path.stat().st_size, _digest(path)] for path in _files(folder)}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1))
    for path in [*_files(folder), *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(path)


def check(folder: Path) -> None:
    """Makes sure that a checkpoint is as it was written.

    Raises:
        CorruptFile: it is not.
    """
    fix = f"rm -r '{folder}'"
    try:
        files = json.loads((folder / MANIFEST).read_text())
        if not isinstance(files, dict) or STATE not in files:
            raise CorruptFile(f"cannot use the checkpoint '{folder}'", f"{MANIFEST} is damaged", fix)
        for name, (size, digest) in files.items():
            path = folder / name
            if path.stat().st_size != size or _digest(path) != digest:
                raise CorruptFile(f"cannot use the checkpoint '{folder}'", f"{name} is damaged", fix)
    except (OSError, ValueError, TypeError) as error:
        raise CorruptFile(f"cannot use the checkpoint '{folder}'", f"it is not whole: {error}", fix) from error


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
