"""`mmoe bench adapters`: what Earth-Adapter's adapters cost beside the bare backbone, in one run on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import mmoe
from train.bench.layer import take_turns

BARE = "bare backbone"


def measure(
    *, width: int = 384, depth: int = 12, size: int = 224, batch: int = 4, dim: int = 64, seconds: float = 3.0
) -> dict[str, Any]:
    """Milliseconds of a batch for each kind of adapters, and ratios to the backbone without any.

    Forward is all that runs on pictures; a step is forward and backward to the adapters through the frozen blocks, in
    place of which the bare backbone has its forward alone, as its head needs no more.

    Args:
        width, depth: of the vision transformer.
        size: side of the pictures, patches of 16 pixels.
        batch: pictures.
        dim: inner width of the adapters.
        seconds: about what each timing may take.
    """
    from zoo.earth_adapter.config import EarthAdapterConfig
    from zoo.earth_adapter.model import EarthAdapter

    last = tuple(range(depth - min(3, depth), depth))
    kinds: dict[str, dict[str, Any]] = {
        BARE: {"adapters": "none"},
        "spatial": {"adapters": "spatial"},
        f"frequency in the last {len(last)}": {"fft_layers": last},
        "frequency in all": {"fft_layers": tuple(range(depth))},
    }
    sizes = {"width": width, "depth": depth, "image_size": size, "adapter_dim": dim, "cutoff": 0.3}
    sizes |= {"head": "light", "head_width": 8, "classes": ("land", "sea")}
    models = {name: EarthAdapter(EarthAdapterConfig(**{**sizes, **own})).eval() for name, own in kinds.items()}
    image = torch.randn(batch, 3, size, size)
    forward = {name: _forward(model, image) for name, model in models.items()}
    step = {name: _step(model, image) for name, model in models.items()}
    times = {"forward": take_turns(forward, lambda: None, seconds), "step": take_turns(step, lambda: None, seconds)}
    flops = {name: mmoe.profile(model, model.maps, image).flops / batch for name, model in models.items()}
    rows = []
    for name, model in models.items():
        adapters = sum(p.numel() for key, p in model.named_parameters() if ".frequency_adapter." in key)
        row: dict[str, Any] = {"name": name, "parameters": adapters, "mflops": round(flops[name] / 1e6, 1)}
        row["flops_ratio"] = round(flops[name] / flops[BARE], 4)
        for kind, ms in times.items():
            row[f"{kind}_ms"], row[f"{kind}_ratio"] = ms[name], round(ms[name] / ms[BARE], 3)
        rows.append(row)
    return {"width": width, "depth": depth, "size": size, "batch": batch, "dim": dim, "rows": rows}


def _forward(model: Any, image: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model.maps(image)

    return run


def _step(model: Any, image: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        loss = torch.stack([one.square().mean() for one in model.maps(image)]).sum()
        if loss.requires_grad:
            loss.backward()
            nn.Module.zero_grad(model)

    return run
