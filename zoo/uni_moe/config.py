"""Options of Uni-MoE: sizes of its language model, of its encoders, and what is mixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mmoe.errors import BadOverride, did_you_mean
from mmoe.options import check_choice, check_float, check_int
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
}


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
        router, experts: registered ones.
        vision: sizes of the image encoder, a CLIP; None leaves images and videos out.
        vision_layer: whose output is read, counted from the last; -2 is the last but one, before the final norm.
        projector: of images; see `zoo.hosts.connectors.projector`.
        speech: sizes of the Whisper encoder, and of the Whisper decoder that resamples; None leaves speech out.
        sound: sizes of BEATs and of the Q-Former behind it; None leaves sounds out.
        queries: tokens per 30 seconds of speech or sound.
        tokenizer: where its tokenizer.json is, as a source of `zoo.weights`; None leaves words out.
        template: how conversations are written; see `zoo.hosts.chat`.
        frames: of a video that are looked at.
        parts: at most so many times 30 seconds of a recording are heard.
        balance_coef: of the balance loss, the mean over blocks, which counts first choices; 0 in the first version. The
            released one with 8 experts adds blocks up, so its coefficient is this one divided by their number.
        modality_coef, modality_experts: of the loss that sends tokens of a modality to some experts, and which, by the
            modality's name; see `zoo.uni_moe.losses`.
        divergence_coef: of the loss that sets the experts of two modalities apart.
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
        chosen_layers(self.moe_layers, self.layers)
        for branch, known in self.known.items():
            self._check_branch(branch, known)
        if self.width % self.heads or self.heads % (self.kv_heads or self.heads):
            asked = f"{self.heads} heads, {self.kv_heads or self.heads} for keys, in a width of {self.width}"
            raise BadOverride(asked, "heads must share the width evenly, and those for keys the heads", "heads=1")

    def _check_modalities(self) -> None:
        for name, experts in self.modality_experts.items():
            if name not in MODALITIES[1:]:
                wrong, fix = did_you_mean(name, MODALITIES[1:]), "modality_experts={image: [0, 1]}"
                raise BadOverride(f"modality_experts of {name!r}", wrong, fix)
            for expert in experts:
                check_int(f"an expert of {name}", expert, 0, self.num_experts - 1)
        if self.modality_coef and not self.modality_experts:
            wrong, fix = "no modality has experts of its own", "modality_experts={image: [0, 1]}"
            raise BadOverride(f"modality_coef={self.modality_coef}", wrong, fix)

    def _check_branch(self, branch: str, known: Mapping[str, int]) -> None:
        given = getattr(self, branch)
        if given is None:
            return
        for name, value in given.items():
            if name not in known:
                raise BadOverride(f"{branch} with {name!r}", did_you_mean(name, known), f"{branch}.{next(iter(known))}")
            check_int(f"{branch}.{name}", value, 1)
        object.__setattr__(self, branch, {**known, **given})

    @property
    def mixed(self) -> list[int]:
        """Blocks that have experts."""
        return chosen_layers(self.moe_layers, self.layers) if self.num_experts else []
