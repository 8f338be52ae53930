"""The authors' checkpoints of Uni-MoE under our names: speech, sound and 8 experts, towers included.

Two towers have no weights in some files: theirs come from checkpoints of their own, as bases (`zoo.uni_moe.parts`) or
beside the others. A second Whisper that is never run,
buffers of rotary positions and tables that BEATs repeats in every layer are left out; unknown names are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmoe.errors import LoadMismatch, Refused
from mmoe.registry import parse_spec
from zoo.hosts import beats
from zoo.hosts.decoder import PROJECTIONS, pack_ffns
from zoo.uni_moe.config import BEATS, UniMoEConfig

State = dict[str, Tensor]
_EXPERT = re.compile(
    r"(model\.layers\.\d+\.mlp)\.(?:deepspeed_moe\.experts\.deepspeed_experts|experts)\.(\d+)"
    r"\.((?:gate|up|down)_proj(?:_lora_[AB])?)\.weight"
)
_MODALITIES = ("text", "image", "audio", "video")  # by number, as in `zoo.uni_moe.config.MODALITIES`
_OF_MODALITY = re.compile(rf"model\.layers\.(\d+)\.mlp\.deepspeed_moe\.fm_({'|'.join(_MODALITIES)})\.(weight|bias)")
_LLM = re.compile(
    r"lm_head\.weight|model\.(embed_tokens\.weight|norm\.weight|layers\.\d+\."
    r"((input|post_attention)_layernorm\.weight|self_attn\.[qkvo]_proj\.weight|mlp\.(gate|up|down)_proj\.weight))"
)
_UNUSED = re.compile(
    r"model\.audio_tower\.(encoder|decoder)\..*|.*rotary_emb\.inv_freq|.*\.audio_decoder\.embed_tokens\.weight"
    r"|.*\.vision_model\.embeddings\.position_ids"
)
_BEATS = "model.audio_tower.audio_tower."
_WHISPER = re.compile(r"model\.audio_tower\.audio_tower\.(conv[12]|embed_positions|layers\.|layer_norm\.)")
_RENAMED = (
    (r"model\.layers\.(\d+)\.mlp\.(?:deepspeed_moe\.gate\.wg|gate)\.weight", r"llm.model.layers.\1.mlp.router.weight"),
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)", r"vision.encoder.\1"),
    (r"model\.mm_projector\.(.+)", r"vision.projector.\1"),
    (r"model\.mm_audio_aligner\.decoder\.audio_decoder\.(.+)", r"speech.resampler.decoder.\1"),
    (r"model\.mm_audio_aligner\.qformer\.qformer\.(.+)", r"sound.resampler.qformer.\1"),
    (r"model\.mm_audio_aligner\.qformer\.query_tokens", r"sound.resampler.queries"),
    (r"model\.mm_audio_aligner\.query_tokens", r"sound.resampler.queries"),
    (r"model\.query_tokens", r"speech.resampler.queries"),
)


def convert_names(state: Mapping[str, Tensor]) -> State:
    """A state dict of the authors under our names, with packed experts.

    Args:
        state: of a speech or a sound model, or of one with 8 experts; the prefix that peft leaves is taken off. Experts
            with low-rank factors are those of "lora_gated_ffn", a layer per modality that of a router "by_modality".

    Raises:
        LoadMismatch: it has names that no such model has.
    """
    state = {re.sub(r"^base_model\.", "", name): value for name, value in state.items()}
    if any(name.startswith("model.model.") for name in state):
        state = {re.sub(r"^model\.", "", name): value for name, value in state.items()}
    speaks = any("audio_decoder" in name or name == "model.query_tokens" for name in state)
    found: State = {}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    tower: State = {}
    unknown = []
    for name, value in state.items():
        expert = _EXPERT.fullmatch(name)
        if _UNUSED.fullmatch(name):
            continue
        if expert is not None:
            experts.setdefault(expert[1], {}).setdefault(int(expert[2]), {})[expert[3]] = value
        elif name.startswith(_BEATS):
            if speaks or (_WHISPER.match(name) and "encoder." not in name.removeprefix(_BEATS)):
                found[f"speech.encoder.{name.removeprefix(_BEATS)}"] = value
            else:
                tower[name.removeprefix(_BEATS)] = value
        else:
            ours = _renamed(name, "speech" if speaks else "sound")
            if ours is None:
                unknown.append(name)
            else:
                found[ours] = _in_our_shape(ours, value)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        asked = "convert this checkpoint to uni_moe"
        raise LoadMismatch(asked, f"it has {', '.join(unknown[:3])}{more}", "a speech or sound model of Uni-MoE")
    for place, ffns in experts.items():
        found |= {f"llm.{place}.experts.{name}": value for name, value in _packed(place, ffns).items()}
    found = _by_modality(found)
    return found | {f"sound.encoder.{name}": value for name, value in beats.from_original(tower).items()}


def _in_our_shape(name: str, value: Tensor) -> Tensor:
    """Queries without a dimension for the batch; a convolution of width 1 as the linear layer that it is."""
    if name.endswith("resampler.queries") and value.ndim == 3:
        return value[0]
    return value.squeeze(-1) if ".router.layers." in name and value.ndim == 3 else value


def _renamed(name: str, branch: str) -> str | None:
    if _LLM.fullmatch(name):
        return f"llm.{name}"
    if name.startswith("model.mm_audio_aligner.projector."):
        return f"{branch}.resampler.projector.{name.rpartition('.')[2]}"
    layer = _OF_MODALITY.fullmatch(name)
    if layer is not None:
        number = _MODALITIES.index(layer[2])
        return f"llm.model.layers.{layer[1]}.mlp.router.layers.{number}.{layer[3]}"
    for theirs, ours in _RENAMED:
        if re.fullmatch(theirs, name):
            return re.sub(theirs, ours, name)
    return None


def _packed(place: str, ffns: Mapping[int, Mapping[str, Tensor]]) -> State:
    whole = sorted({*PROJECTIONS, *(name for ffn in ffns.values() for name in ffn)})
    if any("_lora_" in name for name in whole):
        whole = [f"{name}{part}" for name in PROJECTIONS for part in ("", "_lora_A", "_lora_B")]
    for expert in range(max(ffns) + 1):
        missing = [name for name in whole if name not in ffns.get(expert, {})]
        if missing:
            wrong = f"{place}.experts.{expert} has no {' and no '.join(missing)}"
            raise LoadMismatch("convert this checkpoint to uni_moe", wrong, "a whole state dict")
    own = [ffns[expert] for expert in range(len(ffns))]
    found = pack_ffns(own)
    if len(whole) > len(PROJECTIONS):
        found["gate_up_a"] = torch.stack([torch.cat([f["gate_proj_lora_A"], f["up_proj_lora_A"]]) for f in own])
        found["down_a"] = torch.stack([ffn["down_proj_lora_A"] for ffn in own])
        for kind in ("gate", "up", "down"):
            found[f"{kind}_b"] = torch.stack([ffn[f"{kind}_proj_lora_B"] for ffn in own])
    return found


def _by_modality(state: State) -> State:
    """Routers of blocks that have a layer per modality stand inside another router, which holds the layers packed."""
    behind = {name.partition(".router.")[0] for name in state if ".router.layers." in name}
    inside = {f"{place}.router.weight": f"{place}.router.inner.weight" for place in behind}
    found = {inside.get(name, name): value for name, value in state.items() if ".router.layers." not in name}
    for place in sorted(behind):
        for part in ("weight", "bias"):
            names = [f"{place}.router.layers.{number}.{part}" for number in range(len(_MODALITIES))]
            lost = [kind for kind, name in zip(_MODALITIES, names, strict=True) if name not in state]
            if lost:
                wrong = f"{place} has no {part} of fm_{' and fm_'.join(lost)}"
                raise LoadMismatch("convert this checkpoint to uni_moe", wrong, "a whole state dict")
            found[f"{place}.router.modality_{part}"] = torch.stack([state[name] for name in names])
    return found


def from_original(state: Mapping[str, Tensor], like: UniMoEConfig | None = None) -> tuple[UniMoEConfig, State]:
    """Config and state dict of a checkpoint of the authors.

    Args:
        state: as for `convert_names`, with the encoders.
        like: where options come from that tensors do not show: heads, the number of experts that a token takes, the
            tokenizer, encoders of which it has a base. Without it a head is 128 wide in the language model and 64 in
            encoders, as released.

    Raises:
        LoadMismatch: it is no such checkpoint, or lacks an encoder.
    """
    found = convert_names(state)
    try:
        return _infer(found, like or UniMoEConfig(vision=None, speech=None, sound=None)), found
    except KeyError as error:
        wrong = f"it has no {error}; encoders may be in files of their own, which base={{vision: FILE}} and so on name"
        raise LoadMismatch("convert this checkpoint to uni_moe", wrong, "a whole state dict") from error


def assumed(config: UniMoEConfig) -> dict[str, Any]:
    """Options that `from_original` cannot read from a file."""
    names = "heads", "top_k", "norm_eps", "rope_theta", "positions", "vision_layer", "tokenizer", "template"
    heads = {f"{name} heads": getattr(config, name)["heads"] for name in ("vision", "speech") if getattr(config, name)}
    return {**{name: getattr(config, name) for name in names}, **heads}


def check_expressible(config: UniMoEConfig) -> None:
    """Makes sure that the authors' layout can hold a model of this config.

    Raises:
        Refused: it has sounds, or none of the other branches, or other experts than feed-forward blocks.
    """
    wrong = None
    if "timm" in (config.vision or {}) or "stack" in (config.speech or {}):
        wrong = "theirs have CLIP and a Whisper decoder as a resampler"
    elif config.sound is not None:
        wrong = "theirs hold the norm of BEATs' position weights apart, which is not exact"
    elif config.experts != "gated_ffn" or parse_spec(config.router) != parse_spec(UniMoEConfig.router):
        wrong = "theirs have plain gated experts and a router of one matrix"
    if wrong is not None:
        raise Refused("cannot write this model under the authors' names", wrong, "model.save(folder)")


def _infer(state: State, like: UniMoEConfig) -> UniMoEConfig:
    layers = _count(state, "llm.model.layers.")
    vocab_size, width = state["llm.model.embed_tokens.weight"].shape
    told = like.width == width or like.heads != UniMoEConfig.heads
    heads = like.heads if told and width % like.heads == 0 else max(1, width // 128)
    head = width // heads
    mixed = [n for n in range(layers) if f"llm.model.layers.{n}.mlp.experts.gate_up_proj" in state]
    first = f"llm.model.layers.{mixed[0] if mixed else 0}.mlp"
    up = state[f"{first}.experts.gate_up_proj"][0] if mixed else None
    shown: dict[str, Any] = {
        "vocab_size": vocab_size,
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": state["llm.model.layers.0.self_attn.k_proj.weight"].shape[0] // head,
        "ffn_dim": len(state[f"{first}.gate_proj.weight"]) if up is None else len(up) // 2,
        "num_experts": len(state[f"{first}.experts.gate_up_proj"]) if mixed else 0,
        "moe_layers": _named(mixed, layers),
    }
    for branch, read in (("vision", _vision), ("speech", _speech), ("sound", _sound)):
        given, there = getattr(like, branch), any(name.startswith(f"{branch}.encoder.") for name in state)
        from_base = not there and branch in (like.base or {})  # what `like` says of it holds
        shown[branch] = given if from_base else read(state, None if "timm" in (given or {}) else given)
    if "vision.projector.weight" in state:
        shown["projector"] = "linear"
    elif shown["vision"]:
        shown["projector"] = f"mlp{len({n for n in state if n.startswith('vision.projector.')}) // 2}x_gelu"
    for branch in ("speech", "sound"):
        if shown[branch]:
            shown["queries"] = len(state[f"{branch}.resampler.queries"])
    if f"{first}.experts.gate_up_a" in state:
        shown["experts"] = f"lora_gated_ffn:rank={state[f'{first}.experts.down_a'].shape[1]}"
    if f"{first}.router.modality_bias" in state:
        kinds = len(state[f"{first}.router.modality_bias"])
        shown["router"] = {"name": "by_modality", "inner": UniMoEConfig.router, "modalities": kinds}
    return replace(like, **shown)


def _count(state: State, place: str) -> int:
    return 1 + max((int(name[len(place) :].split(".")[0]) for name in state if name.startswith(place)), default=-1)


def _named(mixed: list[int], layers: int) -> str | tuple[int, ...]:
    names = {tuple(range(0, layers, step)): name for name, step in (("even", 2), ("all", 1))}
    return names.get(tuple(mixed), tuple(mixed)) if mixed else "all"


def _heads(like: Mapping[str, Any] | None, part: str, width: int) -> int:
    """Those of a like part of the same width, else one for each 64."""
    same = like is not None and like.get(f"{part}width") == width
    return int(like[f"{part}heads"]) if like is not None and same else max(1, width // 64)


def _told(shown: dict[str, Any], like: Mapping[str, Any] | None) -> dict[str, Any]:
    """What tensors show of a part, with what only options tell."""
    return {**{name: value for name, value in (like or {}).items() if name not in shown}, **shown}


def _vision(state: State, like: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not any(name.startswith("vision.") for name in state):
        return None
    place = "vision.encoder."
    patches = state[f"{place}embeddings.patch_embedding.weight"]
    positions = len(state[f"{place}embeddings.position_embedding.weight"])
    shown = {
        "width": len(patches),
        "layers": _count(state, f"{place}encoder.layers."),
        "heads": _heads(like, "", len(patches)),
        "ffn_dim": len(state[f"{place}encoder.layers.0.mlp.fc1.bias"]),
        "image_size": math.isqrt(positions - 1) * patches.shape[-1],
        "patch_size": patches.shape[-1],
    }
    return _told(shown, like)


def _speech(state: State, like: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not any(name.startswith("speech.") for name in state):
        return None
    width, mels, _ = state["speech.encoder.conv1.weight"].shape
    shown = {
        "width": width,
        "layers": _count(state, "speech.encoder.layers."),
        "heads": _heads(like, "", width),
        "ffn_dim": len(state["speech.encoder.layers.0.fc1.bias"]),
        "resampler_layers": _count(state, "speech.resampler.decoder.layers."),
        "mels": mels,
        "positions": len(state["speech.encoder.embed_positions.weight"]),
        "words": len(state["speech.resampler.decoder.embed_positions.weight"]),
    }
    return _told(shown, like)


def _sound(state: State, like: Mapping[str, Any] | None) -> dict[str, int] | None:
    if not any(name.startswith("sound.") for name in state):
        return None
    place, read = "sound.encoder.", "sound.resampler.qformer."
    patches, conv = state[f"{place}patch_embedding.weight"], state[f"{place}pos_conv.weight"]
    buckets, heads = state[f"{place}position_bias.weight"].shape
    width = len(state[f"{read}layernorm.bias"])
    return {
        "patch_size": patches.shape[-1],
        "embed_dim": len(patches),
        "width": len(conv),
        "ffn_dim": len(state[f"{place}layers.0.fc1.bias"]),
        "layers": _count(state, f"{place}layers."),
        "heads": heads,
        "conv_pos": conv.shape[2],
        "conv_pos_groups": len(conv) // conv.shape[1],
        "buckets": buckets,
        "max_distance": like["max_distance"] if like else BEATS["max_distance"],
        "resampler_width": width,
        "resampler_layers": _count(state, f"{read}encoder.layer."),
        "resampler_heads": _heads(like, "resampler_", width),
        "resampler_ffn_dim": len(state[f"{read}encoder.layer.0.intermediate_query.dense.bias"]),
    }


def to_original(state: Mapping[str, Tensor]) -> State:
    """Weights or gradients of a model without sounds under the authors' names; BEATs is left out."""
    found: State = {}
    for name, value in state.items():
        name = name.removeprefix("llm.")
        block, _, part = name.partition(".mlp.experts.")
        if part == "gate_up_proj":
            for expert, rows in enumerate(value):
                for kind, half in zip(("gate_proj", "up_proj"), rows.chunk(2), strict=True):
                    found[f"{block}.mlp.experts.{expert}.{kind}.weight"] = half
        elif part == "down_proj":
            for expert, rows in enumerate(value):
                found[f"{block}.mlp.experts.{expert}.down_proj.weight"] = rows
        elif not name.startswith("sound.encoder."):
            found[_theirs(name)] = value[None] if name.endswith("resampler.queries") else value
    return found


def _theirs(name: str) -> str:
    name = name.replace("vision.encoder.", "model.vision_tower.vision_tower.vision_model.")
    name = name.replace("speech.encoder.", "model.audio_tower.audio_tower.")
    name = name.replace(".mlp.router.", ".mlp.gate.").replace("vision.projector.", "model.mm_projector.")
    name = name.replace("speech.resampler.queries", "model.query_tokens")
    name = name.replace("speech.resampler.decoder.", "model.mm_audio_aligner.decoder.audio_decoder.")
    name = name.replace("sound.resampler.queries", "model.mm_audio_aligner.qformer.query_tokens")
    name = name.replace("sound.resampler.qformer.", "model.mm_audio_aligner.qformer.qformer.")
    return re.sub(r"(speech|sound)\.resampler\.projector\.", "model.mm_audio_aligner.projector.", name)
