"""The task of the bundled emoji: names for pictures and pictures for names, in every style, of seen and unseen ones.

Shapes: n concepts, C embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.augment import as_input, on_background
from train.data.emoji import EmojiSet, load_emoji
from train.evaluate import Task, tasks
from train.recall import recalls


@torch.no_grad()
def image_features(model: Any, emoji: EmojiSet, style: str, indices: Sequence[int] | None = None) -> Tensor:
    """Normalised features of the pictures of one style, (n, C)."""
    pixels = emoji.pixels(style) if indices is None else emoji.pixels(style)[list(indices)]
    batches = (as_input(model, on_background(part)) for part in pixels.split(256))
    return torch.cat([model.encode_image(batch, normalize=True).float().cpu() for batch in batches])


@torch.no_grad()
def text_features(model: Any, texts: Sequence[str]) -> Tensor:
    """Normalised features of texts, (n, C)."""
    ids = model.tokenizer(list(texts)).to(model.device)
    return torch.cat([model.encode_text(part, normalize=True).float().cpu() for part in ids.split(512)])


def retrieval(
    model: Any, emoji: EmojiSet, style: str, indices: Sequence[int], template: str = "{}"
) -> dict[str, float]:
    """Recall of pictures for names (T2I) and of names for pictures (I2T) among the given concepts, and their mean at 1.

    Args:
        model: in eval mode.
        emoji: the data.
        style: drawing style of the pictures.
        indices: concepts that make up the gallery; each is a query too.
        template: sentence around the name.
    """
    images = image_features(model, emoji, style, indices)
    texts = text_features(model, [template.format(emoji.concepts[i].name) for i in indices])
    return recalls(texts @ images.t())  # (n texts, n pictures)


class Part(NamedTuple):
    """Queries of one kind: drawing style, concepts, sentence around the name, and what that is in words."""

    style: str
    concepts: Sequence[int]
    template: str
    about: str


def parts(emoji: EmojiSet, limit: int | None = None) -> dict[str, Part]:
    """All parts by name, with at most so many concepts each."""
    found = {}
    for name, concepts, known in (("seen", emoji.seen, "trained on"), ("held_out", emoji.held_out, "never trained on")):
        kept = concepts[:limit]
        for style in emoji.styles:
            new = " (style never trained on)" if style == emoji.held_out_style else ""
            found[f"{name}_{style}"] = Part(style, kept, "{}", f"{len(kept):,} concepts {known}, {style}{new}")
    first = found[f"seen_{emoji.held_out_style}"]
    sentence = first._replace(template="a picture of {}", about=f"{first.about}, names in a sentence")
    return {**found, f"seen_{emoji.held_out_style}_sentence": sentence}


@tasks.register("emoji_retrieval")
class EmojiRetrieval(Task):
    """Recall at 1, 5 and 10 in both directions, in every style, among the seen concepts and among the held-out ones.

    Names are "held_out_noto/T2I R@1"; "seen_twemoji_sentence" has the names in a sentence. "R@1" is the mean over both
    directions of seen concepts in the style that is not trained on.
    """

    fields = ("image", "text")
    of_model = "retrieval"

    def measure(self, model: Any, data: Any) -> dict[str, float]:
        """All recalls."""
        emoji = data.emoji
        found = {
            f"{name}/{metric}": value
            for name, part in parts(emoji, data.limit).items()
            for metric, value in retrieval(model, emoji, part.style, part.concepts, part.template).items()
        }
        mean = found[f"seen_{emoji.held_out_style}/R@1"]
        return {"R@1": mean, **{name: value for name, value in found.items() if not name.endswith("/R@1")}}

    def about(self, part: str) -> str:
        """The part in words."""
        known = parts(load_emoji())
        return known[part].about if part in known else super().about(part)
