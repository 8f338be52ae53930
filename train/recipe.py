"""A recipe: one YAML that says which model is trained, what of it, on which data, how, and for how long.

    model: {name: clip_moe_tiny}
    tune: {method: router_only}
    data: {name: emoji, batch_size: 64}
    optim: {lr: 3.0e-3}
    run: {steps: 100}

`Recipe.load` reads a file or a bundled recipe, applies `key=value` overrides, and tells all mistakes at once, each with
its line and the nearest right key. A recipe with `stages:` runs them one after the other: each takes what the recipe
says and changes what it says itself. `train/recipes/` holds the bundled ones.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from mmoe.atomic import atomic_path
from mmoe.errors import UnknownName, did_you_mean
from train.draft import BUNDLED, SECTIONS, Draft
from train.sections import ScaleSection, Section, Stage
from zoo.registry import model_folder

RECIPE = "recipe.yaml"  # in the folder of a run
_FREE = ("data.path", "data.workers", "data.max_broken", "moe.health.*", "log", "scale.processes")
_FREE += tuple(f"run.{name}" for name in ("best", "keep_last", "log_every", "eval_every", "save_every"))


class Recipe(Section):
    """A checked recipe.

    Attributes:
        name: of the run's folder.
        stages: one after the other.
        scale: devices.
        log: besides the terminal.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
    stages: tuple[Stage, ...]
    scale: ScaleSection = ScaleSection()
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)

    @classmethod
    def load(cls, source: str | Path, *overrides: str) -> Recipe:
        """Reads a file, or a bundled recipe by name.

        Args:
            source: path of a YAML, or a name of `bundled()`.
            overrides: "optim.lr=1e-4", "stages.base.run.steps=10", ...

        Raises:
            UnknownName: there is no such recipe.
            BadInput: the file cannot be read, or has mistakes; all are told.

        Example:
            >>> Recipe.load("clip_moe_router", "run.steps=3").stages[0].run.steps
            3
        """
        draft = Draft.read(find(source))
        for text in overrides:
            draft.override(text)
        return draft.check(cls)

    def located(self) -> Recipe:
        """The same with whole paths, so that it runs from any folder."""
        names = {stage.name for stage in self.stages}
        return self.model_copy(update={"stages": tuple(_located(stage, names) for stage in self.stages)})

    def as_dict(self) -> dict[str, Any]:
        """Plain data with every default written out; `Recipe.load` reads it again."""
        told = self.model_dump(mode="json")
        if len(told["stages"]) > 1 or told["stages"][0]["name"]:
            return told
        (only,) = told.pop("stages")
        return {"name": told.pop("name"), **{name: only[name] for name in SECTIONS}, **told}

    def save(self, path: str | Path, about: Mapping[str, str] | None = None) -> None:
        """Writes a file that runs as this recipe does.

        Args:
            path: of the file.
            about: notes for its first lines.
        """
        notes = "".join(f"# {key}: {value}\n" for key, value in (about or {}).items())
        with atomic_path(path) as temporary:
            temporary.write_text(notes + yaml.safe_dump(self.as_dict(), sort_keys=False), encoding="utf-8")


def bundled() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(BUNDLED.glob("*/*.yaml"))}


def find(source: str | Path) -> Path:
    """The file that a path, the folder of a run, or a name means.

    Raises:
        UnknownName: there is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if (path / RECIPE).is_file():
        return path / RECIPE
    known = bundled()
    if str(source) in known:
        return known[str(source)]
    if path.is_dir():
        raise UnknownName(f"no run in '{source}'", f"the folder has no {RECIPE}", "mmoe recipe ls")
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UnknownName(f"no recipe '{source}'", f"looked in {path.absolute().parent}", "mmoe recipe ls")
    raise UnknownName(f"no recipe named '{source}'", did_you_mean(str(source), known), "mmoe recipe ls")


def differences(a: Recipe, b: Recipe) -> list[str]:
    """What two recipes say differently, one option a line."""
    first, second = _flat(a.as_dict(), ""), _flat(b.as_dict(), "")
    missing = "(none)"
    return [
        f"{key}: {_written(first.get(key, missing))} -> {_written(second.get(key, missing))}"
        for key in {**first, **second}
        if first.get(key, missing) != second.get(key, missing)
    ]


def _written(value: Any) -> str:
    """A plain value as YAML has it."""
    return str(value) if isinstance(value, str | float) else json.dumps(value)


def course(stage: Stage) -> dict[str, Any]:
    """Options that a stage's weights depend on, by their dotted names; a run may go on with others of the rest."""
    options = _flat(stage.model_dump(mode="json"), "")
    return {key: value for key, value in options.items() if not _is_free(key)}


def detours(a: Recipe, b: Recipe, begun: Collection[str]) -> list[str]:
    """Differences of two recipes that a run cannot go on with.

    Args:
        a, b: what it was begun with, and what it is to go on with.
        begun: names of stages that have weights already; the others may change.
    """
    stages = {f"stages.{stage.name}.": stage.name for stage in (*a.stages, *b.stages)}
    found = []
    for told in differences(a, b):
        key = told.partition(":")[0]
        prefix = next((prefix for prefix in stages if key.startswith(prefix)), "")
        if stages.get(prefix, "") in begun and not _is_free(key.removeprefix(prefix)):
            found.append(told)
    return found


def _is_free(key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in _FREE)


def _located(stage: Stage, stages: Collection[str]) -> Stage:
    """Whole paths of files and folders that are there; names of cards and of stages are none."""

    def whole(name: Any) -> Any:
        folder = model_folder(name) if isinstance(name, str) and name not in stages else None
        return str(folder.absolute()) if folder is not None and (folder / "config.json").exists() else name

    told, model, weights = stage.data.path, stage.model, stage.model.weights
    data = stage.data.model_copy(update={"path": None if told is None else told.expanduser().absolute()})
    if isinstance(weights, str) and Path(weights).suffix and Path(weights).expanduser().is_file():
        weights = str(Path(weights).expanduser().absolute())
    model = model.model_copy(update={"name": whole(model.name), "weights": weights})
    return stage.model_copy(update={"data": data, "model": model, "start": whole(stage.start)})


def _flat(value: Any, key: str) -> dict[str, Any]:
    """Nested options by their dotted names."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {item.get("name", number): item for number, item in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {key: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= _flat(inner, f"{key}.{name}" if key else str(name))
    return found
