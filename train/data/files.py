"""Data of one's own: pictures with captions, pictures by class, speech with transcripts, conversations, segmentation.

Each class says in its docstring how the files lie. `held_out` of the samples is evaluated on and never trained on. They
are chosen by the names of their files inside the folder, so the split stays when the folder moves, and all samples of
one file are on one side. Where files are added a few change sides, as the share of each side stays.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmoe.errors import BadInput, did_you_mean
from train.data.base import DataSet, Sample, Split, data_sets
from zoo.images import read_image
from zoo.sounds import ENDINGS, read_sound

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = (".csv", ".tsv", ".jsonl", ".json")
_Part = tuple[str, Path, Sequence[str]]


class Files(DataSet):
    """Base of the data sets that are read from files.

    Args:
        split: "train" or "eval".
        path: folder or table.
        held_out: share of the samples that is "eval".
        limit: uses so many samples.

    Attributes:
        records: of the split, each with the fields of a sample; files as paths.
        notes: what was left out before any file was opened.
    """

    def __init__(self, split: Split, *, path: Path, held_out: float = 0.1, limit: int | None = None) -> None:
        super().__init__()
        self.path = path.expanduser()
        if not self.path.exists():
            raise BadInput(
                f"no data in '{path}'", f"there is no such file or folder in {Path.cwd()}", "data.path=FOLDER"
            )
        self.root = self.path if self.path.is_dir() else self.path.parent
        records = list(self._records())
        if not records:
            raise BadInput(f"no data in '{path}'", f"wanted: {self._form()}", "data.path=FOLDER")
        keys = [str(one.pop("key", one["name"])) for one in records]
        self.records = [records[i] for i in chosen(keys, split, held_out, limit)]

    def _records(self) -> Iterator[dict[str, Any]]:
        """All records, with a "name" each, and a "key" where another name decides on the split."""
        raise NotImplementedError

    def _form(self) -> str:
        """How the files lie."""
        return (type(self).__doc__ or "").partition("\n")[0].rstrip(".")

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        """Its file, or its row in a table."""
        return str(self.records[index]["name"])

    def read(self, index: int) -> Sample:
        """One sample, its files opened."""
        if "wrong" in self.records[index]:
            raise BadInput(f"cannot use {self.name(index)}", self.records[index]["wrong"], "mend or remove it")
        return {name: _read(name, value) for name, value in self.records[index].items() if name != "name"}

    def _inside(self, path: Path) -> str:
        """A file's name inside the folder of the data, or its whole path where it lies elsewhere."""
        path, root = Path(os.path.abspath(path)), Path(os.path.abspath(self.root))
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)

    def _table(self, path: Path, needed: Sequence[str], texts: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Rows of a CSV, TSV, JSON or JSONL file, and where each stands; a row that cannot be used has "wrong".

        Args:
            path: of the table.
            needed: columns.
            texts: those that have to hold a text; all when None.
        """
        for number, row in enumerate(_rows(path), 1):
            name = f"{path.name} row {number}"
            if not isinstance(row, Mapping):
                yield {"name": name, "wrong": f"it is {row!r}, no mapping"}
                continue
            missing = [field for field in needed if field not in row]
            if missing and number == 1:
                wrong = did_you_mean(missing[0], [str(key) for key in row if key is not None])
                raise BadInput(f"row 1 of '{path}' has no {missing[0]!r}", wrong, f"columns {', '.join(needed)}")
            wordless = [field for field in (needed if texts is None else texts) if not _is_text(row.get(field))]
            odd = [*missing, *wordless]
            kept = {field: value for field, value in row.items() if field not in ("name", "key", "wrong")}
            yield {**kept, "name": name, **({"wrong": f"its {odd[0]} is {row.get(odd[0])!r}"} if odd else {})}

    def _row(self, row: Mapping[str, Any], kind: str, table: Path) -> dict[str, Any]:
        """The record of a row with a file and a text."""
        if "wrong" in row:
            return {"name": row["name"], "wrong": row["wrong"]}
        file = self._find(row[kind], table)
        return {"name": self._inside(file), kind: file, "text": row["text"]}

    def _find(self, name: str, beside: Path) -> Path:
        """A file that a table names: beside the table, or absolute."""
        return beside.parent / os.path.expanduser(name)

    def _pairs(self, first: _Part, second: _Part, what: str) -> Iterator[dict[str, Any]]:
        """Files of one kind, each with that of another kind that lies alike; those that have none are noted.

        Args:
            first, second: field of a sample, folder, endings.
            what: that a file without partner lacks.
        """
        (kind, folder, endings), (other, others_in, other_endings) = first, second
        partners = {_lies(path, others_in): path for path in _files(others_in, other_endings)}
        alone = []
        for file in _files(folder, endings):
            partner = partners.get(_lies(file, folder))
            if partner is None:
                alone.append(self._inside(file))
            else:
                yield {"name": self._inside(file), kind: file, other: partner}
        if alone:
            more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
            self.notes.append(f"left out, as they have no {what}: {', '.join(alone[:3])}{more}")


def chosen(names: Sequence[str], split: Split, held_out: float, limit: int | None) -> list[int]:
    """Numbers of the samples of a split, in the order of their names; a name falls into the same one as far as it can.

    >>> names = ["a", "b", "c", "d"]
    >>> sorted(chosen(names, "train", 0.25, None) + chosen(names, "eval", 0.25, None))
    [0, 1, 2, 3]
    """

    def place(name: str) -> bytes:
        return hashlib.sha256(name.encode()).digest()

    distinct = sorted(set(names), key=place)
    count = round(held_out * len(distinct)) or (1 if held_out and len(distinct) > 1 else 0)
    held = set(distinct[:count])
    own = [i for i, name in enumerate(names) if (name in held) == (split == "eval")]
    own.sort(key=lambda i: place(names[i]))
    return sorted(own[:limit], key=names.__getitem__)


def _read(name: str, value: Any) -> Any:
    if name == "image":
        return read_image(value)
    if name == "mask":
        return read_mask(value)
    if name == "text" and isinstance(value, Path):
        return read_text(value)
    return read_sound(value) if name == "audio" else value


def read_text(path: Path) -> str:
    """A whole text file, without white space around it.

    Raises:
        BadInput: it cannot be read, is empty, or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadInput(f"cannot read '{path}'", f"{path.name} is no UTF-8", "save it as UTF-8") from error
    except OSError as error:
        raise BadInput(f"cannot read '{path}'", f"{path.name}: {error.strerror}", f"chmod u+r '{path}'") from error
    if not text:
        raise BadInput(f"cannot use '{path}'", f"{path.name} is empty", "write a text into it")
    return text


def read_mask(path: Path) -> np.ndarray:
    """Class numbers (H, W) of a picture with one channel or a palette.

    Raises:
        BadInput: it cannot be read, or has colours in place of numbers.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "I", "I;16", "1"):
                wrong = f"its mode is {image.mode}; a mask has one number of a class per pixel"
                raise BadInput(f"cannot use the mask '{path}'", wrong, "save it with mode L or P")
            return np.array(image).astype(np.int64)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"cannot read '{path}'", str(error), "a PNG") from error


def _is_text(value: Any) -> bool:
    """A text with signs in it, none of them half of a pair."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= sign <= "\udfff" for sign in value)


def _rows(path: Path) -> Iterator[Any]:
    asked, fix = f"cannot read '{path}'", f"a table: {', '.join(TABLES)}"
    if path.suffix not in TABLES:
        raise BadInput(asked, "its name does not end as that of a table", fix)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            rows = json.loads(text)
            if not isinstance(rows, list):
                raise BadInput(asked, f"it holds a {type(rows).__name__}, not a list of rows", fix)
            yield from rows
            return
    except UnicodeDecodeError as error:
        raise BadInput(asked, "it is no UTF-8", "save it as UTF-8") from error
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(asked, str(error), fix) from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            try:
                if line.strip():
                    yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(asked, f"line {number} is not JSON: {error}", fix) from error
        return
    head = text.partition("\n")[0]
    delimiter = "\t" if path.suffix == ".tsv" else ";" if ";" in head and "," not in head else ","
    try:
        yield from csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    except csv.Error as error:
        raise BadInput(asked, str(error), fix) from error


def _lies(path: Path, folder: Path) -> Path:
    """What files that belong together share: where they lie in their folders, and their name without its ending."""
    return path.relative_to(folder).with_suffix("")


def _files(folder: Path, endings: Sequence[str]) -> Iterator[Path]:
    """Files below a folder, without hidden ones."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in endings and path.is_file() and not hidden:
            yield path


@data_sets.register("pairs")
class Pairs(Files):
    """Pictures with captions: cat.png beside cat.txt, or a table with the columns image and text.

    A caption is a whole text file. Paths of a table are relative to it. A folder may hold the table too, as
    captions.csv, .tsv, .jsonl or .json.
    """

    fields = ("image", "text")
    task = "retrieval"

    def _records(self) -> Iterator[dict[str, Any]]:
        tables = [self.path] if self.path.is_file() else [self.path / f"captions{ending}" for ending in TABLES]
        for table in tables:
            if table.is_file():
                for row in self._table(table, ("image", "text")):
                    yield self._row(row, "image", table)
                return
        yield from self._pairs(("image", self.path, IMAGES), ("text", self.path, (".txt",)), "caption")


@data_sets.register("classes")
class Classes(Files):
    """Pictures by class: one folder per class, named after it.

    Attributes:
        classes: names, sorted; a label is a place among them.
    """

    fields = ("image", "label")
    task = "zero_shot"

    def _records(self) -> Iterator[dict[str, Any]]:
        folders = sorted(folder for folder in self.path.iterdir() if folder.is_dir()) if self.path.is_dir() else []
        self.classes = [folder.name for folder in folders if next(_files(folder, IMAGES), None) is not None]
        for label, name in enumerate(self.classes):
            for image in _files(self.path / name, IMAGES):
                about = {"image": image, "label": label, "text": name.replace("_", " ")}
                yield {"name": self._inside(image), **about}


@data_sets.register("speech")
class Speech(Files):
    """Speech with transcripts: a.wav (or .flac, .ogg, .opus, .mp3) beside a.txt, or a table with audio and text."""

    fields = ("audio", "text")
    task = "transcription"

    def _records(self) -> Iterator[dict[str, Any]]:
        if self.path.is_file():
            for row in self._table(self.path, ("audio", "text")):
                yield self._row(row, "audio", self.path)
            return
        yield from self._pairs(("audio", self.path, ENDINGS), ("text", self.path, (".txt",)), "transcript")


@data_sets.register("conversations")
class Conversations(Files):
    """Conversations as LLaVA has them: JSON or JSONL of {"image": FILE, "conversations": [{"from", "value"}, ...]}.

    "human" and "gpt" take turns; <image> in a question marks where the picture belongs. "image" may be missing.
    """

    fields = ("image", "turns")
    task = "exact_match"

    def _records(self) -> Iterator[dict[str, Any]]:
        if not self.path.is_file():
            return
        for row in self._table(self.path, ("conversations",), texts=()):
            record = {"name": row["name"], "wrong": row.get("wrong") or _odd_turns(row["conversations"])}
            if record["wrong"] is None:
                record = {"name": row["name"], "turns": tuple(turn["value"] for turn in row["conversations"])}
            if isinstance(row.get("image"), str) and row["image"]:
                image = self._find(row["image"], self.path)
                record |= {"image": image, "key": self._inside(image)}
            elif row.get("id") is not None:
                record["key"] = row["id"]
            yield record


def _odd_turns(turns: Any) -> str | None:
    """What is wrong with a conversation, or None."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        return 'its conversations are no list of {"from": ..., "value": ...}'
    if [turn.get("from") for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        return "its turns are not of human and gpt, one after the other"
    empty = [number for number, turn in enumerate(turns, 1) if not isinstance(turn.get("value"), str)]
    return f"its turn {empty[0]} has no text" if empty else None


@data_sets.register("segmentation")
class Segmentation(Files):
    """Pictures with masks: images/a.jpg and masks/a.png, whose pixels are numbers of classes; 255 is left out.

    There may be folders in both, as long as a mask lies in masks/ as its picture does in images/.
    """

    fields = ("image", "mask")
    task = "segmentation"

    def _records(self) -> Iterator[dict[str, Any]]:
        images, masks = ("image", self.path / "images", IMAGES), ("mask", self.path / "masks", (".png",))
        yield from self._pairs(images, masks, "mask")

    def read(self, index: int) -> Sample:
        """A picture and its mask."""
        sample = super().read(index)
        sides, (height, width) = sample["image"].size, sample["mask"].shape
        if sides != (width, height):
            wrong = f"its mask has {width} x {height} pixels, the picture {sides[0]} x {sides[1]}"
            raise BadInput(f"cannot use {self.name(index)}", wrong, "a mask of the size of its picture")
        return sample
