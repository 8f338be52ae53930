"""Agreement of predicted scores with opinions, of groups and kinds too, and whether scores fall as it gets worse."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from train.quality import agreement


def agreement_by_group(
    predicted: Sequence[float] | np.ndarray, samples: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Agreement with the scores of samples and share of series that fall; of all, and as "GROUP/SRCC" of each part.

    Args:
        predicted: one per sample.
        samples: with "score" and, where they have it, "group" and "kind", which are parts; "photo", "kind" and
            "severity" make series. "human" and "metrics", other opinions of the same pictures, are told of all, as
            "SRCC human" and "SRCC metrics".
    """
    groups: dict[str, list[int]] = {"": list(range(len(samples)))}
    for number, sample in enumerate(samples):
        for part in {sample.get("group"), sample.get("kind")} - {None}:
            groups.setdefault(f"{part}/", []).append(number)
    found = {}
    for other in ("human", "metrics"):
        if samples and all(other in sample for sample in samples):
            found[f"SRCC {other}"] = agreement(predicted, [sample[other] for sample in samples])["SRCC"]
    for name, numbers in sorted(groups.items()):
        said, part = [predicted[number] for number in numbers], [samples[number] for number in numbers]
        given = [float(sample["score"]) for sample in part]
        metrics = agreement(said, given) if not name or len(set(given)) > 1 else {}  # pristine pictures have one score
        falling = monotone(said, part)
        metrics |= {} if falling is None else {"monotone": falling}
        found |= {f"{name}{metric}": value for metric, value in metrics.items()}
    return found


def monotone(predicted: Sequence[float] | np.ndarray, samples: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of series, one photograph with one kind of distortion, whose scores never rise as it gets worse.

    Args:
        predicted: one per sample.
        samples: with "photo", "kind" and "severity"; others are in no series.

    >>> series = [{"photo": "a", "kind": "blur", "severity": level} for level in (1, 2, 3)]
    >>> monotone([0.9, 0.5, 0.5], series), monotone([0.9, 0.5, 0.6], series), monotone([1.0], [{}])
    (1.0, 0.0, None)
    """
    series = defaultdict(list)
    for value, sample in zip(predicted, samples, strict=True):
        if sample.get("severity"):
            series[sample["photo"], sample["kind"]].append((sample["severity"], float(value)))
    falls = [
        all(first >= second for (_, first), (_, second) in pairwise(rows))
        for rows in map(sorted, series.values())
        if len(rows) > 1
    ]
    return round(sum(falls) / len(falls), 4) if falls else None
