"""A linear layer per modality in front of a gate."""

from __future__ import annotations

import pytest
import torch

from mmoe import ByModalityRouter, Context, FFNExperts, MoE, TopKRouter, override, switch_off, trace
from mmoe.errors import BadOverride, UnknownName

T, D, E = 24, 8, 4


def test_it_begins_as_the_router_inside() -> None:
    router, plain = ByModalityRouter(D, E), TopKRouter(D, E)
    plain.load_state_dict(router.inner.state_dict())
    x, context = torch.randn(T, D), Context(modality=torch.arange(T) % 4)
    torch.testing.assert_close(router(x, context).weights, plain(x).weights)
    torch.testing.assert_close(router(x).weights, plain(x).weights)


def test_each_modality_has_a_layer_of_its_own() -> None:
    router, x = ByModalityRouter(D, E), torch.randn(T, D)
    kinds = torch.arange(T) % 4
    with torch.no_grad():
        router.layers[2].weight.mul_(-1)
    found = router(x, Context(modality=kinds)).logits
    expected = torch.where((kinds == 2)[:, None], router.inner.scores(-x), router.inner.scores(x))
    torch.testing.assert_close(found, expected)
    unknown = router(x, Context(modality=torch.tensor([-1, 9] * (T // 2)))).logits
    torch.testing.assert_close(unknown, router.inner.scores(x))


def test_experts_get_the_tokens_as_they_are() -> None:
    moe, x = MoE(ByModalityRouter(D, E), FFNExperts(D, 16, E)), torch.randn(T, D)
    with torch.no_grad():
        moe.router.layers[0].bias.add_(3.0)
    with trace(moe) as routing:
        y = moe(x, Context(modality=torch.zeros(T, dtype=torch.long)))
    torch.testing.assert_close(y, moe._mix(x, routing[0], x.shape[:1]))
    with override(moe, switch_off([0])), trace(moe) as routing:
        moe(x)
    assert routing[0].counts()[0] == 0


def test_what_is_inside_decides_what_it_is() -> None:
    router = ByModalityRouter(D, E, inner="topk:capacity_factor=1.0")
    assert router.batch_dependent and not router.causal_safe and router.experts_per_token == 2
    assert ByModalityRouter(D, E, inner="dense").experts_per_token == E


def test_options_that_cannot_be() -> None:
    with pytest.raises(BadOverride, match="modalities=0"):
        ByModalityRouter(D, E, modalities=0)
    with pytest.raises(BadOverride, match="by_modality inside by_modality"):
        ByModalityRouter(D, E, inner="by_modality")
    with pytest.raises(UnknownName, match="no router named 'tpok'"):
        ByModalityRouter(D, E, inner="tpok")
