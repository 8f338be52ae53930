"""What a stage tells while it runs: lines of JSON, the terminal, and trackers such as tensorboard."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from mmoe.atomic import atomic_path
from train.health import LayerHealth


class RunLog:
    """Numbers of a stage, by step.

    Args:
        path: of a JSONL file, one line per logged step.
        accelerator: whose trackers are told too.
        prefix: of the names there: the stage.
        before: steps of the stages before; trackers count on, as wandb drops what goes back.
    """

    def __init__(self, path: Path, accelerator: Accelerator, prefix: str = "", before: int = 0) -> None:
        self.path, self.accelerator, self.prefix = path, accelerator, f"{prefix}/" if prefix else ""
        self.before = before
        self._load: dict[str, list[tuple[float, ...]]] = {}

    def write(self, step: int, values: Mapping[str, float], health: Mapping[str, LayerHealth]) -> None:
        """Tells the numbers of a step and of its routers."""
        if not self.accelerator.is_main_process:
            return
        layers = {name: one.as_dict() for name, one in health.items()}
        self._append({"step": step, **values, **({"health": layers} if layers else {})})
        curves = dict(values)
        for name, layer in layers.items():
            curves |= {f"router/{name}/{key}": value for key, value in layer.items() if isinstance(value, float)}
            self._load.setdefault(name, []).append(layer["load"])
        told = {f"{self.prefix}{name}": value for name, value in curves.items()}
        self.accelerator.log(told, step=self.before + step)

    def alarm(self, step: int, text: str) -> None:
        """Tells an alarm."""
        if self.accelerator.is_main_process:
            self._append({"step": step, "alarm": text})
            print(f"alarm at step {step}: {text}", file=sys.stderr, flush=True)

    def heatmap(self, step: int) -> None:
        """Draws the load of every layer over time, experts downwards, for the trackers."""
        pictures = {f"{self.prefix}load/{name}": _picture(rows) for name, rows in self._load.items()}
        for tracker in self.accelerator.trackers if pictures else ():
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(pictures, step=self.before + step, **layout)

    def cut(self, step: int) -> None:
        """Forgets what was told after a step that is done again."""
        self._load = {}
        if not self.path.exists() or not self.accelerator.is_main_process:
            return
        lines = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if line["step"] <= step]
        for line in kept:
            for name, told in line.get("health", {}).items():
                self._load.setdefault(name, []).append(tuple(told["load"]))
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def _append(self, line: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _picture(rows: list[tuple[float, ...]]) -> np.ndarray:
    """Loads of one layer, a column per step, as a picture (1, 12 E, steps * w, 3) uint8; an even load is grey."""
    from matplotlib import colormaps

    share = np.array(rows).T  # (E, steps)
    colours = colormaps["viridis"](np.clip(share * len(share) / 2, 0, 1))[..., :3]
    wide = max(1, 240 // share.shape[1])
    return (255 * colours).astype(np.uint8).repeat(12, 0).repeat(wide, 1)[None]
