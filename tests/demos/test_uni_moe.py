"""Uni-MoE's page of the gallery with small random models: replies as in Python, streams, routing, ablation."""

from __future__ import annotations

import json
import string
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from gradio_client import Client, handle_file
from PIL import Image
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

import mmoe
import zoo
from demos import record, uni_moe
from demos.endpoints import endpoint, in_one_thread
from demos.family import keep
from demos.recordings import recordings
from demos.store import quiet
from mmoe.errors import BadInput
from tests.demos.conftest import MadeStore, Visit, served
from zoo import registry
from zoo.sounds import read_sound
from zoo.uni_moe.model import UniMoE, UniMoEConfig

MODEL, DEAF = "uni_moe_tiny", "uni_moe_deaf"
VISION = {"width": 16, "layers": 2, "heads": 2, "ffn_dim": 24, "image_size": 56, "patch_size": 14}
SPEECH = {"width": 16, "layers": 1, "heads": 2, "ffn_dim": 24, "resampler_layers": 1, "mels": 80, "positions": 50}
SOUND = {"embed_dim": 8, "width": 16, "ffn_dim": 24, "layers": 1, "heads": 2, "conv_pos": 8, "conv_pos_groups": 4}
SOUND |= {"buckets": 16, "max_distance": 40, "resampler_width": 16, "resampler_layers": 2, "resampler_heads": 2}
SIZES: dict[str, Any] = {"width": 32, "layers": 3, "heads": 4, "ffn_dim": 48, "positions": 1024, "num_experts": 4}
BRANCHES: dict[str, Any] = {
    "vision": VISION,
    "speech": {**SPEECH, "words": 16},
    "sound": {**SOUND, "resampler_ffn_dim": 24},
}


