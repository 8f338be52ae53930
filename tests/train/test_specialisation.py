"""How much experts tell about modalities, measured on a mixture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import mmoe
import zoo
from mmoe.errors import BadInput, Refused
from train.data import build
from train.evaluate import check_fields, tasks
from train.sections import DataSection

PARTS = {"pictures": {"name": "emoji_names"}, "sounds": {"name": "sounds"}, "words": {"name": "dialogues"}}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return zoo.load("uni_moe_tiny", weights=False, device="cpu")


@pytest.fixture(scope="module")
def data() -> Any:
    return build(DataSection(name="mixture", limit=8, options={"parts": PARTS}), "eval")


def by_modality(x: Any, logits: Any, routing: Any) -> Any:
    """Expert 0 for words, 1 for patches, 3 for sounds."""
    expert = torch.tensor([0, 1, 2, 2, 3])[routing.context.modality.flatten().clamp(min=0)]
    return replace(routing, experts=torch.where(routing.experts < 4, expert[:, None], 4))


def test_experts_that_name_the_modality_tell_all_of_it(model: Any, data: Any) -> None:
    task = tasks.build("specialisation")
    names = list(mmoe.moe_layers(model))
    with mmoe.override(model, dict.fromkeys(names, by_modality)):
        told = task.measure(model, data)
    assert told["MI"] == told["largest MI"] == told["modalities"] > 1.0
    with mmoe.override(model, dict.fromkeys(names[:1], by_modality)):
        first = task.measure(model, data)
    assert first["MI"] < first["largest MI"] == told["modalities"]


def test_routers_that_were_not_trained_tell_little(model: Any, data: Any) -> None:
    told = tasks.build({"name": "specialisation", "samples": 8}).measure(model, data)
    assert 0 <= told["MI"] <= told["largest MI"] < told["modalities"]


def test_samples_are_evenly_spaced_over_all_parts(model: Any, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    read = type(data).readable

    def noted(self: Any, indices: Any) -> Any:
        seen.extend(data.name(index).partition(":")[0] for index in indices)
        return read(self, indices)

    monkeypatch.setattr(type(data), "readable", noted)
    tasks.build({"name": "specialisation", "samples": len(data) - 1}).measure(model, data)
    assert len(seen) == len(data) - 1 and set(seen) == set(PARTS)


def test_what_has_no_experts_or_no_parts_is_refused(data: Any) -> None:
    dense = zoo.load("uni_moe_tiny", weights=False, device="cpu", num_experts=0)
    with pytest.raises(Refused, match="the model has no mixtures"):
        tasks.build("specialisation").check(dense, data)
    with pytest.raises(BadInput, match="its samples have no part"):
        check_fields(tasks.build("specialisation"), build(DataSection(name="sounds"), "eval"), "--task")
