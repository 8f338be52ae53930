"""Null experts: routes that cost nothing, so that a token can buy less computation; and smaller ones that all take.

    zero:  Expert(x) = 0        copy:  Expert(x) = x

Paper: MoE++, Jin et al. 2024, arXiv 2410.07348 (equations 3 and 4). Null experts stand behind the real ones: with
E real and Z null experts the router chooses among E + Z. Behind them may stand shared experts of another width, for
routers that give them weights of their own (`mmoe.routers.dynamic`). Shapes: N sorted rows, D width.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mmoe.dispatch import Backend
from mmoe.experts.activations import Activation
from mmoe.experts.base import Experts
from mmoe.options import check_choice, check_int
from mmoe.registry import build_experts, experts

Kind = Literal["zero", "copy"]


@experts.register("with_null")
class WithNullExperts(Experts):
    """Adds null experts behind real ones.

    Args:
        dim: D.
        hidden_dim: F of the real experts.
        num_experts: number of all routes, real, null and shared.
        num_null: how many of them are null.
        kind: "zero" or "copy".
        num_shared: how many at the end are shared.
        shared_dim: F of the shared experts; that of the real ones when None.
        real: name or spec of the real and the shared experts.
        act, dropout: of the real experts; their own default when None.

    Example:
        >>> experts = WithNullExperts(8, 16, 4, num_null=1)
        >>> experts(torch.randn(3, 8), torch.tensor([1, 0, 0, 2]))[1:].abs().sum().item()
        0.0
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        num_null: int = 1,
        kind: Kind = "zero",
        num_shared: int = 0,
        shared_dim: int | None = None,
        real: str = "ffn",
        act: str | Activation | None = None,
        dropout: float | None = None,
    ) -> None:
        super().__init__()
        check_int("num_experts", num_experts, 1)
        check_choice("kind", kind, get_args(Kind))
        check_int("num_shared", num_shared, 0, num_experts - 1)
        check_int("num_null", num_null, 0, num_experts - num_shared - 1)
        check_int("shared_dim", shared_dim or hidden_dim, 1)
        self.num_experts, self.num_null, self.kind = num_experts, num_null, kind
        options = {key: value for key, value in (("act", act), ("dropout", dropout)) if value is not None}
        sizes = {"dim": dim, "hidden_dim": hidden_dim, "num_experts": num_experts - num_null - num_shared}
        self.real: Experts = build_experts(real, **sizes, **options)
        sizes |= {"hidden_dim": shared_dim or hidden_dim, "num_experts": num_shared}
        self.side: Experts | None = build_experts(real, **sizes, **options) if num_shared else None

    @property
    def backend(self) -> Backend:
        """How the real experts run."""
        return self.real.backend

    @backend.setter
    def backend(self, backend: Backend) -> None:
        self.real.backend = backend
        if self.side is not None:
            self.side.backend = backend

    def routes(self) -> list[tuple[Experts | None, int]]:
        """Real, null and shared experts."""
        side: list[tuple[Experts | None, int]] = [] if self.side is None else [(self.side, self.side.num_experts)]
        return [(self.real, self.real.num_experts), (None, self.num_null), *side]

    def shared(self, count: int) -> nn.Module:
        """A dense block as large as `count` of the real experts."""
        return self.real.shared(count)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Rows (N, D) sorted by expert -> (N, D); rows of null experts are not computed."""
        real, behind = self.real.num_experts, self.real.num_experts + self.num_null
        computed = int(counts[:real].sum())
        out = self.real(x[:computed], counts[:real])
        if self.side is None:
            return torch.cat([out, self._null(x[computed:].to(out.dtype))])
        last = computed + int(counts[real:behind].sum())
        side = self.side(x[last:], counts[behind:])
        return torch.cat([out, self._null(x[computed:last].to(out.dtype)), side])

    def _null(self, x: Tensor) -> Tensor:
        return x if self.kind == "copy" else torch.zeros_like(x)
