"""The gallery without a browser: every endpoint, equal to the Python API; readable errors; visitors kept apart."""

from __future__ import annotations

import gc
import json
import os
import urllib.error
import urllib.request
import weakref
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import mmoe
import zoo
from demos import ablate, clip_moe, look, panels, record
from demos import app as gallery
from demos.family import Family, read_texts
from demos.store import ModelStore
from mmoe.errors import BadInput, Refused, UnknownModel
from mmoe.moe import moe_layers
from tests.demos.conftest import served

MODEL = "clip_moe_tiny"
FOX = str(clip_moe.examples()["fox"])
GUITAR = str(clip_moe.examples()["guitar"])
LABELS = ["a fox", "a cat", "a pizza"]
TEXT = ", ".join(LABELS)
HEADERS = {"Content-Type": "application/json"}
FAMILIES = sorted({card.family for card in zoo.list_models(weights="bundled")})
OF_EVERY_FAMILY = ("predict", "routing", "routing_open", "routing_layer", "layers", "ablate")
LIGHT = {"clip_moe": {"find", "pick", "pick_found"}, "gamma": {"pick"}}
LIGHT["earth_adapter"] = {"pick", "opacity", "frequencies_layer"}
HEAVY = {"clip_moe": {"search"}, "earth_adapter": {"frequencies"}}
ENDPOINTS = {"models", "select_model", "load", "unload"}
for family in FAMILIES:
    own = {*OF_EVERY_FAMILY, *LIGHT.get(family, ()), *HEAVY.get(family, ())}
    ENDPOINTS |= {f"{family}_{name}" for name in own}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The gallery as a visitor finds it."""
    with served(ModelStore(), tmp_path_factory.getbasetemp() / "gradio") as running:
        yield running


@pytest.fixture(scope="module")
def model() -> Any:
    return zoo.load(MODEL)


def probabilities(label: dict[str, Any]) -> dict[str, float]:
    return {entry["label"]: entry["confidence"] for entry in label["confidences"]}


def expected(model: Any, picture: str = FOX, labels: list[str] = LABELS) -> dict[str, float]:
    return dict(model.predict(picture, labels).top(len(labels)))


def rows(update: dict[str, Any]) -> list[list[str]]:
    return update["props"]["rows"]


def test_every_handler_has_a_name(server: SimpleNamespace, client: Client) -> None:
    dependencies = server.app.config["dependencies"]
    assert all(one["api_name"] for one in dependencies)
    public = {one["api_name"] for one in dependencies if one["api_visibility"] == "public"}
    assert public == ENDPOINTS
    described = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert {name.lstrip("/") for name in described} == ENDPOINTS
    assert [p["parameter_name"] for p in described["/clip_moe_predict"]["parameters"]] == ["model", "image", "labels"]
    assert [p["parameter_name"] for p in described["/clip_moe_ablate"]["parameters"]][:2] == ["switched_off", "model"]


def test_nothing_stray_is_on_the_page(server: SimpleNamespace) -> None:
    """A component that a handler's default made while the page was drawn would show up as an empty one."""
    used = {i for fn in server.app.fns.values() for block in (*fn.inputs, *fn.outputs) for i in [block._id]}
    shown = [block for block in server.app.blocks.values() if isinstance(block, gr.HTML) and block._id not in used]
    assert all(str(block.value).startswith("<") or block.html_template != "${value}" for block in shown)


def test_one_heavy_job_at_a_time(server: SimpleNamespace) -> None:
    heavy = {fn.api_name for fn in server.app.fns.values() if fn.concurrency_id == "heavy"}
    light = {"models", "select_model"}
    light |= {f"{family}_{name}" for family in FAMILIES for name in {"routing_layer", *LIGHT.get(family, ())}}
    assert heavy == ENDPOINTS - light | {f"{family}_ablate_follow" for family in FAMILIES}
    assert all(fn.concurrency_limit == 1 for fn in server.app.fns.values() if fn.concurrency_id == "heavy")


