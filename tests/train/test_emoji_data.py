"""The emoji data set in assets/data/emoji: counts, sheets, split, licences."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

ASSETS = Path(__file__).parents[2] / "assets"
DATA = ASSETS / "data" / "emoji"
STYLES = ("openmoji", "noto", "twemoji")
CONCEPTS, HELD_OUT, SEEN = 1641, 300, 1341
COLUMNS, CELL = 41, 64
THUMBNAIL = 8  # pixels on a side


@cache
def emoji() -> list[dict]:
    return json.loads((DATA / "emoji.json").read_text(encoding="utf-8"))


@cache
def splits() -> dict:
    return json.loads((DATA / "splits.json").read_text(encoding="utf-8"))


@cache
def sheet(style: str) -> Image.Image:
    with Image.open(DATA / f"{style}.webp") as file:
        return file.convert("RGBA")


def box(index: int, size: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a cell that is `size` pixels wide."""
    x, y = index % COLUMNS * size, index // COLUMNS * size
    return x, y, x + size, y + size


@cache
def thumbnails(style: str) -> list[bytes]:
    """Every cell on grey at 8x8 px, RGB."""
    small = sheet(style).convert("RGBa").reduce(CELL // THUMBNAIL).convert("RGBA")
    grey = Image.new("RGBA", small.size, (128, 128, 128, 255))
    grey.alpha_composite(small)
    flat = grey.convert("RGB")
    return [flat.crop(box(index, THUMBNAIL)).tobytes() for index in range(CONCEPTS)]


def difference(first: bytes, second: bytes) -> int:
    return sum(abs(a - b) for a, b in zip(first, second, strict=True))


def test_concepts() -> None:
    assert len(emoji()) == CONCEPTS
    for key in ("id", "char", "name"):
        assert len({entry[key] for entry in emoji()}) == CONCEPTS, key
    assert not [entry for entry in emoji() if entry["group"] == "flags"]
    assert len({entry["group"] for entry in emoji()}) == 9


@pytest.mark.parametrize("key", ["id", "char", "name", "group", "subgroup"])
def test_text_fields_are_filled(key: str) -> None:
    assert not [entry for entry in emoji() if not isinstance(entry[key], str) or entry[key].strip() != entry[key]]
    assert all(entry[key] for entry in emoji())


def test_keywords() -> None:
    for entry in emoji():
        words = entry["keywords"]
        assert words == list(dict.fromkeys(word.strip().lower() for word in words)), entry["name"]
        assert "" not in words and entry["name"].lower() not in words, entry["name"]
    assert sum(not entry["keywords"] for entry in emoji()) <= 2  # hole, fountain


@pytest.mark.parametrize("style", STYLES)
def test_sheet(style: str) -> None:
    rows = -(-CONCEPTS // COLUMNS)
    assert sheet(style).size == (COLUMNS * CELL, rows * CELL)
    with Image.open(DATA / f"{style}.webp") as file:
        assert file.mode == "RGBA"
    alpha = sheet(style).getchannel("A")
    assert alpha.getextrema() == (0, 255)
    empty = [index for index in range(rows * COLUMNS) if alpha.crop(box(index, CELL)).getbbox() is None]
    assert empty == list(range(CONCEPTS, rows * COLUMNS))


@pytest.mark.parametrize(("first", "second"), [("openmoji", "noto"), ("openmoji", "twemoji"), ("noto", "twemoji")])
def test_cells_are_aligned_across_styles(first: str, second: str) -> None:
    a, b = thumbnails(first), thumbnails(second)
    order = list(range(CONCEPTS))
    random.Random(0).shuffle(order)
    same = [difference(a[i], b[i]) for i in range(CONCEPTS)]
    other = [difference(a[i], b[j]) for i, j in enumerate(order)]
    shifted = [difference(a[i], b[i - 1]) for i in range(CONCEPTS)]  # neighbours look alike: the harder check
    assert sum(same) < 0.9 * sum(other)
    assert sum(same) < 0.95 * sum(shifted)


def test_split() -> None:
    ids = {entry["id"] for entry in emoji()}
    held_out = splits()["held_out_concepts"]
    assert splits()["held_out_style"] in STYLES
    assert held_out == sorted(set(held_out))
    assert len(held_out) == HELD_OUT
    assert set(held_out) <= ids
    assert len(ids - set(held_out)) == SEEN


def test_split_is_stratified() -> None:
    held_out = set(splits()["held_out_concepts"])
    for group in {entry["group"] for entry in emoji()}:
        members = [entry["id"] for entry in emoji() if entry["group"] == group]
        assert abs(len(held_out & set(members)) - len(members) * HELD_OUT / CONCEPTS) < 1, group


def test_near_duplicates_of_the_split_are_listed() -> None:
    near = splits()["near_duplicates"]
    assert near["count"] == len(near["held_out_concepts"])
    assert near["held_out_concepts"] == sorted(set(near["held_out_concepts"]))
    assert set(near["held_out_concepts"]) < set(splits()["held_out_concepts"])


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("LICENSE.md", "OpenMoji Noto Twemoji Changes"),
        ("LICENSE-openmoji.txt", "Attribution-ShareAlike 4.0 International"),
        ("LICENSE-noto.txt", "Apache License"),
        ("LICENSE-twemoji.txt", "Attribution 4.0 International"),
        ("LICENSE-emoji-data.txt", "MIT License"),
    ],
)
def test_licences(file: str, words: str) -> None:
    text = (DATA / file).read_text(encoding="utf-8")
    assert not [word for word in words.split() if word not in text]


def test_examples() -> None:
    pictures = sorted((ASSETS / "examples").glob("*.png"))
    assert {"fox", "pizza", "rocket", "guitar"} <= {path.stem for path in pictures}
    for path in (path for path in pictures if path.stem.replace("_", " ") in {entry["name"] for entry in emoji()}):
        with Image.open(path) as picture:
            assert (picture.mode, picture.size) == ("RGBA", (256, 256)), path.name
    assert "Twemoji" in (ASSETS / "examples" / "README.md").read_text(encoding="utf-8")
