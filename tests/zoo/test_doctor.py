"""`mmoe doctor`: finds what is broken, says how to mend it, and ends with 1 then."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import zoo
from mmoe.errors import BadInput
from zoo import assets, doctor, registry
from zoo.packages import file_sha256


@pytest.fixture
def checks(run: Any) -> Any:
    """Findings by name, and the exit code."""

    def look() -> tuple[dict[str, Any], int]:
        done = run("doctor", "--json")
        assert done.json["ok"] == (done.code == 0)
        return {check["name"]: check for check in done.json["checks"]}, done.code

    return look


@pytest.fixture(autouse=True)
def _pinned_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards with the right checksum, whatever state the bundled weights are in."""
    cards = {}
    for card in zoo.list_models():
        weights = {
            tag: replace(w, sha256=file_sha256(assets.asset(w.source.removeprefix("bundled:"))))
            for tag, w in card.weights.items()
            if w.source.startswith("bundled:")
        }
        cards[card.name] = replace(card, weights={**card.weights, **weights})
    monkeypatch.setattr(registry, "_cards", lambda: cards)


def test_a_sound_installation(checks: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    zoo.list_models()  # the first reading in a process keeps the cards in the folder
    shutil.rmtree(tmp_path / "mmoe_home", ignore_errors=True)
    found, code = checks()
    assert code == 0, [check for check in found.values() if check["status"] == "broken"]
    assert found["torch"]["detail"] == importlib.metadata.version("torch")
    assert found["Python"]["detail"].startswith(".".join(map(str, sys.version_info[:3])))
    assert "cpu (" in found["devices"]["detail"] and "threads used by torch: " in found["devices"]["detail"]
    assert found["files cache"]["detail"] == f"{tmp_path / 'mmoe_home'} (not there yet)"
    tag, _ = zoo.card("clip_moe_tiny").find_weights()
    assert found[f"clip_moe_tiny.{tag}"]["detail"] == "there, checksum right"
    assert found["imports"]["status"] == "ok"
    assert {check["status"] for check in found.values()} <= {"ok", "note"}
    assert not any(check["fix"] for check in found.values())
    done = run("doctor")
    assert done.code == 0 and done.out.endswith("\nall is well\n")


@pytest.mark.parametrize("words", [["doctor"], ["recipe", "fetch", "gamma_tiny"]])
def test_without_a_home(run: Any, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a number without a name in a container."""
    monkeypatch.setenv("MMOE_HOME", "~nobody_of_this_name/mmoe")
    done = run(*words)
    assert done.code == (2 if words[0] == "recipe" else 1)
    assert "find the folder '~nobody_of_this_name/mmoe'" in (told := done.out + done.err)
    assert "there is no such user with a home" in told and "MMOE_HOME=FOLDER in front of the command" in told


def test_the_network_is_asked_once_and_soon(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(address: Any, timeout: float) -> None:
        asked.append(address)
        raise OSError

    assert checks()[0]["network"]["detail"] == "HF_HUB_OFFLINE is set; bundled and cached models work"
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    zoo.weights.online.cache_clear()
    monkeypatch.setattr(socket, "create_connection", refuse)
    begin = time.perf_counter()
    found, code = checks()
    assert found["network"]["detail"] == "the model hub does not answer; bundled and cached models work"
    assert (found["network"]["status"], asked) == ("note", [("huggingface.co", 443)])
    assert code == 0
    assert time.perf_counter() - begin < 3


def test_caches_are_measured(checks: Any, tmp_path: Path) -> None:
    home = tmp_path / "mmoe_home" / "pypi"
    home.mkdir(parents=True)
    (home / "a.bin").write_bytes(b"x" * 2_500_000)
    (home / "link").symlink_to(home / "a.bin")
    (tmp_path / "mmoe_home" / "again").symlink_to(home)
    assert checks()[0]["files cache"]["detail"] == f"{tmp_path / 'mmoe_home'} (2.5 MB)"


def test_a_cache_that_is_a_file(checks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        monkeypatch.setenv("MMOE_HOME", str(folder))
        check = checks()[0]["files cache"]
        assert (check["status"], check["detail"]) == ("broken", f"{folder}: {tmp_path / 'file'} is a file")
        assert check["fix"] == "set MMOE_HOME and HF_HOME to folders"


def test_a_library_that_is_missing_or_too_old(checks: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "timm":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "peft" else real(name)

    monkeypatch.setattr(doctor, "version", version)
    found, code = checks()
    python = Path(sys.executable).name
    assert code == 1
    assert (found["timm"]["status"], found["timm"]["detail"]) == ("broken", "not installed")
    assert found["timm"]["fix"] == f"{python} -m pip install --upgrade 'timm>=1.0.21'"
    assert found["peft"]["detail"] == "0.1, but >=0.18 is needed"
    done = run("doctor")
    assert done.code == 1
    assert f"\ntimm: not installed\n  try: {python} -m pip install --upgrade 'timm>=1.0.21'\n" in done.out
    assert done.out.endswith("\n2 broken\n") and done.err == ""


def test_a_torch_that_cannot_be_imported(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found, code = checks()
    assert code == 1 and found["devices"]["status"] == "broken"
    assert found["devices"]["detail"].startswith("torch cannot be imported: ")
    assert "--force-reinstall torch" in found["devices"]["fix"]


@pytest.mark.parametrize(
    ("how", "detail"), [("damaged", "wrong checksum: the file is damaged"), ("gone", "is missing")]
)
def test_bundled_files(how: str, detail: str, checks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "assets"
    (copy / "weights").mkdir(parents=True)
    if how == "damaged":
        for path in assets.asset("weights").iterdir():
            whole = path.read_bytes()
            (copy / "weights" / path.name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    monkeypatch.setattr(assets, "_PLACES", (copy,))
    found, code = checks()
    tag, _ = zoo.card("clip_moe_tiny").find_weights()
    assert code == 1 and found[f"clip_moe_tiny.{tag}"]["status"] == "broken"
    assert detail in found[f"clip_moe_tiny.{tag}"]["detail"]
    assert "git checkout assets" in found[f"clip_moe_tiny.{tag}"]["fix"]
    assert found["examples/fox.png"]["detail"] == "missing"
    with pytest.raises(BadInput):
        assets.asset("examples/fox.png")


def test_files_that_shadow_ours(checks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    (tmp_path / "demos").mkdir()
    found, code = checks()
    assert code == 1
    assert found["import train"]["detail"] == f"takes '{tmp_path / 'train.py'}', not ours"
    assert found["import train"]["fix"] == f"rename '{tmp_path / 'train.py'}', or start in another folder"
    assert "import demos" not in found, "a folder without __init__.py hides nothing"
    (tmp_path / "demos" / "__init__.py").write_text("")
    assert checks()[0]["import demos"]["detail"] == f"takes '{tmp_path / 'demos'}', not ours"
