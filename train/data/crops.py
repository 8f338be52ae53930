"""Random parts of pictures, mirrored half of the time: all that models of picture quality are trained with.

Colours, sizes and sharpness stay as they are, as these are what quality is about (Gamma, arXiv 2503.06678: flip, then
crop). Shapes: S side of the part in pixels.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image, ImageOps

from train.data.base import Sample


def cropped(samples: Sequence[Sample], side: int | None, seeds: Sequence[int]) -> list[Sample]:
    """Samples with a random square part of their pictures, mirrored or not; the whole picture where there is no side.

    Pictures with a shorter side than that are enlarged first.

    Args:
        samples: with "image".
        side: in pixels.
        seeds: one per sample.

    Example:
        >>> (sample,) = cropped([{"image": Image.new("RGB", (40, 30)), "score": 1.0}], 24, [0])
        >>> sample["image"].size, sample["score"]
        ((24, 24), 1.0)
    """
    return [
        {**sample, "image": _part(sample["image"], side, random.Random(seed))}
        for sample, seed in zip(samples, seeds, strict=True)
    ]


def _part(image: Image.Image, side: int | None, draw: random.Random) -> Image.Image:
    image = ImageOps.mirror(image) if draw.random() < 0.5 else image
    if side is None:
        return image
    shorter = min(image.size)
    if shorter < side:
        larger = [max(side, round(length * side / shorter)) for length in image.size]
        image = image.resize(larger, Image.Resampling.BICUBIC)
    left, top = draw.randint(0, image.width - side), draw.randint(0, image.height - side)
    return image.crop((left, top, left + side, top + side))
