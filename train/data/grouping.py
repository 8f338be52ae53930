"""Batches of one mix of modalities: so that all processes of a step run the same encoders and wait for none.

Samples of one group are shuffled, cut into batches over all processes, and within a batch dealt out by length, so that
the processes have about the same to do; then the batches are shuffled. The last batch of a group is filled up from its
own beginning, so no sample is left out (the authors' code drops the last batch of every group, even a full one).
Source: Uni-MoE's modality-level data parallelism (arXiv 2405.11273, section 3.4; `speech_dp`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

import torch


def grouped_batches(
    groups: Sequence[int],
    lengths: Sequence[float],
    batch_size: int,
    processes: int,
    generator: torch.Generator,
    *,
    drop_last: bool = False,
) -> list[list[list[int]]]:
    """Samples of every step and process.

    Args:
        groups: of each sample: what encoders it needs.
        lengths: of each sample.
        batch_size: samples of one process in one step.
        processes: how many there are.
        generator: of the order.
        drop_last: drops the last batch of every group, as the authors' code does.

    Returns:
        Steps x processes x samples.

    Example:
        >>> order = torch.Generator().manual_seed(0)
        >>> steps = grouped_batches([0, 0, 0, 1], [3, 9, 5, 1], 1, 2, order)
        >>> sorted({sample for step in steps for part in step for sample in part})
        [0, 1, 2, 3]
    """
    size = batch_size * processes
    batches: list[list[int]] = []
    for group in sorted(set(groups)):
        own = [sample for sample, one in enumerate(groups) if one == group]
        shuffled = [own[place] for place in torch.randperm(len(own), generator=generator).tolist()]
        cut = [shuffled[begin : begin + size] for begin in range(0, len(shuffled), size)]
        if drop_last:
            cut = cut[:-1]
        elif len(cut[-1]) < size:
            cut[-1] = list(islice(cycle([*cut[-1], *shuffled]), size))
        batches += cut
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [_dealt(batches[number], lengths, processes) for number in order]


def _dealt(batch: Sequence[int], lengths: Sequence[float], processes: int) -> list[list[int]]:
    """Each next sample, the longest first, for the process that has the least and still has room."""
    room = len(batch) // processes
    parts: list[list[int]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for sample in sorted(batch, key=lambda one: lengths[one], reverse=True):
        least = min((p for p in range(processes) if len(parts[p]) < room), key=lambda p: loads[p])
        parts[least].append(sample)
        loads[least] += lengths[sample]
    return parts
