"""One mixture of several models: the third stage of Uni-MoE's training, whose models know a modality each.

    expert e of a block = the feed-forward layer of model e;  all else is the first model's, and routers are new

Models are dense, or mixtures with one expert each, such as one with low-rank factors inside.
Shapes: E models and experts, F inner width, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmoe.errors import Refused
from zoo.config import make_config
from zoo.hosts.decoder import PROJECTIONS, pack_ffns
from zoo.uni_moe.config import UniMoEConfig

if TYPE_CHECKING:
    from zoo.uni_moe.model import UniMoE

_FIX = "start: {assemble: [base, ...]} of models that were trained from one"


def assembled_config(models: Sequence[UniMoE], count: int, options: Mapping[str, Any]) -> UniMoEConfig:
    """The config of a mixture of models that have one feed-forward layer a block.

    Args:
        models: the first is the host.
        count: E.
        options: that differ from the host's.

    Raises:
        Refused: they are not as many such models.
    """
    if len(models) != count or not all(map(_is_one, models)):
        wrong = f"it takes {count} models of this family, one for each expert, dense or with one expert each"
        raise Refused(f"assemble {len(models)} models", wrong, "start: {assemble: [base, ...]}")
    values = {**vars(models[0].config), "num_experts": count, **options}
    config: UniMoEConfig = make_config(UniMoEConfig, values, "uni_moe")
    return config


def _is_one(model: UniMoE) -> bool:
    config = getattr(model, "config", None)
    return isinstance(config, UniMoEConfig) and (not config.mixed or config.num_experts == 1)


def assembled_state(
    own: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], layers: Sequence[int]
) -> dict[str, Tensor]:
    """The state dict of a mixture, with what comes from models in the place of its own.

    Args:
        own: of the mixture, fresh.
        models: of each model; the first is the host's.
        layers: blocks that have experts.

    Raises:
        Refused: a tensor of a model has another shape than its place, or none; or the first model lacks one.
    """
    places = tuple(f"llm.model.layers.{layer}.mlp." for layer in layers)
    for name in own:
        if name not in models[0] and not name.startswith(places):
            wrong = f"the first model has no {name}, so that it would be random"
            raise Refused(
                "assemble a mixture of other parts",
                wrong,
                "model.overrides without other media and with the moe_layers of the models",
            )
    found = {name: value for name, value in models[0].items() if name in own and not name.startswith(places)}
    for place in places:
        layers_of = [_feed_forward(one, place) for one in models]
        for number, layer in enumerate(layers_of):
            for name in sorted(set(layer) ^ set(layers_of[0])):
                pair = ("the first one", f"model {number}")
                there, lacks = pair if name in layers_of[0] else pair[::-1]
                wrong = f"{place}{name} is in {there}, and not in {lacks}"
                raise Refused("assemble models of two kinds", wrong, _FIX)
            for name, value in layers_of[0].items():
                _check_shape(f"{place}{name} of model {number}", layer[name], value)
        dense = set(layers_of[0]) == set(PROJECTIONS)
        packed = pack_ffns(layers_of) if dense else _joined(layers_of)
        found |= {f"{place}experts.{name}": value for name, value in packed.items()}
    for name, value in found.items():
        if name not in own:
            raise Refused("assemble experts of this kind", f"they have no {name}", "experts: gated_ffn")
        _check_shape(name, value, own[name])
    return {**own, **found}


def _feed_forward(state: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """Weights of the one feed-forward layer of a block: of its projections, or of its only expert, packed (1, ...)."""
    expert = {name.removeprefix(f"{place}experts."): v for name, v in state.items() if f"{place}experts." in name}
    return expert or {name: state[f"{place}{name}.weight"] for name in PROJECTIONS}


def _joined(layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([layer[name] for layer in layers]) for name in layers[0]}


def _check_shape(name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        wrong = f"{name} is of {tuple(value.shape)}, and its place is of {tuple(like.shape)}"
        raise Refused("assemble models of other sizes", wrong, _FIX)
