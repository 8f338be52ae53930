"""Distortions: sizes, seeds, levels that get worse, and pictures at the edge of what there is."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmoe.errors import BadOverride
from train.data.distortions import GROUPS, KINDS, LEVELS, NEED_COLOUR, distort
from train.data.lab import from_lab, to_lab

UNORDERED = ("mean_shift", "contrast_change")
CHANGE_PLAIN = {
    *(name for name in KINDS if KINDS[name].group in ("noise", "brightness")),
    "color_block",
    "contrast_change",
}


def difference(first, second):
    return float(np.abs(np.asarray(first, float) - np.asarray(second, float)).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_each_level_is_worse(kind, picture):
    found = [distort(picture, kind, level, seed=3) for level in range(LEVELS + 1)]
    assert found[0] == picture
    assert all(one.size == picture.size and one.mode == "RGB" for one in found)
    away = [difference(one, picture) for one in found[1:]]
    if kind in UNORDERED:
        assert away[2] == 0 and min(away[0], away[4]) > min(away[1], away[3]) > 0
    else:
        assert away == sorted(away) and away[4] > 2 * max(away[0], 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_on_everything_random(kind, picture):
    first, again, other = (np.asarray(distort(picture, kind, 4, seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    random = {*(name for name in KINDS if KINDS[name].group == "noise"), "motion_blur", "color_shift", "jitter"}
    random |= {"non_eccentricity_patch", "color_block"}
    assert (first != other).any() == (kind in random)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2), (17, 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_small_pictures(kind, size):
    for level in (1, LEVELS):
        assert distort(Image.new("RGB", size, (200, 90, 10)), kind, level).size == size


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (128, 128, 128)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in CHANGE_PLAIN])
def test_plain_pictures_stay_plain(kind, colour):
    plain = Image.new("RGB", (32, 32), colour)
    assert difference(distort(plain, kind, LEVELS), plain) <= 3


@pytest.mark.parametrize("kind", NEED_COLOUR)
def test_what_only_touches_colours_leaves_grey_pictures(kind, picture):
    grey = picture.convert("L").convert("RGB")
    assert difference(distort(grey, kind, LEVELS), grey) < 1


def test_kinds_are_those_of_kadid_in_their_order():
    assert [kind.number for kind in KINDS.values()] == list(range(1, 26))
    assert list(KINDS)[:3] == ["gaussian_blur", "lens_blur", "motion_blur"] and list(KINDS)[-1] == "contrast_change"
    assert {kind.group for kind in KINDS.values()} == set(GROUPS)
    assert all(len(kind.values) == LEVELS for kind in KINDS.values())


def test_strengths_by_hand():
    half = Image.new("RGB", (64, 64), (128, 128, 128))
    noisy = np.asarray(distort(half, "white_noise", 5), float) / 255
    assert noisy.std() == pytest.approx(0.1, rel=0.05)
    salted = np.asarray(distort(half, "impulse_noise", 5))
    assert np.isin(salted, (0, 255)).mean() == pytest.approx(0.03, rel=0.2)
    assert np.asarray(distort(half, "mean_shift", 1)).mean() == pytest.approx(128 + 0.15 * 255, abs=1)
    assert len(np.unique(np.asarray(distort(half, "color_block", 1)).reshape(-1, 3), axis=0)) <= 3
    point = Image.new("RGB", (33, 33))
    point.putpixel((16, 16), (255, 255, 255))
    disc = np.asarray(distort(point, "lens_blur", 5))[..., 0]
    assert disc[16, 8] > 0 and disc[16, 7] == 0 and disc[10, 10] == 0, "a disc of 8 pixels around its middle"


def test_colours_of_lab():
    white, red = to_lab(np.array([[1, 1, 1], [1, 0, 0]], np.float32))
    assert np.allclose(white, (100, 0, 0), atol=0.1) and np.allclose(red, (53.2, 80.1, 67.2), atol=0.1)
    pixels = np.random.default_rng(0).random((50, 3), np.float32)
    assert np.abs(from_lab(to_lab(pixels)) - pixels).max() < 1e-3


def test_wrong_kinds_and_levels(picture):
    with pytest.raises(BadOverride, match=r"did you mean: .*lens_blur"):
        distort(picture, "lense_blur", 1)
    with pytest.raises(BadOverride, match="level is a whole number from 0 to 5"):
        distort(picture, "jpeg", 6)
