"""Recall of a retrieval: how often what is right is among the best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RANKS = (1, 5, 10)


def recalls(similarity: Tensor, own: Tensor | None = None) -> dict[str, float]:
    """Recalls of similarities of texts to pictures (texts, pictures).

    Args:
        similarity: (texts, pictures); square where each has one.
        own: (texts,) number of the picture of each text; the same number as the text when None.
    """
    own = torch.arange(len(similarity)) if own is None else own
    right = own[:, None] == torch.arange(similarity.shape[1])  # (texts, pictures)
    found = {f"T2I {name}": value for name, value in recall(similarity, right).items()}
    found |= {f"I2T {name}": value for name, value in recall(similarity.t(), right.t()).items()}
    return {"R@1": round((found["T2I R@1"] + found["I2T R@1"]) / 2, 4), **found}


def recall(similarity: Tensor, right: Tensor | None = None, ranks: Sequence[int] = RANKS) -> dict[str, float]:
    """Share of rows that have one of their right columns among the best k.

    Ties and values that are no numbers count against it.

    Args:
        similarity: (rows, columns).
        right: (rows, columns) bool; the diagonal when None.
        ranks: values of k.

    Example:
        >>> recall(torch.tensor([[2.0, 1.0], [3.0, 3.0]]), ranks=(1,))
        {'R@1': 0.5}
    """
    right = torch.eye(len(similarity), dtype=torch.bool) if right is None else right
    best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)  # NaN stays
    rank = 1 + (~right & ~(similarity < best)).sum(1)
    rank = torch.where(best.squeeze(1).isnan(), similarity.shape[1] + 1, rank)
    return {f"R@{k}": round((rank <= k).float().mean().item(), 4) for k in ranks}
