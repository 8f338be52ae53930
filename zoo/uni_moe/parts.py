"""Pretrained parts for Uni-MoE: the state dict of a released model as tensors of one part, so that it can be a base.

    part       takes                                                                 gives
    llm        a Llama: transformers' names, or llama.cpp's                          llm.*; experts begin as its FFN
    vision     a CLIP: open_clip's names or transformers'; or timm's image model     vision.encoder.*
    speech     a Whisper: transformers' names, or CTranslate2's                      speech.encoder.*
    resampler  the same                                                              speech.resampler.decoder.*
    sound      BEATs, as released                                                    sound.encoder.*

A folder that a model of this family was saved in serves too, for every part. A Whisper gives its first positions and
the first layers of its decoder, as many as the model has. llama.cpp has the rows of queries and keys in pairs, the way
it rotates them; they are put back into halves. CTranslate2 has queries, keys and values as one matrix.
Shapes: E experts, F inner width, D width, H heads.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import Tensor

from mmoe.errors import LoadMismatch
from zoo.hosts import beats
from zoo.hosts.decoder import PROJECTIONS, pack_ffns
from zoo.uni_moe.config import UniMoEConfig

State = dict[str, Tensor]
LORA_FACTORS = ("gate_up_a", "gate_b", "up_b", "down_a", "down_b")
_BLOCK = "llm.model.layers.*."
TENSORS = {
    "llm": (
        "llm.model.embed_tokens.weight",
        "llm.model.norm.weight",
        "llm.lm_head.weight",
        *(f"{_BLOCK}{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")),
        *(f"{_BLOCK}self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"{_BLOCK}mlp.{name}.weight" for name in PROJECTIONS),
        *(f"{_BLOCK}mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")),
    ),
    "vision": ("vision.encoder.*",),
    "speech": ("speech.encoder.*",),
    "resampler": ("speech.resampler.decoder.*",),
    "sound": ("sound.encoder.*",),
}

_Rules = Mapping[str, str | None]  # patterns of names and what they become; None is left out
_LLAMA_CPP: _Rules = {
    r"token_embd\.weight": "model.embed_tokens.weight",
    r"output_norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"blk\.(\d+)\.attn_([qkv])\.weight": r"model.layers.\1.self_attn.\2_proj.weight",
    r"blk\.(\d+)\.attn_output\.weight": r"model.layers.\1.self_attn.o_proj.weight",
    r"blk\.(\d+)\.attn_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"blk\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.weight": r"model.layers.\1.mlp.\2_proj.weight",
}
_LLAMA: _Rules = {
    r".*rotary_emb\.inv_freq": None,
    r"(lm_head\.weight|model\.(embed_tokens|norm)\.weight)": r"\1",
    r"(model\.layers\.\d+\.(input|post_attention)_layernorm\.weight)": r"\1",
    r"(model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight)": r"\1",
    r"(model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj)": r"\1",
}
_OPEN_CLIP: _Rules = {
    r"(transformer|token_embedding|ln_final)\..*|positional_embedding(_res)?|text_projection|logit_scale|logit_bias|attn_mask"
    r"|visual\.proj": None,
    r"visual\.class_embedding": "embeddings.class_embedding",
    r"visual\.conv1\.weight": "embeddings.patch_embedding.weight",
    r"visual\.positional_embedding": "embeddings.position_embedding.weight",
    r"visual\.ln_pre\.(.+)": r"pre_layrnorm.\1",
    r"visual\.ln_post\.(.+)": r"post_layernorm.\1",
    r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)": r"encoder.layers.\1.self_attn.qkv.\2",
    r"visual\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.(.+)": r"encoder.layers.\1.self_attn.out_proj.\2",
    r"visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.(.+)": r"encoder.layers.\1.layer_norm\2.\3",
    r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(.+)": r"encoder.layers.\1.mlp.fc1.\2",
    r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(.+)": r"encoder.layers.\1.mlp.fc2.\2",
}
_CLIP: _Rules = {
    r"(text_model|text_projection|visual_projection)\..*|logit_scale|.*\.position_ids": None,
    r"(?:vision_model\.)?((embeddings|pre_layrnorm|post_layernorm|encoder\.layers)\..+)": r"\1",
}
_WHISPER: _Rules = {
    r"proj_out\.weight|(?:model\.)?decoder\.embed_tokens\.weight": None,
    r"(?:model\.)?((en|de)coder\.(conv[12]|embed_positions|layers|layer_norm)\..+)": r"\1",
}
_CTRANSLATE2: _Rules = {
    r"(en|de)coder/[a-z_]+|decoder/(embeddings|projection)/weight": None,  # numbers, and words
    r"encoder/conv([12])/(weight|bias)": r"encoder.conv\1.\2",
    r"(en|de)coder/position_encodings/encodings": r"\1coder.embed_positions.weight",
    r"(en|de)coder/layer_norm/(gamma|beta)": r"\1coder.layer_norm.\2",
    r"(en|de)coder/layer_(\d+)/self_attention/linear_0/(.+)": r"\1coder.layers.\2.self_attn.qkv.\3",
    r"(en|de)coder/layer_(\d+)/self_attention/linear_1/(.+)": r"\1coder.layers.\2.self_attn.out_proj.\3",
    r"(en|de)coder/layer_(\d+)/self_attention/layer_norm/(.+)": r"\1coder.layers.\2.self_attn_layer_norm.\3",
    r"decoder/layer_(\d+)/attention/linear_0/(.+)": r"decoder.layers.\1.encoder_attn.q_proj.\2",
    r"decoder/layer_(\d+)/attention/linear_1/(.+)": r"decoder.layers.\1.encoder_attn.kv.\2",
    r"decoder/layer_(\d+)/attention/linear_2/(.+)": r"decoder.layers.\1.encoder_attn.out_proj.\2",
    r"decoder/layer_(\d+)/attention/layer_norm/(.+)": r"decoder.layers.\1.encoder_attn_layer_norm.\2",
    r"(en|de)coder/layer_(\d+)/ffn/linear_0/(.+)": r"\1coder.layers.\2.fc1.\3",
    r"(en|de)coder/layer_(\d+)/ffn/linear_1/(.+)": r"\1coder.layers.\2.fc2.\3",
    r"(en|de)coder/layer_(\d+)/ffn/layer_norm/(.+)": r"\1coder.layers.\2.final_layer_norm.\3",
}
_SOURCES = {
    "llm": "a Llama of transformers or llama.cpp",
    "vision": "a dense CLIP, or the timm model that vision names",
    "speech": "a Whisper of transformers or CTranslate2",
    "resampler": "a Whisper of transformers or CTranslate2",
    "sound": "BEATs as released",
}


def added_to(names: Iterable[str]) -> tuple[str, ...]:
    """Patterns of the parameters that a model has beside its parts: connectors, routers, low-rank factors of experts.

    >>> added_to(["llm.model.norm.weight", "vision.projector.0.weight"])
    ('*.projector.*',)
    """
    known = list(names)
    patterns = "*.projector.*", "*.resampler.*", "*.router.*", *(f"*.experts.{name}" for name in LORA_FACTORS)
    return tuple(one for one in patterns if any(fnmatchcase(name, one) for name in known))


def part_state(state: State, part: str, config: UniMoEConfig, names: Collection[str]) -> State:
    """Tensors of one part from a base's state dict.

    Args:
        state: as its file has it.
        part: one of `TENSORS`.
        config: of the model.
        names: of the model's tensors.

    Raises:
        LoadMismatch: it is of something else, or of sizes that cannot be this model's.
    """
    own = {"resampler": "speech.resampler.decoder.", "llm": "llm."}.get(part, f"{part}.encoder.")
    ours = {name.removeprefix(own): value for name, value in state.items() if name.startswith(own)}
    if part == "llm":
        found = _with_experts(_llama(ours or state, part, config), config, names)
    elif ours:
        found = ours
    elif part == "vision":
        found = _image_model(state, names) if "timm" in (config.vision or {}) else _clip(state)
    elif part == "sound":
        found = beats.from_original(state)
    else:
        side = "encoder." if part == "speech" else "decoder."
        found = {name.removeprefix(side): v for name, v in _whisper(state, part).items() if name.startswith(side)}
    return {f"{own}{name}": value for name, value in _cut(found, part, config).items()}


def _renamed(state: Mapping[str, Tensor], rules: _Rules, part: str) -> State:
    """A state dict under other names; every one must have a rule."""
    found: State = {}
    for name, value in state.items():
        rule = next((rule for rule in rules if re.fullmatch(rule, name)), None)
        if rule is None:
            asked, wrong = f"use these weights as the base of {part}", f"it has {name!r}"
            raise LoadMismatch(asked, wrong, f"base={{{part!r}: FILE}} of {_SOURCES[part]}")
        other = rules[rule]
        if other is not None:
            found[re.sub(rule, other, name)] = value
    return found


def _llama(state: State, part: str, config: UniMoEConfig) -> State:
    if "token_embd.weight" not in state:
        fresh = re.compile(rf".*\.mlp\.(router\..*|experts\.({'|'.join(LORA_FACTORS)}))")
        found = _renamed({n: v for n, v in state.items() if not fresh.fullmatch(n)}, _LLAMA, part)
    else:
        found = _renamed(state, _LLAMA_CPP, part)
        for name, value in found.items():
            which = re.search(r"self_attn\.([qk])_proj", name)
            if which is not None:
                heads = config.heads if which[1] == "q" else config.kv_heads or config.heads
                found[name] = _halves(value, heads, name)
    words = found.get("model.embed_tokens.weight")
    if words is not None and not found.setdefault("lm_head.weight", words).equal(words) and config.tie_embeddings:
        wrong = "its lm_head is another matrix than its embeddings"
        raise LoadMismatch("use these weights as the base of llm", wrong, "tie_embeddings=False")
    return found


def _halves(weight: Tensor, heads: int, name: str) -> Tensor:
    """Rows of each head from pairs, as llama.cpp rotates them, to halves, as transformers does."""
    if len(weight) % (2 * heads):
        wrong = f"{name} has {len(weight)} rows for {heads} heads"
        raise LoadMismatch("use these weights as the base of llm", wrong, "heads and kv_heads as the base has them")
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _with_experts(state: State, config: UniMoEConfig, names: Collection[str]) -> State:
    """Blocks that are mixtures have the base's feed-forward block as every expert."""
    for layer in config.mixed:
        place = f"model.layers.{layer}.mlp"
        ffn = {name: state.pop(f"{place}.{name}.weight", None) for name in PROJECTIONS}
        if None in ffn.values():
            continue  # a mixture already, or what is missing is told when it is loaded
        packed = pack_ffns([{name: value for name, value in ffn.items() if value is not None}])
        if not all(f"llm.{place}.experts.{name}" in names for name in packed):
            wrong = f"experts={config.experts!r} are no gated feed-forward blocks, so that none begins as the base's"
            raise LoadMismatch("use these weights as the base of llm", wrong, "experts='gated_ffn' or 'lora_gated_ffn'")
        experts = {name: value.expand(config.num_experts, -1, -1) for name, value in packed.items()}
        state |= {f"{place}.experts.{name}": value for name, value in experts.items()}
    return state


