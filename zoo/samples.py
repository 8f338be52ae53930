"""Checks of the samples that a family trains on, and of the labels of a batch that was made of some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmoe.errors import BadInput, Refused


def check_samples(samples: Sequence[Mapping[str, Any]], wanted: Sequence[str], family: str, fix: str) -> None:
    """Makes sure that there are samples, each with what the family trains on.

    Args:
        samples: of one batch.
        wanted: names that each of them has.
        family: for messages.
        fix: that makes data have them.

    Raises:
        BadInput: there is no sample. Refused: one lacks something.

    >>> check_samples([{"image": 0}, {}], ["image"], "gamma", "data.name=quality")
    Traceback (most recent call last):
    mmoe.errors.Refused: train gamma on this data
      its samples have no image: number 1
      try: data.name=quality
    """
    if not samples:
        raise BadInput(f"train {family} on no sample", "the batch is empty", "model.training_batch([data[0]])")
    for number, sample in enumerate(samples):
        missing = [name for name in wanted if name not in sample]
        if missing:
            wrong = f"its samples have no {' and no '.join(missing)}: number {number}"
            raise Refused(f"train {family} on this data", wrong, fix)


def misfit(name: str, value: Any, shape: Sequence[int | None], whole: bool = True) -> str | None:
    """What is wrong with the labels of a batch, or None; values are not looked at, which would wait for a GPU.

    Args:
        name: of the labels.
        value: that should be a tensor; None where there are no labels, which is right.
        shape: that it should have; None where any size fits.
        whole: they are int64; otherwise numbers of any type.

    >>> misfit("mask", torch.zeros(2, 4), (2, 4)), misfit("scene", torch.tensor([1]), (1,))
    ('mask is a tensor of torch.int64 and the shape (2, 4), not of torch.float32 and the shape (2, 4)', None)
    """
    if value is None:
        return None
    kind = "torch.int64" if whole else "numbers"
    wanted = f"{name} is a tensor of {kind} and the shape {str(tuple(shape)).replace('None', 'any')}"
    if not isinstance(value, Tensor):
        return f"{wanted}, not a {type(value).__name__}"
    sizes = len(value.shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, value.shape, strict=True))
    if sizes and (value.dtype == torch.int64 if whole else value.dtype != torch.bool):
        return None
    return f"{wanted}, not of {value.dtype} and the shape {tuple(value.shape)}"
