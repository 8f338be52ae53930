"""Runs a recipe: its stages one after the other in one folder, resumed where it was stopped.

runs/NAME/recipe.yaml           the resolved recipe with versions, commit and seed; runs as it is
          STAGE/log.jsonl       one line per logged step and evaluation
                checkpoints/    to go on from, until the stage is done
                best/  model/   folders that `zoo.load` reads; with LoRA what peft writes
                results.json    written last: the stage is done
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, set_seed

import mmoe
import zoo
from mmoe.atomic import atomic_path
from mmoe.errors import BadInput, CorruptFile, LoadMismatch, UnknownName, did_you_mean
from train import tune
from train.checkpoint import Checkpoints
from train.data import build
from train.data.base import SPLITS
from train.devices import check_scale, make_accelerator
from train.engine import CHECKPOINTS, StageRun
from train.evaluate import PROBES, check_metric, tasks
from train.log import RunLog
from train.recipe import RECIPE, Recipe, detours
from train.rehearse import check
from train.sections import Stage
from zoo.model import Model
from zoo.state import read_json

RESULTS = "results.json"
LOCK = ".lock"  # stays in the folder, so that two runs never lock two files


def run(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    stages: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Runs a recipe.

    Args:
        recipe: of `Recipe.load`, or what it takes.
        out: folder of the run; runs/NAME when None.
        resume: goes on with the run in that folder.
        stages: runs only these; what they start from has to be there.
        progress: shows bars.

    Returns:
        What came out, by stage.

    Raises:
        BadInput: the folder holds another run, or one without `resume`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
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
        """The model that a stage begins with; what is random in it comes from the stage's seed."""
        with torch.random.fork_rng():
            torch.manual_seed(stage.run.seed)
            return self._first(stage)

    def _first(self, stage: Stage) -> Model:
        section, start = stage.model, stage.start
        options = section.options
        if isinstance(start, dict):
            models, card = [self.last(name) for name in start["assemble"]], zoo.card(section.name)
            model = models[0].assemble(models, {**card.config, **section.overrides})
            model.card = card
        elif start is None:
            try:
                model = zoo.load(section.name, section.weights, device="cpu", **options)
            except LoadMismatch as error:
                fix = "model.weights=false (random ones), or other model.overrides"
                raise LoadMismatch(error.asked, error.wrong, fix) from error
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
        if options is not None and options != stage.model.options:
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
            fix = f"mmoe train {shlex.quote(str(self.out))} --resume" + (f" --stage {name}" if name else "")
            fix = fix if (self.out / RECIPE).exists() else f"the same command with --stage {name}"
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
        self.recipe, self.out, self.progress = recipe.located(), out, progress
        self.models = Models(self.recipe, out)
        self._steps = 0  # of stages that are done
        self._lock: Any = None
        self._check_folder(resume)
        self.accelerator = make_accelerator(recipe, out)
        check_scale(recipe, self.accelerator)
        self.accelerator.wait_for_everyone()  # all have looked at the folder before one writes into it

    def _check_folder(self, resume: bool) -> None:
        """Makes sure that the folder holds no other run."""
        path, told = self.out / RECIPE, shlex.quote(str(self.out))
        if (self.out / "config.json").exists():
            raise BadInput(f"train in '{self.out}'", "it is the folder of a model", "--out runs/NAME")
        if path.exists():
            if not resume:
                wrong = "it holds a run; --resume goes on with it, another --out begins anew"
                raise BadInput(f"train in '{self.out}'", wrong, f"mmoe train {told} --resume")
            changed = detours(Recipe.load(path), self.recipe, self._begun())
            if changed:
                wrong = "\n".join([*changed, "its weights would not be those of one run; another --out begins anew"])
                raise BadInput(f"go on with '{self.out}'", wrong, f"mmoe train {told} --resume")
        elif resume:
            wrong = f"it has no {RECIPE}" if self.out.exists() else "there is no such folder"
            raise BadInput(f"go on with '{self.out}'", wrong, "the same command without --resume")
        elif self.out.is_dir() and any(file.name != LOCK for file in self.out.iterdir()):
            raise BadInput(f"train in '{self.out}'", "it holds other files", "--out runs/NAME")

    def _begun(self) -> set[str]:
        """Stages that have weights already."""
        folders = {stage.name: self.models.folder(stage.name) for stage in self.recipe.stages}
        written = {name: (folder / RESULTS, folder / CHECKPOINTS) for name, folder in folders.items()}
        return {name for name, files in written.items() if any(file.exists() for file in files)}

    def _claim(self) -> None:
        """Takes the folder for this process and writes the resolved recipe into it."""
        if self._lock is not None:
            return
        wrong = None
        try:
            self._lock = _Lock(self.out if self.accelerator.is_main_process else None)
        except BadInput as error:
            wrong = error
        (wrong,) = broadcast_object_list([wrong])  # the others would wait for one that gave up
        if wrong is not None:
            raise wrong
        if self.accelerator.is_main_process:
            self.recipe.save(self.out / RECIPE, provenance())
        self.accelerator.wait_for_everyone()

    def run(self, only: Sequence[str] = ()) -> dict[str, Any]:
        """Runs all stages, or some; those that are done are read."""
        names = [stage.name for stage in self.recipe.stages]
        for name in only:
            if name not in names:
                wrong = did_you_mean(name, names) if names[0] else "it has no stages"
                fix = f"--stage {names[0]}" if names[0] else "the same command without --stage"
                raise UnknownName(f"no stage {name!r} in '{self.recipe.name}'", wrong, fix)
        found = {}
        try:
            for stage in self.recipe.stages:
                if not only or stage.name in only:
                    found[stage.name] = self._stage(stage)
                    self._steps += found[stage.name]["steps"]
        finally:
            if self._lock is not None:
                self._lock.release()
        return found

    def _stage(self, stage: Stage) -> dict[str, Any]:
        folder = self.models.folder(stage.name)
        if (folder / RESULTS).exists():
            if self.accelerator.is_main_process:
                Checkpoints(folder / CHECKPOINTS).clear()
            if self.progress and self.accelerator.is_main_process:
                print(f"{folder}: it was finished before", file=sys.stderr)
            fix = f"rm -r {shlex.quote(str(folder))}   (the stage begins again)"
            results: dict[str, Any] = read_json(folder / RESULTS, fix)
            if not isinstance(results, dict) or not {"steps", "metrics", "loss", "best"} <= set(results):
                raise CorruptFile(f"cannot read '{folder / RESULTS}'", "it is not what a stage writes", fix)
            return results
        return self.finish(stage, self.start(stage))

    def start(self, stage: Stage) -> StageRun:
        """A stage before its first step."""
        folder, seed = self.models.folder(stage.name), stage.run.seed
        set_seed(seed)
        model = self.models.first(stage)
        train, held = (build(stage.data, split, self.models.last, seed) for split in SPLITS)
        task = tasks.build(stage.data.task or train.task)
        wandb = {"wandb": {"name": self.recipe.name, "dir": str(self.out)}}
        log = RunLog(folder / "log.jsonl", self.accelerator, stage.name, self._steps, wandb)
        for note in train.notes:
            log.note(note)
        if stage.run.best is not None:
            few = stage.data.model_copy(update={"limit": PROBES})
            check_metric(stage.run.best, task, model.eval(), build(few, "eval", self.models.last, seed))
        data = train, held if len(held) else None
        return StageRun(stage, self.recipe.scale, model, data, task, folder, self.accelerator, log, self.progress)

    def finish(self, stage: Stage, stage_run: StageRun) -> dict[str, Any]:
        """Runs a stage to its end."""
        self._claim()
        if self.progress:
            stage_run.log.note(tune.show_table(stage_run.table))
        results = stage_run.run()
        if self.accelerator.is_main_process:
            with atomic_path(self.models.folder(stage.name) / RESULTS) as temporary:
                temporary.write_text(json.dumps(results, indent=2))
            stage_run.checkpoints.clear()
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()  # it holds on to what it prepared
        return results


class _Lock:
    """Keeps other processes from training in a folder, until this object or its process ends.

    Args:
        folder: None locks nothing.

    Raises:
        BadInput: another process trains there.
    """

    def __init__(self, folder: Path | None) -> None:
        self._lock: Any = None
        if folder is None:
            return
        from filelock import FileLock, Timeout

        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / LOCK)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            wrong, fix = "another process trains there now", "wait for it, or another --out"
            raise BadInput(f"train in '{folder}'", wrong, fix) from error
        except OSError as error:
            raise BadInput(f"train in '{folder}'", error.strerror or str(error), "--out runs/NAME") from error

    def release(self) -> None:
        """Lets others train there."""
        if self._lock is not None:
            self._lock.release()


def provenance() -> dict[str, str]:
    """Versions and commit that a run was made with."""
    packages = {
        name: metadata.version(name) for name in ("torch", "open_clip_torch", "transformers", "accelerate", "peft")
    }
    return {"mmoe": f"{mmoe.__version__} {_commit()}".strip(), "python": platform.python_version(), **packages}


def _commit() -> str:
    """The commit of the checkout that this file is in, or nothing."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
