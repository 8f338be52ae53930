"""Converts CLIP and CLIP-MoE checkpoints: the authors' layout, open_clip models, longer texts, and assembly of experts.

Sources: arXiv 2409.19291 section 3 (diversified multiplet upcycling), Long-CLIP 2403.15378 section 3.1 (positions).
Authors' layout: `experts.{i}.c_fc.weight` per expert and `gate.weight`; ours packs experts and nests the router.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import open_clip
import torch
from torch import Tensor

from mmoe.errors import BadOverride, LoadMismatch, Refused, UnknownModel, UnknownWeights, did_you_mean, nearest
from mmoe.options import check_int
from mmoe.registry import parse_spec
from mmoe.surgery import upcycle as upcycle_host
from zoo.clip_moe.model import ClipMoE, ClipMoEConfig
from zoo.config import make_config
from zoo.hosts.clip import MLP_NAMES, SIZES_IN_TENSORS, TOWERS, sizes_of
from zoo.state import State, collapse, load_state, read_state
from zoo.weights import locate

SHOWN_BY_TENSORS = (*SIZES_IN_TENSORS, "num_experts", "moe_layers")
_NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size"}
_BLOCK = re.compile(
    r"(visual\.)?transformer\.resblocks\.\d+\."
    r"(ln_[12]\.(weight|bias)|attn\.(in_proj_(weight|bias)|out_proj\.(weight|bias))"
    r"|mlp\.c_(fc|proj)\.(weight|bias)|gate\.weight|experts\.\d+\.c_(fc|proj)\.(weight|bias))"
)
_REST = re.compile(
    r"visual\.(class_embedding|positional_embedding|conv1\.weight|ln_(pre|post)\.(weight|bias)|proj)"
    r"|token_embedding\.weight|positional_embedding(_res)?|ln_final\.(weight|bias)|text_projection|logit_scale"
)


def from_original(state: Mapping[str, Tensor], *, top_k: int = 2) -> tuple[ClipMoEConfig, State]:
    """The authors' CLIP-MoE, a stage of its training, or OpenAI's CLIP: config and state dict in our layout.

    Args:
        state: tensors under the original names.
        top_k: experts per token; the file does not say.

    Raises:
        LoadMismatch: keys that are unknown or missing, or mixtures that are not the last blocks of each tower.
    """
    state = {name: value for name, value in state.items() if name not in _NOT_WEIGHTS}
    unknown = _unknown(state)
    if unknown:
        raise LoadMismatch(
            "convert this checkpoint to clip_moe",
            f"unknown keys: {collapse(unknown)}",
            "give the state dict of a CLIP with a plain ViT, or of CLIP-MoE",
        )
    config = _infer(state, top_k)
    converted: State = {}
    for name, value in state.items():
        if ".experts." not in name and ".gate." not in name:
            converted[f"clip.{name}"] = value.float()
    for block in _moe_blocks(state):
        converted |= {f"clip.{block}.mlp.{name}": value for name, value in pack_block(state, block).items()}
    return config, converted


def pack_block(state: Mapping[str, Tensor], block: str) -> State:
    """Tensors of one mixture from the authors' layout, under the names of `mmoe.MoE`.

    Args:
        state: tensors under the original names.
        block: name before ".gate.weight" and ".experts.".
    """
    gate = state[f"{block}.gate.weight"]
    packed = {"router.weight": gate.float()}
    for ours, theirs in MLP_NAMES.items():
        names = [f"{block}.experts.{expert}.{theirs}" for expert in range(len(gate))]
        missing = [name for name in names if name not in state]
        if missing:
            raise LoadMismatch(
                "convert this checkpoint to clip_moe",
                f"{len(gate)} gate rows in {block}, but no {collapse(missing)}",
                "give the whole state dict",
            )
        packed[f"experts.{ours}"] = torch.stack([state[name] for name in names]).float()
    return packed


def to_original(state: Mapping[str, Tensor]) -> State:
    """Our state dict under the authors' names; the inverse of `from_original`.

    Raises:
        Refused: the authors have no names for some tensors, such as those of other routers and experts.
    """
    original: State = {}
    for name, value in state.items():
        name = name.removeprefix("clip.")
        block, _, part = name.partition(".mlp.experts.")
        if part in MLP_NAMES:
            for expert, rows in enumerate(value):
                original[f"{block}.experts.{expert}.{MLP_NAMES[part]}"] = rows.clone()
        else:
            original[name.replace(".mlp.router.", ".gate.")] = value
    unknown = _unknown(original)
    first = ".experts.0.c_fc.weight"
    mixtures = [name.removesuffix(first) for name in original if name.endswith(first)]
    needed = [f"{mixture}.{part}" for mixture in mixtures for part in ("gate.weight", "experts.0.c_fc.bias")]
    missing = [name for name in needed if name not in original]
    if unknown or missing:
        wrong = f"they have no {collapse(unknown)}" if unknown else f"theirs have {collapse(missing)}, it has none"
        raise Refused("cannot write this model under the authors' names", wrong, "model.save(folder)")
    return original


def check_expressible(config: ClipMoEConfig) -> None:
    """Makes sure that the authors' layout can hold a model of this config.

    Raises:
        Refused: it has another router or other experts than theirs.
    """
    plain = {"router": (None, {"name": "topk"}), "experts": (None, {"name": "ffn"})}
    for part, known in plain.items():
        given = getattr(config, part)
        spec = None if given is None else {k: v for k, v in parse_spec(given).items() if k != "top_k"}
        if spec not in known:
            wrong = f"they have no {part} {given!r}"
            raise Refused("cannot write this model under the authors' names", wrong, "model.save(folder)")


def _unknown(state: Iterable[str]) -> list[str]:
    return [name for name in state if not (_BLOCK.fullmatch(name) or _REST.fullmatch(name))]


def assumed(config: ClipMoEConfig) -> dict[str, Any]:
    """Options that `from_original` cannot read from a file."""
    widths = {"vision_heads": config.vision_width, "text_heads": config.text_width}
    found: dict[str, Any] = {"activation": config.activation}
    found |= {key: getattr(config, key) or max(1, width // 64) for key, width in widths.items()}
    if config.position_split is not None:
        found["position_split"] = config.position_split
    if config.num_experts:
        found |= {"top_k": config.top_k, "route_padding": config.route_padding}
    return found


def _moe_blocks(state: Mapping[str, Tensor]) -> list[str]:
    return [name.removesuffix(".gate.weight") for name in state if name.endswith(".gate.weight")]


def _infer(state: Mapping[str, Tensor], top_k: int) -> ClipMoEConfig:
    sizes = sizes_of(state, "clip_moe")
    blocks = _moe_blocks(state)
    experts = len(state[f"{blocks[0]}.gate.weight"]) if blocks else 0
    return ClipMoEConfig(
        **sizes,
        position_split=20 if "positional_embedding_res" in state else None,
        num_experts=experts,
        top_k=min(top_k, experts) or top_k,
        moe_layers=_check_blocks(blocks, [sizes["vision_layers"], sizes["text_layers"]]),
    )


def _check_blocks(blocks: Sequence[str], depths: Sequence[int]) -> int:
    """Number of mixtures per tower, after checking that they are the last blocks of each."""
    counts = []
    for tower, depth in zip(TOWERS.values(), depths, strict=True):
        found = sorted(int(block.rsplit(".", 1)[1]) for block in blocks if block.startswith(f"{tower}."))
        counts.append(len(found))
        if found != list(range(depth - len(found), depth)):
            raise LoadMismatch(
                "convert this checkpoint to clip_moe",
                f"mixtures in blocks {found} of {depth} of {tower}",
                "mixtures must be the last blocks of a tower",
            )
    layers = max(counts)
    if counts != [min(layers, depth) for depth in depths]:
        raise LoadMismatch(
            "convert this checkpoint to clip_moe",
            f"{counts[0]} mixtures in the {depths[0]} image blocks, {counts[1]} in the {depths[1]} text blocks",
            "both towers must have the same number of mixtures, clipped to their depth",
        )
    return layers


def stretch_positions(table: Tensor, keep: int = 20, *, half_math: bool = False) -> Tensor:
    """Stretches a position table four times behind its first rows: (n, D) -> (4n - 3 keep, D); 77 rows become 248.

    Args:
        table: positions of the short text tower.
        keep: rows that stay, since short texts trained them well.
        half_math: computes in fp16 as the released loader did (differences of about 7e-4).

    Example:
        >>> stretch_positions(torch.zeros(77, 8)).shape
        torch.Size([248, 8])
    """
    check_int("keep", keep, 0, len(table) - 2)
    table = table.half() if half_math else table.float()
    low, high = table[keep:-1], table[keep + 1 :]
    inside = torch.stack([low * (4 - j) / 4 + high * j / 4 for j in range(4)], dim=1).flatten(0, 1)
    last, step = table[-1], table[-1] - table[-2]
    beyond = torch.stack([last + j * step / 4 for j in range(4)])
    return torch.cat([table[:keep], inside, beyond]).float()


def lengthen(dense: ClipMoE, keep: int = 20, *, context_length: int | None = None, half_math: bool = False) -> ClipMoE:
    """A dense CLIP with a stretched text context and Long-CLIP's second position table.

    Args:
        dense: a text tower of n tokens.
        keep: rows that stay; the new length is 4n - 3 keep.
        context_length: the new length, in place of `keep`.
        half_math: as for `stretch_positions`.

    Raises:
        BadOverride: no number of rows to keep gives this length.
    """
    length = dense.config.context_length
    if context_length is not None:
        keep, rest = divmod(4 * length - context_length, 3)
        if rest or not 0 <= keep < length - 1:
            possible = sorted((4 * length - 3 * k for k in range(length - 1)), key=lambda n: abs(n - context_length))
            raise BadOverride(
                f"context_length={context_length} from texts of {length} tokens",
                f"a stretch keeps k rows and gives {4 * length} - 3k tokens",
                f"context_length={possible[0]}",
            )
    state = dense.state_dict()
    stretched = stretch_positions(dense.clip.positions(length).detach(), keep, half_math=half_math)
    state["clip.positional_embedding"] = stretched
    state["clip.positional_embedding_res"] = stretched.clone()
    model = ClipMoE(replace(dense.config, context_length=len(stretched), position_split=keep))
    model.load_state_dict(state)
    model.preprocessing = {**dense.preprocessing, "context_length": len(stretched)}
    return model.eval()


def upcycle(
    dense: ClipMoE,
    num_experts: int = 4,
    *,
    top_k: int | None = None,
    moe_layers: int | None = None,
    sources: Sequence[Mapping[str, Tensor]] | None = None,
    noise: float = 0.0,
    round_to_half: bool = False,
    **options: Any,
) -> ClipMoE:
    """A CLIP-MoE from dense CLIPs: plain upcycling from one, or the assembly of diversified multiplet upcycling.

    Args:
        dense: gives every tensor outside the experts; its own MLPs are expert 0.
        num_experts: copies of its MLPs when there are no sources.
        top_k: experts per token; 2 when None, or 1 where there is one expert.
        moe_layers: last blocks of each tower that become mixtures; all when None.
        sources: state dicts of dense `ClipMoE`s; expert i takes the MLPs of source i, so they set `num_experts`.
        noise: relative noise on copied experts.
        round_to_half: rounds the weights through fp16 where the authors' builder does, for bit parity.
        options: further options of `ClipMoEConfig`.

    Returns:
        The mixture with random routers, in eval mode.
    """
    if dense.config.num_experts:
        raise Refused("upcycle a model that is a mixture already", "its MLPs are experts", "give a dense CLIP")
    count = len(sources) if sources is not None else num_experts
    layers = moe_layers if moe_layers is not None else max(dense.config.vision_layers, dense.config.text_layers)
    check_int("num_experts", count, 1)
    k = min(2, count) if top_k is None else top_k
    given = {**vars(dense.config), "num_experts": count, "top_k": k, "moe_layers": layers, **options}
    config = make_config(ClipMoEConfig, given, "clip_moe", "upcycle(..., {}=...)")
    hosts = None if sources is None else [_strip(source) for source in sources]
    router = "topk" if config.router is None else config.router
    host, _ = upcycle_host(
        dense.clip, count, top_k=config.top_k, layers=config.moe_layers, sources=hosts, noise=noise, router=router
    )
    state = {f"clip.{name}": value for name, value in host.state_dict().items()}
    with torch.device("meta"):
        model = ClipMoE(config)  # takes over the tensors below, since a copy of a large model costs gigabytes
    state = {name: _rounded(name, value) if round_to_half else value for name, value in state.items()}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        told = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise Refused(f"upcycle with {told}", "the dense model's tensors do not fit", "upcycle without it") from error
    model.clip.attn_mask = host.attn_mask  # the one buffer that is in no state dict
    model.preprocessing = dense.preprocessing
    model.card = None
    return model.eval()


@torch.no_grad()
def difference(dense: ClipMoE, mixture: ClipMoE, samples: int = 2) -> float:
    """Largest difference of two models' features on random pictures and texts, relative to the largest feature."""
    config = dense.config
    image = torch.randn(samples, 3, config.image_size, config.image_size)
    text = torch.randint(config.vocab_size - 2, (samples, config.context_length))
    text[:, 0] = config.vocab_size - 2
    for row, end in zip(text, torch.randint(2, config.context_length, (samples,)).tolist(), strict=True):
        row[end], row[end + 1 :] = config.vocab_size - 1, 0
    pairs = [(model.encode_image(image), model.encode_text(text)) for model in (dense, mixture)]
    return float(torch.stack([(b - a).abs().max() / a.abs().max() for a, b in zip(*pairs, strict=True)]).max())


