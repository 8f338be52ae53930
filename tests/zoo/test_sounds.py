"""Sounds from files and arrays, and their parts of 30 seconds."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from scipy.io import wavfile

from mmoe.errors import BadInput
from zoo.sounds import CHUNK, ENDINGS, RATE, chunks, read_sound


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


ENCODED = {
    "a.wav": {"subtype": "PCM_24"},
    "a.flac": {},
    "a.ogg": {"subtype": "VORBIS"},
    "a.oga": {"format": "OGG", "subtype": "VORBIS"},
    "a.opus": {"format": "OGG", "subtype": "OPUS"},
    "a.mp3": {},
}


@pytest.mark.parametrize("rate", [8_000, 48_000])
@pytest.mark.parametrize("name", ENCODED)
def test_every_format_says_the_same(name: str, rate: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / name, np.stack([tone(rate, 2.0), 0 * tone(rate, 2.0)], 1), rate, **ENCODED[name])
    found = read_sound(tmp_path / name)
    assert found.dtype == np.float32 and len(found) / RATE == pytest.approx(2.0, abs=0.1)
    spectrum = np.abs(np.fft.rfft(found))
    assert np.fft.rfftfreq(len(found), 1 / RATE)[spectrum.argmax()] == pytest.approx(440, abs=2)
    assert found[4000:-4000].std() == pytest.approx(0.25 / np.sqrt(2), abs=0.02)


def test_formats_are_known_by_their_content(tmp_path: Path) -> None:
    assert {Path(name).suffix for name in ENCODED} == set(ENDINGS)
    soundfile.write(tmp_path / "a.flac", tone(RATE), RATE)
    (tmp_path / "a.flac").rename(tmp_path / "a.mp3")
    assert len(read_sound(tmp_path / "a.mp3")) == RATE // 2


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_without_a_byte(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"empty{ending}").touch()
    with pytest.raises(BadInput, match=rf"cannot read '.*empty\{ending}'\n  it has no bytes"):
        read_sound(tmp_path / f"empty{ending}")


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6])
def test_a_file_that_ends_early_is_told_or_heard(name: str, share: float, tmp_path: Path) -> None:
    soundfile.write(tmp_path / name, tone(RATE, 3.0), RATE, **ENCODED[name])
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    try:
        assert np.isfinite(read_sound(tmp_path / name)).all()
    except BadInput as error:
        assert name in error.asked and error.wrong


def test_files_that_are_no_sound(tmp_path: Path) -> None:
    for name, told in (
        ("a.wav", "Format not recognised.\n  try: a WAV, FLAC, OGG or MP3 file"),
        ("a.m4a", r"Format not recognised.\n  try: ffmpeg -i '.*a\.m4a' '.*a\.wav'"),
        ("a.raw", "ffmpeg -i"),
    ):
        (tmp_path / name).write_bytes(bytes(range(256)) * 20)
        with pytest.raises(BadInput, match=told):
            read_sound(tmp_path / name)
    with pytest.raises(BadInput, match="it is a folder"):
        read_sound(tmp_path)


def test_a_file_of_odd_rate_or_values(tmp_path: Path) -> None:
    wavfile.write(tmp_path / "slow.wav", 10, np.ones(20, dtype=np.int16))
    with pytest.raises(BadInput, match=r"slow\.wav'\n  it says that it has 10 samples a second"):
        read_sound(tmp_path / "slow.wav")
    wavfile.write(tmp_path / "empty.wav", RATE, np.zeros(0, dtype=np.int16))
    with pytest.raises(BadInput, match=r"empty\.wav'\n  it has no samples"):
        read_sound(tmp_path / "empty.wav")
    wavfile.write(tmp_path / "odd.wav", RATE, np.array([0.0, np.inf], dtype=np.float32))
    with pytest.raises(BadInput, match=r"odd\.wav'\n  it holds values that are no numbers"):
        read_sound(tmp_path / "odd.wav")
    wavfile.write(tmp_path / "silent.wav", 8_000, np.zeros((800, 2), dtype=np.int16))
    assert not read_sound(tmp_path / "silent.wav").any()


def test_a_long_file_is_told_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "hour.flac", np.zeros(3660 * 1000, dtype=np.int16), 1000)
    soundfile.write(tmp_path / "minute.flac", tone(8_000, 61.0), 8_000)
    assert len(read_sound(tmp_path / "minute.flac")) == 61 * RATE
    monkeypatch.setattr(soundfile.SoundFile, "blocks", None)
    with pytest.raises(BadInput, match=r"hour\.flac'\n  it is longer than the 60\.0 minutes that fit: 61\.0 minutes"):
        read_sound(tmp_path / "hour.flac")
    with pytest.raises(BadInput, match=r"minute\.flac'\n  it is longer than the 60 seconds that fit: 61 seconds"):
        read_sound(tmp_path / "minute.flac", 60)


def test_memory_is_bounded_however_many_channels(tmp_path: Path) -> None:
    values = np.full((RATE, 200), 1 << 14, dtype=np.int16)
    soundfile.write(tmp_path / "a.wav", values, RATE)
    tracemalloc.start()
    found = read_sound(tmp_path / "a.wav")
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
    np.testing.assert_allclose(found, 0.5, atol=1e-3)


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
