"""Activations by name, and for each how to write it and its gradient into memory that is there already."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmoe.errors import UnknownName, did_you_mean

Activation = Callable[[Tensor], Tensor]
_aten = torch.ops.aten


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
        raise UnknownName(f"no activation named {name!r}", did_you_mean(str(name), ACTIVATIONS), "act='gelu'")
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


class Kernel(NamedTuple):
    """An activation that takes no memory; no argument requires a gradient.

    Attributes:
        value: (x, out): writes act(x).
        grad: (grad, x, out): writes grad * act'(x); `out` may be `grad`.
    """

    value: Callable[[Tensor, Tensor], object]
    grad: Callable[[Tensor, Tensor, Tensor], object]


def _quick_gelu_grad(grad: Tensor, x: Tensor, out: Tensor) -> None:
    _aten.silu_backward.grad_input(grad, 1.702 * x, grad_input=out)  # x sigmoid(a x) is silu(a x) / a


KERNELS: dict[Activation, Kernel] = {
    F.gelu: Kernel(
        lambda x, out: _aten.gelu.out(x, out=out),
        lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, grad_input=out),
    ),
    gelu_tanh: Kernel(
        lambda x, out: _aten.gelu.out(x, approximate="tanh", out=out),
        lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out),
    ),
    quick_gelu: Kernel(lambda x, out: torch.mul(x, 1.702, out=out).sigmoid_().mul_(x), _quick_gelu_grad),
    F.relu: Kernel(
        lambda x, out: torch.clamp_min(x, 0, out=out),
        lambda grad, x, out: _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out),
    ),
    F.silu: Kernel(
        lambda x, out: _aten.silu.out(x, out=out),
        lambda grad, x, out: _aten.silu_backward.grad_input(grad, x, grad_input=out),
    ),
}
