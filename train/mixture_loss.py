"""Losses of the routers that a recipe adds to those of a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmoe.losses import balance_loss, z_loss
from mmoe.trace import Trace
from train.sections import MoeSection


def mixture_loss(section: MoeSection, config: Any, routing: Trace) -> Tensor | float:
    """What is added to the loss of a step; the mean over all processes is that of one process with all rows.

    Args:
        section: of the recipe.
        config: of the model; a coefficient that it has itself is used there.
        routing: of the step.
    """
    total: Tensor | float = 0.0
    if section.balance_coef and not hasattr(config, "balance_coef"):
        total = total + section.balance_coef * balance_loss(routing, all_processes=True)
    if section.z_coef and not hasattr(config, "z_coef"):
        total = total + section.z_coef * z_loss(routing, all_processes=True)
    return total
