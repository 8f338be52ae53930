"""The bundled dialogues: short English questions, each with a reply, for what a language model can say."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from train.data.base import DataSet, Sample, Split, data_sets
from zoo.assets import asset


class Exchanges(DataSet):
    """Questions with replies, measured by how well a model expects the replies.

    Args:
        split: "train" or "eval".
        limit: uses so many.
    """

    fields = ("turns",)
    task = "perplexity"
    needs_path = False

    def __init__(self, split: Split, *, limit: int | None = None) -> None:
        super().__init__()
        self.records = self.find(split)[:limit]

    @abstractmethod
    def find(self, split: Split) -> Sequence[Any]:
        """What the exchanges of a split are made of, one each."""

    def __len__(self) -> int:
        return len(self.records)


@data_sets.register("dialogues")
class Dialogues(Exchanges):
    """The bundled dialogues: short English questions, each with a reply.

    Data card and licence: assets/data/dialogues/README.md. Which are held out is fixed.

    Args:
        split: "train" has all that are not held out.
        limit: uses so many.
    """

    def find(self, split: Split) -> Sequence[Any]:
        """Records of the file."""
        records = json.loads(asset("data/dialogues/dialogues.json").read_text(encoding="utf-8"))
        return [one for one in records if one["held_out"] == (split == "eval")]

    def name(self, index: int) -> str:
        """The question."""
        return str(self.records[index]["turns"][0])

    def size(self, index: int) -> float:
        """Words."""
        return float(len(" ".join(self.records[index]["turns"]).split()))

    def read(self, index: int) -> Sample:
        """Question and reply."""
        return {"turns": tuple(self.records[index]["turns"])}
