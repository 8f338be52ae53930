"""Runs a recipe: its stages one after the other in one folder, resumed where it was stopped.

runs/NAME/recipe.yaml           the resolved recipe with versions, commit and seed; runs as it is
          STAGE/log.jsonl       one line per logged step and evaluation
                checkpoints/    to go on from, until the stage is done
                best/  model/   folders that `zoo.load` reads; with LoRA what peft writes
                results.json    written last: the stage is done
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, set_seed

import mmoe
import zoo
from mmoe.atomic import atomic_path
from mmoe.errors import BadInput, MissingExtra, UnknownName, did_you_mean
from train import tune
from train.data import build
from train.engine import StageRun
from train.evaluate import tasks
from train.log import RunLog
from train.recipe import Recipe, differences
from train.rehearse import check
from train.sections import Stage
from zoo.model import Model
from zoo.state import read_json

RECIPE, RESULTS = "recipe.yaml", "results.json"


def run(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    stages: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Runs a recipe.

    Args:
        recipe: of `Recipe.load`.
        out: folder of the run; runs/NAME when None.
        resume: goes on with the run in that folder.
        stages: runs only these; what they start from has to be there.
        progress: shows bars.

    Returns:
        What came out, by stage.

    Raises:
        BadInput: the folder holds another run, or one without `resume`.
    """
    for _ in check(recipe):
        pass  # what is wrong with a later stage is told now
    return Run(recipe, Path(out or Path("runs") / recipe.name), resume, progress).run(stages)


class Models:
    """Models of a run: what a stage begins with, and what it ended with.

    Args:
        recipe: of the run.
        out: folder of the run.
    """

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe, self.out = recipe, out

    def folder(self, stage: str) -> Path:
        """Of a stage; of a recipe without stages the run's own."""
        return self.out / stage if stage else self.out

    def first(self, stage: Stage) -> Model:
        """The model that a stage begins with."""
        section, start = stage.model, stage.start
        options = _options(stage)
        if isinstance(start, dict):
            models, card = [self.last(name) for name in start["assemble"]], zoo.card(section.name)
            model = models[0].assemble(models, {**card.config, **section.overrides})
            model.card = card
        elif start is None:
            model = zoo.load(section.name, section.weights, device="cpu", **options)
        else:
            model = self.last(start, options)
        told = {"balance_coef": stage.moe.balance_coef, "z_coef": stage.moe.z_coef}
        own = {name: value for name, value in told.items() if value is not None and hasattr(model.config, name)}
        model.config = replace(model.config, **own)
        return model

    def last(self, name: str, options: Mapping[str, Any] | None = None) -> Model:
        """The trained model of a stage, a folder or a card.

        Args:
            name: of it.
            options: to load it with; its own when None.
        """
        folder = self._where(name)
        if not (Path(folder) / "adapter_config.json").exists():
            return zoo.load(folder, device="cpu", **options or {})
        (stage,) = (stage for stage in self.recipe.stages if stage.name == name)
        if options is not None and options != _options(stage):
            asked, wrong = f"change the model of the stage {name!r}", "its adapters fit it as it was trained"
            raise BadInput(asked, wrong, "model.overrides as that stage has them")
        model: Model = tune.load_adapters(self.first(stage), folder, merge=True)
        return model

    def _where(self, name: str) -> str:
        if name not in {stage.name for stage in self.recipe.stages}:
            return name
        folder = self.folder(name)
        if not (folder / RESULTS).exists():
            asked = f"use the model of the stage {name!r}" if name else f"use the model of '{self.out}'"
            fix = f"mmoe train {self.out} --resume" + (f" --stage {name}" if name else "")
            raise BadInput(asked, f"it is not finished in '{self.out}'" if name else "it is not finished", fix)
        return str(folder / "model")


