"""One learned scalar on the output of a branch: y = s * x.

At s = 0 the branch adds nothing, so it can be put beside trained layers without changing what they compute; its own
parameters then get no gradient until s has moved. Zero-initialised gates of this kind: Bachlechner et al. 2020, ReZero,
arXiv 2003.04887. Shape: x (..., D) -> (..., D).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmoe.options import check_float


class LearnedScale(nn.Module):
    """Multiplies by a learned scalar; as `MoE.post` it scales what the routed experts add.

    Args:
        initial: value of the scalar at the start.
        dropout: probability before the scaling, in training.

    Example:
        >>> LearnedScale(0.5)(torch.ones(2)).tolist()
        [0.5, 0.5]
    """

    def __init__(self, initial: float = 1.0, *, dropout: float = 0.0) -> None:
        super().__init__()
        check_float("initial", initial)
        check_float("dropout", dropout, low=0, below=1)
        self.scale = nn.Parameter(torch.full((), float(initial)))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return F.dropout(x, self.dropout, self.training) * self.scale

    def extra_repr(self) -> str:
        """The dropout, where there is one."""
        return f"dropout={self.dropout}" if self.dropout else ""
