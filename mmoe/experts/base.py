"""What experts are: a module over rows sorted by expert, with packed weights of leading dimension E."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from mmoe.dispatch import Backend
from mmoe.errors import Refused
from mmoe.routing import Routing


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

    def routes(self) -> list[tuple[Experts | None, int]]:
        """Parts that experts of one size stand in, in the order of the experts, and how many; None costs nothing."""
        return [(self, self.num_experts)]

    def packed_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that are divided among the experts, by name."""
        return {name: value for name in self.packed if (value := getattr(self, name)) is not None}
