"""`mmoe tour`: runs from start to end, again over what is there, in a process of its own and without a network."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

import zoo
from demos import tour
from tests import processes

WORDS = ["tour", "--steps", "3"]


def alone(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmoe", *WORDS]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


def test_tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    for run in (alone, partial(processes.command, WORDS)):
        done = run(folder=tmp_path)
        assert done.returncode == 0, done.stderr
        text = done.stdout
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
