"""Checkpoints as they are released: one file, or a folder of shards, of parts, or of peft's adapters.

    model-00001-of-00003.safetensors ... with model.safetensors.index.json     shards, as transformers writes them
    adapter_model.safetensors (or .bin) with adapter_config.json               low-rank adapters, added to the weights
    non_lora_trainables.bin, mm_audio_aligner.bin, mlp_gates.bin, ...          parts that were trained whole

Tensors of a later path stand over those of an earlier one, and adapters are added to what is there then: a base first,
what was trained on it behind it. Names lose the prefixes that peft and trainers leave.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmoe.errors import BadInput, CorruptFile, LoadMismatch
from zoo.state import State, read_json, read_state
from zoo.weights import locate

ENDINGS = (".safetensors", ".bin", ".pt", ".pth")
_ADAPTER_CONFIG = "adapter_config.json"
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SAFE = {"pytorch_model.bin": "model.safetensors", "adapter_model.bin": "adapter_model.safetensors"}
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")


def read_released(paths: Sequence[str]) -> State:
    """Tensors of files and folders, later ones over earlier ones.

    Args:
        paths: see the head of this file; a file may be any source of `zoo.weights.locate`.

    Raises:
        BadInput: there is no such file, or no weights in a folder.
        CorruptFile: a file is damaged, or a shard of an index is missing.
        LoadMismatch: adapters belong to tensors that are not there.
    """
    found: State = {}
    for path in paths:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            found |= plain_names(read_state(locate(path)))
            continue
        adapters: State = {}
        for file in _files(folder):
            state = plain_names(read_state(file))
            adapters |= {name: value for name, value in state.items() if _LORA.fullmatch(name)}
            found |= {name: value for name, value in state.items() if not _LORA.fullmatch(name)}
        if adapters:
            found = merged(found, adapters, read_json(folder / _ADAPTER_CONFIG, "the folder that peft wrote"))
    return found


def plain_names(state: State) -> State:
    """Without the prefix of peft's models, and without a second "model." in front.

    >>> list(plain_names({"base_model.model.model.norm.weight": 0, "base_model.model.lm_head.weight": 1}))
    ['model.norm.weight', 'lm_head.weight']
    """
    named = {name.removeprefix("base_model."): value for name, value in state.items()}
    doubled = len(named) > 0 and all(name.startswith("model.") for name in named) and named.keys() != state.keys()
    if doubled or any(name.startswith("model.model.") for name in named):
        named = {name.removeprefix("model."): value for name, value in named.items()}
    return named


def merged(state: State, adapters: State, config: Any) -> State:
    """Weights with low-rank adapters added: W + (alpha / r) B A.

    Args:
        state: with all weights that the adapters belong to.
        adapters: MODULE.lora_A.weight (r, in) and MODULE.lora_B.weight (out, r).
        config: of peft: "r", "lora_alpha", and "use_rslora" where it scales by the root of r.

    Raises:
        LoadMismatch: a weight or a half of an adapter is not there, or shapes do not fit.
        CorruptFile: the config does not say how adapters are scaled.

    Example:
        >>> import torch
        >>> halves = {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(3, 1)}
        >>> merged({"a.weight": torch.zeros(3, 2)}, halves, {"r": 1, "lora_alpha": 2})["a.weight"].unique().tolist()
        [2.0]
    """
    halves: dict[str, State] = {}
    for name, value in adapters.items():
        found = _LORA.fullmatch(name)
        if found is not None:
            halves.setdefault(found[1], {})[found[2]] = value
    changed: State = {}
    for module, pair in halves.items():
        weight = state.get(f"{module}.weight")
        if weight is None or len(pair) < 2:
            wrong = f"there is no {module}.weight" if weight is None else f"it has only one half, {next(iter(pair))}"
            raise LoadMismatch(f"add the adapter of {module}", wrong, "the base first: BASE --over ADAPTERS")
        try:
            update = pair["B"].float() @ pair["A"].float()
            changed[f"{module}.weight"] = (weight.float() + _scale(config, len(pair["A"])) * update).to(weight.dtype)
        except RuntimeError as error:
            shapes = f"{tuple(pair['B'].shape)} x {tuple(pair['A'].shape)} is not {tuple(weight.shape)}"
            raise LoadMismatch(f"add the adapter of {module}", shapes, "the base that it was trained on") from error
    return {**state, **changed}


def _scale(config: Any, rank: int) -> float:
    alpha = config.get("lora_alpha") if isinstance(config, dict) else None
    if not isinstance(alpha, int | float):
        raise CorruptFile("read adapters", f"{_ADAPTER_CONFIG} has no lora_alpha", "the folder that peft wrote")
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _files(folder: Path) -> list[Path]:
    """Weight files of a folder: the shards of its index, or all files; of one in two formats the safe one."""
    asked = f"read the checkpoint '{folder}'"
    index = next((folder / name for name in _INDICES if (folder / name).is_file()), None)
    if index is not None:
        told = read_json(index, "a whole download of the checkpoint")
        names = told.get("weight_map", {}).values() if isinstance(told, dict) else ()
        shards = [folder / Path(name).name for name in sorted(set(map(str, names)))]
        missing = next((file for file in shards if not file.is_file()), None)
        if missing is not None or not shards:
            wrong = f"{missing.name} is missing" if missing is not None else f"{index.name} names no files"
            raise CorruptFile(asked, wrong, "download it again")
        return shards
    found = [file for file in sorted(folder.iterdir()) if file.suffix in ENDINGS and file.name not in _NOT_WEIGHTS]
    found = [file for file in found if folder / _SAFE.get(file.name, "") not in found]
    if not found:
        raise BadInput(asked, f"it has no file that ends in {', '.join(ENDINGS)}", "the folder of a release")
    return found