def test_predict_equals_the_python_api(client: Client, model: Any) -> None:
    error, label, note = client.predict(MODEL, handle_file(FOX), TEXT, api_name="/clip_moe_predict")
    assert error == ""
    assert probabilities(label) == pytest.approx(expected(model), abs=1e-6)
    assert MODEL in note and "3 labels" in note


def test_labels_that_the_model_cuts_are_named(client: Client, model: Any) -> None:
    long = "a fox " * model.config.context_length
    fits = "fox " * (model.config.context_length - 2)
    note = client.predict(MODEL, handle_file(FOX), f"{long}, {fits}", api_name="/clip_moe_predict")[2]
    assert "2 labels" in note and note.count("“") == 1
    assert "Only the first 30 tokens were read of “\u2068a fox a fox" in note
    assert "1 label, " in client.predict(MODEL, handle_file(FOX), "fox", api_name="/clip_moe_predict")[2]
    assert "tokens were read" in client.predict(MODEL, long, "twemoji", api_name="/clip_moe_search")[2]


def test_labels_may_be_a_list(client: Client, model: Any) -> None:
    labels = ["a fox, red", "a cat"]
    error, label, _ = client.predict(MODEL, handle_file(FOX), labels, api_name="/clip_moe_predict")
    assert error == "" and probabilities(label) == pytest.approx(expected(model, labels=labels), abs=1e-6)
    assert client.predict("twemoji/1F98A", labels[1:], api_name="/clip_moe_pick")[2] == "fox, a cat"


def test_search_equals_the_python_api(client: Client, model: Any) -> None:
    from train.emoji_retrieval import image_features, text_features

    error, grid, note, found = client.predict(MODEL, "a red  fruit", "twemoji", api_name="/clip_moe_search")
    emoji = clip_moe.emoji_set()
    cosines = image_features(model, emoji, "twemoji") @ text_features(model, ["a red fruit"])[0]
    best = cosines.topk(12)
    assert error == ""
    assert [one["id"] for one in found] == [emoji.concepts[i].id for i in best.indices]
    assert [one["cosine"] for one in found] == pytest.approx(best.values.tolist(), abs=2e-4)
    assert [one["held_out"] for one in found] == [emoji.concepts[i].held_out for i in best.indices]
    tiles = grid["props"]["items"]
    assert [tile["name"] for tile in tiles] == [one["name"] for one in found]
    assert [bool(tile["mark"]) for tile in tiles] == [one["held_out"] for one in found]
    assert "never trained on" in note and "300 of all" in note and "drawn as Twemoji, " in note
    note = client.predict(MODEL, "red " * 100, "noto", api_name="/clip_moe_search")[2]
    assert "Nearest to “\u2068red red" in note and len(note) < 600, "a long query is quoted in short"


