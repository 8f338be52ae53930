"""A linear layer per modality in front of a gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmoe import ByModalityRouter, Context, FFNExperts, MoE, TopKRouter, override, switch_off, trace
from mmoe.dispatch import grouped_linear
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
        router.modality_weight[2].mul_(-1)
    found = router(x, Context(modality=kinds)).logits
    expected = torch.where((kinds == 2)[:, None], router.inner.scores(-x), router.inner.scores(x))
    torch.testing.assert_close(found, expected)
    unknown = router(x, Context(modality=torch.tensor([-1, 9] * (T // 2)))).logits
    torch.testing.assert_close(unknown, router.inner.scores(x))


def noisy(**options: Any) -> ByModalityRouter:
    router = ByModalityRouter(D, E, **options)
    torch.nn.init.normal_(router.modality_weight)
    torch.nn.init.normal_(router.modality_bias)
    return router


@pytest.mark.parametrize("inner", ["topk", "dynamic"])
def test_the_layers_are_no_part_of_autocast(inner: str) -> None:
    router, x, context = noisy(inner=inner), torch.randn(T, D), Context(modality=torch.arange(T) % 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = router(x, context).logits, router.scores(x)
    assert torch.equal(found[0], router(x, context).logits) and torch.equal(found[1], router.scores(x))


def test_a_router_in_fp32_takes_rows_in_bf16() -> None:
    router, x, context = noisy(), torch.randn(T, D).bfloat16(), Context(modality=torch.arange(T) % 4)
    torch.testing.assert_close(router(x, context).logits, router(x.float(), context).logits)
    assert router(x).logits.dtype == torch.float32


def test_each_layer_sees_the_rows_of_its_modality_only(monkeypatch: pytest.MonkeyPatch) -> None:
    router, x, kinds = noisy(), torch.randn(T, D, requires_grad=True), torch.arange(T) % 3
    shapes: list[Any] = []

    def spy(rows: Tensor, weight: Tensor, counts: Tensor, bias: Tensor) -> Tensor:
        shapes.append((len(rows), counts.tolist()))
        return grouped_linear(rows, weight, counts, bias)

    monkeypatch.setattr("mmoe.routers.by_modality.grouped_linear", spy)
    logits = router(x, Context(modality=kinds)).logits
    assert shapes == [(T, [T // 3, T // 3, T // 3, 0])]
    weights, biases = router.modality_weight[kinds], router.modality_bias[kinds]
    expected = router.inner.scores(torch.einsum("tdc,tc->td", weights, x) + biases)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    given = torch.randn_like(logits)
    mine, theirs = (torch.autograd.grad((s * given).sum(), [x, *router.parameters()]) for s in (logits, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_experts_get_the_tokens_as_they_are() -> None:
    moe, x = MoE(ByModalityRouter(D, E), FFNExperts(D, 16, E)), torch.randn(T, D)
    with torch.no_grad():
        moe.router.modality_bias[0].add_(3.0)
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
