"""The encoders of Uni-MoE with the sizes of its config, each followed by what makes tokens of its features.

Encoders are frozen: they run without gradients. Shapes: B samples, F frames, S side, M mel bands, T time, Q queries, D
width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, CLIPVisionConfig, CLIPVisionModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from zoo.hosts.beats import BEATs, BEATsConfig
from zoo.hosts.connectors import QFormerResampler, WhisperResampler, projector


class Vision(nn.Module):
    """CLIP's image encoder and a projection of each patch.

    Args:
        sizes: of the encoder.
        layer: whose output is read, counted from the last.
        kind: of projection.
        dim: D.
    """

    def __init__(self, sizes: Mapping[str, int], layer: int, kind: str, dim: int) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=sizes["width"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            intermediate_size=sizes["ffn_dim"],
            image_size=sizes["image_size"],
            patch_size=sizes["patch_size"],
        )
        self.encoder, self.layer, self.size = CLIPVisionModel(config), layer, sizes["image_size"]
        self.projector = projector(kind, sizes["width"], dim)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> tokens (B, patches, D)."""
        with torch.no_grad():
            states = self.encoder(images, output_hidden_states=True).hidden_states
        tokens: Tensor = self.projector(states[self.layer][:, 1:])
        return tokens

    def of_videos(self, videos: Tensor) -> Tensor:
        """Videos (B, F, 3, S, S) -> tokens (B, patches, D), the mean over frames."""
        return self(videos.flatten(0, 1)).unflatten(0, videos.shape[:2]).mean(1)


class Speech(nn.Module):
    """Whisper's encoder, and its decoder as a resampler.

    Args:
        sizes: of both.
        queries: Q per chunk.
        dim: D.
    """

    def __init__(self, sizes: Mapping[str, int], queries: int, dim: int) -> None:
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
        self.encoder, self.resampler = WhisperEncoder(config), WhisperResampler(config, queries, dim)
        self.sizes = dict(sizes)

    def forward(self, mels: Tensor) -> Tensor:
        """Log-mels (B, M, T) of 30 seconds each -> tokens (B, Q, D)."""
        with torch.no_grad():
            features = self.encoder(mels).last_hidden_state
        tokens: Tensor = self.resampler(features)
        return tokens


class Sound(nn.Module):
    """BEATs and a Q-Former.

    Args:
        sizes: of both; those of the Q-Former begin with "resampler_".
        queries: Q per chunk.
        dim: D.
    """

    def __init__(self, sizes: Mapping[str, int], queries: int, dim: int) -> None:
        super().__init__()
        own = {name: value for name, value in sizes.items() if not name.startswith("resampler_")}
        config = Blip2QFormerConfig(
            hidden_size=sizes["resampler_width"],
            num_hidden_layers=sizes["resampler_layers"],
            num_attention_heads=sizes["resampler_heads"],
            intermediate_size=sizes["resampler_ffn_dim"],
            encoder_hidden_size=sizes["width"],
        )
        self.encoder, self.resampler = BEATs(BEATsConfig(**own)), QFormerResampler(config, queries, dim)

    def forward(self, mels: Tensor, padding: Tensor | None = None) -> Tensor:
        """Filter banks (B, T, 128) and samples that are padding (B, S) -> tokens (B, Q, D)."""
        with torch.no_grad():
            features = self.encoder(mels, padding)
        tokens: Tensor = self.resampler(features)
        return tokens
