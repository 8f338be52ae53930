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
    from torch import Tensor

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

    def routing(self, view: TokenView, depth: int) -> Routing:
        """The view's routing at a depth counted from 1."""
        return self.trace.select(self.layer(view, depth))[0]

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
    """Short names: modality and number of the layer in its view; the full name for a layer that no view shows.

    A layer of a sequence that modalities share is only numbered.
    """
    names = {}
    for view in views:
        inside = [name for name in layers if fnmatchcase(name, view.layers)]
        for number, name in enumerate(inside, 1):
            names[name] = f"layer {number}" if view.places or name in names else f"{view.modality} {number}"
    return {name: names.get(name, name) for name in layers}


def overlay(record: RoutingRecord, depth: int) -> Image.Image | None:
    """The picture with each patch in the colour of its first expert; None for models without pictures."""
    from mmoe import figures, first_choice

    view = next((view for view in record.views if view.grid is not None), None)
    if view is None or view.grid is None or record.picture is None:
        return None
    routing = record.routing(view, depth)
    return figures.patch_overlay(
        record.picture,
        view.of_sample(first_choice(routing), 0),
        view.grid,
        weights=view.of_sample(routing.weights.max(-1).values, 0),
        num_experts=routing.num_experts,
    )


def token_lines(record: RoutingRecord, depth: int, width: int = 480) -> Image.Image | None:
    """Every text with its tokens in the colour of their first expert, a line each; None without text.

    Where a sequence has other parts without a grid, such as speech, their tokens come below by their number.
    """
    parts = [view for view in record.views if view.tokens or (view.places and view.grid is None)]
    strips = [_strip(record.routing(view, depth), view, width) for view in parts]
    if len(strips) < 2:
        return strips[0] if strips else None
    return _stacked(strips, [f"{view.modality}{': ' if view.about else ''}{view.about}" for view in parts])


def _strip(routing: Routing, view: TokenView, width: int) -> Image.Image:
    from mmoe import figures, first_choice

    first, weight = first_choice(routing), routing.weights.max(-1).values
    tokens: list[str] = []
    experts: list[int] = []
    weights: list[float] = []
    for sample in view.samples(first):
        own = view.of_sample(first, sample).tolist()
        texts = view.tokens[sample] if view.tokens else map(str, range(1, len(own) + 1))
        lines = [SHORT.get(text, text) for text in texts]
        tokens += [*lines[:-1], lines[-1] + "\n"]
        experts += own
        weights += view.of_sample(weight, sample).tolist()
    return figures.token_strip(tokens, experts, weights=weights, num_experts=routing.num_experts, width=width)


def _stacked(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Pictures below each other, each under its caption."""
    from PIL import Image, ImageDraw, ImageFont

    font, margin, line = ImageFont.load_default(15), 12, 20
    width = max(picture.width for picture in pictures)
    lines = [wrapped(caption, lambda text: font.getlength(text) <= width - 2 * margin) for caption in captions]
    heads = [margin + line * len(own) for own in lines]
    canvas = Image.new("RGB", (width, sum(heads) + sum(picture.height for picture in pictures)), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for picture, own, head in zip(pictures, lines, heads, strict=True):
        draw.multiline_text((margin, top + margin), "\n".join(own), "#1a1a1a", font, spacing=line - 15)
        canvas.paste(picture, (0, top + head))
        top += head + picture.height
    return canvas


def wrapped(text: str, fits: Callable[[str], bool]) -> list[str]:
    """A text in lines that fit, as far as its words allow.

    >>> wrapped("a fox and a cat", lambda line: len(line) < 8)
    ['a fox', 'and a', 'cat']
    """
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and fits(longer):
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def loads(record: RoutingRecord, depth: int) -> dict[str, Any]:
    """Share of each expert by layer at one depth, {"image 1": (E,), ...}."""
    layers = [record.layer(view, depth) for view in record.views]
    return {record.names[layer]: record.trace.select(layer)[0].use() for layer in layers}


def modality_counts(record: RoutingRecord, depth: int) -> dict[str, Tensor]:
    """Slots of each expert by modality at one depth, {"text": (E,), ...}; none where each modality has its own layers.

    Where every token uses all experts, these are sums of weights.
    """
    import torch

    from mmoe.groups import group_counts

    views = [view for view in record.views if view.places]
    if not views:
        return {}
    kinds = list(dict.fromkeys(view.modality for view in views))
    routing = record.routing(views[0], depth)
    groups = torch.full((len(routing.experts),), -1)
    for view in views:
        for sample in view.samples(groups):
            groups[sample * view.rows + torch.tensor(view.places[sample])] = kinds.index(view.modality)
    every = bool((routing.n_used()[groups >= 0] == routing.num_experts).all())
    return dict(zip(kinds, group_counts(routing, groups, len(kinds), weighted=every), strict=True))


def information(record: RoutingRecord, depth: int) -> tuple[float, float]:
    """Bits that the expert of a slot tells about its modality at one depth, and the most that it could."""
    import torch

    from mmoe.groups import entropy_bits, mutual_information

    counts = modality_counts(record, depth)
    if len(counts) < 2:
        return 0.0, 0.0
    table = torch.stack(list(counts.values()))
    return mutual_information(table), entropy_bits(table.sum(1))


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
