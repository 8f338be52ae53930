"""`mmoe eval`: a model on a data set, with where the numbers come from."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

import zoo
from mmoe.atomic import atomic_path
from mmoe.errors import BadInput, BadOverride, MmoeError, UnknownName
from mmoe.moe import moe_layers
from mmoe.trace import trace
from train.data import DataSet, build, data_sets
from train.evaluate import Task, check_fields, suggested_data, tasks
from train.recipe import RECIPE, Recipe
from train.sections import DataSection
from train.stages import RESULTS, Models, provenance
from zoo.loading import pick_device
from zoo.model import Model
from zoo.registry import model_folder

_TRACED = 256  # samples that show how the experts are used
_USE = ("layer", "load", "use", "max_over_mean", "dead", "entropy")


def measure(
    model: str | Path | Model,
    on: str | None = None,
    task: str | None = None,
    limit: int | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    out: Path | None = None,
    to_card: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Metrics of a model, with provenance.

    Args:
        model: folder of a run, folder of a model, a name of the zoo, or a model.
        on: data set, as "NAME" or "NAME:PATH"; that of the run when None.
        task: what is measured; the data set's own when None.
        limit: so many samples.
        options: of the data set; those of the run with these changed when `on` is None.
        out: JSON file for the results.
        to_card: adds them, and how the experts are used, to the card in the model's folder.
        progress: shows a bar.

    Returns:
        "metrics" by name, and what was measured on what, when and with which versions. "trained_on" is the number of
        samples that the run was trained on too.
    """
    model = str(model) if isinstance(model, Path) else model
    if not isinstance(model, str | Model):
        asked, wrong = f"measure a {type(model).__name__}", "it is no model of the zoo, and no name or folder of one"
        raise BadInput(asked, wrong, "train.measure('clip_moe_tiny', on='emoji')")
    name = model if isinstance(model, str) else model.card.name if model.card is not None else type(model).__name__
    recipe = _recipe_of(Path(model)) if isinstance(model, str) else None
    measured, folder = find_model(model, recipe) if isinstance(model, str) else (model.eval(), None)
    section = _data(on, recipe, limit, dict(options or {}), measured)
    if to_card and (folder is None or measured.card is None):
        raise BadInput("write into a card", "the model has no folder of its own with a card", "--out results.json")
    chosen, data = _built(section, task)
    chosen.check(measured, data)
    chosen.progress = progress
    with torch.no_grad():
        metrics = chosen.measure(measured, data)
    given = [("--on", on), *(("--option", f"{key}={json.dumps(value)}") for key, value in (options or {}).items())]
    given += [("--task", task), ("--limit", limit)]
    told = [word for key, value in given if value is not None for word in (key, str(value))]
    command = shlex.join(["mmoe", "eval", name, *told])
    results = {
        "model": name,
        "data": section.name,
        "task": tasks.name_of(chosen),
        "samples": len(data) - len(data.broken),
        "trained_on": _trained_on(data, section, recipe or _recipe_of_card(measured)),
        "broken": data.broken,
        "metrics": metrics,
        "provenance": {"command": command, "date": date.today().isoformat(), **provenance()},
    }
    if out is not None:
        if out.name == RESULTS and (out.parent / "log.jsonl").exists():
            raise BadInput(f"write to '{out}'", "it is a file of the run itself", "--out another name")
        with atomic_path(out) as temporary:
            temporary.write_text(json.dumps(results, indent=2))
    if to_card and folder is not None:
        _write_card(measured, folder, results, _expert_use(measured, chosen, section))
    return results


def _built(section: DataSection, task: str | None) -> tuple[Task, DataSet]:
    """The task and the data; what is wrong is told in the options of `mmoe eval`.

    Raises:
        MmoeError: there are no such, or they do not fit.
    """
    try:
        data = build(section, "eval", seed=0)
    except BadOverride as error:
        raise BadOverride(error.asked, error.wrong, "--option KEY=VALUE; mmoe recipe data") from error
    except MmoeError as error:
        raise type(error)(error.asked, error.wrong, "--on NAME, or --on NAME:PATH; mmoe recipe data") from error
    try:
        chosen = tasks.build(task or section.task or data.task)
    except UnknownName as error:
        raise UnknownName(error.asked, error.wrong, f"--task {data.task}") from error
    check_fields(chosen, data, "--task")
    return chosen, data


