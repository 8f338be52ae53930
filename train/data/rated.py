"""Data of one's own: pictures that people gave scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmoe.errors import BadOverride
from mmoe.options import check_bool, check_float
from train.data.base import Split, data_sets
from train.data.files import TABLES, Files


@data_sets.register("quality")
class RatedPictures(Files):
    """Pictures with scores of people: a table with the columns image and score.

    A folder may hold the table as scores.csv, .tsv, .jsonl or .json; paths of pictures are relative to it. There may be
    the columns scene (which prompts a model compares with), group (results are told for each too), and photo: pictures
    of one photograph stay on one side of the split.

    Args:
        split: "train" or "eval".
        path: folder or table.
        held_out: share of the pictures that is "eval".
        low, high: ends of the scale that people used, such as 1 and 5; scores are brought to 0 .. 1 by them.
        lower_is_better: a small score says a good picture.
        limit: uses so many samples.
    """

    fields = ("image", "score")
    task = "quality"

    def __init__(
        self,
        split: Split,
        *,
        path: Path,
        held_out: float = 0.1,
        low: float = 0.0,
        high: float = 1.0,
        lower_is_better: bool = False,
        limit: int | None = None,
    ) -> None:
        check_float("low", low)
        check_float("high", high)
        check_bool("lower_is_better", lower_is_better)
        if not low < high:
            raise BadOverride(f"low={low}, high={high}", "low is the smaller one", "data.options={low: 1, high: 5}")
        self.low, self.high, self.lower_is_better = low, high, lower_is_better
        super().__init__(split, path=path, held_out=held_out, limit=limit)

    def _records(self) -> Iterator[dict[str, Any]]:
        tables = [self.path] if self.path.is_file() else [self.path / f"scores{ending}" for ending in TABLES]
        for table in tables:
            if table.is_file():
                for row in self._table(table, ("image", "score"), texts=("image",)):
                    yield self._rated(row, table)
                return

    def _rated(self, row: dict[str, Any], table: Path) -> dict[str, Any]:
        if "wrong" in row:
            return row
        image = self._find(row["image"], table)
        record: dict[str, Any] = {"name": self._inside(image), "image": image}
        record |= {name: row[name] for name in ("scene", "group", "photo") if row.get(name)}
        score = _number(row["score"])
        if score is None:
            return {**record, "wrong": f"its score is {row['score']!r}"}
        if not self.low <= score <= self.high:
            return {**record, "wrong": f"its score is {score:g}, not between low={self.low:g} and high={self.high:g}"}
        share = (score - self.low) / (self.high - self.low)
        record |= {"score": 1 - share if self.lower_is_better else share}
        return {**record, "key": record.get("photo", record["name"])}


def _number(value: Any) -> float | None:
    """A finite number, or None for what is none."""
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
