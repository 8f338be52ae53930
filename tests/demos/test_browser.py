"""The gallery in a browser, as a visitor uses it: started by `mmoe demo`, seen at desktop and phone width."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client

import mmoe
import zoo
from demos import clip_moe
from demos.cli import free_port
from mmoe.moe import moe_layers
from tests.demos.conftest import Visit

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

MODEL = "clip_moe_tiny"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a gallery in its own process; it has to end quietly and leave no file behind."""
    folder = tmp_path_factory.mktemp("demo")
    port = free_port("127.0.0.1", 18860)
    environment = {**os.environ, "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("GRADIO_TEMP_DIR", None)
    command = [sys.executable, "-m", "mmoe", "demo", "--no-browser", "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}/"
    try:
        wait_for(url, process)
        yield url
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert f"The gallery runs at {url}" in output and "stopped" in output
    assert "Traceback" not in output and "Warning" not in output, output
    assert list(folder.glob("mmoe-demo-*")) == []


def wait_for(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        try:
            urllib.request.urlopen(url, timeout=30).close()
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    pytest.fail("the gallery did not start")


def percent(probabilities: dict[str, float], most: int) -> dict[str, int]:
    """As the page shows it: the most probable ones, rounded."""
    best = sorted(probabilities.items(), key=lambda pair: -pair[1])[:most]
    return {label: round(100 * share) for label, share in best}


def near(shown: dict[str, int], want: dict[str, int]) -> bool:
    """The same labels with the same percent, up to the rounding of halves."""
    return shown.keys() == want.keys() and all(abs(shown[label] - want[label]) <= 1 for label in want)


def test_a_visit(server: str, browser: Any, shots: Path) -> None:
    visit = Visit(browser, server, 1280, shots)
    page = visit.page
    visit.shot("0_start")
    assert page.locator("#clip_moe-note").inner_text().startswith("Press Compare. The first run takes")
    heights = page.locator("#clip_moe-chooser .tile").evaluate_all("all => all.slice(-2).map(e => e.offsetHeight)")
    assert len(set(heights)) == 1, "tiles of a row are as tall as each other"
    labels = list(clip_moe.examples())
    model = zoo.load(MODEL)
    picture = next(iter(clip_moe.examples().values()))
    before = dict(model.predict(picture, labels).top(len(labels)))

    page.click("#clip_moe-run")
    assert near(visit.shares("#clip_moe-result"), percent(before, 6))
    visit.shot("1_compared")

    page.click("#clip_moe-search")
    page.wait_for_selector("#clip_moe-found .tile")
    assert page.locator("#clip_moe-found .tile").count() == 12
    page.locator("#clip_moe-search").scroll_into_view_if_needed()
    visit.shot("2_searched")

    page.locator("#clip_moe-query input, #clip_moe-query textarea").fill("a red frui")
    page.wait_for_selector("#clip_moe-found .tile", state="detached")

    visit.tab("Routing")
    page.wait_for_selector("#clip_moe-overlay img")
    page.wait_for_selector("#clip_moe-numbers tbody tr")
    assert page.locator("#clip_moe-numbers tbody tr").count() == len(moe_layers(model))
    first = page.locator("#clip_moe-overlay img").get_attribute("src")
    visit.shot("3_routing")
    page.locator("#clip_moe-depth input").nth(1).check()
    page.wait_for_function(
        "old => document.querySelector('#clip_moe-overlay img')?.getAttribute('src') !== old", arg=first
    )

    visit.tab("Ablate")
    page.wait_for_selector("#clip_moe-switches input")
    page.locator("#clip_moe-switches input[data-all='0']").uncheck()
    page.locator("#clip_moe-switches input[data-all='2']").focus()
    page.keyboard.press("Space")
    page.click("#clip_moe-ablate")
    with mmoe.override(model, mmoe.switch_off([2])):
        after = dict(model.predict(picture, labels).top(len(labels)))
    assert near(visit.shares("#clip_moe-after"), percent(after, 5))
    cells = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
    table = page.locator("#clip_moe-difference tbody tr").evaluate_all(cells)
    changes = {label: change for label, _, _, change in table}
    assert changes.keys() == set(labels)
    for label, change in changes.items():
        assert float(change.replace("\N{MINUS SIGN}", "-")) == pytest.approx(
            100 * (after[label] - before[label]), abs=0.02
        )
    visit.shot("4_ablated")

    visit.tab("Card")
    page.get_by_text("zoo.load").wait_for()
    visit.shot("5_card")
    visit.tab("Try")
    page.locator("#clip_moe-labels textarea").fill("a fox")
    page.wait_for_function("document.querySelector('#clip_moe-note').innerText.trim() === 'Press Compare.'")
    visit.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_what_changes_is_in_view(server: str, browser: Any, shots: Path, tmp_path: Path, width: int) -> None:
    visit = Visit(browser, server, width, shots)
    page = visit.page
    labels = page.locator("#clip_moe-labels textarea")
    card = page.locator(".error-card >> visible=true")
    labels.fill(",,, ,")
    page.click("#clip_moe-run")
    card.get_by_text("no label between the commas").wait_for()
    visit.in_view(card)
    visit.shot("10_no_label")
    broken = tmp_path / "broken.png"
    broken.write_bytes(clip_moe.examples()["fox"].read_bytes()[:3000])
    labels.fill("a fox")
    page.set_input_files("#clip_moe-picture input[type=file]", broken)
    page.wait_for_selector("#clip_moe-picture img[src*=broken]")
    page.click("#clip_moe-run")
    card.get_by_text("the file is damaged").wait_for()
    visit.in_view(card)

    page.click("#clip_moe-search")
    page.wait_for_selector("#clip_moe-found .tile")
    page.locator("#clip_moe-found .tile").last.click()
    visit.in_view(page.locator("#clip_moe-picture"))

    visit.tab("Ablate")
    page.wait_for_selector("#clip_moe-switches input")
    visit.choose(1)
    card.get_by_text("not bundled").wait_for()
    visit.in_view(card)
    assert card.count() == 1 and not page.locator("#clip_moe-ablate").is_visible()
    assert not page.locator("#clip_moe-switches").is_visible()
    visit.tab("Routing")
    card.get_by_text("not bundled").wait_for()
    visit.in_view(card)
    assert not page.locator("#clip_moe-overlay").is_visible() and not page.get_by_text("Numbers").is_visible()
    visit.tab("Try")
    page.click("#clip_moe-run")
    card.get_by_text("not bundled").wait_for()
    visit.in_view(card)
    visit.shot("11_no_weights")
    visit.close()


def test_menus_close_when_the_focus_leaves(server: str, browser: Any, shots: Path) -> None:
    visit = Visit(browser, server, 1280, shots)
    page = visit.page
    page.get_by_text("Filter").click()
    for name in ("Drawn by", "Task", "Takes"):
        menu = page.get_by_label(name).first
        shown = menu.input_value()
        menu.focus()
        page.keyboard.type("zz")
        assert menu.get_attribute("aria-expanded") == "true"
        page.keyboard.press("Tab")
        page.wait_for_timeout(300)  # gradio's own handler comes later
        assert menu.get_attribute("aria-expanded") == "false" and menu.input_value() == shown
    page.get_by_label("Drawn by").first.focus()
    for key in ("ArrowDown", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    page.wait_for_function("document.querySelector('#clip_moe-style input').value === 'Noto'", timeout=10_000)
    visit.close()


def test_errors_are_cards(server: str, browser: Any, shots: Path, tmp_path: Path) -> None:
    visit = Visit(browser, server, 1280, shots)
    page = visit.page
    page.locator("#clip_moe-labels textarea").fill("")
    page.click("#clip_moe-run")
    page.get_by_role("alert").get_by_text("There is no label").wait_for()
    page.locator("#clip_moe-labels textarea").fill("<b>fox</b>, a <script>cat</script>")
    page.click("#clip_moe-run")
    assert visit.shares("#clip_moe-result").keys() == {"<b>fox</b>", "a <script>cat</script>"}
    assert page.locator(".error-card").count() == 0
    page.locator("#picker input").nth(1).check()
    page.get_by_role("heading", name="clip_moe_vit_l14").wait_for()
    page.click("#clip_moe-run")
    page.get_by_role("alert").get_by_text("not bundled").wait_for()
    visit.shot("6_error")
    assert page.locator("[data-testid=toast-body]").count() == 0
    visit.close()


def test_on_a_phone(server: str, browser: Any, shots: Path) -> None:
    visit = Visit(browser, server, 390, shots)
    page = visit.page
    visit.shot("0_start")
    assert not page.locator("#picker").is_visible()
    button = page.get_by_role("button", name="Models")
    button.click()
    assert page.locator("#picker").is_visible() and button.get_attribute("aria-expanded") == "true"
    visit.shot("1_models")
    button.click()

    page.locator("#clip_moe-word textarea").fill("whale")
    page.locator("#clip_moe-chooser .tile", has_text="spouting whale").click()
    page.wait_for_function("document.querySelector('#clip_moe-labels textarea').value.startsWith('spouting whale')")
    page.click("#clip_moe-run")
    assert len(visit.shares("#clip_moe-result")) == 6
    visit.shot("2_compared")
    visit.tab("Routing")
    page.wait_for_selector("#clip_moe-numbers tbody tr")
    page.wait_for_selector("#clip_moe-overlay img")
    visit.shot("3_routing")
    visit.tab("Ablate")
    page.wait_for_selector("#clip_moe-switches input")
    page.click("#clip_moe-ablate")
    visit.shares("#clip_moe-after")
    visit.shot("4_ablated")
    visit.tab("Card")
    above = page.locator(".card-text pre").first.evaluate("e => parseFloat(getComputedStyle(e).paddingTop)")
    assert above > page.locator(".card-text .copy_code_button").first.bounding_box()["height"]
    visit.shot("5_card")
    visit.close()


def test_words_of_a_visitor_are_only_words(server: str, browser: Any, shots: Path) -> None:
    visit = Visit(browser, server, 1280, shots)
    page = visit.page
    words = "${document.title = 'run'}", "${", "\\u0041", "`x`", "{{rows}}", "<i>&amp;"
    page.locator("#clip_moe-word textarea").fill(" ".join(words))
    page.locator("#clip_moe-chooser .tiles-empty", has_text=" ".join(words)).wait_for()
    page.locator("#clip_moe-labels textarea").fill("\n".join(words))
    visit.tab("Ablate")
    page.wait_for_selector("#clip_moe-switches input")
    page.click("#clip_moe-ablate")
    page.wait_for_selector("#clip_moe-difference tbody tr")
    found = page.locator("#clip_moe-difference tbody td:first-child").all_inner_texts()
    assert sorted(found) == sorted(words) and page.title() == "mmoe gallery"
    header = page.locator("#clip_moe-difference th").all_inner_texts()
    assert header == ["label", "before, %", "after, %", "change"], "the first update of a table keeps its header"
    visit.close()


def test_results_do_not_outlive_what_they_were_made_from(server: str, browser: Any, shots: Path) -> None:
    visit = Visit(browser, server, 1280, shots)
    page = visit.page
    page.click("#clip_moe-run")
    visit.shares("#clip_moe-result")
    page.locator("#clip_moe-chooser .tile", has_text="pizza").click()
    page.locator("#clip_moe-result", has_text="no result yet").wait_for()
    page.click("#clip_moe-run")
    assert next(iter(visit.shares("#clip_moe-result"))) == "pizza"
    visit.tab("Routing")
    page.wait_for_selector("#clip_moe-overlay img")
    page.locator("#picker input").nth(2).check()
    page.get_by_role("heading", name="clip_tiny").wait_for()
    page.wait_for_selector("#clip_moe-overlay img", state="detached")
    page.get_by_text("no layer has experts").locator("visible=true").wait_for()
    visit.shot("7_other_model")
    page.locator("#picker input").nth(0).check()
    page.get_by_text('Press "Run again".').wait_for()
    visit.tab("Try")
    page.locator("#clip_moe-result", has_text="no result yet").wait_for()
    visit.close()


def test_every_way_to_change_an_input_clears_results(server: str, browser: Any, shots: Path) -> None:
    visit = Visit(browser, server, 1280, shots)
    page = visit.page
    labels = page.locator("#clip_moe-labels textarea")
    blank = page.locator("#clip_moe-result", has_text="no result yet")
    page.click("#clip_moe-search")
    page.wait_for_selector("#clip_moe-found .tile")
    page.get_by_label("Drawn by").nth(1).focus()
    page.keyboard.press("Tab")
    changes = (
        lambda: labels.press("Backspace"),
        lambda: labels.evaluate("e => { e.focus(); e.select(); document.execCommand('insertText', false, 'a, b'); }"),
        page.locator("#clip_moe-found .tile").nth(2).click,
    )
    for change in changes:
        page.click("#clip_moe-run")
        visit.shares("#clip_moe-result")
        change()
        blank.wait_for()
    assert page.locator("#clip_moe-found .tile").count() == 12, "leaving a menu changes nothing"
    visit.tab("Ablate")
    page.wait_for_selector("#clip_moe-switches input")
    page.click("#clip_moe-ablate")
    visit.shares("#clip_moe-after")
    page.locator("#clip_moe-switches input[data-all='3']").check()
    page.locator("#clip_moe-after", has_text="no result yet").wait_for()
    visit.close()


# Notes in `window.stale` whether a result with the first labels was ever shown.
WATCH = """() => new MutationObserver(() => {
  window.stale ||= document.querySelector('#clip_moe-result').innerText.includes('dog face');
}).observe(document.querySelector('#clip_moe-result'), {subtree: true, childList: true, characterData: true})"""


def test_a_run_that_has_not_ended_is_dropped_with_its_inputs(server: str, browser: Any, shots: Path) -> None:
    visit = Visit(browser, server, 1280, shots)
    page = visit.page
    page.evaluate(WATCH)
    page.click("#unload")
    page.locator("#status", has_text="none").wait_for()  # so that the run has to load the model first
    with page.expect_response(lambda answer: "dog face" in (answer.request.post_data or "")):
        page.click("#clip_moe-run")
    page.locator("#clip_moe-labels textarea").fill("a zebra")
    page.locator("#clip_moe-result", has_text="no result yet").wait_for()
    page.evaluate("window.stale = false")  # what came before the labels changed was not stale
    page.click("#clip_moe-run")  # waits for the run before
    assert visit.shares("#clip_moe-result") == {"a zebra": 100}
    assert not page.evaluate("window.stale")
    other = Visit(browser, server, 1280, shots)
    other.page.locator("#status", has_text=MODEL).wait_for()
    other.close()
    visit.close()


@pytest.mark.parametrize("ended", [False, True])
def test_a_run_is_dropped_that_the_server_has_not_numbered(server: str, browser: Any, shots: Path, ended: bool) -> None:
    visit = Visit(browser, server, 1280, shots)
    page = visit.page
    page.evaluate(WATCH)
    page.click("#unload")
    page.locator("#status", has_text="none").wait_for()  # so that the run has to load the model first
    held: list[Any] = []

    def hold(route: Any) -> None:
        if not held and "dog face" in route.request.post_data:
            held.extend((route, route.fetch()))
        else:
            route.continue_()

    page.route("**/queue/join*", hold)
    page.click("#clip_moe-run")
    with page.expect_response(lambda answer: "a zebra" in (answer.request.post_data or "")):
        page.locator("#clip_moe-labels textarea").fill("a zebra")
    if ended:
        Client(server, verbose=False, analytics_enabled=False).predict(MODEL, api_name="/load")  # waits for the run
    route, numbered = held
    with page.expect_response("**/cancel"):
        route.fulfill(response=numbered)
    page.click("#clip_moe-run")
    assert visit.shares("#clip_moe-result") == {"a zebra": 100}
    assert not page.evaluate("window.stale")
    visit.close()


# The page's look at the number of a run waits until `window.release` is called.
SLOW_NUMBER = """() => {
  const send = window.fetch, go = new Promise(resolve => { window.release = resolve; });
  window.fetch = async (address, options) => {
    const answer = await send(address, options);
    if (String(address).includes('/queue/join')) {
      const read = answer.json.bind(answer);
      answer.json = async () => { window.held = true; await go; return read(); };
    }
    return answer;
  };
}"""


@pytest.mark.parametrize("ended", [False, True])
def test_a_run_is_dropped_whose_number_the_page_has_not_read(
    server: str, browser: Any, shots: Path, ended: bool
) -> None:
    visit = Visit(browser, server, 1280, shots)
    page = visit.page
    page.evaluate(WATCH)
    page.click("#unload")
    page.locator("#status", has_text="none").wait_for()  # so that the run has to load the model first
    page.evaluate(SLOW_NUMBER)
    page.click("#clip_moe-run")
    page.wait_for_function("window.held")
    if ended:
        Client(server, verbose=False, analytics_enabled=False).predict(MODEL, api_name="/load")  # waits for the run
    with page.expect_response("**/cancel"):
        page.locator("#clip_moe-labels textarea").fill("a zebra")
    page.evaluate("window.release()")
    page.click("#clip_moe-run")
    assert visit.shares("#clip_moe-result") == {"a zebra": 100}
    assert not page.evaluate("window.stale")
    visit.close()


def test_forgetting_late_does_not_clear_what_came_after(server: str, browser: Any, shots: Path) -> None:
    visit = Visit(browser, server, 1280, shots)
    page = visit.page
    card = page.get_by_role("alert").get_by_text("no label between the commas")
    held: list[Any] = []

    def hold(route: Any) -> None:
        if ",,, ," in route.request.post_data:
            held.append(route)
        else:
            route.continue_()

    page.route("**/run/predict*", hold)
    page.locator("#clip_moe-labels textarea").fill(",,, ,")
    page.click("#clip_moe-run")
    page.wait_for_timeout(1000)
    assert len(held) == 1
    with page.expect_response("**/run/predict*"):
        held[0].continue_()
    card.wait_for()
    page.wait_for_timeout(500)
    assert card.is_visible()
    visit.close()


def test_the_ablate_tab_follows_the_model(server: str, browser: Any, shots: Path) -> None:
    visit = Visit(browser, server, 1280, shots)
    page = visit.page
    boxes = page.locator("#clip_moe-switches input")
    for other in (1, 0):  # before the tab was ever open
        page.locator("#picker input").nth(other).check()
        page.get_by_role("heading", name=("clip_moe_tiny", "clip_moe_vit_l14")[other]).wait_for()
    visit.tab("Ablate")
    boxes.first.wait_for()
    page.locator("#picker input").nth(2).check()
    page.get_by_text("no layer has experts").locator("visible=true").wait_for()
    assert not page.locator("#clip_moe-ablate").is_visible()
    visit.shot("9_dense")
    page.locator("#picker input").nth(1).check()
    page.get_by_role("alert").get_by_text("not bundled").wait_for()
    assert boxes.count() == 0
    page.locator("#picker input").nth(0).check()
    boxes.first.wait_for()
    page.click("#unload")
    page.locator("#status", has_text="clip_moe_tiny").wait_for(state="detached")
    page.locator("#picker input").nth(2).check()
    page.locator("#picker input").nth(0).check()
    assert boxes.count() == 0, "no switches while the model loads"
    boxes.first.wait_for()
    visit.close()


def test_labels_break_between_words_first(server: str, browser: Any, shots: Path) -> None:
    visit = Visit(browser, server, 390, shots)
    page = visit.page
    page.locator("#clip_moe-labels textarea").fill(f"airplane, spouting whale, counterclockwise, {'x' * 200}")
    visit.tab("Ablate")
    page.wait_for_selector("#clip_moe-switches input")
    page.click("#clip_moe-ablate")
    page.wait_for_selector("#clip_moe-after .confidence-set")
    page.locator("#clip_moe-after").scroll_into_view_if_needed()
    visit.shot("8_labels")
    lines = "e => e.getBoundingClientRect().height / parseFloat(getComputedStyle(e).lineHeight)"
    for long in (
        page.locator("#clip_moe-after .confidence-set .text", has_text="xxx"),
        page.locator("#clip_moe-difference td div", has_text="xxx"),
    ):
        assert long.first.evaluate(lines) < 3.2, "a long label takes three lines"
    assert page.locator("#clip_moe-difference td div", has_text="xxx").get_attribute("title") == "x" * 200
    name = page.locator("#clip_moe-after .confidence-set .text", has_text="airplane").first
    assert name.evaluate(lines) < 1.7, "a word of eight letters stays on one line"
    panel = page.locator("#clip_moe-after").bounding_box()
    for share in page.locator("#clip_moe-after .confidence-set .confidence").all():
        box = share.bounding_box()
        assert box["x"] + box["width"] <= panel["x"] + panel["width"], "every percentage is inside the panel"
    change = page.locator("#clip_moe-difference th").last.bounding_box()
    assert change["x"] + change["width"] <= 390, "the change is in view"
    for cut in ("#clip_moe-after .output-class", "#clip_moe-difference .scroll"):
        assert page.locator(cut).evaluate("e => e.scrollWidth <= e.clientWidth")
    visit.close()