def find_model(name: str, recipe: Recipe | None) -> tuple[Model, Path | None]:
    """The trained model of a run, or one by name, and its folder."""
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        asked, wrong = f"measure '{name}'", "it holds adapters without the model that they belong to"
        raise BadInput(asked, wrong, f"mmoe eval {shlex.quote(str(folder.parent))}   (the folder of their run)")
    if recipe is None:
        return zoo.load(name, device="auto"), model_folder(name)
    models, stage = Models(recipe, folder), recipe.stages[-1].name
    own = models.folder(stage) / "model"
    return models.last(stage).to(pick_device("auto")), own if (own / "config.json").exists() else None


def _recipe_of(folder: Path) -> Recipe | None:
    """The recipe of a run's folder; None where it is a model or a name.

    Raises:
        BadInput: it looks like a folder and is not there.
    """
    folder = folder.expanduser()
    if len(folder.parts) > 1 and not folder.exists() and not str(folder).startswith("hf-hub:"):
        raise BadInput(
            f"measure '{folder}'", f"there is no such folder in {Path.cwd()}", "mmoe eval clip_moe_tiny --on emoji"
        )
    return Recipe.load(folder / RECIPE) if (folder / RECIPE).is_file() else None


def _recipe_of_card(model: Model) -> Recipe | None:
    """The recipe that a card says to have trained the weights that a model was loaded with."""
    card, report = model.card, model.load_report
    source = report.source if report is not None else ""
    told = [one.recipe for one in card.weights.values() if f"({one.source})" in source and one.recipe] if card else []
    return Recipe.load(*told[0]) if told else None


def _trained_on(data: DataSet, section: DataSection, recipe: Recipe | None) -> int:
    """Of the samples, those that the weights were trained on; 0 where nothing is known of their training.

    Data in folds tell samples of one fold from another; other bundled data evaluate on samples of training on purpose.
    """
    seen: set[str] = set()
    kind: Any = data_sets.get(section.name)
    for stage in recipe.stages if recipe is not None else ():
        own = stage.data
        if kind.folds is not None and own.name == section.name and own.path is None:
            folds = {kind.folds: own.options[kind.folds]} if kind.folds in own.options else {}
            others = {name: value for name, value in section.options.items() if name != kind.folds}
            own = section.model_copy(update={"options": others | folds, "limit": None})
        elif own.path is None or section.path is None or own.path.resolve() != section.path.resolve():
            continue
        samples = build(own, "train", seed=stage.run.seed)
        seen |= {samples.name(index) for index in range(len(samples))}
    return sum(data.name(index) in seen for index in range(len(data)))


def _data(
    on: str | None, recipe: Recipe | None, limit: int | None, options: dict[str, Any], model: Model
) -> DataSection:
    if on is None:
        if recipe is None:
            fix = suggested_data(model.card.tasks) if model.card is not None else "--on emoji, or --on pairs:FOLDER"
            raise BadInput("measure a model", "it is not told on which data", fix)
        own = recipe.stages[-1].data
        return own.model_copy(update={"limit": limit or own.limit, "options": own.options | options})
    name, _, path = on.partition(":")
    held_out = 1.0 if path else 0.1
    return DataSection(name=name, path=Path(path) if path else None, limit=limit, held_out=held_out, options=options)


def _expert_use(model: Model, task: Task, section: DataSection) -> list[dict[str, Any]]:
    """How the experts of every mixture were used on some of the data."""
    if not moe_layers(model):
        return []
    few = build(section.model_copy(update={"limit": min(section.limit or _TRACED, _TRACED)}), "eval", seed=0)
    task.progress = False
    with torch.no_grad(), trace(model) as routing:
        task.measure(model, few)
    return [{key: layer[key] for key in _USE} for layer in routing.summary()]


def _write_card(model: Model, folder: Path, results: dict[str, Any], use: list[dict[str, Any]]) -> None:
    assert model.card is not None
    command = results["provenance"]["command"]
    entry = {"data": results["data"], "provenance": "ours", "command": command, **results["metrics"]}
    routing = {"data": f"{results['data']}, {_TRACED} samples at most", "command": f"{command} --card", "layers": use}
    others = [one for one in model.card.metrics if (one["data"], one.get("command")) != (entry["data"], command)]
    card = replace(model.card, metrics=(*others, entry), routing=routing if use else {})
    with atomic_path(folder / "card.json") as temporary:
        temporary.write_text(json.dumps(card.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
