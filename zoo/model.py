"""`Model`: an `nn.Module` that knows its card, prepares plain inputs, predicts, and saves itself to load alone."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import get_worker_info

import mmoe
from mmoe.atomic import atomic_paths
from mmoe.errors import BadOverride, Refused, did_you_mean
from mmoe.moe import moe_layers
from mmoe.profile import Params, count_params
from mmoe.registry import routers
from zoo.base import config_values, without_base
from zoo.card import Card
from zoo.config import make_config
from zoo.images import as_seen
from zoo.marks import Mark, marks
from zoo.state import LoadReport, State, collapse
from zoo.weights import WEIGHTS, hub_errors, require_online

FORMAT = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES |= {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Model(nn.Module):
    """Base of the models of the zoo.

    A family sets `family` and `config_class`, builds itself from a config alone, and implements `preprocess`, `predict`
    and `forward`. What preprocessing needs besides the config is given in `preprocessing` and taken back there.

    Attributes:
        family: folder of the family in the zoo.
        config_class: frozen dataclass of options.
        layer_methods: methods besides `forward` that run the layers.
        adapters: patterns of the parameters that the family trains on a backbone that stays frozen.
        own_parts: specs of the router and the experts of a config that names none, by option.
        base_tensors: patterns of the tensors that a base holds, by the part of the model; see `zoo.base`.
        windows: `predict` looks at a picture part by part; its routing is shown by a forward of the whole.
        card: what is known about the model, or None for one built by hand.
        config: the options it was built with.
    """

    family: ClassVar[str]
    config_class: ClassVar[type]
    layer_methods: ClassVar[tuple[str, ...]] = ()
    adapters: ClassVar[tuple[str, ...]] = ()
    own_parts: ClassVar[Mapping[str, str]] = MappingProxyType({})
    base_tensors: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    windows: ClassVar[bool] = False
    views_note: str = ""  # what a person should know about `views` and `seen`
    card: Card | None = None
    _report: LoadReport | None = None
    _loaded: Mapping[str, Mark] = MappingProxyType({})

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def load_report(self) -> LoadReport | None:
        """What loading the weights did, or None where they are random or were trained since."""
        now = marks(self)
        same = now.keys() == self._loaded.keys() and all(now[name].follows(mark) for name, mark in self._loaded.items())
        return self._report if same else None

    @load_report.setter
    def load_report(self, report: LoadReport | None) -> None:
        self._report, self._loaded = report, {} if report is None else marks(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_report": self.load_report, "_loaded": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.load_report = self._report  # of the copies, whose versions begin anew

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def input_device(self) -> torch.device:
        """Where `preprocess` puts tensors: beside the parameters, and in a data loader's worker in main memory.

        A worker is a fork, which cannot use CUDA; the training engine moves its batches.
        """
        return self.device if get_worker_info() is None else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.parameters()).dtype

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Everything that turns raw inputs into tensors, as plain data; it is saved beside the weights."""
        raise NotImplementedError

    @preprocessing.setter
    def preprocessing(self, values: dict[str, Any]) -> None:
        raise NotImplementedError

    def whole_preprocessing(self) -> dict[str, Any]:
        """The preprocessing for a folder that loads alone, with what is read on first use."""
        return self.preprocessing

    def seen(self, picture: Any) -> Image.Image:
        """The part of a picture that the model's patches cover, at full resolution; of several crops the first.

        Args:
            picture: as for `zoo.images.read_image`.
        """
        told = self.preprocessing
        return as_seen(picture, told.get("resize_mode", "squash"), tuple(told.get("background", (255, 255, 255))))

    def from_base(self, state: State, part: str) -> State:
        """Tensors of the base of a part, as its file has them, under this model's names."""
        return state

    def training_batch(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Samples with "image", "text", ... as what `forward` takes to give a `loss`.

        Raises:
            Refused: the model trains on no such samples.
        """
        given = ", ".join(name for name in next(iter(samples), {}) if name != "seed")
        raise Refused(f"train {type(self).__name__} on {given}", "its family has no training", "mmoe list")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes the activations of its layers again in backward instead of keeping them.

        Raises:
            Refused: the family has no such layers.
        """
        raise Refused(f"checkpoint the layers of {type(self).__name__}", "its family cannot", "run.checkpointing=false")

    def after_step(self, step: int) -> None:
        """What comes after an optimiser's step: parameters go back into their range, a teacher follows.

        Args:
            step: its number, from 0.
        """

    def training_state(self) -> dict[str, torch.Tensor]:
        """What training goes on with besides the parameters; a checkpoint has it, a saved model does not."""
        return {}

    def load_training_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes over what `training_state` gave; an empty one begins anew. Call it before the first step."""

    @classmethod
    def assemble(cls, models: Sequence[Model], options: Mapping[str, Any]) -> Model:
        """A mixture whose experts are the feed-forward layers of several dense models; the first is the host.

        Args:
            models: of one shape.
            options: of the mixture's config.

        Raises:
            Refused: the family cannot.
        """
        raise Refused(f"assemble a {cls.__name__}", "its family makes no experts of models", "mmoe convert upcycle")

    @classmethod
    def assembled_from(cls, options: Mapping[str, Any]) -> int | None:
        """How many models `assemble` takes for these options; None where it takes none at all."""
        return None

    def num_params(self) -> Params:
        """Parameter counts, total and active; `at_most` where active is an upper bound (see `mmoe.profile`)."""
        return count_params(self)

    def facts(self, config: Any = None) -> dict[str, Any]:
        """What a card says about the structure of a model: "config" (its own when None), "params" and "moe"."""
        params, layers = self.num_params(), list(moe_layers(self).values())
        moe: dict[str, Any] = {}
        if layers:
            router = layers[0].router
            moe = {"layers": len(layers), "experts": router.num_experts}
            moe |= {"top_k": router.experts_per_token, "router": routers.name_of(router)}
            moe |= {"at_most": True} if params.at_most else {}
        values = config_values(self.config if config is None else config)
        return {"config": values, "params": {"total": params.total, "active": params.active}, "moe": moe}

    def _card_to_save(self, config: Any, made_by: Mapping[str, Any] | None) -> Card | None:
        """A card for a folder: its structure and where it comes from, without numbers measured on other weights."""
        card, report = self.card, self.load_report
        if card is None:
            return None
        given: Any = make_config(self.config_class, card.config, card.name)
        changed = {f.name: getattr(config, f.name) for f in fields(given)}
        changed = {key: value for key, value in changed.items() if value != getattr(given, key)}
        measured = card.weights or card.metrics or card.routing
        if report is not None and made_by is None and not (report.random or changed or measured):
            return card  # a folder's own, saved again
        weights = "random, or trained since they were loaded" if report is None else f"loaded from {report.source}"
        if report is not None and report.random:
            weights += f", {report.random} tensors random"
        verb = {"verb": "save", "source": card.name, "weights": weights} if made_by is None else made_by
        lineage = {**verb, **changed}
        return replace(
            card,
            **self.facts(config),
            summary=f"{'Saved' if made_by is None else 'Trained'} from {card.name}.",
            licence=card.whole_licence,
            weights={},
            metrics=(),
            routing={},
            notes=(),
            lineage={**lineage, "before": card.lineage} if card.lineage else lineage,
        )

    def save(
        self,
        folder: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        card: Card | None = None,
        made_by: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes a folder that `zoo.load(folder)` reads alone: config, weights, preprocessing and card.

        The card tells the structure and where the model comes from. Numbers stay behind, since nobody measured them on
        what is saved here. Tensors that equal the model's bases are left out; see `zoo.base`.

        Args:
            folder: made when it is not there. Its files are replaced only after all new ones are written, so that
                a full disk leaves the old model.
            dtype: type of the saved parameters, as for `zoo.load`; as they are when None.
            card: written as it is, in place of one made from the model's own.
            made_by: what made the weights, for the card's lineage: a verb, and with what.

        Returns:
            The folder.

        Raises:
            Refused: the layers are not those of the config, for example after `mmoe.upcycle`.
        """
        self._check_layout()
        if not isinstance(card, Card | None):
            raise BadOverride(f"save with the card {card!r}", "it is no Card", "model.save(folder)")
        folder, whole = Path(folder).expanduser(), self._saved_state(None if dtype is None else pick_dtype(dtype))
        state, saved = without_base(self, whole)
        config = {"family": self.family, "format": FORMAT, "mmoe": mmoe.__version__, "config": asdict(saved)}
        card = card or self._card_to_save(saved, made_by)
        data = {} if card is None else {"card.json": card.as_dict()}
        data |= {
            "preprocess.json": self.whole_preprocessing(),
            "config.json": config,
        }  # a folder is a model once it has this
        with atomic_paths(folder / WEIGHTS, *(folder / name for name in data)) as (weights, *texts):
            save_file(state, weights, metadata={"format": "pt"})
            for text, values in zip(texts, data.values(), strict=True):
                text.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if card is None:
            (folder / "card.json").unlink(missing_ok=True)
        return folder

    def _check_layout(self) -> None:
        """A folder is built from its config again, so layers and their settings must be those of the config."""
        with torch.device("meta"):
            blank = type(self)(self.config)
        built, own = blank.state_dict(), self.state_dict()
        differ = [name for name in {**built, **own} if name not in own or name not in built]
        differ += [name for name in own if name in built and own[name].shape != built[name].shape]
        differ += _other_parts(self, blank)
        if differ:
            raise Refused(
                f"save a {type(self).__name__} whose layers are not those of its config",
                f"they differ in {collapse(differ)}",
                "torch.save(model, FILE), or make it from the command line: mmoe convert --help",
            )

    def _saved_state(self, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        self.check_values("save")
        state: dict[str, torch.Tensor] = {}
        used: set[int] = set()
        parameters = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        for name, value in self.state_dict().items():
            target = dtype if dtype is not None and name in parameters else value.dtype  # buffers keep their precision
            value, given = value.detach().to("cpu", target).contiguous(), value
            if value.dtype != given.dtype and given.isfinite().all() and not value.isfinite().all():
                wrong = f"{name} holds values of up to {float(given.abs().max()):.3g}"
                raise Refused(f"save {name} in {target}", wrong, "model.save(folder, dtype='bf16')")
            storage = value.untyped_storage()
            if storage.data_ptr() in used or storage.nbytes() != value.nbytes:  # the file takes no shared memory
                value = value.clone()
            used.add(storage.data_ptr())
            state[name] = value
        return state

    def check_values(self, verb: str) -> None:
        """Makes sure that the model is not on the meta device.

        Raises:
            Refused: it is.
        """
        if self.device.type == "meta":
            wrong, fix = "it has shapes but no values", "zoo.load(name, device='cpu')"
            raise Refused(f"{verb} a model on the meta device", wrong, fix)

    def push(self, repo_id: str, *, private: bool = False, folder: str | Path | None = None) -> str:
        """Saves and uploads to the Hugging Face hub (needs `hf auth login`).

        Args:
            repo_id: "org/name"; made when it is not there.
            private: for a repository that is made now.
            folder: where to save first; a temporary folder when None.

        Returns:
            Address of the repository.

        Raises:
            Offline: there is no network.
        """
        import tempfile

        from huggingface_hub import HfApi

        require_online(f"cannot push to {repo_id!r}", f"hf upload {repo_id} FOLDER")
        api = HfApi()
        with hub_errors(f"cannot push to {repo_id!r}", repo_id), tempfile.TemporaryDirectory() as temporary:
            saved = self.save(folder or temporary)
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            files = ["config.json", "preprocess.json", "card.json", WEIGHTS]
            api.upload_folder(repo_id=repo_id, folder_path=saved, allow_patterns=files)
        return str(url)


def _other_parts(model: nn.Module, built: nn.Module) -> list[str]:
    """Names of parts of mixtures that are of another class or have other settings."""

    def parts(host: nn.Module) -> dict[str, tuple[type, dict[str, Any]]]:
        layers = [
            (name, part) for layer, moe in moe_layers(host).items() for name, part in moe.named_modules(prefix=layer)
        ]
        return {name: (type(part), _settings(part)) for name, part in layers}

    own, expected = parts(model), parts(built)
    known = {name: settings for name, (_, settings) in expected.items()}
    same = {n: (kind, {k: found.get(k) for k in known.get(n, {})}) for n, (kind, found) in own.items()}
    return [name for name in own if same[name] != expected.get(name)]


def _settings(part: nn.Module) -> dict[str, Any]:
    """Plain values and functions of a module that say what it computes; notes of others count nothing."""
    plain = (bool, int, float, str, tuple, type(None))
    speed = ("training", "backend")
    return {
        name: value
        for name, value in vars(part).items()
        if not name.startswith("_") and name not in speed and (isinstance(value, plain) or inspect.isroutine(value))
    }


def pick_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The type that a name such as "bf16" or "bfloat16" stands for; fp32 for None.

    Raises:
        BadOverride: it is no type of parameters.

    >>> pick_dtype("bf16")
    torch.bfloat16
    """
    if dtype is None:
        return torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise BadOverride(f"no dtype {dtype!r}", did_you_mean(str(dtype), DTYPES), "dtype='bf16'")
    if not found.is_floating_point:
        raise BadOverride(f"no model in {found}", "parameters are floating-point numbers", "dtype='bf16'")
    return found
