"""Tries a recipe before it costs anything: its options, its data, and one real step with everything around it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from mmoe.errors import BadOverride, LoadMismatch, MmoeError, UnknownName, did_you_mean
from mmoe.moe import moe_layers
from train import tune
from train.data import build
from train.data.base import SPLITS, DataSet
from train.data.loader import Steps, count_steps
from train.devices import not_here
from train.evaluate import PROBES, Task, check_fields, check_metric, tasks
from train.recipe import Recipe
from train.sections import DataSection, Stage
from zoo.config import make_config
from zoo.loading import family_class
from zoo.model import Model
from zoo.registry import model_folder
from zoo.state import load_state

_SAMPLES = 3
_SMALL = 20_000_000  # parameters of a model that is built only to try something
_EVALUATED = 16  # samples of a rehearsal's evaluation
_OPTIMISER_STATE = {"adamw": 2, "sgd": 1, "muon": 1}  # values per trained parameter


def check(recipe: Recipe) -> Iterator[str]:
    """Makes sure that models, data and tasks of a recipe are there, and opens three samples of each.

    Yields:
        A line for each thing that is well, or that a person should know.

    Raises:
        MmoeError: something is not.
    """
    earlier: dict[str, Stage] = {}
    for stage in recipe.stages:
        name = f"{stage.name}: " if stage.name else ""
        try:
            yield from (f"{name}{line}" for line in _check_stage(stage, earlier, recipe.scale.processes or 1))
        except MmoeError as error:
            if not stage.name:
                raise
            raise type(error)(f"{error.asked}, in the stage {stage.name!r}", error.wrong, error.fix) from error
        earlier[stage.name] = stage
    yield from not_here(recipe)


def _check_stage(stage: Stage, earlier: Mapping[str, Stage], processes: int) -> Iterator[str]:
    _check_start(stage, list(earlier))
    model = _shapes(stage, earlier)
    _tuned(model, stage)
    yield f"model {stage.model.name}, {_count(model):,} parameters"
    data = {split: build(_without_models(stage.data), split) for split in SPLITS}
    for split, samples in data.items():
        found = samples.samples(range(min(_SAMPLES, len(samples))))
        shown = ", ".join(f"{key} {_told(value)}" for key, value in found[0].items()) if found else "none"
        yield f"{split} data {stage.data.name}: {len(samples):,} samples; {shown}"
        yield from (f"{split} data cannot read {one}: {why}" for one, why in samples.broken.items())
    yield from (f"data {note}" for note in data["train"].notes)
    task = tasks.build(stage.data.task or data["eval"].task)
    check_fields(task, data["eval"], "data.task")
    task.check(model, data["eval"], "data.name")
    _check_steps(stage, data["train"], model, processes)
    _check_best(stage, task)
    yield f"task {tasks.name_of(task)}" if len(data["eval"]) else "nothing is measured"


def _check_steps(stage: Stage, data: DataSet, model: Model, processes: int) -> None:
    """The stage has a step, and the model trains on such samples."""
    steps = Steps(data, model, stage.data.batch_size, (stage.run.seed,), 0, processes, stage.run.accumulate)
    count_steps(stage.run, steps.per_epoch)
    few = steps.indices(0)[:2]
    data.batch(few, model, [0] * len(few))


def _check_best(stage: Stage, task: Task) -> None:
    """The task has the metric, tried on a small model of the family: names of metrics do not depend on sizes."""
    if stage.run.best is None:
        return
    section = _short(stage).model
    if _count(_meta(section.name, section.options)) > _SMALL:
        return
    model = zoo.load(section.name, False, device="cpu", **section.options)
    data = build(_without_models(stage.data.model_copy(update={"limit": PROBES})), "eval")
    check_metric(stage.run.best, task, model, data)


def _check_start(stage: Stage, earlier: list[str]) -> None:
    """What a stage begins with is an earlier stage, a folder or a model of the zoo."""
    starts = stage.start["assemble"] if isinstance(stage.start, dict) else [stage.start] if stage.start else []
    clusters = stage.data.options.get("clusters") or {}
    if not isinstance(clusters, Mapping):
        fix = "data.options={clusters: {models: [base], image: 3, text: 3}}"
        raise BadOverride(f"clusters={clusters!r}", "it names models and numbers of clusters", fix)
    if isinstance(stage.start, dict):
        _check_number(stage, len(starts))
    for start in [*starts, *(clusters.get("models") or [])]:
        if start not in earlier and model_folder(start) is None:
            try:
                zoo.card(start)
            except UnknownName as error:
                asked = f"begin the stage {stage.name!r} with {start!r}"
                raise UnknownName(
                    asked, did_you_mean(start, earlier), "a stage above it, a folder or a model"
                ) from error


def _check_number(stage: Stage, count: int) -> None:
    """As many models are assembled as the family takes."""
    found = zoo.card(stage.model.name)
    family = family_class(found.family)
    config = make_config(family.config_class, {**found.config, **stage.model.overrides}, found.name)
    wanted = family.assembled_from(vars(config))
    if wanted != count:
        wrong = f"{wanted} are taken" if wanted is not None else f"{found.family} makes no experts of models"
        fix = f"start: {{assemble: [{', '.join(['base'] * (wanted or 1))}]}}"
        raise BadOverride(f"assemble {count} models in the stage {stage.name!r}", wrong, fix)


def _without_models(section: DataSection) -> DataSection:
    """Data whose groups need models of earlier stages, without the groups."""
    return section.model_copy(update={"options": {k: v for k, v in section.options.items() if k != "clusters"}})


def _shapes(stage: Stage, earlier: Mapping[str, Stage]) -> Model:
    """The model of a stage on the meta device.

    Args:
        stage: whose model it is.
        earlier: stages before it.

    Raises:
        MmoeError: there is no such model, or what the stage begins with has not its weights.
    """
    model = _meta(*_origin(stage, earlier))
    if isinstance(stage.start, str):
        before = _shapes(earlier[stage.start], earlier) if stage.start in earlier else _meta(stage.start, {})
        fresh = [f"*{key}.*" for key in ("router", "experts") if getattr(stage.model, key) is not None]
        try:
            load_state(model, before.state_dict(), stage.start, allow_missing=fresh)
        except LoadMismatch as error:
            asked = f"begin the stage {stage.name!r} with {stage.start!r}"
            raise LoadMismatch(asked, error.wrong, f"model.overrides as {stage.start!r} has them") from error
    return model


def _origin(stage: Stage, earlier: Mapping[str, Stage]) -> tuple[str, dict[str, Any]]:
    """Name of the model that a stage's goes back to, and the options that it has by then."""
    own = {key: value for key, value in stage.model.options.items() if value is not None}
    if not isinstance(stage.start, str):
        return stage.model.name, own
    before = earlier.get(stage.start)
    name, given = (stage.start, {}) if before is None else _origin(before, earlier)
    return name, {**given, **own}


