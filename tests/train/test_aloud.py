"""Texts that a program reads aloud: voices, what is read, and what is said where the program is missing."""

from __future__ import annotations

import os
import random
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mmoe.errors import BadInput, BadOverride, MissingExtra
from train.data import aloud, build
from train.data.aloud import Voice, read_aloud
from train.data.dialogues import Dialogues
from train.data.emoji import load_emoji
from train.data.recordings import Prompts
from train.sections import DataSection

IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
there = pytest.mark.skipif(not IN_CI and shutil.which(aloud.PROGRAM) is None, reason="run: make programs")


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


def drones(script: Path, refuses: str = "*") -> Path:
    """It hums for a second whatever the text, but for one; returns where it writes its voices."""
    hum, voices = script.with_name("hum.wav"), script.with_name("voices")
    soundfile.write(hum, np.sin(np.arange(22_050) / 20).astype(np.float32) / 2, 22_050)
    says(script, f"echo \"$2\" >>'{voices}'; grep -Fqx '{refuses}' && {{ echo hoarse >&2; exit 3; }}; cat '{hum}'")
    return voices


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
    first, again, other = (some.drawn(0, seed)["audio"] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not (len(first) == len(other) and np.array_equal(first, other))
    assert some.read(0)["text"] == some.name(0)


def test_voices_are_drawn_by_the_seed() -> None:
    drawn = [Voice.drawn(random.Random(seed)) for seed in range(200)]
    assert drawn[0] == Voice.drawn(random.Random(0))
    assert len({voice.name for voice in drawn}) > 40
    assert all(aloud.SPEEDS[0] <= voice.speed <= aloud.SPEEDS[1] for voice in drawn)


def test_nothing_that_is_held_out_is_read() -> None:
    emoji, words = load_emoji(), partial(re.compile(r"[^a-z]").sub, "")
    held_out = [emoji.concepts[index].name for index in emoji.held_out]
    held_out += [record["text"] for record in Prompts("eval").records]
    held_out += [turn for record in Dialogues("eval").records for turn in record["turns"]]
    held_out = [words(text.lower()) for text in held_out]
    assert {"thankyou", "no", "xray"} < set(held_out)
    for source in aloud.SOURCES:
        texts = data(texts=[source]).texts
        assert len(texts) > 300 and not {words(text.lower()) for text in texts} & set(held_out)
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


def test_a_program_that_cannot_be_started(program: Path) -> None:
    program.mkdir()
    with pytest.raises(MissingExtra, match=r"cannot start .*espeak-ng: Permission denied"):
        read_aloud("hello", Voice())


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'no such voice' >&2; exit 3", "no such voice"),
        ("exit 4", "espeak-ng ended with 4"),
        ("echo usage: espeak", "espeak-ng writes no sound: .*[Ff]ormat"),
        ("true", "says nothing for it"),
    ],
)
def test_a_program_that_fails(program: Path, script: str, told: str) -> None:
    says(program, script)
    with pytest.raises(BadInput, match=told):
        read_aloud("hello", Voice())


def test_a_program_that_hangs(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(program, "exec sleep 30")
    monkeypatch.setattr(aloud, "_SECONDS", 0.2)
    with pytest.raises(BadInput, match=r"took more than 0\.2 s"):
        read_aloud("hello", Voice())


def test_a_text_that_cannot_be_read_is_left_out(program: Path) -> None:
    some = data(texts=["emoji"], limit=3)
    drones(program, refuses=some.texts[0])
    some.allow_broken(0)
    with pytest.raises(BadInput, match=rf"1 samples cannot be read\n  {some.texts[0]}: hoarse"):
        some.samples([0, 1], [5, 6])
    some.allow_broken(1)
    assert [one["text"] for one in some.samples([0, 1], [5, 6])] == [some.texts[1]] * 2
    assert some.broken == {some.texts[0]: "hoarse"}


def test_a_text_in_a_mixture_is_read_once_by_the_voice_of_its_seed(program: Path) -> None:
    parts = {"words": {"name": "dialogues"}, "aloud": {"name": "aloud", "options": {"strength": 0}}}
    mixture, voices = build(DataSection(name="mixture", options={"parts": parts}), "train"), drones(program)
    last = len(mixture) - 1
    (first,) = mixture.vary(mixture.samples([last], [3]), [3])
    assert first["part"] == "aloud" and len(first["audio"]) == 16_000
    assert voices.read_text().split() == [Voice.drawn(random.Random(3)).name]


@there
def test_a_text_without_words() -> None:
    with pytest.raises(BadInput, match="says nothing for it"):
        read_aloud("", Voice())
