"""A recipe as it was written: the line of every option, overrides, and all its mistakes at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from mmoe.errors import BadInput, did_you_mean, nearest
from train.sections import Stage, section_of

R = TypeVar("R", bound=BaseModel)
Key = tuple[str | int, ...]
BUNDLED = Path(__file__).parent / "recipes"
SIMPLE = "mmoe recipe show clip_moe_router"
SECTIONS = tuple(name for name in Stage.model_fields if name not in ("name", "start"))
_COMMAND_LINE = "on the command line"
_RIVALS = (["run", "steps"], ["run", "epochs"])  # one on the command line takes the place of the other


class Draft:
    """A recipe as it was written, and where each of its parts stands.

    Attributes:
        path: of the file.
        data: plain values.
        places: by key, "line 4" or the override that set it.
    """

    def __init__(self, path: Path, data: dict[str, Any], places: dict[Key, str]) -> None:
        self.path, self.data, self.places = path, data, places
        self.kind: type[BaseModel] | None = None

    @classmethod
    def read(cls, path: Path) -> Draft:
        """Reads a YAML file; options that are given twice are a mistake."""
        asked, fix = f"cannot use the recipe '{path}'", SIMPLE
        try:
            text = path.read_text(encoding="utf-8")
            node, data = yaml.compose(text, Loader=yaml.CSafeLoader), yaml.load(text, Loader=yaml.CSafeLoader)
        except UnicodeDecodeError as error:
            raise BadInput(asked, "it is not UTF-8; save it as that", fix) from error
        except OSError as error:
            raise BadInput(asked, error.strerror or str(error), fix) from error
        except yaml.YAMLError as error:
            raise BadInput(asked, _told(error), fix) from error
        if not isinstance(data, dict):
            held = "it is empty" if data is None else f"it holds a {type(data).__name__}"
            raise BadInput(asked, f"{held}, not sections such as model: and data:", fix)
        places: dict[Key, str] = {}
        twice = []
        try:
            loops, lines = _loops(data), list(_lines(node, ()))
        except RecursionError as error:
            raise BadInput(asked, "a part of it holds itself, or is nested too deeply", fix) from error
        if loops:
            raise BadInput(asked, "a part of it holds itself", fix)
        for key, line in lines:
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
            raise BadInput(
                f"no override {text!r}",
                "an override is an option, = and its value",
                f"{dotted.strip() or 'optim.lr'}=...",
            )
        try:
            parsed = yaml.load(value, Loader=yaml.CSafeLoader)
        except yaml.YAMLError as error:
            raise BadInput(
                f"no override {text!r}", _told(error), f"{dotted}='[\"*.mlp.*\"]'   (signs of YAML in quotes)"
            ) from error
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

    def check(self, kind: type[R]) -> R:
        """The recipe.

        Args:
            kind: class of recipes.

        Raises:
            BadInput: it has mistakes; each is told with its line.
        """
        self.kind, mistakes = kind, self._misplaced()
        try:
            recipe = kind.model_validate(self._whole())
        except ValidationError as error:
            mistakes += self._mistakes(error)
        if not mistakes:
            return recipe
        raise BadInput(
            f"cannot use the recipe '{self.path}'", "\n".join(mistakes), f"{self._example()}   (one that works)"
        )

    def _example(self) -> str:
        """Shows the bundled recipe of the model, where it has one of its name."""
        model = self.data.get("model")
        name = str(model.get("name")) if isinstance(model, Mapping) else ""
        return f"mmoe recipe show {name}" if name in {file.stem for file in BUNDLED.glob("*/*.yaml")} else SIMPLE

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
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", self.path.stem).strip("_.-") or "recipe"
        return {"name": self.data.get("name", plain), "stages": stages, **top}

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
            inside = [told for key, told in self.places.items() if key[: len(written)] == written]
            given = [told for told in inside if told.endswith(_COMMAND_LINE)]
            return f"{given[0] if given else place}: {wrong[0]}"
        wanted = " or ".join(dict.fromkeys(wrong))
        return f"{place}: {self._dotted(written)} should be {wanted}, not {_shown(mistake['input'])}"

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
        model: Any = self.kind
        key: list[str | int] = []
        fields: list[str] = []
        for part in loc:
            if model is None:
                break
            key.append(part)
            if isinstance(part, str):
                fields = list(model.model_fields)
                model = section_of(model.model_fields[part].annotation) if part in fields else None
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


def _loops(value: Any, around: tuple[int, ...] = ()) -> bool:
    """Whether something holds itself, by an anchor of YAML."""
    if not isinstance(value, dict | list):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return id(value) in around or any(_loops(part, (*around, id(value))) for part in inside)


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


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float | bool | list | dict | None) else str(value)


_WORDS = (
    (r"a valid dictionary( or instance of \w+)?", "a mapping"),
    (r"a valid integer", "a whole number"),
    (r"a valid tuple", "a list"),
    (r"(Input is )?not a path for .*", "a path"),
    (r"String should match pattern .*", "of letters, digits, _ and - (and . in between)"),
    (r"Tuple should have at least 1 item.*", "a list with one value at least"),
    (r"a valid ", "a "),
)


def _expected(message: str) -> str:
    """What pydantic expects, as the end of "X should be"."""
    message = message.removeprefix("Value error, ").removeprefix("Input should be ")
    message = message.partition(", unable to ")[0].partition(", got ")[0]
    for pattern, words in _WORDS:
        message = re.sub(pattern, words, message)
    return message


def _fields(section: str) -> list[str]:
    return list(section_of(Stage.model_fields[section].annotation).model_fields)


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
    mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", None))
    if "cannot start any token" in problem:
        problem += "; YAML is indented with spaces, not tabs, and signs such as * % @ need quotes"
    if "another document" in str(error):
        problem = "a second document begins (---); a recipe is one"
    return f"line {mark.line + 1}: {problem}" if mark is not None else str(error).splitlines()[0]
