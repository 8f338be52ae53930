"""Emoji in three drawing styles with names and keywords: 1,641 concepts at 64 px, bundled.

Data card, licences and how it was built: assets/data/emoji/README.md. Splits are fixed: 300 concepts are held out from
all styles, and one style (Twemoji) from training. Shapes: n concepts, H = W = 64.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmoe.errors import BadInput, did_you_mean
from zoo.assets import asset

SIZE, COLUMNS = 64, 41
STYLES = ("openmoji", "noto", "twemoji")
TEMPLATES = (
    "a {}",
    "a picture of {}",
    "a picture of a {}",
    "an emoji of {}",
    "{} emoji",
    "a drawing of a {}",
    "the {}",
    "an icon of {}",
    "a photo of a {}",
    "a small {}",
)


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One emoji.

    Attributes:
        id: code points in hex, joined by "-".
        char: the emoji itself.
        name: unique name.
        keywords: further words, without the name.
        group, subgroup: of Unicode.
        held_out: never trained on, in any style.
    """

    id: str
    char: str
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    held_out: bool

    def caption(self, draw: random.Random) -> str:
        """A random text for training: the name, mostly plain, else in a sentence, with keywords, or keywords alone."""
        name = self.name.replace(":", "") if draw.random() < 0.3 else self.name
        kind = draw.random()
        if kind < 0.25:
            return draw.choice(TEMPLATES).format(name)
        if kind >= 0.5 or not self.keywords:
            return name
        words = draw.sample(self.keywords, min(len(self.keywords), draw.randint(1, 3)))
        return " ".join([name, *words] if kind < 0.4 else words)


class EmojiSet:
    """All concepts and their pictures.

    Attributes:
        concepts: in the order of the sheets.
        styles: names of the drawing styles.
        held_out_style: the style that is not trained on.
    """

    styles = STYLES

    def __init__(self) -> None:
        folder = asset("data/emoji")
        splits = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
        self.held_out_style: str = splits["held_out_style"]
        held_out = set(splits["held_out_concepts"])
        records = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
        self.concepts = tuple(
            Concept(**{**record, "keywords": tuple(record["keywords"])}, held_out=record["id"] in held_out)
            for record in records
        )
        self._folder = folder
        self._sheets: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.concepts)

    @cached_property
    def seen(self) -> list[int]:
        """Indices of the concepts that may be trained on."""
        return [i for i, concept in enumerate(self.concepts) if not concept.held_out]

    @cached_property
    def held_out(self) -> list[int]:
        """Indices of the concepts that are held out."""
        return [i for i, concept in enumerate(self.concepts) if concept.held_out]

    @property
    def training_styles(self) -> tuple[str, ...]:
        """The styles that may be trained on."""
        return tuple(style for style in self.styles if style != self.held_out_style)

    def pixels(self, style: str) -> Tensor:
        """All pictures of one style, (n, 4, 64, 64) uint8 RGBA, read once.

        Raises:
            BadInput: there is no such style.
        """
        if style not in self.styles:
            raise BadInput(f"no emoji style {style!r}", did_you_mean(style, self.styles), f"style={self.styles[0]!r}")
        if style not in self._sheets:
            with Image.open(self._folder / f"{style}.webp") as sheet:
                table = torch.from_numpy(np.array(sheet.convert("RGBA")))  # (rows * 64, 41 * 64, 4)
            cells = table.unflatten(0, (-1, SIZE)).unflatten(2, (COLUMNS, SIZE))  # (rows, 64, 41, 64, 4)
            self._sheets[style] = cells.permute(0, 2, 4, 1, 3).flatten(0, 1)[: len(self)].contiguous()
        return self._sheets[style]

    @cached_property
    def training_pixels(self) -> Tensor:
        """Pictures of the training styles, (styles, n, 4, 64, 64) uint8 RGBA."""
        return torch.stack([self.pixels(style) for style in self.training_styles])

    def image(self, index: int, style: str) -> Image.Image:
        """One picture as PIL, RGBA with transparent background."""
        return Image.fromarray(self.pixels(style)[index].permute(1, 2, 0).numpy(), "RGBA")


def load_emoji() -> EmojiSet:
    """The bundled emoji.

    Example:
        >>> emoji = load_emoji()
        >>> len(emoji), len(emoji.seen), len(emoji.held_out)
        (1641, 1341, 300)
    """
    return EmojiSet()
