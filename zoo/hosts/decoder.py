"""Language models of transformers as hosts: feed-forward blocks become mixtures, all else stays the library's.

So attention kernels, cache and `generate` are transformers' own. Made for models with `model.layers[i].mlp` whose block
is a gated one (`gate_proj`, `up_proj`, `down_proj`): Llama and its kin. Shapes: D width, F inner width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmoe.errors import BadOverride, Refused
from mmoe.moe import MoE, build_moe
from mmoe.options import check_int

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def chosen_layers(which: str | int | Sequence[int], depth: int) -> list[int]:
    """Layers that have experts: "all", "even", every n-th from the first, or a list.

    Raises:
        BadOverride: there are no such layers.

    >>> chosen_layers("even", 5), chosen_layers(3, 7), chosen_layers([1], 4)
    ([0, 2, 4], [0, 3, 6], [1])
    """
    if isinstance(which, str):
        steps = {"all": 1, "even": 2}
        if which not in steps:
            raise BadOverride(f"moe_layers={which!r}", "it is all, even, a step, or a list of layers", "moe_layers=all")
        return list(range(0, depth, steps[which]))
    if isinstance(which, int):
        check_int("moe_layers", which, 1)
        return list(range(0, depth, which))
    for layer in which:
        check_int("a layer of moe_layers", layer, 0, depth - 1)
    return sorted(set(which))


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """Transformer blocks of a language model.

    Raises:
        Refused: it has none with an `mlp`.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(layer, "mlp") for layer in layers):
        fix = "a LlamaForCausalLM, or another model of transformers with model.layers[i].mlp"
        raise Refused(f"put experts into a {type(model).__name__}", "it has no model.layers with an mlp each", fix)
    return layers


def add_mixtures(
    model: PreTrainedModel,
    layers: Sequence[int],
    num_experts: int,
    *,
    top_k: int = 2,
    router: str | Mapping[str, Any] = "topk",
    experts: str | Mapping[str, Any] = "gated_ffn",
) -> PreTrainedModel:
    """Puts untrained mixtures in the place of feed-forward blocks, in place.

    Args:
        model: a causal language model, on any device.
        layers: which of its blocks.
        num_experts: E.
        top_k: K, for routers that take it.
        router: name or spec.
        experts: name or spec of gated experts.

    Returns:
        The model.

    Raises:
        Refused: a block is no gated feed-forward block of the host.
    """
    blocks = blocks_of(model)
    for number in layers:
        mlp = blocks[number].mlp
        if not all(isinstance(getattr(mlp, name, None), nn.Linear) for name in PROJECTIONS):
            asked, wrong = f"put experts into block {number}", f"it has a {type(mlp).__name__}"
            raise Refused(asked, wrong, f"blocks with {', '.join(PROJECTIONS)}")
        like = mlp.up_proj.weight
        with torch.device(like.device):
            moe = build_moe(like.shape[1], like.shape[0], num_experts, top_k, router=router, experts=experts)
        blocks[number].mlp = moe.to(like.dtype).train(mlp.training)
    return model


def pack_ffns(ffns: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Gated feed-forward blocks as packed experts.

    Args:
        ffns: weights of each, as "gate_proj", "up_proj" (F, D) and "down_proj" (D, F).

    Returns:
        "gate_up_proj" (E, 2F, D) and "down_proj" (E, D, F).
    """
    gate_up = [torch.cat([ffn["gate_proj"], ffn["up_proj"]]) for ffn in ffns]
    return {"gate_up_proj": torch.stack(gate_up), "down_proj": torch.stack([ffn["down_proj"] for ffn in ffns])}


def mixtures_of(model: PreTrainedModel) -> dict[int, MoE]:
    """Mixtures of a language model by the number of their block."""
    return {number: block.mlp for number, block in enumerate(blocks_of(model)) if isinstance(block.mlp, MoE)}
