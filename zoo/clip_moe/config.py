"""Options of the CLIP-MoE family; paper and method: `zoo.clip_moe.model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mmoe.options import check_float, check_int
from zoo.hosts.clip import CLIPSizes


@dataclass(frozen=True, kw_only=True)
class ClipMoEConfig(CLIPSizes):
    """Options of the family beside the sizes of its CLIP; the defaults are the released ViT-L/14.

    Attributes:
        position_split: rows below it come from the first position table, others from the second; None has one table.
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
        interpolation, resize_mode: preprocessing of pictures.
    """

    least: ClassVar[Mapping[str, int]] = {**CLIPSizes.least, "num_experts": 0, "moe_layers": 0}

    embed_dim: int = 768
    patch_size: int = 14
    vision_width: int = 1024
    vision_layers: int = 24
    text_width: int = 768
    context_length: int = 248
    position_split: int | None = 20
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
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts:
            check_int("top_k", self.top_k, 1, self.num_experts)
            check_int("moe_layers", self.moe_layers, 1)
        for name in ("expert_dropout", "label_smoothing"):
            check_float(name, getattr(self, name), low=0, below=1)
        for name in ("short_coef", "balance_coef", "text_balance_scale"):
            check_float(name, getattr(self, name), low=0)
        if self.position_split is not None:
            check_int("position_split", self.position_split, 0)
