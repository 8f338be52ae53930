"""Distorted photographs: folds, labels, what is kept on the disk, and batches."""

from __future__ import annotations

import io
import re
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest
from scipy.stats import spearmanr

import train
from mmoe.errors import BadInput, BadOverride
from train.data import build
from train.data.base import data_sets
from train.data.distorted_photos import (
    CONTENT,
    View,
    _kept,
    cells_of,
    metrics,
    on_scale,
    opinions,
    severity,
    standings,
)
from train.data.distortions import GROUPS
from train.data.photos import SCENES, open_photo, photos
from train.sections import DataSection
from zoo.cache import home
from zoo.gamma.config import GammaConfig
from zoo.gamma.model import Gamma
from zoo.packages import find_local

SIZE = 32
UNCHANGED = [("gaussian_blur", 1), ("motion_blur", 1), ("color_saturation_lab", 1)]
UNCHANGED += [("mean_shift", 3), ("contrast_change", 3)]


def load(split="train", limit=None, **options):
    options = {"packaged": True, "size": SIZE} | options
    return build(DataSection(name="distorted_photos", limit=limit, options=options), split)


@pytest.fixture(autouse=True)
def packaged():
    """Skips where the pictures of Python packages are not installed."""
    if any(find_local(photo.file) is None for photo in photos(only_packaged=True)):
        pytest.skip("scikit-image and scikit-learn are not installed in the releases of the list: make install")


def photographs(data):
    return Counter(view.photo.id for view, _ in data.samples_of)


class Seen:
    """Takes the samples of a batch as they are."""

    def training_batch(self, samples):
        return samples


def test_pictures_of_a_batch_are_turned_by_their_seed():
    plain, data = load(), load(rotate=True)
    found = [data.batch([5], Seen(), [seed])[0] for seed in range(20)]
    turned = [np.rot90(plain.read(5)["image"], k).tobytes() for k in range(4)]
    places = [turned.index(sample["image"].tobytes()) for sample in found]
    assert set(places) == set(range(4)), "each turn comes up"
    again = [turned.index(data.batch([5], Seen(), [seed])[0]["image"].tobytes()) for seed in range(20)]
    assert again == places
    assert plain.batch([5], Seen(), [1])[0]["image"].tobytes() == turned[0] == data.read(5)["image"].tobytes()