class Run:
    """One recipe in one folder.

    Args:
        recipe: of `Recipe.load`.
        out: folder.
        resume: it may hold a part of this run.
        progress: shows bars.
    """

    def __init__(self, recipe: Recipe, out: Path, resume: bool = False, progress: bool = True) -> None:
        self.recipe, self.out, self.progress = recipe, out, progress
        self.models = Models(recipe, out)
        self._steps = 0  # of stages that are done
        self._check_folder(resume)
        self.accelerator = make_accelerator(recipe, out)
        _check_scale(recipe, self.accelerator)
        self.accelerator.wait_for_everyone()  # all have looked at the folder before one writes into it

    def _check_folder(self, resume: bool) -> None:
        """Makes sure that the folder holds no other run."""
        path = self.out / RECIPE
        if path.exists():
            if not resume:
                fix = f"--resume goes on with it; --out {self.out}_2 begins anew"
                raise BadInput(f"train in '{self.out}'", "it holds a run", fix)
            before = Recipe.load(path)
            if before != self.recipe:
                told = "\n".join(differences(before, self.recipe))
                raise BadInput(f"go on with '{self.out}'", told, f"mmoe train {self.out} --resume")
        elif resume and not self.out.exists():
            raise BadInput(f"go on with '{self.out}'", "there is no such folder", "the same command without --resume")

    def _claim(self) -> None:
        """Writes the resolved recipe into the folder."""
        if self.accelerator.is_main_process and not (self.out / RECIPE).exists():
            self.recipe.save(self.out / RECIPE, provenance())
        self.accelerator.wait_for_everyone()

    def run(self, only: Sequence[str] = ()) -> dict[str, Any]:
        """Runs all stages, or some; those that are done are read."""
        names = [stage.name for stage in self.recipe.stages]
        for name in only:
            if name not in names:
                raise UnknownName(
                    f"no stage {name!r} in '{self.recipe.name}'", did_you_mean(name, names), f"--stage {names[0]}"
                )
        found = {}
        for stage in self.recipe.stages:
            if not only or stage.name in only:
                found[stage.name] = self._stage(stage)
                self._steps += found[stage.name]["steps"]
        return found

    def _stage(self, stage: Stage) -> dict[str, Any]:
        folder = self.models.folder(stage.name)
        if (folder / RESULTS).exists():
            return read_json(folder / RESULTS, f"rm -r '{folder}'   (the stage begins again)")
        return self.finish(stage, self.start(stage))

    def start(self, stage: Stage) -> StageRun:
        """A stage before its first step."""
        folder, seed = self.models.folder(stage.name), stage.run.seed
        set_seed(seed)
        model = self.models.first(stage)
        data = build(stage.data, "train", self.models.last, seed), build(stage.data, "eval", self.models.last, seed)
        task = tasks.build(stage.data.task or data[0].task)
        log = RunLog(folder / "log.jsonl", self.accelerator, stage.name, self._steps)
        return StageRun(stage, self.recipe.scale, model, data, task, folder, self.accelerator, log, self.progress)

    def finish(self, stage: Stage, stage_run: StageRun) -> dict[str, Any]:
        """Runs a stage to its end."""
        self._claim()
        if stage_run.shows:
            print(tune.show_table(stage_run.table), file=sys.stderr)
        results = stage_run.run()
        if self.accelerator.is_main_process:
            with atomic_path(self.models.folder(stage.name) / RESULTS) as temporary:
                temporary.write_text(json.dumps(results, indent=2))
            stage_run.checkpoints.clear()
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()  # it holds on to what it prepared
        return results


def _options(stage: Stage) -> dict[str, Any]:
    """What `zoo.load` is told besides name and weights."""
    return {"router": stage.model.router, "experts": stage.model.experts, **stage.model.overrides}


def make_accelerator(recipe: Recipe, out: Path) -> Accelerator:
    """The device, the precision and the trackers that a recipe asks for.

    Raises:
        BadInput: its stages differ in precision, or this machine has none such.
        MissingExtra: a tracker is not installed.
    """
    precision, *others = dict.fromkeys(stage.run.precision for stage in recipe.stages)
    if others:
        wrong = f"its stages ask for {precision} and {', '.join(others)}"
        raise BadInput(f"run '{recipe.name}' in one go", wrong, f"run.precision={precision}")
    gpu = torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and not gpu:
        raise BadInput("train in fp16", "there is no GPU, and fp16 on a CPU overflows", "run.precision=bf16")
    if "wandb" in recipe.log and find_spec("wandb") is None:  # accelerate would say nothing
        raise MissingExtra("log to wandb", "the package 'wandb' is not installed", "pip install 'mmoe[wandb]'")
    AcceleratorState._reset_state()  # of another run in this process, with another precision
    accelerator = Accelerator(
        cpu=not gpu,
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(recipe.log) or None,
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "tensorboard")),
    )
    accelerator.init_trackers("mmoe", init_kwargs={"wandb": {"name": recipe.name, "dir": str(out)}})
    return accelerator


def _check_scale(recipe: Recipe, accelerator: Accelerator) -> None:
    """accelerate starts one process where it cannot start several, shards nothing on CPUs, and says nothing."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        wrong = "a recipe says itself what is sharded"
        raise BadInput(
            "train with accelerate's FSDP", wrong, "accelerate launch --multi_gpu -m train ... scale.shard=fsdp"
        )
    wanted, there = recipe.scale.processes, accelerator.num_processes
    if wanted is not None and wanted != there:
        fix = f"mmoe train {recipe.name} --launch {wanted}"
        raise BadInput(f"train with {wanted} processes", f"{there} were started", fix)
    parallel = recipe.scale.expert_parallel
    if there % parallel:
        raise BadInput(f"expert_parallel: {parallel}", f"there are {there} processes", "scale.expert_parallel=1")
    if (recipe.scale.shard == "fsdp" or parallel > 1) and any(stage.optim.name == "muon" for stage in recipe.stages):
        raise BadInput(
            "shard a model that Muon trains", "Muon needs whole matrices", "optim.name=adamw optim.muon_lr=null"
        )


def provenance() -> dict[str, str]:
    """Versions and commit that a run was made with."""
    packages = {
        name: metadata.version(name) for name in ("torch", "open_clip_torch", "transformers", "accelerate", "peft")
    }
    return {"mmoe": f"{mmoe.__version__} {_commit()}".strip(), "python": platform.python_version(), **packages}


def _commit() -> str:
    """The commit of the checkout that this file is in, or nothing."""
    here = Path(__file__).parent
    told = subprocess.run(
        ["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return told.stdout.strip()
