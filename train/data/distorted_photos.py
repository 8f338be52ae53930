"""Pictures whose quality is about known: 87 pristine ones, each distorted in 25 ways at 5 levels, with pseudo-labels.

Nobody rated these pictures. A label is the mean opinion that viewers had of the same kind and level of distortion in
KADID-10k (Lin et al., QoMEX 2019), scaled to 0 .. 1, plus a small term for how well this picture stands it: 0.06 times
the standardised mean rank of five metrics in its cell. Data card: assets/data/photos/README.md.

Distorted pictures are made once, by a seed from the picture's name, and kept in the folder of downloaded files: one
array per view and size, 14 MB at 192 pixels. Shapes: n = 1 + 5 per kind pictures of one view, S side.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import random
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmoe.atomic import open_atomic
from mmoe.errors import BadInput
from mmoe.options import check_bool, check_choice, check_int
from train.data import distortions, lab
from train.data.base import DataSet, Sample, Split, data_sets
from train.data.distortions import GROUPS, KINDS, LEVELS, NEED_COLOUR, distort
from train.data.loader import seed_of
from train.data.photos import Photo, open_photo, photos
from train.progress import Progress
from zoo.assets import asset
from zoo.cache import home
from zoo.packages import PackagedFile

FOLDS = 5
PRISTINE = "pristine"
CONTENT = 0.06  # of a label per standard deviation of the ranks; a choice
STRENGTHS = ("faint", "slight", "medium", "strong", "extreme")
FETCH = "mmoe recipe fetch distorted_photos"
_BY_OPINION = ("mean_shift", "contrast_change")  # their levels go from one side of the pristine picture to the other


class View(NamedTuple):
    """The square middle of a photograph, or a quarter of it, 1 to 4, at twice the resolution."""

    photo: Photo
    quarter: int = 0

    def open(self, size: int) -> Image.Image:
        """The pristine picture, (S, S) RGB.

        Raises:
            BadInput: its file is not on this machine.
        """
        if not self.quarter:
            return open_photo(self.photo, size, FETCH)
        row, column = divmod(self.quarter - 1, 2)
        box = column * size, row * size, (column + 1) * size, (row + 1) * size
        return open_photo(self.photo, 2 * size, FETCH).crop(box)

    def __str__(self) -> str:
        return f"{self.photo.id} quarter {self.quarter}" if self.quarter else self.photo.id


class Cell(NamedTuple):
    """One picture of a view: what was done to it, and its place in the array of the view."""

    kind: str
    level: int
    row: int


def cells_of(photo: Photo) -> list[Cell]:
    """All pictures of a photograph, the pristine one first.

    >>> [len(cells_of(photo)) for photo in photos()[:2]]
    [126, 111]
    """
    made = [(kind, level) for kind in kinds_of(photo) for level in range(1, LEVELS + 1)]
    return [Cell(kind, level, row) for row, (kind, level) in enumerate([(PRISTINE, 0), *made])]


def kinds_of(photo: Photo) -> list[str]:
    """Kinds of distortion that do something to a picture: those that only touch colours do nothing to grey ones."""
    return [kind for kind in KINDS if photo.colour or kind not in NEED_COLOUR]


def spoil(pristine: Image.Image, photo: Photo, kind: str, level: int) -> np.ndarray:
    """The distorted picture (S, S, 3) uint8 that the data set has: always the same for one photograph and size."""
    return np.asarray(distort(pristine, kind, level, seed_of(photo.id)))


@cache
def opinions() -> dict[tuple[str, int], float]:
    """Mean opinion of each cell of kind and level in KADID-10k, scaled to 0 .. 1; 1 where nothing was done.

    >>> round(opinions()["jpeg", 5], 3)
    0.088
    """
    rows = _table("opinions.csv")
    found = {(row["kind"], level): (float(row[f"level_{level}"]) - 1) / 4 for row in rows for level in range(1, 6)}
    return {**found, (PRISTINE, 0): 1.0}


@cache
def standings() -> dict[tuple[str, str, int], float]:
    """How much better than others a picture stands a kind at a level, in standard deviations of the cell."""
    rows = _table("content.csv")
    return {(row["photo"], row["kind"], level): float(row[f"level_{level}"]) for row in rows for level in range(1, 6)}


@cache
def metrics() -> dict[tuple[str, str, int], float]:
    """Mean rank of each distorted picture by five metrics, as a share of all, 1 the best; no person had a say."""
    rows = _table("metrics.csv")
    return {(row["photo"], row["kind"], level): float(row[f"level_{level}"]) for row in rows for level in range(1, 6)}


@cache
def severity(kind: str, level: int) -> int:
    """Place of a level among those of its kind, 1 the mildest: the level, or by opinion where levels have two sides.

    >>> [severity("mean_shift", level) for level in range(1, 6)]
    [4, 2, 1, 3, 5]
    """
    if kind not in _BY_OPINION:
        return level
    liked = sorted(range(1, LEVELS + 1), key=lambda one: -opinions()[kind, one])
    return 1 + liked.index(level)


def caption(kind: str, severity: int) -> str:
    """What was done to a picture, in words.

    >>> caption("gaussian_blur", 4), caption("pristine", 0)
    ('strong gaussian blur', 'pristine')
    """
    return f"{STRENGTHS[severity - 1]} {kind.replace('_', ' ')}" if severity else kind


def _table(name: str) -> list[dict[str, str]]:
    with (asset("data/photos") / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@cache
def places() -> dict[str, int]:
    """Number of each photograph in an order that folds and virtual sets are dealt by.

    Scene by scene, and those of Python packages first, so that every fold has its share of both.
    """

    def order(photo: Photo) -> tuple[Any, ...]:
        return photo.scene, photo not in photos(True), hashlib.sha256(photo.id.encode()).digest()

    return {photo.id: number for number, photo in enumerate(sorted(photos(), key=order))}


def on_scale(score: float, scale: str) -> float:
    """A score as people with other habits would have given it, brought to 0 .. 1 by the ends of their scale.

    A: means of 1 to 5. B: 0 to 100, generous to bad pictures (power 0.7). C: differences of 0 to 1, where 0 is best and
    only 0.1 to 0.8 are used.

    >>> [round(on_scale(0.5, scale), 3) for scale in "ABC"]
    [0.5, 0.616, 0.55]
    """
    given = {"A": 1 + 4 * score, "B": 100 * score**0.7, "C": 0.8 - 0.7 * score}[scale]
    low, high = {"A": (1, 5), "B": (0, 100), "C": (0, 1)}[scale]
    share = (given - low) / (high - low)
    return 1 - share if scale == "C" else share


def _folder(size: int) -> Path:
    """Where distorted pictures are kept; another one for other code."""
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in (distortions, lab))
    return home() / "distorted_photos" / f"{size}-{hashlib.sha256(code).hexdigest()[:8]}"


def _of_other_code(size: int) -> list[Path]:
    """Folders of other versions, which may be gigabytes."""
    own = _folder(size)
    found = [one for one in own.parent.glob("*") if re.fullmatch(r"\d+-[0-9a-f]{8}", one.name) and one.is_dir()]
    return sorted(folder for folder in found if folder.name[-8:] != own.name[-8:])


def _kept(view: View, size: int) -> Path:
    quarter = f"-{view.quarter}" if view.quarter else ""
    return _folder(size) / f"{view.photo.id}-{str(view.photo.file.sha256)[:8]}{quarter}.npy"


@cache
def _opened(file: Path) -> np.ndarray:
    """The kept pictures of one view (n, S, S, 3), on the disk until they are asked for."""
    return np.load(file, mmap_mode="r")


def _is_whole(view: View, size: int) -> bool:
    """Whether a file is there with the right header and length; bytes that changed in between are not seen."""
    shape = (len(cells_of(view.photo)), size, size, 3)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    try:
        with _kept(view, size).open("rb") as file:
            begins = file.read(header.tell()) == header.getvalue()
            return begins and os.fstat(file.fileno()).st_size == header.tell() + math.prod(shape)
    except OSError:
        return False


@contextmanager
def _written(size: int) -> Iterator[None]:
    """What goes wrong with the folder of kept pictures is told with what helps."""
    asked, fix = f"keep distorted pictures in '{_folder(size)}'", "free space, or MMOE_HOME=FOLDER before the command"
    try:
        yield
    except BadInput as error:
        raise BadInput(asked, f"{error.asked}: {error.wrong}", fix) from error
    except OSError as error:
        raise BadInput(asked, str(error.strerror), fix) from error


def make(wanted: Sequence[View], size: int) -> None:
    """Makes the distorted pictures of views that are not kept yet; whole files only, so it can be stopped.

    Args:
        wanted: views.
        size: side in pixels.

    Raises:
        BadInput: a photograph is not on this machine, or the disk is full.
    """
    if all(_is_whole(view, size) for view in wanted):
        return
    from filelock import FileLock

    with ExitStack() as stack:
        with _written(size):
            _folder(size).mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(_folder(size) / ".lock"))
        bar = stack.enter_context(Progress("distorting", len(wanted), unit="photos"))
        for number, view in enumerate(wanted, 1):
            if not _is_whole(view, size):
                pristine = view.open(size)
                made = [np.asarray(pristine)]
                made += [spoil(pristine, view.photo, kind, level) for kind, level, _ in cells_of(view.photo)[1:]]
                with _written(size), open_atomic(_kept(view, size)) as file:
                    np.save(file, np.stack(made))  # (n, S, S, 3)
            bar.update(number)


@data_sets.register("distorted_photos")
class DistortedPhotos(DataSet):
    """Photographs, drawings and textures, pristine and distorted in 25 KADID-style ways at 5 levels; pseudo-labels.

    Splits are by photograph: none is on both sides. The pictures come out of Python and Debian packages.

    Args:
        split: "train" has four of the five folds, "eval" the other one.
        fold: that is evaluated on, 0 to 4.
        size: side of the pictures in pixels.
        packaged: only the pictures inside scikit-image and scikit-learn.
        content: adds to the labels how well the picture stands the distortion.
        scales: gives each third of the photographs to people with another scale ("set" of a sample: A, B or C), who
            bend the labels that are trained on; those of "eval" stay as they are.
        without: a group of kinds that is not trained on, and alone evaluated on.
        quarters: trains on the four quarters of each photograph at twice the resolution too, with its labels: five
            times as many pictures, and as much on the disk.
        rotate: turns each picture of a training batch by a random number of right angles.
        limit: uses so many samples, drawn at random.
    """

    fields = ("image", "score", "scene", "text", "group")
    task = "quality"
    needs_path = False
    folds = "fold"

    def __init__(
        self,
        split: Split,
        *,
        fold: int = 0,
        size: int = 192,
        packaged: bool = False,
        content: bool = True,
        scales: bool = False,
        without: str | None = None,
        quarters: bool = False,
        rotate: bool = False,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        check_int("fold", fold, 0, FOLDS - 1)
        check_int("size", size, 16, 2048)
        switches = {"packaged": packaged, "content": content, "scales": scales, "quarters": quarters, "rotate": rotate}
        for option, value in switches.items():
            check_bool(option, value)
        if without is not None:
            check_choice("without", without, GROUPS)
        self.split, self.size, self.content, self.scales, self.rotate = split, size, content, scales, rotate
        own = [photo for photo in photos(packaged) if (places()[photo.id] % FOLDS == fold) == (split == "eval")]
        views = [View(photo, quarter) for photo in own for quarter in range(5 if quarters and split == "train" else 1)]
        make(views, size)
        self.kept = {view: _kept(view, size) for view in views}
        found = [(view, cell) for view in views for cell in cells_of(view.photo) if _wanted(cell, split, without)]
        self.samples_of = found if limit is None else random.Random(0).sample(found, min(limit, len(found)))
        self.notes.append("the labels are pseudo-labels: nobody rated these pictures")
        if unused := _of_other_code(size):
            told = shlex.join(["rm", "-r", *map(str, unused)])
            self.notes.append(f"pictures of other versions of the code are not used by this one: {told}")

    @classmethod
    def files(cls, options: Mapping[str, Any]) -> tuple[PackagedFile, ...]:
        """The pristine pictures."""
        return tuple(photo.file for photo in photos(bool(options.get("packaged", False))))

    def __len__(self) -> int:
        return len(self.samples_of)

    def name(self, index: int) -> str:
        """Photograph, quarter of it, kind and level."""
        view, cell = self.samples_of[index]
        return f"{view} {cell.kind} {cell.level}"

    def read(self, index: int) -> Sample:
        """A picture with what is known about it.

        "score" is what is trained on, "human" its part that people gave, "metrics" what metrics alone say;
        "severity" is the place of the level among those of its kind, and "text" says both in words.
        """
        view, (kind, level, row) = self.samples_of[index]
        photo, pictures = view.photo, _opened(self.kept[view])
        about = {"scene": photo.scene, "photo": photo.id, "kind": kind, "level": level}
        about["group"] = KINDS[kind].group if level else PRISTINE
        about |= {"severity": severity(kind, level) if level else 0, "human": opinions()[kind, level]}
        about["metrics"] = metrics()[photo.id, kind, level] if level else 1.0
        about["text"] = caption(kind, about["severity"])
        about["score"] = self.score(photo, kind, level)
        if self.scales:
            about["set"] = "ABC"[places()[photo.id] // FOLDS % 3]
        if self.scales and self.split == "train":
            about["score"] = on_scale(about["score"], about["set"])
        return {"image": Image.fromarray(np.array(pictures[row])), **about}

    def vary(self, samples: Sequence[Sample], seeds: Sequence[int]) -> list[Sample]:
        """The samples, their pictures turned where that is asked for."""
        if not self.rotate:
            return list(samples)
        turns = (random.Random(seed).randrange(4) for seed in seeds)
        turned = (np.rot90(np.asarray(one["image"]), turn) for one, turn in zip(samples, turns, strict=True))
        return [{**one, "image": Image.fromarray(image)} for one, image in zip(samples, turned, strict=True)]

    def score(self, photo: Photo, kind: str, level: int) -> float:
        """The pseudo-label, 0 (bad) to 1, before any scale."""
        score = opinions()[kind, level]
        if level and self.content:
            score += CONTENT * standings()[photo.id, kind, level]
        return min(1.0, max(0.0, score))


def _wanted(cell: Cell, split: Split, without: str | None) -> bool:
    """Whether a picture belongs to a split of which a group of kinds is left out."""
    if without is None or cell.kind == PRISTINE:
        return True
    return (KINDS[cell.kind].group == without) == (split == "eval")
