"""What the experts did with an input: per token as plain data, as a heatmap, and over the picture.

The routings come from `mmoe.trace`, the way back to patches and words from a model's `views`.
Shapes: T rows, K slots, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe.atomic import open_atomic
from mmoe.errors import BadInput, Refused
from mmoe.figures import load_heatmap, patch_overlay, save_figure
from mmoe.routing import Routing, first_choice
from mmoe.trace import Trace
from zoo.views import TokenView

if TYPE_CHECKING:
    from PIL import Image


def token_experts(routing: Trace, views: Sequence[TokenView]) -> list[dict[str, Any]]:
    """Experts and weights of each token: one entry per layer and sample, as plain data.

    Args:
        routing: recorded routings of a batch.
        views: of the model for the same batch.

    Returns:
        Entries with "layer", "modality", "sample", "grid" (rows and columns of patches, or None), "tokens" (texts, or
        None), "about" where the view has that, and per token the "experts" it used with their "weights".
    """
    found = []
    for view in views:
        layers = routing.select(view.layers)
        for name, rows in zip(layers.names, layers, strict=True):
            for sample in view.samples(rows.experts):
                found.append(
                    {
                        "layer": name,
                        "modality": view.modality,
                        "sample": sample,
                        "grid": list(view.grid) if view.grid is not None else None,
                        "tokens": list(view.tokens[sample]) if view.tokens else None,
                        **({"about": view.about} if view.about else {}),
                        **_used(rows, view, sample),
                    }
                )
    return found


def _used(rows: Routing, view: TokenView, sample: int) -> dict[str, list[list[Any]]]:
    """Experts and weights of the slots that one sample's tokens use."""
    experts = view.of_sample(rows.experts, sample).tolist()
    weights = view.of_sample(rows.weights.detach().float(), sample).tolist()
    slots = [[k for k, expert in enumerate(token) if expert < rows.num_experts] for token in experts]
    return {
        "experts": [[token[k] for k in used] for token, used in zip(experts, slots, strict=True)],
        "weights": [[round(token[k], 5) for k in used] for token, used in zip(weights, slots, strict=True)],
    }


def picture_overlay(routing: Trace, views: Sequence[TokenView], picture: Image.Image, sample: int = 0) -> Image.Image:
    """The experts of the last layer that routes patches, over what the model saw of the picture.

    Args:
        routing: recorded routings of a batch.
        views: of the model for the same batch.
        picture: what its patches cover, as `Model.seen` cuts it.
        sample: place of the picture in the batch.

    Raises:
        BadInput: no layer routes patches.
    """
    for view in views:
        layers = routing.select(view.layers)
        if view.grid is not None and len(layers) and sample in view.samples(layers[-1].experts):
            last = layers[-1]
            experts = view.of_sample(first_choice(last), sample)
            return patch_overlay(picture, experts, view.grid, num_experts=last.num_experts)
    raise BadInput("cannot draw experts over the picture", "no layer routes its patches", "mmoe list")


def write(
    files: Mapping[str, Path],
    routing: Trace,
    views: Sequence[TokenView],
    about: Mapping[str, Any],
    picture: Image.Image | None,
) -> None:
    """Writes what was asked for, each file whole or not at all.

    Args:
        files: paths by kind: "trace", "heatmap", "overlay".
        routing: recorded routings of a batch.
        views: of the model for the same batch.
        about: goes into the trace first.
        picture: what the model saw of the first picture of the batch; an overlay needs one.

    Raises:
        Refused: experts are to be drawn and the model has none.
    """
    drawn = [kind for kind in files if kind != "trace"]
    if drawn and not len(routing):
        raise Refused(f"cannot draw the {drawn[0]} of {about['model']!r}", "no layer of it has experts", "mmoe list")
    if "trace" in files:
        data = {**about, "layers": routing.summary(), "tokens": token_experts(routing, views)}
        with open_atomic(files["trace"]) as file:
            file.write((json.dumps(data, ensure_ascii=False) + "\n").encode())
    if "heatmap" in files:
        save_figure(load_heatmap(routing), files["heatmap"])
    if "overlay" in files and picture is not None:
        save_figure(picture_overlay(routing, views, picture), files["overlay"])
