"""Reads state dicts from files and loads them into models without hiding anything.

torch is imported by the functions that read tensors, so that importing this file stays quick.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mmoe.errors import BadInput, CorruptFile, LoadMismatch, MmoeError
from zoo.runtimes import is_ctranslate2, read_ctranslate2, read_gguf

if TYPE_CHECKING:
    from torch import Tensor, nn

State: TypeAlias = "dict[str, Tensor]"


def read_state(path: Path) -> State:
    """Tensors of a .safetensors file or a torch checkpoint: a bare state dict, or one under a usual name.

    A torch checkpoint is read as data only: whatever would run code is refused. Files of llama.cpp (.gguf) and
    CTranslate2 (model.bin) are read too, see `zoo.runtimes`.

    Raises:
        CorruptFile: the file is truncated, damaged or holds something else. MissingExtra: what reads it is missing.
    """
    import torch
    from safetensors.torch import load_file

    damaged = f"cannot read the weights file '{path}'"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".gguf":
            return read_gguf(path)
        if is_ctranslate2(path):
            return read_ctranslate2(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MmoeError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise CorruptFile(damaged, *_why_unreadable(path, error)) from error
    for key in ("state_dict", "model", "params"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    named = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CorruptFile(
            damaged, "it holds no state dict (names with tensors)", "torch.save(model.state_dict(), file)"
        )
    parallel = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if parallel else name: value for name, value in state.items()}


def read_json(path: Path, fix: str) -> Any:
    """What a JSON file holds.

    Args:
        path: of the file.
        fix: what helps when it is damaged.

    Raises:
        BadInput: it may not be read. CorruptFile: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read '{path}'", error.strerror or str(error), f"chmod u+r '{path}'") from error
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"cannot read '{path}'", f"it is not JSON: {error}", fix) from error


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a .safetensors file; empty for other files."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _why_unreadable(path: Path, error: Exception) -> tuple[str, str]:
    """Reason and remedy, from the first bytes and from what the reader says."""
    text, again = str(error), f"delete it and get it again: rm '{path}'"
    if isinstance(error, PermissionError):
        return "no permission to read it", f"chmod u+r '{path}'"
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError as refused:
        return refused.strerror or str(refused), f"chmod u+r '{path}'"
    if start[8:9] == b"{" and path.suffix != ".safetensors":
        return "it is a safetensors file with another suffix", f"mv '{path}' '{path.with_suffix('.safetensors')}'"
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
    if path.suffix in (".safetensors", ".gguf", ".bin") and not zipfile.is_zipfile(path):
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
        base: where the model's base came from, or its bases by part; empty where none was read.
        from_base: names among the matched that come from it or them.
    """

    source: str
    matched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    base: str = ""
    from_base: tuple[str, ...] = ()

    @property
    def coverage(self) -> float:
        """Share of the model's tensors that were loaded, 0 to 1."""
        return len(self.matched) / max(1, len(self.matched) + len(self.missing) + len(self.reshaped))

    @property
    def random(self) -> int:
        """Number of the model's tensors that keep their random initial values."""
        return len(self.missing) + len(self.reshaped)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "coverage": round(self.coverage, 4)}

    def __str__(self) -> str:
        lines = [f"{self.coverage:.1%} of the model's tensors loaded from {self.source}"]
        if self.from_base and self.base != self.source:
            lines.append(f"{len(self.from_base)} of them from the base {self.base}")
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
        LoadMismatch: anything else does not fit, or is of whole or complex numbers. Nothing was copied then.
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
    whole = [n for n in report.matched if own[n].is_floating_point() and not state[n].is_floating_point()]
    if whole:
        wrong = f"{collapse(whole)}: {str(state[whole[0]].dtype).removeprefix('torch.')}"
        raise LoadMismatch(f"the weights of {source} are no real numbers", wrong, "weights in fp32, bf16 or fp16")
    patterns = list(allow_missing)
    faults = [
        n for n in (*report.missing, *report.unexpected, *reshaped) if not any(fnmatchcase(n, p) for p in patterns)
    ]
    if faults:
        names = f"'{faults[0]}'" + (", ..." if len(faults) > 1 else "")
        raise LoadMismatch(
            f"the weights do not fit {type(model).__name__}",
            str(report),
            f"the weights of this model, or zoo.load(..., allow_missing=[{names}]) for what may stay random",
        )
    with torch.no_grad():
        for name in report.matched:
            own[name].copy_(state[name])
    return report
