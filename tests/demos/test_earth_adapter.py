"""Earth-Adapter's page of the gallery with small random models: masks, legend, frequencies, routing, ablation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image

import mmoe
import zoo
from demos import earth_adapter
from demos.store import ModelStore, quiet
from mmoe.errors import BadInput
from mmoe.frequency_maps import frequency_maps
from mmoe.moe import moe_layers
from tests.demos.conftest import MadeStore, Visit, served
from zoo.earth_adapter.config import EarthAdapterConfig
from zoo.earth_adapter.model import EarthAdapter
from zoo.earth_adapter.result import class_colors
from zoo.images import read_image

MODEL = "earth_adapter_dinov2_l"
CLASSES = ("water", "tropical", "arid", "temperate", "cold", "polar")
SIZES: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 4, "heads": 4, "classes": CLASSES}
SIZES |= {"adapter_dim": 4, "fft_layers": (1, 3), "cutoff": 1.0, "layer_scale": 1.0, "head": "light", "head_width": 8}


def build(**options: Any) -> EarthAdapter:
    """A small model with random weights whose classes differ from place to place."""
    torch.manual_seed(3)
    model = EarthAdapter(EarthAdapterConfig(**{**SIZES, **options})).eval()
    with torch.no_grad():
        for layer in moe_layers(model).values():
            layer.experts.down_proj.mul_(20)
    return model


@pytest.fixture(scope="module")
def model() -> EarthAdapter:
    return build()


@pytest.fixture(scope="module")
def server(model: EarthAdapter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    store = MadeStore({MODEL: lambda: model})
    with served(store, tmp_path_factory.getbasetemp() / "gradio", MODEL) as running:
        yield running


@pytest.fixture
def page(server: SimpleNamespace) -> earth_adapter.Page:
    return earth_adapter.Page(zoo.list_models(family="earth_adapter"), server.store)


@pytest.fixture
def tile(tmp_path: Path) -> Path:
    """A picture of another shape than a window: four quarters of noise in a colour each."""
    draw = np.random.default_rng(0)
    colours = np.array([[[30, 60, 120], [200, 180, 120]], [[20, 90, 30], [240, 240, 250]]]).repeat(36, 0).repeat(50, 1)
    path = tmp_path / "tile.png"
    Image.fromarray((colours + draw.integers(-15, 15, colours.shape)).clip(0, 255).astype(np.uint8)).save(path)
    return path


def test_masks_equal_the_python_api(client: Client, model: EarthAdapter, tile: Path) -> None:
    want = model.predict(tile)
    error, shown, legend, path, numbers = client.predict(
        MODEL, handle_file(tile), 0.5, api_name="/earth_adapter_predict"
    )
    assert error == "" and numbers["shares"] == pytest.approx(want.shares())
    assert numbers["confidence"] == pytest.approx(want.as_dict()["confidence"], abs=1e-6)
    with Image.open(path) as mask:
        assert np.array_equal(np.asarray(mask), want.mask.numpy()) and mask.mode == "P", "class numbers in the file"
        assert np.array_equal(np.asarray(mask.convert("RGB")), np.asarray(want.picture().convert("RGB")))
    with Image.open(shown) as drawn:
        assert drawn.size == (640, 461)
    assert "Segmented at 100 x 72 pixels" in legend
    for name, color in zip(CLASSES, class_colors(len(CLASSES)), strict=True):
        share = f"{100 * want.shares()[name]:.1f}&nbsp;%"
        row = next(row for row in legend.split("<tr>") if f"</span>{name}<" in row)
        assert color in row and share in row, "every class, seen or not"
    order = sorted(CLASSES, key=lambda name: legend.index(f"</span>{name}<"))
    assert [want.shares()[name] for name in order] == sorted(want.shares().values(), reverse=True)


def test_transparency_is_laid_as_the_model_lays_it(client: Client, model: EarthAdapter, tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    half = Image.new("RGBA", (32, 32), (200, 180, 120, 255))
    half.paste((0, 0, 0, 0), (0, 0, 16, 32))
    half.save(path)
    want, white = model.predict(path), model.predict(read_image(path, (255, 255, 255)))
    assert abs(want.as_dict()["confidence"] - white.as_dict()["confidence"]) > 1e-4, "the background counts"
    error, shown, _, _, numbers = client.predict(MODEL, handle_file(path), 0, api_name="/earth_adapter_predict")
    assert error == "" and numbers["confidence"] == pytest.approx(want.as_dict()["confidence"], abs=1e-6)
    with Image.open(shown) as drawn:
        assert drawn.convert("RGB").getpixel((1, 1)) == (0, 0, 0)


def test_the_opacity_is_drawn_without_a_run(
    client: Client, model: EarthAdapter, tile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.predict(MODEL, handle_file(tile), 1, api_name="/earth_adapter_predict")
    monkeypatch.setattr(ModelStore, "use", None)
    kept = earth_adapter.drawing(model.predict(tile), Image.open(tile))
    for opacity, base in ((0, "picture"), (1, "painted")):
        error, path = client.predict(opacity, api_name="/earth_adapter_opacity")
        drawn, plain = np.asarray(Image.open(path)), np.asarray(kept[base])
        same = (drawn == plain).all(-1)
        assert error == "" and 0.8 < same.mean() < 1, "all but the names of the classes"


def test_names_are_written_where_their_class_is(model: EarthAdapter, tile: Path) -> None:
    result = model.predict(tile)
    kept = earth_adapter.drawing(result, Image.open(tile))
    assert {name for name, *_ in kept["names"]} == {name for name, share in result.shares().items() if share >= 0.01}
    assert len(kept["names"]) > 1
    for name, column, row in kept["names"]:
        color = Image.new("RGB", (1, 1), class_colors(len(CLASSES))[CLASSES.index(name)]).getpixel((0, 0))
        assert kept["painted"].getpixel((column, row)) == color
    before, after = kept["painted"], earth_adapter.overlay(kept, 1.0)
    changed = np.asarray(before) != np.asarray(after)
    assert changed.any(), "the names are there without the picture, too"


def test_colours_of_the_tiny_models_classes_stay_apart_for_colour_blind_eyes() -> None:
    """Machado et al. 2009, complete lack of one kind of cone, on linear light; distances in Lab."""
    from train.data.lab import to_lab

    lacking = {
        "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    pixels = np.array([[bytes.fromhex(color[1:]) for color in class_colors(len(CLASSES))]]).view(np.uint8)
    colours = pixels.reshape(1, -1, 3) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    for kind, matrix in {"none": np.eye(3).tolist(), **lacking}.items():
        seen = (linear @ np.array(matrix).T).clip(0, 1)
        srgb = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
        lab = to_lab(srgb.astype(np.float32))[0]
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(len(lab), 1)]
        assert apart.min() > 10, kind


def test_frequencies_of_a_layer(client: Client, page: earth_adapter.Page, model: EarthAdapter, tile: Path) -> None:
    error, layers, plot = client.predict(1, MODEL, handle_file(tile), api_name="/earth_adapter_frequencies")
    assert error == "" and plot["type"] == "matplotlib"
    assert layers["choices"] == [["1 (block 1)", 1], ["2 (block 3)", 2]] and layers["value"] == 1
    error, other = client.predict(2, api_name="/earth_adapter_frequencies_layer")
    assert error == "" and other["plot"] != plot["plot"]
    found = frequency_maps(model, model, model.preprocess(tile)["image"])
    state, *_ = page.frequencies(quiet, 1, MODEL, str(tile))
    for kept, maps in zip(state["maps"], found.values(), strict=True):
        for part in ("features", "low", "high"):
            assert torch.allclose(kept.strength(part), maps.strength(part), atol=1e-5)
        assert torch.equal(kept.weights, maps.weights) and kept.features.shape == (1, 3, 4, 1)
    assert "layers are counted from 1" in client.predict("x", api_name="/earth_adapter_frequencies_layer")[0]


def test_routing_is_of_the_whole_picture(
    client: Client, page: earth_adapter.Page, model: EarthAdapter, tile: Path
) -> None:
    error, about, _, picture, *_, table = client.predict(1, MODEL, handle_file(tile), api_name="/earth_adapter_routing")
    assert error == "" and "all 3 experts" in about
    assert [row[0] for row in table["props"]["rows"]] == ["image 1", "image 2"]
    with mmoe.trace(model) as routing:
        page.observe(model, page.read(str(tile)))
    assert len(routing[0].weights) == 3 * 4, "a grid of 3 x 4 patches, though predict takes windows of 4 x 4"
    with Image.open(picture) as drawn:
        assert drawn.width == 480


def test_ablation_tells_the_shares(client: Client, model: EarthAdapter, tile: Path) -> None:
    error, switches = client.predict(MODEL, api_name="/earth_adapter_layers")
    assert error == "" and [row["name"] for row in switches["props"]["rows"]] == ["image 1", "image 2"]
    with mmoe.override(model, mmoe.switch_off([0])):
        without = model.predict(tile).shares()
    error, verdict, before, after, table = client.predict(
        json.dumps({"*": [0]}), MODEL, handle_file(tile), api_name="/earth_adapter_ablate"
    )
    assert error == "" and "2 experts switched off in 2 layers" in verdict
    whole = model.predict(tile).shares()
    assert whole != without
    for shown, want in ((before, whole), (after, without)):
        assert {one["label"]: one["confidence"] for one in shown["confidences"]}.items() <= want.items()
    for name, was, now, _ in table["props"]["rows"]:
        assert [float(was), float(now)] == pytest.approx([100 * whole[name], 100 * without[name]], abs=0.006)
    assert len(table["props"]["rows"]) == len(CLASSES)


def test_mistakes_become_cards(client: Client, tile: Path, tmp_path: Path) -> None:
    broken, huge = tmp_path / "broken.png", tmp_path / "huge.png"
    broken.write_bytes(tile.read_bytes()[:3000])
    Image.new("1", (10_000, 10_000)).save(huge)
    for path, reason in ((broken, "is damaged"), (huge, "the limit is 50 megapixels")):
        given = handle_file(path)
        for before, endpoint, behind in (
            ((MODEL,), "predict", (0.5,)),
            ((1, MODEL), "frequencies", ()),
            ((1, MODEL), "routing", ()),
            (('{"*": [0]}', MODEL), "ablate", ()),
        ):
            error = client.predict(*before, given, *behind, api_name=f"/earth_adapter_{endpoint}")[0]
            assert reason in error and path.name in error and str(tmp_path) not in error
    assert "There is no picture" in client.predict(MODEL, None, 0.5, api_name="/earth_adapter_predict")[0]
    for wrong in (1.5, -0.1, "x", None):
        error = client.predict(MODEL, handle_file(tile), wrong, api_name="/earth_adapter_predict")[0]
        assert "No opacity" in error
    assert (
        "There is no split to show"
        in Client(client.src, verbose=False).predict(1, api_name="/earth_adapter_frequencies_layer")[0]
    )


def test_models_of_other_families_are_told(client: Client, tile: Path) -> None:
    for before, endpoint, behind in (((), "predict", (0.5,)), (("{}",), "ablate", ())):
        given = *before, "clip_moe_tiny", handle_file(tile), *behind
        told = client.predict(*given, api_name=f"/earth_adapter_{endpoint}")[0]
        assert "clip_moe_tiny" in told and "it shows earth_adapter_dinov2_l, earth_adapter_tiny" in told


def test_other_kinds_of_pictures(client: Client, page: earth_adapter.Page, tmp_path: Path) -> None:
    deep = tmp_path / "deep.png"
    Image.fromarray(np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)).save(deep)
    alpha = tmp_path / "alpha.png"
    Image.new("RGBA", (40, 40), (10, 200, 30, 90)).save(alpha)
    for path in (deep, alpha):
        error, *_, numbers = client.predict(MODEL, handle_file(path), 0.5, api_name="/earth_adapter_predict")
        assert error == "" and sum(numbers["shares"].values()) == pytest.approx(1)
    assert page.read(Image.new("RGB", (5000, 100)))[0].size == (2048, 41)


def test_a_model_that_splits_nothing(page: earth_adapter.Page, tile: Path) -> None:
    page.store = MadeStore({MODEL: lambda: build(adapters="spatial", fft_layers=None)})
    with pytest.raises(mmoe.errors.Refused, match="splits no frequencies"):
        page.frequencies(quiet, 1, MODEL, str(tile))


def test_places_are_offered(page: earth_adapter.Page, model: EarthAdapter, client: Client) -> None:
    assert [one.name for one in page.offered][:2] == ["andes", "baltic sea"]
    assert {one.read().size for one in page.offered} == {(192, 192)}
    assert page.first == page.offered[0].read()
    error, picture = client.predict("place/florida", api_name="/earth_adapter_pick")
    with Image.open(picture) as picked:
        assert error == "" and picked.convert("RGB").tobytes() == page.offered[3].read().tobytes()
    assert [view.grid for view in page.views(model)] == [(4, 4)]


@pytest.mark.parametrize("opacity", [float("nan"), "1", None, 2])
def test_opacities_are_shares(opacity: Any) -> None:
    with pytest.raises(BadInput, match="from 0"):
        earth_adapter.read_opacity(opacity)


@pytest.mark.browser
@pytest.mark.timeout(300)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_visit(server: SimpleNamespace, browser: Any, shots: Path, tile: Path, width: int) -> None:
    visit = Visit(browser, server.url, width, shots, "#earth_adapter-run")
    page = visit.page
    visit.shot("earth_0_start")
    assert not page.locator("#earth_adapter-file").is_visible()
    page.locator("#earth_adapter-picture").get_by_role("button", name="Remove Image").click()
    page.click("#earth_adapter-run")
    page.get_by_role("alert").get_by_text("There is no picture").wait_for()
    page.set_input_files("#earth_adapter-picture input[type=file]", tile)
    page.wait_for_selector("#earth_adapter-picture img[src*=tile]")
    page.click("#earth_adapter-run")
    page.wait_for_selector("#earth_adapter-mask img")
    assert page.locator("#earth_adapter-legend .shares tr").count() == len(CLASSES)
    visit.shot("earth_1_segmented")
    with page.expect_download() as download:
        page.click("#earth_adapter-file")
    with Image.open(download.value.path()) as mask:
        assert mask.mode == "P" and mask.size == (100, 72)
    half = page.locator("#earth_adapter-mask img").get_attribute("src")
    page.locator("#earth_adapter-opacity input[type=range]").focus()
    page.keyboard.press("End")
    page.wait_for_function("old => document.querySelector('#earth_adapter-mask img')?.src !== old", arg=half)
    page.click("#earth_adapter-split")
    page.wait_for_selector("#earth_adapter-frequencies img")
    visit.shot("earth_2_frequencies")
    first = page.locator("#earth_adapter-frequencies img").get_attribute("src")
    page.locator("#earth_adapter-layer input").nth(1).check()
    page.wait_for_function("old => document.querySelector('#earth_adapter-frequencies img')?.src !== old", arg=first)
    visit.tab("Routing")
    page.wait_for_selector("#earth_adapter-overlay img")
    page.wait_for_selector("#earth_adapter-numbers tbody tr")
    visit.shot("earth_3_routing")
    visit.tab("Ablate")
    page.wait_for_selector("#earth_adapter-switches input")
    page.click("#earth_adapter-ablate")
    page.wait_for_selector("#earth_adapter-difference tbody tr")
    visit.shot("earth_4_ablated")
    visit.close()
