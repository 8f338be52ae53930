"""The processes that tests run in tell how they end."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tests import processes


def test_what_a_command_writes_and_its_exit_code(tmp_path: Path) -> None:
    done = processes.command(["info", "clip_moe_tiny", "--json"], tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["name"] == "clip_moe_tiny" and not done.stderr
    done = processes.command(["info", "clip_moe_tin"], tmp_path)
    assert done.returncode == 2 and not done.stdout and done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_one_that_is_killed_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_there", dies)
    assert processes.command(["list"], tmp_path).returncode == 5


def test_one_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SECONDS", 5)
    monkeypatch.setattr(processes, "_mmoe", waits)
    with pytest.raises(TimeoutError, match="more than 5 s") as error:
        processes.command(["list"], tmp_path)
    assert error.value.__notes__ == ["waits\n"] and not list(tmp_path.iterdir())


def dies(*_: object) -> None:
    raise SystemExit(5)


def waits(*_: object) -> None:
    print("waits", file=sys.stderr, flush=True)
    time.sleep(60)
