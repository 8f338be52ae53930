"""What experts are: a module over rows sorted by expert, with packed weights of leading dimension E."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmoe.dispatch import Backend
from mmoe.errors import Refused, UnknownName, did_you_mean
from mmoe.routing import Routing

Activation = Callable[[Tensor], Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the GELU of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def activation(name: str | Activation) -> Activation:
    """An activation by name, or the given function itself.

    Example:
        >>> activation("quick_gelu")(torch.zeros(1)).item()
        0.0
    """
    if callable(name):
        return name
    if name not in ACTIVATIONS:
        raise UnknownName(f"no activation named {name!r}", did_you_mean(str(name), ACTIVATIONS), "activation='gelu'")
    return ACTIVATIONS[name]


def match_activation(act: Activation) -> Activation:
    """Our own function where it computes the same bit for bit, so that the result does not depend on the host."""
    if getattr(act, "inplace", False):
        act = copy.copy(act)
        act.inplace = False  # type: ignore[attr-defined]  # a module that has it
    size = torch.logspace(-4, 4, 200, device="cpu")
    grid = torch.cat([-size.flip(0), size])
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        value = act(grid)
        same = [known for known in ACTIVATIONS.values() if torch.equal(value, known(grid))]
    return same[0] if same else act


class Experts(nn.Module):
    """E experts over sorted rows.

    Attributes:
        num_experts: E, the number of routes.
        packed: names of the parameters whose leading dimension is the expert.
        backend: "fused" gathers, computes and adds up in one step where that can run (`mmoe.experts.fused`);
            "grouped" and "loop" are ways of `mmoe.dispatch.grouped_linear`; "auto" takes what is fastest.
    """

    packed: ClassVar[tuple[str, ...]] = ()
    num_experts: int
    backend: Backend = "auto"

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Applies expert e to the e-th group of rows.

        Args:
            x: (N, D) rows sorted by expert.
            counts: (E,) rows per expert, summing to N.

        Returns:
            (N, D).
        """
        raise NotImplementedError

    def fuses(self, x: Tensor, routing: Routing) -> bool:
        """True where `forward(x, None, routing)` takes rows that were not sent, and returns their weighted sums."""
        return False

    def shared(self, count: int) -> nn.Module:
        """A dense block as large as `count` of these experts, for rows (..., D).

        Raises:
            Refused: these experts have no dense twin.
        """
        asked = f"no shared experts beside {type(self).__name__}"
        raise Refused(asked, "they have no dense twin", "MoE(router, experts, shared=mmoe.FFN(dim, hidden_dim))")

    def packed_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that are divided among the experts, by name."""
        return {name: value for name in self.packed if (value := getattr(self, name)) is not None}
