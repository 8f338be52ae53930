"""Reads sound from files and arrays as one channel at 16 kHz, with one clear error for what is none, and cuts it up.

Shapes: S samples.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mmoe.errors import BadInput
from mmoe.options import check_int

RATE = 16_000  # samples per second
CHUNK = 30 * RATE  # samples of what encoders hear at once
LONGEST = 3600.0  # seconds of what is read at once
ENDINGS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3")
FILES = "a WAV, FLAC, OGG or MP3 file with sound"
_RATES = 1_000, 384_000  # that files may have
_BLOCK = 1 << 18  # values that are decoded at once


def read_sound(source: Any, longest: float = LONGEST) -> np.ndarray:
    """Mean of the channels at 16 kHz, (S,) float32, in [-1, 1] where the source is.

    Args:
        source: path of a WAV, FLAC, OGG (Vorbis, Opus) or MP3 file, a pair of samples per second and samples (S,) or
            (S, channels), or samples at 16 kHz. Integers are scaled by the range of their type.
        longest: seconds that a file may have. One that says at its beginning that it has more is not decoded.

    Raises:
        BadInput: it cannot be read, is longer, has no samples, or values that are no numbers.

    Example:
        >>> read_sound((8_000, np.zeros((800, 2), dtype=np.int16))).shape
        (1600,)
    """
    if isinstance(source, str | Path):
        return _resampled(*_read_file(Path(source), longest))
    name, rate, values = "a sound", RATE, source
    if isinstance(source, tuple) and len(source) == 2:
        rate, values = source
    values = np.asarray(values)
    if values.size and (values.dtype.kind not in "iuf" or values.ndim not in (1, 2)):
        wrong = f"samples are numbers (S,) or (S, channels), not {values.shape} {values.dtype}"
        raise BadInput(f"cannot use {name}", wrong, FILES)
    _check_size(name, rate, len(values) if values.size else 0)
    return _resampled(_one_channel(values, name), int(rate))


def _check_size(name: str, rate: Any, samples: int, longest: float = math.inf) -> None:
    if not isinstance(rate, int | np.integer) or not _RATES[0] <= rate <= _RATES[1]:
        wrong = f"it says that it has {rate:,} samples a second" if isinstance(rate, int) else f"its rate is {rate!r}"
        raise BadInput(f"cannot use {name}", wrong, f"{_RATES[0]:,} to {_RATES[1]:,}")
    if not samples:
        raise BadInput(f"cannot use {name}", "it has no samples", FILES)
    if samples > longest * rate:
        wrong = f"it is longer than the {_duration(longest)} that fit: {_duration(samples / rate)}"
        raise BadInput(f"cannot use {name}", wrong, "cut it, or read it part by part")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 120 else f"{seconds:.3g} seconds"


def _read_file(path: Path, longest: float) -> tuple[np.ndarray, int]:
    """Mean of the channels (S,), decoded block by block, and samples per second."""
    import soundfile

    if not path.is_file():
        wrong = "it is a folder" if path.is_dir() else "there is no such file"
        raise BadInput(f"cannot read '{path}'", wrong, FILES)
    parts: list[np.ndarray] = []
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            _check_size(f"'{path}'", rate, file.frames, longest)
            for block in file.blocks(_BLOCK // file.channels, dtype="float32", always_2d=True):
                parts.append(_one_channel(block, f"'{path}'"))
    except BadInput:
        raise
    except Exception as error:  # a damaged file can raise anything
        fix = FILES if path.suffix.lower() in ENDINGS else f"ffmpeg -i '{path}' '{path.with_suffix('.wav')}'"
        wrong = getattr(error, "error_string", None) or str(error) or "it ends early"
        wrong = "it has no bytes" if not path.stat().st_size else wrong
        raise BadInput(f"cannot read '{path}'", wrong, fix) from error
    _check_size(f"'{path}'", rate, sum(map(len, parts)))
    return np.concatenate(parts), rate


def _one_channel(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype.kind in "iu":
        limits = np.iinfo(values.dtype)
        middle = 128 if limits.min == 0 else 0
        values = (values.astype(np.float32) - middle) / (limits.max + 1 - middle)
    with np.errstate(invalid="ignore"):
        mono: np.ndarray = values.astype(np.float32).reshape(len(values), -1).mean(1)
    if not np.isfinite(mono).all():
        raise BadInput(f"cannot use {name}", "it holds values that are no numbers", FILES)
    return mono


def _resampled(mono: np.ndarray, rate: int) -> np.ndarray:
    if rate == RATE:
        return mono
    from scipy.signal import resample_poly

    common = np.gcd(rate, RATE)
    found: np.ndarray = resample_poly(mono, RATE // common, rate // common).astype(np.float32)
    return found


def chunks(samples: np.ndarray, most: int = 20, *, size: int = CHUNK, as_released: bool = False) -> list[np.ndarray]:
    """Parts of 30 seconds; the last one is as long as what is left.

    Args:
        samples: (S,) at 16 kHz.
        most: parts.
        size: samples of a part.
        as_released: takes a sample more for every part but the last, as Uni-MoE's code for speech does, whose encoder
            then leaves it out.

    Raises:
        BadInput: there are more parts.

    Example:
        >>> [len(part) for part in chunks(np.zeros(1_000_000))]
        [480000, 480000, 40000]
    """
    check_int("most", most, 1)
    step = size + as_released
    parts, rest = [], samples
    while len(rest) > size:
        parts.append(rest[:step])
        rest = rest[step:]
    parts += [rest] if len(rest) else []
    if len(parts) > most:
        asked = f"hear {len(samples) / RATE / 60:.1f} minutes of sound"
        raise BadInput(asked, f"at most {most} parts of {size / RATE:g} seconds fit", "cut it, or read it part by part")
    return parts
