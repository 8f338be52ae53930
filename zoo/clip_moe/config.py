"""Options of the CLIP-MoE family; paper and method: `zoo.clip_moe.model`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mmoe.errors import BadOverride
from mmoe.options import check_float, check_int

_SIZES = ("embed_dim", "image_size", "patch_size", "vision_width", "vision_layers", "text_width", "text_layers")
_LEAST = {name: 1 for name in (*_SIZES, "vision_heads", "text_heads", "context_length")}
_LEAST |= {"num_experts": 0, "moe_layers": 0, "vocab_size": 1}


@dataclass(frozen=True, kw_only=True)
class ClipMoEConfig:
    """Options of the family; the defaults are the released ViT-L/14.

    Attributes:
        embed_dim: C.
        image_size, patch_size: in pixels.
        vision_width, vision_layers, vision_heads, vision_mlp_ratio: image tower; width // 64 heads when None.
        text_width, text_layers, text_heads, text_mlp_ratio: text tower; width // 64 heads when None.
        vocab_size: entries of OpenAI's byte-pair encoding that are kept, the most frequent first.
        context_length: longest text in tokens.
        position_split: rows below it come from the first position table, others from the second; None has one table.
        activation: "quick_gelu" (OpenAI) or "gelu".
        num_experts: E; 0 is the dense CLIP.
        top_k: K.
        moe_layers: the last n blocks of each tower are mixtures, clipped to the tower's depth.
        router: registered router in place of top-k (softmax over all experts, renormalised).
        experts: registered experts in place of the two-layer perceptron.
        expert_dropout: after the experts' activation in training (0.1 in the authors' router training).
        route_padding: routes and counts the padding of texts, as released; False cuts texts and ignores padding.
        label_smoothing: of the contrastive loss.
        short_coef: weight of the loss on short captions where they are given.
        balance_coef, text_balance_scale: weights of the balance loss; the text tower's is their product.
        balance_pooled: takes the means over all layers of a tower together, as released.
        balance_over_ranks: every process balances its own rows and divides the loss by the number of processes, as
            released; False balances the rows of all together, so that their number makes no difference.
        init_logit_scale: logarithm of the initial inverse temperature.
        image_mean, image_std, interpolation, resize_mode: preprocessing of pictures.
    """

    embed_dim: int = 768
    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int | None = None
    vision_mlp_ratio: float = 4.0
    text_width: int = 768
    text_layers: int = 12
    text_heads: int | None = None
    text_mlp_ratio: float = 4.0
    vocab_size: int = 49408
    context_length: int = 248
    position_split: int | None = 20
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    num_experts: int = 4
    top_k: int = 2
    moe_layers: int = 24
    router: str | Mapping[str, Any] | None = None
    experts: str | Mapping[str, Any] | None = None
    expert_dropout: float = 0.0
    route_padding: bool = True
    label_smoothing: float = 0.1
    short_coef: float = 1.0
    balance_coef: float = 0.01
    text_balance_scale: float = 0.5
    balance_pooled: bool = True
    balance_over_ranks: bool = True
    init_logit_scale: float = 4.6052
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least)
        if self.num_experts:
            check_int("top_k", self.top_k, 1, self.num_experts)
            check_int("moe_layers", self.moe_layers, 1)
        for name in ("expert_dropout", "label_smoothing"):
            check_float(name, getattr(self, name), low=0, below=1)
        for name in ("short_coef", "balance_coef", "text_balance_scale"):
            check_float(name, getattr(self, name), low=0)
        for name in ("vision_mlp_ratio", "text_mlp_ratio"):
            check_float(name, getattr(self, name), above=0)
        check_float("init_logit_scale", self.init_logit_scale)
        if self.position_split is not None:
            check_int("position_split", self.position_split, 0)
        for name, low in (("image_mean", 0.0), ("image_std", 1e-6)):
            values = getattr(self, name)
            if len(values) != 3 or not all(isinstance(v, float | int) and low <= v < math.inf for v in values):
                wrong = f"{name} has a number of at least {low:g} for each of red, green and blue"
                raise BadOverride(f"{name}={list(values)}", wrong, f"{name}=[0.5,0.5,0.5]")
        for tower in ("vision", "text"):
            width = getattr(self, f"{tower}_width")
            heads = getattr(self, f"{tower}_heads") or max(1, width // 64)
            if width % heads:
                asked = f"{heads} heads in a tower of width {width}"
                raise BadOverride(asked, "heads must share the width evenly", f"{tower}_heads=1")
        if self.image_size % self.patch_size:
            raise BadOverride(
                f"image_size={self.image_size} with patch_size={self.patch_size}",
                "patches must cover the picture",
                f"image_size={max(1, self.image_size // self.patch_size) * self.patch_size}",
            )
