"""Names for routers and experts: register a class, list the names, build by name with checked options.

>>> import mmoe
>>> mmoe.list_routers()
['by_modality', 'dense', 'dynamic', 'expert_choice', 'fixed', 'gshard', 'topk']
>>> mmoe.build_router("topk", dim=8, num_experts=4, top_k=1).experts_per_token
1
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

from mmoe.errors import BadOverride, UnknownName, did_you_mean, nearest

C = TypeVar("C", bound=type)


class Registry:
    """Classes of one kind by name.

    Args:
        kind: word used in messages, such as "router".
        package: package whose import registers the built-in classes.
        works: what to try after an unknown name.
    """

    def __init__(self, kind: str, package: str, works: str | None = None) -> None:
        self.kind = kind
        self._package, self._works = package, works or f"mmoe list --kind {kind}s"
        self._classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator that files a class under `name`; a name can be given once."""

        def file_under(cls: C) -> C:
            if name in self._classes:
                raise ValueError(f"{self.kind} {name!r} is registered already: {self._classes[name].__qualname__}")
            self._classes[name] = cls
            return cls

        return file_under

    def names(self) -> list[str]:
        """Registered names, sorted."""
        import_module(self._package)
        return sorted(self._classes)

    def name_of(self, thing: object) -> str:
        """The name that an object's class is filed under, or the class' own name.

        >>> import mmoe
        >>> routers.name_of(mmoe.DenseRouter(8, 4))
        'dense'
        """
        names = {cls: name for name, cls in self._classes.items()}
        return names.get(type(thing), type(thing).__name__)

    def get(self, name: str) -> type:
        """The class filed under `name`; an unknown name fails with the nearest ones."""
        if name not in self.names():
            raise UnknownName(f"no {self.kind} named {name!r}", did_you_mean(name, self.names()), self._works)
        return self._classes[name]

    def options(self, name: str) -> list[str]:
        """Names of the options that the class filed under `name` takes besides its sizes."""
        parameters = inspect.signature(self.get(name)).parameters
        return [key for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]

    def build(self, spec: str | Mapping[str, Any], **defaults: Any) -> Any:
        """Builds from a name, "name:key=value,key=value" or a mapping with a "name".

        Args:
            spec: what to build. Its options win over `defaults`, but sizes (the class' positional arguments) that
                are among `defaults` belong to the caller: a spec cannot set them.
            defaults: options passed only where the class takes them.
        """
        options = parse_spec(spec)
        name = options.pop("name")
        cls = self.get(name)
        parameters = inspect.signature(cls).parameters
        allowed = [key for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY or key not in defaults]
        for key in options:
            if key not in allowed:
                near = nearest(key, allowed)
                known = f"it takes: {', '.join(allowed)}" if allowed else "it takes no options"
                fix = f"{name}:{(near or allowed)[0]}=..." if allowed else name
                asked = f"{key!r} is not an option of the {self.kind} {name!r}"
                raise BadOverride(asked, f"did you mean: {', '.join(near)}" if near else known, fix)
        given = {**{key: value for key, value in defaults.items() if key in parameters}, **options}
        missing = [key for key, p in parameters.items() if p.default is p.empty and key not in given]
        if missing:
            fix = f"build_{self.kind.removesuffix('s')}({name!r}, {', '.join(f'{key}=...' for key in missing)})"
            raise BadOverride(f"the {self.kind} {name!r} without {', '.join(missing)}", "its sizes are needed", fix)
        return cls(**given)


def parse_spec(spec: str | Mapping[str, Any]) -> dict[str, Any]:
    """Reads "topk:top_k=1,renormalize=false" or a mapping into {"name": ..., option: value}.

    >>> parse_spec("topk:top_k=1,score=sigmoid")
    {'name': 'topk', 'top_k': 1, 'score': 'sigmoid'}
    """
    if not isinstance(spec, str):
        if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
            raise BadOverride(f"no 'name' in {spec!r}", "a spec is a name or a mapping with a name", "topk:top_k=1")
        return dict(spec)
    name, _, rest = spec.partition(":")
    options: dict[str, Any] = {"name": name}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise BadOverride(
                f"{item!r} in {spec!r} is no option", "options are written key=value", f"{name}:{key}=VALUE"
            )
        options[key.strip()] = _scalar(value.strip())
    return options


def _scalar(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


routers = Registry("router", "mmoe.routers")
experts = Registry("expert", "mmoe.experts")


def list_routers() -> list[str]:
    """Names that `build_router` takes."""
    return routers.names()


def list_experts() -> list[str]:
    """Names that `build_experts` takes."""
    return experts.names()


def build_router(spec: str | Mapping[str, Any], **defaults: Any) -> Any:
    """Builds a router by name; see `Registry.build`."""
    return routers.build(spec, **defaults)


def build_experts(spec: str | Mapping[str, Any], **defaults: Any) -> Any:
    """Builds experts by name; see `Registry.build`."""
    return experts.build(spec, **defaults)
