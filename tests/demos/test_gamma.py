"""Gamma's page of the gallery with small random models: scores as in Python, the slider, scenes, routing, ablation."""

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
from demos import gamma
from demos.examples import SIDE, bundled, photographs
from demos.store import ModelStore, quiet
from mmoe.errors import BadInput, UnknownName
from mmoe.moe import moe_layers
from tests.demos.conftest import MadeStore, Visit, served
from train.data.distortions import KINDS, distort
from zoo.gamma.model import Gamma, GammaConfig

MODEL, OTHER = "gamma_tiny", "gamma_vit_b16"
SIZES: dict[str, Any] = {
    "embed_dim": 32,
    "image_size": 48,
    "patch_size": 12,
    "vision_width": 64,
    "vision_layers": 4,
    "text_width": 64,
    "text_layers": 3,
    "vocab_size": 600,
    "context_length": 32,
    "first_layer": 1,
    "scenes": zoo.card(MODEL).config["scenes"],
}


def build(**options: Any) -> Gamma:
    """A small model with random weights whose experts count."""
    torch.manual_seed(0)
    model = Gamma(GammaConfig(**{**SIZES, **options})).eval()
    with torch.no_grad():
        for layer in moe_layers(model).values():
            layer.post.scale.fill_(0.5)
            layer.experts.down_proj.normal_(std=0.1)  # they begin as copies of each other
    return model


@pytest.fixture(scope="module")
def model() -> Gamma:
    return build()


