"""Galleries for the tests: served on this machine, with models that were made for the test, and seen in a browser.

Screenshots go to $MMOE_SCREENSHOTS, or to the test's temporary folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gradio_client import Client

from demos import app as gallery
from demos.cli import free_port
from demos.store import Loaded, ModelStore, Note

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT = 120_000  # milliseconds, for a machine that is busy with other things


class MadeStore(ModelStore):
    """A store whose models are made, not loaded.

    Args:
        made: what makes a model, by name.
    """

    def __init__(self, made: dict[str, Callable[[], Any]]) -> None:
        super().__init__()
        self.made = made

    def _load(self, name: str, note: Note, fetch: bool) -> None:
        self._loaded[name] = Loaded(self.made[name]())


@contextmanager
def served(store: ModelStore, folder: Path, selected: str | None = None) -> Iterator[SimpleNamespace]:
    """The gallery on a free port of this machine, as `mmoe demo` starts it.

    Args:
        store: of its models.
        folder: for uploads, the one that every test has.
        selected: model that is shown first.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        app = gallery.build(selected, store=store)
        _, url, _ = app.launch(
            server_name="127.0.0.1",
            server_port=free_port("127.0.0.1", 17860),
            prevent_thread_lock=True,
            **gallery.launch_options(),
        )
        yield SimpleNamespace(app=app, store=store, url=url)
        app.close(verbose=False)


@pytest.fixture
def client(server: SimpleNamespace, tmp_path: Path) -> Client:
    """A visitor's program, of the server of a test's module."""
    return Client(server.url, verbose=False, analytics_enabled=False, download_files=str(tmp_path))


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield running
        running.close()


class Visit:
    """A page with what went wrong in it.

    Args:
        browser: to open it in.
        url: of the gallery.
        width: of the window.
        shots: folder for screenshots.
        ready: what is there once the page is.
    """

    def __init__(self, browser: Any, url: str, width: int, shots: Path, ready: str = "#clip_moe-run") -> None:
        self.width, self.shots = width, shots
        self.context = browser.new_context(viewport={"width": width, "height": 860})
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.faults: list[str] = []
        self.outside: list[str] = []
        self.page.on("console", lambda line: self.faults.append(line.text) if line.type == "error" else None)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda asked: self._note(asked.url, url))
        self.refused: list[Any] = []
        self.page.on("response", lambda answer: self.refused.append(answer) if answer.status >= 400 else None)
        self.page.goto(url)
        self.page.wait_for_selector(ready)

    def _note(self, asked: str, url: str) -> None:
        if not asked.startswith((url, "data:", "blob:")):
            self.outside.append(asked)

    def shot(self, name: str) -> None:
        """A picture of the whole page; nothing may stick out of it."""
        self.page.screenshot(path=self.shots / f"{self.width}_{name}.png", full_page=True)
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.width

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def choose(self, model: int | str) -> None:
        """A model of the list by its place or name; the list is folded on a phone."""
        unfold = self.page.get_by_role("button", name="Models")
        if unfold.is_visible():
            unfold.click()
        choices = self.page.locator("#picker input")
        chosen = choices.nth(model) if isinstance(model, int) else self.page.locator(f"#picker input[value='{model}']")
        chosen.check()

    def in_view(self, what: Any) -> None:
        """Waits until the whole of an element is in the window."""
        inside = "e => { const at = e.getBoundingClientRect(); return at.top >= -1 && at.bottom <= innerHeight + 1; }"
        self.page.wait_for_function(inside, arg=what.first.element_handle(), timeout=10_000)

    def shares(self, where: str) -> dict[str, int]:
        """Percent by label, as shown."""
        self.page.wait_for_selector(f"{where} .confidence-set")
        lines = self.page.locator(f"{where} .confidence-set").all_inner_texts()
        found = [re.fullmatch(r"(.+?)\s+(\d+)%", line.strip(), re.DOTALL) for line in lines]
        return {one[1].strip(): int(one[2]) for one in found if one}

    def close(self) -> None:
        told = [f"{one.status} {one.request.post_data} {one.text()}" for one in self.refused]
        self.context.close()
        assert told == [] and self.faults == [] and self.outside == []


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("MMOE_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
