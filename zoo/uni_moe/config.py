"""Options of Uni-MoE: sizes of its language model, of its encoders, and what is mixed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mmoe.errors import BadOverride, did_you_mean
from mmoe.options import check_choice, check_float, check_int
from mmoe.registry import parse_spec
from zoo.base import check_parts
from zoo.config import check_types
from zoo.hosts.chat import TEMPLATES
from zoo.hosts.decoder import chosen_layers

MODALITIES = ("text", "image", "speech", "video", "sound")  # by their number in `zoo.hosts.splice.Spliced`
CLIP_L_336 = {"width": 1024, "layers": 24, "heads": 16, "ffn_dim": 4096, "image_size": 336, "patch_size": 14}
WHISPER_SMALL = {
    "width": 768,
    "layers": 12,
    "heads": 12,
    "ffn_dim": 3072,
    "resampler_layers": 12,
    "mels": 80,
    "positions": 1500,
    "words": 448,
}
BEATS = {
    "patch_size": 16,
    "embed_dim": 512,
    "width": 768,
    "ffn_dim": 3072,
    "layers": 12,
    "heads": 12,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "buckets": 320,
    "max_distance": 800,
    "resampler_width": 768,
    "resampler_layers": 12,
    "resampler_heads": 12,
    "resampler_ffn_dim": 3072,
    "seconds": 30,
}
TIMM = {"image_size": 224}
BASES = ("llm", "vision", "speech", "resampler", "sound")  # parts that may stand on a base
_CHOICES = {"activation": ("quick_gelu", "gelu"), "connector": ("whisper", "stack")}
_MORE = {"vision": ("activation", "mean", "std"), "speech": ("connector", "stack"), "sound": ()}


@dataclass(frozen=True, kw_only=True)
class UniMoEConfig:
    """Options of the family; the defaults are the released sizes, with every branch.

    Attributes:
        vocab_size, width, layers, heads, kv_heads, ffn_dim: of the language model, a Llama; as many heads for keys as
            for queries when `kv_heads` is None.
        positions: longest sequence, features of other modalities included.
        rope_theta, norm_eps, tie_embeddings: of the Llama.
        num_experts: E; 0 is the dense model.
        top_k: K.
        moe_layers: "all" blocks have experts (the released speech model), "even" ones (the released audio model), every
            n-th, or a list of them.
        router, experts: registered ones. A router "by_modality" has a layer for each of `MODALITIES`, or for as many
            "modalities" as its spec says, at least those that the model's branches need.
        vision: sizes of the image encoder, a CLIP, with "activation" quick_gelu (OpenAI's, the default) or gelu; or
            {"timm": NAME, "image_size": 224}, one of timm's image models, whose features are read before pooling.
            "mean" and "std" are those of its preprocessing where CLIP's or timm's own are not meant. None leaves images
            and videos out.
        vision_layer: of a CLIP, whose output is read, counted from the last; -2 is the last but one, before the final
            norm.
        projector: of images; see `zoo.hosts.connectors.projector`.
        speech: sizes of the Whisper encoder, and of the Whisper decoder that resamples; None leaves speech out. The
            encoder hears `positions` times 20 ms at once. With "connector": "stack" there is no decoder: "stack" (5)
            neighbouring frames become a token each, in the order of time.
        sound: sizes of BEATs and of the Q-Former behind it, and the "seconds" that it hears at once; None leaves sounds
            out.
        queries: tokens for what is heard at once of speech or sound.
        tokenizer: where its tokenizer.json is, or a GGUF file with one, as a source of `zoo.weights`; None leaves words
            out.
        template: how conversations are written; see `zoo.hosts.chat`.
        frames: of a video that are looked at.
        parts: at most so many times 30 seconds of a recording are heard.
        balance_coef: of the balance loss, the mean over blocks, which counts first choices, or what a router such as
            "dynamic" counts itself; 0 in the first version. The released one with 8 experts adds blocks up, so its
            coefficient is this one divided by their number.
        modality_coef, modality_experts: of the loss that sends tokens of a modality to some experts, and which, by the
            modality's name; see `zoo.uni_moe.losses`.
        divergence_coef: of the loss that sets the experts of each two modalities of a sample apart, but not those of
            speech and sound.
        base: where the weights of parts come from that are not the model's own, as for `zoo.weights.locate`: those of
            "llm" (its experts begin as the base's feed-forward blocks), of the encoders "vision", "speech" and "sound",
            and of the "resampler" of speech, which begins as the decoder of a Whisper. See `zoo.uni_moe.parts`.
        base_sha256: their checksums.
        route_padding: sends padding through the experts, as released; it changes no token that counts.
    """

    known: ClassVar[Mapping[str, Mapping[str, int]]] = {"vision": CLIP_L_336, "speech": WHISPER_SMALL, "sound": BEATS}

    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int | None = None
    ffn_dim: int = 11008
    positions: int = 4096
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    num_experts: int = 4
    top_k: int = 2
    moe_layers: str | int | tuple[int, ...] = "all"
    router: str | Mapping[str, Any] = "topk:weights=softmax_topk"
    experts: str | Mapping[str, Any] = "gated_ffn"
    vision: Mapping[str, Any] | None = field(default_factory=lambda: dict(CLIP_L_336))
    vision_layer: int = -2
    projector: str = "mlp2x_gelu"
    speech: Mapping[str, Any] | None = field(default_factory=lambda: dict(WHISPER_SMALL))
    sound: Mapping[str, Any] | None = field(default_factory=lambda: dict(BEATS))
    queries: int = 50
    tokenizer: str | None = None
    template: str = "vicuna"
    frames: int = 8
    parts: int = 20
    balance_coef: float = 0.0
    modality_coef: float = 0.0
    modality_experts: Mapping[str, Any] = field(default_factory=dict)
    divergence_coef: float = 0.0
    base: Mapping[str, Any] | None = None
    base_sha256: Mapping[str, Any] | None = None
    route_padding: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("vocab_size", "width", "layers", "heads", "ffn_dim", "positions", "top_k", "queries"):
            check_int(name, getattr(self, name), 1)
        for name in ("frames", "parts"):
            check_int(name, getattr(self, name), 1)
        check_choice("template", self.template, TEMPLATES)
        check_int("num_experts", self.num_experts, 0)
        check_int("kv_heads", self.kv_heads or self.heads, 1, self.heads)
        check_float("rope_theta", self.rope_theta, above=0)
        check_float("norm_eps", self.norm_eps, above=0)
        for name in ("balance_coef", "modality_coef", "divergence_coef"):
            check_float(name, getattr(self, name), low=0)
        self._check_modalities()
        self._check_gate()
        chosen_layers(self.moe_layers, self.layers)
        for branch in self.known:
            self._check_branch(branch)
        for option in ("base", "base_sha256"):
            check_parts(option, getattr(self, option), BASES, self._parts())
        if self.width % self.heads or self.heads % (self.kv_heads or self.heads):
            asked = f"{self.heads} heads, {self.kv_heads or self.heads} for keys, in a width of {self.width}"
            raise BadOverride(asked, "heads must share the width evenly, and those for keys the heads", "heads=1")
        if self.width // self.heads % 2:
            asked, wrong = f"{self.heads} heads in a width of {self.width}", "rotary positions take heads of even width"
            raise BadOverride(asked, wrong, f"width={2 * self.width}")

    def _check_modalities(self) -> None:
        for name, experts in self.modality_experts.items():
            if name not in MODALITIES[1:]:
                wrong, fix = did_you_mean(name, MODALITIES[1:]), "modality_experts={image: [0, 1]}"
                raise BadOverride(f"modality_experts of {name!r}", wrong, fix)
            if not isinstance(experts, list | tuple):
                wrong = "it is a list of experts"
                raise BadOverride(f"modality_experts of {name} {experts!r}", wrong, f"modality_experts={{{name}: [0]}}")
            for expert in experts:
                check_int(f"an expert of {name}", expert, 0, self.num_experts - 1)
        if self.modality_coef and not self.modality_experts:
            wrong, fix = "no modality has experts of its own", "modality_experts={image: [0, 1]}"
            raise BadOverride(f"modality_coef={self.modality_coef}", wrong, fix)

    def _check_gate(self) -> None:
        """Tokens of a modality without a layer would silently go through that of text."""
        told = self.gate.get("modalities") if isinstance(self.gate, Mapping) else None
        heard = {"video": self.vision, "speech": self.speech, "sound": self.sound}
        last = max((MODALITIES.index(name) for name, branch in heard.items() if branch is not None), default=0)
        if isinstance(told, int) and 0 < told <= last:
            wrong = f"{MODALITIES[last]} is modality {last} (from 0) and would share the layer of text"
            fix = f"router={{name: by_modality, modalities: {len(MODALITIES)}}}"
            raise BadOverride(f"a router by_modality with modalities={told}", wrong, fix)

    @property
    def gate(self) -> str | Mapping[str, Any]:
        """The router's spec; one by modality knows those of the family."""
        spec = parse_spec(self.router)
        return {"modalities": len(MODALITIES), **spec} if spec["name"] == "by_modality" else self.router

    def _check_branch(self, branch: str) -> None:
        given = getattr(self, branch)
        if given is None:
            return
        known, more = self.known[branch], _MORE[branch]
        if branch == "vision" and "timm" in given:
            known, more = TIMM, ("timm", "mean", "std")
        elif given.get("connector") == "stack":
            known = {**known, "stack": 5}
        elif "stack" in given:
            wrong, fix = "only the connector stack has it", f"{branch}.connector=stack"
            raise BadOverride(f"{branch}.stack={given['stack']!r}", wrong, fix)
        options = [*known, *more]
        for name, value in given.items():
            place = f"{branch}.{name}"
            if name not in options:
                raise BadOverride(f"{branch} with {name!r}", did_you_mean(name, options), f"{branch}.{options[0]}")
            if name in _CHOICES:
                check_choice(place, value, _CHOICES[name])
            elif name in ("mean", "std"):
                _check_colours(place, value, 1e-6 if name == "std" else 0.0)
            elif name == "timm":
                check_choice(f"the type of {place}", type(value).__name__, ("str",))
            else:
                check_int(place, value, 1)
        whole = {**known, **given}
        object.__setattr__(self, branch, whole)
        for prefix in ("", "resampler_"):
            _check_heads(branch, prefix, whole)
        if "patch_size" in whole and "image_size" in whole:
            check_int(f"{branch}.patch_size", whole["patch_size"], 1, whole["image_size"])
        if branch == "vision" and "layers" in whole:
            check_int("vision_layer", self.vision_layer, -whole["layers"] - 1, -1)

    def _parts(self) -> list[str]:
        """Parts that the model has."""
        resampled = self.speech is not None and self.speech.get("connector") != "stack"
        there = {name: getattr(self, name) is not None for name in self.known} | {"llm": True, "resampler": resampled}
        return [part for part in BASES if there[part]]

    @property
    def mixed(self) -> list[int]:
        """Blocks that have experts."""
        return chosen_layers(self.moe_layers, self.layers) if self.num_experts else []


def _check_heads(branch: str, prefix: str, sizes: Mapping[str, Any]) -> None:
    """Heads share a width evenly, where both are options."""
    width, heads = (sizes.get(f"{prefix}{name}") for name in ("width", "heads"))
    if width and heads and width % heads:
        asked, wrong = f"{branch}.{prefix}heads={heads} in a width of {width}", "heads must share the width evenly"
        raise BadOverride(asked, wrong, f"{branch}.{prefix}heads=1")


def _check_colours(name: str, values: Any, low: float) -> None:
    numbers = isinstance(values, Sequence) and len(values) == 3
    if not numbers or not all(isinstance(one, float | int) and low <= one < math.inf for one in values):
        wrong = f"it has a number of at least {low:g} for each of red, green and blue"
        raise BadOverride(f"{name}={values!r}", wrong, f"{name}=[0.5,0.5,0.5]")