def test_quarters_are_of_the_same_photographs():
    plain, data, held = load(), load(quarters=True), load("eval", quarters=True)
    assert len(data) == 5 * len(plain) and len(held) == len(load("eval")), "only training has quarters"
    assert set(photographs(data)) == set(photographs(plain))
    assert len({data.name(index) for index in range(len(data))}) == len(data)
    photo = plain.samples_of[0][0].photo
    quarters = [data.read(index) for index, (view, cell) in enumerate(data.samples_of) if not cell.row][1:5]
    assert {sample["photo"] for sample in quarters} == {photo.id}
    whole = np.zeros((2 * SIZE, 2 * SIZE, 3), np.uint8)
    for number, sample in enumerate(quarters):
        row, column = SIZE * (number // 2), SIZE * (number % 2)
        whole[row : row + SIZE, column : column + SIZE] = sample["image"]
    assert np.array_equal(whole, open_photo(photo, 2 * SIZE, ""))


def test_captions_tell_kind_and_severity():
    samples = [load().read(index) for index in range(126)]
    assert len({sample["text"] for sample in samples}) == len({(s["kind"], s["level"]) for s in samples})
    worst = next(sample for sample in samples if (sample["kind"], sample["level"]) == ("mean_shift", 5))
    assert worst["text"] == "extreme mean shift" and samples[0]["text"] == "pristine"


def test_no_photograph_is_on_both_sides():
    found = []
    for fold in range(5):
        train, test = (photographs(load(split, fold=fold)) for split in ("train", "eval"))
        assert not set(train) & set(test) and len({**train, **test}) == len(photos(True))
        found += test
    assert sorted(found) == sorted(photo.id for photo in photos(True)), "each is evaluated on once"


def test_every_fold_has_its_share_of_every_scene():
    from train.data.distorted_photos import FOLDS, places

    for scene in SCENES:
        counts = Counter(places()[photo.id] % FOLDS for photo in photos() if photo.scene == scene)
        assert len(counts) == FOLDS and max(counts.values()) - min(counts.values()) <= 2


def test_samples():
    data = load("eval")
    samples = [data.read(i) for i in range(len(data))]
    assert all(name in sample for sample in samples for name in data.fields)
    assert all(sample["image"].size == (SIZE, SIZE) and 0 <= sample["score"] <= 1 for sample in samples)
    assert {sample["group"] for sample in samples} == {*GROUPS, "pristine"}
    grey = {photo.id for photo in photos() if not photo.colour}
    counts = photographs(data)
    assert {counts[photo] for photo in counts if photo in grey} <= {111} and set(counts.values()) <= {126, 111}
    assert data.name(0).endswith("pristine 0") and samples[0]["score"] == samples[0]["human"] == 1
    assert any("pseudo-labels" in note for note in data.notes)


def test_labels_by_people_and_by_content():
    plain, whole = load("eval", content=False), load("eval")
    for index in range(1, len(plain), 17):
        sample = plain.read(index)
        assert sample["score"] == opinions()[sample["kind"], sample["level"]]
        moved = CONTENT * standings()[sample["photo"], sample["kind"], sample["level"]]
        assert whole.read(index)["score"] == pytest.approx(min(1, max(0, sample["score"] + moved)))
    assert opinions()["gaussian_blur", 5] == pytest.approx((1.303 - 1) / 4)
    assert len(opinions()) == 126


def test_what_metrics_alone_say():
    ranks = metrics()
    assert set(ranks) == set(standings())
    assert min(ranks.values()) > 0 and max(ranks.values()) <= 1
    assert np.mean(list(ranks.values())) == pytest.approx(0.5, abs=1e-3), "mean ranks of all"
    data = load("eval")
    for index in (0, 5, 40):
        sample = data.read(index)
        assert sample["metrics"] == ranks.get((sample["photo"], sample["kind"], sample["level"]), 1.0)
    for cell in {(kind, level) for _, kind, level in ranks if kind == "lens_blur"}:
        photos_of = [photo for photo, *one in ranks if tuple(one) == cell]
        pairs = [(ranks[photo, *cell], standings()[photo, *cell]) for photo in photos_of]
        assert spearmanr(*zip(*pairs, strict=True)).statistic > 0.8, "the same metrics rank pictures of one cell"


def test_content_moves_pictures_against_each_other_only():
    given = {(photo.id, cell.kind, cell.level) for photo in photos() for cell in cells_of(photo) if cell.level}
    assert given == set(standings())
    cells = defaultdict(list)
    for (_, kind, level), value in standings().items():
        cells[kind, level].append(value)
    same = {cell for cell, values in cells.items() if not any(values)}
    assert same == {*UNCHANGED}, "what leaves every picture as it is cannot be ranked"
    for cell in cells.keys() - same:
        assert np.mean(cells[cell]) == pytest.approx(0, abs=1e-3) and np.std(cells[cell]) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(("kind", "level"), UNCHANGED)
def test_cells_that_leave_pictures_as_they_are(kind, level):
    photo = next(view.photo for view, _ in load("eval").samples_of if view.photo.colour)
    pictures = np.load(_kept(View(photo), SIZE))
    (row,) = [cell.row for cell in cells_of(photo) if (cell.kind, cell.level) == (kind, level)]
    assert np.abs(pictures[row].astype(int) - pictures[0]).max() <= 1


def test_levels_with_two_sides_are_ordered_by_opinion():
    assert [severity("jpeg", level) for level in range(1, 6)] == [1, 2, 3, 4, 5]
    for kind in ("mean_shift", "contrast_change"):
        ordered = sorted(range(1, 6), key=lambda level: severity(kind, level))
        liked = [opinions()[kind, level] for level in ordered]
        assert liked == sorted(liked, reverse=True) and ordered[0] == 3


def test_pictures_are_made_once_and_whole(monkeypatch):
    data = load("eval")
    folder = home() / "distorted_photos"
    kept = [_kept(view, SIZE) for view in {view for view, _ in data.samples_of}]
    before = data.read(5)["image"]
    kept[0].unlink()
    times = {path: path.stat().st_mtime_ns for path in kept[1:]}
    assert load("eval").read(5)["image"] == before
    assert kept[0].is_file() and {path: path.stat().st_mtime_ns for path in kept[1:]} == times
    monkeypatch.setattr("train.data.distorted_photos.np.save", lambda file, pictures: file.write(b"half") / 0)
    kept[0].unlink()
    with pytest.raises(ZeroDivisionError):
        load("eval")
    assert not kept[0].exists() and not list(folder.rglob(f"*{kept[0].stem}*")), "nothing half is left"
    monkeypatch.undo()
    assert load("eval").read(5)["image"] == before


def saved(pictures):
    file = io.BytesIO()
    np.save(file, pictures)
    return file.getvalue()


DAMAGES = {
    "empty": lambda whole: b"",
    "half a header": lambda whole: whole[:100],
    "cut": lambda whole: whole[:5000],
    "no header": lambda whole: whole[:10] + bytes(40) + whole[50:],
    "another file": lambda whole: b"PK\x03\x04" + whole[4:],
    "another shape": lambda whole: saved(np.zeros(len(np.load(io.BytesIO(whole))), np.uint8)),
    "a number": lambda whole: saved(np.uint8(3)),
    "another type": lambda whole: whole.replace(b"|u1", b"|i1"),
    "a negative side": lambda whole: whole.replace(b"32, 3)", b"32,-3)"),
    "no type": lambda whole: whole.replace(b"'|u1'", b"()   "),
    "half a type": lambda whole: whole.replace(b"'|u1'", b"',u1'"),
    "another order": lambda whole: whole.replace(b"False", b"True "),
    "too long": lambda whole: whole + b"more",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_again(damage):
    data = load("eval")
    file = _kept(data.samples_of[0][0], SIZE)
    whole = file.read_bytes()
    file.unlink()  # what is mapped into memory stays whole
    file.write_bytes(DAMAGES[damage](whole))
    assert file.read_bytes() != whole
    load("eval")
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_to_is_told():
    data = load("eval")
    file, lock = _kept(data.samples_of[0][0], SIZE), _kept(data.samples_of[0][0], SIZE).parent / ".lock"
    whole = file.read_bytes()
    file.unlink()
    wrong = {file: f"cannot write '{file}': it is a folder", lock: "Is a directory"}
    for path, told in wrong.items():
        path.unlink(missing_ok=True)
        path.mkdir()
        with pytest.raises(BadInput, match=re.escape(told)) as error:
            load("eval")
        assert f"keep distorted pictures in '{file.parent}'" in str(error.value)
        assert error.value.fix == "free space, or MMOE_HOME=FOLDER before the command"
        path.rmdir()
    load("eval")
    assert file.read_bytes() == whole


def test_pictures_of_another_version_are_told():
    load("eval")
    mine, other = (home() / "distorted_photos" / name for name in ("my-own", f"{SIZE}-00000000"))
    mine.mkdir()
    assert not any("are not used" in note for note in load("eval").notes)
    other.mkdir()
    try:
        assert load("eval").notes[-1].endswith(f"are not used by this one: rm -r {other}")
    finally:
        other.rmdir()
        mine.rmdir()


def test_scales_bend_the_labels_of_a_third_each():
    data, plain = load(scales=True), load()
    sets = {}
    for index in range(0, len(data), 7):
        sample, right = data.read(index), plain.read(index)["score"]
        assert sets.setdefault(sample["photo"], sample["set"]) == sample["set"]
        assert sample["score"] == on_scale(right, sample["set"])
    assert set(sets.values()) == set("ABC")
    held, right = load("eval", scales=True), load("eval")
    assert held.read(5)["set"] in "ABC"
    assert [held.read(i)["score"] for i in range(9)] == [right.read(i)["score"] for i in range(9)]
    assert [on_scale(0, scale) for scale in "ABC"] == [0, 0, pytest.approx(0.2)]
    assert [on_scale(1, scale) for scale in "ABC"] == [1, 1, pytest.approx(0.9)]


def test_a_group_is_left_out_of_training_and_alone_tested():
    train, test = (load(split, without="noise") for split in ("train", "eval"))
    groups = [{data.read(i)["group"] for i in range(len(data))} for data in (train, test)]
    assert groups == [{*GROUPS, "pristine"} - {"noise"}, {"noise", "pristine"}]


def test_options():
    assert len(load(limit=50)) == 50 and len(photographs(load(limit=50))) > 10
    for options, told in (
        ({"fold": 5}, "fold is"),
        ({"scales": 1}, "scales is true or false"),
        ({"without": "nois"}, "did you mean: noise"),
    ):
        with pytest.raises(BadOverride, match=told):
            load(**options)


def test_what_is_missing_is_told_with_the_command_that_fetches_it(monkeypatch):
    monkeypatch.setattr("zoo.packages._places", lambda file: iter(()))
    shutil.rmtree(home() / "distorted_photos", ignore_errors=True)
    with pytest.raises(BadInput, match="mmoe recipe fetch distorted_photos"):
        load("eval")
    assert len(data_sets.get("distorted_photos").files({})) == len(photos())
    assert len(data_sets.get("distorted_photos").files({"packaged": True})) == 18


def test_options_of_an_evaluation():
    sizes = {"image_size": 16, "patch_size": 8, "vision_width": 64, "text_width": 64, "vocab_size": 600}
    model = Gamma(GammaConfig(**sizes, vision_layers=1, text_layers=1, first_layer=0, prompts="naive", crops="centre"))
    options = {"packaged": True, "size": SIZE, "without": "noise"}
    found = train.measure(model, on="distorted_photos", options=options, limit=60)
    assert {name.partition("/")[0] for name in found["metrics"] if "/" in name} & set(GROUPS) == {"noise"}
    command = (
        "mmoe eval Gamma --on distorted_photos --option packaged=true --option size=32 --option 'without=\"noise\"'"
    )
    assert found["provenance"]["command"] == f"{command} --limit 60"


def test_a_fold_that_bundled_weights_were_trained_on_is_told():
    found = [
        train.measure(
            "gamma_tiny", on="distorted_photos", limit=6, options={"packaged": True, "size": 64, "fold": fold}
        )
        for fold in (0, 1)
    ]
    assert [one["trained_on"] for one in found] == [0, 6]
