"""Rotary positions that stay exact when the language model around them changes its type.

A bf16 has 8 bits: at position 4,000 a frequency cast to it turns by several radians too far or too little. The library
keeps frequencies in fp32 when it loads a model in bf16, and casts them in `model.to(bf16)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class SteadyRotaryEmbedding(LlamaRotaryEmbedding):
    """The rotary embedding of Llama and its kin, whose frequencies move between devices but keep their type.

    Args:
        config: of the language model.

    Example:
        >>> from transformers import LlamaConfig
        >>> SteadyRotaryEmbedding(LlamaConfig()).bfloat16().inv_freq.dtype
        torch.float32
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, exact in before.items():
            moved = getattr(self, name)
            if moved.dtype != exact.dtype:
                setattr(self, name, exact.to(moved.device))
        return self
