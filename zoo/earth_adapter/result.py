"""What a segmentation is: the class of every pixel, with names and colours, as numbers and as pictures.

Shapes: H and W of the picture, C classes.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor

from mmoe.atomic import atomic_path
from mmoe.errors import BadInput
from mmoe.options import check_float, check_int
from zoo.images import read_image

# Colours of Okabe and Ito (2008), for colour-blind eyes; further classes get even hues.
_FIRST = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")


def class_colors(count: int) -> tuple[str, ...]:
    """Colours of so many classes, each its own.

    >>> class_colors(2), len(set(class_colors(40)))
    (('#E69F00', '#56B4E9'), 40)
    """
    more = max(0, count - len(_FIRST))
    hues = (colorsys.hsv_to_rgb(i / more, 0.55 + 0.35 * (i % 2), 0.75) for i in range(more))
    others = ["#" + "".join(f"{round(255 * part):02X}" for part in hue) for hue in hues]
    return (*_FIRST[:count], *others)


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Classes of the pixels of one picture.

    Attributes:
        mask: (H, W) numbers of classes, uint8.
        confidence: (H, W) probability of that class, 0 to 1.
        classes: names by number.
        colors: "#RRGGBB" by number.
        probs: (C, H, W) probabilities, where they were asked for.
        background: colour that the model saw behind what was transparent.
    """

    mask: Tensor
    confidence: Tensor
    classes: tuple[str, ...]
    colors: tuple[str, ...]
    probs: Tensor | None = None
    background: tuple[int, int, int] = (0, 0, 0)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The mask."""
        return np.asarray(self.mask.numpy(), dtype=dtype)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.classes

    def shares(self) -> dict[str, float]:
        """Share of the pixels by class; they sum to 1."""
        counts = np.bincount(self.mask.numpy().ravel(), minlength=len(self.classes))
        return dict(zip(self.classes, (counts / self.mask.numel()).tolist(), strict=True))

    def top(self, k: int = 5, picture: int = 0) -> list[tuple[str, float]]:
        """The k classes with the largest shares; there is one picture."""
        check_int("k", k, 1)
        check_int("picture", picture, 0, 0)
        return sorted(self.shares().items(), key=lambda pair: -pair[1])[:k]

    def table(self, picture: int = 0) -> tuple[list[str], list[list[str]]]:
        """Header and rows that show the classes that occur, with how sure the model is of their pixels."""
        rows = []
        for name, share in self.top(len(self.classes), picture):
            sure = self.confidence[self.mask == self.classes.index(name)].float()
            rows += [[name, f"{share:.1%}", f"{float(sure.mean()):.1%}"]] if share else []
        return ["share", "confidence"], rows

    def as_dict(self) -> dict[str, Any]:
        """Plain data, without the pixels."""
        size = {"height": self.mask.shape[0], "width": self.mask.shape[1]}
        return {**size, "shares": self.shares(), "confidence": float(self.confidence.float().mean())}

    def picture(self) -> Image.Image:
        """The mask as a picture whose pixels are the numbers and whose palette has the colours."""
        drawn = Image.fromarray(self.mask.numpy())
        drawn.putpalette([value for color in self.colors for value in ImageColor.getrgb(color)])
        return drawn

    def save(self, path: str | Path) -> Path:
        """Writes the mask as a PNG of class numbers that viewers show in the classes' colours.

        Raises:
            BadInput: the name does not end in .png.
        """
        path = Path(path).expanduser()
        if path.suffix.lower() != ".png":
            fix = f"save('{path.stem or 'mask'}.png')"
            raise BadInput(f"cannot write the mask '{path}'", "other formats than PNG change its numbers", fix)
        with atomic_path(path) as temporary:
            self.picture().save(temporary, format="PNG")
        return path

    def overlay(self, image: Any, alpha: float = 0.5) -> Image.Image:
        """The colours over the picture, transparency laid as the model saw it.

        Args:
            image: the picture, as for `zoo.images.read_image`.
            alpha: opacity of the colours, 0 to 1.

        Raises:
            BadInput: the picture has another size.
        """
        check_float("alpha", alpha, low=0, high=1, usual=0.5)
        below, size = read_image(image, self.background), (self.mask.shape[1], self.mask.shape[0])
        if below.size != size:
            wrong = f"the mask has {size[0]} x {size[1]}"
            raise BadInput(f"lay a mask over {below.width} x {below.height} pixels", wrong, "the picture it belongs to")
        return Image.blend(below, self.picture().convert("RGB"), alpha)

    def legend(self) -> Image.Image:
        """Colour, name and share of every class that occurs, the largest first."""
        rows = [(name, share) for name, share in self.top(len(self.classes)) if share]
        return draw_legend([(f"{name}  {share:.1%}", self.colors[self.classes.index(name)]) for name, share in rows])


@dataclass(frozen=True, kw_only=True)
class Segmentations(Sequence[Segmentation]):
    """Masks of several pictures.

    Attributes:
        pictures: one each.
    """

    pictures: tuple[Segmentation, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    @overload
    def __getitem__(self, index: int) -> Segmentation: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Segmentation, ...]: ...
    def __getitem__(self, index: int | slice) -> Segmentation | tuple[Segmentation, ...]:
        return self.pictures[index]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.pictures[0].classes

    def _picture(self, number: int) -> Segmentation:
        check_int("picture", number, 0, len(self) - 1)
        return self.pictures[number]

    def top(self, k: int = 5, picture: int = 0) -> list[tuple[str, float]]:
        """The k classes with the largest shares of one picture."""
        return self._picture(picture).top(k)

    def table(self, picture: int = 0) -> tuple[list[str], list[list[str]]]:
        """Header and rows that show one picture's classes."""
        return self._picture(picture).table()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, without the pixels."""
        return {"pictures": [one.as_dict() for one in self.pictures]}

    def save(self, path: str | Path, picture: int = 0) -> Path:
        """Writes the mask of one picture, as `Segmentation.save` does."""
        return self._picture(picture).save(path)


def draw_legend(rows: Sequence[tuple[str, str]]) -> Image.Image:
    """Lines of a text behind a field of colour.

    >>> draw_legend([("land", "#E69F00"), ("sea", "#56B4E9")]).height
    56
    """
    from matplotlib import get_data_path
    from PIL import ImageFont

    font = ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 16)
    width = 44 + int(max((font.getlength(text) for text, _ in rows), default=0))
    canvas = Image.new("RGB", (width, 28 * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (text, color) in enumerate(rows):
        draw.rectangle((6, 28 * i + 5, 24, 28 * i + 23), fill=color, outline="#6B6B6B")
        draw.text((34, 28 * i + 14), text, fill="#1A1A1A", font=font, anchor="lm")
    return canvas
