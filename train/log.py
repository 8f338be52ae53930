"""What a stage tells while it runs: lines of JSON, the terminal, and trackers such as tensorboard."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from mmoe.atomic import atomic_path
from mmoe.errors import BadInput
from train.checkpoint import FREE_SPACE
from train.health import LayerHealth


class RunLog:
    """Numbers of a stage, by step.

    Args:
        path: of a JSONL file, one line per logged step.
        accelerator: whose trackers are told too.
        prefix: of the names there: the stage.
        before: steps of the stages before; trackers count on, as wandb drops what goes back.
        trackers: options of each, for the first stage that runs.
    """

    def __init__(
        self,
        path: Path,
        accelerator: Accelerator,
        prefix: str = "",
        before: int = 0,
        trackers: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        self.path, self.accelerator, self.prefix = path, accelerator, f"{prefix}/" if prefix else ""
        self.trackers = trackers or {}
        self.before, self.lines = before, 0
        self._load: dict[str, list[tuple[int, tuple[float, ...]]]] = {}

    def begin(self, step: int) -> None:
        """Starts the trackers where none runs yet; tensorboard forgets what was told after a step."""
        if self.accelerator.log_with and not self.accelerator.trackers:
            options = {"tensorboard": {"purge_step": self.before + step + 1}, **self.trackers}
            self.accelerator.init_trackers("mmoe", init_kwargs=options)

    def write(self, step: int, values: Mapping[str, float], health: Mapping[str, LayerHealth]) -> None:
        """Tells the numbers of a step and of its routers."""
        if not self.accelerator.is_main_process:
            return
        layers = {name: one.as_dict() for name, one in health.items()}
        self._append({"step": step, **values, **({"health": layers} if layers else {})})
        curves = dict(values)
        for name, layer in layers.items():
            curves |= {f"router/{name}/{key}": value for key, value in layer.items() if isinstance(value, float)}
            curves[f"router/{name}/dead"] = float(len(layer["dead"]))
            self._load.setdefault(name, []).append((step, layer["load"]))
        told = {f"{self.prefix}{name}": value for name, value in curves.items()}
        with _writing("the curves"):
            self.accelerator.log(told, step=self.before + step)

    def note(self, text: str) -> None:
        """Tells a person something, once for all processes."""
        if self.accelerator.is_main_process:
            print(text, file=sys.stderr, flush=True)

    def alarm(self, step: int, text: str) -> None:
        """Tells an alarm."""
        if self.accelerator.is_main_process:
            self._append({"step": step, "alarm": text})
            self.note(f"alarm at step {step}: {text}")

    def heatmap(self, step: int) -> None:
        """Draws the load of every layer over time for the trackers."""
        if not self._load or not self.accelerator.trackers:
            return
        pictures = {f"{self.prefix}load/{name}": _picture(name, rows) for name, rows in self._load.items()}
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            with _writing("the pictures of the load"):
                tracker.log_images(pictures, step=self.before + step, **layout)

    def cut(self, lines: int) -> bool:
        """Forgets what was told after so many lines, as it is done again; returns whether there was anything."""
        self._load, self.lines = {}, 0
        if not self.path.exists():
            return False
        told = self.path.read_text().splitlines()
        kept = [line for line in map(_whole, told[:lines]) if line is not None]
        for line in kept:
            for name, layer in line.get("health", {}).items():
                self._load.setdefault(name, []).append((line["step"], tuple(layer["load"])))
        self.lines = len(kept)
        if self.accelerator.is_main_process:
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        return bool(told)

    def _append(self, line: Mapping[str, Any]) -> None:
        with _writing(f"'{self.path}'"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.lines += 1


@contextmanager
def _writing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"cannot write {what}", error.strerror or str(error), FREE_SPACE) from error


def _whole(line: str) -> dict[str, Any] | None:
    """A line that was written to its end."""
    try:
        read: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return read


def _picture(layer: str, rows: Sequence[tuple[int, tuple[float, ...]]]) -> np.ndarray:
    """Loads of one layer by logged step, as a picture (1, H, W, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, load = [step for step, _ in rows], np.array([shares for _, shares in rows]).T  # (E, steps)
    figure = Figure(figsize=(6.4, 1.4 + 0.25 * len(load)), dpi=100, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    drawn = axes.imshow(load * len(load), aspect="auto", interpolation="nearest", vmin=0, vmax=2, cmap="viridis")
    axes.set(title=layer, ylabel="expert", xlabel="step", yticks=range(len(load)))
    shown = sorted({round(place) for place in np.linspace(0, len(steps) - 1, 6)})
    axes.set_xticks(shown, [str(steps[place]) for place in shown])
    axes.title.set_fontsize(8)
    figure.colorbar(drawn, label="times an even load", extend="max")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[None, ..., :3].copy()
