"""Losses of Gamma: the configured mean squared error, and others that compare scores or level probabilities.

    plcc = (1 - r) / 2                             r the correlation of the batch's scores with its labels
    nin  = |p^ - t^|_1 / (2^p N^max(0, 1 - p/q))   p^, t^ centred and divided by their q-norm; p = 1, q = 2
    rank = mean(R) / (1 + max R)                   R_ij = relu((p_i - p_j) sign(t_j - t_i))
    emd  = mean_i (mean_k |P_ik - T_ik|^2)^(1/2)   P, T cumulative level probabilities
    levels = - sum_k T_k log pi_k                  T the label spread over its two neighbouring levels
    captions = - log softmax_u(exp(tau) cos(f, t_u))_c   c the caption of the picture, u all distinct ones of the batch

Source: arXiv 2503.06678 (MSE) and the framework that its code stands on; norm-in-norm: Li et al. 2020, arXiv
2008.03889; EMD: Talebi and Milanfar 2018, arXiv 1709.05424. "levels" is ours, for training a CLIP on level prompts,
"captions" for telling it what is seen, as the authors' backbone was told by captions about quality (UniQA, arXiv
2406.01069, which has CLIP's loss); many pictures of a batch may share a caption here.
A batch of one has no correlation: plcc, nin and rank are then the mean absolute error.
Shapes: B samples, K levels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def plcc(score: Tensor, target: Tensor) -> Tensor:
    """Half of one minus the linear correlation, 0 to 1.

    >>> plcc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])).abs().item() < 1e-6
    True
    """
    if len(score) == 1:
        return F.l1_loss(score, target)
    score, target = (F.normalize(x - x.mean(), dim=0) for x in (score, target))
    return (1 - (score * target).sum()) / 2


def nin(score: Tensor, target: Tensor) -> Tensor:
    """Norm-in-norm loss with p = 1 and q = 2, 0 to 1.

    >>> nin(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])).abs().item() < 1e-6
    True
    """
    if len(score) == 1:
        return F.l1_loss(score, target)
    score, target = (F.normalize(x - x.mean(), dim=0) for x in (score, target))
    return (score - target).abs().sum() / (2 * len(score) ** 0.5)


def rank(score: Tensor, target: Tensor) -> Tensor:
    """Mean of how far pairs stand in the wrong order, divided by one and the largest of them.

    >>> rank(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0])).item()
    0.0
    """
    if len(score) == 1:
        return F.l1_loss(score, target.detach())
    order = (target[None, :] - target[:, None]).sign()  # (B, B)
    wrong = ((score[:, None] - score[None, :]) * order).relu()
    return wrong.mean() / (1 + wrong.max().detach())


def emd(probs: Tensor, target: Tensor) -> Tensor:
    """Earth mover's distance of level probabilities (B, K), with r = 2.

    >>> round(emd(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item(), 4)
    0.7071
    """
    gap = (probs.cumsum(1) - target.cumsum(1)).square().mean(1)
    return gap.clamp(min=torch.finfo(gap.dtype).tiny).sqrt().mean()  # a root has no derivative at 0


def spread(target: Tensor, values: Tensor) -> Tensor:
    """Labels (B,) as level probabilities (B, K) whose mean they are: each between its two neighbouring levels.

    Labels below the first level or above the last one are that level.

    Args:
        target: scores.
        values: (K,) of the levels, rising.

    Example:
        >>> spread(torch.tensor([0.5]), torch.tensor([0.25, 0.75])).tolist()
        [[0.5, 0.5]]
    """
    target = target.clamp(values[0], values[-1])
    upper = torch.searchsorted(values, target.contiguous()).clamp(min=1)  # (B,)
    low, high = values[upper - 1], values[upper]
    share = ((target - low) / (high - low))[:, None]
    table = target.new_zeros(len(target), len(values))
    return table.scatter(1, upper[:, None] - 1, 1 - share).scatter(1, upper[:, None], share)


def levels(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of level logits (B, K) against level probabilities.

    >>> round(levels(torch.zeros(1, 4), torch.eye(4)[:1]).item(), 4)
    1.3863
    """
    return F.cross_entropy(logits, target)


def captions(features: Tensor, texts: Tensor, own: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of each picture's caption among the distinct captions of a batch.

    Args:
        features: (B, C) of the pictures, normalised.
        texts: (U, C) of the captions, normalised.
        own: (B,) row of each picture's caption.
        scale: inverse temperature.

    Example:
        >>> one = torch.eye(2)
        >>> round(captions(one, one, torch.tensor([0, 1]), torch.tensor(1.0)).item(), 4)
        0.3133
    """
    return F.cross_entropy(scale * features @ texts.t(), own)


OF_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "plcc": plcc,
    "nin": nin,
    "rank": rank,
}
LOSSES = (*OF_SCORES, "levels", "emd")


def loss_of(name: str, score: Tensor, logits: Tensor, target: Tensor, values: Tensor) -> Tensor:
    """A loss by name.

    Args:
        name: one of `LOSSES`.
        score: (B,).
        logits: (B, K) of the levels.
        target: (B,) labels in [0, 1], higher is better.
        values: (K,) scores of the levels that labels are spread over.
    """
    if name in OF_SCORES:
        return OF_SCORES[name](score, target)
    wanted = spread(target, values)
    return levels(logits, wanted) if name == "levels" else emd(logits.softmax(-1), wanted)