def test_pictures_of_emoji_are_encoded_once(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    import train.emoji_retrieval

    calls = []
    encode = train.emoji_retrieval.image_features
    monkeypatch.setattr(train.emoji_retrieval, "image_features", lambda *a: calls.append(a) or encode(*a))
    notes: list[tuple[str, float]] = []
    with server.store.use(MODEL) as loaded:
        loaded.derived.pop(("emoji", "noto"), None)
        first = clip_moe.image_features(loaded, "noto", lambda *note: notes.append(note))
        again = clip_moe.image_features(loaded, "noto", lambda *note: notes.append(note))
    assert again is first and first.shape == (1641, 128)
    assert len(calls) == len(notes) == 13
    assert [share for _, share in notes] == sorted(share for _, share in notes)


def test_routing_equals_the_trace(client: Client, model: Any) -> None:
    with mmoe.trace(model) as routing:
        model.predict(FOX, LABELS)
    error, about, layers, picture, texts, bars, heatmap, table = client.predict(
        1, MODEL, handle_file(FOX), TEXT, api_name="/clip_moe_routing"
    )
    assert error == "" and "2 of 4 experts" in about
    assert layers["choices"] == [["1", 1], ["2", 2], ["3", 3], ["4 (text 3)", 4]] and layers["value"] == 1
    assert Image.open(picture).width >= 480 and Image.open(texts).width >= 400
    assert bars["type"] == heatmap["type"] == "matplotlib"
    found = rows(table)
    sizes = {"image": model.config.vision_layers, "text": model.config.text_layers}
    assert [row[0] for row in found] == [f"{kind} {i + 1}" for kind, size in sizes.items() for i in range(size)]
    for row, summary in zip(found, routing.summary(), strict=True):
        assert len(row[1]) == 14 and " " not in row[1], "each load has its own place"
        assert [int(share) for share in row[1].split()] == [round(100 * share) for share in summary["load"]]
        assert float(row[2]) == pytest.approx(summary["max_over_mean"], abs=0.01)
        assert float(row[3]) == pytest.approx(summary["entropy"], abs=0.01)


def test_layers_are_drawn_again_without_a_run(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = client.predict(1, MODEL, handle_file(FOX), TEXT, api_name="/clip_moe_routing")
    monkeypatch.setattr(ModelStore, "use", None)
    error, picture, _, _ = client.predict(2, api_name="/clip_moe_routing_layer")
    assert error == ""
    assert Image.open(picture).tobytes() != Image.open(whole[3]).tobytes()


def test_a_layer_that_is_not_there_is_the_last_one(client: Client) -> None:
    error, _, layers, *_ = client.predict(99, MODEL, handle_file(FOX), TEXT, api_name="/clip_moe_routing")
    assert error == "" and layers["value"] == 4
    error, _, layers, *_ = client.predict(99, MODEL, handle_file(FOX), TEXT, api_name="/clip_moe_routing")
    assert error == "" and layers["value"] == 4, "a second call takes what the first one takes"
    last, beyond = (client.predict(layer, api_name="/clip_moe_routing_layer") for layer in (4, 99))
    assert last[0] == beyond[0] == "" and Image.open(last[1]).tobytes() == Image.open(beyond[1]).tobytes()
    for layer in ("x", [1], None):
        assert "layers are counted from 1" in client.predict(layer, api_name="/clip_moe_routing_layer")[0]


def test_layers_are_numbers() -> None:
    for layer in ("x", float("inf"), None):
        with pytest.raises(BadInput, match="layers are counted from 1"):
            panels.read_layer(layer)


def test_what_is_shown_is_named_after_its_layer(model: Any) -> None:
    batch = model.preprocess(FOX, LABELS)
    found = record.record_routing(model, lambda: model.predict(FOX, LABELS), batch, None, MODEL)[1]
    assert list(record.loads(found, 1)) == ["image 1", "text 1"]
    assert list(record.loads(found, 4)) == ["image 4", "text 3"]


def test_opening_the_tab_again_does_nothing(server: SimpleNamespace) -> None:
    panel = panels._RoutingPanel(server_family(server), SimpleNamespace(store=server.store))
    state, *_ = panel.run(lambda *note: None, 1, MODEL, FOX, TEXT)
    again = panel.show(lambda *note: None, state, 1, MODEL, FOX, TEXT)
    assert all(value == gr.skip() for value in again)
    assert panel.show(lambda *note: None, state, 1, MODEL, FOX, "a cat")[0]["key"] != state["key"]


def server_family(server: SimpleNamespace) -> clip_moe.Page:
    return clip_moe.Page(zoo.list_models(family="clip_moe"), server.store)


def test_ablation_equals_the_python_api(client: Client, model: Any) -> None:
    off = {"clip.visual.*": [0, 2], list(moe_layers(model))[-1]: [1]}
    with mmoe.override(model, {layer: mmoe.switch_off(experts) for layer, experts in off.items()}):
        without = expected(model)
    error, verdict, before, after, table = client.predict(
        json.dumps(off), MODEL, handle_file(FOX), TEXT, api_name="/clip_moe_ablate"
    )
    assert error == "" and "9 experts switched off in 5 layers" in verdict
    assert probabilities(before) == pytest.approx(expected(model), abs=1e-6)
    assert probabilities(after) == pytest.approx(without, abs=1e-6)
    found = {row[0]: [float(value.replace("\N{MINUS SIGN}", "-")) for value in row[1:]] for row in rows(table)}
    whole = expected(model)
    for label in LABELS:
        want = [100 * whole[label], 100 * without[label], 100 * (without[label] - whole[label])]
        assert found[label] == pytest.approx(want, abs=0.006)
    error, label, _ = client.predict(MODEL, handle_file(FOX), TEXT, api_name="/clip_moe_predict")
    assert probabilities(label) == pytest.approx(whole, abs=1e-6)  # nothing stays switched off
    verdict = client.predict('{"*": [0]}', MODEL, handle_file(FOX), TEXT, api_name="/clip_moe_ablate")[1]
    assert "7 experts switched off in 7 layers" in verdict and "\u00a0% before" in verdict


def test_layers_for_the_switches(client: Client, model: Any) -> None:
    error, update = client.predict(MODEL, api_name="/clip_moe_layers")
    assert error == ""
    assert [row["layer"] for row in rows(update)] == list(moe_layers(model))
    assert {row["experts"] for row in rows(update)} == {4}
    assert json.loads(update["value"]) == {layer: [0] for layer in moe_layers(model)}


def test_visitors_do_not_see_each_other(server: SimpleNamespace, tmp_path: Path) -> None:
    one, two, three = (
        Client(server.url, verbose=False, analytics_enabled=False, download_files=str(tmp_path / name))
        for name in ("one", "two", "three")
    )
    first = one.predict(1, MODEL, handle_file(FOX), "fox one", api_name="/clip_moe_routing")
    second = two.predict(1, MODEL, handle_file(GUITAR), "guitar two, second", api_name="/clip_moe_routing")
    mine, theirs = (
        one.predict(1, api_name="/clip_moe_routing_layer"),
        two.predict(1, api_name="/clip_moe_routing_layer"),
    )
    for whole, again in ((first, mine), (second, theirs)):
        assert Image.open(whole[3]).tobytes() == Image.open(again[1]).tobytes()
        assert Image.open(whole[4]).tobytes() == Image.open(again[2]).tobytes()
    assert Image.open(mine[1]).tobytes() != Image.open(theirs[1]).tobytes()
    error = three.predict(1, api_name="/clip_moe_routing_layer")[0]
    assert "There is no routing to show" in error


def test_find_and_pick(client: Client, model: Any) -> None:
    error, grid = client.predict("whale", "openmoji", api_name="/clip_moe_find")
    tiles = grid["props"]["items"]
    assert error == "" and [tile["name"] for tile in tiles][:2] == ["whale", "spouting whale"]
    assert [tile["mark"] for tile in tiles[:2]] == [
        "unseen" if concept.held_out else ""
        for name in ("whale", "spouting whale")
        for concept in clip_moe.emoji_set().concepts
        if concept.name == name
    ]
    assert tiles[0]["src"].startswith("data:image/webp;base64,")
    error, picture, labels = client.predict(tiles[0]["id"], TEXT, api_name="/clip_moe_pick")
    assert error == "" and labels == f"whale, {TEXT}"
    index = next(i for i, concept in enumerate(clip_moe.emoji_set().concepts) if concept.name == "whale")
    drawn = clip_moe.emoji_set().image(index, "openmoji")
    _, label, _ = client.predict(MODEL, handle_file(picture), labels, api_name="/clip_moe_predict")
    want = dict(model.predict(drawn, ["whale", *LABELS]).top(4))
    assert probabilities(label) == pytest.approx(want, abs=1e-6)
    examples = client.predict("", "twemoji", api_name="/clip_moe_find")[1]["props"]["items"]
    assert [tile["id"] for tile in examples] == [f"example/{name}" for name in clip_moe.examples()]
    drawn = client.predict("", "noto", api_name="/clip_moe_find")[1]["props"]["items"]
    assert [tile["name"] for tile in drawn] == list(clip_moe.examples())
    assert all(tile["id"].startswith("noto/") for tile in drawn)
    assert client.predict("example/guitar", "guitar", api_name="/clip_moe_pick_found")[2] == "guitar"
    nothing = client.predict("zzzz<i>", "twemoji", api_name="/clip_moe_find")[1]["props"]
    assert nothing["items"] == [] and "zzzz<i>" in nothing["empty"]  # the page's template escapes it


def test_bad_uploads_are_refused_with_a_reason(client: Client, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(FOX).read_bytes()[:3000])
    for path, reason in ((broken, "the file is damaged"), (make_text(tmp_path), "not a picture in a known format")):
        error, label, _ = client.predict(MODEL, handle_file(path), TEXT, api_name="/clip_moe_predict")
        assert reason in error and "error-card" in error and path.name in error
        assert str(tmp_path) not in error and "gradio" not in error
        assert not label.get("confidences")
    error, *_ = client.predict(MODEL, None, TEXT, api_name="/clip_moe_predict")
    assert "There is no picture" in error


def make_text(folder: Path) -> Path:
    path = folder / "text.png"
    path.write_text("no picture")
    return path


@pytest.mark.parametrize(
    ("arguments", "endpoint", "reason"),
    [
        ((MODEL, "fox", " \n"), "clip_moe_predict", "the box is empty"),
        ((MODEL, "fox", ",,, ,"), "clip_moe_predict", "there is no label between the commas"),
        ((MODEL, "fox", ",".join(map(str, range(101)))), "clip_moe_predict", "at most 100 fit"),
        ((MODEL, "fox", "x" * 1001), "clip_moe_predict", "at most 1000 fit"),
        ((MODEL, "", "twemoji"), "clip_moe_search", "nothing to search for"),
        (("example/../../secret", ""), "clip_moe_pick", "There is no picture"),
        (("twemoji/<b>", ""), "clip_moe_pick", "&lt;b&gt;"),
        ((7, ""), "clip_moe_pick", "There is no picture “\u20687\u2069”"),
        (("{", MODEL, "fox", TEXT), "clip_moe_ablate", "it is not JSON"),
        (("[" * 100_000, MODEL, "fox", TEXT), "clip_moe_ablate", "maps layers to lists of experts"),
        (("9" * 6000, MODEL, "fox", TEXT), "clip_moe_ablate", "maps layers to lists of experts"),
        (("{}", MODEL, "fox", TEXT), "clip_moe_ablate", "All experts are on"),
        (('{"*": ["a"]}', MODEL, "fox", TEXT), "clip_moe_ablate", "maps layers to lists of experts"),
        (('{"*": [0, 1, 2, 3]}', MODEL, "fox", TEXT), "clip_moe_ablate", "at least one must stay"),
        (('{"*": [0, 1, 2, 3]}', MODEL, "fox", TEXT), "clip_moe_ablate", "All 4 experts of image 1 are off"),
        ((None, "fox", TEXT), "clip_moe_predict", "none is chosen in the list of models"),
        (('{"*": [7]}', MODEL, "fox", TEXT), "clip_moe_ablate", "experts 0 to 3"),
        (('{"clip.vision.*": [0]}', MODEL, "fox", TEXT), "clip_moe_ablate", "No MoE layer named"),
        (("clip_moe_vit_l14", "fox", TEXT), "clip_moe_predict", "its weights are not bundled"),
    ],
)
def test_mistakes_become_cards(client: Client, arguments: tuple[str | None, ...], endpoint: str, reason: str) -> None:
    given = [handle_file(FOX) if one == "fox" else one for one in arguments]
    result = client.predict(*given, api_name=f"/{endpoint}")
    assert reason in result[0] and 'class="error-card"' in result[0]
    assert "Traceback" not in result[0]


def test_unknown_choices_are_refused(client: Client) -> None:
    with pytest.raises(AppError):  # gradio checks the choices of menus itself
        client.predict("clip_moe_tini", handle_file(FOX), TEXT, api_name="/clip_moe_predict")
    with pytest.raises(BadInput, match="no emoji style"):
        clip_moe.check_style("twemojy")


def test_an_unexpected_error_shows_no_inside(
    server: SimpleNamespace, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, *_: Any) -> None:
        raise RuntimeError("secret inside")

    monkeypatch.setattr(Family, "predict", fail)
    error, *_ = client.predict(MODEL, handle_file(FOX), TEXT, api_name="/clip_moe_predict")
    assert "an unexpected error" in error and "secret" not in error


def test_a_dense_model_has_no_routing_but_runs(client: Client) -> None:
    dense = next(card.name for card in zoo.list_models(family="clip_moe", weights="bundled") if not card.moe)
    error, label, _ = client.predict(dense, handle_file(FOX), TEXT, api_name="/clip_moe_predict")
    assert error == "" and probabilities(label) == pytest.approx(expected(zoo.load(dense)), abs=1e-6)
    for result in (
        client.predict(1, dense, handle_file(FOX), TEXT, api_name="/clip_moe_routing"),
        client.predict(dense, api_name="/clip_moe_layers"),
        client.predict('{"*": [0]}', dense, handle_file(FOX), TEXT, api_name="/clip_moe_ablate"),
    ):
        assert f"{dense} has no routing" in result[0]
    assert "parameters, dense" in client.predict(dense, api_name="/select_model")[1]


def test_choosing_a_model(client: Client) -> None:
    error, head, _, card, *_ = client.predict("clip_moe_vit_l14", api_name="/select_model")
    assert error == "" and "clip_moe_vit_l14" in head and "needs download" in head
    assert "zoo.load('clip_moe_vit_l14')" in card and "2409.19291" in card and "OpenAI CLIP ViT-L/14" in card
    head = client.predict(MODEL, api_name="/select_model")[1]
    assert "bundled" in head and "2 per token" in head


def test_the_filter(client: Client) -> None:
    both = client.predict("any", "image", MODEL, api_name="/models")
    offered = gallery.offered(zoo.card(MODEL))
    assert [name for _, name in both["choices"]] == [card.name for card in offered if "image" in card.modalities]
    assert both["value"] == MODEL


def test_load_and_unload(server: SimpleNamespace, client: Client) -> None:
    assert MODEL in client.predict(MODEL, api_name="/load")[1]
    assert MODEL in server.store.sizes()
    error, status = client.predict(MODEL, api_name="/unload")
    assert error == "" and MODEL not in status and MODEL not in server.store.sizes()
    assert client.predict(MODEL, handle_file(FOX), TEXT, api_name="/clip_moe_predict")[0] == ""


def test_fetching_without_a_network(server: SimpleNamespace, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.weights.online", lambda: False)
    monkeypatch.setattr(zoo, "load", None, raising=False)  # nothing is built before the weights are here
    error, *_ = client.predict("clip_moe_vit_l14", api_name="/load")
    assert "there is no network" in error and "hf download" in error


def test_files_of_the_server_are_out_of_reach(server: SimpleNamespace, root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in (secret, root / "pyproject.toml", Path(os.environ.get("HOME", "/")) / ".bashrc"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}gradio_api/file={path}", timeout=30)
        assert refused.value.code in (403, 404)


def test_a_visitor_cannot_name_a_file_of_the_server(server: SimpleNamespace, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    for path in (secret, FOX):  # the client would upload them, so this asks by hand
        picture = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        data = json.dumps({"data": [MODEL, picture, TEXT]}).encode()
        asked = urllib.request.Request(f"{server.url}gradio_api/call/clip_moe_predict", data, HEADERS)
        with urllib.request.urlopen(asked, timeout=30) as response:
            event = json.load(response)["event_id"]
        with urllib.request.urlopen(f"{server.url}gradio_api/call/clip_moe_predict/{event}", timeout=60) as response:
            answer = response.read().decode()
        assert "event: error" in answer and "confidences" not in answer


def test_the_page_asks_nobody_else(server: SimpleNamespace) -> None:
    with urllib.request.urlopen(server.url, timeout=30) as response:
        page = response.read().decode()
    assert "fonts.googleapis.com" not in page
    assert not server.app.analytics_enabled and not server.app.run_history
    assert server.app.delete_cache == (gallery.CLEAN_EVERY, gallery.KEEP)


class FakeModel(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    loaded: list[str] = []
    monkeypatch.setattr(zoo, "load", lambda name: loaded.append(name) or FakeModel(), raising=False)
    monkeypatch.setattr(zoo, "card", lambda name: SimpleNamespace(weights={"x": 1}, bundled=True))
    return loaded


def test_the_store_keeps_the_two_used_last(fakes: list[str]) -> None:
    store = ModelStore()
    for name in "abacab":
        with store.use(name):
            pass
    assert fakes == ["a", "b", "c", "b"]
    assert list(store.sizes()) == ["a", "b"]


def test_the_store_frees_memory(fakes: list[str]) -> None:
    store = ModelStore(capacity=1)
    with store.use("a") as loaded:
        alive = weakref.ref(loaded.model)
        loaded.derived["features"] = torch.zeros(1000)
        assert store.sizes()["a"] == pytest.approx((20 + 1000) * 4 / 1e6)
    del loaded
    assert store.unload("a") and not store.unload("a")
    gc.collect()
    assert alive() is None
    with store.use("a") as loaded:
        assert loaded.derived == {}


def test_a_failed_load_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise BadInput("x", "y", "z")

    monkeypatch.setattr(zoo, "load", fail, raising=False)
    store = ModelStore()
    with pytest.raises(BadInput), store.use(MODEL):
        pass
    assert store.sizes() == {}


def test_a_public_gallery_fetches_nothing() -> None:
    store = ModelStore(allow_download=False)
    with pytest.raises(Refused, match="public gallery"), store.use("clip_moe_vit_l14", fetch=True):
        pass


def test_a_model_without_weights_is_told_in_the_words_of_the_page() -> None:
    with pytest.raises(Refused, match="gamma_vit_b16 has no weights") as error, ModelStore().use("gamma_vit_b16"):
        pass
    assert "zoo.load" not in str(error.value) and error.value.fix == "choose a bundled model in the list"


def test_a_family_without_a_page_of_its_own(model: Any) -> None:
    store = ModelStore()
    app = gallery.build(store=store, make_family=lambda name, cards, held: Family(cards, held))
    names = {fn.api_name for fn in app.fns.values()}
    assert {"clip_moe_predict", "clip_moe_routing", "clip_moe_ablate"} <= names and "clip_moe_search" not in names
    one = Family(zoo.list_models(family="clip_moe"), store)
    assert one.parameters == ("image", "text")
    assert one.run(lambda *note: None, MODEL, FOX, "a fox\na cat") == pytest.approx(
        dict(model.predict(FOX, ["a fox", "a cat"]).top(2))
    )
    assert [view.modality for view in one.views(model)] == ["image", "text"]


def test_choosing_by_name_or_family() -> None:
    assert gallery.choose(None).bundled
    assert gallery.choose("clip_moe").name == MODEL
    assert gallery.choose("clip_moe_vit_l14").name == "clip_moe_vit_l14"
    with pytest.raises(UnknownModel, match="clip_moe_tiny"):
        gallery.build("clip_moe_tinny")


def test_families_without_a_bundled_model_come_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [replace(card, weights={}) if card.family == "gamma" else card for card in zoo.list_models()]
    monkeypatch.setattr("zoo.registry._cards", lambda: {card.name: card for card in cards})
    offered, plain = gallery.offered(zoo.card("gamma_vit_b16")), gallery.offered(gallery.choose(None))
    assert plain == [card for card in offered if card.family != "gamma"]
    assert [card for card in offered if card.family == "gamma"] == [c for c in cards if c.family == "gamma"]
    pages: list[str] = []

    def note(name: str, cards: list[zoo.Card], store: ModelStore) -> Family:
        pages.append(name)
        return Family(cards, store)

    app = gallery.build("gamma_vit_b16", make_family=note)
    assert sorted(pages) == sorted({card.family for card in offered})
    picker = next(block for block in app.blocks.values() if getattr(block, "elem_id", None) == "picker")
    assert picker.value == "gamma_vit_b16" and [name for _, name in picker.choices] == [card.name for card in offered]


def test_only_code_is_in_the_code_font() -> None:
    def tried(fix: str) -> str:
        return look.message(BadInput("x", "y", fix)).split("Try: ")[1].removesuffix("</div></div>")

    for code in ("mmoe list", "layer=1", "zoo.load('x').card", "--set top_k=1", "twemoji/1F98A", "(0.5, 0.5)"):
        assert tried(code) == f"<code>{escape(code)}</code>"
    assert tried("mmoe demo   (on your own machine)") == "<code>mmoe demo</code> (on your own machine)"
    for words in ("untick one of them", "a fox, a cat", "shorten “a=b c”", "press the button under the list (left)"):
        assert tried(words) == words


def test_words_of_a_visitor_are_quoted_apart() -> None:
    hebrew = "\u05e9\u05dc\u05d5\u05dd"
    page = Family(zoo.list_models(MODEL), ModelStore())
    told = ablate._verdict({hebrew: 0.9, "a fox": 0.1}, {hebrew: 0.2, "a fox": 0.8}, {"x": [0]}, page)
    assert f"from “\u2068{hebrew}\u2069” (90.0" in told and "to “\u2068a fox\u2069” (10.0" in told
    assert look.quoted("a\u2069b\u202ec") == "“\u2068a b c\u2069”", "nothing in the words ends their place"


def test_texts() -> None:
    assert read_texts(" a ,b\n\nb,c ") == ["a", "b", "c"]
    assert clip_moe._with_label("a\nb", "c") == "c\na\nb"
    assert clip_moe._with_label("", "family: man, boy") == "family: man boy"
    assert clip_moe._with_label("a, fox", "fox") == "a, fox"


def test_cards_are_complete() -> None:
    for card in zoo.list_models():
        text = panels.card_text(card)
        assert f"zoo.load({card.name!r})" in text and card.licence in text
        for part in card.components:
            assert part["licence"] in text
        for metric in card.metrics:
            assert metric["provenance"] in text and metric.get("command", "") in text


def test_numbers_say_what_they_are() -> None:
    text = panels.card_text(zoo.card("clip_tiny"))
    assert "in %, mean ± standard deviation" in text and "T2I is text to image" in text
    routing = panels.card_text(zoo.card(MODEL)).split("## Measured routing")[1]
    shares = "  ".join(f"{100 * share:4.1f}" for share in zoo.card(MODEL).routing["layers"][-1]["load"])
    assert "unused  entropy, nats" in routing and shares in routing


@pytest.mark.parametrize(("kind", "ground"), [("", "#ffffff"), ("_dark", "#1e293b")])
def test_boxes_that_are_not_ticked_can_be_seen(kind: str, ground: str) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05

    ratio = luminance(getattr(look.theme(), f"checkbox_border_color{kind}")) / luminance(ground)
    assert max(ratio, 1 / ratio) >= 3


def test_metrics_are_shown_with_their_provenance() -> None:
    metric = {
        "data": "emoji",
        "model": "tiny",
        "R@1": 0.5,
        "R@1 sd": 0.01,
        "provenance": "ours",
        "command": "python -m x",
    }
    layer = {"layer": "text.0", "max_over_mean": 1.2, "dead": [], "entropy": 0.5, "load": [0.4, 0.6]}
    routing = {"data": "emoji", "command": "python -m y", "layers": [layer]}
    text = panels.card_text(replace(zoo.card(MODEL), metrics=(metric,), routing=routing))
    assert "emoji; ours, in %, mean ± standard deviation: python -m x" in text and "50.0±1.0" in text
    assert "Use of the experts on emoji: python -m y" in text and "40.0  60.0" in text
