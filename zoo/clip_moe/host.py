"""The host of CLIP-MoE: open_clip's CLIP with long texts, and mixtures in place of its last feed-forward layers.

Shapes: B samples, N tokens, D width, C embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from torch.nn import functional as F

from mmoe.errors import BadInput
from mmoe.moe import with_context
from mmoe.registry import build_experts, build_router
from mmoe.routing import Context
from mmoe.surgery import HostedMoE
from zoo.clip_moe.config import ClipMoEConfig


class LongTextCLIP(CLIP):
    """open_clip's CLIP with Long-CLIP's second position table and texts cut at the longest of the batch.

    Args:
        config: of the family.
    """

    def __init__(self, config: ClipMoEConfig) -> None:
        vision_heads = config.vision_heads or max(1, config.vision_width // 64)
        super().__init__(
            embed_dim=config.embed_dim,
            vision_cfg=CLIPVisionCfg(
                layers=config.vision_layers,
                width=config.vision_width,
                head_width=config.vision_width // vision_heads,
                mlp_ratio=config.vision_mlp_ratio,
                patch_size=config.patch_size,
                image_size=config.image_size,
            ),
            text_cfg=CLIPTextCfg(
                context_length=config.context_length,
                vocab_size=config.vocab_size,
                width=config.text_width,
                heads=config.text_heads or max(1, config.text_width // 64),
                layers=config.text_layers,
                mlp_ratio=config.text_mlp_ratio,
            ),
            quick_gelu=config.activation == "quick_gelu",
            init_logit_scale=config.init_logit_scale,
        )
        self.position_split = config.position_split
        self.route_padding = config.route_padding
        if config.position_split is not None:
            self.positional_embedding_res = nn.Parameter(self.positional_embedding.detach().clone())

    def positions(self, length: int) -> Tensor:
        """Position vectors of the first `length` tokens, (length, D)."""
        if self.position_split is None:
            return self.positional_embedding[:length]
        tables = self.positional_embedding[: self.position_split], self.positional_embedding_res[self.position_split :]
        return torch.cat(tables)[:length]

    def cut(self, text: Tensor) -> Tensor:
        """Texts (B, N) cut behind the last end token of the batch, or as they are when padding is routed."""
        return text if self.route_padding else text[:, : int(text.argmax(-1).max()) + 1]

    def image_context(self, image: Tensor) -> Context:
        """What the routers of the image tower are told about pictures (B, 3, H, W)."""
        rows, columns = self.visual.grid_size
        return Context(group_ids=_sample_ids(len(image), 1 + rows * columns, image.device))

    def _embed_text(self, text: Tensor) -> tuple[Tensor, Tensor, Context]:
        length = text.shape[1]
        x = self.token_embedding(text) + self.positions(length)  # (B, N, D)
        ends = text.argmax(-1, keepdim=True)  # (B, 1)
        within = torch.arange(length, device=text.device) <= ends  # (B, N)
        samples = _sample_ids(len(text), length, text.device)
        context = Context(group_ids=samples, valid=None if self.route_padding else within)
        return x, self.attn_mask[:length, :length], context

    def _pool_text(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.ln_final(x)[torch.arange(len(x), device=x.device), text.argmax(-1)]  # (B, D)
        return x @ self.text_projection

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Pixels (B, 3, H, W) -> features (B, C)."""
        with with_context(self.visual, self.image_context(image)):
            features: Tensor = super().encode_image(image, normalize=normalize)
        return features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (B, N) -> features (B, C)."""
        text = self.cut(text)
        x, mask, context = self._embed_text(text)
        with with_context(self.transformer, context):
            x = self.transformer(x, attn_mask=mask)
        features = self._pool_text(x, text)  # (B, C)
        return F.normalize(features, dim=-1) if normalize else features

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freezes the text tower except its last layers, and with its first position table the second one."""
        super().lock_text_tower(unlocked_layers, freeze_layer_norm)
        if self.position_split is not None:
            self.positional_embedding_res.requires_grad_(self.positional_embedding.requires_grad)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers should not decay, as timm asks for them."""
        return {*super().no_weight_decay(), "positional_embedding_res"}

    def forward_intermediates(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        text_indices: Any = None,
        *,
        normalize: bool = True,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_logits: bool = False,
        output_logit_scale_bias: bool = False,
        **image_options: Any,
    ) -> dict[str, Any]:
        """As open_clip's, with the position tables of this class.

        Raises:
            BadInput: logits are asked for without a picture or without a text.
        """
        output_logits = output_logits and not intermediates_only
        if output_logits and (image is None or text is None):
            fix = "forward_intermediates(image, text, output_logits=True)"
            raise BadInput("no logits of pictures alone or texts alone", "they compare the two", fix)
        output: dict[str, Any] = {}
        shared = {"normalize_intermediates": normalize_intermediates, "intermediates_only": intermediates_only}
        if image is not None:
            with with_context(self.visual, self.image_context(image)):
                output = super().forward_intermediates(image, normalize=normalize, **shared, **image_options)
        if text is not None:
            output |= self._text_intermediates(text, text_indices, normalize, **shared)
        if output_logits:
            output["image_logits"] = self.logit_scale.exp() * output["image_features"] @ output["text_features"].t()
            output["text_logits"] = output["image_logits"].t()
        if output_logit_scale_bias:
            output["logit_scale"] = self.logit_scale.exp()
        return output

    def _text_intermediates(
        self, text: Tensor, indices: Any, normalize: bool, normalize_intermediates: bool, intermediates_only: bool
    ) -> dict[str, Any]:
        text = self.cut(text)
        x, mask, context = self._embed_text(text)
        with with_context(self.transformer, context):
            x, states = self.transformer.forward_intermediates(x, attn_mask=mask, indices=indices)
        output = {
            "text_intermediates": [self.ln_final(state) for state in states] if normalize_intermediates else states
        }
        if not intermediates_only:
            features = self._pool_text(x, text)  # (B, C)
            output["text_features"] = F.normalize(features, dim=-1) if normalize else features
        return output


def _sample_ids(samples: int, length: int, device: torch.device) -> Tensor:
    """Sample of each token, (B, N), for routers that choose inside a sample."""
    return torch.arange(samples, device=device)[:, None].expand(samples, length)


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
