"""Exponential moving average of the weights that a stage trains, evaluated and saved in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from mmoe.dispatch import is_sharded


class MovingAverage:
    """average = decay * average + (1 - decay) * weights, after every step, from the first weights on.

    Args:
        model: sharded or not, with what is not trained frozen.
        decay: 0 to 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights as they are now."""
        for name, average in self._average.items():
            average.lerp_(self._weights[name], 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average into the model for a while."""
        now = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._put(self._average)
        try:
            yield
        finally:
            self._put(now)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Whole tensors by name; of a sharded model in every process."""
        found: dict[str, Any] = self._average
        return {name: value.full_tensor() if is_sharded(value) else value for name, value in found.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state_dict` gave, on any number of processes."""
        for name, own in self._average.items():
            average: Any = own
            value = state[name].to(average.device)
            if is_sharded(average):
                value = distribute_tensor(value, average.device_mesh, average.placements)
            average.copy_(value)
