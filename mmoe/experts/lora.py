"""Gated experts with low-rank factors inside: large ones of which little is trained.

    P x + (alpha / r) B A dropout(x)     for the gate, up and down projection P of every expert

A begins as `nn.Linear`'s weights do and B as 0, so that experts begin as they were; the recipe says which of both is
trained. Paper: LoRA, Hu et al. 2021 (arXiv 2106.09685); inside experts: the 8-expert code of Uni-MoE
(github.com/HITsz-TMG/Uni-MoE). For adapters around whole experts there is peft (`train.tune`).
Shapes: N sorted rows, D width, F inner width, E experts, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmoe.dispatch import grouped_linear
from mmoe.experts.activations import Activation, activation
from mmoe.experts.base import Experts
from mmoe.experts.ffn import GatedFFN, GatedFFNExperts, pack
from mmoe.options import check_float, check_int
from mmoe.registry import experts


@experts.register("lora_gated_ffn")
class LoRAGatedFFNExperts(Experts):
    """E gated perceptrons without biases, each with low-rank factors beside its three projections.

    Args:
        dim: D.
        hidden_dim: F.
        num_experts: E.
        rank: r.
        alpha: the factors count alpha / r times.
        act: activation of the gate, by name or a function.
        dropout: probability before the factors, in training.

    Example:
        >>> experts = LoRAGatedFFNExperts(8, 16, 2, rank=4)
        >>> experts(torch.randn(5, 8), torch.tensor([2, 3])).shape
        torch.Size([5, 8])
        >>> [name for name, _ in experts.named_parameters() if name.endswith(("_a", "_b"))]  # what is trained
        ['gate_up_a', 'gate_b', 'up_b', 'down_a', 'down_b']
    """

    packed = ("gate_up_proj", "down_proj", "gate_up_a", "gate_b", "up_b", "down_a", "down_b")

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        act: str | Activation = "silu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_int("rank", rank, 1)
        check_float("alpha", alpha, above=0)
        check_float("dropout", dropout, low=0, below=1)
        self.num_experts, self.rank, self.alpha, self.dropout = num_experts, rank, alpha, dropout
        self.act = activation(act)
        self.gate_up_proj = pack(num_experts, 2 * hidden_dim, dim)
        self.down_proj = pack(num_experts, dim, hidden_dim)
        self.gate_up_a = pack(num_experts, 2 * rank, dim)
        self.gate_b = nn.Parameter(torch.zeros(num_experts, hidden_dim, rank))
        self.up_b = nn.Parameter(torch.zeros(num_experts, hidden_dim, rank))
        self.down_a = pack(num_experts, rank, hidden_dim)
        self.down_b = nn.Parameter(torch.zeros(num_experts, dim, rank))

    def shared(self, count: int) -> nn.Module:
        """A gated perceptron as wide as `count` of these experts, without factors."""
        return GatedFFN(self.down_proj.shape[1], count * self.down_proj.shape[2], act=self.act)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Rows (N, D) sorted by expert -> (N, D)."""
        low = self._linear(F.dropout(x, self.dropout, self.training), self.gate_up_a, counts)  # (N, 2r)
        factors = [self._linear(*pair, counts) for pair in zip(low.chunk(2, -1), (self.gate_b, self.up_b), strict=True)]
        gate_up = self._linear(x, self.gate_up_proj, counts) + self.scaling * torch.cat(factors, -1)  # (N, 2F)
        gate, up = gate_up.chunk(2, -1)
        hidden = self.act(gate) * up  # (N, F)
        low = self._linear(F.dropout(hidden, self.dropout, self.training), self.down_a, counts)  # (N, r)
        return self._linear(hidden, self.down_proj, counts) + self.scaling * self._linear(low, self.down_b, counts)

    @property
    def scaling(self) -> float:
        """What the factors are multiplied by."""
        return self.alpha / self.rank

    def _linear(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        return grouped_linear(x, weight, counts, None, self.backend)

    @torch.no_grad()
    def merged(self) -> GatedFFNExperts:
        """The same experts with the factors added to the projections."""
        dim, hidden_dim = self.down_proj.shape[1:]
        with torch.device("meta"):
            plain = GatedFFNExperts(dim, hidden_dim, self.num_experts, act=self.act)
        gate_a, up_a = self.gate_up_a.chunk(2, 1)
        factors = torch.cat([self.gate_b @ gate_a, self.up_b @ up_a], 1)  # (E, 2F, D)
        plain.gate_up_proj = nn.Parameter(self.gate_up_proj + self.scaling * factors)
        plain.down_proj = nn.Parameter(self.down_proj + self.scaling * (self.down_b @ self.down_a))
        plain.backend = self.backend
        return plain
