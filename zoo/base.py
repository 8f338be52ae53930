"""Models that stand on the weights of another one: they save what is their own, and always name their base.

A family says in `Model.base_tensors` which of its tensors come from a base, and has the options `base` (where the file
is, as for `zoo.weights.locate`, or a folder that a model was saved in) and `base_sha256` in its config. Loading reads
the base first and the model's own tensors over it. Saving leaves out what equals the base, bit for bit; where anything
of it was trained, all tensors are saved and the config names no base.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe.errors import BadInput, CorruptFile, LoadMismatch, MmoeError, Offline
from zoo.packages import file_sha256
from zoo.state import State, read_state
from zoo.weights import WEIGHTS, find_local, locate

if TYPE_CHECKING:
    from zoo.model import Model


def of_base(model: Model, names: Iterable[str]) -> list[str]:
    """Those of some names of tensors that come from a base."""
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in model.base_tensors)]


def base_source(model: Model) -> str | None:
    """Where the base of a model is, with a folder turned into its file; None where it has none."""
    source: str | None = getattr(model.config, "base", None) if model.base_tensors else None
    if source is None or ":" in source.partition("/")[0]:
        return source
    path = Path(source).expanduser()
    return str((path / WEIGHTS if path.is_dir() else path).absolute())


def with_base(model: Model, own: State) -> tuple[State, tuple[str, ...], str]:
    """A model's own tensors with those of its base, where they do not hold them already.

    Args:
        model: whose config names the base.
        own: tensors under the model's names.

    Returns:
        All tensors, the names of those from the base, and where the base is ("" where it was not needed).

    Raises:
        MmoeError: the base is not there, is another file than the config says, or does not fit.
    """
    missing = [name for name in of_base(model, model.state_dict()) if name not in own]
    source = base_source(model)
    if not missing or source is None:
        return own, (), ""
    path = _located(model, source)
    state = model.from_base(read_state(path))
    strange = sorted(set(state) - set(of_base(model, state)))
    if strange:
        wrong = f"it holds {strange[0]!r}, which is none of {', '.join(model.base_tensors)}"
        raise LoadMismatch(f"cannot use '{path}' as the base", wrong, "zoo.load(..., base=FILE)")
    return {**state, **own}, tuple(name for name in state if name not in own), source


def _located(model: Model, source: str) -> Path:
    """The base's file, with its checksum verified; errors say that it is the base."""
    asked, fix = f"cannot get the base {source!r} of this {model.family}", "zoo.load(..., base=FILE)"
    try:
        return locate(source, model.config.base_sha256)
    except (BadInput, Offline) as error:
        raise type(error)(asked, f"{error.asked}: {error.wrong}", f"{fix}, or {error.fix}") from error
    except CorruptFile as error:
        wrong = f"its checksum is not {model.config.base_sha256[:16]}..., which the model was made with"
        raise CorruptFile(asked, wrong, f"{fix} with the right file, or base_sha256=None for another base") from error


def without_base(model: Model, state: State) -> tuple[State, Any]:
    """What is saved of a model: its own tensors, and a config that pins its base; or all, and one without base.

    Args:
        model: as it is now.
        state: its tensors as they are to be written.
    """
    names, source = of_base(model, state), base_source(model)
    if not names:
        return state, model.config
    path = None if source is None else find_local(source)
    if path is not None and _equals(model, path):
        pinned = replace(model.config, base=source, base_sha256=file_sha256(path))
        return {name: value for name, value in state.items() if name not in set(names)}, pinned
    return state, replace(model.config, base=None, base_sha256=None)


def _equals(model: Model, path: Path) -> bool:
    """True where a base's file holds the values that a model has now, in the model's type."""
    own = model.state_dict()
    try:
        base = model.from_base(read_state(path))
    except MmoeError:  # another file lies there now
        return False
    return all(
        name in base and own[name].shape == base[name].shape and own[name].cpu().equal(base[name].to(own[name].dtype))
        for name in of_base(model, own)
    )


def config_values(config: Any) -> dict[str, Any]:
    """Options that differ from those that the family has by default."""
    default = asdict(type(config)())
    return {key: value for key, value in asdict(config).items() if value != default[key]}
