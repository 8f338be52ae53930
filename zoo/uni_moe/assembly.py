"""One mixture of several dense models: the third stage of Uni-MoE's training, whose models know a modality each.

    expert e of a block = the feed-forward block of model e;  all else is the first model's, and routers are new

Shapes: E models and experts, F inner width, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmoe.errors import Refused
from zoo.config import make_config
from zoo.hosts.decoder import PROJECTIONS, pack_ffns
from zoo.uni_moe.config import UniMoEConfig

if TYPE_CHECKING:
    from zoo.uni_moe.model import UniMoE

_FIX = "start: {assemble: [base, ...]} of models that were trained from one"


def assembled_config(models: Sequence[UniMoE], count: int, options: Mapping[str, Any]) -> UniMoEConfig:
    """The config of a mixture of dense models.

    Args:
        models: the first is the host.
        count: E.
        options: that differ from the host's.

    Raises:
        Refused: they are not as many dense models.
    """
    dense = all(isinstance(getattr(one, "config", None), UniMoEConfig) and not one.config.mixed for one in models)
    if not dense or len(models) != count:
        wrong = f"it takes {count} dense models of this family, one for each expert"
        raise Refused(f"assemble {len(models)} models", wrong, "start: {assemble: [base, ...]}")
    values = {**vars(models[0].config), "num_experts": count, **options}
    config: UniMoEConfig = make_config(UniMoEConfig, values, "uni_moe")
    return config


def assembled_state(
    own: Mapping[str, Tensor], dense: Sequence[Mapping[str, Tensor]], layers: Sequence[int]
) -> dict[str, Tensor]:
    """The state dict of a mixture, with what comes from dense models in the place of its own.

    Args:
        own: of the mixture, fresh.
        dense: of each dense model; the first is the host's.
        layers: blocks that have experts.

    Raises:
        Refused: a tensor of a dense model has another shape than its place, or none.
    """
    found = {name: value for name, value in dense[0].items() if name in own}
    for layer in layers:
        place = f"llm.model.layers.{layer}.mlp"
        ffns = [{name: one[f"{place}.{name}.weight"] for name in PROJECTIONS} for one in dense]
        for number, ffn in enumerate(ffns):
            for name, value in ffn.items():
                _check_shape(f"{place}.{name} of model {number}", value, ffns[0][name])
        found |= {f"{place}.experts.{name}": value for name, value in pack_ffns(ffns).items()}
    for name, value in found.items():
        if name not in own:
            raise Refused("assemble experts of this kind", f"they have no {name}", "experts: gated_ffn")
        _check_shape(name, value, own[name])
    return {**own, **found}


def _check_shape(name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        wrong = f"{name} is of {tuple(value.shape)}, and its place is of {tuple(like.shape)}"
        raise Refused("assemble models of other sizes", wrong, _FIX)
