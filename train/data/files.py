"""Data of one's own: pictures with captions, pictures by class, speech with transcripts, conversations, segmentation.

Each class says in its docstring how the files lie. `held_out` of the samples, chosen by their names, is evaluated on
and never trained on, so the split stays when files are added.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmoe.errors import BadInput, did_you_mean
from train.data.base import DataSet, Sample, Split, data_sets
from zoo.images import read_image

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = (".csv", ".tsv", ".jsonl", ".json")
RATE = 16_000  # samples per second of "audio"


class Files(DataSet):
    """Base of the data sets that are read from files.

    Args:
        split: "train" or "eval".
        path: folder or table.
        held_out: share of the samples that is "eval".
        limit: uses so many samples.

    Attributes:
        records: of the split, each with the fields of a sample; files as paths.
    """

    def __init__(self, split: Split, *, path: Path, held_out: float = 0.1, limit: int | None = None) -> None:
        super().__init__()
        self.path = path.expanduser()
        if not self.path.exists():
            raise BadInput(
                f"no data in '{path}'", f"there is no such file or folder in {Path.cwd()}", "data.path=FOLDER"
            )
        records = list(self._records())
        if not records:
            raise BadInput(f"no data in '{path}'", f"wanted: {self._form()}", "data.path=FOLDER")
        self.records = [records[i] for i in chosen([str(one["name"]) for one in records], split, held_out, limit)]

    def _records(self) -> Iterator[dict[str, Any]]:
        """All records, with a "name" each."""
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
        return {name: _read(name, value) for name, value in self.records[index].items() if name != "name"}

    def _table(self, path: Path, needed: Sequence[str]) -> Iterator[dict[str, str]]:
        """Rows of a CSV, TSV, JSON or JSONL file, and where each stands."""
        for number, row in enumerate(_rows(path), 1):
            for name in needed:
                if not isinstance(row, Mapping) or row.get(name) in (None, ""):
                    known = list(row) if isinstance(row, Mapping) else []
                    wrong = did_you_mean(name, [str(key) for key in known]) if known else "it is no mapping"
                    raise BadInput(f"row {number} of '{path}' has no {name!r}", wrong, f"columns {', '.join(needed)}")
            yield {**row, "name": f"{path.name} row {number}"}

    def _find(self, name: str, beside: Path) -> Path:
        """A file that a table names: beside the table, or absolute."""
        return beside.parent / Path(name).expanduser()


def chosen(names: Sequence[str], split: Split, held_out: float, limit: int | None) -> list[int]:
    """Numbers of the samples of a split, in the order of their names; a name falls into the same one as far as it can.

    >>> names = ["a", "b", "c", "d"]
    >>> sorted(chosen(names, "train", 0.25, None) + chosen(names, "eval", 0.25, None))
    [0, 1, 2, 3]
    """
    mixed = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    count = round(held_out * len(names)) or (1 if held_out and len(names) > 1 else 0)
    own = mixed[:count] if split == "eval" else mixed[count:]
    return sorted(own[:limit], key=names.__getitem__)


def _read(name: str, value: Any) -> Any:
    if name == "image":
        return read_image(value)
    if name == "mask":
        return read_mask(value)
    return read_audio(value) if name == "audio" else value


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
    except OSError as error:
        raise BadInput(f"cannot read '{path}'", str(error), "a PNG") from error


def read_audio(path: Path) -> np.ndarray:
    """Mean of the channels at 16 kHz in [-1, 1], (n,) float32, of a WAV file.

    Raises:
        BadInput: it cannot be read.
    """
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    try:
        rate, values = wavfile.read(path)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"cannot read '{path}'", str(error) or "it ends early", "a WAV file") from error
    if np.issubdtype(values.dtype, np.integer):
        limits = np.iinfo(values.dtype)
        values = (values.astype(np.float32) - (128 if limits.min == 0 else 0)) / (
            128 if limits.min == 0 else limits.max
        )
    mono = values.astype(np.float32).reshape(len(values), -1).mean(1)
    if rate == RATE:
        return mono
    common = np.gcd(rate, RATE)
    return resample_poly(mono, RATE // common, rate // common).astype(np.float32)


def _rows(path: Path) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            yield from (json.loads(line) for line in text.splitlines() if line.strip())
        elif path.suffix == ".json":
            yield from json.loads(text)
        else:
            yield from csv.DictReader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ",")
    except (ValueError, csv.Error, OSError) as error:
        raise BadInput(f"cannot read '{path}'", str(error), f"a table: {', '.join(TABLES)}") from error


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
                    file = self._find(row["image"], table)
                    yield {"name": str(file), "image": file, "text": row["text"]}
                return
        for image in _files(self.path, IMAGES):
            caption = image.with_suffix(".txt")
            if caption.is_file():
                yield {"name": str(image), "image": image, "text": caption.read_text(encoding="utf-8").strip()}


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
                yield {"name": str(image), "image": image, "label": label, "text": name.replace("_", " ")}


@data_sets.register("speech")
class Speech(Files):
    """Speech with transcripts: a.wav beside a.txt, or a table with the columns audio and text."""

    fields = ("audio", "text")
    task = "transcription"

    def _records(self) -> Iterator[dict[str, Any]]:
        if self.path.is_file():
            for row in self._table(self.path, ("audio", "text")):
                file = self._find(row["audio"], self.path)
                yield {"name": str(file), "audio": file, "text": row["text"]}
            return
        for audio in _files(self.path, (".wav",)):
            transcript = audio.with_suffix(".txt")
            if transcript.is_file():
                yield {"name": str(audio), "audio": audio, "text": transcript.read_text(encoding="utf-8").strip()}


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
        for row in self._table(self.path, ("conversations",)):
            turns: Any = row["conversations"]
            roles = [turn.get("from") for turn in turns if isinstance(turn, Mapping)]
            if len(roles) != len(turns) or roles != ["human", "gpt"] * (len(turns) // 2):
                wrong = "its turns are not of human and gpt, one after the other"
                raise BadInput(f"cannot use {row['name']}", wrong, '[{"from": "human", "value": "..."}, ...]')
            record: dict[str, Any] = {"name": row["name"], "turns": tuple(str(turn.get("value", "")) for turn in turns)}
            yield {**record, "image": self._find(row["image"], self.path)} if row.get("image") else record


@data_sets.register("segmentation")
class Segmentation(Files):
    """Pictures with masks: images/a.jpg and masks/a.png, whose pixels are numbers of classes; 255 is left out."""

    fields = ("image", "mask")
    task = "segmentation"

    def _records(self) -> Iterator[dict[str, Any]]:
        masks = {path.stem: path for path in _files(self.path / "masks", (".png",))}
        for image in _files(self.path / "images", IMAGES):
            if image.stem in masks:
                yield {"name": str(image), "image": image, "mask": masks[image.stem]}
