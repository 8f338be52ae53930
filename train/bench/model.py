"""`mmoe bench model`: speed, memory, parameters and FLOPs of a model of the zoo, beside its dense twin."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

import mmoe
import zoo
from mmoe.errors import BadOverride, Refused
from train.bench.layer import peak, take_turns
from zoo.assets import asset

BATCH, TEXTS = 32, ("a fox", "a slice of pizza", "a very small rocket")


def measure(
    name: str, dtype: str = "fp32", overrides: Mapping[str, Any] | None = None, seconds: float = 3.0
) -> dict[str, Any]:
    """Times of one picture and of a batch, and what they cost, by what the model encodes.

    Args:
        name: of a model with `encode_image` and `encode_text`, or a folder.
        dtype: of its parameters.
        overrides: of its config.
        seconds: about what each timing may take.

    Raises:
        Refused: it encodes neither pictures nor texts.
    """
    overrides = overrides or {}
    model: Any = load(name, dtype, overrides)
    dense = _dense_twin(model)
    found: dict[str, Any] = {"name": name, "dtype": dtype, **overrides}
    found["params"] = {"total": model.num_params().total, "active": model.num_params().active}
    for what, inputs in _inputs(model).items():
        encode = getattr(model, f"encode_{what}")
        one, many = inputs[:1], inputs.repeat_interleave(-(-BATCH // len(inputs)), 0)[:BATCH]
        with torch.inference_mode():
            runs: dict[str, Callable[[], object]] = {
                "one": lambda e=encode, i=one: e(i),
                "many": lambda e=encode, i=many: e(i),
            }
            ms = take_turns(runs, lambda: None, seconds)
            memory = peak(runs["many"])
        cost = mmoe.profile(model, encode, many).flops / BATCH
        row = {"latency_ms": ms["one"], "per_second": round(1e3 * BATCH / ms["many"], 1), "batch": BATCH}
        row |= {"peak_mb": memory, "mflops": round(cost / 1e6, 2)}
        if dense is not None:
            twin = mmoe.profile(dense, getattr(dense, f"encode_{what}"), many).flops / BATCH
            row["mflops_dense_twin"] = round(twin / 1e6, 2)
        found[what] = row
    return found


def load(name: str, dtype: str, overrides: Mapping[str, Any], weights: bool = True) -> Any:
    """The model on the CPU, its weights random where they are not wanted.

    Raises:
        BadOverride: its config has no such option.
    """
    others = inspect.signature(zoo.load).parameters.keys() - {"router", "experts", "overrides"}
    for taken in overrides.keys() & others:
        raise BadOverride(f"{taken!r} is not an option of {name}", "only its config can be swept", "top_k=1,2,4")
    return zoo.load(name, weights, device="cpu", dtype=dtype, **overrides)


def _dense_twin(model: Any) -> Any:
    """The same model with plain feed-forward layers, random; None for a dense model."""
    if not getattr(model.config, "num_experts", 0):
        return None
    return type(model)(type(model.config)(**{**vars(model.config), "num_experts": 0})).to(model.dtype).eval()


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    kinds = [kind for kind in ("image", "text") if hasattr(model, f"encode_{kind}")]
    if not kinds:
        asked = f"measure {type(model).__name__}"
        raise Refused(asked, "it encodes neither pictures nor texts", "mmoe bench layer")
    given = {"image": sorted(asset("examples").glob("*.png")), "text": list(TEXTS)}
    batch: dict[str, torch.Tensor] = model.preprocess(
        **{"images" if k == "image" else "texts": given[k] for k in kinds}
    )
    return {kind: batch[kind] for kind in kinds}