@pytest.fixture(scope="module")
def server(model: Gamma, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    store = MadeStore({MODEL: lambda: model, OTHER: lambda: build(scenes={"face": "face {}-quality image"})})
    with served(store, tmp_path_factory.getbasetemp() / "gradio", MODEL) as running:
        yield running


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Smooth colours with an edge, larger than two crops."""
    ramp = np.linspace(0, 255, 240).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:160, None], ramp[None], ramp[None, ::-1]), 2).copy()
    pixels[40:90, 60:120] = (220, 30, 40)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def test_scores_equal_the_python_api(client: Client, model: Gamma, photo: Path) -> None:
    small = Image.open(photo).resize((144, 96), Image.Resampling.LANCZOS)
    spoilt = [distort(small, "jpeg", level) for level in range(6)]
    error, verdict, shown, plot, numbers = client.predict(
        MODEL, handle_file(photo), "texture", "jpeg", 4, api_name="/gamma_predict"
    )
    whole = [float(model.predict(one, "texture")) for one in spoilt]
    assert error == "" and plot["type"] == "matplotlib"
    assert numbers["scores"] == pytest.approx(whole, abs=1e-5) and numbers["score"] == numbers["scores"][4]
    want = model.predict(spoilt[4], "texture")
    assert numbers["levels"] == pytest.approx(dict(zip(want.labels, want.probs[0].tolist(), strict=True)), abs=1e-5)
    assert numbers["scene"] == "texture" and not numbers["upscaled"] and numbers["size"] == [144, 96]
    assert np.array_equal(Image.open(shown), spoilt[4])
    assert f"<strong>{whole[4]:.3f}</strong>" in verdict and "Scene: texture." in verdict
    assert "made smaller first, to 144 x 96" in verdict and "JPEG of this quality" in verdict
    order = [verdict.index(f">{name}<") for name in want.labels]
    assert order == sorted(order, reverse=True), "the best level comes first"


def test_the_model_may_choose_the_scene(client: Client, model: Gamma, photo: Path) -> None:
    verdict, *_, numbers = client.predict(MODEL, handle_file(photo), "auto", "jpeg", 0, api_name="/gamma_predict")[1:]
    small = Image.open(photo).resize((144, 96), Image.Resampling.LANCZOS)
    assert numbers["scene"] == model.predict(small).scenes[0]
    assert f"Scene: {numbers['scene']}, chosen by the model." in verdict and "JPEG" not in verdict


def test_small_and_grey_pictures_are_told(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "small.png"
    Image.fromarray(np.arange(40 * 60, dtype=np.uint8).reshape(40, 60)).save(path)
    verdict, *_, numbers = client.predict(
        MODEL, handle_file(path), "auto", "color_saturation_hsv", 5, api_name="/gamma_predict"
    )[1:]
    assert numbers["upscaled"] and numbers["size"] == [60, 40]
    assert "smaller than a crop of 48 pixels and was scaled up from 40" in verdict and "made smaller" not in verdict
    assert "leaves this picture as it is" in verdict


def test_the_slider_only_chooses(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    page = gamma.Page(zoo.list_models(family="gamma"), server.store)
    picture = Image.new("RGB", (64, 64), "orange")
    state, *_ = page.run(quiet, None, MODEL, picture, "auto", "jpeg", 1)
    monkeypatch.setattr(ModelStore, "use", None)
    again, _, shown, _, numbers = page.run(quiet, state, MODEL, picture, "auto", "jpeg", 5.0)
    assert again is state and shown is state["pictures"][5] and numbers["score"] == state["scores"][5]
    for changed in ((picture, "texture", "jpeg", 1), (picture, "auto", "denoise", 1)):
        with pytest.raises(TypeError):  # another picture, scene or kind needs the model
            page.run(quiet, state, MODEL, *changed)


def test_routing_shows_the_centre_crop(client: Client, server: SimpleNamespace, model: Gamma, photo: Path) -> None:
    error, about, layers, picture, texts, _, _, table = client.predict(
        1, MODEL, handle_file(photo), "natural", "jpeg", 5, api_name="/gamma_routing"
    )
    assert error == "" and "each token goes to all 3 experts" in about and "the stronger the larger" in about
    assert gamma.Page.seen in about
    assert [choice[1] for choice in layers["choices"]] == [1, 2, 3]
    assert Image.open(picture).width == 480 and Image.open(texts).width == 480
    rows = table["props"]["rows"]
    assert [row[0] for row in rows] == [f"image {i}" for i in (1, 2, 3)] + [f"text {i}" for i in (1, 2)]
    page = gamma.Page(zoo.list_models(family="gamma"), server.store)
    inputs = page.read(str(photo), "natural", "jpeg", 5)
    spoilt = distort(Image.open(photo).resize((144, 96), Image.Resampling.LANCZOS), "jpeg", 5)
    seen = np.asarray(page.picture(model, inputs)).astype(int)
    assert np.abs(seen - np.asarray(spoilt.crop((48, 24, 96, 72)))).max() <= 1
    with mmoe.trace(model) as routing:
        page.observe(model, inputs)
    view = model.views(page.batch(model, inputs))[0]
    rows = routing.select("clip.visual.*")[0].weights
    assert len(rows) == 5 * view.rows and view.of_sample(rows, 0).shape == (16, 3)
    uneven = max(max(row["use"]) * 3 for row in routing.summary())
    assert f"has {uneven:.1f} times" in about


def test_ablation_tells_the_score(client: Client, server: SimpleNamespace, model: Gamma, photo: Path) -> None:
    given = (handle_file(photo), "natural", "jpeg", 2)
    error, switches = client.predict(MODEL, api_name="/gamma_layers")
    assert error == "" and [row["name"] for row in switches["props"]["rows"]][-1] == "text 2"
    page = gamma.Page(zoo.list_models(family="gamma"), server.store)
    inputs = page.read(str(photo), *given[1:])
    before = page.predict(model, inputs)
    with mmoe.override(model, {"clip.visual.*": mmoe.switch_off([0, 2])}):
        after = page.predict(model, inputs)
    off = json.dumps({"clip.visual.*": [0, 2]})
    error, verdict, first, then, table = client.predict(off, MODEL, *given, api_name="/gamma_ablate")
    assert f"{before['score']:.3f}" != f"{after['score']:.3f}"
    assert error == "" and f"the score is {before['score']:.3f} before and {after['score']:.3f} after" in verdict
    for shown, want in ((first, before), (then, after)):
        found = {one["label"]: one["confidence"] for one in shown["confidences"]}
        assert found == pytest.approx({name: share for name, share in want.items() if name != "score"}, abs=1e-5)
    assert {row[0] for row in table["props"]["rows"]} == set(model.config.levels)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("auto", "jpg", 1), "did you mean: jpeg"),
        (("auto", "jpeg", 6), "whole numbers from 0"),
        (("auto", "jpeg", 2.5), "whole numbers from 0"),
        (("auto", "jpeg", "x"), "whole numbers from 0"),
        (("under water", "jpeg", 1), "No scene"),
    ],
)
def test_mistakes_become_cards(client: Client, photo: Path, given: tuple[Any, ...], reason: str) -> None:
    for endpoint, before in (("predict", (MODEL,)), ("routing", (1, MODEL)), ("ablate", ('{"*": [0]}', MODEL))):
        error = client.predict(*before, handle_file(photo), *given, api_name=f"/gamma_{endpoint}")[0]
        assert reason in error and 'class="error-card"' in error


def test_bad_pictures_become_cards(client: Client, photo: Path, tmp_path: Path) -> None:
    broken, text, huge = tmp_path / "broken.png", tmp_path / "text.png", tmp_path / "huge.png"
    broken.write_bytes(photo.read_bytes()[:400])
    text.write_text("no picture")
    Image.new("1", (10_000, 10_000)).save(huge)
    for path, reason in ((broken, "is damaged"), (text, "not a picture"), (huge, "the limit is 50 megapixels")):
        error, _, shown, _, numbers = client.predict(
            MODEL, handle_file(path), "auto", "jpeg", 1, api_name="/gamma_predict"
        )
        assert reason in error and path.name in error and str(tmp_path) not in error
        assert shown is None and numbers is None
    assert "There is no picture" in client.predict(MODEL, None, "auto", "jpeg", 1, api_name="/gamma_predict")[0]


def test_pictures_to_pick(client: Client) -> None:
    error, picture = client.predict("example/fox", api_name="/gamma_pick")
    assert error == "" and Image.open(picture).size == (256, 256)
    for wrong in ("example/../fox", 7, None):
        assert "There is no picture" in client.predict(wrong, api_name="/gamma_pick")[0]
    found = {one.id for one in photographs()}
    assert "photo/china" in found, "scikit-learn is always installed"
    assert all(max(one.read().size) <= SIDE for one in photographs())
    assert len(bundled("examples")) == 10


def test_scenes_are_those_of_the_model(server: SimpleNamespace) -> None:
    page = gamma.Page(zoo.list_models(family="gamma"), server.store)
    assert page.scenes(MODEL) == ["auto", "natural", "rendered", "texture"] == page.scenes("clip_moe_tiny")
    assert page.scenes(OTHER) == ["auto", "natural", "AI-generated", "underwater", "face", "aesthetic"]
    with pytest.raises(UnknownName):
        page.run(quiet, None, OTHER, Image.new("RGB", (64, 64)), "natural", "jpeg", 0)
    verdict = page.run(quiet, None, OTHER, Image.new("RGB", (64, 64)), "face", "jpeg", 0)[1]
    assert "Scene" not in verdict, "a model with one scene chooses none"


def test_words_about_distortions() -> None:
    assert len(gamma.kind_choices()) == 25 and [kind for _, kind in gamma.kind_choices()] == list(KINDS)
    assert "from one side" in gamma.told_kind("mean_shift") and "from one side" not in gamma.told_kind("jpeg")
    for level in (True, -1, 6, "3", None, float("nan")):
        with pytest.raises(BadInput, match="whole numbers from 0"):
            gamma.read_level(level)


def test_pictures_are_made_as_small_as_they_are_scored(model: Gamma) -> None:
    sizes = {size: gamma.fitted(Image.new("RGB", size), model).size for size in ((800, 400), (50, 9000), (90, 90))}
    assert sizes == {(800, 400): (192, 96), (50, 9000): (11, 2048), (90, 90): (90, 90)}
    assert gamma.fitted(Image.new("RGB", (800, 400)), build(short_side=150)).size == (300, 150)


def test_a_level_is_marked_on_the_curve() -> None:
    axes = gamma.curve([0.9, 0.8, 0.5, 0.4, 0.2, -0.2], "jpeg", 5).axes[0]
    assert axes.lines[-1].get_xydata().tolist() == [[5, -0.2]] and axes.texts[0].get_text() == "-0.200"
    assert axes.get_ylim()[0] < -0.1, "scores beyond the scale stay in view"


@pytest.mark.browser
@pytest.mark.timeout(300)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_visit(server: SimpleNamespace, model: Gamma, browser: Any, shots: Path, photo: Path, width: int) -> None:
    visit = Visit(browser, server.url, width, shots, "#gamma-run")
    page = visit.page
    visit.shot("gamma_0_start")
    page.set_input_files("#gamma-picture input[type=file]", photo)
    page.wait_for_selector("#gamma-picture img[src*=photo]")
    page.click("#gamma-run")
    page.wait_for_selector("#gamma-verdict .score")
    page.wait_for_selector("#gamma-spoilt img")
    assert page.locator("#gamma-verdict .shares tr").count() == 5
    visit.shot("gamma_1_scored")
    sharp = page.locator("#gamma-spoilt img").get_attribute("src")
    slider = page.locator("#gamma-level input[type=range]")
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.locator("#gamma-verdict", has_text="Gaussian weights").wait_for()
    page.wait_for_function("old => document.querySelector('#gamma-spoilt img')?.src !== old", arg=sharp)
    page.get_by_role("combobox", name="Distortion").click()
    page.get_by_role("option", name="Jpeg (compression)").click()
    page.locator("#gamma-verdict", has_text="JPEG of this quality").wait_for()
    small = Image.open(photo).resize((144, 96), Image.Resampling.LANCZOS)
    want = [float(model.predict(distort(small, "jpeg", level))) for level in (0, 5)]
    page.locator("#gamma-verdict .score strong", has_text=f"{want[1]:.3f}").wait_for()
    assert f"{want[0]:.3f}" != f"{want[1]:.3f}"
    visit.shot("gamma_2_spoilt")
    visit.tab("Routing")
    page.wait_for_selector("#gamma-overlay img")
    page.wait_for_selector("#gamma-numbers tbody tr")
    visit.shot("gamma_3_routing")
    visit.tab("Ablate")
    page.wait_for_selector("#gamma-switches input")
    page.click("#gamma-ablate")
    page.get_by_text("the score is").wait_for()
    assert len(visit.shares("#gamma-after")) == 5
    visit.shot("gamma_4_ablated")
    visit.choose(OTHER)
    page.get_by_role("heading", name=OTHER).wait_for()
    visit.tab("Try")
    page.wait_for_selector("#gamma-verdict .score", state="detached")
    page.get_by_role("combobox", name="Scene").click()
    page.get_by_role("option", name="underwater").wait_for()
    visit.close()
