"""The processes that tests run in tell how they end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import processes


def test_what_a_script_writes_and_its_exit_code(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd()); print('oh', file=sys.stderr); sys.exit(3)"
    done = processes.script(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{tmp_path}\n", "oh\n")
    assert not list(tmp_path.iterdir())


def test_one_that_is_killed_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_there", dies)
    assert processes.command(["list"], tmp_path).returncode == 5


def test_one_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SECONDS", 5)
    code = "import sys, time; print('waits', file=sys.stderr, flush=True); time.sleep(60)"
    with pytest.raises(TimeoutError, match="more than 5 s") as error:
        processes.script(code, tmp_path)
    assert error.value.__notes__ == ["waits\n"] and not list(tmp_path.iterdir())


def dies(*_: object) -> None:
    raise SystemExit(5)
