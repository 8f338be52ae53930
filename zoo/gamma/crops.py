"""Crops of pictures: five fixed ones, random ones, and what becomes of pictures that are smaller than a crop.

Source: arXiv 2503.06678 and its code, which averages the scores of ten random crops without a seed. Ours are five fixed
ones by default; the random ones come from a seed and depend on nothing but it and the picture's size. The authors' code
fails on smaller pictures; here their short side is scaled up, which the caller is told.
Shapes: V crops, S side of a crop in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from mmoe.errors import BadInput
from zoo.images import MAX_PIXELS

Offsets = list[tuple[int, int]]


def five_offsets(height: int, width: int, size: int) -> Offsets:
    """Tops and lefts of the centre, the upper left, upper right, lower left and lower right crop.

    >>> five_offsets(6, 4, 4)
    [(1, 0), (0, 0), (0, 0), (2, 0), (2, 0)]
    """
    bottom, right = height - size, width - size
    return [(bottom // 2, right // 2), (0, 0), (0, right), (bottom, 0), (bottom, right)]


def random_offsets(height: int, width: int, size: int, count: int, generator: torch.Generator | None = None) -> Offsets:
    """Tops and lefts of random crops: for each a top, then a left, is drawn, as the authors do.

    >>> random_offsets(4, 4, 4, 2)
    [(0, 0), (0, 0)]
    """
    limits = height - size + 1, width - size + 1
    return [
        (int(torch.randint(limits[0], (), generator=generator)), int(torch.randint(limits[1], (), generator=generator)))
        for _ in range(count)
    ]


def cut(image: Tensor, offsets: Sequence[tuple[int, int]], size: int) -> Tensor:
    """Crops of pictures (..., 3, H, W) -> (..., V, 3, S, S).

    >>> cut(torch.zeros(2, 3, 8, 9), [(0, 0), (4, 5)], 4).shape
    torch.Size([2, 2, 3, 4, 4])
    """
    return torch.stack([image[..., top : top + size, left : left + size] for top, left in offsets], dim=-4)


def cut_picture(picture: Image.Image, offsets: Sequence[tuple[int, int]], size: int) -> list[Image.Image]:
    """Crops of a picture, without a copy of the rest of it."""
    return [picture.crop((left, top, left + size, top + size)) for top, left in offsets]


def shrink(picture: Image.Image, short_side: int) -> Image.Image:
    """A picture whose short side has so many pixels at most.

    >>> shrink(Image.new("RGB", (80, 40)), 20).size, shrink(Image.new("RGB", (8, 4)), 20).size
    ((40, 20), (8, 4))
    """
    short = min(picture.size)
    if short <= short_side:
        return picture
    width, height = (max(short_side, round(side * short_side / short)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def enlarge(picture: Image.Image, size: int) -> tuple[Image.Image, bool]:
    """A picture whose short side is at least `size`, and whether it had to be scaled up for that.

    Raises:
        BadInput: it is so long that scaling would make it too large.

    >>> enlarge(Image.new("RGB", (10, 40)), 20)[0].size, enlarge(Image.new("RGB", (30, 40)), 20)[1]
    ((20, 80), False)
    """
    short = min(picture.size)
    if short >= size:
        return picture, False
    width, height = (max(size, round(side * size / short)) for side in picture.size)
    if width * height > MAX_PIXELS:
        wrong = f"its short side is scaled up to {size} pixels, which makes {width} x {height}"
        asked = f"cannot crop a picture of {picture.width} x {picture.height}"
        raise BadInput(asked, wrong, "cut away a part of its long side")
    return picture.resize((width, height), Image.Resampling.BICUBIC), True
