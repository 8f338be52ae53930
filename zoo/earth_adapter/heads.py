"""Decoders: from the maps of four blocks to scores of classes per pixel, or to one label per picture.

Mask2Former: Cheng et al. 2022, arXiv 2112.01527; pixel decoder, transformer decoder and loss are those of transformers
(Apache-2.0). Settings of arXiv 2504.06220: costs and losses 2 / 5 / 5 for class, mask and dice, no-object weight 0.1,
12,544 points. The maps become a pyramid of strides 4, 8, 16, 32 for patches of 16 pixels (spec of the authors' code).
Shapes: B pictures, D width, C classes, Q queries, h and w of a map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)

from zoo.earth_adapter.config import EarthAdapterConfig

IGNORED = 255  # in masks
Losses = dict[str, Tensor]


def pyramid(maps: list[Tensor]) -> list[Tensor]:
    """Four maps (B, D, h, w) resized by 4, 2, 1 and 1/2; a single row or column stays one.

    >>> [tuple(level.shape[2:]) for level in pyramid([torch.zeros(1, 1, 4, 6)] * 4)]
    [(16, 24), (8, 12), (4, 6), (2, 3)]
    """
    factors = (4.0, 2.0, 1.0, 0.5)
    height, width = maps[-1].shape[2:]
    if min(height, width) == 1:
        maps = [*maps[:-1], F.pad(maps[-1], (0, int(width == 1), 0, int(height == 1)), mode="replicate")]
    return [
        one if factor == 1 else F.interpolate(one, scale_factor=factor, mode="bilinear", align_corners=False)
        for one, factor in zip(maps, factors, strict=True)
    ]


class LightHead(nn.Module):
    """A few convolutions: each map to `head_width` channels, all together through two steps of twice the size.

    Args:
        config: of the family.
    """

    def __init__(self, config: EarthAdapterConfig) -> None:
        super().__init__()
        width = config.head_width
        self.lateral = nn.ModuleList(nn.Conv2d(config.width, width, 1) for _ in config.out_layers or ())
        self.norm = nn.GroupNorm(1, width)
        self.steps = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.out = nn.Conv2d(width, config.num_classes, 1)

    def logits(self, maps: list[Tensor]) -> Tensor:
        """Maps (B, D, h, w) -> (B, C, 4h, 4w)."""
        x = self.norm(sum(lateral(one) for lateral, one in zip(self.lateral, maps, strict=True)))
        for step in self.steps:
            x = F.gelu(step(F.interpolate(F.gelu(x), scale_factor=2.0, mode="bilinear", align_corners=False)))
        return self.out(x)

    def scores(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Probabilities (B, C, *size), which sum to 1."""
        return _resized(self.logits(maps), size).softmax(1)

    def loss(self, maps: list[Tensor], mask: Tensor) -> Losses:
        """Mean cross-entropy of the pixels of masks (B, H, W) that count."""
        logits = _resized(self.logits(maps), (mask.shape[-2], mask.shape[-1]))
        total = F.cross_entropy(logits.float(), mask, ignore_index=IGNORED, reduction="sum")
        return {"cross_entropy": total / (mask != IGNORED).sum().clamp(min=1)}


class Mask2FormerHead(Mask2FormerPreTrainedModel):
    """The paper's decoder: queries with a class and a mask each.

    Args:
        config: of the family.
    """

    def __init__(self, config: EarthAdapterConfig) -> None:
        super().__init__(_mask2former(config))
        width = config.head_width
        self.pixel_decoder = Mask2FormerPixelDecoder(self.config, feature_channels=[config.width] * 4)
        self.transformer_module = Mask2FormerTransformerModule(in_features=width, config=self.config)
        self.class_predictor = nn.Linear(width, config.num_classes + 1)
        self.post_init()

    def queries(self, maps: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Logits of classes (B, Q, C + 1) and of masks (B, Q, 4h, 4w) of every layer; the last one counts."""
        pixels = self.pixel_decoder(pyramid(maps), output_hidden_states=False, return_dict=True)
        found = self.transformer_module(list(pixels.multi_scale_features), pixels.mask_features)
        classes = [self.class_predictor(states.transpose(0, 1)) for states in found.intermediate_hidden_states]
        return list(zip(classes, found.masks_queries_logits, strict=True))

    def scores(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Sum over queries of class probability times mask, (B, C, *size); they need not sum to 1."""
        classes, masks = self.queries(maps)[-1]
        probs = classes.float().softmax(-1)[..., :-1]  # (B, Q, C)
        return torch.einsum("bqc,bqhw->bchw", probs, _resized(masks, size).float().sigmoid())

    def loss(self, maps: list[Tensor], mask: Tensor) -> Losses:
        """Weighted losses of all layers against masks (B, H, W): of classes, of masks, and their dice."""
        found = self.queries(maps)
        layers = [{"class_queries_logits": c.float(), "masks_queries_logits": m.float()} for c, m in found]
        labels = [one.unique() for one in mask]
        labels = [one[one != IGNORED] for one in labels]
        truth = [(one == label[:, None, None]).float() for one, label in zip(mask, labels, strict=True)]
        weights = {
            "loss_cross_entropy": self.config.class_weight,
            "loss_mask": self.config.mask_weight,
            "loss_dice": self.config.dice_weight,
        }
        criterion = Mask2FormerLoss(self.config, weights).to(mask.device)
        given = {"mask_labels": truth, "class_labels": labels}
        parts: Losses = criterion(**layers[-1], **given, auxiliary_predictions=layers[:-1])
        total: Losses = {}
        for name, value in parts.items():
            kind = next(kind for kind in weights if name.startswith(kind))
            total[kind.removeprefix("loss_")] = total.get(kind.removeprefix("loss_"), 0.0) + weights[kind] * value
        return total


def _mask2former(config: EarthAdapterConfig) -> Mask2FormerConfig:
    width = config.head_width
    return Mask2FormerConfig(
        feature_size=width,
        mask_feature_size=width,
        hidden_dim=width,
        encoder_feedforward_dim=4 * width,
        dim_feedforward=8 * width,
        encoder_layers=config.pixel_layers,
        decoder_layers=config.query_layers + 1,
        num_queries=config.queries,
        train_num_points=config.points,
        num_labels=config.num_classes,
    )


class ClassHead(nn.Module):
    """One label per picture, from the mean of its patches behind the final norm: what a backbone can be trained on.

    Args:
        config: of the family.
    """

    def __init__(self, config: EarthAdapterConfig) -> None:
        super().__init__()
        self.out = nn.Linear(config.width, config.num_classes)

    def forward(self, tokens: Tensor, prefix: int) -> Tensor:
        """Normed tokens (B, P + N, D) -> logits (B, C)."""
        return self.out(tokens[:, prefix:].mean(1))


HEADS: dict[str, Any] = {"light": LightHead, "mask2former": Mask2FormerHead, "classes": ClassHead}


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
