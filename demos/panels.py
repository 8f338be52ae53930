"""Panels that every model has: Routing, Ablate and Card. They work with the inputs of the family's Try tab.

Each panel draws itself into the open tab and wires itself; nothing of a visitor is kept outside `gr.State`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from demos import look, record
from demos.family import Family, Shell, message_area
from demos.store import Note
from mmoe.errors import BadInput
from zoo.card import Card
from zoo.table import metric_tables, routing_table

KEEP_SECONDS = 3600


def routing_panel(tab: gr.Tab, family: Family, shell: Shell, sources: list[Any]) -> None:
    """The Routing tab: who handled which patch and token, layer by layer, and how even the load is.

    Opening the tab runs the model when the inputs changed; the slider only draws again.
    """
    panel = _RoutingPanel(family, shell)
    message = message_area()
    state = gr.State(None, time_to_live=KEEP_SECONDS)
    with gr.Row(elem_classes="panel-head"):
        about = gr.HTML(look.hint("The inputs of the Try tab, as the routers saw them."), scale=4, min_width=300)
        again = gr.Button("Run again", size="sm", scale=0, min_width=110)
    depth = gr.Slider(1, 2, 1, step=1, label="Layer", elem_id=f"{family.name}-depth", buttons=[])
    with gr.Row():
        picture = _figure("Patches by first expert", "Picture with tinted patches", f"{family.name}-overlay")
        texts = _figure("Tokens by first expert", "Tokens tinted by expert", f"{family.name}-tokens")
    with gr.Row():
        bars = gr.Plot(label="Load in this layer", min_width=270, elem_classes="captioned")
        heatmap = gr.Plot(label="Load in all layers", min_width=270, elem_classes="captioned")
    gr.HTML(look.section("Numbers"))
    table = look.table(record.NUMBERS_HEADER, label="Routing of every layer", elem_id=f"{family.name}-numbers")
    whole = [state, about, depth, picture, texts, bars, heatmap, table]

    def blank(count: int, told: str = "") -> list[Any]:
        return [None, look.hint(told), gr.skip(), None, None, None, None, look.rows([])]

    shell.forget([shell.model.change], whole, message=message, blank=lambda n: blank(n, 'Press "Run again".'))

    inputs = [state, depth, shell.model, *sources]
    names = ["state", "layer", "model", *family.parameters]
    name = f"{family.name}_routing"
    shell.on(tab.select, panel.show, inputs, whole, api_name=f"{name}_open", names=names, message=message, blank=blank)
    shell.on(again.click, panel.run, inputs[1:], whole, api_name=name, names=names[1:], message=message, blank=blank)
    shell.on(
        depth.input,
        panel.draw,
        [state, depth],
        [picture, texts, bars],
        api_name=f"{name}_layer",
        names=["state", "layer"],
        message=message,
        heavy=False,
        trigger_mode="always_last",
        show_progress="hidden",
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
        elem_classes="captioned",
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
        with self.shell.store.use(model, note) as loaded:
            note("Running with the routers recorded", 0.6)
            _, found = record.record_routing(
                loaded.model,
                lambda: self.family.predict(loaded.model, inputs),
                self.family.batch(loaded.model, inputs),
                self.family.picture(loaded.model, inputs),
                model,
            )
        note("Drawing", 0.8)
        depth = min(max(int(depth), 1), found.depth)
        slider = gr.Slider(maximum=max(found.depth, 2), value=depth, interactive=found.depth > 1)
        state = {"key": (model, values), "record": found}
        return (
            state,
            _about(found),
            slider,
            *self._layer(found, depth),
            heatmap(found),
            look.rows(record.numbers(found)),
        )

    def draw(self, note: Note, state: Any, depth: int) -> tuple[Any, ...]:
        """Another layer of the routing that this session recorded last."""
        if state is None:
            raise BadInput("there is no routing to show", "nothing was run yet", 'press "Run again"')
        return self._layer(state["record"], int(depth))

    def _layer(self, found: record.RoutingRecord, depth: int) -> tuple[Any, ...]:
        from mmoe.figures import load_bars

        bars = load_bars(record.loads(found, depth), title="Load per expert")
        return record.overlay(found, depth), record.token_lines(found, depth), bars


def heatmap(found: record.RoutingRecord) -> Any:
    """Figure of all layers by experts."""
    from mmoe.figures import load_heatmap

    return load_heatmap(found.trace, names=[found.names[layer] for layer in found.trace.layers])


def _about(found: record.RoutingRecord) -> str:
    rows = found.summary
    uneven = max(rows, key=lambda row: row["max_over_mean"])
    unused, slots = sum(len(row["dead"]) for row in rows), sum(row["num_experts"] for row in rows)
    return look.hint(
        f"{found.model}: each token goes to {rows[0]['experts_per_token']:g} of {rows[0]['num_experts']} experts; "
        f"colours show the one with the largest weight. Most uneven here: {found.names[uneven['layer']]}, whose "
        f"busiest expert has {uneven['max_over_mean']:.1f} times its even share. Experts this input did not use: "
        f"{f'{unused} of {slots}' if unused else 'none'}."
    )


SWITCH_TEMPLATE = """<p class="caption">${caption}</p><div class="switches"><table>
<thead><tr><th scope="row">expert</th>
${Array.from({length: experts}, (_, e) => `<th scope="col">${e}</th>`).join('')}</tr></thead>
<tbody>${rows.length > 1 ? `<tr class="all"><th scope="row">all layers</th>
${Array.from({length: experts}, (_, e) => `<td><input type="checkbox" data-all="${e}"
 aria-label="expert ${e} off in all layers" ${e === start ? 'checked' : ''}></td>`).join('')}</tr>` : ''}
