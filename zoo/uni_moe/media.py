"""Pictures, videos, speech and sounds as the tensors that Uni-MoE's encoders read.

    picture  short side to S, middle S x S, normalised as its encoder's     video  some of its frames, each as a picture
    speech   parts as long as the encoder hears -> Whisper's log-mels       sound  parts of 30 s -> BEATs' filter bank

The last part of a recording is filled up: with silence for Whisper, with its last sample for BEATs, as the authors do.
Shapes: F frames, S side, C parts, M mel bands, T times.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor
from torchvision.transforms import functional as pictures

from mmoe.errors import BadInput
from mmoe.options import check_int
from zoo.hosts.beats import log_mels
from zoo.images import read_image
from zoo.sounds import CHUNK, RATE, chunks, read_sound

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
_FRAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def image_tensor(source: Any, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """A picture as (3, S, S).

    Args:
        source: as for `zoo.images.read_image`.
        size: S.
        mean, std: of red, green and blue in 0..1.
    """
    picture = pictures.resize(read_image(source), [size], pictures.InterpolationMode.BICUBIC, antialias=True)
    tensor = pictures.to_tensor(pictures.center_crop(picture, [size, size]))
    return pictures.normalize(tensor, list(mean), list(std))


def video_tensor(
    source: Any, size: int, frames: int = 8, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> Tensor:
    """Frames of a video as (F, 3, S, S), evenly spaced; all of a video that has fewer.

    Args:
        source: a folder of pictures, which are taken by name, an animated picture (GIF, WebP), a list of pictures, or
            an array (F, H, W, 3).
        size: S.
        frames: F.
        mean, std: as for `image_tensor`.

    Raises:
        BadInput: there are no frames, or one cannot be read.
    """
    check_int("frames", frames, 1)
    found = list(_frames_of(source))
    if not found:
        raise BadInput("watch a video", "it has no frames", "a folder of pictures, or a list of some")
    chosen = found if len(found) <= frames else [found[round(at)] for at in np.linspace(0, len(found) - 1, frames)]
    return torch.stack([image_tensor(frame, size, mean, std) for frame in chosen])


def videos_of(given: Any) -> list[Any]:
    """Videos of what is given: a list of pictures is one, and so is an array (F, H, W, 3); a list of such, several.

    >>> red = Image.new("RGB", (4, 4))
    >>> [len(videos_of(given)) for given in ([red] * 3, [[red], [red] * 2], ["a.gif", "b.gif"], [], "frames")]
    [1, 2, 2, 0, 1]
    """
    if not isinstance(given, list | tuple):
        return [given]
    several = any(_holds_frames(one) or _is_film(one) for one in given)
    return list(given) if several or not given else [given]


def _holds_frames(source: Any) -> bool:
    """A list, or an array or tensor with a dimension for frames."""
    return isinstance(source, list | tuple) or getattr(source, "ndim", 0) == 4


def _is_film(source: Any) -> bool:
    """A path of a video and not of one picture."""
    if not isinstance(source, str | Path):
        return False
    path = Path(source)
    if path.suffix.lower() not in (".webp", ".png") or not path.is_file():
        return path.suffix.lower() not in _FRAMES
    with suppress(OSError), Image.open(path) as found:
        return getattr(found, "n_frames", 1) > 1
    return False


def _frames_of(source: Any) -> Sequence[Any]:
    if not isinstance(source, str | Path):
        return list(source) if _holds_frames(source) else [source]
    path = Path(source)
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() in _FRAMES)
    if path.suffix.lower() not in (".gif", ".webp", ".png"):
        wrong = "videos are folders of pictures or animated ones; this file is neither"
        raise BadInput(f"watch '{source}'", wrong, f"ffmpeg -i {path.name} frames/%04d.jpg, and then 'frames'")
    read_image(path)  # what is wrong with it, in words
    with Image.open(path) as animation:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(animation)]


def speech_tensor(source: Any, mels: int, positions: int, most: int) -> tuple[Tensor, int]:
    """Log-mels of speech as (C, M, T), a part for all that the encoder hears at once, and how many positions it fills.

    Args:
        source: as for `zoo.sounds.read_sound`.
        mels: M.
        positions: of the encoder, which are 20 ms each; T is twice as many.
        most: parts.
    """
    size = positions * RATE // 50
    samples = read_sound(source, most * size / RATE)
    parts = chunks(samples, most, size=size)
    heard = _whisper(mels)(parts, sampling_rate=RATE, padding="max_length", max_length=size)
    return torch.from_numpy(np.asarray(heard["input_features"])), -(-len(samples) * 50 // RATE)


@cache
def _whisper(mels: int) -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=mels)


def sound_tensor(source: Any, most: int, seconds: int = CHUNK // RATE) -> tuple[Tensor, Tensor]:
    """Filter banks of a sound as (C, T, 128), and which of the samples of its parts are padding (C, S).

    Args:
        source: as for `zoo.sounds.read_sound`.
        most: parts.
        seconds: of a part.
    """
    size = seconds * RATE
    parts = chunks(read_sound(source, most * seconds), most, size=size)
    filled = torch.from_numpy(np.stack([np.pad(part, (0, size - len(part)), mode="edge") for part in parts]))
    lengths = torch.tensor([len(part) for part in parts])
    return log_mels(filled), torch.arange(size) >= lengths[:, None]
