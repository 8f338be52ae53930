"""Where text, patches and the tokens of recordings lie in the sequence that Uni-MoE's language model reads.

All blocks see one sequence of every modality, so each part is a `TokenView` with places. Where a recording is read by
learned queries, each of them looks at the whole of a part of it: their tokens are counted, and belong to no moments.
Shapes: B samples, N ids, L positions after the splice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

import torch

from zoo.hosts.splice import pads_left
from zoo.uni_moe.config import UniMoEConfig
from zoo.views import TokenView

LAYERS = "llm.model.layers.*"


@dataclass
class _Row:
    """Places of one sample: of its text with the ids there, and of each of its media by placeholder, in order."""

    length: int = 0
    text: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    media: dict[int, list[range]] = field(default_factory=dict)


def batch_views(
    config: UniMoEConfig, batch: Mapping[str, Any], placeholders: Mapping[str, int], tokenizer: Any, patches: int
) -> list[TokenView]:
    """Views of a batch: the text, then of images, recordings and videos the first of every sample, the second, ...

    Args:
        config: of the model.
        batch: as `forward` takes it.
        placeholders: ids by the word that stands for media.
        tokenizer: of the model.
        patches: of a picture.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    kinds = {placeholder: _kind(config, word.strip("<>"), patches) for word, placeholder in placeholders.items()}
    waiting = {placeholders[f"<{kind}>"]: sizes for kind, sizes in _sizes(config, batch, patches).items()}
    rows = [_row(own, there, waiting) for own, there in zip(ids.tolist(), mask.tolist(), strict=True)]
    length = max(row.length for row in rows)
    moved = [length - row.length if pads_left(mask) else 0 for row in rows]

    def placed(many: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(by + place for place in one) for by, one in zip(moved, many, strict=True))

    words = tuple(shown_tokens(tokenizer, row.ids) for row in rows)
    text = placed([row.text for row in rows])
    found = [TokenView(layers=LAYERS, modality="text", length=length, tokens=words, places=text)]
    for placeholder, kind in kinds.items():
        of_rows = [row.media.get(placeholder, []) for row in rows]
        for number in range(max(map(len, of_rows))):
            places = placed([one[number] if number < len(one) else () for one in of_rows])
            found.append(replace(kind, length=length, places=places))
    return found


def _kind(config: UniMoEConfig, name: str, patches: int) -> TokenView:
    """View of a medium, without places."""
    if name in ("image", "video"):
        side = math.isqrt(patches)
        about = "each patch is the mean over the frames" if name == "video" else ""
        return TokenView(layers=LAYERS, modality=name, grid=(side, side), about=about)
    tokens, seconds = _heard(config, name)
    about = f"{tokens} tokens per {seconds:g} s"
    learned = "each made from the whole of it: none has a moment of its own"
    about += ", in the order of time" if _stacked(config, name) else f", {learned}"
    return TokenView(layers=LAYERS, modality=name, about=about)


def _stacked(config: UniMoEConfig, name: str) -> bool:
    return name == "speech" and (config.speech or {}).get("connector") == "stack"


def _heard(config: UniMoEConfig, name: str) -> tuple[int, float]:
    """Tokens of a part of a recording, and its seconds; the branch need not be there."""
    if name == "sound":
        return config.queries, (config.sound or {"seconds": 0})["seconds"]
    speech = config.speech or {"positions": 0}
    positions = speech["positions"]
    return -(-positions // speech["stack"]) if _stacked(config, name) else config.queries, positions / 50


def _sizes(config: UniMoEConfig, batch: Mapping[str, Any], patches: int) -> dict[str, Iterator[int]]:
    """Tokens of each medium of a batch in order, by its kind."""
    found: dict[str, Iterator[int]] = {"image": repeat(patches), "video": repeat(patches)}
    for kind in ("speech", "sound"):
        tokens, chunks, counts = _heard(config, kind)[0], batch.get(f"{kind}_chunks"), batch.get(f"{kind}_tokens")
        told = counts if counts is not None else [tokens * count for count in chunks or ()]
        found[kind] = iter(told) if told else repeat(tokens)
    return found


def _row(ids: Sequence[int], there: Sequence[bool], waiting: Mapping[int, Iterator[int]]) -> _Row:
    row = _Row()
    for own, counts in zip(ids, there, strict=True):
        size = 1
        if own < 0:
            size = next(waiting[own])
            row.media.setdefault(own, []).append(range(row.length, row.length + size))
        elif counts:
            row.text.append(row.length)
            row.ids.append(own)
        row.length += size
    return row


def shown_tokens(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Text of each token; "·" for parts of a sign."""
    texts = (tokenizer.decode([one]).replace("\N{REPLACEMENT CHARACTER}", "") for one in ids)
    return tuple(text or "·" for text in texts)