def build(folder: Path, **options: Any) -> UniMoE:
    """A small model with random weights that writes signs with spaces between them."""
    signs = ["<unk>", "<|im_start|>", "<|im_end|>", *string.printable]
    words = Tokenizer(WordLevel({sign: number for number, sign in enumerate(signs)}, unk_token="<unk>"))
    words.pre_tokenizer = Split(Regex(r"<\|im_(start|end)\|>|."), "isolated")
    words.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    words.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    told = {"vocab_size": len(signs), "tokenizer": str(folder / "tokenizer.json"), "template": "chatml", "queries": 8}
    model = UniMoE(UniMoEConfig(**{**SIZES, **BRANCHES, **told, **options})).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".experts." in name or "router" in name:
                value.normal_(std=0.3)  # so that experts count
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> UniMoE:
    return build(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def cards() -> Iterator[None]:
    """Cards of models that hear both, or nothing, beside the family's own."""
    known = registry._cards()
    own = zoo.card("uni_moe_speech")
    heard = replace(own, name=MODEL, modalities=("text", "image", "video", "speech", "sound"))
    deaf = replace(own, name=DEAF, modalities=("text", "image"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_cards", lambda: {**known, MODEL: heard, DEAF: deaf})
        yield


@pytest.fixture(scope="module")
def server(model: UniMoE, cards: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    other = build(tmp_path_factory.mktemp("other"), speech=None, sound=None)
    store = MadeStore({MODEL: lambda: model, DEAF: lambda: other})
    with served(store, tmp_path_factory.getbasetemp() / "gradio", MODEL) as running:
        yield running


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies of 24 tokens."""
    monkeypatch.setattr(uni_moe, "MOST_TOKENS", 24)
    monkeypatch.setitem(UniMoE.predict.__kwdefaults__, "max_new_tokens", 24)


@pytest.fixture
def page(server: SimpleNamespace) -> uni_moe.Page:
    return uni_moe.Page(zoo.list_models(family="uni_moe"), server.store)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (90, 60), "orange").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def tone(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "tone.ogg", 0.4 * np.sin(np.arange(12_000) / 5), 8_000)
    return tmp_path / "tone.ogg"


def said(chat: list[dict[str, Any]]) -> list[str]:
    """Words of the messages that a client gets."""
    return [
        one["content"] if isinstance(one["content"], str) else "".join(part["text"] for part in one["content"])
        for one in chat
    ]


def test_replies_equal_the_python_api(client: Client, model: UniMoE, photo: Path, tone: Path, brief: None) -> None:
    error, chat, turns, _, told = client.predict(
        MODEL, "What is it?", handle_file(photo), handle_file(tone), "sound", [], api_name="/uni_moe_chat"
    )
    want = model.predict("What is it?", image=photo, sound=tone).text
    assert error == "" and turns == ["What is it?", want] and said(chat) == turns and "Written in" in told
    again = client.predict(MODEL, "And now?", handle_file(photo), None, "sound", turns, api_name="/uni_moe_chat")[2]
    assert again == [*turns, "And now?", model.predict([*turns, "And now?"], image=photo).text]
    assert want != model.predict("What is it?", image=photo, speech=tone).text


def test_the_usual_question_is_asked_where_there_is_none(client: Client, photo: Path, tone: Path) -> None:
    def asked(*given: Any) -> str:
        return client.predict(MODEL, " ", *given, "speech", [], api_name="/uni_moe_chat")[2][0]

    assert asked(handle_file(photo), handle_file(tone)) == "What is this?"
    assert asked(None, handle_file(tone)) == "What is said?"
    assert asked(None, None) == "Say something."


def test_words_come_one_after_the_other(page: uni_moe.Page, model: UniMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uni_moe.steadily, "__defaults__", (0.0,))
    picture = Image.new("RGB", (60, 60), "red")
    steps = list(page.chat(quiet, MODEL, "Hi", picture, None, "speech", []))
    replies = [step[0][-1]["content"] for step in steps]
    assert replies[0] == "…" and len(steps) > 10
    assert all(later.startswith(former) for former, later in pairwise(replies[1:-1]))
    assert replies[-1] == steps[-1][1][-1] == model.predict("Hi", image=picture).text
    assert steps[0][2] == "", "the box is empty at once"


def test_a_run_that_is_dropped_stops_writing(page: uni_moe.Page, model: UniMoE) -> None:
    written: list[int] = []
    hook = model.llm.lm_head.register_forward_hook(lambda *_: (written.append(1), time.sleep(0.02))[0])
    steps = page.chat(quiet, MODEL, "Hi", None, None, "speech", [])
    for _ in range(3):
        next(steps)
    steps.close()
    count = len(written)
    time.sleep(0.2)
    hook.remove()
    assert count == len(written) < uni_moe.MOST_TOKENS
    with page.use(MODEL, quiet):
        pass  # the models are free


def test_an_event_that_is_cancelled_frees_the_models(client: Client, server: SimpleNamespace, model: UniMoE) -> None:
    hook = model.llm.lm_head.register_forward_hook(lambda *_: time.sleep(0.05))
    job = client.submit(MODEL, "Hi", None, None, "speech", [], api_name="/uni_moe_chat")
    for _ in job:
        break
    began = time.perf_counter()
    job.cancel()
    hook.remove()
    turns = client.predict(MODEL, "Ho", None, None, "speech", [], api_name="/uni_moe_chat")[2]
    assert turns[0] == "Ho" and time.perf_counter() - began < 5


def test_routing_shows_every_modality(
    client: Client, page: uni_moe.Page, model: UniMoE, photo: Path, tone: Path
) -> None:
    turns = ["Hi", "Ho"]
    given = ("", handle_file(photo), handle_file(tone), "speech", turns)
    error, about, layers, picture, texts, load, heatmap, table = client.predict(
        2, MODEL, *given, api_name="/uni_moe_routing"
    )
    assert error == "" and "each token goes to 2 of 4 experts" in about and "Experts tell most about" in about
    assert layers["choices"] == [[str(depth), depth] for depth in (1, 2, 3)]
    assert Image.open(picture).width >= 480 and load["type"] == heatmap["type"] == "matplotlib"
    assert [row[0] for row in table["props"]["rows"]] == ["layer 1", "layer 2", "layer 3"]
    inputs = page.read("", str(photo), str(tone), "speech", turns)
    batch = page.batch(model, inputs)
    with torch.no_grad(), mmoe.trace(model) as routing:
        kinds = model(**batch).spliced.modality
    found = record.record_routing(model, lambda: page.observe(model, inputs), batch, None, MODEL)[1]
    counts = record.modality_counts(found, 2)
    assert list(counts) == ["text", "image", "speech"]
    want = mmoe.group_counts(routing[1], kinds)
    for name, number in (("text", 0), ("image", 1), ("speech", 2)):
        assert torch.equal(counts[name], want[number])
    told, most = record.information(found, 2)
    assert told == pytest.approx(mmoe.mutual_information(want)) and 0 < told < most
    assert Image.open(texts).height > Image.open(texts).width / 4, "text and speech, one below the other"
    (text, *_) = found.views
    assert "".join(text.tokens[0]).count("Ho") == 1, "the reply is a part of what is shown"


def test_routing_without_media_is_of_the_text_alone(client: Client) -> None:
    error, about, _, picture, texts, *_ = client.predict(
        1, MODEL, "Hi", None, None, "speech", [], api_name="/uni_moe_routing"
    )
    assert error == "" and picture is None and Image.open(texts).width >= 400 and "tell most" not in about


def test_ablation_compares_replies(client: Client, page: uni_moe.Page, model: UniMoE, photo: Path) -> None:
    error, switches = client.predict(MODEL, api_name="/uni_moe_layers")
    assert error == "" and [row["name"] for row in switches["props"]["rows"]] == ["layer 1", "layer 2", "layer 3"]
    off = {"llm.model.layers.*": [0, 3]}
    error, verdict, first, then, table = client.predict(
        json.dumps(off), MODEL, "What is it?", handle_file(photo), None, "speech", [], api_name="/uni_moe_ablate"
    )
    before = model.predict("What is it?", image=photo).text
    with mmoe.override(model, {"llm.model.layers.*": mmoe.switch_off([0, 3])}):
        after = model.predict("What is it?", image=photo).text
        logs, sizes = model.reply_likelihoods([before, after], "What is it?", image=photo)
    assert before != after and error == ""
    assert "6 experts switched off in 3 layers: the reply changes from" in verdict and "geometric mean" in verdict
    assert (first["label"], then["label"]) == (before, after)
    found = {one["label"]: one["confidence"] for one in then["confidences"]}
    want = dict(zip((before, after), (logs / sizes).exp().tolist(), strict=True))
    assert found == pytest.approx(want, abs=1e-4) and {one["label"] for one in first["confidences"]} == set(want)
    assert {row[0] for row in table["props"]["rows"]} == set(want)


def test_ablation_goes_on_from_the_last_question(page: uni_moe.Page) -> None:
    turns = ["Hi", "Ho", "Who?", "Me."]
    (asked,) = page.read("", None, None, "speech", turns)
    assert asked.question == ["Hi", "Ho", "Who?"] and asked.turns == tuple(turns)
    (asked,) = page.read("Why?", None, None, "speech", turns)
    assert asked.question == [*turns, "Why?"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"question": "x" * 2001}, "question of 2001 characters"),
        ({"kind": "music"}, "music"),
        ({"turns": ["Hi"]}, "a question has no reply"),
        ({"turns": {"a": 1}}, "a list of texts"),
        ({"turns": ["a"] * 40}, "too long"),
        ({"model": DEAF}, "built without that branch"),
        ({"model": "clip_moe_tiny"}, "on this page"),
    ],
)
def test_mistakes_become_cards(client: Client, tone: Path, changed: dict[str, Any], reason: str) -> None:
    given = {"model": MODEL, "question": "Hi", "image": None, "recording": handle_file(tone), "kind": "speech"}
    given |= {"turns": [], **changed}
    for name, before in (("chat", ()), ("routing", (1,)), ("ablate", ('{"*": [0]}',))):
        error = client.predict(*before, *given.values(), api_name=f"/uni_moe_{name}")[0]
        assert reason in error and 'class="error-card"' in error


def test_bad_recordings_become_cards(client: Client, tmp_path: Path, tone: Path) -> None:
    broken, empty, long = tmp_path / "broken.flac", tmp_path / "empty.wav", tmp_path / "long.flac"
    broken.write_bytes(b"no sound")
    empty.touch()
    soundfile.write(long, np.zeros(1000 * 601, dtype=np.int16), 1000)
    for path, reason in (
        (broken, "Format not recognised"),
        (empty, "no bytes"),
        (long, "longer than the 10.0 minutes"),
    ):
        error = client.predict(MODEL, "Hi", None, handle_file(path), "speech", [], api_name="/uni_moe_chat")[0]
        assert reason in error and path.name in error and str(tmp_path) not in error and "gradio" not in error


def test_recordings_are_offered(client: Client) -> None:
    for kind in ("speech", "sound"):
        offered = recordings(kind)
        assert len({one.name for one in offered}) == len(offered) > 4
        (rate, samples), told = offered[0].read()
        assert told == kind and 0.4 <= len(samples) / rate <= 3.7 and np.abs(samples).max() > 500
        assert offered[0].drawn is not None and len(offered[0].drawn().getcolors() or []) == 2
        error, path, shown = client.predict(offered[0].id, api_name="/uni_moe_pick_recording")
        assert error == "" and shown == kind
        assert len(read_sound(path)) == pytest.approx(16_000 * len(samples) / rate, abs=2)
    error = client.predict("speech/none", api_name="/uni_moe_pick_recording")[0]
    assert "there is no recording" in error.lower() and "speech/" in error


def test_an_error_while_a_reply_is_written_keeps_the_conversation(page: uni_moe.Page, tone: Path) -> None:
    steps = page.chat(quiet, DEAF, "Hi", None, str(tone), "speech", ["a", "b"])
    shown = [next(steps), next(steps)]
    assert [one["content"] for one in shown[0][0]] == ["a", "b", "Hi", "…"]
    assert [one["content"] for one in shown[1][0]] == ["a", "b"] and shown[1][2] == "Hi", "the question is back"
    with pytest.raises(BadInput):
        next(steps)


def test_an_unexpected_error_keeps_the_conversation_too(
    page: uni_moe.Page, model: UniMoE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "stream", lambda *_, **__: iter([1 / 0 for _ in range(1)]))
    *_, last = shown_before(page.chat(quiet, MODEL, "Hi", None, None, "speech", ["a", "b"]), ZeroDivisionError)
    assert [one["content"] for one in last[0]] == ["a", "b"] and last[2] == "Hi"


def shown_before(steps: Iterator[Any], error: type[Exception]) -> list[Any]:
    """Steps up to an error."""
    shown: list[Any] = []
    with pytest.raises(error):
        shown.extend(steps)
    return shown


def test_steps_are_made_by_one_thread_and_closed() -> None:
    import threading

    seen, closed = [], threading.Event()

    def work(note: Any) -> Iterator[int]:
        try:
            for number in range(1000):
                seen.append(threading.get_ident())
                yield number
                time.sleep(0.01)
        finally:
            closed.set()

    steps = endpoint(work, [], lambda model: keep(1, model), False, None)()
    assert [next(steps) for _ in range(3)] == [["", number] for number in range(3)]
    steps.close()
    assert closed.wait(2) and len(set(seen)) == 1 and seen[0] != threading.get_ident() and len(seen) < 100


def test_errors_of_steps_become_cards() -> None:
    def work(note: Any) -> Iterator[int]:
        yield 1
        raise BadInput("do this", "it is wrong", "that")

    steps = list(endpoint(work, [], lambda model: [None], False, None)())
    assert steps[0] == ["", 1] and "error-card" in steps[1][0] and steps[1][1] is None
    with pytest.raises(ZeroDivisionError):
        list(in_one_thread(lambda: (1 // (2 - number) for number in range(5))))


@pytest.mark.browser
@pytest.mark.timeout(300)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_visit(
    server: SimpleNamespace, model: UniMoE, browser: Any, shots: Path, photo: Path, tone: Path, width: int, brief: None
) -> None:
    visit = Visit(browser, server.url, width, shots, "#uni_moe-run")
    page = visit.page
    visit.shot("uni_moe_0_start")
    page.set_input_files("#uni_moe-picture input[type=file]", photo)
    page.wait_for_selector("#uni_moe-picture img[src*=photo]")
    page.set_input_files("#uni_moe-recording input[type=file]", tone)
    page.wait_for_selector("#uni_moe-recording #waveform")
    page.get_by_label("sound", exact=True).check()
    page.fill("#uni_moe-question textarea", "What is it?")
    want = model.predict("What is it?", image=photo, sound=tone).text  # before the page runs the same model
    page.click("#uni_moe-run")
    page.get_by_text("Written in").wait_for()
    assert page.locator("#uni_moe-chat .bot").last.inner_text().split() == want.split()
    assert page.locator("#uni_moe-question textarea").input_value() == ""
    visit.shot("uni_moe_1_reply")
    page.fill("#uni_moe-question textarea", "And now?")
    page.press("#uni_moe-question textarea", "Enter")
    page.get_by_text("And now?").wait_for()
    page.get_by_text("Written in").wait_for()
    assert page.locator("#uni_moe-chat .bot").last.is_visible()
    visit.shot("uni_moe_2_turns")
    visit.tab("Routing")
    page.wait_for_selector("#uni_moe-overlay img")
    page.wait_for_selector("#uni_moe-numbers tbody tr")
    visit.shot("uni_moe_3_routing")
    visit.tab("Ablate")
    page.wait_for_selector("#uni_moe-switches input")
    page.click("#uni_moe-ablate")
    page.get_by_text("the reply").wait_for()
    assert visit.shares("#uni_moe-after")
    visit.shot("uni_moe_4_ablated")
    visit.tab("Try")
    page.get_by_role("button", name="Pick a recording").click()
    page.locator("#uni_moe-recording-chooser button[data-id^='speech/']").first.click()
    page.get_by_text("Nothing was said yet.").wait_for()
    page.wait_for_function("document.querySelector('#uni_moe-kind input:checked')?.value === 'speech'")
    page.wait_for_selector("#uni_moe-recording #waveform")
    visit.shot("uni_moe_5_picked")
    page.fill("#uni_moe-question textarea", "Well?")
    page.click("#uni_moe-run")
    page.get_by_text("Written in").wait_for()
    page.click("#uni_moe-clear")
    page.get_by_text("Nothing was said yet.").wait_for()
    visit.choose(DEAF)
    page.get_by_role("heading", name=DEAF).wait_for()
    page.wait_for_selector("#uni_moe-recording", state="hidden")
    visit.close()


@pytest.mark.browser
def test_a_reply_that_is_cleared_stops(
    server: SimpleNamespace, model: UniMoE, browser: Any, shots: Path, photo: Path, tmp_path: Path
) -> None:
    written: list[int] = []
    slow = model.llm.lm_head.register_forward_hook(lambda *_: (written.append(1), time.sleep(0.08))[0])
    visit = Visit(browser, server.url, 390, shots, "#uni_moe-run")
    page, nothing = visit.page, visit.page.get_by_text("Nothing was said yet.")
    clear = (lambda: page.click("#uni_moe-clear"), lambda: page.set_input_files("#uni_moe-picture input", photo))
    for drop in clear:
        page.fill("#uni_moe-question textarea", "Hi")
        page.click("#uni_moe-run")
        page.wait_for_function("document.querySelector('#uni_moe-chat .bot')?.innerText.length > 4")
        drop()
        nothing.wait_for()
        page.wait_for_timeout(500)
        count = len(written)
        page.wait_for_timeout(500)
        assert len(written) == count, "nobody writes on"
        assert nothing.is_visible() and page.get_by_text("Picture and recording belong").is_visible()
    slow.remove()
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    page.set_input_files("#uni_moe-recording input[type=file]", tmp_path / "broken.wav")
    page.wait_for_selector("#uni_moe-recording button[aria-label*=Clear], #uni_moe-recording #waveform")
    page.fill("#uni_moe-question textarea", "Hi")
    page.click("#uni_moe-run")
    page.get_by_text("Format not recognised").wait_for()
    assert page.locator("#uni_moe-question textarea").input_value() == "Hi", "the question is kept"
    visit.shot("uni_moe_6_error")
    visit.faults = [one for one in visit.faults if not one.startswith("Waveform")]  # of the player
    visit.close()