def _clip(state: State) -> State:
    state = {name.removeprefix("clip."): value for name, value in state.items()}
    return _apart(_renamed(state, _OPEN_CLIP if "visual.conv1.weight" in state else _CLIP, "vision"))


def _whisper(state: State, part: str) -> State:
    if "encoder/conv1/weight" not in state:
        return _renamed(state, _WHISPER, part)
    found = _apart(_renamed(state, _CTRANSLATE2, part))
    named = {re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name)): value for name, value in found.items()}
    return {name: value for name, value in named.items() if not name.endswith("k_proj.bias")}  # Whisper has none: zeros


def _apart(state: State) -> State:
    """Projections that are rows of one matrix, each under its name."""
    found: State = {}
    for name, value in state.items():
        fused = re.fullmatch(r"(.+)\.(qkv|kv)\.(weight|bias)", name)
        if fused is None:
            found[name] = value
            continue
        for which, rows in zip(fused[2], value.chunk(len(fused[2])), strict=True):
            found[f"{fused[1]}.{which}_proj.{fused[3]}"] = rows
    return found


def _cut(state: State, part: str, config: UniMoEConfig) -> State:
    """Of a Whisper as many positions as the model has, and as many layers of its decoder; all else as it is."""
    if part not in ("speech", "resampler") or config.speech is None:
        return state
    rows = config.speech["positions" if part == "speech" else "words"]
    layers = config.speech["layers" if part == "speech" else "resampler_layers"]
    found = {}
    for name, value in state.items():
        number = re.match(r"layers\.(\d+)\.", name)
        if part == "resampler" and number is not None and int(number[1]) >= layers:
            continue
        found[name] = value[:rows] if name == "embed_positions.weight" else value
    return found


