"""The list of pristine pictures, and how they are cut."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mmoe.errors import BadInput
from train.data.photos import SCENES, open_photo, photos
from zoo.packages import find_local


@pytest.fixture
def packaged():
    """Pictures of Python packages."""
    found = photos(only_packaged=True)
    if any(find_local(photo.file) is None for photo in found):
        pytest.skip("scikit-image and scikit-learn are not installed in the releases of the list: make install")
    return found


def test_every_picture_has_a_source_and_a_licence():
    found = photos()
    assert len({photo.id for photo in found}) == len({photo.file.sha256 for photo in found}) == len(found)
    assert all(photo.licence and photo.scene in SCENES and len(photo.file.sha256) == 64 for photo in found)
    assert {photo.scene for photo in photos(only_packaged=True)} == set(SCENES)
    assert [photo.id for photo in found if not photo.author] == ["color_wheel", "moon"], "nobody is named for these"


def test_the_read_me_counts_as_the_list_does(root):
    text = (root / "assets" / "data" / "photos" / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.startswith("| ")]
    told = {name.split(" ")[0]: int(count) for name, count in rows if count.isdigit()}
    scenes = Counter(photo.scene for photo in photos())
    packages = Counter(photo.file.package.partition("==")[0] for photo in photos())
    assert told == scenes | packages and f"list of {len(photos())} pictures" in text


def test_pictures_are_the_square_middle(packaged):
    for photo in packaged:
        picture = open_photo(photo, 48, "")
        assert picture.size == (48, 48) and picture.mode == "RGB"
        pixels = np.asarray(picture, int)
        assert photo.colour == ((pixels.max(2) - pixels.min(2)).max() > 8), photo.id


def test_a_picture_that_is_not_here(monkeypatch):
    monkeypatch.setattr("zoo.packages._places", lambda file: iter(()))
    with pytest.raises(BadInput, match=r"no file 'coffee.png'(.|\n)*try: fetch it"):
        open_photo(next(photo for photo in photos() if photo.id == "coffee"), 48, "fetch it")