${rows.map(row => `<tr><th scope="row">${row.name}</th>
${Array.from({length: experts}, (_, e) => e < row.experts ? `<td><input type="checkbox" data-layer="${row.layer}"
 data-expert="${e}" aria-label="expert ${e} off in ${row.name}" ${e === start ? 'checked' : ''}></td>` : '<td></td>')
 .join('')}</tr>`).join('')}</tbody></table></div>"""
SWITCH_CSS = """
.switches { overflow: auto; max-height: 420px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; margin: 0; }
table, thead, tbody, tr, th, td { border: 0 !important; }
.caption { margin: 0 0 6px; font-size: .875rem; color: var(--body-text-color-subdued); }
th, td { padding: 4px 6px; text-align: center; vertical-align: middle;
  box-shadow: inset 0 -1px var(--border-color-primary); }
th { font-weight: 500; white-space: nowrap; }
th[scope=row] { text-align: left; padding-left: 0; }
tr.all th { font-weight: 650; }
input { width: 19px; height: 19px; accent-color: var(--color-accent); cursor: pointer; margin: 2px; }
"""
SWITCH_JS = """
const boxes = query => [...element.querySelectorAll(query)];
element.addEventListener('change', event => {
  const box = event.target;
  if (box.dataset.all !== undefined)
    boxes(`input[data-layer][data-expert="${box.dataset.all}"]`).forEach(one => { one.checked = box.checked; });
  boxes('input[data-all]').forEach(one => {
    const column = boxes(`input[data-layer][data-expert="${one.dataset.all}"]`);
    one.checked = column.every(other => other.checked);
    one.indeterminate = !one.checked && column.some(other => other.checked);
  });
  const off = {};
  boxes('input[data-layer]:checked').forEach(one => (off[one.dataset.layer] ??= []).push(+one.dataset.expert));
  props.value = JSON.stringify(off);
});
"""


def ablate_panel(tab: gr.Tab, family: Family, shell: Shell, sources: list[Any]) -> None:
    """The Ablate tab: tick experts off, run again, compare."""
    panel = _AblatePanel(family, shell)
    message = message_area()
    shown = gr.State("", time_to_live=KEEP_SECONDS)
    with gr.Row():
        with gr.Column(scale=4, min_width=270):
            switches = _switches(f"{family.name}-switches")
            run = gr.Button("Run without them", variant="primary", elem_id=f"{family.name}-ablate")
        with gr.Column(scale=6, min_width=270):
            verdict = gr.HTML(look.hint("Here come the results: all experts on, the ticked ones off, and the change."))
            with gr.Row():
                before = gr.Label(look.NO_RESULT, label="All experts on", num_top_classes=5, min_width=140)
                after = gr.Label(
                    look.NO_RESULT,
                    label="Ticked ones off",
                    num_top_classes=5,
                    min_width=140,
                    elem_id=f"{family.name}-after",
                )
            table = look.table(
                ["label", "before, %", "after, %", "change"],
                label="Change of every label",
                elem_id=f"{family.name}-difference",
            )
    name = f"{family.name}_ablate"
    results = [verdict, before, after, table]

    def blank(count: int) -> list[Any]:
        return ["", look.NO_RESULT, look.NO_RESULT, look.rows([])]

    shell.forget([one.change for one in (shell.model, *sources)], results, message=message, blank=blank)
    shell.on(
        tab.select,
        panel.layers,
        [shown, shell.model],
        [switches, shown],
        api_name=f"{family.name}_layers",
        names=["shown", "model"],
        message=message,
        blank=lambda _: [gr.HTML("{}", rows=[], experts=0), ""],
    )
    shell.on(
        run.click,
        panel.run,
        [switches, shell.model, *sources],
        results,
        api_name=name,
        names=["switched_off", "model", *family.parameters],
        message=message,
        blank=blank,
    )


def _switches(elem_id: str) -> gr.HTML:
    """A table of boxes, a row per layer and a column per expert; its value is JSON from layers to ticked experts."""
    return gr.HTML(
        "{}",
        html_template=SWITCH_TEMPLATE,
        css_template=SWITCH_CSS,
        js_on_load=SWITCH_JS,
        rows=[],
        experts=0,
        start=0,
        caption="Ticked experts are off; the router chooses among the others.",
        label="Experts to switch off",
        elem_id=elem_id,
        container=True,
        padding=True,
    )


@dataclass
class _AblatePanel:
    """Work of the Ablate tab."""

    family: Family
    shell: Shell

    def layers(self, note: Note, shown: str, model: str) -> tuple[Any, ...]:
        """Layers of a model and the number of experts in each, as rows for the switches; expert 0 is ticked."""
        if shown == model:
            return gr.skip(), gr.skip()
        with self.shell.store.use(model, note) as loaded:
            sizes = record.experts_of(loaded.model, model)
            names = record.layer_names(list(sizes), self.family.views(loaded.model))
        rows = [{"layer": layer, "name": names[layer], "experts": size} for layer, size in sizes.items()]
        off = {layer: [0] for layer, size in sizes.items() if size > 1}
        return gr.HTML(json.dumps(off), rows=rows, experts=max(sizes.values())), model

    def run(self, note: Note, switched_off: str, model: str, *values: Any) -> tuple[Any, ...]:
        """Runs a model twice, with all experts and without some.

        `switched_off` is JSON from layer names or patterns to experts, such as {"clip.visual.*": [0, 2]}.
        """
        import mmoe

        inputs = self.family.read(*values)
        with self.shell.store.use(model, note) as loaded:
            record.experts_of(loaded.model, model)
            off = read_switches(switched_off)
            note("Running with all experts", 0.5)
            before = self.family.predict(loaded.model, inputs)
            note("Running without some", 0.8)
            with mmoe.override(loaded.model, {layer: mmoe.switch_off(experts) for layer, experts in off.items()}):
                after = self.family.predict(loaded.model, inputs)
        return look.hint(_verdict(before, after, off)), before, after, look.rows(_differences(before, after))


def read_switches(text: str | None) -> dict[str, list[int]]:
    """JSON from layers to experts -> mapping; layers without experts are left out.

    Raises:
        BadInput: it is no such mapping, or nothing is switched off.

    >>> read_switches('{"clip.visual.*": [2, 0], "clip.transformer.*": []}')
    {'clip.visual.*': [0, 2]}
    """
    try:
        given = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise BadInput("cannot read which experts to switch off", f"it is not JSON: {error}", '{"*": [0]}') from error
    good = isinstance(given, Mapping) and all(
        isinstance(experts, list) and all(type(expert) is int for expert in experts) for experts in given.values()
    )
    if not good:
        raise BadInput("cannot read which experts to switch off", "it maps layers to lists of experts", '{"*": [0]}')
    off = {layer: sorted(set(experts)) for layer, experts in given.items() if experts}
    if not off:
        raise BadInput("all experts are on", "no box is ticked", "tick expert 0 in all layers, then run again")
    return off


def _verdict(before: Mapping[str, float], after: Mapping[str, float], off: Mapping[str, list[int]]) -> str:
    count = sum(map(len, off.values()))
    first, then = max(before, key=before.__getitem__), max(after, key=after.__getitem__)
    what = f"{count} expert{'s' if count > 1 else ''} switched off in {len(off)} layer{'s' if len(off) > 1 else ''}: "
    was, now = (f"{100 * before[name]:.1f} % before and {100 * after[name]:.1f} % after" for name in (first, then))
    if first == then:
        return f"{what}the first answer stays “{first}”, {was}."
    return f"{what}the first answer changes from “{first}” ({was}) to “{then}” ({now})."


def _differences(before: Mapping[str, float], after: Mapping[str, float]) -> list[list[Any]]:
    """Rows of name, before, after and change, the largest change first."""
    names = sorted(before, key=lambda name: -abs(after[name] - before[name]))
    changes = [(name, 100 * before[name], 100 * after[name]) for name in names]
    return [[name, f"{was:.2f}", f"{now:.2f}", f"{round(now - was, 2) or 0.0:+.2f}"] for name, was, now in changes]


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
