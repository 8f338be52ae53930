"""Finding models by name and by filters, without torch."""

from __future__ import annotations

from typing import Any

import pytest

import zoo
from mmoe.errors import UnknownModel
from zoo import registry
from zoo.card import Card, Weights


def pretend(name: str, **values: Any) -> Card:
    given: dict[str, Any] = {
        "family": "a",
        "summary": "S.",
        "model": "m:M",
        "tasks": ("vqa",),
        "modalities": ("image",),
    }
    given |= {"config": {}, "params": {"total": 1, "active": 1}, "licence": "MIT"}
    return Card(name=name, **{**given, **values})


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = {"t": Weights(source="bundled:a", licence="MIT")}
    foreign = {"t": Weights(source="hf-hub:a/b/c", licence="unknown")}
    tuned = {"t": Weights(source="hf-hub:a/b/c", licence="CC-BY-NC-4.0")}
    found = [
        pretend("b_tiny", weights=bundled, family="b", tasks=("vqa", "caption")),
        pretend("a_large", weights=foreign, licence="Apache-2.0", modalities=("image", "text")),
        pretend("a_base", weights=tuned, licence="Apache-2.0"),
        pretend("a_tiny", components=({"name": "x", "licence": "cc-by-nc-sa-4.0", "source": "s"},)),
    ]
    monkeypatch.setattr(registry, "_cards", lambda: {card.name: card for card in found})


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ({}, ["a_base", "a_large", "a_tiny", "b_tiny"]),
        ({"pattern": "*_tiny"}, ["a_tiny", "b_tiny"]),
        ({"pattern": "nothing"}, []),
        ({"task": "caption"}, ["b_tiny"]),
        ({"modality": "text"}, ["a_large"]),
        ({"family": "b"}, ["b_tiny"]),
        ({"license": "MIT"}, ["a_tiny", "b_tiny"]),
        ({"license": "apache*"}, []),
        ({"license": "*"}, ["a_base", "a_large", "a_tiny", "b_tiny"]),
        ({"license": "commercial"}, ["b_tiny"]),
        ({"weights": "bundled"}, ["b_tiny"]),
        ({"weights": "any"}, ["a_base", "a_large", "b_tiny"]),
        ({"pattern": "a_*", "license": "MIT", "modality": "image"}, ["a_tiny"]),
    ],
)
def test_filters(filters: dict[str, str], names: list[str], cards: None) -> None:
    pattern = filters.pop("pattern", "*")
    assert [card.name for card in zoo.list_models(pattern, **filters)] == names


def test_a_name_may_carry_a_tag() -> None:
    assert zoo.card("clip_moe_tiny.whatever").name == "clip_moe_tiny"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "clip_moe_l14",
            "no model named 'clip_moe_l14'\n  did you mean: clip_moe_vit_l14, clip_moe_tiny\n  try: mmoe list 'clip*'",
        ),
        ("CLIP-MoE-tny", "no model named 'CLIP-MoE-tny'\n  did you mean: clip_moe_tiny"),
        ("qwerty", "no model named 'qwerty'\n  known: clip_moe_tiny"),
        (
            "openai/clip",
            "no model named 'openai/clip'\n"
            "  it looks like a hub repository or a folder that is not there\n"
            "  try: zoo.load('hf-hub:openai/clip')",
        ),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(UnknownModel) as error:
        zoo.card(name)
    assert str(error.value).startswith(message)


def test_the_command_that_is_offered_lists_something() -> None:
    with pytest.raises(UnknownModel) as error:
        zoo.card("clip_mo_tiny")
    pattern = error.value.fix.removeprefix("mmoe list ").strip("'")
    assert zoo.list_models(pattern)
