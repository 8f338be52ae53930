"""Runs with several seeds put together: means, spreads, and what is refused."""

from __future__ import annotations

import json

import pytest
import yaml

from mmoe.errors import BadInput
from train.compare import compare, write_entries
from train.recipe import Recipe
from zoo.table import metric_tables

STAGES = """\
name: two
model: {name: clip_moe_tiny}
data: {name: emoji}
optim: {lr: 1.0e-3}
run: {steps: 1}
stages: [{name: base}, {name: longer, run: {steps: 2}}]
"""


@pytest.fixture
def finished(tmp_path):
    """Writes a run as it is when it is done."""

    def write(name, seed, value, *overrides):
        (tmp_path / "two.yaml").write_text(STAGES)
        folder = tmp_path / name
        for stage in ("base", "longer"):
            (folder / stage).mkdir(parents=True)
            metrics = {"R@1": value, "held_out_noto/T2I R@1": value / 2}
            results = {"metrics": metrics, "parameters": {"total": 2000, "active": 1000}}
            (folder / stage / "results.json").write_text(json.dumps(results))
        Recipe.load(tmp_path / "two.yaml", f"run.seed={seed}", *overrides).save(folder / "recipe.yaml")
        return folder

    return write


def test_mean_and_spread_over_seeds(finished):
    entries = compare([finished("a", 0, 0.2), finished("b", 1, 0.4)])
    assert [(entry["data"], entry["model"]) for entry in entries] == [
        ("emoji", "base"),
        ("emoji", "longer"),
        ("emoji: 300 concepts never trained on, noto", "base"),
        ("emoji: 300 concepts never trained on, noto", "longer"),
    ]
    assert entries[0]["seeds"] == [0, 1] and entries[0]["total"] == 2000
    assert (entries[0]["R@1"], entries[0]["R@1 sd"]) == pytest.approx((0.3, 0.1414))
    assert (entries[2]["T2I R@1"], entries[2]["T2I R@1 sd"]) == pytest.approx((0.15, 0.0707))
    assert entries[0]["command"] == "mmoe train two run.seed=S, S = 0, 1"


def test_runs_may_be_on_different_folds(finished):
    photos = "data.name=distorted_photos"
    folders = [finished(f"run{seed}", seed, seed / 4, photos, f"data.options.fold={seed}") for seed in (0, 1, 2)]
    told = compare(folders, ["R@1"])[0]
    assert told["command"] == "mmoe train two run.seed=S data.options.fold=S, S = 0, 1, 2"
    assert (told["R@1"], told["R@1 sd"]) == (0.25, 0.25)
    other = finished("other", 3, 0.5, photos, "data.options.fold=1")
    command = compare([folders[0], other], ["R@1"])[0]["command"]
    assert command == "mmoe train two run.seed=S data.options.fold=F, S = 0, 3, F = 0, 1"
    assert compare([folders[1]], ["R@1"])[0]["command"] == "mmoe train two run.seed=1 data.options.fold=1"
    larger = finished("larger", 4, 0.5, photos, "data.options.fold=1", "data.options.size=64")
    with pytest.raises(BadInput, match=r"data\.options\.size"):
        compare([folders[0], larger], ["R@1"])


def test_the_last_step_and_the_best_one_are_told_apart(finished):
    folders = [finished("a", 0, 0.2, "run.best=R@1"), finished("b", 1, 0.4, "run.best=R@1")]
    for folder in folders:
        path = folder / "longer" / "results.json"
        results = json.loads(path.read_text())
        metrics = {name: value + 0.1 for name, value in results["metrics"].items()}
        path.write_text(json.dumps({**results, "best": {"value": 1, "step": 1, "metrics": metrics}}))
    entries = [entry for entry in compare(folders, ["R@1"]) if entry["model"] != "base"]
    assert [entry["model"] for entry in entries] == ["longer, last step", "longer, best by R@1"]
    assert [entry["R@1"] for entry in entries] == pytest.approx([0.3, 0.4])


def test_groups_are_told_in_words_and_with_what_was_trained(tmp_path):
    (tmp_path / "maps.yaml").write_text(STAGES.partition("stages:")[0].replace("two", "maps"))
    report = ["data.name=blue_marble", "data.options={part: report}", "run.best=validation/mIoU"]
    Recipe.load(tmp_path / "maps.yaml", *report).save(tmp_path / "run" / "recipe.yaml")
    metrics = {"validation/mIoU": 0.5, "haze/mIoU": 0.3}
    sizes = {"total": 2000, "active": 2000, "trained": 1234}
    results = {"metrics": metrics, "parameters": sizes, "best": {"value": 0.6, "step": 1, "metrics": metrics}}
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    entries = compare([tmp_path / "run"])
    assert [(entry["data"], entry["model"]) for entry in entries[1:3]] == [
        (
            "blue_marble: validation tiles of the source, by which checkpoints are chosen",
            "maps, best by validation/mIoU",
        ),
        ("blue_marble: test tiles of the source, in haze", "maps, last step"),
    ]
    heading, table = metric_tables(entries)[1]
    assert heading == "blue_marble: test tiles of the source, in haze"
    assert [row.split()[-2:] for row in table.splitlines()] == [["trained", "mIoU"], *[["1.23k", "30.0"]] * 2]


def test_one_run_has_no_spread(finished):
    entries = compare([finished("a", 3, 0.2)], ["R@*"])
    assert len(entries) == 2 and "R@1 sd" not in entries[0]
    assert entries[0]["command"] == "mmoe train two run.seed=3"


def test_entries_for_a_card_read_back(finished, tmp_path):
    entries = compare([finished("a", 0, 0.2)])
    write_entries(tmp_path / "metrics.yaml", entries)
    assert yaml.safe_load((tmp_path / "metrics.yaml").read_text()) == entries


def test_runs_that_cannot_be_compared(finished, tmp_path):
    first = finished("a", 0, 0.2)
    with pytest.raises(BadInput, match="their seeds are 0, 0"):
        compare([first, finished("b", 0, 0.1)])
    with pytest.raises(BadInput, match=r"stages.base.optim.lr: 0.001 -> 0.5"):
        compare([first, finished("c", 1, 0.1, "optim.lr=0.5")])
    with pytest.raises(BadInput, match="no run in"):
        compare([first, tmp_path])
    with pytest.raises(BadInput, match="did you mean: R@1"):
        compare([first], ["R1"])
    unfinished = finished("d", 1, 0.1)
    (unfinished / "longer" / "results.json").unlink()
    with pytest.raises(BadInput, match=r"its stage 'longer' is not finished\n  try: mmoe train .*d --resume"):
        compare([first, unfinished])
