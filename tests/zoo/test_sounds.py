"""Sounds from files and arrays, and their parts of 30 seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import wavfile

from mmoe.errors import BadInput
from zoo.sounds import CHUNK, RATE, chunks, read_sound


def tone(rate: int, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32])
def test_any_rate_and_type_of_two_channels(rate: int, kind: type, tmp_path: Path) -> None:
    values = tone(rate)
    if kind is np.uint8:
        values = np.round(128 + 127 * values)
    elif kind is not np.float32:
        values = np.round(np.iinfo(kind).max * values)
    wavfile.write(tmp_path / "a.wav", rate, np.stack([values, values], 1).astype(kind))
    found = read_sound(tmp_path / "a.wav")
    assert found.dtype == np.float32 and len(found) == pytest.approx(RATE // 2, abs=1)
    middle = slice(2000, 6000)
    np.testing.assert_allclose(found[middle], tone(RATE)[middle], atol=0.02)


def test_channels_are_averaged() -> None:
    assert read_sound((RATE, np.array([[1.0, 0.0], [0.5, -0.5]]))).tolist() == [0.5, 0.0]
    assert read_sound(np.array([0.25, -0.25])).tolist() == [0.25, -0.25]


def test_silence_is_sound() -> None:
    assert not read_sound((RATE, np.zeros(100, dtype=np.int16))).any()


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (np.zeros(0), "cannot use a sound\n  it has no samples"),
        (np.array([np.nan]), "it holds values that are no numbers"),
        (np.array(["a"]), r"not \(1,\) <U1"),
        (None, r"not \(\) object"),
        ((10, np.zeros(5)), "it says that it has 10 samples a second"),
        (("a", np.zeros(5)), "its rate is 'a'"),
        ("gone.wav", "cannot read 'gone.wav'"),
    ],
)
def test_what_is_no_sound(source: Any, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        read_sound(source)


def test_a_file_without_a_byte(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    with pytest.raises(BadInput, match="cannot read"):
        read_sound(tmp_path / "empty.wav")


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 7])
def test_parts_are_the_whole(length: int) -> None:
    samples = np.arange(length, dtype=np.float32)
    for as_released in (False, True):
        parts = chunks(samples, as_released=as_released)
        assert np.array_equal(np.concatenate(parts), samples)
    exact = chunks(samples)
    assert [len(part) for part in exact[:-1]] == [CHUNK] * (len(exact) - 1) and 0 < len(exact[-1]) <= CHUNK
    if length > CHUNK + 1:
        assert len(chunks(samples, as_released=True)[0]) == CHUNK + 1


def test_an_hour_is_told() -> None:
    hour = np.broadcast_to(np.float32(0), 3600 * RATE)
    with pytest.raises(BadInput, match=r"hear 60\.0 minutes of sound\n  at most 20 parts"):
        chunks(hour)
    assert len(chunks(hour, most=120)) == 120
