"""`mmoe.build_moe`: a layer from names, with options for its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mmoe
from mmoe.errors import BadOverride, Refused, UnknownName

D, F, E = 16, 8, 4


def test_the_names_of_its_parameters() -> None:
    moe = mmoe.build_moe(D, F, E, 2)
    shapes = {name: tuple(parameter.shape) for name, parameter in moe.named_parameters()}
    assert shapes == {
        "router.weight": (E, D),
        "experts.gate_up_proj": (E, 2 * F, D),
        "experts.down_proj": (E, D, F),
    }
    assert moe(torch.randn(2, 3, D)).shape == (2, 3, D)


@pytest.mark.parametrize("router", mmoe.list_routers())
@pytest.mark.parametrize("experts", mmoe.list_experts())
def test_all_routers_and_experts(router: str, experts: str) -> None:
    moe, x = mmoe.build_moe(D, F, E, 1, router=router, experts=experts, num_shared_experts=2), torch.randn(6, D)
    context = mmoe.Context(expert_ids=torch.tensor([0, 1, 2, 3, 0, 1])) if router == "fixed" else None
    y = moe(x, context)
    assert moe.shared is not None
    assert sum(p.numel() for p in moe.shared.parameters()) == 2 * expert_size(experts) + bias_repeats(experts)
    shared, moe.shared = moe.shared, None
    torch.testing.assert_close(y, moe(x, context) + shared(x))


def expert_size(experts: str) -> int:
    """Parameters of one expert without the output bias."""
    return 3 * F * D if "gated_ffn" in experts else 2 * F * D + F


def bias_repeats(experts: str) -> int:
    """The output bias, which a block has once however wide it is."""
    return 0 if "gated_ffn" in experts else D


def test_options_find_the_part_that_takes_them() -> None:
    moe = mmoe.build_moe(D, F, E, 3, score="sigmoid", act="relu", bias=True)
    assert (moe.router.score, moe.router.top_k) == ("sigmoid", 3)
    assert moe.experts.act is torch.nn.functional.relu and moe.experts.down_bias is not None
    same = mmoe.build_moe(D, F, E, 3, router="topk:score=sigmoid", experts={"name": "gated_ffn", "bias": True})
    assert same.router.score == "sigmoid" and same.experts.down_bias is not None


@pytest.mark.parametrize("experts", mmoe.list_experts())
def test_the_backend_is_an_attribute(experts: str) -> None:
    torch.manual_seed(0)
    moe, x = mmoe.build_moe(D, F, E, 2, experts=experts, backend="loop"), torch.randn(9, D)
    assert moe.backend == "loop"
    by_loop = moe(x)
    moe.backend = "grouped"
    assert (moe.backend, moe.experts.backend) == ("grouped", "grouped")
    torch.testing.assert_close(moe(x), by_loop, atol=1e-5, rtol=1e-5)
    with pytest.raises(BadOverride, match="backend='looop'\n  did you mean: loop"):
        moe.backend = "looop"  # type: ignore[assignment]  # wrong on purpose


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (BadOverride, {"scor": "sigmoid"}, "neither the router nor the experts take 'scor'\n  did you mean: score"),
        (BadOverride, {"top_k": 5}, "top_k=5\n  top_k is a whole number from 1 to 4\n  try: top_k=4"),
        (BadOverride, {"num_shared_experts": -1}, "num_shared_experts=-1\n"),
        (
            BadOverride,
            {"experts": {"name": "ffn", "act": "relu"}, "act": "gelu"},
            "act='gelu' beside 'ffn' with act='relu'\n  the option is given twice\n  try: build_moe(..., act='gelu')",
        ),
        (UnknownName, {"act": "gelutan"}, "no activation named 'gelutan'\n  did you mean: gelu_tanh"),
        (UnknownName, {"router": "topc"}, "no router named 'topc'\n  did you mean: topk"),
        (UnknownName, {"experts": "gated_fn"}, "no expert named 'gated_fn'\n  did you mean: gated_ffn"),
    ],
)
def test_mistakes(kind: type[Exception], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(kind) as error:
        mmoe.build_moe(D, F, E, **{"top_k": 2, **changes})
    assert str(error.value).startswith(message)


def test_experts_without_a_dense_twin() -> None:
    with pytest.raises(Refused, match="no shared experts beside Experts"):
        mmoe.Experts().shared(1)


@pytest.mark.parametrize("sizes", [(-8, 16, 4), ("8", 16, 4), (8, 0, 4), (8, 16, 0)])
def test_sizes_that_are_none(sizes: Any) -> None:
    with pytest.raises(BadOverride, match="is a whole number of at least 1"):
        mmoe.build_moe(*sizes)
