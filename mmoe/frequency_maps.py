"""What the frequency adapters of a model see and decide on a picture: low and high maps, and the router's weights.

The maps come from the layers themselves while the model runs on an input; nothing is stored otherwise.
Shapes: B pictures, H rows and W columns of patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mmoe.errors import Refused
from mmoe.frequency import ADAPTERS, FrequencyMoE, frequency_split
from mmoe.moe import moe_layers
from mmoe.options import check_int
from mmoe.trace import trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image as Picture


@dataclass(frozen=True, kw_only=True)
class FrequencyMaps:
    """One layer on a batch.

    Attributes:
        features: (B, H, W, D) patch tokens before the adapters.
        low: (B, H, W, D) their low frequencies.
        high: (B, H, W, D) the rest; low and high add up to the features.
        weights: (B, H, W, 3) of the router, in the order spatial, low, high.
    """

    features: Tensor
    low: Tensor
    high: Tensor
    weights: Tensor

    def strength(self, name: str, picture: int = 0) -> Tensor:
        """Length of each patch's vector in "features", "low" or "high", (H, W)."""
        maps: Tensor = getattr(self, name)
        return maps[picture].float().norm(dim=-1)


@torch.no_grad()
def frequency_maps(model: nn.Module, call: Callable[..., Any], *args: Any) -> dict[str, FrequencyMaps]:
    """Runs `call(*args)`, which uses `model`, and tells what its layers with frequency adapters saw and decided.

    Args:
        model: holder of the layers.
        call: the model itself or one of its methods.
        args: inputs of the call.

    Returns:
        Maps of the last run of each layer, by the layer's name.

    Raises:
        Refused: no layer with frequency adapters ran.

    Example:
        >>> layer = FrequencyMoE(8, 4)
        >>> found = frequency_maps(layer, layer, torch.randn(1, 4, 6, 8))
        >>> found[""].weights.shape
        torch.Size([1, 4, 6, 3])
    """
    layers = {name: layer for name, layer in moe_layers(model).items() if isinstance(layer, FrequencyMoE)}
    seen: dict[str, Tensor] = {}

    def watch(name: str, layer: FrequencyMoE) -> Any:
        return layer.register_forward_pre_hook(lambda _, inputs: seen.update({name: inputs[0].detach()}))

    hooks = [watch(name, layer) for name, layer in layers.items()]
    try:
        with trace(model) as routing:
            call(*args)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        wrong = "no layer that splits frequencies ran" if layers else "no layer splits frequencies"
        raise Refused("show frequencies", wrong, "a model with fft_layers, not compiled")
    found = {}
    for name, features in seen.items():
        low, high = frequency_split(features, layers[name].cutoff, layers[name].box)
        weights = routing.select(name or "*")[-1].dense_weights().unflatten(0, features.shape[:-1])
        found[name] = FrequencyMaps(features=features, low=low, high=high, weights=weights)
    return found


def frequency_figure(maps: FrequencyMaps, image: Picture | None = None, picture: int = 0) -> Figure:
    """The picture, the strength of its features and of their low and high parts, and the three weights of the router.

    Args:
        maps: of one layer.
        image: the picture itself, where it is to be shown.
        picture: place in the batch.

    Example:
        >>> layer = FrequencyMoE(8, 4)
        >>> figure = frequency_figure(frequency_maps(layer, layer, torch.randn(1, 4, 6, 8))[""])
        >>> [axes.get_title(loc="left") for axes in figure.axes][:3]
        ['features', 'low', 'high']
    """
    from matplotlib.figure import Figure

    check_int("picture", picture, 0, len(maps.features) - 1)
    parts = ("features", "low", "high")
    panels: list[tuple[str, Any, dict[str, Any]]] = []
    if image is not None:
        panels.append(("picture", np.asarray(image.convert("RGB")), {}))
    panels += [(part, maps.strength(part, picture).cpu().numpy(), {"cmap": "magma"}) for part in parts]
    weights = maps.weights[picture].cpu().numpy()
    shares = {"cmap": "Blues", "vmin": 0.0, "vmax": 1.0}
    panels += [(f"weight of {name}", weights[..., i], shares) for i, name in enumerate(ADAPTERS)]
    figure = Figure(figsize=(2.2 * len(panels), 2.5), layout="constrained")
    for axes, (title, values, how) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.imshow(values, **how)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_axis_off()
    return figure
