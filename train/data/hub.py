"""Data sets of Hugging Face `datasets`, from a folder that `save_to_disk` wrote. Needs the extra "data"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmoe.errors import BadInput, MissingExtra, did_you_mean
from train.data.base import DataSet, Sample, Split, data_sets
from train.data.files import chosen
from zoo.images import read_image


@data_sets.register("hub")
class HubData(DataSet):
    """A folder of `datasets.Dataset.save_to_disk` with pictures and texts.

    Args:
        split: "train" or "eval".
        path: folder.
        held_out: share of the rows that is "eval".
        image, text: names of the columns.
        limit: uses so many rows.
    """

    fields = ("image", "text")
    task = "retrieval"

    def __init__(
        self,
        split: Split,
        *,
        path: Path,
        held_out: float = 0.1,
        image: str = "image",
        text: str = "text",
        limit: int | None = None,
    ) -> None:
        super().__init__()
        try:
            from datasets import load_from_disk
        except ImportError as error:
            raise MissingExtra("data.name=hub", "it needs the package datasets", "pip install 'mmoe[data]'") from error
        try:
            self.rows: Any = load_from_disk(str(path))
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot read '{path}'", str(error), "a folder that save_to_disk wrote") from error
        if isinstance(self.rows, dict):
            raise BadInput(
                f"cannot use '{path}'", f"it holds several: {', '.join(self.rows)}", f"data.path={path}/train"
            )
        for column in (image, text):
            if column not in self.rows.column_names:
                wrong = did_you_mean(column, self.rows.column_names)
                raise BadInput(f"no column {column!r} in '{path}'", wrong, "data.options={image: ..., text: ...}")
        self.columns, self.path = {"image": image, "text": text}, path
        self.numbers = chosen([str(number) for number in range(len(self.rows))], split, held_out, limit)

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        """Its row."""
        return f"{self.path} row {self.numbers[index]}"

    def read(self, index: int) -> Sample:
        """One row."""
        row = self.rows[self.numbers[index]]
        return {"image": read_image(row[self.columns["image"]]), "text": str(row[self.columns["text"]])}
