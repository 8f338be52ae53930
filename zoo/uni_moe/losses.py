"""Losses on routers of the version with 8 experts, which tie experts to modalities.

    modality  = sum over layers and samples of sum_m (n_m / L) mean |p - t_m|      t_m 1 for the experts of m, else 0
    divergence = sum over layers and samples of mean over pairs (a, b) of 1 - KL(s(b) || s(a)) / E
                 s(m) = softmax(mean of p over the tokens of m): a softmax of probabilities, as released

p is the softmax of a token's scores. Source: the 8-expert code of github.com/HITsz-TMG/Uni-MoE; its balance loss is
`mmoe.losses.balance_loss(routings, choices="first")`, summed over layers. There padding counts as text; here that is an
option. Shapes: B samples, L positions, T = B L rows, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mmoe.routing import Routing
from zoo.hosts.splice import PADDING, TEXT

IMAGE, SPEECH, VIDEO, SOUND = 1, 2, 3, 4  # numbers of the modalities beside `TEXT`
PAIRS = ((IMAGE, SPEECH), (IMAGE, TEXT), (SPEECH, TEXT), (SPEECH, VIDEO), (VIDEO, TEXT))  # as released


def modality_loss(routings: Iterable[Routing], modality: Tensor, experts: Mapping[int, Sequence[int]]) -> Tensor:
    """How far tokens of a modality are from going to its experts alone.

    Args:
        routings: one per layer.
        modality: (B, L).
        experts: of each modality that has some.

    Returns:
        Scalar; it is not normalised by layers and samples, as released.
    """
    total = torch.zeros((), device=modality.device)
    for probs in _probs(routings, modality):
        for kind, own in experts.items():
            target = torch.zeros(probs.shape[-1], device=probs.device)
            target[list(own)] = 1.0
            there = modality == kind  # (B, L)
            total = total + ((probs - target).abs().mean(-1) * there).sum() / modality.shape[1]
    return total


def divergence_loss(
    routings: Iterable[Routing],
    modality: Tensor,
    pairs: Sequence[tuple[int, int]] = PAIRS,
    *,
    padding_is_text: bool = False,
) -> Tensor:
    """How alike the experts of two modalities of one sample are.

    Args:
        routings: one per layer.
        modality: (B, L).
        pairs: modalities that are compared where a sample has both.
        padding_is_text: lets padding count as text, as released.

    Returns:
        Scalar; it is not normalised by layers and samples, as released.
    """
    modality = modality.masked_fill(modality == PADDING, TEXT) if padding_is_text else modality
    total = torch.zeros((), device=modality.device)
    for probs in _probs(routings, modality):
        for sample, kinds in zip(probs, modality, strict=True):
            means = {kind: sample[kinds == kind].mean(0).log_softmax(-1) for kind in kinds.unique().tolist()}
            there = [(means[a], means[b]) for a, b in pairs if a in means and b in means]
            if there:
                likeness = [1 - (b.exp() * (b - a)).mean() for a, b in there]
                total = total + torch.stack(likeness).mean()
    return total


def _probs(routings: Iterable[Routing], modality: Tensor) -> list[Tensor]:
    """Probabilities (B, L, E) of every layer."""
    return [
        routing.logits.softmax(-1).unflatten(0, modality.shape) for routing in routings if routing.logits is not None
    ]
