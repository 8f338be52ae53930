"""A short training of a model in memory: no recipe file, no folder. For notebooks, tours and tests."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from mmoe.errors import BadInput
from mmoe.options import check_float, check_int
from train import tune
from train.data import build
from train.devices import make_accelerator
from train.engine import StageRun
from train.evaluate import tasks
from train.log import RunLog
from train.recipe import Recipe
from train.sections import DataSection, ModelSection, OptimSection, RunSection, Stage, TuneSection
from zoo.model import Model


def fine_tune(
    model: Model,
    steps: int = 20,
    *,
    lr: float = 3e-3,
    trainable: str | Sequence[str] = ("*.router.*",),
    data: str = "emoji",
    path: str | Path | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> list[float]:
    """Trains a model where it is, its routers by default; returns the loss of every step.

    Args:
        model: trained in place; afterwards it is where it was, in its mode, with the same parameters frozen.
        steps: optimiser steps.
        lr: peak learning rate. The default is for routers; all weights of a trained model want about 1e-4.
        trainable: pattern of parameter names, or several; "*" is all.
        data: name of a data set.
        path: of one's own data.
        batch_size: samples of a step.
        progress: shows a bar on a terminal.

    Raises:
        BadOverride: no steps, no learning rate or no batch. BadInput: no parameter has such a name, or no such data.
    """
    if not isinstance(model, Model):
        asked, fix = f"fine-tune a {type(model).__name__}", "train.fine_tune(zoo.load('clip_moe_tiny'))"
        raise BadInput(asked, "it is no model of the zoo", fix)
    check_int("steps", steps, 1)
    check_float("lr", lr, above=0, usual=3e-3)
    check_int("batch_size", batch_size, 1)
    patterns = (trainable,) if isinstance(trainable, str) else tuple(map(str, trainable))
    tune.check_patterns("train", patterns, model, "trainable='*.mlp.*'")
    stage = Stage(
        name="fine_tune",
        model=ModelSection(name=model.family),
        tune=TuneSection(method="modules", modules=patterns),
        data=DataSection(name=data, path=None if path is None else Path(path), batch_size=batch_size, held_out=0.0),
        optim=OptimSection(lr=lr, weight_decay=0.1),
        run=RunSection(steps=steps, precision="fp32", log_every=steps, save_every=None),
    )
    recipe = Recipe(name="fine_tune", stages=(stage,), log=())
    frozen = {name: not parameter.requires_grad for name, parameter in model.named_parameters()}
    device, was_training = model.device, model.training
    try:
        with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
            samples, accelerator = build(stage.data, "train"), make_accelerator(recipe, Path(folder))
            log = RunLog(Path(folder) / "log.jsonl", accelerator)
            parts = (samples, None), tasks.build(samples.task), Path(folder), accelerator, log, progress
            return StageRun(stage, recipe.scale, model, *parts).train()
    finally:
        model.to(device).train(was_training).zero_grad()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not frozen[name])
