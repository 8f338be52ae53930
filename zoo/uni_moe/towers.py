"""The encoders of Uni-MoE with the sizes of its config, each followed by what makes tokens of its features.

Encoders begin frozen: they run without gradients and in eval mode, so that no dropout and no batch norm changes them,
until something sets `requires_grad` on their parameters, such as `tune.modules` of a recipe that names them, or
`tune.method: full`, which trains all there is. Batch norms keep the statistics that they came with even then.

Shapes: B samples, F frames, S side, M mel bands, T time, Q queries, C width of features, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Blip2QFormerConfig, CLIPVisionConfig, CLIPVisionModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mmoe.errors import BadInput, BadOverride, did_you_mean
from zoo.hosts.beats import BEATs, BEATsConfig
from zoo.hosts.connectors import FrameStack, QFormerResampler, WhisperResampler, projector
from zoo.uni_moe.media import MEAN, STD


class _Tower(nn.Module):
    """A frozen encoder and what follows it; subclasses have an `encoder` and read its features."""

    encoder: nn.Module

    def features(self, *inputs: Any) -> Tensor:
        """What the encoder finds, with gradients only where some of its parameters are trained."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._trains()):
            return self.read(*inputs)

    def read(self, *inputs: Any) -> Tensor:
        """Features of inputs."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> _Tower:
        """Training mode for what is trained."""
        super().train(mode)
        if not self._trains():
            self.encoder.eval()
        for module in self.encoder.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def _trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.encoder.parameters())


class Vision(_Tower):
    """An image encoder, CLIP's or one of timm's, and a projection of each of its features.

    Args:
        sizes: of a CLIP, or with the name of a "timm" model and its "image_size".
        layer: of a CLIP, whose output is read, counted from the last.
        kind: of projection.
        dim: D.

    Attributes:
        size: S.
        mean, std: of the preprocessing of pictures.
    """

    def __init__(self, sizes: Mapping[str, Any], layer: int, kind: str, dim: int) -> None:
        super().__init__()
        self.layer, self.size = layer, sizes["image_size"]
        self.timm = "timm" in sizes
        if self.timm:
            encoder = _timm(sizes["timm"], self.size)
            own, width = encoder.pretrained_cfg, encoder.num_features
        else:
            own, width = {"mean": MEAN, "std": STD}, sizes["width"]
            encoder = _clip(sizes)
        self.mean, self.std = (tuple(sizes.get(name) or own[name]) for name in ("mean", "std"))
        self.encoder, self.projector = encoder.requires_grad_(False), projector(kind, width, dim)

    def read(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> features of their patches (B, patches, C)."""
        if not self.timm:
            return self.encoder(images, output_hidden_states=True).hidden_states[self.layer][:, 1:]
        found: Tensor = self.encoder.forward_features(images)
        if found.ndim == 3:
            return found[:, self.encoder.num_prefix_tokens :]
        rows_first = found.shape[1] != self.encoder.num_features  # (B, rows, columns, C)
        return found.flatten(1, 2) if rows_first else found.flatten(2).transpose(1, 2)

    @cached_property
    def patches(self) -> int:
        """Tokens of a picture."""
        like = next(self.encoder.parameters())
        with torch.no_grad():
            return self.read(like.new_zeros(1, 3, self.size, self.size)).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> tokens (B, patches, D)."""
        tokens: Tensor = self.projector(self.features(images))
        return tokens

    def of_videos(self, videos: Tensor) -> Tensor:
        """Videos (B, F, 3, S, S) -> tokens (B, patches, D), the mean over frames."""
        return self(videos.flatten(0, 1)).unflatten(0, videos.shape[:2]).mean(1)


def _clip(sizes: Mapping[str, Any]) -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=sizes["width"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            intermediate_size=sizes["ffn_dim"],
            image_size=sizes["image_size"],
            patch_size=sizes["patch_size"],
            hidden_act=sizes.get("activation", "quick_gelu"),
        )
    )


def _timm(name: str, size: int) -> Any:
    """An image model of timm's without its classifier.

    Raises:
        BadOverride: there is none of that name.
    """
    import timm

    if not timm.is_model(name):
        wrong = did_you_mean(name, timm.list_models())
        raise BadOverride(f"vision.timm={name!r}", wrong, "vision={timm: tf_efficientnet_lite0}")
    fixed = (timm.get_pretrained_cfg_value(name, "fixed_input_size") or False) and {"img_size": size}
    return timm.create_model(name, num_classes=0, **(fixed or {}))


class Speech(_Tower):
    """Whisper's encoder, and its decoder as a resampler or stacks of frames in the order of time.

    Args:
        sizes: of both.
        queries: Q per chunk, of the resampler.
        dim: D.
    """

    def __init__(self, sizes: Mapping[str, Any], queries: int, dim: int) -> None:
        super().__init__()
        config = WhisperConfig(
            d_model=sizes["width"],
            encoder_layers=sizes["layers"],
            encoder_attention_heads=sizes["heads"],
            encoder_ffn_dim=sizes["ffn_dim"],
            decoder_layers=sizes["resampler_layers"],
            decoder_attention_heads=sizes["heads"],
            decoder_ffn_dim=sizes["ffn_dim"],
            num_mel_bins=sizes["mels"],
            max_source_positions=sizes["positions"],
            max_target_positions=sizes["words"],
            vocab_size=1,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            decoder_start_token_id=0,
        )
        self.encoder = WhisperEncoder(config).requires_grad_(False)
        stacked = sizes.get("connector") == "stack"
        self.resampler = (
            FrameStack(sizes["width"], sizes["stack"], dim) if stacked else WhisperResampler(config, queries, dim)
        )
        self.sizes = dict(sizes)

    def tokens_of(self, positions: int) -> int | None:
        """Tokens of a recording that fills so many positions, without those of the silence behind it.

        None where queries read all parts alike.
        """
        if not isinstance(self.resampler, FrameStack):
            return None
        parts, rest = divmod(positions, self.sizes["positions"])
        of_part, of_rest = (-(-count // self.resampler.count) for count in (self.sizes["positions"], rest))
        return parts * of_part + of_rest

    def read(self, mels: Tensor) -> Tensor:
        """Log-mels (B, M, T) -> features (B, T / 2, C)."""
        return self.encoder(mels).last_hidden_state

    def forward(self, mels: Tensor) -> Tensor:
        """Log-mels (B, M, T) of as long as the encoder hears -> tokens (B, Q, D), or (B, stacks, D)."""
        tokens: Tensor = self.resampler(self.features(mels))
        return tokens


class Sound(_Tower):
    """BEATs and a Q-Former.

    Args:
        sizes: of both; those of the Q-Former begin with "resampler_".
        queries: Q per chunk.
        dim: D.
    """

    def __init__(self, sizes: Mapping[str, int], queries: int, dim: int) -> None:
        super().__init__()
        own = {name: value for name, value in sizes.items() if name in BEATsConfig.__dataclass_fields__}
        config = Blip2QFormerConfig(
            hidden_size=sizes["resampler_width"],
            num_hidden_layers=sizes["resampler_layers"],
            num_attention_heads=sizes["resampler_heads"],
            intermediate_size=sizes["resampler_ffn_dim"],
            encoder_hidden_size=sizes["width"],
        )
        self.encoder = BEATs(BEATsConfig(**own)).requires_grad_(False)
        self.resampler, self.seconds = QFormerResampler(config, queries, dim), sizes["seconds"]

    def read(self, mels: Tensor, padding: Tensor | None) -> Tensor:
        """Filter banks (B, T, 128) and samples that are padding (B, S) -> features (B, cells, C)."""
        return self.encoder(mels, padding)

    def forward(self, mels: Tensor, padding: Tensor | None = None) -> Tensor:
        """Filter banks (B, T, 128) and samples that are padding (B, S) -> tokens (B, Q, D)."""
        tokens: Tensor = self.resampler(self.features(mels, padding))
        return tokens


def recordings(tokens: Tensor, chunks: Sequence[int] | None, counts: Sequence[int] | None = None) -> list[Tensor]:
    """Tokens (C, Q, D) of chunks as one block per recording, the first ones where it is told how many."""
    if chunks is not None and (min(chunks, default=1) < 1 or sum(chunks) != len(tokens)):
        wrong = f"they are of {len(tokens)} chunks"
        raise BadInput(f"read recordings of {list(chunks)} chunks", wrong, "numbers that add up to the chunks")
    parts = tokens.split(list(chunks)) if chunks is not None else tokens.split(1)
    blocks = [part.flatten(0, 1) for part in parts]
    if counts is None:
        return blocks
    if len(counts) != len(blocks) or not all(1 <= own <= len(one) for own, one in zip(counts, blocks, strict=True)):
        wrong = f"they have {[len(one) for one in blocks]}"
        raise BadInput(f"read recordings of {list(counts)} tokens", wrong, "as many of each, or fewer")
    return [block[:count] for block, count in zip(blocks, counts, strict=True)]
