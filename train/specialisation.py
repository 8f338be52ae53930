"""The task that asks whether experts take to modalities: what an expert tells about the modality of a token.

Source of the measure: `mmoe.groups`. Shapes: M modalities, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmoe.errors import Refused
from mmoe.groups import entropy_bits, group_counts, mutual_information
from mmoe.moe import moe_layers
from mmoe.options import check_int
from mmoe.trace import trace
from train.data.base import DataSet
from train.evaluate import Task, tasks

BATCH = 16


@tasks.register("specialisation")
class Specialisation(Task):
    """Mutual information of expert and modality in bits, in the mean over layers ("MI") and in the layer with most.

    "modalities" is the entropy of the modalities, the most that there is to tell. Slots of all tokens count: words, and
    the tokens of pictures and recordings. Batches are those that a model trains on, without augmentation.

    Args:
        samples: of the data, at most, evenly spaced.
    """

    fields = ("part",)
    of_model = "chat"

    def __init__(self, *, samples: int = 512) -> None:
        check_int("samples", samples, 1)
        self.samples = samples

    def check(self, model: Any, data: DataSet, option: str = "--on") -> None:
        """It has to have mixtures."""
        super().check(model, data, option)
        if not moe_layers(model):
            raise Refused("measure how experts specialise", "the model has no mixtures", "mmoe list --task chat")

    @torch.no_grad()
    def measure(self, model: Any, data: DataSet) -> dict[str, float]:
        """Of some samples together."""
        count = min(self.samples, len(data))
        chosen = [place * len(data) // count for place in range(count)]
        counts: dict[str, Tensor] = {}
        for first in range(0, len(chosen), BATCH):
            samples = [sample for _, sample in data.readable(chosen[first : first + BATCH])]
            with trace(model) as routing:
                model(**model.training_batch(samples))
            for name, one in zip(routing.names, routing, strict=True):
                counts[name] = _added(counts.get(name), group_counts(one))
        told = [mutual_information(of_layer) for of_layer in counts.values()]
        groups = next(iter(counts.values())).sum(1)
        found = {"MI": sum(told) / len(told), "largest MI": max(told), "modalities": entropy_bits(groups)}
        return {name: round(value, 4) for name, value in found.items()}


def _added(first: Tensor | None, second: Tensor) -> Tensor:
    """The sum of counts (M, E) of several batches, which may lack the last modalities."""
    if first is None:
        return second
    rows = max(len(first), len(second))
    both = [torch.nn.functional.pad(one, (0, 0, 0, rows - len(one))) for one in (first, second)]
    return both[0] + both[1]
