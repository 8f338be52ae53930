"""Finished runs of one recipe with different seeds, or on different folds too: mean and spread of every stage.

Names of metrics are "METRIC" or "PART/METRIC"; every part has a table of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from mmoe.atomic import atomic_path
from mmoe.errors import BadInput, did_you_mean
from train.data.base import data_sets
from train.evaluate import tasks
from train.recipe import RECIPE, Recipe, differences
from train.sections import Stage
from train.stages import RESULTS
from zoo.state import read_json

Entry = dict[str, Any]


def compare(folders: Sequence[str | Path], patterns: Sequence[str] = ("*",)) -> list[Entry]:
    """One entry per part and stage, as a card has them: metrics as mean and standard deviation over seeds.

    Args:
        folders: of finished runs.
        patterns: of the names of metrics.

    Raises:
        BadInput: a run is not finished, the recipes differ in more than seed and fold, or no metric has such a name.
    """
    recipes = [_recipe(Path(folder)) for folder in folders]
    seeds = _check_same(folders, recipes)
    found: dict[str, list[Entry]] = {}
    known: dict[str, None] = {}
    for stage in recipes[0].stages:
        results = [_results(Path(folder), stage) for folder in folders]
        parameters = results[0]["parameters"]
        more = {"seeds": seeds}, {"provenance": "ours", "command": _command(recipes, seeds)}
        for model, measured in _checkpoints(stage, stage.name or recipes[0].name, results).items():
            for part, metrics in _by_part(measured[0], patterns).items():
                numbers = _spread({name: [one[key] for one in measured] for name, key in metrics.items()})
                about: Entry = {"data": _data(stage, part), "model": model}
                found.setdefault(part, []).append(about | parameters | more[0] | numbers | more[1])
        known |= dict.fromkeys(results[0]["metrics"])
    if not found:
        raise BadInput(f"compare {', '.join(patterns)}", did_you_mean(patterns[0], list(known)), "--metric '*'")
    return [entry for entries in found.values() for entry in entries]


def write_entries(path: Path, entries: Sequence[Entry]) -> None:
    """The entries as the `metrics` of a card, one a line."""
    lines = [yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=10**6).strip() for entry in entries]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"- {line}\n" for line in lines), encoding="utf-8")


def _recipe(folder: Path) -> Recipe:
    if not (folder / RECIPE).is_file():
        raise BadInput(f"no run in '{folder}'", f"it has no {RECIPE}", "a folder of mmoe train")
    return Recipe.load(folder / RECIPE)


def _check_same(folders: Sequence[str | Path], recipes: Sequence[Recipe]) -> list[int]:
    """Seeds of runs that differ in nothing else but the fold of their data."""
    for folder, recipe in zip(folders[1:], recipes[1:], strict=True):
        free = "run.seed", *(f"data.options.{name}" for name in _folds(recipe))
        others = [told for told in differences(recipes[0], recipe) if not told.partition(":")[0].endswith(free)]
        if others:
            raise BadInput(f"compare '{folder}' with '{folders[0]}'", "\n".join(others), "runs of one recipe")
    seeds = [recipe.stages[0].run.seed for recipe in recipes]
    if len(set(seeds)) < len(seeds):
        raise BadInput("compare runs", f"their seeds are {', '.join(map(str, seeds))}", "runs with different seeds")
    return seeds


def _folds(recipe: Recipe) -> dict[str, int]:
    """Options that say which fold is evaluated on, where the recipe has them."""
    found = {}
    for stage in recipe.stages:
        data: Any = data_sets.get(stage.data.name)
        name = data.folds
        if name in stage.data.options:
            found[name] = stage.data.options[name]
    return found


def _results(folder: Path, stage: Stage) -> Mapping[str, Any]:
    path = folder / stage.name / RESULTS
    if not path.exists():
        wrong = f"its stage {stage.name!r} is not finished" if stage.name else "it is not finished"
        raise BadInput(f"compare '{folder}'", wrong, f"mmoe train {folder} --resume")
    return read_json(path, f"rm '{path}'   (the stage begins again)")


def _checkpoints(stage: Stage, name: str, results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, float]]]:
    """Metrics of each run at its end, and at the step that was best by what the recipe keeps."""
    last = [result["metrics"] for result in results]
    best = [(result.get("best") or {}).get("metrics") for result in results]
    if not all(best):
        return {name: last}
    return {f"{name}, last step": last, f"{name}, best by {stage.run.best}": best}


def _spread(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean and, of several, standard deviation by name."""
    found = {}
    for name, numbers in values.items():
        found[name] = round(statistics.mean(numbers), 4)
        if len(numbers) > 1:
            found[f"{name} sd"] = round(statistics.stdev(numbers), 4)
    return found


def _by_part(metrics: Mapping[str, float], patterns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Names of metrics, and their keys, by part."""
    found: dict[str, dict[str, str]] = {}
    for key in metrics:
        if any(fnmatchcase(key, pattern) for pattern in patterns):
            part, _, name = key.rpartition("/")
            found.setdefault(part, {})[name] = key
    return found


def _data(stage: Stage, part: str) -> str:
    """What was measured on, in words."""
    data: Any = data_sets.get(stage.data.name)
    words = tasks.build(stage.data.task or data.task).about(data.group_name(part, stage.data.options))
    return f"{stage.data.name}: {words}" if part else stage.data.name


def _command(recipes: Sequence[Recipe], seeds: Sequence[int]) -> str:
    """What makes the runs, with letters for values that differ: S the seed, F the fold where it is another number."""
    values: dict[str, Sequence[int]] = {"S": seeds}
    told = {"run.seed": "S"}
    for name in _folds(recipes[0]):
        folds = [_folds(recipe)[name] for recipe in recipes]
        letter = "S" if folds == list(seeds) else "F"
        values[letter] = folds
        told[f"data.options.{name}"] = letter
    short = {letter: str(all_[0]) if len(set(all_)) == 1 else letter for letter, all_ in values.items()}
    options = " ".join(f"{option}={short[letter]}" for option, letter in told.items())
    each = [f", {letter} = {', '.join(map(str, values[letter]))}" for letter in values if short[letter] == letter]
    return f"mmoe train {recipes[0].name} {options}{''.join(each)}"
