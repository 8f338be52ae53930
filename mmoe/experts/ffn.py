"""Feed-forward experts, plain and gated, with packed weights in the layout of transformers 5.

    plain:  W_down act(W_up x + b_up) + b_down          up_proj (E, F, D), down_proj (E, D, F)
    gated:  W_down (act(W_gate x) * W_up x)             gate_up_proj (E, 2F, D) with the gate rows first

Papers: Shazeer et al. 2017 (arXiv 1701.06538); gated: Shazeer 2020 (2002.05202). Shapes: N sorted rows, D width,
F inner width, E experts. The dense twins `FFN` and `GatedFFN` serve as shared experts.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmoe.dispatch import grouped_linear
from mmoe.experts.activations import KERNELS, Activation, activation
from mmoe.experts.base import Experts
from mmoe.experts.fused import FeedForward, fusable, one_row, pays, routed_ffn
from mmoe.options import check_bool, check_float
from mmoe.registry import experts
from mmoe.routing import Routing


def pack(num_experts: int, outputs: int, inputs: int) -> nn.Parameter:
    """Weights (E, out, in), initialised as those of E separate `nn.Linear`s."""
    bound = 1 / math.sqrt(inputs)
    return nn.Parameter(torch.empty(num_experts, outputs, inputs).uniform_(-bound, bound))


def _packed(num_experts: int, outputs: int, inputs: int, bias: bool) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weights (E, out, in) and biases (E, out) or None, initialised as E separate `nn.Linear`s."""
    weight, bound = pack(num_experts, outputs, inputs), 1 / math.sqrt(inputs)
    return weight, nn.Parameter(torch.empty(num_experts, outputs).uniform_(-bound, bound)) if bias else None


