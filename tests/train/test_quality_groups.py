"""Series of levels; groups are tested with the task."""

from __future__ import annotations

from train.quality_groups import monotone


def test_series_are_of_one_photograph_and_kind():
    rows = [("a", "blur", 1), ("b", "blur", 2), ("a", "blur", 2), ("b", "blur", 1), ("a", "noise", 1)]
    samples = [dict(zip(("photo", "kind", "severity"), row, strict=True)) for row in rows]
    assert monotone([0.9, 0.9, 0.8, 0.1, 0.5], samples) == 0.5
    assert monotone([0.9, 0.1, 0.9, 0.1, 0.5], samples) == 1.0, "the same score twice is no rise"
    assert monotone([0.5], samples[4:]) is None, "one picture is no series"
