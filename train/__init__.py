"""Training: recipes, data sets, and the engine that runs them.

recipe = train.Recipe.load("clip_moe_router", "run.steps=20")
results = train.run(recipe, "runs/short")
train.measure("runs/short")["metrics"]
train.fine_tune(zoo.load("clip_moe_tiny"), steps=20)  # in memory, without a recipe
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.notebook import fine_tune
    from train.recipe import Recipe
    from train.score import measure
    from train.stages import run

__all__ = ["Recipe", "fine_tune", "measure", "run"]
_HOMES = {"Recipe": "train.recipe", "fine_tune": "train.notebook", "measure": "train.score", "run": "train.stages"}


def __getattr__(name: str) -> Any:
    """Imports on first use: a recipe can be checked without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'train' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
