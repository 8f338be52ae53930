"""The host of CLIP-MoE: open_clip's CLIP with long texts, and mixtures in place of its last feed-forward layers.

Shapes: D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmoe.registry import build_experts, build_router
from mmoe.surgery import HostedMoE
from zoo.clip_moe.config import ClipMoEConfig
from zoo.hosts.clip import CLIPHost


class LongTextCLIP(CLIPHost):
    """open_clip's CLIP with Long-CLIP's second position table.

    Args:
        config: of the family.
    """

    def __init__(self, config: ClipMoEConfig) -> None:
        super().__init__(config, route_padding=config.route_padding)
        self.position_split = config.position_split
        if config.position_split is not None:
            self.positional_embedding_res = nn.Parameter(self.positional_embedding.detach().clone())

    def positions(self, length: int) -> Tensor:
        """Position vectors of the first `length` tokens, (length, D)."""
        if self.position_split is None:
            return super().positions(length)
        tables = self.positional_embedding[: self.position_split], self.positional_embedding_res[self.position_split :]
        return torch.cat(tables)[:length]

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freezes the text tower except its last layers, and with its first position table the second one."""
        super().lock_text_tower(unlocked_layers, freeze_layer_norm)
        if self.position_split is not None:
            self.positional_embedding_res.requires_grad_(self.positional_embedding.requires_grad)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers should not decay, as timm asks for them."""
        return {*super().no_weight_decay(), "positional_embedding_res"}


def add_experts(clip: LongTextCLIP, config: ClipMoEConfig) -> None:
    """Puts a mixture in place of the MLP of the last `moe_layers` blocks of both towers."""
    for tower in (clip.visual.transformer, clip.transformer):
        for block in tower.resblocks[max(0, tower.layers - config.moe_layers) :]:
            sizes = {"dim": block.mlp.c_fc.in_features, "hidden_dim": block.mlp.c_fc.out_features}
            router = build_router(
                "topk" if config.router is None else config.router,
                dim=sizes["dim"],
                num_experts=config.num_experts,
                top_k=config.top_k,
            )
            experts = build_experts(
                "ffn" if config.experts is None else config.experts,
                **sizes,
                num_experts=config.num_experts,
                out_dim=sizes["dim"],
                act=config.activation,
                dropout=config.expert_dropout,
            )
            block.mlp = HostedMoE(router, experts)
