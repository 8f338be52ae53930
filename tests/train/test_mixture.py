"""Bundled recordings and dialogues, and several data sets as one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zoo
from mmoe.errors import BadInput, BadOverride, UnknownName
from tests.train.test_data import load, pairs
from train.data import build, files_of
from train.data.loader import Steps
from train.data.recordings import SOUND_QUESTION, read_sheet
from train.replies import asked
from train.sections import DataSection

PARTS = {"sounds": {"name": "sounds"}, "words": {"name": "dialogues"}}


@pytest.mark.parametrize("name", ["prompts", "sounds", "dialogues", "emoji_names", "emoji_words"])
def test_bundled_data_hold_out_what_they_say(name: str) -> None:
    train, held = load(name, None), load(name, None, "eval")
    texts = [
        {str(data.read(i).get("turns", data.read(i).get("text"))).lower() for i in range(len(data))}
        for data in (train, held)
    ]
    assert len(train) > len(held) > 30
    names = [{data.name(i) for i in range(len(data))} for data in (train, held)]
    assert not names[0] & {one for one in names[1] if not one.startswith("openmoji")}
    if name in ("prompts", "dialogues"):
        assert not texts[0] & texts[1]
    if name == "sounds":
        assert texts[1] <= texts[0], "every name that is asked for is heard in training"


def test_held_out_emoji_are_in_no_training_sample() -> None:
    train, held = load("emoji_names", None), load("emoji_names", None, "eval")
    new = {held.read(i)["text"] for i in range(len(held)) if held.read(i)["group"] == "new concept"}
    assert len(new) == 300 and not new & {train.name(i).partition(": ")[2] for i in range(len(train))}
    assert not any(train.name(i).startswith("twemoji") for i in range(len(train)))
    assert not held.pooled


def test_recordings_are_where_their_sheet_says() -> None:
    samples, records = read_sheet("speech")
    data = load("prompts", None)
    loud = [float(np.abs(data.read(i)["audio"]).max()) for i in range(len(data))]
    assert min(loud) > 0.01, "no record is silence"
    ends = [one["begin"] + one["seconds"] for one in records]
    assert all(end < after["begin"] for end, after in zip(ends, records[1:], strict=False))
    assert ends[-1] <= len(samples) / 16_000
    between = [np.abs(samples[round(end * 16_000) + 320 :][:960]).max() for end in ends[:50]]
    assert max(between) < 0.05, "and what is between them is silence"


def test_training_varies_a_recording_and_evaluation_does_not() -> None:
    data = load("prompts", None)
    sample = data.read(0)
    first, second, again = (one["audio"] for one in data.vary([sample] * 3, [1, 2, 1]))
    assert len(first) != len(second) and (first == again).all()
    still = load("prompts", None, options={"strength": 0.0})
    assert still.vary([sample], [1])[0]["audio"] is sample["audio"]
    (wild,) = load("prompts", None, options={"strength": 4.9}).vary([sample], [3])
    assert np.isfinite(wild["audio"]).all()


def test_sounds_through_the_branch_that_hears_speech() -> None:
    """Where a model has one branch for both, the question tells what is meant."""
    data = load("sounds", None, options={"heard_as": "speech"})
    sample, usual = data.read(0), load("sounds", None).read(0)
    assert sample["speech"] is not None and set(usual) == {"sound", "text"} and sample["text"] == usual["text"]
    assert asked(sample) == {"speech": sample["speech"], "text": SOUND_QUESTION}
    (varied,) = data.vary([sample], [0])
    assert varied["question"] == SOUND_QUESTION and len(varied["speech"]) != len(sample["speech"])
    model: Any = zoo.load("uni_moe_tiny", weights=False, device="cpu", sound=None)
    batch = model.training_batch([varied, {"audio": sample["speech"], "text": "hello"}])
    said = [model.tokenizer.decode([one for one in row if one >= 0]) for row in batch["input_ids"].tolist()]
    assert SOUND_QUESTION in said[0] and SOUND_QUESTION not in said[1]
    with pytest.raises(BadOverride, match="heard_as='text'"):
        load("sounds", None, options={"heard_as": "text"})


def test_a_sample_varies_by_its_seed_alone_whatever_else_is_in_the_batch() -> None:
    parts = {"pictures": {"name": "emoji_names"}, "heard": {"name": "prompts"}, "words": {"name": "emoji_words"}}
    data = mixture(parts=parts)
    samples = data.samples([len(data) - 1, 5, len(data.parts["pictures"]) + 3, 7])
    together = data.vary(samples, [1, 2, 3, 4])
    assert [one["part"] for one in together] == ["words", "pictures", "heard", "pictures"]
    for sample, seed, varied in zip(samples, [1, 2, 3, 4], together, strict=True):
        (alone,) = data.vary([sample], [seed])
        for field in ("image", "audio", "turns"):
            assert np.array_equal(alone.get(field), varied.get(field))


def mixture(split: str = "train", **options: Any) -> Any:
    return build(DataSection(name="mixture", options={"parts": PARTS, **options}), split)


def test_a_mixture_has_all_samples_of_its_parts() -> None:
    data = mixture()
    assert len(data) == len(load("sounds", None)) + len(load("dialogues", None))
    assert data.read(0)["part"] == "sounds" and data.read(len(data) - 1)["part"] == "words"
    assert data.name(0).startswith("sounds: ") and data.size(len(data) - 1) > 1
    assert len({data.name(i) for i in range(len(data))}) == len(data)


def part_of(data: Any, index: int) -> str:
    return str(data.name(index).partition(":")[0])


def test_a_pass_takes_parts_as_often_as_their_weight() -> None:
    parts = {"sounds": {"name": "sounds", "weight": 2.5}, "words": {"name": "dialogues", "weight": 0.5}}
    data = mixture(parts=parts)
    batches = data.epoch(8, 0)
    counts = Counter(part_of(data, index) for batch in batches for index in batch)
    sounds, words = round(2.5 * len(load("sounds", None))), round(0.5 * len(load("dialogues", None)))
    assert sounds + words - sum(counts.values()) < 8
    assert abs(counts["sounds"] - sounds) < 8 and abs(counts["words"] - words) < 8
    assert any(len({part_of(data, index) for index in batch}) == 2 for batch in batches)
    assert batches == data.epoch(8, 0) != data.epoch(8, 1)


def test_grouped_batches_are_of_one_part_and_leave_none_out() -> None:
    data = mixture(grouped=True)
    batches = data.epoch(16, 0, shares=4)
    assert all(len({part_of(data, index) for index in batch}) == 1 and len(batch) == 16 for batch in batches)
    assert {index for batch in batches for index in batch} == set(range(len(data)))
    worst = [np.ptp([sum(data.size(i) for i in batch[share * 4 :][:4]) for share in range(4)]) for batch in batches]
    whole = [sum(data.size(i) for i in batch) / 4 for batch in batches]
    assert np.mean(np.array(worst) / whole) < 0.25, "processes have about the same to do"


def test_processes_see_one_part_at_a_step() -> None:
    data = mixture(grouped=True)
    steps = [Steps(data, None, 8, (0, "stage"), rank, 2) for rank in range(2)]  # type: ignore[arg-type]  # batches are not made
    for step in range(20):
        both = [part_of(data, index) for index in steps[0].indices(step)]
        assert len(set(both)) == 1 and steps[0].indices(step) == steps[1].indices(step)


def test_a_mixture_reads_ones_own_data(tmp_path: Path) -> None:
    parts = {"mine": {"name": "pairs", "path": str(pairs(tmp_path))}, "words": {"name": "dialogues"}}
    data = mixture(parts=parts)
    assert data.read(0)["image"].size == (20, 16)
    assert len(mixture("eval", parts=parts).parts["mine"]) == 1


def test_files_of_a_mixture_are_those_of_its_parts() -> None:
    parts = {"earth": {"name": "blue_marble"}, "words": {"name": "dialogues"}}
    assert files_of("mixture", {"parts": parts}) == files_of("blue_marble", {})
    assert files_of("mixture", {}) == ()


def test_a_part_of_little_weight_has_one_sample() -> None:
    parts = {"sounds": {"name": "sounds", "weight": 0.001}, "words": {"name": "dialogues"}}
    data = mixture(parts=parts)
    counts = Counter(part_of(data, index) for batch in data.epoch(1, 0) for index in batch)
    assert counts["sounds"] == 1


def test_broken_samples_of_parts_are_left_out(tmp_path: Path) -> None:
    rows = [{"image": f"{number}.png", "text": "x"} for number in range(40)]
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    mine = {"mine": {"name": "pairs", "path": str(tmp_path / "bad.json")}, "words": {"name": "dialogues"}}
    section = DataSection(name="mixture", max_broken=50, options={"parts": mine})
    data = build(section, "train")
    assert data.samples([0])[0]["part"] == "words", "the next one that can be read"
    assert data.parts["mine"].most_broken == 50


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (None, "parts are data sets by a name of one's own"),
        ({}, "parts are data sets by a name of one's own"),
        ({"a": "emoji_names"}, "it does not name its data set"),
        ({"a": {"name": "sounds", "wieght": 2}}, "did you mean: weight"),
        ({"a": {"name": "sounds", "weight": 0}}, "weight is a finite number above 0"),
        ({"a": {"name": "mixture"}}, "it is a mixture itself"),
        ({"a": {"name": "sounds", "options": 3}}, "options: Input should be a valid dictionary"),
        ({"a": {"name": "pairs", "path": 5}}, "path: "),
    ],
)
def test_mixtures_that_cannot_be(parts: Any, told: str) -> None:
    with pytest.raises(BadOverride) as error:
        mixture(parts=parts)
    assert told in str(error.value)


def test_errors_of_parts_are_told(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="emoji_names"):
        mixture(parts={"a": {"name": "emoji_name"}})
    with pytest.raises(BadInput, match="without a path"):
        mixture(parts={"a": {"name": "pairs"}})
    with pytest.raises(BadInput, match="make batches of 999"):
        mixture().epoch(999, 0)
    (tmp_path / "bad.json").write_text(json.dumps([{"image": "no.png", "text": "x"}] * 3))
    own = mixture(parts={"mine": {"name": "pairs", "path": str(tmp_path / "bad.json")}})
    with pytest.raises(BadInput, match=r"no\.png"):
        own.samples([0])
