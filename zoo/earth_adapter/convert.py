"""Converts the authors' checkpoints of Earth-Adapter, with or without a backbone inside, and back.

Authors' layout: `backbone.refine_feat.` with `mlp_list1` (spatial), `mlp_list2` (low) and `mlp_list3` (high) of all
layers, `router`, one vector `scale` and sometimes `refine_token`; `decode_head.` is mmdetection's Mask2Former; blocks
of the backbone have timm's names. Files hold `layer_norm` of an older revision and experts of layers that split no
frequencies, none of which is ever run. Which layers do, the files do not say: it comes from the task.
Shapes: L layers, D width, d inner width, N patches, C width of learned vectors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mmoe.errors import LoadMismatch, Refused
from zoo.earth_adapter.backbone import UNUSED
from zoo.earth_adapter.config import EarthAdapterConfig
from zoo.state import State, collapse

SHOWN_BY_TENSORS = ("width", "depth", "adapter_dim", "token_dim", "num_classes")
_ADAPTER = re.compile(r"refine_feat\.(?:mlp_list([123])\.(\d+)\.([02])|router\.(\d+)|layer_norm\.\d+)\.(weight|bias)")
_BACKBONE = re.compile(
    r"cls_token|pos_embed|register_tokens|patch_embed\.proj\.(weight|bias)"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)|blocks\.\d+\.ls[12]\.gamma"
)
_LISTS = ("mlp_list1", "mlp_list2", "mlp_list3")
_PACKED = {"up_proj": "0.weight", "up_bias": "0.bias", "down_proj": "2.weight", "down_bias": "2.bias"}
_NOT_RUN = (*UNUSED, "head.weight", "head.bias")

# mmdetection's Mask2Former -> transformers'; a number stands for the same number on both sides.
_HEAD = {
    r"pixel_decoder\.input_convs\.(\d)\.conv": r"pixel_decoder.input_projections.\1.0",
    r"pixel_decoder\.input_convs\.(\d)\.gn": r"pixel_decoder.input_projections.\1.1",
    r"pixel_decoder\.encoder\.layers\.(\d+)\.self_attn\.(\w+)": r"pixel_decoder.encoder.layers.\1.self_attn.\2",
    r"pixel_decoder\.encoder\.layers\.(\d+)\.ffn\.layers\.0\.0": r"pixel_decoder.encoder.layers.\1.fc1",
    r"pixel_decoder\.encoder\.layers\.(\d+)\.ffn\.layers\.1": r"pixel_decoder.encoder.layers.\1.fc2",
    r"pixel_decoder\.encoder\.layers\.(\d+)\.norms\.0": r"pixel_decoder.encoder.layers.\1.self_attn_layer_norm",
    r"pixel_decoder\.encoder\.layers\.(\d+)\.norms\.1": r"pixel_decoder.encoder.layers.\1.final_layer_norm",
    r"pixel_decoder\.lateral_convs\.0\.conv": r"pixel_decoder.adapter_1.0",
    r"pixel_decoder\.lateral_convs\.0\.gn": r"pixel_decoder.adapter_1.1",
    r"pixel_decoder\.output_convs\.0\.conv": r"pixel_decoder.layer_1.0",
    r"pixel_decoder\.output_convs\.0\.gn": r"pixel_decoder.layer_1.1",
    r"pixel_decoder\.mask_feature": r"pixel_decoder.mask_projection",
    r"transformer_decoder\.layers\.(\d+)\.cross_attn\.attn\.out_proj": (
        r"transformer_module.decoder.layers.\1.cross_attn.out_proj"
    ),
    r"transformer_decoder\.layers\.(\d+)\.self_attn\.attn\.out_proj": (
        r"transformer_module.decoder.layers.\1.self_attn.out_proj"
    ),
    r"transformer_decoder\.layers\.(\d+)\.ffn\.layers\.0\.0": r"transformer_module.decoder.layers.\1.fc1",
    r"transformer_decoder\.layers\.(\d+)\.ffn\.layers\.1": r"transformer_module.decoder.layers.\1.fc2",
    r"transformer_decoder\.layers\.(\d+)\.norms\.0": r"transformer_module.decoder.layers.\1.cross_attn_layer_norm",
    r"transformer_decoder\.layers\.(\d+)\.norms\.1": r"transformer_module.decoder.layers.\1.self_attn_layer_norm",
    r"transformer_decoder\.layers\.(\d+)\.norms\.2": r"transformer_module.decoder.layers.\1.final_layer_norm",
    r"transformer_decoder\.post_norm": r"transformer_module.decoder.layernorm",
    r"query_embed": r"transformer_module.queries_embedder",
    r"query_feat": r"transformer_module.queries_features",
    r"level_embed": r"transformer_module.level_embed",
    r"cls_embed": r"class_predictor",
    r"mask_embed\.0": r"transformer_module.decoder.mask_predictor.mask_embedder.0.0",
    r"mask_embed\.2": r"transformer_module.decoder.mask_predictor.mask_embedder.1.0",
    r"mask_embed\.4": r"transformer_module.decoder.mask_predictor.mask_embedder.2.0",
}
_CROSS = re.compile(r"transformer_decoder\.layers\.(\d+)\.cross_attn\.attn\.in_proj_(weight|bias)")
_SELF = re.compile(r"transformer_decoder\.layers\.(\d+)\.self_attn\.attn\.in_proj_(weight|bias)")
_LEVELS = "pixel_decoder.level_encoding.weight", "pixel_decoder.level_embed"


def is_original(state: Iterable[str]) -> bool:
    """True for names of tensors in the authors' layout: those of the backbone alone are the same in ours."""
    return any("refine_feat." in name or name.startswith("decode_head.") for name in state)


