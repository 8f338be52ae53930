"""Several data sets as one, in batches of all kinds or of one kind each."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from pydantic import ValidationError

from mmoe.errors import BadInput, BadOverride, did_you_mean
from mmoe.options import check_bool, check_float
from train.data.base import DataSet, Sample, Split, data_sets
from train.data.grouping import grouped_batches
from zoo.model import Model
from zoo.packages import PackagedFile

_EXAMPLE = "data.options={parts: {pictures: {name: emoji_names}, words: {name: dialogues}}}"
_OF_PART = ("name", "path", "weight", "options")


@data_sets.register("mixture")
class Mixture(DataSet):
    """Samples of several data sets, each measured by its own task.

    Args:
        split: "train" or "eval".
        parts: data sets by a name of one's own: {"name": of the data set, "path": of one's own data, "weight": passes
            over it in one pass over the mixture, 1 by default, "options": its own}.
        grouped: every batch is of one part, so that all processes of a step run the same encoders, and is dealt out to
            them by the size of its samples. Samples are repeated where a part fills no batch: none is left out.
        limit: uses so many samples of each part.
        load: reads a model by name, for parts that need one.
        seed: of parts that need one.
        held_out: share of one's own samples that is "eval".
    """

    fields = ("part",)
    task = "parts"
    needs_path = False

    def __init__(
        self,
        split: Split,
        *,
        parts: Mapping[str, Any] | None = None,
        grouped: bool = False,
        limit: int | None = None,
        load: Callable[[str], Model] | None = None,
        seed: int = 0,
        held_out: float = 0.1,
    ) -> None:
        from train.data import build
        from train.sections import DataSection

        super().__init__()
        check_bool("grouped", grouped)
        self.grouped, self.parts, self.weights = grouped, dict[str, DataSet](), list[float]()
        for name, told in _checked(parts).items():
            own = {key: told[key] for key in ("name", "path", "options") if key in told}
            try:
                section = DataSection(limit=limit, held_out=held_out, **own)
            except ValidationError as error:
                told_of = "; ".join(f"{one['loc'][0]}: {one['msg']}" for one in error.errors())
                raise BadOverride(f"the part {name!r} of a mixture", told_of, _EXAMPLE) from error
            self.parts[name] = build(section, split, load, seed)
            self.weights.append(told.get("weight", 1.0))
        self.notes = [note for part in self.parts.values() for note in part.notes]
        self._ends = list(accumulate(len(part) for part in self.parts.values()))

    def allow_broken(self, most: int) -> None:
        """In all parts together, and in each."""
        super().allow_broken(most)
        for part in self.parts.values():
            part.allow_broken(most)

    @classmethod
    def files(cls, options: Mapping[str, Any]) -> tuple[PackagedFile, ...]:
        """Files that the parts need."""
        from train.data import files_of

        told = _checked(options["parts"]).values() if "parts" in options else ()
        found = [file for one in told for file in files_of(one["name"], one.get("options", {}))]
        return tuple(dict.fromkeys(found))

    def __len__(self) -> int:
        return self._ends[-1]

    def _part(self, index: int) -> tuple[str, DataSet, int]:
        """Name and data of the part that a sample is of, and its number there."""
        number = bisect_right(self._ends, index)
        name = list(self.parts)[number]
        return name, self.parts[name], index - (self._ends[number - 1] if number else 0)

    def name(self, index: int) -> str:
        """The part and the name of the sample there."""
        name, part, own = self._part(index)
        return f"{name}: {part.name(own)}"

    def size(self, index: int) -> float:
        """As its part says."""
        _, part, own = self._part(index)
        return part.size(own)

    def read(self, index: int) -> Sample:
        """A sample of a part, with its name as "part"."""
        name, part, own = self._part(index)
        return {**part.read(own), "part": name}

    def drawn(self, index: int, seed: int) -> Sample:
        """As its part gives it."""
        name, part, own = self._part(index)
        return {**part.drawn(own, seed), "part": name}

    def vary(self, samples: Sequence[Sample], seeds: Sequence[int]) -> list[Sample]:
        """As their parts do."""
        found: dict[int, Sample] = {}
        for name, part in self.parts.items():
            own = [place for place, sample in enumerate(samples) if sample["part"] == name]
            found |= zip(own, part.vary([samples[i] for i in own], [seeds[i] for i in own]), strict=True) if own else ()
        return [found[place] for place in range(len(samples))]

    def epoch(self, batch_size: int, seed: int, shares: int = 1) -> list[list[int]]:
        """Batches of one pass."""
        draw = random.Random(seed)
        chosen: list[tuple[int, int]] = []
        for number, (end, weight) in enumerate(zip(self._ends, self.weights, strict=True)):
            own = range(self._ends[number - 1] if number else 0, end)
            whole, rest = divmod(max(1, round(weight * len(own))), len(own)) if own else (0, 0)
            chosen += [(number, index) for index in [*own] * whole + draw.sample(own, rest)]
        if len(chosen) < batch_size:
            raise BadInput(f"make batches of {batch_size}", f"there are {len(chosen)} samples", "data.batch_size=1")
        if not self.grouped:
            order = [index for _, index in draw.sample(chosen, len(chosen))]
            last = len(order) - len(order) % batch_size
            return [order[first : first + batch_size] for first in range(0, last, batch_size)]
        groups, indices = zip(*chosen, strict=True)
        sizes = [self.size(index) for index in indices]
        order_of = torch.Generator().manual_seed(seed)
        steps = grouped_batches(groups, sizes, batch_size // shares, shares, order_of)
        return [[indices[place] for share in step for place in share] for step in steps]


def _checked(parts: Any) -> dict[str, dict[str, Any]]:
    """Parts as a recipe has them.

    Raises:
        BadOverride: they are none, or one has an option that no part has.
    """
    if not isinstance(parts, Mapping) or not parts:
        raise BadOverride(f"a mixture of {parts!r}", "parts are data sets by a name of one's own", _EXAMPLE)
    for name, told in parts.items():
        if not isinstance(told, Mapping) or not isinstance(told.get("name"), str):
            raise BadOverride(f"the part {name!r} of a mixture", "it does not name its data set", _EXAMPLE)
        unknown = [key for key in told if key not in _OF_PART]
        if unknown:
            wrong = did_you_mean(unknown[0], _OF_PART)
            raise BadOverride(f"the part {name!r} of a mixture with {unknown[0]!r}", wrong, _EXAMPLE)
        if told["name"] == "mixture":
            raise BadOverride(f"the part {name!r} of a mixture", "it is a mixture itself", "its parts in its place")
        check_float("weight", told.get("weight", 1.0), above=0)
    return {name: dict(told) for name, told in parts.items()}
