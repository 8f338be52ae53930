"""`mmoe eval`: a model on a data set, with where the numbers come from."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

import zoo
from mmoe.atomic import atomic_path
from mmoe.errors import BadInput
from train.data import build
from train.recipe import Recipe
from train.sections import DataSection
from train.stages import RECIPE, provenance
from train.tasks import tasks
from train.tune import load_adapters
from zoo.model import Model


def measure(
    name: str,
    on: str | None = None,
    task: str | None = None,
    limit: int | None = None,
    out: Path | None = None,
    to_card: bool = False,
) -> dict[str, Any]:
    """Metrics of a model, with provenance.

    Args:
        name: folder of a run, folder of a model, or a name of the zoo.
        on: data set, as "NAME" or "NAME:PATH"; that of the run when None.
        task: what is measured; the data set's own when None.
        limit: so many samples.
        out: JSON file for the results.
        to_card: adds them to the card in the model's folder.
    """
    recipe = _recipe_of(Path(name))
    section = _data(on, recipe, limit)
    model, folder = find_model(name, recipe)
    data = build(section, "eval", seed=0)
    chosen = tasks.build(task or section.task or data.task)
    with torch.no_grad():
        metrics = chosen.measure(model, data)
    options = {"--on": on, "--task": task, "--limit": limit}
    command = " ".join(["mmoe eval", name, *(f"{key} {value}" for key, value in options.items() if value is not None)])
    results = {
        "model": name,
        "data": section.name,
        "task": tasks.name_of(chosen),
        "samples": len(data),
        "metrics": metrics,
        "provenance": {"command": command, "date": date.today().isoformat(), **provenance()},
    }
    if out is not None:
        with atomic_path(out) as temporary:
            temporary.write_text(json.dumps(results, indent=2))
    if to_card:
        _write_card(model, folder, results)
    return results


def find_model(name: str, recipe: Recipe | None) -> tuple[Model, Path | None]:
    """The trained model of a run, or one by name, and its folder."""
    folder = Path(name).expanduser()
    if recipe is None:
        return zoo.load(name, device="auto"), folder if (folder / "config.json").exists() else None
    stage = recipe.stages[-1]
    at = folder / stage.name if stage.name else folder
    if not (at / "model").exists():
        raise BadInput(f"measure the run '{name}'", "it is not finished", f"mmoe train {name} --resume")
    if (at / "model" / "adapter_config.json").exists():
        base = zoo.load(stage.model.name, stage.model.weights, device="auto", **stage.model.overrides)
        return load_adapters(base, at / "model", merge=True), None
    return zoo.load(at / "model"), at / "model"


def _recipe_of(folder: Path) -> Recipe | None:
    path = folder.expanduser() / RECIPE
    return Recipe.load(path) if path.is_file() else None


def _data(on: str | None, recipe: Recipe | None, limit: int | None) -> DataSection:
    if on is None:
        if recipe is None:
            raise BadInput("measure a model", "on which data?", "--on emoji")
        return recipe.stages[-1].data.model_copy(update={"limit": limit or recipe.stages[-1].data.limit})
    name, _, path = on.partition(":")
    return DataSection(name=name, path=Path(path) if path else None, limit=limit, held_out=0.1 if not path else 0.5)


def _write_card(model: Model, folder: Path | None, results: dict[str, Any]) -> None:
    if folder is None or model.card is None:
        raise BadInput("write into a card", "the model has no folder of its own with a card", "--out results.json")
    about = {"data": results["data"], "provenance": "ours", "command": results["provenance"]["command"]}
    entry = {**about, **results["metrics"]}
    card = replace(model.card, metrics=(*model.card.metrics, entry))
    with atomic_path(folder / "card.json") as temporary:
        temporary.write_text(json.dumps(card.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
