"""Emoji in three drawing styles with names and keywords: 1,641 concepts at 64 px, bundled.

Data card, licences and how it was built: assets/data/emoji/README.md. Splits are fixed: 300 concepts are held out from
all styles, and one style (Twemoji) from training. Shapes: n concepts, H = W = 64.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmoe.errors import BadInput, BadOverride, did_you_mean
from mmoe.options import check_float, check_int
from train.augment import as_input, augment
from train.data.base import DataSet, Sample, Split, data_sets
from train.data.dialogues import Exchanges
from zoo.assets import asset
from zoo.model import Model

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

    def dialogue(self, draw: random.Random) -> tuple[str, str]:
        """A random question and its answer: some keywords for the name, or the name for some keywords."""
        words = ", ".join(draw.sample(self.keywords, min(len(self.keywords), draw.randint(2, 4))))
        return (f"What goes with {self.name}?", words) if draw.random() < 0.5 else (f"What is {words}?", self.name)


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


@cache
def load_emoji() -> EmojiSet:
    """The bundled emoji, read once.

    Example:
        >>> emoji = load_emoji()
        >>> len(emoji), len(emoji.seen), len(emoji.held_out)
        (1641, 1341, 300)
    """
    return EmojiSet()


@data_sets.register("emoji")
class Emoji(DataSet):
    """The bundled emoji: each concept in both training styles with one of its captions, augmented anew in every pass.

    No batch holds a concept twice: its two drawings would be false negatives. Evaluation is of "emoji_retrieval".

    Args:
        split: "train" has the seen concepts; "eval" is all that the task needs.
        text_length: captions are cut to this many tokens.
        strength: of the augmentation.
        clusters: {"models": [...], "image": 3, "text": 3}: every batch comes from one cluster of all partitions so
            far, by k-means of the pictures and names under each of these models (arXiv 2409.19291, section 3).
        limit: uses so many concepts of each kind.
        load: reads a model by name: of a stage, mostly.
        seed: of k-means.
    """

    fields = ("image", "text")
    task = "emoji_retrieval"
    needs_path = False

    def __init__(
        self,
        split: Split,
        *,
        text_length: int = 16,
        strength: float = 1.0,
        clusters: Mapping[str, Any] | None = None,
        limit: int | None = None,
        load: Callable[[str], Model] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_int("text_length", text_length, 3)
        check_float("strength", strength, low=0)
        self.split, self.text_length, self.strength = split, text_length, strength
        self.emoji, self.limit = load_emoji(), limit
        self.concepts = (self.emoji.seen if split == "train" else range(len(self.emoji)))[:limit]
        self.cells = None if clusters is None or split == "eval" else self._cells(clusters, load, seed)

    def _cells(self, clusters: Mapping[str, Any], load: Callable[[str], Model] | None, seed: int) -> Tensor:
        from train.clusters import refine_cells

        unknown = [name for name in clusters if name not in ("models", "image", "text")]
        if unknown or not clusters.get("models") or load is None:
            wrong = did_you_mean(unknown[0], ["models", "image", "text"]) if unknown else "it names no models"
            raise BadOverride(f"clusters={dict(clusters)}", wrong, "clusters={models: [base], image: 3, text: 3}")
        cells = torch.zeros(len(self.emoji.training_styles), len(self.emoji), dtype=torch.long)
        for name in clusters["models"]:
            counts = int(clusters.get("image", 3)), int(clusters.get("text", 3))
            cells = refine_cells(cells, load(name), self.emoji, counts, seed)
        return cells

    def __len__(self) -> int:
        return len(self.concepts)

    def name(self, index: int) -> str:
        """The name of the emoji."""
        return self.emoji.concepts[index % len(self.emoji)].name

    def read(self, index: int) -> Sample:
        """A picture, of the first style where the index is that of a concept, and the name."""
        style, concept = divmod(index, len(self.emoji))
        return {"image": self.emoji.image(concept, self.emoji.training_styles[style]), "text": self.name(index)}

    def epoch(self, batch_size: int, seed: int, shares: int = 1) -> list[list[int]]:
        """Batches for one pass over the concepts, each in one random training style that its cluster is told by.

        Clusters that are smaller than half a batch in this pass are left out, as the paper's sampler leaves out those
        below a batch.
        """
        draw = random.Random(seed)
        pairs = [(draw.randrange(len(self.emoji.training_styles)), concept) for concept in self.concepts]
        draw.shuffle(pairs)
        groups: dict[int, list[int]] = {}
        for style, concept in pairs:
            cell = 0 if self.cells is None else int(self.cells[style, concept])
            groups.setdefault(cell, []).append(style * len(self.emoji) + concept)
        batches = []
        for members in groups.values():
            chunks = [members[first : first + batch_size] for first in range(0, len(members), batch_size)]
            batches += [chunk for chunk in chunks if 2 * len(chunk) >= batch_size]
        draw.shuffle(batches)
        if not batches:
            wrong = "every cluster is smaller than half of that"
            raise BadInput(f"make batches of {batch_size} pairs", wrong, "data.batch_size=32")
        return batches

    def batch(self, indices: Sequence[int], model: Any, seeds: Sequence[int]) -> dict[str, Any]:
        """Augmented pixels in all training styles of each concept, and one random caption per concept."""
        concepts, styles = [index % len(self.emoji) for index in indices], len(self.emoji.training_styles)
        pixels = self.emoji.training_pixels[:, concepts].flatten(0, 1)  # (styles * B, 4, 64, 64)
        image = augment(pixels, [seed + style for style in range(styles) for seed in seeds], self.strength)
        drawn = zip(concepts, seeds, strict=True)
        captions = [self.emoji.concepts[concept].caption(random.Random(seed)) for concept, seed in drawn]
        text = model.tokenizer(captions, context_length=min(self.text_length, model.config.context_length))
        return {"image": as_input(model, image), "text": text, "return_loss": True}


@data_sets.register("emoji_names")
class EmojiNames(DataSet):
    """The bundled emoji, each with its name.

    Trained on are the seen concepts in the training styles, on random backgrounds and the like. Evaluated are, as
    groups, seen concepts in a style of training ("seen"), in the style that is never trained on ("new style"), and the
    concepts that are held out ("new concept").

    Args:
        split: "train" or "eval".
        strength: of the augmentation; 0 has none.
        limit: uses so many samples: of each group where it evaluates.
    """

    fields = ("image", "text")
    task = "naming"
    needs_path = False

    def __init__(self, split: Split, *, strength: float = 1.0, limit: int | None = None) -> None:
        super().__init__()
        check_float("strength", strength, low=0)
        self.emoji, self.strength, self.pooled = load_emoji(), strength, False
        seen, styles = self.emoji.seen, self.emoji.training_styles
        if split == "train":
            self.samples_of = [("", style, concept) for style in styles for concept in seen][:limit]
            return
        few = random.Random(0).sample(seen, len(self.emoji.held_out))  # as many as there are held out
        groups = [("seen", styles[0], few), ("new style", self.emoji.held_out_style, few)]
        groups.append(("new concept", styles[0], self.emoji.held_out))
        self.samples_of = [(group, style, one) for group, style, own in groups for one in own[:limit]]

    def __len__(self) -> int:
        return len(self.samples_of)

    def name(self, index: int) -> str:
        """Style and name of the emoji."""
        _, style, concept = self.samples_of[index]
        return f"{style}: {self.emoji.concepts[concept].name}"

    def read(self, index: int) -> Sample:
        """A picture, its name, and the group."""
        group, style, concept = self.samples_of[index]
        told = {"image": self.emoji.image(concept, style), "text": self.emoji.concepts[concept].name}
        return {**told, "group": group} if group else told

    def vary(self, samples: Sequence[Sample], seeds: Sequence[int]) -> list[Sample]:
        """Pictures as other artists might have drawn them; see `train.augment`."""
        if not self.strength:
            return list(samples)
        pixels = torch.from_numpy(np.stack([np.array(sample["image"]) for sample in samples])).permute(0, 3, 1, 2)
        drawn = augment(pixels, seeds, self.strength).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return [{**sample, "image": image} for sample, image in zip(samples, drawn, strict=True)]


@data_sets.register("emoji_words")
class EmojiWords(Exchanges):
    """The words of the bundled emoji as short dialogues: keywords for a name, and a name for keywords.

    Args:
        split: "train" has the seen concepts, each with other keywords in every pass; "eval" those that are held out.
        limit: uses so many.
    """

    def find(self, split: Split) -> Sequence[Concept]:
        """Concepts that have keywords."""
        emoji = load_emoji()
        chosen = emoji.seen if split == "train" else emoji.held_out
        return [emoji.concepts[index] for index in chosen if emoji.concepts[index].keywords]

    def name(self, index: int) -> str:
        """The name of the emoji."""
        return str(self.records[index].name)

    def read(self, index: int) -> Sample:
        """A dialogue, and the concept that it is of."""
        return {"turns": self.records[index].dialogue(random.Random(index)), "concept": self.records[index]}

    def vary(self, samples: Sequence[Sample], seeds: Sequence[int]) -> list[Sample]:
        """Other dialogues of the same concepts."""
        drawn = zip(samples, seeds, strict=True)
        return [{**sample, "turns": sample["concept"].dialogue(random.Random(seed))} for sample, seed in drawn]
