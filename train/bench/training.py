"""`mmoe bench train`: what the engine costs beside a bare PyTorch loop on the same model, data and optimiser."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from train.engine import StageRun
from train.recipe import Recipe
from train.stages import Run


def measure(recipe: Recipe, steps: int = 20, rounds: int = 5) -> dict[str, float]:
    """Milliseconds of a step of both loops, which take turns, and their ratio.

    Args:
        recipe: its first stage is run; nothing is evaluated or saved.
        steps: of each turn, after one of warm-up.
        rounds: turns of each.

    Returns:
        "engine_ms" and "bare_ms", medians over the turns, and "ratio", the median of the turns' ratios.
    """
    run = {"steps": steps + 1, "epochs": None, "save_every": None, "eval_every": None}
    stage = recipe.stages[0].model_copy(update={"run": recipe.stages[0].run.model_copy(update=run)})
    times: dict[str, list[float]] = {"engine": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        short = recipe.model_copy(update={"stages": (stage,), "log": ()})
        for number in range(rounds + 1):
            for name in ("engine", "bare") if number % 2 else ("bare", "engine"):
                trial = Run(short, Path(folder) / f"{number}_{name}", progress=False).start(stage)
                times[name].append(_engine(trial) if name == "engine" else _bare(trial))
    pairs = list(zip(times["engine"][1:], times["bare"][1:], strict=True))
    return {
        "engine_ms": round(1e3 * statistics.median(engine for engine, _ in pairs), 2),
        "bare_ms": round(1e3 * statistics.median(bare for _, bare in pairs), 2),
        "ratio": round(statistics.median(engine / bare for engine, bare in pairs), 3),
    }


def _engine(trial: StageRun) -> float:
    """Seconds of a step of the engine, after the first one."""
    begun: list[float] = []
    step = trial._step

    def timed(*args: object) -> object:
        found = step(*args)  # type: ignore[arg-type]  # those of the engine
        begun.append(time.perf_counter())
        return found

    trial._step = timed  # type: ignore[method-assign, assignment]  # timed in place
    trial.train()
    return (begun[-1] - begun[0]) / (len(begun) - 1)


def _bare(trial: StageRun) -> float:
    """Seconds of a step as one writes it by hand, after the first one."""
    model, section = trial.model.train(), trial.stage.optim
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=section.lr, weight_decay=section.weight_decay)
    begun: list[float] = []
    for (batch,), _ in trial.batches.from_step(0, trial.steps, trial.stage.data.workers):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters, section.clip or float("inf"))
        optimizer.step()
        begun.append(time.perf_counter())
    return (begun[-1] - begun[0]) / (len(begun) - 1)
