"""The loss of a training step: that of the model, and what a recipe adds for its routers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmoe.losses import balance_loss, z_loss
from mmoe.trace import Trace
from train.sections import MoeSection


class StepLoss(nn.Module):
    """A model as far as a step differentiates it.

    Only the loss leaves with its graph: so processes that train together see which parameters it needs, and wait for no
    others, such as those of a modality that no sample of a batch has.

    Args:
        model: whose output has a `loss`, and its unweighted parts as `losses`.
        section: of the recipe.
        config: of the model; a coefficient that it has itself is used there.
    """

    def __init__(self, model: nn.Module, section: MoeSection, config: Any) -> None:
        super().__init__()
        self.model, self.section, self.config = model, section, config

    def forward(self, batch: Mapping[str, Tensor], routing: Trace) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and its parts without their graph.

        Args:
            batch: inputs of the model.
            routing: records what the routers of the model decide.
        """
        out = self.model(**batch)
        loss = out.loss + self._of_routers(routing)
        return loss, {name: value.detach() for name, value in out.losses.items()}

    def _of_routers(self, routing: Trace) -> Tensor | float:
        """What the recipe adds; the mean over all processes is that of one process with all rows."""
        total: Tensor | float = 0.0
        if self.section.balance_coef and not hasattr(self.config, "balance_coef"):
            total = total + self.section.balance_coef * balance_loss(routing, all_processes=True)
        if self.section.z_coef and not hasattr(self.config, "z_coef"):
            total = total + self.section.z_coef * z_loss(routing, all_processes=True)
        return total
