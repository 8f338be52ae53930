"""Converts checkpoints of the authors of Gamma to ours and back.

Theirs: {"params": state dict}, names with "clip_model." and perhaps "module." in front; one matrix per expert in
`mlp.experts.expert_{e}`, the shared expert in `mlp.useful_experts`, the router in `mlp.gating.layer1`, the scale in
`mlp.scale`. Ours packs experts. Both prompt sets share the same names; prompts are in no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmoe.errors import LoadMismatch, Refused
from mmoe.registry import parse_spec
from zoo.gamma.model import GammaConfig
from zoo.hosts.clip import MLP_NAMES, SIZES_IN_TENSORS, TOWERS, sizes_of
from zoo.state import State, collapse

SHOWN_BY_TENSORS = (*SIZES_IN_TENSORS, "num_experts", "first_layer")
_ASKED = "convert this checkpoint to gamma"
_HEAD = {"level_values": "score_level", "adapter.down.weight": "adapter.fc.0.weight"}
_HEAD |= {"adapter.up.weight": "adapter.fc.2.weight"}
_RENAMED = {"mlp.post.scale": "mlp.scale", "mlp.router.": "mlp.gating.layer1.", "mlp.shared.": "mlp.useful_experts."}
_EXPERT = re.compile(r"(.+\.mlp)\.experts\.expert_(\d+)\.(.+)")
_KNOWN = re.compile(
    r"clip_model\.((visual\.)?transformer\.resblocks\.\d+\."
    r"(ln_[12]\.(weight|bias)|attn\.(in_proj_(weight|bias)|out_proj\.(weight|bias))"
    r"|mlp\.((useful_experts\.|experts\.expert_\d+\.)?c_(fc|proj)\.(weight|bias)|scale|gating\.layer1\.(weight|bias)))"
    r"|visual\.(class_embedding|positional_embedding|conv1\.weight|ln_(pre|post)\.(weight|bias)|proj)"
    r"|token_embedding\.weight|positional_embedding|ln_final\.(weight|bias)|text_projection|logit_scale)"
    r"|score_level|adapter\.fc\.[02]\.weight"
)


def from_original(state: Mapping[str, Any]) -> tuple[GammaConfig, State]:
    """The authors' Gamma: config and state dict in our layout.

    Args:
        state: tensors under the original names, or a mapping with them under "params".

    Raises:
        LoadMismatch: names that are unknown or missing, or experts that do not begin at one layer of both towers.
    """
    given: Mapping[str, Tensor] = state.get("params", state)
    given = {name.removeprefix("module."): value for name, value in given.items()}
    unknown = _unknown(given)
    if unknown:
        wrong, fix = f"unknown keys: {collapse(unknown)}", "give the state dict of Gamma with its CLIP"
        raise LoadMismatch(_ASKED, wrong, fix)
    missing = [name for name in _HEAD.values() if name not in given]
    if missing:
        raise LoadMismatch(_ASKED, f"it has no {', '.join(missing)}", "give the whole state dict")
    return _infer(given), convert_names(given)


def convert_names(state: Mapping[str, Tensor]) -> State:
    """Tensors of any part of the model under our names, the experts of each block packed.

    Raises:
        LoadMismatch: an expert of a block is missing.
    """
    converted: State = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        found = _EXPERT.fullmatch(name)
        if found is None:
            converted[_ours(name)] = value.float()
        else:
            packed = next(ours for ours, theirs in MLP_NAMES.items() if theirs == found[3])
            experts.setdefault(f"{_ours(found[1])}.experts.{packed}", {})[int(found[2])] = value
    for name, parts in experts.items():
        gate = converted.get(f"{name.rpartition('.experts.')[0]}.router.weight")
        count = max(parts) + 1 if gate is None else len(gate)
        if sorted(parts) != list(range(count)):
            wrong = f"{name} has experts {sorted(parts)} of {count}"
            raise LoadMismatch(_ASKED, wrong, "give the whole state dict")
        converted[name] = torch.stack([parts[e] for e in range(count)]).float()
    return converted


def to_original(state: Mapping[str, Tensor]) -> State:
    """Our state dict under the authors' names; the inverse of `from_original`. Their files have it under "params".

    Raises:
        Refused: the authors have no names for some tensors, such as those of other routers.
    """
    original: State = {}
    for name, value in state.items():
        block, _, part = name.partition(".mlp.experts.")
        if part in MLP_NAMES:
            for expert, rows in enumerate(value):
                theirs = f"{_theirs(block)}.mlp.experts.expert_{expert}.{MLP_NAMES[part]}"
                original[theirs] = rows.clone()
        else:
            original[_theirs(name)] = value
    unknown = _unknown(original)
    if unknown:
        wrong = f"they have no {collapse(unknown)}"
        raise Refused("cannot write this model under the authors' names", wrong, "model.save(folder)")
    return original


def check_expressible(config: GammaConfig) -> None:
    """Makes sure that the authors' layout can hold a model of this config.

    Raises:
        Refused: it has another router than theirs.
    """
    if config.router is not None and parse_spec(config.router) != {"name": "dense", "gate_bias": True}:
        wrong = f"they have no router {config.router!r}"
        raise Refused("cannot write this model under the authors' names", wrong, "model.save(folder)")


def assumed(config: GammaConfig) -> dict[str, Any]:
    """Options that `from_original` cannot read from a file."""
    heads = {f"{tower}_heads": config.heads(tower) for tower in TOWERS}
    read = "short_side", "crop_size", "crops", "num_crops", "crop_seed", "image_mean", "image_std"
    names = "activation", "prompts", "scenes", "levels", "positions", *read
    return {**heads, **{name: getattr(config, name) for name in names}}


def _ours(name: str) -> str:
    for ours, theirs in _HEAD.items():
        if name == theirs:
            return ours
    for ours, theirs in _RENAMED.items():
        name = name.replace(theirs, ours)
    return name.replace("clip_model.", "clip.")


def _theirs(name: str) -> str:
    if name in _HEAD:
        return _HEAD[name]
    for ours, theirs in _RENAMED.items():
        name = name.replace(ours, theirs)
    return name.replace("clip.", "clip_model.", 1)


def _unknown(state: Iterable[str]) -> list[str]:
    return [name for name in state if not _KNOWN.fullmatch(name)]


def _infer(state: Mapping[str, Tensor]) -> GammaConfig:
    sizes = sizes_of({name.removeprefix("clip_model."): value for name, value in state.items()}, "gamma")
    first, count = [], 0
    for tower, prefix in TOWERS.items():
        gates = [name for name in state if re.fullmatch(rf"clip_model\.{re.escape(prefix)}\.\d+\.mlp\.scale", name)]
        layers = sorted(int(name.split(".")[-3]) for name in gates)
        depth = sizes[f"{tower}_layers"]
        first.append(layers[0] if layers else depth)
        if layers != list(range(first[-1], depth)):
            wrong = f"experts in blocks {layers} of {depth} of the {tower} tower"
            raise LoadMismatch(_ASKED, wrong, "a model with experts in all blocks from one on")
        for name in gates:
            count = len(state[name.replace("mlp.scale", "mlp.gating.layer1.weight")])
    dense = not count
    if not dense and first[0] != first[1]:
        wrong = f"experts from block {first[0]} on in the image tower, {first[1]} in the text tower"
        raise LoadMismatch(_ASKED, wrong, "a model with experts from the same block on in both towers")
    return GammaConfig(**sizes, num_experts=count, **({} if dense else {"first_layer": first[0]}))