def _strip(state: Mapping[str, Tensor]) -> State:
    return {name.removeprefix("clip."): value for name, value in state.items()}


def _rounded(name: str, value: Tensor) -> Tensor:
    """Through fp16 where the released builder converts: products, attention, experts and projections."""
    products = ("conv1.", "attn.", ".mlp.", ".proj", "text_projection")
    touched = any(part in name for part in products) and ".router." not in name
    return value.half().float() if touched else value


def from_open_clip(name: str) -> ClipMoE:
    """A dense CLIP of open_clip as a member of this family.

    Args:
        name: architecture ("ViT-B-32-quickgelu", random weights) or "architecture/pretrained tag".

    Raises:
        UnknownModel, UnknownWeights: open_clip has no such name. Refused: a tower is no plain transformer.
        Offline: pretrained weights are not cached and there is no network.
    """
    architecture, _, tag = name.partition("/")
    known = open_clip.get_model_config(architecture)
    if known is None:
        names = open_clip.list_models()
        raise UnknownModel(
            f"open_clip has no model {architecture!r}",
            did_you_mean(architecture, names),
            "python -c 'import open_clip; print(open_clip.list_models())'",
        )
    config = _open_clip_config(architecture, known)
    if not tag:
        return ClipMoE(config).eval()
    pretrained = _pretrained(architecture, tag)
    activation = "quick_gelu" if pretrained.get("quick_gelu") else "gelu"  # ViT-B-32/openai is a quick_gelu model
    values = {key: pretrained[key] for key in ("interpolation", "resize_mode") if pretrained.get(key)}
    values |= {f"image_{key}": tuple(pretrained[key]) for key in ("mean", "std") if pretrained.get(key)}
    model = ClipMoE(replace(config, activation=activation, **values)).eval()
    repository = pretrained["hf_hub"].strip("/")
    source = f"hf-hub:{repository}/open_clip_model.safetensors"
    _, state = from_original(read_state(locate(source)))
    load_state(model, state, source)
    return model


