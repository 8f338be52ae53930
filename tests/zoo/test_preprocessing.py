"""How pictures become tensors: what a folder was saved with, and options that are given when it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import zoo


@pytest.fixture(autouse=True)
def _two_cards() -> None:
    """All of them here, where the folder's fixture leaves two."""


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip_moe_tiny", {"interpolation": "bilinear", "resize_mode": "squash"}),
        ("earth_adapter_tiny", {"stride": 10}),
        ("earth_adapter_tiny", {"image_size": 32}),
        ("earth_adapter_tiny", {"image_size": 128, "image_mean": [0.5, 0.5, 0.5]}),
        ("earth_adapter_tiny", {"classes": list("abcdef"), "colors": ["#000000"] * 6}),
        ("gamma_tiny", {"short_side": None}),
        ("gamma_tiny", {"crop_size": 32, "image_std": [0.2, 0.2, 0.2]}),
    ],
)
def test_options_of_preprocessing_count_on_a_folder_too(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = zoo.load(name, device="cpu")
    model.preprocessing = {**model.preprocessing, "background": [1, 2, 3]}
    model.save(tmp_path / "m")
    from_card = zoo.load(name, device="cpu", **options).preprocessing
    from_folder = zoo.load(tmp_path / "m", device="cpu", **options).preprocessing
    assert from_folder == {**from_card, "background": [1, 2, 3]}, "and what no option changes is as it was saved"
    assert from_card != zoo.load(name, device="cpu").preprocessing
