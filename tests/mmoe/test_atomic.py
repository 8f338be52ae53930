"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mmoe.atomic import atomic_path, atomic_paths, torch_save
from mmoe.errors import BadInput


def test_files_that_belong_together_change_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for text, fails in (("old", False), ("new", True), ("newer", False)):
        synced = iter([None, OSError(28, "No space left on device") if fails else None])

        def fsync(number: int, answers: object = synced) -> None:
            error = next(answers)  # type: ignore[call-overload]  # an iterator
            if error is not None:
                raise error

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            with atomic_paths(*paths) as temporaries:
                for temporary in temporaries:
                    temporary.write_text(text)
        except BadInput:
            assert fails
        told = {path.name: path.read_text() for path in tmp_path.iterdir()}
        assert told == dict.fromkeys("ab", "old" if fails else text)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of a process")
def test_a_checkpoint_on_a_full_disk(tmp_path: Path) -> None:
    torch_save({"a": 1}, tmp_path / "x.pt")
    code = """
import resource, signal, sys, torch
from mmoe.atomic import torch_save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    torch_save({"a": torch.zeros(100_000)}, sys.argv[1])
except Exception as error:
    print(type(error).__name__, str(error).splitlines()[1].strip())
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x.pt"], capture_output=True, text=True, timeout=120)
    assert done.stdout == "BadInput File too large\n", done.stderr
    assert torch.load(tmp_path / "x.pt") == {"a": 1} and [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_other_errors_of_torch_are_its_own(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, TypeError)):
        torch_save({"a": lambda: 0}, tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


def test_links_are_followed_and_what_is_no_file_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link", tmp_path / "there" / "target"
    target.write_text("old")
    link.symlink_to(target)
    with atomic_paths(link) as (temporary,):
        temporary.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for name, wrong in (("pipe", "it is no regular file"), ("there", "it is a folder")):
        with pytest.raises(BadInput, match=wrong), atomic_paths(tmp_path / name):
            pass
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o600)
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o600


def test_two_threads_write_one_file(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=10)

    def write(text: str) -> None:
        with atomic_path(tmp_path / "a.txt") as temporary:
            both.wait()
            temporary.write_text(text)
            both.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ["one", "two"]))
    assert (tmp_path / "a.txt").read_text() in ("one", "two")
