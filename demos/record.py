"""What the gallery keeps of one forward pass: where each patch and token went, in a few kilobytes, and pictures of it.

Shapes: T rows, K slots, P patches or tokens, E experts, L layers. Needs no gradio, so that the terminal can use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from mmoe.errors import Refused

if TYPE_CHECKING:
    from PIL import Image

    from mmoe.routing import Routing
    from mmoe.trace import Trace
    from zoo.model import Model
    from zoo.views import TokenView

SHORT = {"<start_of_text>": "start", "<end_of_text>": "end"}


@dataclass(kw_only=True)
class RoutingRecord:
    """Routing of one input.

    Attributes:
        model: name of the model.
        trace: experts and weights of every layer, on the CPU, without scores.
        summary: the table of `mmoe.Trace.summary`.
        views: how rows map to patches and tokens, of the modalities whose layers have experts.
        names: short name of each layer, such as "image 3".
        picture: the picture as the model sees it, or None.
    """

    model: str
    trace: Trace
    summary: list[dict[str, Any]]
    views: list[TokenView]
    names: dict[str, str]
    picture: Image.Image | None

    @property
    def depths(self) -> dict[str, int]:
        """Number of layers by modality."""
        return {view.modality: len(self.layers(view)) for view in self.views}

    @property
    def depth(self) -> int:
        """Layers of the deepest view."""
        return max(self.depths.values(), default=1)

    def layers(self, view: TokenView) -> list[str]:
        """Names of a view's layers in the order in which they ran."""
        return [name for name in self.trace.layers if fnmatchcase(name, view.layers)]

    def layer(self, view: TokenView, depth: int) -> str:
        """The view's layer at a depth counted from 1; its last one where the view has fewer."""
        layers = self.layers(view)
        return layers[min(max(depth, 1), len(layers)) - 1]


def record_routing(
    model: Model, run: Callable[[], Any], batch: Mapping[str, Any], picture: Image.Image | None = None, name: str = ""
) -> tuple[Any, RoutingRecord]:
    """Runs a forward pass and records its routing.

    Args:
        model: the model.
        run: does the forward pass.
        batch: what the model sees, for `model.views`.
        picture: the picture as the model sees it.
        name: of the model.

    Returns:
        What `run` returned, and the record.

    Raises:
        Refused: the model has no experts.
    """
    import mmoe
    from mmoe.trace import Trace

    experts_of(model, name)
    with mmoe.trace(model) as routing:
        result = run()
    trace = Trace(list(routing.names), [_small(one) for one in routing])
    views = [view for view in model.views(batch) if any(fnmatchcase(name, view.layers) for name in trace.layers)]
    names = layer_names(trace.layers, views)
    return result, RoutingRecord(
        model=name, trace=trace, summary=routing.summary(), views=views, names=names, picture=picture
    )


def experts_of(model: Model, name: str) -> dict[str, int]:
    """Number of experts in each layer that has some.

    Raises:
        Refused: there is none.
    """
    from mmoe.moe import moe_layers

    sizes = {layer: moe.router.num_experts for layer, moe in moe_layers(model).items()}
    if not sizes:
        raise Refused(
            f"{name} has no routing",
            "it is a dense model: no layer has experts",
            "choose a model with experts in the list of models",
        )
    return sizes


def _small(routing: Routing) -> Routing:
    from mmoe.routing import Routing

    return Routing(
        experts=routing.experts.detach().cpu(),
        weights=routing.weights.detach().float().cpu(),
        num_experts=routing.num_experts,
    )


def layer_names(layers: Sequence[str], views: Sequence[TokenView]) -> dict[str, str]:
    """Short names: modality and number of the layer in its view; the full name for a layer that no view shows."""
    names = {}
    for view in views:
        inside = [name for name in layers if fnmatchcase(name, view.layers)]
        for number, name in enumerate(inside, 1):
            shared = names[name].split(" ")[0] + "+" if name in names else ""
            names[name] = f"{shared}{view.modality} {number}"
    return {name: names.get(name, name) for name in layers}


def overlay(record: RoutingRecord, depth: int) -> Image.Image | None:
    """The picture with each patch in the colour of its first expert; None for models without pictures."""
    from mmoe import figures, first_choice

    view = next((view for view in record.views if view.grid is not None), None)
    if view is None or view.grid is None or record.picture is None:
        return None
    routing = record.trace.select(record.layer(view, depth))[0]
    return figures.patch_overlay(
        record.picture,
        view.of_sample(first_choice(routing), 0),
        view.grid,
        weights=view.of_sample(routing.weights.max(-1).values, 0),
        num_experts=routing.num_experts,
    )


def token_lines(record: RoutingRecord, depth: int, width: int = 480) -> Image.Image | None:
    """Every text with its tokens in the colour of their first expert, a line each; None without text."""
    from mmoe import figures, first_choice

    view = next((view for view in record.views if view.tokens), None)
    if view is None:
        return None
    routing = record.trace.select(record.layer(view, depth))[0]
    first, weight = first_choice(routing), routing.weights.max(-1).values
    tokens: list[str] = []
    experts: list[int] = []
    weights: list[float] = []
    for sample, texts in enumerate(view.tokens):
        texts = tuple(SHORT.get(text, text) for text in texts)
        tokens += [*texts[:-1], texts[-1] + "\n"]
        experts += view.of_sample(first, sample).tolist()
        weights += view.of_sample(weight, sample).tolist()
    return figures.token_strip(tokens, experts, weights=weights, num_experts=routing.num_experts, width=width)


def loads(record: RoutingRecord, depth: int) -> dict[str, Any]:
    """Share of each expert by layer at one depth, {"image 1": (E,), ...}."""
    layers = [record.layer(view, depth) for view in record.views]
    return {record.names[layer]: record.trace.select(layer)[0].use() for layer in layers}


def numbers(record: RoutingRecord) -> list[list[Any]]:
    """Rows for a table: layer, load in percent, max/mean load, entropy, unused experts."""
    return [
        [
            record.names[row["layer"]],
            "  ".join(f"{100 * share:2.0f}" for share in row["use"]),
            f"{unevenness(row):.2f}",
            f"{row['entropy']:.2f}",
            ", ".join(map(str, row["dead"])) or "none",
        ]
        for row in record.summary
    ]


def unevenness(row: Mapping[str, Any]) -> float:
    """How many times its even share the busiest expert of a layer has, of a row of `mmoe.Trace.summary`.

    Where every token uses all experts, the share is that of the weights.

    >>> unevenness({"use": [0.75, 0.25], "num_experts": 2})
    1.5
    """
    return float(max(row["use"]) * row["num_experts"])


NUMBERS_HEADER = ["layer", "load per expert, %", "max / mean", "entropy, nats", "unused experts"]
