"""BEATs, an audio encoder that no library has: 16 x 16 patches of a mel spectrogram through a post-norm transformer.

    x = LN(x + GELU(conv(x)));   per layer, a = (2L)^(1/4):   x = LN(a x + Attn(x)),  x = LN(a x + FFN(x))
    Attn: softmax(q k^T / sqrt(d) + gate * bias),  gate = g1 (g2 c - 1) + 2,  (g1, g2) = sigmoid of sums of W_g q
    bias: one table over buckets of (key - query), for all layers

Paper: Chen et al. 2022, "BEATs: Audio Pre-Training with Acoustic Tokenizers" (arXiv 2212.09058); the gated position
bias is WavLM's (2110.13900, eq. 1 to 4). Written for inference and for training what stands behind it: there is no
dropout inside. Released weights: `from_original` takes the file's "model".
Shapes: B clips, S samples, T frames, N tokens (T // 16 times 8 bands), D width, H heads, d head width.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmoe.errors import BadInput, BadOverride, LoadMismatch
from mmoe.options import check_float, check_int
from zoo.config import check_types

RATE, MELS, FRAME, HOP = 16_000, 128, 400, 160  # of sound: samples per second, bands, samples
MEAN, SPREAD = 15.41663, 6.55582  # of log-mels, published with the model


@dataclass(frozen=True, kw_only=True)
class BEATsConfig:
    """Sizes; the defaults are those of the released iter3+ AS2M.

    Attributes:
        patch_size: in frames and in mel bands.
        embed_dim: width of the patch embedding.
        width: D.
        ffn_dim: inner width of the feed-forward blocks.
        layers, heads: of the transformer.
        conv_pos, conv_pos_groups: kernel and groups of the convolution that gives positions.
        buckets, max_distance: of the relative positions.
    """

    patch_size: int = 16
    embed_dim: int = 512
    width: int = 768
    ffn_dim: int = 3072
    layers: int = 12
    heads: int = 12
    conv_pos: int = 128
    conv_pos_groups: int = 16
    buckets: int = 320
    max_distance: int = 800

    def __post_init__(self) -> None:
        check_types(self)
        for name in self.__dataclass_fields__:
            check_int(name, getattr(self, name), 1)
        for name, parts in (("width", self.heads), ("width", self.conv_pos_groups), ("buckets", 4)):
            if getattr(self, name) % parts:
                raise BadOverride(f"{name}={getattr(self, name)}", f"it is not a multiple of {parts}", f"{name}=768")
        check_float("max_distance", self.max_distance, above=self.buckets // 4)


@cache
def _filters() -> tuple[Tensor, Tensor]:
    """Window (400,) and mel filters (257, 128) of Kaldi, in fp64."""
    from transformers.audio_utils import mel_filter_bank, window_function

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lowest bands are narrower than a bin, and empty, as Kaldi's
        bank = mel_filter_bank(257, MELS, 20.0, RATE / 2, RATE, mel_scale="kaldi", triangularize_in_mel_space=True)
    window = window_function(FRAME, "povey", periodic=False)
    return torch.from_numpy(window).double(), torch.from_numpy(bank).double()


def log_mels(waveform: Tensor | np.ndarray) -> Tensor:
    """What the encoder sees of sound: Kaldi's filter bank of 25 ms every 10 ms, normalised.

    Args:
        waveform: (..., S) at 16 kHz, in [-1, 1].

    Returns:
        (..., T, 128) with T = 1 + (S - 400) // 160.

    Raises:
        BadInput: it is shorter than a frame of 400 samples.

    Example:
        >>> log_mels(torch.sin(torch.arange(16000) / 10)).shape
        torch.Size([98, 128])
    """
    samples = torch.as_tensor(waveform).double() * 2**15
    if samples.shape[-1] < FRAME:
        wrong = f"a frame has {FRAME}, or 25 ms at 16 kHz"
        raise BadInput(f"hear {samples.shape[-1]} samples", wrong, "a longer recording")
    window, filters = _filters()
    frames = samples.unfold(-1, FRAME, HOP)  # (..., T, 400)
    frames = frames - frames.mean(-1, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], -1)
    power = torch.fft.rfft((frames - 0.97 * before) * window, 512).abs().square()  # (..., T, 257)
    mels = (power @ filters).clamp(min=torch.finfo(torch.float32).eps).log()
    return ((mels - MEAN) / (2 * SPREAD)).float()


def reduce_mask(padding: Tensor, count: int) -> Tensor:
    """A mask (B, S) over fewer places (B, count): a place is padding if all of its part is; a rest at the end is cut.

    >>> reduce_mask(torch.tensor([[False, False, True, True, True]]), 2).tolist()
    [[False, True]]
    """
    padding = padding[:, : padding.shape[1] - padding.shape[1] % count]
    return padding.unflatten(1, (count, -1)).all(-1)


class BEATs(nn.Module):
    """The encoder.

    Args:
        config: sizes.
    """

    def __init__(self, config: BEATsConfig) -> None:
        super().__init__()
        self.config = config
        patch, width = config.patch_size, config.width
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, patch, stride=patch, bias=False)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        self.post_extract_proj = nn.Linear(config.embed_dim, width) if config.embed_dim != width else nn.Identity()
        kernel, groups = config.conv_pos, config.conv_pos_groups
        self.pos_conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        self.norm = nn.LayerNorm(width)
        self.position_bias = nn.Embedding(config.buckets, config.heads)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))

    def forward(self, mels: Tensor, padding: Tensor | None = None) -> Tensor:
        """Encodes clips.

        Args:
            mels: (B, T, 128) of `log_mels`.
            padding: (B, S) bool, True where a sample is padding.

        Returns:
            (B, N, D), time by time with its bands from low to high.
        """
        x = self.patch_embedding(mels[:, None]).flatten(2).transpose(1, 2)  # (B, N, embed)
        x = self.post_extract_proj(self.layer_norm(x))
        mask = None
        if padding is not None:
            padding = reduce_mask(reduce_mask(padding, mels.shape[1]), x.shape[1])
            x = x.masked_fill(padding[..., None], 0.0)
            mask = torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, -torch.inf)[:, None, None]
        positions = self.pos_conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        x = self.norm(x + F.gelu(positions))
        bias = self.position_bias(self._buckets(x.shape[1], x.device)).permute(2, 0, 1)  # (H, N, N)
        for layer in self.layers:
            x = layer(x, bias, mask)
        return x

    def _buckets(self, count: int, device: torch.device) -> Tensor:
        """Number of the bucket of each pair of places (query, key), (N, N)."""
        places = torch.arange(count, device=device)
        apart = places[None] - places[:, None]
        half = self.config.buckets // 2
        exact = half // 2
        steps = apart.abs()
        ratio = torch.log(steps.clamp(min=1).float() / exact) / math.log(self.config.max_distance / exact)
        far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
        return torch.where(steps < exact, steps, far) + half * (apart > 0)


class _Layer(nn.Module):
    def __init__(self, config: BEATsConfig) -> None:
        super().__init__()
        width = config.width
        self.residual = (2 * config.layers) ** 0.25
        self.attention = _Attention(width, config.heads)
        self.attention_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, config.ffn_dim), nn.Linear(config.ffn_dim, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention_norm(self.residual * x + self.attention(x, bias, mask))
        return self.norm(self.residual * x + self.fc2(F.gelu(self.fc1(x))))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)
        self.gate = nn.Linear(width // heads, 8)
        self.gate_scale = nn.Parameter(torch.ones(heads))

    def forward(self, x: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, H, N, d)
        first, second = self.gate(q).unflatten(-1, (2, 4)).sum(-1).sigmoid().unbind(-1)  # (B, H, N)
        gate = first * (second * self.gate_scale[:, None] - 1) + 2
        added = gate[..., None] * bias  # (B, H, N, N)
        added = added if mask is None else added + mask
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v, added).transpose(1, 2).flatten(2))
        return out


_NAMES = {
    "encoder.pos_conv.0.": "pos_conv.",
    "encoder.layer_norm.": "norm.",
    "encoder.layers.": "layers.",
    "self_attn_layer_norm": "attention_norm",
    "final_layer_norm": "norm",
    "self_attn.grep_linear": "attention.gate",
    "self_attn.": "attention.",
}
_TABLE = re.compile(r"encoder\.layers\.\d+\.self_attn\.relative_attention_bias\.weight")


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict under our names: the norm of the convolution's weights is folded, the table held once.

    Args:
        state: the "model" of a released file.

    Raises:
        LoadMismatch: the tables of the layers differ.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if _TABLE.fullmatch(name):
            if not torch.equal(found.setdefault("position_bias.weight", value), value):
                raise LoadMismatch(
                    "read this BEATs", f"{name!r} is not the table of the first layer", "a released file"
                )
            continue
        if name.endswith("self_attn.grep_a"):
            value = value.flatten()
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        found[name.replace("attention.grep_a", "attention.gate_scale")] = value
    if "pos_conv.weight_g" in found:
        size, direction = found.pop("pos_conv.weight_g"), found.pop("pos_conv.weight_v")
        found["pos_conv.weight"] = size * direction / direction.norm(dim=(0, 1), keepdim=True)
    return found