def open_clip_tags(architecture: str) -> list[str]:
    """Weights that open_clip knows for an architecture."""
    tags: list[str] = open_clip.list_pretrained_tags_by_model(architecture)
    return tags


def open_clip_licence(architecture: str, tag: str = "") -> tuple[str, str]:
    """Licence and source of open_clip's weights, of its code without a tag; "unknown" where only their page says it."""
    if not tag:
        return "MIT", "https://github.com/mlfoundations/open_clip"
    if tag == "openai":
        return "MIT", "https://github.com/openai/CLIP"
    repository = _pretrained(architecture, tag)["hf_hub"].strip("/")
    return "unknown", f"https://huggingface.co/{repository}"


def _open_clip_config(architecture: str, known: Mapping[str, Any]) -> ClipMoEConfig:
    vision, text = known["vision_cfg"], known["text_cfg"]
    plain_vision = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
    plain_text = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
    odd = [f"vision_cfg.{key}" for key in vision if key not in plain_vision]
    odd += [f"text_cfg.{key}" for key in text if key not in plain_text]
    odd += [key for key in known if key not in {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}]
    if isinstance(vision.get("layers"), list):
        odd.append("vision_cfg.layers (a ResNet)")
    if odd:
        raise Refused(
            f"make a clip_moe of open_clip's {architecture!r}",
            f"it is no plain ViT with a plain text transformer: {', '.join(odd)}",
            "mmoe.surgery.upcycle(open_clip_model, num_experts=4) upcycles any open_clip model object",
        )
    return ClipMoEConfig(
        embed_dim=known["embed_dim"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        vision_width=vision["width"],
        vision_layers=vision["layers"],
        vision_heads=vision["width"] // vision.get("head_width", 64),
        vision_mlp_ratio=vision.get("mlp_ratio", 4.0),
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        text_mlp_ratio=text.get("mlp_ratio", 4.0),
        vocab_size=text["vocab_size"],
        context_length=text["context_length"],
        position_split=None,
        activation="quick_gelu" if known.get("quick_gelu") else "gelu",
        num_experts=0,
        moe_layers=0,
    )


def _pretrained(architecture: str, tag: str) -> Mapping[str, Any]:
    """open_clip's entry for pretrained weights: where they are and what they were trained with."""
    pretrained: Mapping[str, Any] = open_clip.get_pretrained_cfg(architecture, tag)
    if not pretrained:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        tags = list(dict.fromkeys([*nearest(tag, tags), *tags]))
        raise UnknownWeights(
            f"open_clip has no weights {tag!r} for {architecture!r}",
            f"it has: {', '.join(tags) or 'none'}",
            f"open_clip:{architecture}/{tags[0]}" if tags else f"open_clip:{architecture}",
        )
    if not pretrained.get("hf_hub"):
        raise Refused(
            f"fetch the weights {tag!r} of {architecture!r}",
            f"they are not on the hub but at {pretrained.get('url')}",
            "download the file and pass it with --source",
        )
    return pretrained
