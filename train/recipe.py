"""A recipe: one YAML that says which model is trained, what of it, on which data, how, and for how long.

    model: {name: clip_moe_tiny}
    tune: {method: router_only}
    data: {name: emoji, batch_size: 64}
    optim: {lr: 3.0e-3}
    run: {steps: 100}

`Recipe.load` reads a file or a bundled recipe, applies `key=value` overrides, and tells all mistakes at once, each with
its line and the nearest right key. A recipe with `stages:` runs them one after the other: each takes what the recipe
says and changes what it says itself. `train/recipes/` holds the bundled ones.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from mmoe.atomic import atomic_path
from mmoe.errors import BadInput, UnknownName, did_you_mean, nearest
from train.sections import ScaleSection, Section, Stage

BUNDLED = Path(__file__).parent / "recipes"
Key = tuple[str | int, ...]
_COMMAND_LINE = "on the command line"
_RIVALS = (["run", "steps"], ["run", "epochs"])  # one on the command line takes the place of the other
SECTIONS = tuple(name for name in Stage.model_fields if name not in ("name", "start"))


class Recipe(Section):
    """A checked recipe.

    Attributes:
        name: of the run's folder.
        stages: one after the other.
        scale: devices.
        log: besides the terminal.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    stages: tuple[Stage, ...]
    scale: ScaleSection = ScaleSection()
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)

    @classmethod
    def load(cls, source: str | Path, *overrides: str) -> Recipe:
        """Reads a file, or a bundled recipe by name.

        Args:
            source: path of a YAML, or a name of `bundled()`.
            overrides: "optim.lr=1e-4", "stages.base.run.steps=10", ...

        Raises:
            UnknownName: there is no such recipe.
            BadInput: the file cannot be read, or has mistakes; all are told.

        Example:
            >>> Recipe.load("clip_moe_router", "run.steps=3").stages[0].run.steps
            3
        """
        draft = Draft.read(find(source))
        for text in overrides:
            draft.override(text)
        return draft.check()

    def as_dict(self) -> dict[str, Any]:
        """Plain data with every default written out; `Recipe.load` reads it again."""
        told = self.model_dump(mode="json")
        if len(told["stages"]) > 1 or told["stages"][0]["name"]:
            return told
        (only,) = told.pop("stages")
        return {"name": told.pop("name"), **{name: only[name] for name in SECTIONS}, **told}

    def save(self, path: str | Path, about: Mapping[str, str] | None = None) -> None:
        """Writes a file that runs as this recipe does.

        Args:
            path: of the file.
            about: notes for its first lines.
        """
        notes = "".join(f"# {key}: {value}\n" for key, value in (about or {}).items())
        with atomic_path(path) as temporary:
            temporary.write_text(notes + yaml.safe_dump(self.as_dict(), sort_keys=False), encoding="utf-8")


def bundled() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(BUNDLED.glob("*/*.yaml"))}


def find(source: str | Path) -> Path:
    """The file that a path or a name means.

    Raises:
        UnknownName: there is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    known = bundled()
    if str(source) in known:
        return known[str(source)]
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UnknownName(f"no recipe '{source}'", f"looked in {path.absolute().parent}", "mmoe recipe ls")
    raise UnknownName(f"no recipe named '{source}'", did_you_mean(str(source), known), "mmoe recipe ls")


def differences(a: Recipe, b: Recipe) -> list[str]:
    """What two recipes say differently, one option a line."""
    first, second = _flat(a.as_dict(), ""), _flat(b.as_dict(), "")
    missing = "(none)"
    return [
        f"{key}: {first.get(key, missing)} -> {second.get(key, missing)}"
        for key in {**first, **second}
        if first.get(key, missing) != second.get(key, missing)
    ]


def _flat(value: Any, key: str) -> dict[str, Any]:
    """Nested options by their dotted names."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {item.get("name", number): item for number, item in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {key: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= _flat(inner, f"{key}.{name}" if key else str(name))
    return found


