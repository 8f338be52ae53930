"""Pictures of one's own with scores: scales, scenes, splits, and rows that cannot be used."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from mmoe.errors import BadInput, BadOverride
from train.data import build
from train.sections import DataSection


def rated(folder, rows, **options):
    for row in rows:
        Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / row["image"])
    (folder / "scores.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load(folder, **options)


def load(path, split="train", held_out=0.0, max_broken=10, **options):
    return build(
        DataSection(name="quality", path=path, held_out=held_out, max_broken=max_broken, options=options), split
    )


def test_scores_come_to_0_and_1_by_the_ends_of_their_scale(tmp_path):
    rows = [{"image": f"{score}.png", "score": score} for score in (1, 2, 5)]
    data = rated(tmp_path, rows, low=1, high=5)
    assert [data.read(i)["score"] for i in range(3)] == [0, 0.25, 1]
    data = load(tmp_path, low=1, high=5, lower_is_better=True)
    assert [data.read(i)["score"] for i in range(3)] == [1, 0.75, 0]
    assert data.read(0)["image"].size == (40, 30) and "scene" not in data.read(0)


def test_scores_of_a_csv_with_scenes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "mine.csv").write_text("image,score,scene,group\na.png,0.5,texture,\n")
    sample = load(tmp_path / "mine.csv").read(0)
    assert (sample["score"], sample["scene"]) == (0.5, "texture") and "group" not in sample


def test_rows_that_cannot_be_used(tmp_path):
    scores = (0.5, 7, "much", None, True, float("nan"))
    data = rated(tmp_path, [{"image": f"{number}.png", "score": score} for number, score in enumerate(scores)])
    assert [sample["score"] for _, sample in data.readable(range(6))] == [0.5]
    assert data.broken["1.png"] == "its score is 7, not between low=0 and high=1"
    assert data.broken["2.png"] == "its score is 'much'" and len(data.broken) == 5
    (tmp_path / "scores.jsonl").write_text('{"image": "0.png", "score": 1}\n{"image": "1.png"}')
    data = load(tmp_path)
    assert len(data.readable(range(2))) == 1 and list(data.broken.values()) == ["its score is None"]
    with pytest.raises(BadInput, match=r"row 1 of .* has no 'score'\n  did you mean: scores"):
        rated(tmp_path, [{"image": "a.png", "scores": 1}])


def test_a_photograph_stays_on_one_side(tmp_path):
    rows = [{"image": f"{n}.png", "score": 0.5, "photo": f"photo {n % 8}"} for n in range(24)]
    rated(tmp_path, rows)
    sides = [
        {load(tmp_path, split, 0.25).read(i)["photo"] for i in range(n)} for split, n in (("train", 18), ("eval", 6))
    ]
    assert not sides[0] & sides[1] and len(sides[1]) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"low": 5, "high": 1}, "low is the smaller one"),
        ({"lower_is_better": 1}, "true or false"),
        ({"high": "5"}, "high is a finite"),
    ],
)
def test_wrong_options(tmp_path, options, told):
    with pytest.raises(BadOverride, match=told):
        rated(tmp_path, [{"image": "a.png", "score": 1}], **options)
