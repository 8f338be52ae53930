"""Batches by step: step s of a stage always gets the same samples and the same random crops.

So a run that goes on after step s needs no position to be saved, only s, and it makes no difference how many processes
prepare batches ahead. Every process of a launch takes its part of each batch.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmoe.errors import BadInput, MmoeError
from train.data.base import DataSet
from train.sections import RunSection
from zoo.model import Model


def seed_of(*parts: object) -> int:
    """A seed, below 2**32, from anything that names a random choice.

    >>> seed_of(0, "base", 3) == seed_of(0, "base", 3) != seed_of(0, "base", 4)
    True
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def count_steps(run: RunSection, per_epoch: int) -> int:
    """Steps of a stage.

    Args:
        run: of the recipe.
        per_epoch: steps of one pass over the data.

    Raises:
        BadInput: there is none.
    """
    steps = run.steps or round((run.epochs or 1) * per_epoch)
    if not steps:
        raise BadInput(f"train for {run.epochs:g} epochs", f"one has {per_epoch} steps", "run.steps=1")
    return steps


class Steps(Dataset[tuple[list[dict[str, Tensor]], dict[str, str]]]):
    """Batches of a stage by the number of the step.

    Args:
        data: samples.
        model: that takes them.
        batch_size: samples of a step over all processes.
        key: seed and name of the stage; part of every random choice.
        rank, processes: this process and how many there are.
        parts: a batch is cut into so many, for accumulation.

    Attributes:
        per_epoch: steps of the first pass over the data.
    """

    def __init__(
        self,
        data: DataSet,
        model: Model,
        batch_size: int,
        key: tuple[object, ...],
        rank: int = 0,
        processes: int = 1,
        parts: int = 1,
    ) -> None:
        self.data, self.model, self.batch_size, self.key = data, model, batch_size, key
        self.rank, self.processes, self.parts = rank, processes, parts
        share = processes * parts
        if batch_size % share:
            wrong = f"{share} parts, of {processes} times {parts}, cannot have as many samples as each other"
            raise BadInput(
                f"divide batches of {batch_size}", wrong, f"data.batch_size={-(-batch_size // share) * share}"
            )
        self._pass: tuple[int, int, list[list[int]]] = (0, 0, self._epoch(0))
        self.per_epoch = len(self._pass[2])

    def _epoch(self, number: int) -> list[list[int]]:
        seed = seed_of(*self.key, "epoch", number)
        return self.data.epoch(self.batch_size, seed, self.processes * self.parts)

    def indices(self, step: int) -> list[int]:
        """Samples of a step, over all processes."""
        epoch, first, batches = self._pass
        if step < first:
            epoch, first, batches = 0, 0, self._epoch(0)
        while step >= first + len(batches):
            epoch, first = epoch + 1, first + len(batches)
            batches = self._epoch(epoch)
        self._pass = epoch, first, batches
        return batches[step - first]

    def __getitem__(self, step: int) -> tuple[list[dict[str, Tensor]], dict[str, str]]:
        """Parts of this process' batch, and the samples that could not be read so far."""
        indices = self.indices(step)
        size = len(indices) // (self.processes * self.parts)
        if not size:
            wrong, fix = f"step {step} has {len(indices)} samples", f"data.batch_size={2 * self.batch_size}"
            raise BadInput(f"share a batch among {self.processes} processes with {self.parts} parts each", wrong, fix)
        found = []
        for part in range(self.parts):
            first = (part * self.processes + self.rank) * size
            chosen = indices[first : first + size]
            seeds = [seed_of(*self.key, "sample", step, index) for index in chosen]
            found.append(self.data.batch(chosen, self.model, seeds))
        return found, dict(self.data.broken)

    def from_step(
        self, step: int, steps: int, workers: int = 0
    ) -> Iterator[tuple[list[dict[str, Tensor]], dict[str, str]]]:
        """Batches of the steps from one on.

        Args:
            step: first step.
            steps: of the stage.
            workers: processes that prepare batches ahead.
        """
        given: Any = _Guarded(self) if workers else self
        options = {"sampler": range(step, steps), "batch_size": None, "num_workers": workers}
        loader: DataLoader[Any] = DataLoader(given, worker_init_fn=_ignore_interrupts if workers else None, **options)
        for found in loader:
            if isinstance(found, MmoeError):
                raise found
            yield found


class _Guarded(Dataset[Any]):
    """Hands errors to the main process as they are; the loader would make text of them."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def __getitem__(self, step: int) -> Any:
        try:
            return self.steps[step]
        except MmoeError as error:
            return error


def _ignore_interrupts(worker: int) -> None:
    """The main process ends the workers: Ctrl-C in a terminal, and SIGTERM to a group, come to all."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
