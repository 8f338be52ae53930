"""Data of one's own: formats, splits, and files that are broken."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from scipy.io import wavfile

import zoo
from mmoe.errors import BadInput, BadOverride, MissingExtra, UnknownName
from train.data import build
from train.data.base import DataSet, Sample, data_sets
from train.data.loader import Steps, seed_of
from train.sections import DataSection
from zoo.sounds import ENDINGS


def image(path, colour=(200, 30, 30), size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def pairs(folder, count=10):
    for number in range(count):
        image(folder / f"{number}.png", (20 * number, 0, 0)).with_suffix(".txt").write_text(f"number {number}\n")
    return folder


def load(name, path, split="train", **options):
    return build(DataSection(name=name, path=path, **options), split)


def test_pictures_with_captions_beside_them(tmp_path):
    pairs(tmp_path)
    image(tmp_path / "alone.png")
    image(tmp_path / ".hidden" / "0.png").with_suffix(".txt").write_text("no")
    data = load("pairs", tmp_path, held_out=0.0)
    assert len(data) == 10
    sample = data.read(3)
    assert sample["image"].size == (20, 16) and sample["text"] == "number 3"


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json"])
def test_a_table_of_pictures_and_captions(tmp_path, ending):
    image(tmp_path / "pictures" / "a.png")
    image(tmp_path / "b.png")
    rows = [{"image": "pictures/a.png", "text": "an a, and more"}, {"image": str(tmp_path / "b.png"), "text": "b"}]
    table = tmp_path / f"captions.{ending}"
    if ending.endswith("sv"):
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["image", "text"], delimiter="\t" if ending == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        table.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)))
    for path in (tmp_path, table):
        data = load("pairs", path, held_out=0.0)
        assert sorted(data.read(i)["text"] for i in range(len(data))) == ["an a, and more", "b"]


@pytest.mark.parametrize(
    ("text", "told"),
    {
        "image,txet\na.png,b\n": "row 1 of .* has no 'text'\n  did you mean: txet",
        "": "it holds nothing|wanted",
    }.items(),
)
def test_tables_with_mistakes(tmp_path, text, told):
    (tmp_path / "captions.csv").write_text(text)
    with pytest.raises(BadInput, match=told):
        load("pairs", tmp_path)


def test_splits_have_nothing_in_common_and_stay(tmp_path):
    pairs(tmp_path, 20)
    train, test = (load("pairs", tmp_path, split, held_out=0.25) for split in ("train", "eval"))
    names = [{data.name(i) for i in range(len(data))} for data in (train, test)]
    assert (len(names[0]), len(names[1])) == (15, 5) and not names[0] & names[1]
    again = load("pairs", tmp_path, "eval", held_out=0.25)
    assert [again.name(i) for i in range(5)] == [test.name(i) for i in range(5)]
    assert len(load("pairs", tmp_path, held_out=0.25, limit=4)) == 4


def test_pictures_by_class(tmp_path):
    for name in ("red_fox", "cat"):
        for number in range(2):
            image(tmp_path / name / f"{number}.jpg")
    (tmp_path / "empty").mkdir()
    data = load("classes", tmp_path, held_out=0.0)
    assert data.classes == ["cat", "red_fox"]
    assert {(data.read(i)["label"], data.read(i)["text"]) for i in range(len(data))} == {(0, "cat"), (1, "red fox")}


@pytest.mark.parametrize("kind", [np.int16, np.uint8, np.float32])
def test_speech_is_one_channel_at_16_khz(tmp_path, kind):
    wave = np.sin(np.arange(8000) / 8000 * 2 * np.pi * 100)
    values = {np.int16: wave * 32767, np.uint8: wave * 127 + 128, np.float32: wave}[kind].astype(kind)
    wavfile.write(tmp_path / "a.wav", 8000, np.stack([values, values], 1))
    (tmp_path / "a.txt").write_text("hello")
    sample = load("speech", tmp_path, held_out=0.0).read(0)
    assert sample["audio"].shape == (16000,) and sample["audio"].dtype == np.float32
    assert np.abs(sample["audio"][100:-100]).max() == pytest.approx(1.0, abs=0.03)


def test_speech_of_every_format(tmp_path):
    for number, ending in enumerate(ENDINGS):
        more = {"format": "OGG"} if ending in (".oga", ".opus") else {}
        soundfile.write(tmp_path / f"{number}{ending}", np.zeros(8000), 8000, **more)
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    data = load("speech", tmp_path, held_out=0.0)
    samples = [data.read(i) for i in range(len(data))]
    assert [one["text"] for one in samples] == [f"text {number}" for number in range(len(ENDINGS))]
    assert all(len(one["audio"]) == pytest.approx(16000, abs=3000) for one in samples)


def test_conversations(tmp_path):
    image(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Red."}]
    rows = [{"image": "a.png", "conversations": turns}, {"conversations": turns}]
    table = tmp_path / "talk.json"
    table.write_text(json.dumps(rows))
    data = load("conversations", table, held_out=0.0)
    assert data.read(0)["turns"] == ("<image>\nWhat is it?", "Red.") and data.read(0)["image"].size == (20, 16)
    assert "image" not in data.read(1)
    table.write_text(json.dumps([{"conversations": turns[::-1]}]))
    with pytest.raises(BadInput, match="its turns are not of human and gpt"):
        load("conversations", table, held_out=0.0).read(0)


def test_segmentation(tmp_path):
    image(tmp_path / "images" / "a.jpg")
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.full((16, 20), 3, np.uint8)).save(tmp_path / "masks" / "a.png")
    sample = load("segmentation", tmp_path, held_out=0.0).read(0)
    assert sample["mask"].shape == (16, 20) and sample["mask"].max() == 3
    image(tmp_path / "masks" / "a.png")
    with pytest.raises(BadInput, match="its mode is RGB"):
        load("segmentation", tmp_path, held_out=0.0).read(0)
    Image.fromarray(np.zeros((8, 20), np.uint8)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(BadInput, match=r"a\.jpg\n  its mask has 20 x 8 pixels, the picture 20 x 16"):
        load("segmentation", tmp_path, held_out=0.0).read(0)


def test_masks_lie_as_their_pictures_do(tmp_path):
    for number, place in enumerate(("a/1", "b/1", "b/2")):
        image(tmp_path / "images" / f"{place}.jpg")
        if place != "b/2":
            (tmp_path / "masks" / place).parent.mkdir(parents=True)
            Image.fromarray(np.full((16, 20), number, np.uint8)).save(tmp_path / "masks" / f"{place}.png")
    data = load("segmentation", tmp_path, held_out=0.0)
    found = {data.name(index): data.read(index)["mask"].max() for index in range(len(data))}
    assert found == {"images/a/1.jpg": 0, "images/b/1.jpg": 1}, "not the mask of another picture of that name"
    assert data.notes == ["left out, as they have no mask: images/b/2.jpg"]


def test_broken_files_are_left_out_and_named(tmp_path):
    pairs(tmp_path)
    (tmp_path / "3.png").write_bytes(b"no picture")
    data = load("pairs", tmp_path, held_out=0.0, max_broken=1)
    texts = [sample["text"] for sample in data.samples(range(10))]
    assert len(texts) == 10 and "number 3" not in texts
    assert [name.endswith("3.png") for name in data.broken] == [True]
    (tmp_path / "4.png").write_bytes(b"")
    with pytest.raises(BadInput, match=r"2 samples cannot be read\n.*3.png: .*\n.*4.png: ") as error:
        data.samples(range(10))
    assert "data.max_broken=4" in str(error.value)


def test_broken_files_are_left_out_of_an_evaluation(tmp_path):
    pairs(tmp_path)
    (tmp_path / "3.png").write_bytes(b"no picture")
    data = load("pairs", tmp_path, "eval", held_out=1.0, max_broken=1)
    assert len(data) == 10 and len(data.readable(range(10))) == 9


def test_nothing_but_broken_files(tmp_path):
    for number in range(3):
        image(tmp_path / f"{number}.png").with_suffix(".txt").write_text("a")
        (tmp_path / f"{number}.png").write_bytes(b"no")
    with pytest.raises(BadInput, match="3 samples cannot be read"):
        load("pairs", tmp_path, held_out=0.0).samples([0])


@pytest.mark.parametrize("name", ["pairs", "classes", "speech", "conversations", "segmentation", "quality"])
def test_an_empty_folder_says_what_is_wanted(tmp_path, name):
    with pytest.raises(BadInput, match=f"no data in '{tmp_path}'\n  wanted: "):
        load(name, tmp_path)
    with pytest.raises(BadInput, match="there is no such file or folder"):
        load(name, tmp_path / "none")
    with pytest.raises(BadInput, match="without a path"):
        load(name, None)


def test_every_data_set_says_how_its_files_lie():
    for name in data_sets.names():
        kind = data_sets.get(name)
        assert kind.__doc__ and kind.fields and kind.task, name


def test_wrong_names_and_options(tmp_path):
    with pytest.raises(UnknownName, match="did you mean: pairs"):
        load("pair", tmp_path)
    with pytest.raises(BadOverride, match=r"did you mean: strength"):
        load("emoji", None, options={"strenght": 1})
    with pytest.raises(BadInput, match="its files are its own"):
        load("emoji", tmp_path)


def test_hub_data_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtra, match="datasets"):
        load("hub", tmp_path)


def test_batches_are_the_same_from_any_start(tmp_path):
    model = zoo.load("clip_moe_tiny", device="cpu")
    data = load("pairs", pairs(tmp_path, 10), held_out=0.0)
    steps = Steps(data, model, 4, (0, "stage"))
    order = [steps.indices(step) for step in range(6)]
    assert [steps.indices(step) for step in (5, 0, 3)] == [order[5], order[0], order[3]]
    assert len({i for batch in order[:2] for i in batch}) == 8, "a pass repeats nothing"
    (batch,), broken = steps[0]
    assert batch["image"].shape == (4, 3, 64, 64) and not broken


def test_processes_and_parts_share_a_batch(tmp_path):
    model = zoo.load("clip_moe_tiny", device="cpu")
    data = load("pairs", pairs(tmp_path, 10), held_out=0.0)
    whole = Steps(data, model, 8, (0, "stage"))[0][0][0]["image"]
    shares = [Steps(data, model, 8, (0, "stage"), rank, 2, 2)[0][0] for rank in range(2)]
    joined = [shares[rank][part]["image"] for part in range(2) for rank in range(2)]
    assert all((a == b).all() for a, b in zip(whole.split(2), joined, strict=True))
    with pytest.raises(BadInput, match=r"data.batch_size=8"):
        Steps(data, model, 7, (0, "stage"), 0, 2, 2)


def test_too_few_samples_for_a_batch(tmp_path):
    with pytest.raises(BadInput, match=r"there are 3 samples\n  try: data.batch_size=3"):
        load("pairs", pairs(tmp_path, 3), held_out=0.0).epoch(4, 0)
    with pytest.raises(BadInput, match=r"there are 0 samples\n  try: data.held_out=0.1"):
        load("pairs", tmp_path, held_out=1.0).epoch(4, 0)


def test_a_batch_that_is_too_small_to_share(tmp_path, monkeypatch):
    model = zoo.load("clip_moe_tiny", device="cpu")
    data = load("pairs", pairs(tmp_path, 10), held_out=0.0)
    monkeypatch.setattr(data, "epoch", lambda size, seed, shares: [[0, 1]])
    with pytest.raises(BadInput, match=r"step 0 has 2 samples\n  try: data.batch_size=8"):
        Steps(data, model, 4, (0, "stage"), 0, 2, 2)[0]


def test_workers_prepare_the_same_batches(tmp_path):
    model = zoo.load("clip_moe_tiny", device="cpu")
    data = load("pairs", pairs(tmp_path, 10), held_out=0.0)
    steps = Steps(data, model, 4, (seed_of(1), "stage"))
    for alone, ahead in zip(steps.from_step(1, 4), steps.from_step(1, 4, workers=1), strict=True):
        assert (alone[0][0]["image"] == ahead[0][0]["image"]).all()


class Everything(DataSet):
    """What each family trains on, and more."""

    fields, task = ("image", "text", "mask", "score", "audio"), "naming"

    def __len__(self) -> int:
        return 2

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> Sample:
        image, audio = np.zeros((64, 64, 3), np.uint8), np.zeros(16_000, np.float32)
        return {"image": image, "text": "a fox", "mask": image[..., 0], "score": 0.5, "audio": audio}


@pytest.mark.parametrize("name", [card.name for card in zoo.list_models("*_tiny")])
def test_workers_leave_the_device_to_the_main_process(name):
    model = zoo.load(name, device="meta")
    steps = Steps(Everything(), model, 2, (seed_of(1), "stage"))
    [(parts, _)] = steps.from_step(0, 1, workers=1)
    tensors = {key: value for key, value in parts[0].items() if isinstance(value, torch.Tensor)}
    assert tensors and {value.device.type for value in tensors.values()} == {"cpu"}
    assert model.input_device.type == "meta", "outside of a worker"


def test_data_of_the_hub_from_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"picture": [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(5)], "caption": [str(n) for n in range(5)]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "rows")
    data = load("hub", tmp_path / "rows", held_out=0.2, options={"image": "picture", "text": "caption"})
    sample = data.read(0)
    assert len(data) == 4 and sample["image"].getpixel((0, 0)) == (int(sample["text"]), 0, 0)
    with pytest.raises(BadInput, match="no column 'image'"):
        load("hub", tmp_path / "rows")
    with pytest.raises(BadInput, match="cannot read"):
        load("hub", tmp_path)


def test_the_split_goes_by_names_inside_the_folder(tmp_path, monkeypatch):
    pairs(tmp_path / "a", 20)
    shutil.copytree(tmp_path / "a", tmp_path / "else" / "b")
    monkeypatch.chdir(tmp_path)
    found = [load("pairs", Path(path), "eval", held_out=0.25) for path in ("a", tmp_path / "a", "else/b")]
    names = [[data.name(i) for i in range(len(data))] for data in found]
    assert names[0] == names[1] == names[2] and len(names[0]) == 5
    assert found[0].fingerprint() == found[2].fingerprint()
    (tmp_path / "a" / names[0][0]).unlink()
    assert load("pairs", Path("a"), "eval", held_out=0.25).fingerprint() != found[0].fingerprint()


def test_samples_of_one_picture_are_on_one_side(tmp_path):
    rows = [{"image": f"{number % 10}.png", "text": f"text {number}"} for number in range(40)]
    for number in range(10):
        image(tmp_path / f"{number}.png")
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    sides = [load("pairs", tmp_path, split, held_out=0.3) for split in ("train", "eval")]
    names = [{data.name(i) for i in range(len(data))} for data in sides]
    assert not names[0] & names[1] and [len(data) for data in sides] == [28, 12]
    talks = [{"image": row["image"], "conversations": [TURN, {"from": "gpt", "value": "x"}]} for row in rows]
    (tmp_path / "talk.json").write_text(json.dumps(talks))
    sides = [load("conversations", tmp_path / "talk.json", split, held_out=0.3) for split in ("train", "eval")]
    files = [{record["image"] for record in data.records} for data in sides]
    assert not files[0] & files[1]


TURN = {"from": "human", "value": "What is it?"}


def test_texts_that_cannot_be_read_are_counted(tmp_path):
    pairs(tmp_path, 6)
    (tmp_path / "1.txt").write_bytes("Grün".encode("latin-1"))
    (tmp_path / "2.txt").write_text(" \n")
    (tmp_path / "3.txt").write_bytes("\ufeffwith a mark".encode())
    image(tmp_path / "alone.png")
    (tmp_path / "5.txt").rename(tmp_path / "5.TXT")
    data = load("pairs", tmp_path, held_out=0.0, max_broken=2)
    texts = [sample["text"] for _, sample in data.readable(range(len(data)))]
    assert texts == ["number 0", "with a mark", "number 4", "number 5"]
    assert data.broken == {"1.png": "1.txt is no UTF-8", "2.png": "2.txt is empty"}
    assert data.notes == ["left out, as they have no caption: alone.png"]
    with pytest.raises(BadInput, match=r"2 samples cannot be read\n.*1\.png: 1\.txt is no UTF-8"):
        load("pairs", tmp_path, held_out=0.0, max_broken=1).readable(range(6))


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    for number in range(5):
        image(tmp_path / f"{number}.png")
    rows = [{"image": f"{number}.png", "text": f"text {number}"} for number in range(5)]
    rows[1]["text"], rows[2]["text"], rows[3] = "", 7, "odd"
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load("pairs", tmp_path, held_out=0.0)
    assert [sample["text"] for _, sample in data.readable(range(5))] == ["text 0", "text 4"]
    assert set(data.broken) == {f"captions.jsonl row {number}" for number in (2, 3, 4)}
    good = [TURN, {"from": "gpt", "value": "x"}]
    odd = [[], 3, None, [TURN], [TURN, {"from": "gpt", "value": None}], [{"from": "system", "value": "x"}, *good]]
    rows = [*({"conversations": turns} for turns in [good, *odd]), {"id": 8}]
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    data = load("conversations", tmp_path / "talk.json", held_out=0.0)
    assert len(data.readable(range(len(data)))) == 1 and len(data.broken) == 7


def test_captions_keep_their_lines_and_odd_signs(tmp_path):
    for name in "abc":
        image(tmp_path / f"{name}.png")
    texts = ["one\ntwo", "a\u2028b\x0cc", "plain"]
    with (tmp_path / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["image", "text"], *([f"{name}.png", text] for name, text in zip("abc", texts, strict=True))])
    data = load("pairs", tmp_path, held_out=0.0)
    assert [data.read(i)["text"] for i in range(3)] == texts
    (tmp_path / "captions.csv").write_text("image;text\na.png;one\n")
    assert load("pairs", tmp_path, held_out=0.0).read(0)["text"] == "one"
    (tmp_path / "captions.csv").unlink()
    rows = [{"image": f"{name}.png", "text": text} for name, text in zip("abc", texts, strict=True)]
    (tmp_path / "captions.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    data = load("pairs", tmp_path, held_out=0.0)
    assert [data.read(i)["text"] for i in range(3)] == texts


@pytest.mark.parametrize("length", [0, 4, 20, 40, 44])
def test_sound_that_ends_early(tmp_path, length):
    wavfile.write(tmp_path / "a.wav", 8000, np.ones(100, dtype=np.int16))
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:length])
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(BadInput, match=r"a\.wav"):
        load("speech", tmp_path, held_out=0.0).read(0)


def test_workers_tell_what_is_broken_as_the_main_process_does(tmp_path):
    pairs(tmp_path, 8)
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"")
    model, told = zoo.load("clip_moe_tiny", weights=False), []
    for workers in (0, 2):
        steps = Steps(load("pairs", tmp_path, held_out=0.0, max_broken=1), model, 4, (0, "x"))
        with pytest.raises(BadInput, match="samples cannot be read") as error:
            list(steps.from_step(0, 4, workers))
        told.append(error.value.fix)
    assert told[0] == told[1]


def test_one_picture_with_two_spellings_is_one(tmp_path, monkeypatch):
    for number in range(10):
        image(tmp_path / "photos" / f"{number}.png")
    names = [*(f"{number}.png" for number in range(10)), *(f"../photos/{number}.png" for number in range(10))]
    names += [str(tmp_path / "photos" / f"{number}.png") for number in range(10)]
    rows = [{"image": name, "text": "a text", "wrong": "a column of mine"} for name in names]
    (tmp_path / "photos" / "captions.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    sides = [load("pairs", Path("photos"), split, held_out=0.3) for split in ("train", "eval")]
    names = [{data.name(i) for i in range(len(data))} for data in sides]
    assert not names[0] & names[1] and [len(data) for data in sides] == [21, 9]
    assert sides[0].read(0)["text"] == "a text"


@pytest.mark.parametrize("place", range(0, 44, 2))
def test_damaged_heads_of_sound_files_are_told(tmp_path, place):
    wavfile.write(tmp_path / "a.wav", 8000, np.ones(100, dtype=np.int16))
    (tmp_path / "a.txt").write_text("hello")
    whole = bytearray((tmp_path / "a.wav").read_bytes())
    for value in (0, 255):
        whole[place] = value
        (tmp_path / "a.wav").write_bytes(whole)
        try:
            found = load("speech", tmp_path, held_out=0.0).read(0)["audio"]
        except BadInput:
            continue
        assert np.isfinite(found).all()
