"""Losses that tie experts to modalities, against a loop over layers, samples and pairs.

Shapes: B samples, L positions, T = B L rows, E experts.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmoe import FixedRouter, Routing
from mmoe.errors import BadInput
from mmoe.routing import Context
from zoo.hosts.splice import PADDING, TEXT
from zoo.uni_moe.losses import IMAGE, PAIRS, SOUND, SPEECH, VIDEO, divergence_loss, modality_loss

B, L, E = 5, 12, 4


def routings_of(layers: int = 2) -> list[Routing]:
    nothing = torch.zeros(B * L, 1)
    logits = [torch.randn(B * L, E, requires_grad=True) for _ in range(layers)]
    return [Routing(experts=nothing.long(), weights=nothing, num_experts=E, logits=layer) for layer in logits]


def spans(*kinds: int) -> Tensor:
    """Each kind in turn, over equal parts of a sample, (L,)."""
    return torch.tensor(kinds).repeat_interleave(L // len(kinds))


MODALITY = torch.stack(
    [
        spans(TEXT, IMAGE, SPEECH, VIDEO),
        spans(SOUND, IMAGE, TEXT, VIDEO),
        spans(TEXT, IMAGE, PADDING),
        spans(SPEECH, SOUND),  # nothing to compare
        spans(PADDING, TEXT),
    ]
)


def by_hand(routings: list[Routing], modality: Tensor) -> Tensor:
    total = torch.zeros(())
    for routing in routings:
        for probs, kinds in zip(routing.logits.softmax(-1).unflatten(0, (B, L)), modality, strict=True):
            means = {kind: probs[kinds == kind].mean(0).log_softmax(-1) for kind in kinds.unique().tolist()}
            found = [(means[a], means[b]) for a, b in PAIRS if a in means and b in means]
            if found:
                total = total + torch.stack([1 - (b.exp() * (b - a)).sum() / E for a, b in found]).mean()
    return total


@pytest.mark.parametrize("padding_is_text", [False, True])
def test_divergence_is_that_of_a_loop(padding_is_text: bool) -> None:
    routings, logits = (found := routings_of()), [one.logits for one in found]
    told = MODALITY.masked_fill(MODALITY == PADDING, TEXT) if padding_is_text else MODALITY
    loss, expected = divergence_loss(routings, MODALITY, padding_is_text=padding_is_text), by_hand(routings, told)
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(value, logits) for value in (loss, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("other", [IMAGE, TEXT, VIDEO])
def test_sound_is_told_apart_as_speech_is(other: int) -> None:
    routings = routings_of()
    heard, spoken = (spans(other, kind).expand(B, L) for kind in (SOUND, SPEECH))
    assert divergence_loss(routings, heard).item() > 0
    torch.testing.assert_close(divergence_loss(routings, heard), divergence_loss(routings, spoken))


def test_a_batch_without_pairs_gives_0_and_a_gradient() -> None:
    routings = routings_of()
    loss = divergence_loss(routings, spans(SPEECH, SOUND).expand(B, L))
    loss.backward()
    assert loss.item() == 0 and all((one.logits.grad == 0).all() for one in routings)


def test_they_are_as_exact_under_autocast() -> None:
    routings = routings_of()
    expected = divergence_loss(routings, MODALITY), modality_loss(routings, MODALITY, {IMAGE: [0]})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = divergence_loss(routings, MODALITY), modality_loss(routings, MODALITY, {IMAGE: [0]})
    torch.testing.assert_close(found, expected)


def test_sample_by_sample_they_add_up() -> None:
    routing, ends = routings_of(1)[0], list(pairwise(range(0, B * L + 1, L)))
    nothing = torch.zeros(L, 1)
    rows = [
        Routing(experts=nothing.long(), weights=nothing, num_experts=E, logits=routing.logits[begin:end])
        for begin, end in ends
    ]
    for loss in (divergence_loss, lambda r, m: modality_loss(r, m, {SOUND: [1, 2], VIDEO: [3]})):
        parts = [loss([row], MODALITY[sample][None]) for sample, row in enumerate(rows)]
        torch.testing.assert_close(loss([routing], MODALITY), torch.stack(parts).sum())


def test_a_router_without_scores_is_refused() -> None:
    chosen = Context(expert_ids=torch.zeros(B * L, dtype=torch.long))
    routing = FixedRouter(E)(torch.randn(B * L, 8), chosen)
    for loss in (divergence_loss, lambda r, m: modality_loss(r, m, {IMAGE: [0]})):
        with pytest.raises(BadInput) as error:
            loss([*routings_of(), routing], MODALITY)
        assert str(error.value) == (
            "a loss of modalities over routers of which one has no logits\n"
            "  there are no probabilities to send or set apart\n"
            "  try: router=topk, or modality_coef=0 divergence_coef=0"
        )
