"""Experts, one file per idea; importing this package registers all of them."""

from mmoe.experts.activations import activation
from mmoe.experts.base import Experts
from mmoe.experts.ffn import FFN, FFNExperts, GatedFFN, GatedFFNExperts
from mmoe.experts.lora import LoRAGatedFFNExperts
from mmoe.experts.null import WithNullExperts

__all__ = [
    "FFN",
    "Experts",
    "FFNExperts",
    "GatedFFN",
    "GatedFFNExperts",
    "LoRAGatedFFNExperts",
    "WithNullExperts",
    "activation",
]
