"""Retrieval of emoji by name and of names by emoji, and how a model uses its experts.

Shapes: n concepts, C embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmoe.trace import trace
from train.augment import as_input, on_background
from train.data.emoji import EmojiSet
from train.tasks import recall
from zoo.clip_moe.model import ClipMoE


@torch.no_grad()
def image_features(model: ClipMoE, emoji: EmojiSet, style: str, indices: Sequence[int] | None = None) -> Tensor:
    """Normalised features of the pictures of one style, (n, C)."""
    pixels = emoji.pixels(style) if indices is None else emoji.pixels(style)[list(indices)]
    batches = (as_input(model, on_background(part)) for part in pixels.split(256))
    return torch.cat([model.encode_image(batch, normalize=True).float().cpu() for batch in batches])


@torch.no_grad()
def text_features(model: ClipMoE, texts: Sequence[str]) -> Tensor:
    """Normalised features of texts, (n, C)."""
    ids = model.tokenizer(list(texts)).to(model.device)
    return torch.cat([model.encode_text(part, normalize=True).float().cpu() for part in ids.split(512)])


def retrieval(
    model: ClipMoE, emoji: EmojiSet, style: str, indices: Sequence[int], template: str = "{}"
) -> dict[str, dict[str, float]]:
    """Recall of names for pictures and of pictures for names, among the given concepts.

    Args:
        model: in eval mode.
        emoji: the data.
        style: drawing style of the pictures.
        indices: concepts that make up the gallery; each is a query too.
        template: sentence around the name.
    """
    images = image_features(model, emoji, style, indices)
    texts = text_features(model, [template.format(emoji.concepts[i].name) for i in indices])
    similarity = texts @ images.t()  # (n texts, n pictures)
    return {"text_to_image": recall(similarity), "image_to_text": recall(similarity.t())}


def evaluate(model: ClipMoE, emoji: EmojiSet) -> dict[str, dict[str, dict[str, float]]]:
    """Retrieval in every style, among the seen concepts and among the held-out ones.

    Returns:
        By "seen_STYLE", "held_out_STYLE" and, with names in a sentence, "seen_STYLE_sentence" of the held-out style.
    """
    results = {}
    for style in emoji.styles:
        results[f"seen_{style}"] = retrieval(model, emoji, style, emoji.seen)
        results[f"held_out_{style}"] = retrieval(model, emoji, style, emoji.held_out)
    style = emoji.held_out_style
    results[f"seen_{style}_sentence"] = retrieval(model, emoji, style, emoji.seen, "a picture of {}")
    return results


@torch.no_grad()
def expert_use(model: ClipMoE, emoji: EmojiSet) -> list[dict[str, Any]]:
    """Load, max/mean load, dead experts and entropy of every mixture over all seen concepts in the held-out style."""
    with trace(model) as routing:
        image_features(model, emoji, emoji.held_out_style, emoji.seen)
        text_features(model, [emoji.concepts[i].name for i in emoji.seen])
    return routing.summary()