class _PackedFFN(Experts):
    """What plain and gated experts share: the fused step."""

    gated: ClassVar[bool]
    dropout: float
    act: Activation
    down_proj: nn.Parameter
    down_bias: nn.Parameter | None

    def _up(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the first product."""
        raise NotImplementedError

    def fuses(self, x: Tensor, routing: Routing) -> bool:
        """On a CPU, without dropout, where it pays or is asked for; foreign activations may have parameters."""
        if self.backend not in ("auto", "fused") or (self.dropout and self.training):
            return False
        if self.act not in KERNELS:
            return False
        weight = self._up()[0]
        if not fusable(x, weight):
            return False
        if self.backend == "fused" or _is_one_row(x):
            return True
        trains = torch.is_grad_enabled() and any(v.requires_grad for v in (x, routing.weights, *self.parameters()))
        return pays(routing.experts.numel(), weight, trains)

    def shared(self, count: int) -> nn.Module:
        """A perceptron as wide as `count` of these experts."""
        dense = GatedFFN if self.gated else FFN
        hidden_dim, dim = self.down_proj.shape[2], self._up()[0].shape[2]
        return dense(dim, count * hidden_dim, act=self.act, bias=self.down_bias is not None)

    def _fused(self, x: Tensor, routing: Routing) -> Tensor:
        ffn = FeedForward(*self._up(), self.down_proj, self.down_bias, self.act, self.gated)
        if _is_one_row(x):
            return one_row(x, routing.experts, routing.weights, ffn)
        return routed_ffn(x, routing, ffn)


def _is_one_row(x: Tensor) -> bool:
    return len(x) == 1 and not torch.is_grad_enabled()


@experts.register("ffn")
class FFNExperts(_PackedFFN):
    """E two-layer perceptrons.

    Args:
        dim: D.
        hidden_dim: F.
        num_experts: E.
        out_dim: output width O; D when None.
        act: activation name or function.
        bias: gives both layers a bias.
        dropout: probability after the activation, in training.

    Example:
        >>> FFNExperts(8, 16, 2)(torch.randn(5, 8), torch.tensor([2, 3])).shape
        torch.Size([5, 8])
    """

    packed = ("up_proj", "up_bias", "down_proj", "down_bias")
    gated = False

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        out_dim: int | None = None,
        *,
        act: str | Activation = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_bool("bias", bias)
        check_float("dropout", dropout, low=0, below=1)
        self.num_experts, self.dropout, self.act = num_experts, dropout, activation(act)
        out = out_dim or dim
        self.up_proj, self.up_bias = _packed(num_experts, hidden_dim, dim, bias)
        self.down_proj, self.down_bias = _packed(num_experts, out, hidden_dim, bias)

    def _up(self) -> tuple[Tensor, Tensor | None]:
        return self.up_proj, self.up_bias

    def forward(self, x: Tensor, counts: Tensor | None, routing: Routing | None = None) -> Tensor:
        """Rows (N, D) sorted by expert -> (N, O); with a routing, rows (T, D) -> their weighted sums (T, O)."""
        if counts is None:
            assert routing is not None
            return self._fused(x, routing)
        hidden = self.act(grouped_linear(x, self.up_proj, counts, self.up_bias, self.backend))  # (N, F)
        hidden = F.dropout(hidden, self.dropout, self.training)
        return grouped_linear(hidden, self.down_proj, counts, self.down_bias, self.backend)


@experts.register("gated_ffn")
class GatedFFNExperts(_PackedFFN):
    """E gated perceptrons (SwiGLU with the default activation).

    Args:
        dim: D.
        hidden_dim: F.
        num_experts: E.
        act: activation of the gate, by name or a function.
        bias: gives both products a bias.
        dropout: probability before the down projection, in training.

    Example:
        >>> GatedFFNExperts(8, 16, 2)(torch.randn(5, 8), torch.tensor([0, 5])).shape
        torch.Size([5, 8])
    """

    packed = ("gate_up_proj", "gate_up_bias", "down_proj", "down_bias")
    gated = True

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        act: str | Activation = "silu",
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_bool("bias", bias)
        check_float("dropout", dropout, low=0, below=1)
        self.num_experts, self.dropout, self.act = num_experts, dropout, activation(act)
        self.gate_up_proj, self.gate_up_bias = _packed(num_experts, 2 * hidden_dim, dim, bias)
        self.down_proj, self.down_bias = _packed(num_experts, dim, hidden_dim, bias)

    def _up(self) -> tuple[Tensor, Tensor | None]:
        return self.gate_up_proj, self.gate_up_bias

    def forward(self, x: Tensor, counts: Tensor | None, routing: Routing | None = None) -> Tensor:
        """Rows (N, D) sorted by expert -> (N, D); with a routing, rows (T, D) -> their weighted sums (T, D)."""
        if counts is None:
            assert routing is not None
            return self._fused(x, routing)
        gate_up = grouped_linear(x, self.gate_up_proj, counts, self.gate_up_bias, self.backend)  # (N, 2F)
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = F.dropout(self.act(gate) * up, self.dropout, self.training)  # (N, F)
        return grouped_linear(hidden, self.down_proj, counts, self.down_bias, self.backend)


class FFN(nn.Module):
    """One dense perceptron, for shared experts: x (..., D) -> (..., D).

    Args:
        dim: D.
        hidden_dim: F; for S shared experts of inner width F take S * F.
        act: activation name or function.
        bias: gives both layers a bias.
    """

    def __init__(self, dim: int, hidden_dim: int, *, act: str | Activation = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.act = activation(act)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the perceptron to x (..., D)."""
        out: Tensor = self.down_proj(self.act(self.up_proj(x)))
        return out


class GatedFFN(nn.Module):
    """One dense gated perceptron, for shared experts: x (..., D) -> (..., D).

    Args:
        dim: D.
        hidden_dim: F; for S shared experts of inner width F take S * F.
        act: activation of the gate, by name or a function.
        bias: gives all three products a bias.
        gate: scales the output by sigmoid(w x), as Qwen2-MoE's shared expert does.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        act: str | Activation = "silu",
        bias: bool = False,
        gate: bool = False,
    ) -> None:
        super().__init__()
        self.act = activation(act)
        self.gate_up_proj = nn.Linear(dim, 2 * hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)
        self.gate = nn.Linear(dim, 1, bias=False) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        """Applies the gated perceptron to x (..., D)."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.act(gate) * up)
        return out if self.gate is None else out * self.gate(x).sigmoid()
