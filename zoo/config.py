"""Builds a family's frozen config dataclass from plain values, with errors that name the nearest right option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mmoe.errors import BadOverride, nearest

C = TypeVar("C")


def make_config(config_class: type[C], values: Mapping[str, Any], model: str, fix: str = "") -> C:
    """The config with the given options.

    Args:
        config_class: frozen dataclass of the family.
        values: options; the others keep their defaults.
        model: name for messages.
        fix: how an option is given, such as "--set {}=..."; to `zoo.load` when empty.

    Raises:
        BadOverride: an option is unknown or has a value of the wrong type.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Config:
    ...     top_k: int = 2
    >>> make_config(Config, {"top_k": 1}, "demo").top_k
    1
    """
    known = [f.name for f in fields(config_class)]  # type: ignore[arg-type]  # every C is a dataclass
    hints = get_type_hints(config_class)
    for key, value in values.items():
        if key not in known:
            near = nearest(key, known)
            raise BadOverride(
                f"{key!r} is not an option of {model}",
                f"did you mean: {', '.join(near)}" if near else f"it has: {', '.join(sorted(known))}",
                (fix or f"zoo.load({model!r}, {{}}=...)").format(near[0] if near else known[0]),
            )
        _check_type(key, value, hints[key], model, f"mmoe info {model}")
    return config_class(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def check_types(config: Any) -> None:
    """Makes sure that the values of a config dataclass are of the types that its class tells; for `__post_init__`.

    Raises:
        BadOverride: one is not.
    """
    kind = type(config)
    hints = get_type_hints(kind)
    for one in fields(kind):
        _check_type(one.name, getattr(config, one.name), hints[one.name], kind.__name__, f"help({kind.__name__})")


def _check_type(key: str, value: Any, hint: Any, owner: str, fix: str) -> None:
    if not _fits(value, hint):
        found = "" if get_origin(hint) is Literal else f", not {type(value).__name__}"
        raise BadOverride(f"{key}={value!r} does not fit {owner}", f"{key} is {_words(hint)}{found}", fix)


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is tuple:
        return isinstance(value, (list, tuple))
    if origin is not None:
        return not isinstance(origin, type) or isinstance(value, origin)
    return not isinstance(hint, type) or isinstance(value, hint)


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = ["None" if option is NoneType else getattr(option, "__name__", str(option)) for option in options]
    return " or ".join(names)
