"""What turns the features of an encoder into tokens of a language model: a projection, or queries that read them.

    projector: Linear, GELU, Linear             one token per feature
    frame stack: n neighbours side by side -> Linear, GELU, Linear; one token per n features, in their order
    resamplers: Q learned queries read the features with cross-attention, then Linear; Q tokens whatever the length

Frame stacks are those of SLAM-ASR (Ma et al. 2024, arXiv 2402.08846), with GELU where it has ReLU.
`WhisperResampler` has the decoder of a Whisper, whose queries see those before them; `QFormerResampler` has BLIP-2's
Q-Former (Li et al. 2023, arXiv 2301.12597), whose queries see each other. Both resamplers are as in Uni-MoE
(arXiv 2405.11273). Shapes: B samples, M features, C their width, Q queries, D width of the language model.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmoe.errors import BadOverride
from mmoe.options import check_int

if TYPE_CHECKING:
    from transformers import Blip2QFormerConfig, WhisperConfig


def projector(kind: str, inputs: int, outputs: int) -> nn.Module:
    """LLaVA's projections: "linear", "identity", or "mlp2x_gelu" with any number of layers.

    Raises:
        BadOverride: there is no such kind.

    Example:
        >>> [tuple(p.shape) for p in projector("mlp2x_gelu", 4, 8).parameters()]
        [(8, 4), (8,), (8, 8), (8,)]
    """
    if kind == "identity":
        return nn.Identity()
    layers = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if kind != "linear" and layers is None:
        raise BadOverride(f"projector={kind!r}", "it is linear, identity, or mlp2x_gelu and the like", "mlp2x_gelu")
    parts: list[nn.Module] = [nn.Linear(inputs, outputs)]
    for _ in range(1, int(layers[1]) if layers else 1):
        parts += [nn.GELU(), nn.Linear(outputs, outputs)]
    return nn.Sequential(*parts) if layers else parts[0]


class FrameStack(nn.Module):
    """Neighbouring features side by side, and a projection of each such stack.

    Args:
        width: C.
        count: features in a stack; the last one is filled up with zeros.
        dim: D.

    Example:
        >>> FrameStack(4, 3, 8)(torch.zeros(2, 10, 4)).shape
        torch.Size([2, 4, 8])
    """

    def __init__(self, width: int, count: int, dim: int) -> None:
        super().__init__()
        self.count, self.projector = count, projector("mlp2x_gelu", count * width, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, M, C) -> tokens (B, M / count, D)."""
        whole = nn.functional.pad(features, (0, 0, 0, -features.shape[1] % self.count))
        tokens: Tensor = self.projector(whole.unflatten(1, (-1, self.count)).flatten(2))
        return tokens


class _Resampler(nn.Module):
    """Queries and a projection; subclasses read."""

    def __init__(self, queries: int, width: int, dim: int) -> None:
        super().__init__()
        check_int("queries", queries, 1)
        self.queries = nn.Parameter(0.02 * torch.randn(queries, width))
        self.projector = nn.Linear(width, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, M, C) -> tokens (B, Q, D)."""
        tokens: Tensor = self.projector(self.read(self.queries.expand(len(features), -1, -1), features))
        return tokens

    def read(self, queries: Tensor, features: Tensor) -> Tensor:
        """Queries (B, Q, W) that have read features (B, M, C)."""
        raise NotImplementedError


class WhisperResampler(_Resampler):
    """The decoder of a Whisper whose words are learned queries.

    Args:
        config: of the Whisper.
        queries: Q, at most its `max_target_positions`.
        dim: D.
    """

    def __init__(self, config: WhisperConfig, queries: int, dim: int) -> None:
        from transformers.models.whisper.modeling_whisper import WhisperDecoder

        if queries > config.max_target_positions:
            wrong = f"this Whisper has {config.max_target_positions} positions"
            raise BadOverride(f"queries={queries}", wrong, f"queries={config.max_target_positions}")
        super().__init__(queries, config.d_model, dim)
        self.decoder = WhisperDecoder(config)
        self.decoder.embed_tokens = nn.Identity()  # there are no words

    def read(self, queries: Tensor, features: Tensor) -> Tensor:
        """Queries (B, Q, W) that have read features (B, M, W), each with those before it."""
        found: Tensor = self.decoder(
            inputs_embeds=queries, encoder_hidden_states=features, use_cache=False
        ).last_hidden_state
        return found


class QFormerResampler(_Resampler):
    """BLIP-2's Q-Former.

    Args:
        config: of the Q-Former; `encoder_hidden_size` is C.
        queries: Q.
        dim: D.
    """

    def __init__(self, config: Blip2QFormerConfig, queries: int, dim: int) -> None:
        from transformers import Blip2QFormerModel

        super().__init__(queries, config.hidden_size, dim)
        self.qformer = Blip2QFormerModel(config)

    def read(self, queries: Tensor, features: Tensor) -> Tensor:
        """Queries (B, Q, W) that have read features (B, M, C) and each other."""
        found: Tensor = self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        return found
