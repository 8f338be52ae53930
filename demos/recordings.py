"""Recordings that pages offer as tiles: bundled speech and sounds that no model here was trained on."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

from demos.examples import Example
from train.data.recordings import FOLDER
from zoo.assets import asset

Recording = tuple[tuple[int, np.ndarray], str]  # rate and samples, and "speech" or "sound"
SHEETS = {"speech": "speech", "sound": "sounds"}
SECONDS = {"speech": (1.5, 3.6), "sound": (0.4, 3.1)}  # of those that are offered


def recordings(kind: str, most: int = 8) -> list[Example]:
    """Held-out recordings of a kind, one for each text.

    Args:
        kind: "speech" or "sound".
        most: at most so many.

    >>> [one.id for one in recordings("sound", 2)]
    ['sound/ambi_drone', 'sound/bass_dnb_f']
    """
    records = json.loads(asset(f"{FOLDER}/{SHEETS[kind]}.json").read_text(encoding="utf-8"))
    low, high = SECONDS[kind]
    held = [one for one in records if one["held_out"] and low <= one["seconds"] <= high and one["text"][:1].strip()]
    if kind == "speech":
        held = [one for one in held if one["text"][0].isupper() and one["text"][-1] in ".?"]
    chosen = list({one["text"]: one for one in reversed(held)}.values())[::-1][:most]
    return [
        Example(
            id=f"{kind}/{one['id']}",
            name=one["text"],
            read=partial(_read, kind, one["begin"], one["seconds"]),
            drawn=partial(_drawn, kind, one["begin"], one["seconds"]),
            mark=kind,
        )
        for one in chosen
    ]


def _read(kind: str, begin: float, seconds: float) -> Recording:
    """A piece of a sheet."""
    import soundfile

    with soundfile.SoundFile(asset(f"{FOLDER}/{SHEETS[kind]}.ogg")) as file:
        file.seek(round(begin * file.samplerate))
        samples = file.read(round(seconds * file.samplerate), dtype="int16")
        return (file.samplerate, samples), kind


def _drawn(kind: str, begin: float, seconds: float, side: int = 64, bars: int = 16) -> Image.Image:
    """How loud it is from its begin to its end, as bars."""
    (_, samples), _ = _read(kind, begin, seconds)
    loud = np.array([np.abs(part.astype(np.float32)).max(initial=0) for part in np.array_split(samples, bars)])
    heights = np.maximum(1, side / 2 * loud / max(loud.max(), 1) - 4)
    canvas, step = Image.new("RGB", (side, side), "white"), side / bars
    draw = ImageDraw.Draw(canvas)
    for place, height in enumerate(heights):
        left = place * step
        draw.rectangle((left + 1, side / 2 - height, left + step - 1.5, side / 2 + height), "#0072B2")
    return canvas
