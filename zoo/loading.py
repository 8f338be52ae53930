"""`load`: builds a model by name, from the hub or from a folder, and fills it with weights that are accounted for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mmoe.errors import BadInput, BadOverride, CorruptFile, LoadMismatch, MissingExtra, did_you_mean
from zoo.card import Card
from zoo.config import make_config
from zoo.model import FORMAT, Model
from zoo.registry import card, list_models
from zoo.weights import LoadReport, State, load_state, locate, read_state, require_online, split_hub

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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
    weights: bool | str = True,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    router: str | Mapping[str, Any] | None = None,
    experts: str | Mapping[str, Any] | None = None,
    allow_missing: Iterable[str] = (),
    **overrides: Any,
) -> Model:
    """Builds a model in eval mode and loads its weights.

    Args:
        name: a card's name ("clip_moe_tiny"), one with a weights tag ("clip_moe_vit_l14.sharegpt4v"),
            "hf-hub:org/repo[@revision]", or a folder that `Model.save` wrote.
        weights: True for the card's default, False for random ones, a tag, or a file.
        device: "auto" takes CUDA, then MPS, then CPU; "meta" builds shapes only, without weights.
        dtype: "fp32", "bf16", "fp16" or a torch dtype; fp32 when None.
        router: registered router, as a name, "name:key=value" or a mapping: it replaces the model's own and starts
            fresh, which the load report shows.
        experts: the same for experts.
        allow_missing: patterns of tensor names that may be missing in the weights or left over.
        overrides: options of the family's config.

    Raises:
        UnknownModel, UnknownWeights, BadOverride, BadInput, LoadMismatch, CorruptFile, Offline, MissingExtra.

    Example:
        >>> model = load("clip_moe_tiny", weights=False)
        >>> model.num_params().total > model.num_params().active
        True
    """
    origin = _find(str(name))
    swapped = {key: spec for key, spec in (("router", router), ("experts", experts)) if spec is not None}
    config: Any = make_config(origin.model_class.config_class, {**origin.config, **overrides, **swapped}, origin.label)
    device = _pick_device(device)
    with torch.device(device):
        model = origin.model_class(config)
    model.card = origin.card
    model.to(_pick_dtype(dtype))
    if origin.folder is not None:
        model.preprocessing = _read_json(origin.folder / "preprocess.json")
    if weights is not False and device.type != "meta":
        state, source = _weights(origin, weights, config)
        fresh = [pattern for key in swapped for pattern in _fresh_patterns(key)]
        model.load_report = load_state(model, state, source, allow_missing=[*allow_missing, *fresh])
    return model.eval()


def _fresh_patterns(swapped: str) -> list[str]:
    return [f"{swapped}.*", f"*.{swapped}.*"]


def _find(name: str) -> _Origin:
    if name.startswith("hf-hub:"):
        return _from_folder(_hub_folder(name.removeprefix("hf-hub:")), name)
    if Path(name).expanduser().is_dir():
        return _from_folder(Path(name).expanduser(), name)
    if name.startswith((".", "/", "~")):
        raise BadInput(
            f"no model folder '{name}'", f"looked in {Path(name).expanduser().absolute().parent}", "mmoe list"
        )
    found = card(name)
    tag = name.removeprefix(found.name).removeprefix(".") or None
    if tag is not None:
        found.find_weights(tag)
    return _Origin(label=found.name, card=found, model_class=family_class(found.family), config=found.config, tag=tag)


def _from_folder(folder: Path, label: str) -> _Origin:
    saved = _read_json(folder / "config.json")
    if saved.get("format") != FORMAT:
        raise CorruptFile(
            f"cannot load the folder '{folder}'",
            f"its format is {saved.get('format')}, this version reads {FORMAT}",
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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, revision, _ = split_hub(reference)
    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        require_online(f"cannot fetch the model {repo!r}", f"hf download {repo} --local-dir FOLDER")
    try:
        return Path(snapshot_download(repo, revision=revision))
    except HfHubHTTPError as error:
        first = str(error).strip().splitlines()[0]
        raise BadInput(f"cannot fetch the model {repo!r}", first, f"look at https://huggingface.co/{repo}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadInput(
            f"cannot load the folder '{path.parent}'",
            f"it has no {path.name}; a model folder is written by model.save(folder)",
            "mmoe list",
        )
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptFile(f"cannot read '{path}'", f"it is not JSON: {error}", "save the model again") from error
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
        package = {"open_clip": "open_clip_torch", "sklearn": "scikit-learn"}.get(str(error.name), str(error.name))
        raise MissingExtra(
            f"{family} needs {package}", f"the module {error.name!r} is not installed", f"pip install {package}"
        ) from error
    return found


def _weights(origin: _Origin, weights: bool | str, config: Any) -> tuple[State, str]:
    """State dict in our layout, and what to call it in the report."""
    if isinstance(weights, str) and (weights.startswith(_SOURCES) or Path(weights).suffix or "/" in weights):
        return read_state(locate(weights)), weights
    if origin.folder is not None:
        if isinstance(weights, str):
            raise BadOverride(
                f"weights={weights!r} for a folder", "a folder holds one set of weights", f"zoo.load('{origin.folder}')"
            )
        path = origin.folder / "model.safetensors"
        return read_state(locate(str(path))), str(path)
    assert origin.card is not None
    tag, entry = origin.card.find_weights(weights if isinstance(weights, str) else origin.tag)
    state = read_state(locate(entry.source, entry.sha256))
    label = f"{origin.card.name}.{tag} ({entry.source})"
    if not entry.original:
        return state, label
    convert = import_module(f"zoo.{origin.card.family}.convert")
    found, state = convert.from_original(state)
    wrong = [
        f"{key}: {getattr(found, key)} in the file, {getattr(config, key)} asked"
        for key in convert.SHOWN_BY_TENSORS
        if getattr(found, key) != getattr(config, key)
    ]
    if wrong:
        raise LoadMismatch(f"the weights {label} are of another model", "\n".join(wrong), "mmoe convert from-original")
    return state, label


def _pick_device(device: str | torch.device) -> torch.device:
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise BadInput(f"no device {str(device)!r}", "devices are cpu, cuda, mps, meta", "device='auto'") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _pick_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return torch.float32
    if dtype not in DTYPES:
        raise BadOverride(f"no dtype {dtype!r}", did_you_mean(dtype, DTYPES), "dtype='bf16'")
    return DTYPES[dtype]


__all__ = ["LoadReport", "family_class", "load"]
