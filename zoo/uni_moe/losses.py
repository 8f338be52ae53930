"""Losses on routers of the version with 8 experts, which tie experts to modalities.

    modality  = sum over layers and samples of sum_m (n_m / L) mean |p - t_m|      t_m 1 for the experts of m, else 0
    divergence = sum over layers and samples of mean over pairs (a, b) of 1 - KL(s(b) || s(a)) / E
                 s(m) = softmax(mean of p over the tokens of m): a softmax of probabilities, as released

p is the softmax of a token's scores. Source: the 8-expert code of github.com/HITsz-TMG/Uni-MoE; its balance loss is
`mmoe.losses.balance_loss(routings, choices="first")`, summed over layers. There padding counts as text; here that is an
option. It has one kind of audio, which is speech; here sound is set apart from the others in the same way, and speech
and sound not from each other. Shapes: B samples, L positions, T = B L rows, E experts, M modalities, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mmoe.errors import BadInput
from mmoe.routing import Routing, in_autocast
from zoo.hosts.splice import PADDING, TEXT

IMAGE, SPEECH, VIDEO, SOUND = 1, 2, 3, 4  # numbers of the modalities beside `TEXT`
_RELEASED = ((IMAGE, SPEECH), (IMAGE, TEXT), (SPEECH, TEXT), (SPEECH, VIDEO), (VIDEO, TEXT))
PAIRS = (*_RELEASED, (IMAGE, SOUND), (SOUND, TEXT), (SOUND, VIDEO))


def modality_loss(routings: Iterable[Routing], modality: Tensor, experts: Mapping[int, Sequence[int]]) -> Tensor:
    """How far tokens of a modality are from going to its experts alone.

    Args:
        routings: one per layer.
        modality: (B, L).
        experts: of each modality that has some.

    Returns:
        Scalar; it is not normalised by layers and samples, as released.

    Raises:
        BadInput: a router has no logits.
    """
    total = torch.zeros((), device=modality.device)
    for probs in _probs(routings, modality):
        for kind, own in experts.items():
            target = torch.zeros(probs.shape[-1], device=probs.device)
            for expert in own:
                target[expert] = 1.0
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

    Raises:
        BadInput: a router has no logits.
    """
    modality = modality.masked_fill(modality == PADDING, TEXT) if padding_is_text else modality
    total = torch.zeros((), device=modality.device)
    if in_autocast(total):
        with torch.autocast(modality.device.type, enabled=False):
            return divergence_loss(routings, modality, pairs)
    kinds = torch.arange(1 + max(max(pair) for pair in pairs), device=modality.device)
    ours = (modality[:, None] == kinds[:, None]).float()  # (B, M, L)
    counts = ours.sum(-1)
    shares = ours / counts.clamp(min=1)[..., None]
    there = torch.stack([(counts[:, a] > 0) & (counts[:, b] > 0) for a, b in pairs], 1)  # (B, P)
    parts = there / there.sum(1, keepdim=True).clamp(min=1)
    for probs in _probs(routings, modality):
        means = torch.einsum("bml,ble->bme", shares.to(probs.dtype), probs).log_softmax(-1)
        first = torch.stack([means[:, a] for a, _ in pairs], 1)  # (B, P, E)
        second = torch.stack([means[:, b] for _, b in pairs], 1)
        likeness = 1 - (second.exp() * (second - first)).mean(-1)  # (B, P)
        total = total + (likeness * parts).sum()
    return total


def _probs(routings: Iterable[Routing], modality: Tensor) -> list[Tensor]:
    """Probabilities (B, L, E) of every layer."""
    found = []
    for routing in routings:
        if routing.logits is None:
            asked = "a loss of modalities over routers of which one has no logits"
            fix = "router=topk, or modality_coef=0 divergence_coef=0"
            raise BadInput(asked, "there are no probabilities to send or set apart", fix)
        found.append(routing.logits.softmax(-1).unflatten(0, modality.shape))
    return found
