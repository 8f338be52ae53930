"""Baselines of picture quality: what they see, and the table they end in."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from train.data.distortions import distort
from train.quality_baselines import compare, jpeg_size, normalised, piqe, statistics_of, table, total_variation


def test_piqe_of_spoilt_pictures_is_higher(picture):
    busy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).resize((128, 96))
    clean = Image.blend(picture, busy, 0.15)
    found = [piqe(clean), piqe(distort(clean, "gaussian_blur", 5)), piqe(distort(clean, "jpeg", 5))]
    assert all(0 <= value <= 100 for value in found) and found[0] < min(found[1:])
    assert piqe(Image.new("RGB", (20, 40))) == 100, "nothing to see"


def test_normalised_luminance_does_not_depend_on_contrast():
    grey = np.random.default_rng(0).random((64, 64)) * 100
    assert np.corrcoef(normalised(grey).ravel(), normalised(2 * grey + 20).ravel())[0, 1] > 0.999
    assert abs(normalised(np.full((32, 32), 77.0))).max() < 1e-9


def test_busy_pictures(picture):
    blurred, noisy = distort(picture, "gaussian_blur", 5), distort(picture, "white_noise", 5)
    for measure in (total_variation, jpeg_size):
        assert measure(blurred) < measure(picture) < measure(noisy)
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (8, 4)))
    assert total_variation(stripes) == 255


def test_18_statistics(picture):
    found = statistics_of(picture)
    assert len(found) == 18 and np.isfinite(found).all()
    assert np.isfinite(statistics_of(Image.new("RGB", (9, 9)))).all()


def test_the_table():
    draw = np.random.default_rng(0)
    rows = []
    for number in range(60):
        level = number % 5 + 1
        seen = {"PIQE": -level + draw.normal(0, 0.1), "total variation": level, "JPEG size": draw.random()}
        about = {"photo": number // 5, "kind": "blur", "level": level, "severity": level, "fold": number % 5 % 2}
        rows.append({**about, **seen, "human": 1 - level / 5, "statistics": [level, draw.random()]})
    found = compare(rows, 0, "human")
    assert found["cell oracle"]["SRCC"] == 1 and found["cell oracle"]["monotone"] == 1
    assert found["total variation"]["SRCC"] == 1, "its sign was learnt"
    assert found["ridge on 18 statistics"]["SRCC"] > 0.9 and abs(found["JPEG size"]["SRCC"]) < 0.6
    lines = table([found, compare(rows, 1, "human")]).splitlines()
    assert len(lines) == 6 + 2 * 6 and "1.000 ± 0.000" in lines[1]
    assert lines[7].split() == ["cell", "oracle", "1.000", "1.000"]
    assert "±" not in table([found]) and len(table([found]).splitlines()) == 6


@pytest.mark.parametrize("size", [(1, 1), (5, 300)])
def test_pictures_of_any_size(size):
    image = Image.new("RGB", size, (9, 200, 30))
    assert piqe(image) == 100 and np.isfinite(jpeg_size(image))
