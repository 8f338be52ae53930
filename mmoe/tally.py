"""What a balance loss counts: how often experts were chosen, of how many rows, and how probable they were.

    loss = N sum_e f_e P_e,   f = hits / rows,   P = probs / rows

Tallies add up over layers, over the runs of a layer and over processes, which losses do not. A router that counts in a
way of its own notes one on its `Routing`. Shapes: T rows, N experts that are balanced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(kw_only=True)
class Tally:
    """What a balance loss is made of.

    Attributes:
        hits: (N,) rows, or their weights, that chose each of the N experts that are balanced.
        rows: scalar, all rows that count, or their weights.
        probs: (N,) sum over these rows of each expert's probability, differentiable.

    Example:
        >>> two = torch.tensor([2.0, 2.0])
        >>> Tally(hits=two, rows=torch.tensor(4), probs=two).loss().item()
        1.0
    """

    hits: Tensor
    rows: Tensor
    probs: Tensor

    def loss(self) -> Tensor:
        """The balance loss; 0 where no row counts."""
        rows = self.rows.float().clamp(min=torch.finfo(torch.float32).tiny)
        return len(self.hits) * ((self.hits / rows) * (self.probs / rows)).sum()


def tally_of(counts: Tensor, chosen: Tensor, probs: Tensor) -> Tally:
    """Adds rows up, in fp32 under autocast too, which does products in half precision.

    Args:
        counts: (T,) how much each row counts.
        chosen: (T, N) which experts it chose.
        probs: (T, N).
    """
    column = counts[:, None]
    return Tally(hits=(column * chosen).sum(0), rows=counts.sum(), probs=(column * probs).sum(0))


def add_tallies(tallies: Sequence[Tally]) -> Tally:
    """The tally of all rows together; the same number of experts each."""
    names = [f.name for f in fields(Tally)]
    return Tally(**{name: torch.stack([getattr(one, name) for one in tallies]).sum(0) for name in names})
