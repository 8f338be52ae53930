"""Galleries for the tests: served on this machine, and with models that were made for the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from demos import app as gallery
from demos.cli import free_port
from demos.store import Loaded, ModelStore, Note


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
