"""What all tests share: the repository's root, seeds, folders of their own, and whether there is a browser."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # of each process; several share the cores

# Read by torch and by the numeric libraries when they are imported, in this process and in those the tests start.
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("MPLBACKEND", "Agg")


def find_chromium() -> str | None:
    """Path of a browser that playwright can drive: $MMOE_CHROMIUM or the first one on the path."""
    named = os.environ.get("MMOE_CHROMIUM")
    return named or next(filter(None, map(shutil.which, BROWSERS)), None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("browser") is None or find_chromium() is not None:
        return
    reason = f"no browser found ({', '.join(BROWSERS)}); run: make programs"
    if os.environ.get("CI", "").lower() in ("1", "true", "yes"):
        pytest.fail(f"CI has to run the browser tests: {reason}", pytrace=False)
    pytest.skip(reason)


def pytest_collection_finish() -> None:
    import tests.frozen  # noqa: F401  (what it does, it does when it is imported)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers for each test, whatever ran before. A test that needs no torch does not pay for it."""
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)
        if torch.get_num_threads() != THREADS:
            torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches and uploads of the tests stay out of the user's folders."""
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("MMOE_HOME", str(base / "mmoe_home"))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(base / "gradio"))
    for name in ("MMOE_DEBUG", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser; for tests marked `browser`."""
    path = find_chromium()
    assert path is not None, "mark the test with @pytest.mark.browser"
    return path
