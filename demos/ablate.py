"""The Ablate tab that every model has: experts are ticked off, the model runs with and without them, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import gradio as gr

from demos import look, record
from demos.family import Family, Shell, as_sent, message_area
from demos.store import Note
from mmoe.errors import BadInput, UnknownName, did_you_mean

KEEP_SECONDS = 3600
HINT = "Here come the results: all experts on, the ticked ones off, and the change."
TABLE = ["label", "before, %", "after, %", "change"]

SWITCH_TEMPLATE = """${(experts => experts ? `
<p class="caption">Ticked experts are off; the router chooses among the others.</p>
<div class="switches"><table><thead><tr><th scope="row">expert</th>
${Array.from({length: experts}, (_, e) => `<th scope="col">${e}</th>`).join('')}</tr></thead>
<tbody>${rows.length > 1 ? `<tr class="all"><th scope="row">all layers</th>
${Array.from({length: experts}, (_, e) => `<td><input type="checkbox" data-all="${e}"
 aria-label="expert ${e} off in all layers" ${e === 0 ? 'checked' : ''}></td>`).join('')}</tr>` : ''}
${rows.map(row => `<tr><th scope="row">${text(row.name)}</th>
${Array.from({length: experts}, (_, e) => e < row.experts ? `<td><input type="checkbox" data-layer="${text(row.layer)}"
 data-expert="${e}" aria-label="expert ${e} off in ${text(row.name)}" ${e === 0 ? 'checked' : ''}></td>` : '<td></td>')
 .join('')}</tr>`).join('')}</tbody></table></div>` : '')(Math.max(0, ...rows.map(row => row.experts)))}"""
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


CLEAR = "() => ['', {__type__: 'update', value: '{}', props: {rows: []}}]"
# Opening the tab shows the switches of the model; one that is open has to follow the choice of another model.
IF_OPEN = """model => {
  const open = document.getElementById('%s-button')?.getAttribute('aria-selected') === 'true';
  return [open ? model : null];
}"""


def _told(label: gr.Label, value: Any) -> Any:
    """Data of a label; a pair has the answer, which need not be the largest, and the shares."""
    answer, shares = value if isinstance(value, tuple) else (None, value)
    found: Any = gr.Label.postprocess(label, shares)
    if answer is not None:
        found.label = answer
    return found


Answer = as_sent(gr.Label, postprocess=_told)


def ablate_panel(tab: gr.Tab, family: Family, shell: Shell, sources: list[Any]) -> None:
    """The Ablate tab: tick experts off, run again, compare."""
    panel = _AblatePanel(family, shell)
    shown = gr.State("", time_to_live=KEEP_SECONDS)
    with gr.Row():
        with gr.Column(scale=4, min_width=270):
            switches_message = message_area()
            with gr.Column(elem_classes="switching"):
                switches = _switches(f"{family.name}-switches")
                run = gr.Button("Run without them", variant="primary", elem_id=f"{family.name}-ablate")
        with gr.Column(scale=6, min_width=270):
            message = message_area()
            verdict = gr.HTML(look.hint(HINT))
            with gr.Row():
                before = Answer(look.NO_RESULT, label="All experts on", num_top_classes=5, min_width=220)
                after = Answer(
                    look.NO_RESULT,
                    label="Ticked ones off",
                    num_top_classes=5,
                    min_width=220,
                    elem_id=f"{family.name}-after",
                )
            table = look.table(TABLE, label="Change of every label", elem_id=f"{family.name}-difference")
    name = f"{family.name}_ablate"
    results = [verdict, before, after, table]

    def blank(count: int, model: str | None) -> list[Any]:
        return [look.hint(HINT), look.NO_RESULT, look.NO_RESULT, look.rows([])]

    inputs, shows = [shown, shell.model], [switches, shown]
    options = {
        "names": ["shown", "model"],
        "message": switches_message,
        "blank": lambda *_: [_no_switches(), ""],
    }
    opened = shell.on(tab.select, panel.layers, inputs, shows, api_name=f"{family.name}_layers", **options)
    options |= {
        "names": ["model"],
        "js": IF_OPEN % tab.elem_id,
        "api_visibility": "private",
        "trigger_mode": "always_last",
    }

    def follow() -> None:
        followed = shell.on(shell.model.input, panel.follow, inputs[1:], shows, api_name=f"{name}_follow", **options)
        shell.model.select(None, cancels=[opened, followed])

    shell.model.input(None, None, [switches_message, switches], js=CLEAR, api_visibility="private")
    shell.after_choice.append(follow)
    made_from = [switches, shell.model, *sources]
    names = ["switched_off", "model", *family.parameters]
    told = {"message": message, "blank": blank}
    ran = shell.on(run.click, panel.run, made_from, results, api_name=name, names=names, **told)
    shell.forget(made_from, results, runs=[ran], **told)


def _switches(elem_id: str) -> gr.HTML:
    """A table of boxes, a row per layer and a column per expert; its value is JSON from layers to ticked experts."""
    return gr.HTML(
        "{}",
        html_template=look.template(SWITCH_TEMPLATE),
        css_template=SWITCH_CSS,
        js_on_load=SWITCH_JS,
        rows=[],
        label="Experts to switch off",
        elem_id=elem_id,
        container=True,
        padding=True,
    )


def _no_switches() -> gr.HTML:
    return gr.HTML("{}", rows=[])


@dataclass
class _AblatePanel:
    """Work of the Ablate tab."""

    family: Family
    shell: Shell

    def layers(self, note: Note, shown: str, model: str) -> tuple[Any, ...]:
        """Layers of a model and the number of experts in each, as rows for the switches; expert 0 is ticked."""
        if shown == model:
            return gr.skip(), gr.skip()
        with self.family.use(model, note) as loaded:
            sizes = record.experts_of(loaded.model, model)
            names = record.layer_names(list(sizes), self.family.views(loaded.model))
        rows = [{"layer": layer, "name": names[layer], "experts": size} for layer, size in sizes.items()]
        off = {layer: [0] for layer, size in sizes.items() if size > 1}
        return gr.HTML(json.dumps(off), rows=rows), model

    def follow(self, note: Note, model: str | None) -> tuple[Any, ...]:
        """The switches of the model that was just chosen; none when it has no experts or the tab is not open."""
        if model not in [card.name for card in self.family.cards if card.moe]:
            return _no_switches(), ""
        return self.layers(note, "", model)

    def run(self, note: Note, switched_off: str, model: str, *values: Any) -> tuple[Any, ...]:
        """Runs a model twice, with all experts and without some.

        `switched_off` is JSON from layer names or patterns to experts, such as {"clip.visual.*": [0, 2]}.
        """
        import mmoe

        inputs = self.family.read(*values)
        with self.family.use(model, note) as loaded:
            sizes = record.experts_of(loaded.model, model)
            names = record.layer_names(list(sizes), self.family.views(loaded.model))
            off = matching(read_switches(switched_off), sizes, names)
            note("Running with all experts", 0.5)

            def changed() -> AbstractContextManager[Any]:
                note("Running without some", 0.8)
                switched = {layer: mmoe.switch_off(experts) for layer, experts in off.items()}
                return mmoe.override(loaded.model, switched)

            before, after = self.family.contrast(loaded.model, inputs, changed)
        headline = self.family.headline
        verdict = look.hint(f"{_verdict(before, after, off, self.family)} {self.family.compared}")
        parts = [{name: share for name, share in all_.items() if name != headline} for all_ in (before, after)]
        told = parts if headline is not None else zip(self.family.answers(before, after), parts, strict=True)
        return verdict, *told, look.rows(_differences(*parts))


def matching(off: Mapping[str, list[int]], sizes: Mapping[str, int], names: Mapping[str, str]) -> dict[str, list[int]]:
    """Experts to switch off by layer, of a mapping from layers or patterns; the last pattern that names a layer counts.

    Args:
        off: experts by layer or pattern.
        sizes: number of experts of every layer.
        names: what visitors know the layers by.

    Raises:
        BadInput: a layer has no such expert, or none would stay on.
        UnknownName: a pattern names no layer.

    >>> matching({"*": [0], "b": [1]}, {"a": 2, "b": 2}, {"a": "image 1", "b": "text 1"})
    {'a': [0], 'b': [1]}
    """
    found = {}
    for pattern, experts in off.items():
        layers = [layer for layer in sizes if fnmatchcase(layer, pattern)]
        if not layers:
            raise UnknownName(f"no MoE layer named {pattern!r}", did_you_mean(pattern, sizes), '{"*": [0]}')
        for layer in layers:
            _check(names[layer], experts, sizes[layer])
            found[layer] = experts
    return found


def _check(name: str, experts: list[int], size: int) -> None:
    if not all(0 <= expert < size for expert in experts):
        raise BadInput(
            f"switch off experts {experts} of {name}", f"it has experts 0 to {size - 1}", "switch off expert 0"
        )
    if len(experts) == size:
        raise BadInput(f"all {size} experts of {name} are off", "at least one must stay", "untick one of them")


def read_switches(text: Any) -> dict[str, list[int]]:
    """JSON from layers to experts, or the mapping itself -> mapping; layers without experts are left out.

    Raises:
        BadInput: it is no such mapping, or nothing is switched off.

    >>> read_switches('{"clip.visual.*": [2, 0], "clip.transformer.*": []}')
    {'clip.visual.*': [0, 2]}
    """
    try:
        given = text if isinstance(text, Mapping) else json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise BadInput("cannot read which experts to switch off", f"it is not JSON: {error}", '{"*": [0]}') from error
    except (TypeError, ValueError, RecursionError):
        given = None
    good = isinstance(given, Mapping) and all(
        isinstance(experts, list) and all(type(expert) is int for expert in experts) for experts in given.values()
    )
    if not good:
        raise BadInput("cannot read which experts to switch off", "it maps layers to lists of experts", '{"*": [0]}')
    off = {layer: sorted(set(experts)) for layer, experts in given.items() if experts}
    if not off:
        raise BadInput("all experts are on", "no box is ticked", "tick expert 0 in all layers, then run again")
    return off


def _verdict(before: dict[str, float], after: dict[str, float], off: Mapping[str, list[int]], family: Family) -> str:
    count = sum(map(len, off.values()))
    what = f"{count} expert{'s' if count > 1 else ''} switched off in {len(off)} layer{'s' if len(off) > 1 else ''}: "
    if (headline := family.headline) is not None:
        return f"{what}the {headline} is {before[headline]:.3f} before and {after[headline]:.3f} after."
    first, then = family.answers(before, after)
    was, now = (
        f"{100 * before[name]:.1f}\u00a0% before and {100 * after[name]:.1f}\u00a0% after" for name in (first, then)
    )
    if first == then:
        return f"{what}the {family.answer} stays {look.quoted(first)}, {was}."
    return f"{what}the {family.answer} changes from {look.quoted(first)} ({was}) to {look.quoted(then)} ({now})."


def _differences(before: Mapping[str, float], after: Mapping[str, float]) -> list[list[Any]]:
    """Rows of name, before, after and change, the largest change first."""
    names = sorted(before, key=lambda name: -abs(after[name] - before[name]))
    changes = [(name, 100 * before[name], 100 * after[name]) for name in names]
    return [[name, f"{was:.2f}", f"{now:.2f}", _signed(now - was)] for name, was, now in changes]


def _signed(change: float) -> str:
    return f"{round(change, 2) or 0.0:+.2f}".replace("-", "\N{MINUS SIGN}")
