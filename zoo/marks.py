"""Marks of parameters, by which a model knows whether they are still those that were loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Mark:
    """What a parameter was: changes in place, and a few of its values."""

    version: int
    values: Tensor

    def follows(self, loaded: Mark) -> bool:
        """True where nothing happened since but moves and changes of type."""
        same = self.values.shape == loaded.values.shape
        same = same and torch.allclose(self.values, loaded.values, rtol=0.02, atol=1e-6, equal_nan=True)
        return same and self.version <= loaded.version


def marks(model: nn.Module) -> dict[str, Mark]:
    """Of every parameter, by name.

    >>> layer = nn.Linear(2, 2)
    >>> before = marks(layer)["bias"]
    >>> _ = nn.init.constant_(layer.bias, 7.0)
    >>> marks(layer)["bias"].follows(before)
    False
    """
    found = {}
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        few = flat[:: max(1, len(flat) // 8)]
        values = torch.empty(0) if parameter.is_meta else few.to("cpu", torch.float32, copy=True)
        found[name] = Mark(0 if parameter.is_inference() else parameter._version, values)
    return found