def _image_model(state: State, names: Collection[str]) -> State:
    """One of timm's image models, without its classifier; EfficientNets under other names too."""
    own = {name.removeprefix("vision.encoder."): name for name in names if name.startswith("vision.encoder.")}
    if "_conv_stem.weight" in state:
        state = _efficientnet(state, own)
    unused = re.compile(r"(classifier|fc|head)\.(fc\.)?(weight|bias)")
    return {name: value for name, value in state.items() if name in own or not unused.fullmatch(name)}


_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
_INVERTED |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}


def _efficientnet(state: State, own: Collection[str]) -> State:
    """The names of the package efficientnet-pytorch, whose blocks have one number, under timm's, which have two."""
    blocks = sorted({tuple(map(int, name.split(".")[1:3])) for name in own if name.startswith("blocks.")})
    found: State = {}
    for name, value in state.items():
        place, _, rest = name.partition(".")
        renames, prefix = _STEM, ""
        if place == "_blocks":
            number, place, rest = rest.split(".", 2)
            if int(number) >= len(blocks):
                wrong = f"it has a block {number}, the model {len(blocks)} blocks"
                raise LoadMismatch("use these weights as the base of vision", wrong, "vision.timm of the same model")
            prefix = "blocks.{}.{}.".format(*blocks[int(number)])
            renames = _INVERTED if f"{prefix}conv_pwl.weight" in own else _SEPARABLE
        found[f"{prefix}{renames.get(place, place)}.{rest}"] = value
    return found
