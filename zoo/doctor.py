"""The verb `mmoe doctor`: what is installed, what this machine has, and what is broken, each with its remedy."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import typer

from mmoe.errors import BadInput, MmoeError
from zoo.cli import Json, print_json
from zoo.registry import list_models
from zoo.table import columns

Status = Literal["ok", "note", "broken"]

_PACKAGES = ("mmoe", "zoo", "train", "demos")
_EXAMPLES = ("examples/fox.png", "examples/pizza.png")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        detail: what was found.
        status: "ok", "note" for what limits but works, or "broken".
        fix: a command or what to do, for what is broken.
    """

    name: str
    detail: str
    status: Status = "ok"
    fix: str = ""


def doctor(as_json: Json = False) -> None:
    """Check the installation, the devices, the network, the caches and the bundled files.

    Ends with exit code 1 when something is broken, and says how to mend it.

    \b
    mmoe doctor
    mmoe doctor --json
    """
    parts: list[Callable[[], Iterator[Check]]] = [_python, _libraries, _devices, _network, _caches, _bundled, _shadows]
    checks = [check for part in parts for check in part()]
    broken = [check for check in checks if check.status == "broken"]
    if as_json:
        print_json({"ok": not broken, "checks": [asdict(check) for check in checks]})
    else:
        signs = {"ok": "ok", "note": "note", "broken": "BROKEN"}
        typer.echo(columns(["", "what", "found"], [[signs[c.status], c.name, c.detail] for c in checks]))
        for check in broken:
            typer.echo(f"\n{check.name}: {check.detail}\n  try: {check.fix}")
        typer.echo("\nall is well" if not broken else f"\n{len(broken)} broken")
    if broken:
        raise typer.Exit(1)


def _python() -> Iterator[Check]:
    old = sys.version_info < (3, 11)
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Check(
        name="Python",
        detail=detail,
        status="broken" if old else "ok",
        fix="install Python 3.11 or newer" if old else "",
    )


def _libraries() -> Iterator[Check]:
    """Every dependency that our own metadata names, with the release that is here."""
    from packaging.requirements import Requirement

    pip = f"{Path(sys.executable).name} -m pip install"
    try:
        yield Check(name="mmoe", detail=f"{version('mmoe')} in {Path(__file__).resolve().parent.parent}")
        wanted = [Requirement(line) for line in requires("mmoe") or []]
    except PackageNotFoundError:
        yield Check(name="mmoe", detail="run from a folder, not installed", status="note")
        return
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, fix = requirement.name, f"{pip} --upgrade '{requirement.name}{requirement.specifier}'"
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Check(name=name, detail="not installed", status="broken", fix=fix)
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Check(name=name, detail=found)
        else:
            detail = f"{found}, but {requirement.specifier} is needed"
            yield Check(name=name, detail=detail, status="broken", fix=fix)


def _devices() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:  # a broken installation can raise anything
        detail = f"torch cannot be imported: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        fix = f"{Path(sys.executable).name} -m pip install --force-reinstall torch torchvision"
        yield Check(name="devices", detail=detail, status="broken", fix=fix)
        return
    found = [f"cpu ({os.cpu_count()} cores, threads used by torch: {torch.get_num_threads()})"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i} {properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
    if torch.backends.mps.is_available():
        found.append("mps")
    yield Check(name="devices", detail=", ".join(found))


def _network() -> Iterator[Check]:
    from zoo.weights import offline_wanted, online

    if online():
        yield Check(name="network", detail="the model hub answers")
        return
    why = "HF_HUB_OFFLINE is set" if offline_wanted() else "the model hub does not answer"
    yield Check(name="network", detail=f"{why}; bundled and cached models work", status="note")


def _caches() -> Iterator[Check]:
    from huggingface_hub import constants

    from zoo.cache import home

    for name, find in (("files cache", home), ("hub cache", lambda: Path(constants.HF_HUB_CACHE))):
        try:
            folder = find()
        except BadInput as error:
            yield Check(name=name, detail=f"{error.asked}: {error.wrong}", status="broken", fix=error.fix)
            continue
        detail = f"{folder} ({_size(folder) / 1e6:,.1f} MB)" if folder.is_dir() else f"{folder} (not there yet)"
        parent = next(above for above in (folder, *folder.parents) if above.exists())
        fix = ""
        if not parent.is_dir():
            detail, fix = f"{folder}: {parent} is a file", "set MMOE_HOME and HF_HOME to folders"
        elif not os.access(parent, os.W_OK):
            detail += ", not writable"
            fix = f"give yourself the right to write to {parent}, or set MMOE_HOME and HF_HOME"
        yield Check(name=name, detail=detail, status="broken" if fix else "ok", fix=fix)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; links are not followed, so the hub's cache counts once."""
    total, open_folders = 0, [folder]
    while open_folders:
        try:
            with os.scandir(open_folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        open_folders.append(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue
    return total


def _bundled() -> Iterator[Check]:
    from zoo.assets import asset
    from zoo.packages import file_sha256
    from zoo.weights import find_local

    again = f"{Path(sys.executable).name} -m pip install --force-reinstall mmoe   (in a checkout: git checkout assets)"
    for card in list_models():
        for tag, weights in card.weights.items():
            if not weights.source.startswith("bundled:"):
                continue
            name, path = f"{card.name}.{tag}", find_local(weights.source)
            if path is None:
                yield Check(name=name, detail=f"{weights.source} is missing", status="broken", fix=again)
            elif weights.sha256 is None:
                yield Check(name=name, detail="there; its card names no checksum", status="note")
            elif file_sha256(path) != weights.sha256:
                yield Check(name=name, detail="wrong checksum: the file is damaged", status="broken", fix=again)
            else:
                yield Check(name=name, detail="there, checksum right")
    for example in _EXAMPLES:
        try:
            asset(example)
        except MmoeError:
            yield Check(name=example, detail="missing", status="broken", fix=again)


def _shadows() -> Iterator[Check]:
    """Files of the current folder that Python would import in place of ours."""
    ours = Path(__file__).resolve().parent.parent
    shadowed = False
    for name in _PACKAGES:
        spec = PathFinder.find_spec(name, [os.getcwd(), *sys.path])
        if spec is None or spec.origin is None:
            continue
        found = Path(spec.origin).resolve()
        if found == ours / name / "__init__.py":
            continue
        shadowed = True
        thing = found if found.name != "__init__.py" else found.parent
        fix = f"rename '{thing}', or start in another folder"
        yield Check(name=f"import {name}", detail=f"takes '{thing}', not ours", status="broken", fix=fix)
    if not shadowed:
        yield Check(name="imports", detail=f"{', '.join(_PACKAGES)} are ours")
