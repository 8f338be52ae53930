"""Results of several seeds put together: means, spreads, and what is refused."""

from __future__ import annotations

import json

import pytest
import yaml

from mmoe.errors import BadInput
from train.dmu_table import DIRECTIONS, MODELS, SPLITS, as_yaml, metrics, read_results, show
from train.tasks import RANKS


def write(folder, seed: int, value: float):
    row = {direction: {f"R@{k}": value for k in RANKS} for direction in DIRECTIONS}
    retrieval = {model: {split: row for split in SPLITS} for model in MODELS}
    folder.mkdir()
    layer = {"layer": "a", "load": [0.5, 0.5], "max_over_mean": 1.0, "dead": [], "entropy": 0.7}
    (folder / "results.json").write_text(json.dumps({"seed": seed, "retrieval": retrieval, "experts": [layer]}))
    return folder


def test_mean_and_spread_over_seeds(tmp_path):
    folders = [write(tmp_path / str(seed), seed, value) for seed, value in ((0, 0.2), (1, 0.4))]
    entries = metrics(read_results(folders))
    assert len(entries) == len(MODELS) * len(SPLITS)
    assert entries[0]["seeds"] == [0, 1]
    assert entries[0]["T2I R@1"] == pytest.approx(0.3)
    assert entries[0]["T2I R@1 sd"] == pytest.approx(0.1414, abs=1e-4)
    assert "| 30.0 ± 14.1 / 30.0 ± 14.1 / 30.0 ± 14.1 |" in show(entries)


def test_yaml_for_the_card_reads_back(tmp_path):
    results = read_results([write(tmp_path / "0", 0, 0.2)])
    read = yaml.safe_load(as_yaml(results))
    assert read["clip_moe_tiny"]["metrics"] == metrics(results)
    assert read["clip_moe_tiny"]["routing"]["layers"][0]["load"] == [0.5, 0.5]
    assert {entry["model"] for entry in read["clip_tiny"]["metrics"]} == {"dense base"}
    assert len(read["clip_tiny"]["metrics"]) == len(SPLITS)


def test_unfinished_run(tmp_path):
    with pytest.raises(BadInput, match="the run is not finished"):
        read_results([tmp_path])


def test_same_seed_twice(tmp_path):
    folders = [write(tmp_path / name, 0, 0.1) for name in "ab"]
    with pytest.raises(BadInput, match=r"their seeds are \[0, 0\]"):
        read_results(folders)