def from_original(
    state: Mapping[str, Tensor], *, like: EarthAdapterConfig | None = None
) -> tuple[EarthAdapterConfig, State]:
    """The authors' checkpoint, whole or adapters and decoder alone: config and state dict in our layout.

    Args:
        state: tensors under the original names.
        like: options that the file does not show: `fft_layers` and `cutoff` (by `task`, say), heads, classes.

    Raises:
        LoadMismatch: keys that are unknown or missing.
    """
    plain, head = _split(state)
    unknown = [n for n in plain if not (_ADAPTER.fullmatch(n) or _BACKBONE.fullmatch(n) or n in _KNOWN)]
    converted, strange = head_from_original(head)
    unknown += [f"decode_head.{name}" for name in strange]
    if unknown:
        raise _mismatch(f"unknown keys: {collapse(unknown)}")
    config = _infer(plain, head, like or EarthAdapterConfig())
    found: State = {f"head.{name}": value for name, value in converted.items()}
    for name, value in plain.items():
        if _BACKBONE.fullmatch(name):
            ours = "reg_token" if name == "register_tokens" else name
            found[f"backbone.{ours}"] = value.float()
    for layer in range(config.depth) if config.adapter_layers is None else config.adapter_layers:
        prefix = f"backbone.blocks.{layer}.frequency_adapter"
        frequency = config.adapters == "frequency" and layer in (config.fft_layers or ())
        packed = adapter_from_original(plain, layer, frequency=frequency, compact=config.compact)
        found |= {f"{prefix}.{name}": value for name, value in packed.items()}
    return config, found


_KNOWN = ("refine_feat.scale", "refine_feat.refine_token", *_NOT_RUN)


