"""Batches of one mix of modalities."""

from __future__ import annotations

from collections import Counter

import torch

from train.data.grouping import grouped_batches

GROUPS = [0] * 13 + [1] * 4 + [5] * 9
LENGTHS = [7 * number % 31 for number in range(len(GROUPS))]


def steps_of(seed: int = 0, **options: bool) -> list[list[list[int]]]:
    return grouped_batches(GROUPS, LENGTHS, 2, 2, torch.Generator().manual_seed(seed), **options)


def test_every_step_has_one_group_and_every_sample_comes() -> None:
    steps = steps_of()
    for step in steps:
        assert len({GROUPS[sample] for part in step for sample in part}) == 1
        assert [len(part) for part in step] == [2, 2]
    times = Counter(sample for step in steps for part in step for sample in part)
    assert times.keys() == set(range(len(GROUPS))) and max(times.values()) <= 2
    assert len(steps) == 4 + 1 + 3


def test_the_order_comes_from_the_seed() -> None:
    assert steps_of(1) == steps_of(1) != steps_of(2)


def test_processes_have_about_the_same_to_do() -> None:
    for first, second in steps_of():
        sizes = [sum(LENGTHS[sample] for sample in part) for part in (first, second)]
        longest = max(LENGTHS[sample] for sample in [*first, *second])
        assert abs(sizes[0] - sizes[1]) <= longest


def test_as_released_the_last_batch_of_each_group_is_left_out() -> None:
    kept = {sample for step in steps_of(drop_last=True) for part in step for sample in part}
    assert len(steps_of(drop_last=True)) == 3 + 0 + 2 and len(kept) == 20


def test_a_group_smaller_than_a_batch_fills_one() -> None:
    (step,) = grouped_batches([0], [3], 2, 2, torch.Generator().manual_seed(0))
    assert step == [[0, 0], [0, 0]]
