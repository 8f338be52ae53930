"""Tasks of models that reply in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mmoe.errors import BadInput, BadOverride, Refused
from tests.train.test_data import load
from train.data import build
from train.evaluate import tasks
from train.sections import DataSection


class Knowing:
    """A model that hears every tabla and says "tabla" to all else; replies have a token per letter.

    Args:
        sure: nats by which it prefers what is right.
    """

    card = None

    def __init__(self, sure: float = 1.0) -> None:
        self.sure, self.asked = sure, list[Mapping[str, Any]]()

    def predict(self, text: Any = None, **given: Any) -> str:
        return "Tabla."

    def reply_likelihoods(self, replies: Sequence[str], text: Any = None, **given: Any) -> tuple[Tensor, Tensor]:
        self.asked.append({"replies": list(replies), "text": text, **given})
        scores = torch.tensor([self.sure if reply == "tabla" else 0.0 for reply in replies]) - 5
        return scores, torch.tensor([len(reply) for reply in replies])


def test_names_are_chosen_by_likelihood_and_written() -> None:
    data = load("sounds", None, "eval")
    names = [data.read(i)["text"] for i in range(len(data))]
    model = Knowing()
    found = tasks.build("naming").measure(model, data)
    share = names.count("tabla") / len(names)
    assert found["exact match"] == pytest.approx(share, abs=1e-4)
    assert found["choice"] == pytest.approx(share, abs=1e-4), "the likeliest name is always tabla"
    assert found["chance"] == pytest.approx(1 / len(set(names)), abs=1e-4), "there are fewer names than 20"
    assert {len(one["replies"]) for one in model.asked} == {len(set(names))}
    assert "sound" in model.asked[0] and model.asked[0]["text"] is None


def test_the_choice_is_among_names_of_the_same_group() -> None:
    data = load("emoji_names", None, "eval", limit=25)
    groups: dict[str, set[str]] = {}
    for index in range(len(data)):
        groups.setdefault(data.read(index)["group"], set()).add(data.read(index)["text"])
    model = Knowing()
    found = tasks.build({"name": "naming", "choices": 5}).measure(model, data)
    assert {name: value for name, value in found.items() if name.endswith("chance")} == {
        "seen/chance": 0.2,
        "new style/chance": 0.2,
        "new concept/chance": 0.2,
    }
    for asked in model.asked:
        assert len(set(asked["replies"])) == 5 and any(set(asked["replies"]) <= names for names in groups.values())
    again = Knowing()
    tasks.build({"name": "naming", "choices": 5}).measure(again, data)
    assert [one["replies"] for one in again.asked] == [one["replies"] for one in model.asked]


def test_perplexity_counts_the_tokens_of_replies() -> None:
    data = load("dialogues", None, "eval")
    model = Knowing()
    found = tasks.build("perplexity").measure(model, data)["perplexity"]
    tokens = sum(len(data.read(i)["turns"][1]) for i in range(len(data)))
    assert found == pytest.approx(math.exp(5 * len(data) / tokens), rel=1e-3)
    assert model.asked[0] == {"replies": [data.read(0)["turns"][1]], "text": [data.read(0)["turns"][0]]}


def test_parts_of_a_mixture_are_measured_by_their_own_tasks() -> None:
    parts = {"heard": {"name": "sounds"}, "words": {"name": "dialogues"}}
    data = build(DataSection(name="mixture", options={"parts": parts}), "eval")
    found = tasks.build({"name": "parts", "options": {"heard": {"choices": 3}}}).measure(Knowing(), data)
    assert found.keys() == {"heard/choice", "heard/exact match", "heard/chance", "words/perplexity"}
    assert found["heard/chance"] == pytest.approx(1 / 3, abs=1e-4)


class Same(Knowing):
    """A model that finds all replies as likely as each other."""

    def reply_likelihoods(self, replies: Sequence[str], text: Any = None, **given: Any) -> tuple[Tensor, Tensor]:
        return torch.full((len(replies),), self.sure), torch.ones(len(replies))


def test_a_model_that_does_not_know_is_not_right() -> None:
    data = load("sounds", None, "eval", limit=6)
    assert tasks.build("naming").measure(Same(0.0), data)["choice"] == 0.0
    with pytest.raises(BadInput, match="some likelihoods are no numbers"):
        tasks.build("naming").measure(Same(math.nan), data)


def test_what_cannot_be_measured() -> None:
    data = load("sounds", None, "eval")
    with pytest.raises(Refused, match="tells no likelihoods of replies"):
        tasks.build("naming").check(object(), data)
    with pytest.raises(BadOverride, match="choices=1"):
        tasks.build({"name": "naming", "choices": 1})
    with pytest.raises(BadInput, match="the data is no mixture"):
        tasks.build("parts").measure(Knowing(), data)
    data.records = [one for one in data.records if one["text"] == "tabla"]
    with pytest.raises(BadInput, match="all samples have one name"):
        tasks.build("naming").measure(Knowing(), data)