def _split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the backbone with its adapters, and of the decoder, without their first names."""
    head = {n.removeprefix("decode_head."): v for n, v in state.items() if n.startswith("decode_head.")}
    plain = {n.removeprefix("backbone."): v for n, v in state.items() if not n.startswith("decode_head.")}
    return plain, head


def _mismatch(wrong: str) -> LoadMismatch:
    return LoadMismatch("convert this checkpoint to earth_adapter", wrong, "the state dict of a released model")


def adapter_from_original(state: Mapping[str, Tensor], layer: int, *, frequency: bool, compact: bool = True) -> State:
    """Tensors of one layer's adapter from the authors' layout, under the names of `mmoe.FrequencyAdapter`.

    Args:
        state: with "refine_feat.mlp_list1.0.0.weight" and so on.
        layer: from 0.
        frequency: the layer splits frequencies; otherwise its low and high experts and its router are dead.
        compact: leaves dead parts out.
    """
    dead = f"refine_feat.mlp_list2.{layer}.0.weight" in state and not frequency and not compact
    try:
        used = _LISTS if frequency else _LISTS[:1]
        found = {f"adapter.experts.{k}": v for k, v in _pack(state, layer, used).items()}
        found["scale"] = state["refine_feat.scale"][layer : layer + 1].float()
        if dead:
            found |= {f"dead.experts.{k}": v for k, v in _pack(state, layer, _LISTS[1:]).items()}
        if frequency or dead:
            place = "adapter.router" if frequency else "dead.router"
            found |= {f"{place}.{k}": state[f"refine_feat.router.{layer}.{k}"].float() for k in ("weight", "bias")}
    except KeyError as error:
        raise _mismatch(f"it has no {error}") from error
    if "refine_feat.refine_token" in state:
        dim = len(found["adapter.experts.down_proj"][0])
        wide = state[f"refine_feat.mlp_list1.{layer}.0.weight"].float()
        found["adapter.experts.token_proj"] = wide[:, dim:].clone()
        found["adapter.experts.tokens"] = state["refine_feat.refine_token"][layer].float()
    return found


def _pack(state: Mapping[str, Tensor], layer: int, lists: tuple[str, ...]) -> State:
    packed = {}
    for ours, theirs in _PACKED.items():
        parts = [state[f"refine_feat.{name}.{layer}.{theirs}"].float() for name in lists]
        if ours == "up_proj":  # the spatial expert's input may be wider, by learned vectors
            dim = state[f"refine_feat.mlp_list1.{layer}.2.weight"].shape[0]
            parts = [part[:, :dim] for part in parts]
        packed[ours] = torch.stack(parts)
    return packed


def head_from_original(state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """A decoder under the names of transformers' Mask2Former, and names that are none of mmdetection's."""
    found: State = {}
    unknown = []
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        ours = next((re.sub(k, v, stem) for k, v in _HEAD.items() if re.fullmatch(k, stem)), None)
        cross, own = _CROSS.fullmatch(name), _SELF.fullmatch(name)
        if name == _LEVELS[0]:
            found[_LEVELS[1]] = value.float()
        elif ours is not None:
            found[f"{ours}.{kind}"] = value.float()
        elif cross is not None:
            found[f"transformer_module.decoder.layers.{cross[1]}.cross_attn.in_proj_{cross[2]}"] = value.float()
        elif own is not None:
            place = f"transformer_module.decoder.layers.{own[1]}.self_attn"
            parts = zip("qkv", value.float().chunk(3), strict=True)
            found |= {f"{place}.{part}_proj.{own[2]}": one.clone() for part, one in parts}
        else:
            unknown.append(name)
    return found, unknown


def _infer(state: Mapping[str, Tensor], head: Mapping[str, Tensor], like: EarthAdapterConfig) -> EarthAdapterConfig:
    try:
        scale, first = state["refine_feat.scale"], state["refine_feat.mlp_list1.0.0.weight"]
        width = state["refine_feat.mlp_list1.0.2.weight"].shape[0]
    except KeyError as error:
        raise _mismatch(f"it has no {error}") from error
    shown: dict[str, Any] = {"depth": len(scale), "width": width, "adapter_dim": len(first)}
    shown["token_dim"] = first.shape[1] - width
    shown["adapters"] = like.adapters if like.adapters != "none" else "frequency"
    split = [layer for layer in range(len(scale)) if f"refine_feat.mlp_list2.{layer}.0.weight" in state]
    if not split:
        shown["adapters"], shown["fft_layers"] = "spatial", ()
    elif len(split) < len(scale):  # written by `to_original`, which leaves dead parts out
        shown["adapters"], shown["fft_layers"] = "frequency", tuple(split)
    if "patch_embed.proj.weight" in state:
        shown["patch_size"] = state["patch_embed.proj.weight"].shape[-1]
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
        shown["image_size"] = side * shown["patch_size"]
        shown["num_registers"] = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        shown["layer_scale"] = like.layer_scale if "blocks.0.ls1.gamma" in state else None
    if head:
        count = len(head["cls_embed.bias"]) - 1 if "cls_embed.bias" in head else like.num_classes
        same = count == like.num_classes
        classes = like.classes if same else tuple(f"class {number}" for number in range(count))
        shown |= {"head": "mask2former", "classes": classes, "colors": like.colors if same else None}
    return _with_sizes(like, shown)


def _with_sizes(like: EarthAdapterConfig, shown: Mapping[str, Any]) -> EarthAdapterConfig:
    """The options with sizes that a file shows; what followed from other sizes is worked out anew."""
    values = {**asdict(like), **shown}
    if values["depth"] != like.depth:
        deep = values["depth"]
        values["out_layers"] = None
        values["fft_layers"] = shown.get("fft_layers", tuple(one for one in like.fft_layers or () if one < deep))
    if values["width"] != like.width:
        values["heads"] = None
    if values["image_size"] != like.image_size:
        values["stride"] = None
    return EarthAdapterConfig(**values)


def assumed(config: EarthAdapterConfig) -> dict[str, Any]:
    """Options that `from_original` cannot read from a file."""
    read = "image_size", "stride", "image_mean", "image_std"
    names = "heads", "fft_layers", "cutoff", "box", "out_layers", "classes", *read
    return {name: getattr(config, name) for name in names}


def check_expressible(config: EarthAdapterConfig) -> None:
    """Makes sure that the authors' layout can hold a model of this config.

    Raises:
        Refused: it has another decoder, or no adapters in some layers.
    """
    wrong = None
    if config.head != "mask2former":
        wrong = f"theirs have a Mask2Former, not the head {config.head!r}"
    elif config.adapters == "none" or config.adapter_layers is not None:
        wrong = "theirs have an adapter behind every block"
    if wrong is not None:
        raise Refused("cannot write this model under the authors' names", wrong, "model.save(folder)")


def to_original(state: Mapping[str, Tensor]) -> State:
    """Our state dict under the authors' names, without parts that are never run.

    Raises:
        Refused: the authors have no names for some tensors.
    """
    found: State = {}
    rest = dict(state)
    adapters = sorted({int(m[1]) for n in state if (m := re.match(r"backbone\.blocks\.(\d+)\.frequency_adapter", n))})
    scales, tokens = [], []
    for layer in adapters:
        prefix = f"backbone.blocks.{layer}.frequency_adapter."
        own = {n.removeprefix(prefix): rest.pop(n) for n in list(rest) if n.startswith(prefix)}
        scales.append(own["scale"])
        tokens += [own["adapter.experts.tokens"]] if "adapter.experts.tokens" in own else []
        found |= _adapter_to_original(own, layer)
    if scales:
        found["backbone.refine_feat.scale"] = torch.cat(scales)
    if tokens:
        found["backbone.refine_feat.refine_token"] = torch.stack(tokens)
    for name in [name for name in rest if name.startswith("backbone.")]:
        theirs = name.replace("backbone.reg_token", "backbone.register_tokens")
        found[theirs] = rest.pop(name)
    head = {name.removeprefix("head."): value for name, value in rest.items()}
    written, strange = _head_to_original(head)
    if strange or not scales:
        wrong = f"they have no {collapse(strange)}" if strange else "theirs have adapters, it has none"
        raise Refused("cannot write this model under the authors' names", wrong, "model.save(folder)")
    return found | {f"decode_head.{name}": value for name, value in written.items()}


def _adapter_to_original(own: Mapping[str, Tensor], layer: int) -> State:
    found: State = {}
    kept = [("adapter", _LISTS)]
    kept += [("dead", _LISTS[1:])] if "dead.router.weight" in own else []
    for place, lists in kept:
        for ours, theirs in _PACKED.items():
            for name, rows in zip(lists, own[f"{place}.experts.{ours}"], strict=False):
                if name == _LISTS[0] and ours == "up_proj" and "adapter.experts.token_proj" in own:
                    rows = torch.cat([rows, own["adapter.experts.token_proj"]], dim=1)
                found[f"backbone.refine_feat.{name}.{layer}.{theirs}"] = rows.clone()
        for kind in ("weight", "bias"):
            if f"{place}.router.{kind}" in own:
                found[f"backbone.refine_feat.router.{layer}.{kind}"] = own[f"{place}.router.{kind}"]
    return found


def _head_to_original(state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """The inverse of `head_from_original`, found by asking it for every name that it could have had."""
    found: State = {}
    rest = dict(state)
    back = {_pattern(ours): _template(theirs) for theirs, ours in _HEAD.items()}
    layers = {m[1] for n in state if (m := re.match(r"transformer_module\.decoder\.layers\.(\d+)\.", n))}
    for layer in layers:
        theirs = f"transformer_decoder.layers.{layer}"
        for kind in ("weight", "bias"):
            ours = f"transformer_module.decoder.layers.{layer}"
            names = [f"{ours}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            if all(name in rest for name in names):
                packed = torch.cat([rest.pop(name) for name in names])
                found[f"{theirs}.self_attn.attn.in_proj_{kind}"] = packed
            if f"{ours}.cross_attn.in_proj_{kind}" in rest:
                found[f"{theirs}.cross_attn.attn.in_proj_{kind}"] = rest.pop(f"{ours}.cross_attn.in_proj_{kind}")
    if _LEVELS[1] in rest:
        found[_LEVELS[0]] = rest.pop(_LEVELS[1])
    strange = []
    for name, value in rest.items():
        stem, _, kind = name.rpartition(".")
        theirs = next((re.sub(k, v, stem) for k, v in back.items() if re.fullmatch(k, stem)), None)
        if theirs is None:
            strange.append(f"head.{name}")
        else:
            found[f"{theirs}.{kind}"] = value
    return found, strange


def _pattern(template: str) -> str:
    """A template such as "a.\\1.b" as a pattern."""
    return re.sub(r"\\\\([12])", lambda m: r"(\d+)" if m[1] == "1" else r"(\w+)", re.escape(template))


def _template(pattern: str) -> str:
    """A pattern such as "a\\.(\\d)\\.b" as a template."""
    numbers = iter((r"\1", r"\2"))
    return re.sub(r"\([^)]*\)", lambda _: next(numbers), pattern).replace(r"\.", ".")
