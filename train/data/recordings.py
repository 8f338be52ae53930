"""The bundled recordings: spoken prompts with what is said, and short sounds with names.

Data card, licences and how they were built: assets/data/recordings/README.md. Splits are fixed: sentences of prompts
are held out with all recordings of them, and of every sound with a few recordings a third. Shapes: S samples at 16 kHz.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import numpy as np

from mmoe.options import check_choice, check_float
from train.data.base import DataSet, Sample, Split, data_sets
from zoo.assets import asset
from zoo.sounds import RATE, read_sound

FOLDER = "data/recordings"
SLOWEST = 0.25  # speed and loudness, at any strength
SPEEDS = 0.85, 1.2  # of recordings that are trained on, against the original
LOUDNESS = 0.3, 1.5
NOISE = 0.0, 0.02  # standard deviation, against a full swing of 1
SOUND_QUESTION = "What makes this sound?"
SHIFT = 0.2  # seconds of silence in front, at most


@cache
def read_sheet(kind: str) -> tuple[np.ndarray, tuple[dict[str, Any], ...]]:
    """All recordings of a kind.

    Args:
        kind: "speech" or "sounds".

    Returns:
        The samples of all, one after the other, and a record of each: "id", "text", "begin" and "seconds" in the
        sheet, "held_out".

    Example:
        >>> samples, records = read_sheet("sounds")
        >>> records[0]["text"], len(records)
        ('drone', 124)
    """
    import soundfile

    samples, rate = soundfile.read(asset(f"{FOLDER}/{kind}.ogg"), dtype="float32")
    records = json.loads(asset(f"{FOLDER}/{kind}.json").read_text(encoding="utf-8"))
    return read_sound((rate, samples)), tuple(records)


class _Recordings(DataSet):
    """Recordings of one sheet.

    Args:
        split: "train" has all that are not held out.
        strength: how much speed, loudness and noise of training recordings vary: 0 not at all, 1 as usual.
        limit: uses so many.
    """

    sheet: ClassVar[str]
    field = "audio"
    needs_path = False

    def __init__(self, split: Split, *, strength: float = 1.0, limit: int | None = None) -> None:
        super().__init__()
        check_float("strength", strength, low=0, below=5)
        self.strength, (self._samples, records) = strength, read_sheet(self.sheet)
        self.records = [one for one in records if one["held_out"] == (split == "eval")][:limit]

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        """Its name in the package that it comes from."""
        return str(self.records[index]["id"])

    def size(self, index: int) -> float:
        """Seconds."""
        return float(self.records[index]["seconds"])

    def read(self, index: int) -> Sample:
        """Samples (S,), and the text."""
        record = self.records[index]
        first, count = round(record["begin"] * RATE), round(record["seconds"] * RATE)
        return {self.field: self._samples[first : first + count], "text": record["text"]}

    def vary(self, samples: Sequence[Sample], seeds: Sequence[int]) -> list[Sample]:
        """At another speed and loudness, a little later, and with some noise."""
        drawn = zip(samples, seeds, strict=True)
        return [{**one, self.field: varied(one[self.field], seed, self.strength)} for one, seed in drawn]


def varied(samples: np.ndarray, seed: int, strength: float = 1.0) -> np.ndarray:
    """A recording as it might be heard elsewhere.

    Args:
        samples: (S,).
        seed: of what is drawn.
        strength: 0 leaves the recording.

    Example:
        >>> sound = np.sin(np.arange(16_000) / 10).astype(np.float32)
        >>> bool((varied(sound, 0, 0.0) == sound).all()), len(varied(sound, 0)) == len(varied(sound, 1))
        (True, False)
    """
    if not strength:
        return samples
    draw, noise = random.Random(seed), np.random.default_rng(seed)
    speed, loudness = (max(SLOWEST, 1 + strength * (draw.uniform(*ends) - 1)) for ends in (SPEEDS, LOUDNESS))
    places = np.arange(0, len(samples) - 1, speed)
    faster = np.interp(places, np.arange(len(samples)), samples)
    later = np.pad(faster, (round(strength * draw.uniform(0, SHIFT) * RATE), 0))
    heard = loudness * later + strength * draw.uniform(*NOISE) * noise.standard_normal(len(later))
    return heard.astype(np.float32)


@data_sets.register("prompts")
class Prompts(_Recordings):
    """The bundled prompts of a telephone exchange: one voice, English, what is said as text."""

    sheet = "speech"
    fields = ("audio", "text")
    task = "transcription"


@data_sets.register("sounds")
class Sounds(_Recordings):
    """The bundled sounds: drums, strings, machines, each with the name of what is heard.

    Args:
        split: "train" has all that are not held out.
        heard_as: the branch that hears them: "sound", or "speech" in models that have one for both.
        strength: as of prompts.
        limit: uses so many.
    """

    sheet = "sounds"
    fields = ("sound", "text")
    task = "naming"

    def __init__(
        self, split: Split, *, heard_as: str = "sound", strength: float = 1.0, limit: int | None = None
    ) -> None:
        check_choice("heard_as", heard_as, ("sound", "speech"))
        super().__init__(split, strength=strength, limit=limit)
        self.field = heard_as

    def read(self, index: int) -> Sample:
        """As of all recordings; with the question where it is not told by the branch that hears."""
        sample = super().read(index)
        return sample if self.field == "sound" else {**sample, "question": SOUND_QUESTION}
