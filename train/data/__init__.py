"""Data sets by name: the bundled ones, and classes that read one's own files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmoe.errors import BadInput, BadOverride, did_you_mean
from train.data import emoji, files, hub  # noqa: F401  # they register their classes
from train.data.base import DataSet, Sample, Split, data_sets
from train.sections import DataSection
from zoo.model import Model

__all__ = ["DataSet", "Sample", "build", "data_sets"]


def build(section: DataSection, split: Split, load: Callable[[str], Model] | None = None, seed: int = 0) -> DataSet:
    """The data set of a recipe.

    Args:
        section: of the recipe.
        split: "train" or "eval".
        load: reads a model by name, for data that is grouped by one.
        seed: of the run.

    Raises:
        UnknownName, BadOverride, BadInput: no such data set, option or file.
    """
    kind: Any = data_sets.get(section.name)
    if kind.needs_path and section.path is None:
        raise BadInput(f"data {section.name!r} without a path", "it is read from files of yours", "data.path=FOLDER")
    if not kind.needs_path and section.path is not None:
        raise BadInput(
            f"data {section.name!r} from '{section.path}'", "it is bundled", "without data.path, or data.name=pairs"
        )
    known = data_sets.options(section.name)
    given = {"load": load, "seed": seed, "limit": section.limit, "held_out": section.held_out, "path": section.path}
    mine = [name for name in known if name not in given]
    for name in section.options:
        if name not in mine:
            wrong = did_you_mean(name, mine) if mine else "it takes no options"
            raise BadOverride(f"{name!r} is not an option of the data {section.name!r}", wrong, "data.options={}")
    options = {name: value for name, value in given.items() if name in known}
    data: DataSet = kind(split, **options, **section.options)
    data.most_broken = section.max_broken
    return data
