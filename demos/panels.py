"""Panels that every model has: Routing, with the inputs of the family's Try tab, and Card.

Each panel draws itself into the open tab and wires itself; nothing of a visitor is kept outside `gr.State`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from demos import look, record
from demos.family import REDRAW, Choice, Family, Shell, message_area
from demos.store import Note
from mmoe.errors import BadInput
from zoo.card import Card
from zoo.table import metric_tables, routing_table

KEEP_SECONDS = 3600
FIGURE_SPACE = "\u2007"  # as wide as a digit


def routing_panel(tab: gr.Tab, family: Family, shell: Shell, sources: list[Any]) -> None:
    """The Routing tab: who handled which patch and token, layer by layer, and how even the load is.

    Opening the tab runs the model when the inputs changed; another layer is only drawn.
    """
    panel = _RoutingPanel(family, shell)
    state = gr.State(None, time_to_live=KEEP_SECONDS)
    with gr.Row(elem_classes="panel-head"):
        about = gr.HTML(look.hint("The inputs of the Try tab, as the routers saw them."), scale=4, min_width=300)
        again = gr.Button("Run again", size="sm", scale=0, min_width=110)
    message = message_area()
    with gr.Column(elem_classes="once-filled"):
        depth = Choice([1], value=1, label="Layer", elem_id=f"{family.name}-depth", elem_classes="depths")
        with gr.Row():
            picture = _figure("Patches by first expert", "Picture with tinted patches", f"{family.name}-overlay")
            texts = _figure("Tokens by first expert", "Tokens tinted by expert", f"{family.name}-tokens")
        with gr.Row():
            bars = gr.Plot(label="Load in this layer", min_width=270, elem_classes="captioned")
            heatmap = gr.Plot(label="Load in all layers", min_width=270, elem_classes="captioned")
        gr.HTML(look.section("Numbers"))
        table = look.table(record.NUMBERS_HEADER, label="Routing of every layer", elem_id=f"{family.name}-numbers")
    whole = [state, about, depth, picture, texts, bars, heatmap, table]

    def blank(count: int, model: str | None, told: str = "") -> list[Any]:
        return [None, look.hint(told), gr.skip(), None, None, None, None, look.rows([])]

    inputs = [state, depth, shell.model, *sources]
    names = ["state", "layer", "model", *family.parameters]
    name = f"{family.name}_routing"
    told = {"message": message, "blank": blank}
    opened = shell.on(tab.select, panel.show, inputs, whole, api_name=f"{name}_open", names=names, **told)
    ran = shell.on(again.click, panel.run, inputs[1:], whole, api_name=name, names=names[1:], **told)
    told["blank"] = partial(blank, told='Press "Run again".')
    shell.forget([shell.model, *sources], whole, runs=[opened, ran], **told)
    shell.on(
        depth.input,
        panel.draw,
        [state, depth],
        [picture, texts, bars],
        api_name=f"{name}_layer",
        names=["state", "layer"],
        message=message,
        **REDRAW,
    )


def _figure(label: str, alt_text: str, elem_id: str) -> gr.Image:
    """A picture that is shown, not given."""
    return gr.Image(
        label=label,
        type="pil",
        format="png",
        alt_text=alt_text,
        interactive=False,
        buttons=["fullscreen"],
        elem_id=elem_id,
        elem_classes=["captioned", "if-filled"],
        min_width=270,
    )


@dataclass
class _RoutingPanel:
    """Work of the Routing tab."""

    family: Family
    shell: Shell

    def show(self, note: Note, state: Any, depth: int, model: str, *values: Any) -> tuple[Any, ...]:
        """Routing of the inputs; nothing is done when it is shown already."""
        if state is not None and state["key"] == (model, values):
            return tuple(gr.skip() for _ in range(8))
        return self.run(note, depth, model, *values)

    def run(self, note: Note, depth: int, model: str, *values: Any) -> tuple[Any, ...]:
        """Runs a model and shows where each patch and token went, with load and entropy of every layer."""
        inputs = self.family.read(*values)
        with self.family.use(model, note) as loaded:
            note("Running with the routers recorded", 0.6)
            _, found = record.record_routing(
                loaded.model,
                lambda: self.family.observe(loaded.model, inputs),
                self.family.batch(loaded.model, inputs),
                self.family.picture(loaded.model, inputs),
                model,
            )
        note("Drawing", 0.8)
        depth = min(max(read_layer(depth), 1), found.depth)
        layers = gr.Radio(depth_names(found), value=depth)
        state = {"key": (model, values), "record": found}
        return (
            state,
            _about(found, self.family.seen),
            layers,
            *self._layer(found, depth),
            heatmap(found),
            look.rows([[name, load.replace(" ", FIGURE_SPACE), *rest] for name, load, *rest in record.numbers(found)]),
        )

    def draw(self, note: Note, state: Any, depth: int) -> tuple[Any, ...]:
        """Another layer of the routing that this session recorded last."""
        if state is None:
            raise BadInput("there is no routing to show", "nothing was run yet", 'press "Run again"')
        return self._layer(state["record"], read_layer(depth))

    def _layer(self, found: record.RoutingRecord, depth: int) -> tuple[Any, ...]:
        return record.overlay(found, depth), record.token_lines(found, depth), layer_load(found, depth)


def read_layer(depth: Any) -> int:
    """Number of a layer.

    Raises:
        BadInput: it is no whole number.
    """
    try:
        return int(depth)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadInput(f"no layer {look.quoted(str(depth))}", "layers are counted from 1", "layer=1") from error


def depth_names(found: record.RoutingRecord) -> list[tuple[str, int]]:
    """Depths to choose among; one that a modality does not have says which of its layers stands in.

    >>> from types import SimpleNamespace
    >>> depth_names(SimpleNamespace(depth=2, depths={"image": 2, "text": 1}))
    [('1', 1), ('2 (text 1)', 2)]
    """
    choices = []
    for depth in range(1, found.depth + 1):
        last = [f"{kind} {most}" for kind, most in found.depths.items() if most < depth]
        choices.append((f"{depth} ({', '.join(last)})" if last else str(depth), depth))
    return choices


def layer_load(found: record.RoutingRecord, depth: int) -> Any:
    """Figure of how much the experts of one depth are used: bars, or where modalities share a layer, a row for each."""
    from mmoe.figures import load_bars, load_heatmap

    counts = record.modality_counts(found, depth)
    if not counts:
        return load_bars(record.loads(found, depth), title="Load per expert")
    figure = load_heatmap([many.tolist() for many in counts.values()], names=list(counts), title="Load by modality")
    told, most = record.information(found, depth)
    if most:
        figure.axes[0].set_xlabel(f"expert; it tells {told:.2f} of the {most:.2f} bits of the modality")
    return figure


def heatmap(found: record.RoutingRecord) -> Any:
    """Figure of all layers by experts."""
    from mmoe.figures import load_heatmap

    return load_heatmap(found.trace, names=[found.names[layer] for layer in found.trace.layers])


def _about(found: record.RoutingRecord, seen: str) -> str:
    rows = found.summary
    uneven = max(rows, key=record.unevenness)
    many, experts = rows[0]["experts_per_token"], rows[0]["num_experts"]
    shown = "colours show the one with the largest weight"
    routes = f"each token goes to {many:g} of {experts} experts; {shown}"
    if many == experts:
        routes = f"each token goes to all {experts} experts; {shown}, the stronger the larger it is"
    told = ""
    if len(found.depths) > 1 and record.modality_counts(found, 1):
        bits, depth = max((record.information(found, depth)[0], depth) for depth in range(1, found.depth + 1))
        told = f"Experts tell most about the modality in layer {depth}: {bits:.2f} bits. "
    unused, slots = sum(len(row["dead"]) for row in rows), sum(row["num_experts"] for row in rows)
    return look.hint(
        f"{found.model}: {routes}. Most uneven here: {found.names[uneven['layer']]}, whose busiest expert has "
        f"{record.unevenness(uneven):.1f} times its even share. Experts this input did not use: "
        f"{f'{unused} of {slots}' if unused else 'none'}. {told}{seen}"
    )


def card_text(card: Card) -> str:
    """A card as Markdown: how to load it, sizes, licences, weights, numbers with provenance, paper, notes."""
    parts = [f"## Load it\n```python\nimport zoo\n\nmodel = zoo.load({card.name!r})\n```"]
    facts = {"tasks": ", ".join(card.tasks), "modalities": ", ".join(card.modalities)}
    facts["parameters"] = f"{card.params.get('total', 0):,}, of which {card.params.get('active', 0):,} active"
    facts |= {key.replace("_", " "): str(value) for key, value in card.moe.items()}
    parts.append("## What it is\n" + "\n".join(f"* {key}: {_plain(value)}" for key, value in facts.items()))
    licences: list[tuple[str, ...]] = [("this model", card.licence, "")]
    licences += [(part["name"], part["licence"], _link(part.get("source", ""))) for part in card.components]
    licences += [(f"weights “{tag}”", w.licence, w.note or w.source) for tag, w in card.weights.items()]
    if card.code:
        licences.append(("authors' code", card.code.get("licence", "unknown"), _link(card.code.get("url", ""))))
    parts.append("## Licences\n" + _table(["part", "licence", "source"], licences))
    if card.metrics:
        tables = [f"{_plain(title)}\n```text\n{text}\n```" for title, text in metric_tables(card.metrics)]
        parts.append("## Numbers\n" + "\n\n".join(tables))
    else:
        parts.append("## Numbers\nNone measured yet.")
    if card.routing:
        about, table = routing_table(card.routing)
        parts.append(f"## Measured routing\n{_plain(about[:1].upper() + about[1:])}\n```text\n{table}\n```")
    if card.paper:
        arxiv = card.paper.get("arxiv")
        link = f", [arXiv {arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else ""
        parts.append(
            f"## Paper\n{_plain(card.paper.get('authors', ''))}, “{_plain(card.paper.get('title', ''))}”"
            f"{', ' + _plain(card.paper['venue']) if 'venue' in card.paper else ''}{link}."
        )
    if card.notes:
        parts.append("## Notes\n" + "\n".join(f"* {note}" for note in card.notes))
    return "\n\n".join(parts)


def _plain(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _link(url: str) -> str:
    return f"[{url.removeprefix('https://')}]({url})" if url.startswith("https://") else url


def _table(header: list[str], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)
