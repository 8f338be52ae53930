"""Texts that a program reads aloud: voices, what is read, and what is said where the program is missing."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmoe.errors import BadInput, BadOverride, CorruptFile, MissingExtra
from train.data import aloud, build
from train.data.aloud import Voice, read_aloud
from train.data.recordings import Prompts
from train.sections import DataSection

there = pytest.mark.skipif(shutil.which(aloud.PROGRAM) is None, reason="espeak-ng is not installed")


def data(split: str = "train", limit: int | None = None, **options: object) -> aloud.Aloud:
    found = build(DataSection(name="aloud", limit=limit, options=options), split)  # type: ignore[arg-type]  # a word of a test
    assert isinstance(found, aloud.Aloud)
    return found


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of espeak-ng that writes what it is given, as a script may say."""
    script = tmp_path / aloud.PROGRAM
    monkeypatch.setattr(aloud, "PROGRAM", str(script))
    return script


def says(script: Path, text: str) -> None:
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)


@there
def test_a_text_is_read() -> None:
    heard = read_aloud("The conference is full.", Voice())
    assert heard.dtype == np.float32 and 0.8 < len(heard) / 16_000 < 4 and 0.05 < np.abs(heard).max() <= 1
    slower = read_aloud("The conference is full.", Voice(speed=100))
    assert len(slower) > 1.2 * len(heard)
    assert len(read_aloud("Good night", Voice())) < len(heard)


@there
@pytest.mark.parametrize("accent", aloud.ACCENTS)
def test_every_voice_is_there(accent: str) -> None:
    heard = {variant: read_aloud("hello", Voice(name=accent + variant)) for variant in aloud.VARIANTS}
    assert all(len(one) > 2000 for one in heard.values())
    assert len({one.tobytes() for one in heard.values()}) == len(heard), "they differ"


@there
def test_another_voice_in_each_pass() -> None:
    some = data(texts=["emoji"], limit=2, strength=0.0)
    first, again, other = (some.vary([some.raw(0)], [seed])[0]["audio"] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not (len(first) == len(other) and np.array_equal(first, other))
    assert some.read(0)["text"] == some.name(0)


def test_voices_are_drawn_by_the_seed() -> None:
    drawn = [Voice.drawn(random.Random(seed)) for seed in range(200)]
    assert drawn[0] == Voice.drawn(random.Random(0))
    assert len({voice.name for voice in drawn}) > 40
    assert all(aloud.SPEEDS[0] <= voice.speed <= aloud.SPEEDS[1] for voice in drawn)


def test_nothing_that_is_held_out_is_read() -> None:
    texts = set(data().texts)
    held_out = {record["text"] for record in Prompts("eval").records} - {r["text"] for r in Prompts("train").records}
    assert len(texts) > 1500 and not texts & held_out
    assert len(data("eval")) == 0, "people's speech is what counts"


def test_texts_are_words_alone() -> None:
    texts = data(longest=30).texts
    assert max(map(len, texts)) <= 30
    assert not any(sign.isdigit() or sign in ":()#&" for text in texts for sign in text)
    assert set(data(texts=["emoji"]).texts) < set(data().texts)


def test_wrong_options() -> None:
    with pytest.raises(BadOverride, match="texts='prompt'"):
        data(texts=["prompt"])
    with pytest.raises(BadOverride, match="it is a list"):
        data(texts="prompts")


def test_without_the_program(program: Path) -> None:
    with pytest.raises(MissingExtra, match=r"is not installed\n  try: apt install"):
        read_aloud("hello", Voice())


def test_a_program_that_fails(program: Path) -> None:
    says(program, "echo 'no such voice' >&2; exit 3")
    with pytest.raises(CorruptFile, match=r"no such voice"):
        read_aloud("hello", Voice())


@there
def test_a_text_without_words() -> None:
    with pytest.raises(BadInput, match="says nothing for it"):
        read_aloud("", Voice())