def _meta(name: str, options: Mapping[str, Any]) -> Model:
    try:
        return zoo.load(name, False, device="meta", **options)
    except BadOverride as error:
        fix = f"model.overrides={{...}} with options that mmoe info {name} tells"
        raise BadOverride(error.asked, error.wrong, fix) from error


def _tuned(model: Model, stage: Stage) -> tuple[Any, tune.Chosen]:
    """What is trained of a model; of the most used experts the first ones stand for them."""
    tune.check_patterns("change the rate of", stage.optim.factors, model, "optim.factors={'*.router.*': 10}")
    if stage.tune.method == "lora":
        return tune.add_adapters(copy.deepcopy(model), stage.tune), {}
    used = {name: -torch.arange(layer.num_experts) for name, layer in moe_layers(model).items()}
    return model, tune.freeze(model, stage.tune, used)


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _told(value: Any) -> str:
    if hasattr(value, "size") and hasattr(value, "mode"):
        return "x".join(map(str, value.size))
    if hasattr(value, "shape"):
        return "x".join(map(str, value.shape))
    text = str(value)
    return repr(text if len(text) < 40 else text[:37] + "...")


def rehearse(recipe: Recipe) -> Iterator[str]:
    """One step and one evaluation of every stage in a folder that is removed, with a checkpoint that is read back.

    A large model is replaced by the tiny one of its family.

    Yields:
        What a run would do, line by line.
    """
    from train.stages import Run

    yield from check(recipe)
    with tempfile.TemporaryDirectory() as folder:
        twins = tuple(_short(stage) for stage in recipe.stages)
        run = Run(recipe.model_copy(update={"stages": twins}), Path(folder) / "run", progress=False)
        earlier: dict[str, Stage] = {}
        for stage, twin in zip(recipe.stages, twins, strict=True):
            name = f"{stage.name}: " if stage.name else ""
            whole, chosen = _tuned(_shapes(stage, earlier), stage)
            earlier[stage.name] = stage
            yield f"{name}what is trained"
            yield tune.show_table(tune.table(whole, chosen))
            yield f"{name}memory: at least {_memory(whole, stage) / 2**20:,.0f} MB besides activations"
            if twin.model.name != stage.model.name:
                yield f"{name}tried on {twin.model.name} in place of {stage.model.name}"
            trial = run.start(twin)
            parts, _ = trial.batches[0]
            shapes = (f"{key} {tuple(value.shape)}" for key, value in parts[0].items() if isinstance(value, Tensor))
            yield f"{name}batch: {', '.join(shapes)}"
            few = twin.data.model_copy(update={"limit": _EVALUATED})
            trial.eval_data = build(_without_models(few), "eval") if trial.eval_data is not None else None
            trial.train()
            trial.save()
            step, _, _ = trial.checkpoints.newest() or (None, None, None)
            results = run.finish(twin, trial)
            yield f"{name}one step: loss {results['loss']:.4f}; the checkpoint of step {step} was read"
            if results["metrics"]:
                metric, value = next(iter(results["metrics"].items()))
                yield f"{name}one evaluation: {metric} {value:.4f}"
    yield "ready"


def _short(stage: Stage) -> Stage:
    """One step, of the tiny model of the family."""
    run = stage.run.model_copy(update={"steps": 1, "epochs": None, "save_every": None, "eval_every": None})
    names = {card.name for card in zoo.list_models()}
    model = stage.model
    if model.name in names:
        found = zoo.card(model.name)
        twin = f"{found.family}_tiny"
        if twin in names and found.params["total"] > _SMALL:
            model = model.model_copy(update={"name": twin, "weights": True, "overrides": {}})
            return stage.model_copy(update={"run": run, "model": model, **_without_names(stage)})
    return stage.model_copy(update={"run": run, "model": model})


def _without_names(stage: Stage) -> dict[str, Any]:
    """What a stage trains, without names of parts and numbers of experts that its twin may not have."""
    method = {"modules": "full", "experts": "full"}.get(stage.tune.method, stage.tune.method)
    tuned = stage.tune.model_copy(update={"method": method, "modules": (), "experts": None, "top_used": None})
    return {"tune": tuned, "optim": stage.optim.model_copy(update={"factors": {}})}


def _memory(model: torch.nn.Module, stage: Stage) -> int:
    """Bytes of weights, gradients, optimiser and moving average, with the weights that it stands in for."""
    whole = sum(p.nbytes for p in model.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return whole + trained * (1 + _OPTIMISER_STATE[stage.optim.name] + (2 if stage.run.ema else 0))
