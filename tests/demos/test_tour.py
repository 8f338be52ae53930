"""`mmoe tour`: runs from start to end, twice, in its own process and without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import zoo
from demos import tour


def run(folder: Path, *words: str) -> str:
    """Runs the verb in another folder, with every proxy and hub unreachable."""
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mmoe", "tour", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tour(tmp_path: Path) -> None:
    for _ in range(2):
        start = time.monotonic()
        text = run(tmp_path, "--steps", "3")
        print(f"took {time.monotonic() - start:.1f} s")
        for name in ("routing.png", "overlay.png"):
            with Image.open(tmp_path / "runs" / "tour" / name) as picture:
                assert min(picture.size) > 100
    assert "zoo.load('clip_moe_tiny')" in text
    shares = [float(share) for share in re.findall(r"(\d+\.\d) %", text)]
    assert sum(shares) == pytest.approx(100, abs=0.5) and len(shares) == len(tour.LABELS)
    assert len(re.findall(r"^(image|text) \d+ ", text, re.MULTILINE)) == zoo.card(tour.MODEL).moe["layers"]
    before, after = re.search(r"held-out emoji:\s+(\d+\.\d+) before, (\d+\.\d+) after", text).groups()
    assert before != after


def test_honest_words() -> None:
    assert "no change" in tour.honest_words(2.0, 2.01)
    assert "rose by 0.500" in tour.honest_words(2.0, 2.5)
    assert "fell by 0.500" in tour.honest_words(2.5, 2.0)