class Draft:
    """A recipe as it was written, and where each of its parts stands.

    Attributes:
        path: of the file.
        data: plain values.
        places: by key, "line 4" or the override that set it.
    """

    def __init__(self, path: Path, data: dict[str, Any], places: dict[Key, str]) -> None:
        self.path, self.data, self.places = path, data, places

    @classmethod
    def read(cls, path: Path) -> Draft:
        """Reads a YAML file; options that are given twice are a mistake."""
        asked, fix = f"cannot use the recipe '{path}'", f"compare with: mmoe recipe show {next(iter(bundled()))}"
        try:
            text = path.read_text(encoding="utf-8")
            node, data = yaml.compose(text, Loader=yaml.CSafeLoader), yaml.load(text, Loader=yaml.CSafeLoader)
        except UnicodeDecodeError as error:
            raise BadInput(asked, "it is no text in UTF-8", fix) from error
        except yaml.YAMLError as error:
            raise BadInput(asked, _told(error), fix) from error
        if not isinstance(data, dict):
            raise BadInput(asked, "it holds no mapping from sections to options", fix)
        places: dict[Key, str] = {}
        twice = []
        for key, line in _lines(node, ()):
            if key in places:
                twice.append(f"line {line}: {_dotted(key)} was given before, in {places[key]}")
            places[key] = f"line {line}"
        if twice:
            raise BadInput(asked, "\n".join(twice), fix)
        return cls(path, data, places)

    def override(self, text: str) -> None:
        """Sets one option as "section.option=value" does on the command line, in all stages unless one is named.

        Raises:
            BadInput: it is no option and value, or names no stage of this recipe.
        """
        dotted, equals, value = text.partition("=")
        names = dotted.strip().split(".")
        if not equals or not all(names):
            raise BadInput(f"no override {text!r}", "an override is an option and its value", "optim.lr=1e-4")
        try:
            parsed = yaml.load(value, Loader=yaml.CSafeLoader)
        except yaml.YAMLError as error:
            raise BadInput(f"no override {text!r}", _told(error), "quote it as YAML does") from error
        key, place = self._key(names, text), f"{text} {_COMMAND_LINE}"
        self._set(key, parsed, place)
        if names[-2:] in _RIVALS and parsed is not None:
            (rival,) = (pair[1] for pair in _RIVALS if pair != names[-2:])
            other = (*key[:-1], rival)
            if not self.places.get(other, "").endswith(_COMMAND_LINE):
                self._set(other, None, place)

    def _stages(self) -> list[dict[str, Any]]:
        stages = self.data.get("stages")
        return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []

    def _key(self, names: Sequence[str], text: str) -> Key:
        """The option that an override names, with the number of a stage in place of its name."""
        if names[0] != "stages" or len(names) == 1:
            return tuple(names)
        known = [str(stage.get("name")) for stage in self._stages()]
        if len(names) < 3 or names[1] not in known:
            wrong = did_you_mean(names[1], known) if known else "it has no stages"
            raise BadInput(f"no override {text!r} of '{self.path.name}'", wrong, "optim.lr=1e-4   (of all stages)")
        return ("stages", known.index(names[1]), *names[2:])

    def _set(self, key: Key, value: Any, place: str) -> None:
        """Sets an option, of all stages unless the key has the number of one."""
        if key[0] == "stages" and len(key) > 1:
            _put(self._stages()[int(key[1])], key[2:], value)
        else:
            for stage in self._stages():
                _drop(stage, key)
            self.places = {k: told for k, told in self.places.items() if k[:1] != ("stages",) or k[2:] != key}
            _put(self.data, key, value)
        self.places[key] = place

    def check(self) -> Recipe:
        """The recipe.

        Raises:
            BadInput: it has mistakes; each is told with its line.
        """
        mistakes = self._misplaced()
        try:
            recipe = Recipe.model_validate(self._whole())
        except ValidationError as error:
            mistakes += self._mistakes(error)
        if not mistakes:
            return recipe
        fix = f"mmoe recipe show {next(iter(bundled()))}   (one that works)"
        raise BadInput(f"cannot use the recipe '{self.path}'", "\n".join(mistakes), fix)

    def _misplaced(self) -> list[str]:
        """Mistakes outside of the sections."""
        known = ["name", "scale", "log", "stages", *SECTIONS]
        mistakes = []
        for key in self.data:
            if key not in known:
                owners = [f"{section}.{key}" for section in SECTIONS if key in _fields(section)]
                mistakes.append(self._unknown((key,), [*owners, *nearest(str(key), known)], known))
        stages = self.data.get("stages", [{}])
        if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
            mistakes.append(f"{self._place(('stages',))}: stages is a list of mappings, each with a name")
        elif "stages" in self.data:
            names = [stage.get("name") for stage in stages]
            unnamed = [number for number, name in enumerate(names) if not name]
            mistakes += [f"{self._place(('stages', number))}: a stage without a name" for number in unnamed]
            twice = [number for number, name in enumerate(names) if name and name in names[:number]]
            mistakes += [f"{self._place(('stages', n, 'name'))}: a stage named {names[n]!r} again" for n in twice]
        return mistakes

    def _whole(self) -> dict[str, Any]:
        """Every stage with all its sections."""
        given = self.data.get("stages", [{}])
        stages = []
        for stage in given if isinstance(given, list) else []:
            if isinstance(stage, dict):
                stages.append(_merged({key: self.data[key] for key in SECTIONS if key in self.data}, stage))
        top = {key: self.data[key] for key in ("scale", "log") if key in self.data}
        return {"name": self.data.get("name", self.path.stem), "stages": stages, **top}

    def _mistakes(self, error: ValidationError) -> list[str]:
        """One line for each wrong option."""
        wrong: dict[Key, list[str]] = {}
        found: dict[Key, tuple[Any, list[str]]] = {}
        for mistake in error.errors(include_url=False):
            key, fields = self._known(mistake["loc"])
            wrong.setdefault(key, []).append(_expected(mistake["msg"]))
            found[key] = mistake, fields
        return list(dict.fromkeys(self._mistake(key, wrong[key], *found[key]) for key in found))

    def _mistake(self, key: Key, wrong: list[str], mistake: Any, fields: list[str]) -> str:
        written = self._written(key)
        place = self._place(written)
        if mistake["type"] == "extra_forbidden":
            last = str(key[-1])
            owners = [f"{section}.{last}" for section in SECTIONS if last in _fields(section)]
            near = [_dotted((*written[:-1], name)) for name in nearest(last, fields)]
            return self._unknown(written, near or owners, fields)
        if mistake["type"] == "missing":
            return f"{place}: {self._dotted(written)} is missing"
        if mistake["type"] == "value_error":
            return f"{place}: {wrong[0]}"
        return (
            f"{place}: {self._dotted(written)} should be {' or '.join(dict.fromkeys(wrong))}, not {mistake['input']!r}"
        )

    def _dotted(self, key: Key) -> str:
        """An option with the name of its stage, as an override has it."""
        if key[:1] == ("stages",) and len(key) > 1:
            key = ("stages", self.data["stages"][key[1]].get("name") or key[1], *key[2:])
        return _dotted(key)

    def _unknown(self, key: Key, near: Sequence[str], known: Sequence[str]) -> str:
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        return f"{self._place(key)}: there is no {self._dotted(key)}; {hint}"

    def _known(self, loc: Key) -> tuple[Key, list[str]]:
        """The option that pydantic means, and the names beside it."""
        model: Any = Recipe
        key: list[str | int] = []
        fields: list[str] = []
        for part in loc:
            if model is None:
                break
            key.append(part)
            if isinstance(part, str):
                fields = list(model.model_fields)
                model = _section(model.model_fields[part].annotation) if part in fields else None
        return tuple(key), fields

    def _written(self, key: Key) -> Key:
        """Where an option of a stage was written: there, or outside for all stages."""
        inside = key[:1] == ("stages",) and len(key) > 2
        if inside and ("stages" not in self.data or (key not in self.places and key[2:] in self.places)):
            return key[2:]
        return key

    def _place(self, key: Key) -> str:
        """Where an option stands, or the nearest section around it."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.places:
                return self.places[key[:end]]
        return f"'{self.path.name}'"


def _put(target: dict[str, Any], keys: Sequence[Any], value: Any) -> None:
    """Sets an option in nested mappings."""
    for key in keys[:-1]:
        if not isinstance(target.get(key), dict):
            target[key] = {}
        target = target[key]
    target[keys[-1]] = value


def _drop(target: Any, keys: Sequence[Any]) -> None:
    """Takes an option out of nested mappings, where it is there."""
    for key in keys[:-1]:
        target = target.get(key) if isinstance(target, dict) else None
    if isinstance(target, dict):
        target.pop(keys[-1], None)


def _expected(message: str) -> str:
    """What pydantic expects, as the end of "X should be"."""
    message = message.removeprefix("Value error, ").removeprefix("Input should be ")
    message = message.partition(", unable to ")[0].partition(", got ")[0]
    message = message.replace("a valid dictionary", "a mapping").replace("a valid integer", "a whole number")
    return message.replace("a valid ", "a ")


def _section(annotation: Any) -> Any:
    """The section class in an annotation, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [_section(part) for part in typing.get_args(annotation)]
    return next((section for section in found if section is not None), None)


def _fields(section: str) -> list[str]:
    return list(_section(Stage.model_fields[section].annotation).model_fields)


def _merged(base: Any, change: Any) -> Any:
    """A section as a stage changes it; mappings in it are changed too, other values replaced."""
    if not isinstance(base, Mapping) or not isinstance(change, Mapping):
        return change
    return {**base, **{key: _merged(base.get(key), value) for key, value in change.items()}}


def _lines(node: yaml.Node | None, key: Key) -> Iterator[tuple[Key, int]]:
    """Every option of a document with its line."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            here = (*key, str(name.value))
            yield here, name.start_mark.line + 1
            yield from _lines(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            here = (*key, number)
            yield here, value.start_mark.line + 1
            yield from _lines(value, here)


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))


def _told(error: yaml.YAMLError) -> str:
    """What YAML says, in a line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}: {problem}" if mark is not None else str(error).splitlines()[0]
