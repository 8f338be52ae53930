"""Models that stand on the weights of others: they save what is their own, and always name their bases.

A family says in `Model.base_tensors` which of its tensors come from a base, by part, and has the options `base` (where
the file is, as for `zoo.weights.locate`, or a folder that a model was saved in) and `base_sha256` in its config: one
value where the family has one part, values by part where it has several. Loading reads the bases first and the model's
own tensors over them. Saving leaves out what equals a base, bit for bit; where anything of a part was trained, all of
its tensors are saved and the config names no base for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe.errors import BadInput, BadOverride, CorruptFile, LoadMismatch, MmoeError, Offline, did_you_mean
from zoo.packages import file_sha256
from zoo.state import State, read_state
from zoo.weights import WEIGHTS, find_local, locate

if TYPE_CHECKING:
    from zoo.model import Model


def of_base(model: Model, names: Iterable[str], parts: Iterable[str] | None = None) -> list[str]:
    """Those of some names of tensors that come from a base.

    Args:
        model: whose family tells.
        names: of tensors.
        parts: whose bases count; those of all parts when None.
    """
    told = model.base_tensors if parts is None else {part: model.base_tensors[part] for part in parts}
    patterns = [pattern for of_part in told.values() for pattern in of_part]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def bases(model: Model) -> dict[str, str]:
    """Where the bases of a model are, by part, with folders turned into their files; empty where it has none."""
    return {part: _file(source) for part, source in _by_part(model, "base").items()}


def checksum_of(model: Model, source: str) -> str | None:
    """The checksum that the config has of a file that is one of the bases; None for other files."""
    given, checksums = _by_part(model, "base"), _by_part(model, "base_sha256")
    return next((checksums.get(part) for part, one in given.items() if one == source), None)


def with_base(model: Model, own: State) -> tuple[State, tuple[str, ...], str]:
    """A model's own tensors with those of its bases, where they do not hold them already.

    Args:
        model: whose config names the bases.
        own: tensors under the model's names.

    Returns:
        All tensors, the names of those from a base, and where the bases are ("" where none was needed).

    Raises:
        MmoeError: a base is not there, is another file than the config says, or does not fit.
    """
    found: State = {}
    told: dict[str, str] = {}
    names = list(model.state_dict())
    for part, source in bases(model).items():
        if all(name in own for name in of_base(model, names, [part])):
            continue
        path = _located(model, part, source)
        state = model.from_base(read_state(path), part)
        strange = sorted(set(state) - set(of_base(model, state, [part])))
        if strange:
            wrong = f"it holds {strange[0]!r}, which is none of {', '.join(model.base_tensors[part])}"
            raise LoadMismatch(f"cannot use '{path}' as the base{_of(model, part)}", wrong, _fix(model, part))
        found |= state
        told[part] = source
    where = [source if len(model.base_tensors) == 1 else f"{part}: {source}" for part, source in told.items()]
    return {**found, **own}, tuple(name for name in found if name not in own), ", ".join(where)


def without_base(model: Model, state: State) -> tuple[State, Any]:
    """What is saved of a model: its own tensors, and a config that pins its bases; trained parts whole, without base.

    Args:
        model: as it is now.
        state: its tensors as they are to be written.
    """
    if not model.base_tensors:
        return state, model.config
    kept, checksums = dict[str, str](), dict[str, str]()
    for part, source in bases(model).items():
        path = find_local(source, _by_part(model, "base_sha256").get(part))
        if path is not None and _equals(model, part, path):
            kept[part], checksums[part] = source, file_sha256(path)
    left_out = set(of_base(model, state, kept))
    pinned = replace(model.config, base=_as_option(model, kept), base_sha256=_as_option(model, checksums))
    return {name: value for name, value in state.items() if name not in left_out}, pinned


def check_parts(option: str, given: Mapping[str, Any] | None, parts: Collection[str], built: Collection[str]) -> None:
    """Makes sure that an option by part names parts that the model has, for `__post_init__` of a config.

    Raises:
        BadOverride: it does not.
    """
    for part in given or {}:
        works = next(iter(built), next(iter(parts)))
        if part not in parts:
            raise BadOverride(f"{option} of {part!r}", did_you_mean(part, parts), f"{option}={{'{works}': ...}}")
        if part not in built:
            raise BadOverride(f"{option} of {part!r}", "the model is built without it", f"{option}={{'{works}': ...}}")


def _by_part(model: Model, option: str) -> dict[str, Any]:
    """An option of the config by part; one value is that of the only part."""
    value = getattr(model.config, option, None) if model.base_tensors else None
    if not isinstance(value, Mapping):
        value = dict.fromkeys(model.base_tensors, value)
    return {part: one for part, one in value.items() if one is not None}


def _as_option(model: Model, values: dict[str, str]) -> Any:
    """Values by part as the option takes them; None where there are none."""
    return next(iter(values.values()), None) if len(model.base_tensors) == 1 else values or None


def _file(source: str) -> str:
    if ":" in source.partition("/")[0]:
        return source
    path = Path(source).expanduser()
    return str((path / WEIGHTS if path.is_dir() else path).absolute())


def _of(model: Model, part: str) -> str:
    """Which part a base is of, where there are several."""
    return f" of {part}" if len(model.base_tensors) > 1 else ""


def _fix(model: Model, part: str, option: str = "base", value: str | None = "FILE") -> str:
    """How an option is given for one part; dots stand for the others, which stay as they are."""
    if len(model.base_tensors) == 1:
        return f"zoo.load(..., {option}={value})"
    return f"zoo.load(..., {option}={{{part!r}: {value!r}{', ...' * (len(bases(model)) > 1)}}})"


def _located(model: Model, part: str, source: str) -> Path:
    """A base's file, with its checksum verified; errors say that it is the base."""
    asked, fix = f"cannot get the base {source!r}{_of(model, part)} of this {model.family}", _fix(model, part)
    checksum = _by_part(model, "base_sha256").get(part)
    try:
        return locate(source, checksum)
    except (BadInput, Offline) as error:
        raise type(error)(asked, f"{error.asked}: {error.wrong}", f"{fix}, or {error.fix}") from error
    except CorruptFile as error:
        wrong = f"its checksum is not {str(checksum)[:16]}..., which the model was made with"
        another = _fix(model, part, "base_sha256", None)
        raise CorruptFile(asked, wrong, f"{fix} with the right file, or {another} for another base") from error


def _equals(model: Model, part: str, path: Path) -> bool:
    """True where a base's file holds the values that a part has now, in the model's type."""
    own = model.state_dict()
    try:
        base = model.from_base(read_state(path), part)
    except MmoeError:  # another file lies there now
        return False
    return all(
        name in base and own[name].shape == base[name].shape and own[name].cpu().equal(base[name].to(own[name].dtype))
        for name in of_base(model, own, [part])
    )


def config_values(config: Any) -> dict[str, Any]:
    """Options that differ from those that the family has by default."""
    default = asdict(type(config)())
    return {key: value for key, value in asdict(config).items() if value != default[key]}
