"""Puts features of other modalities between the tokens of a text, where placeholders stand.

A placeholder is an id that no token has. Each takes the next feature block of its sample; rows of a batch then differ
in length and are filled up on the side that their text was filled up on. Labels of features and of padding are ignored.
Shapes: B samples, N ids, L positions after the splice, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmoe.errors import BadInput

IGNORED = -100  # label of what no loss counts
TEXT, PADDING = 0, -1  # in `Spliced.modality`


@dataclass(kw_only=True)
class Spliced:
    """A batch for a language model that takes embeddings.

    Attributes:
        embeds: (B, L, D).
        mask: (B, L) bool, True for what is there.
        modality: (B, L) int64: 0 text, m for features of the m-th placeholder (from 1), -1 padding.
        labels: (B, L), or None.
    """

    embeds: Tensor
    mask: Tensor
    modality: Tensor
    labels: Tensor | None = None


def splice(
    ids: Tensor,
    embed: Callable[[Tensor], Tensor],
    features: Mapping[int, Sequence[Sequence[Tensor]]],
    mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Spliced:
    """Embeds a text and puts features in the place of placeholders.

    Args:
        ids: (B, N) of tokens and placeholders.
        embed: ids -> embeddings, of a language model.
        features: by placeholder, for each sample its blocks (n, D) in the order of its placeholders.
        mask: (B, N), 0 for padding on either side; all count when None.
        labels: (B, N), `IGNORED` where no loss counts.

    Returns:
        The batch; padding ids are embedded as they are, and what rows are filled up with is 0.

    Raises:
        BadInput: a sample has more placeholders of a kind than blocks, or fewer.

    Example:
        >>> table = torch.nn.Embedding(9, 2)
        >>> batch = splice(torch.tensor([[1, -200, 2]]), table, {-200: [[torch.zeros(3, 2)]]})
        >>> batch.modality.tolist()
        [[0, 1, 1, 1, 0]]
    """
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    left = pads_left(mask)
    rows = []
    for sample, read in enumerate(ids.tolist()):  # which waits for a GPU once
        blocks = {placeholder: list(of_samples[sample]) for placeholder, of_samples in features.items()}
        _check_counts(sample, read, blocks)
        own = None if labels is None else labels[sample]
        rows.append(_spliced_row(ids[sample], read, embed, blocks, mask[sample], own))
    longest = max(len(embeds) for embeds, _, _ in rows)

    def fill(tensors: Sequence[Tensor], value: int | float | bool) -> Tensor:
        filled = []
        for tensor in tensors:
            rest = tensor.new_full((longest - len(tensor), *tensor.shape[1:]), value)
            filled.append(torch.cat([rest, tensor] if left else [tensor, rest]))
        return torch.stack(filled)

    embeds, kinds, told = zip(*rows, strict=True)
    modality = fill(kinds, PADDING)
    return Spliced(
        embeds=fill(embeds, 0.0),
        mask=modality != PADDING,
        modality=modality,
        labels=None if labels is None else fill(told, IGNORED),
    )


def pads_left(mask: Tensor) -> bool:
    """Whether a batch with a mask (B, N) of truth values is filled up on the left."""
    return bool((~mask[:, 0] & mask[:, -1]).any())


def filled_on_the_left(batch: Spliced) -> Spliced:
    """The batch with all padding before what is there, as a language model that writes on needs it; without labels.

    >>> modality = torch.tensor([[0, 1, -1], [0, 0, 0]])
    >>> batch = Spliced(embeds=torch.zeros(2, 3, 4), mask=modality >= 0, modality=modality)
    >>> filled_on_the_left(batch).modality.tolist()
    [[-1, 0, 1], [0, 0, 0]]
    """
    order = batch.mask.long().argsort(dim=1, stable=True)  # (B, L)
    embeds = batch.embeds.gather(1, order[..., None].expand_as(batch.embeds))
    return Spliced(embeds=embeds, mask=batch.mask.gather(1, order), modality=batch.modality.gather(1, order))


def clips(chunks: Tensor, numbers: Tensor) -> list[Tensor]:
    """Blocks of a sample whose recordings were encoded chunk by chunk.

    Args:
        chunks: (C, n, D).
        numbers: (C,) number of the recording of each chunk, from 1; 0 for chunks that are padding.

    >>> [len(block) for block in clips(torch.zeros(4, 5, 2), torch.tensor([1, 1, 2, 0]))]
    [10, 5]
    """
    found, counts = torch.unique_consecutive(numbers, return_counts=True)
    parts = chunks.split(counts.tolist())
    return [part.flatten(0, 1) for number, part in zip(found.tolist(), parts, strict=True) if number]


def _check_counts(sample: int, ids: Sequence[int], blocks: Mapping[int, Sequence[Tensor]]) -> None:
    for placeholder, given in blocks.items():
        count = ids.count(placeholder)
        if count != len(given):
            wrong = f"sample {sample} has {count} of its places and {len(given)} blocks"
            raise BadInput(f"splice features of placeholder {placeholder}", wrong, "one block per placeholder")
    unknown = sorted({one for one in ids if one < 0} - blocks.keys())
    if unknown:
        wrong = f"sample {sample} has placeholders {', '.join(map(str, unknown))} without features"
        raise BadInput("splice a text", wrong, f"features={{{unknown[0]}: [[block], ...]}}")


def _spliced_row(
    ids: Tensor,
    read: Sequence[int],
    embed: Callable[[Tensor], Tensor],
    blocks: Mapping[int, list[Tensor]],
    mask: Tensor,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (L, D), modality (L,) and labels (L,) of one sample, whose ids were read."""
    kinds = {placeholder: number for number, placeholder in enumerate(blocks, 1)}
    found = [(place, kinds[one]) for place, one in enumerate(read) if one < 0]
    embeds, modality, told, begin = [], [], [], 0
    waiting = {kinds[placeholder]: iter(given) for placeholder, given in blocks.items()}
    text = torch.where(mask, TEXT, PADDING)
    labels = ids.new_full(ids.shape, IGNORED) if labels is None else labels
    for place, kind in [*found, (len(ids), 0)]:
        embeds.append(embed(ids[begin:place]))
        modality.append(text[begin:place])
        told.append(labels[begin:place])
        if kind:
            block = next(waiting[kind])
            embeds.append(block.to(embeds[0].dtype))
            modality.append(text.new_full((len(block),), kind))
            told.append(labels.new_full((len(block),), IGNORED))
        begin = place + 1
    return torch.cat(embeds), torch.cat(modality), torch.cat(told)
