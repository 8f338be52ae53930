"""The gallery's shell: models on the left, the chosen one's tabs on the right, all built from cards.

A family with a bundled model has a page with the tabs Try, Routing, Ablate and Card, and so has the family that was
asked for; the page of the chosen model is shown. What is special to a family is in `demos/<family>.py`; see
`demos/family.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

import zoo
from demos import ablate, look, panels
from demos.family import Family, Shell, family, keep, message_area
from demos.store import ModelStore
from mmoe.errors import MmoeError
from zoo.assets import asset
from zoo.card import Card

ANY = "any"
NO_EXPERTS = (
    "This model is dense: no layer has experts, so there is no routing to look at or to change. Choose a model with "
    "experts in the list of models."
)
MAX_UPLOAD = "20mb"
CLEAN_EVERY, KEEP = 600, 3600  # seconds
# Gradio's page cancels a run by the number that the server gave it. Where the inputs change before that number has
# come, it would ask to cancel the number null, which the server refuses, and the result would be shown though its
# inputs are gone; and it takes no new run until it has its answer. So it gets one at once, the cancel waits for the
# number, and the page is told another number, for which no result comes. A new run waits for that cancel and for calls
# that have no queue, such as `forget`, whose late answer would clear what the run gave. A reset does nothing there.
CALLS_IN_ORDER = """() => {
  const send = window.fetch, latest = new Map(), direct = new Set();
  const done = () => Promise.resolve(Response.json({success: true}));

  function join(address, options) {
    const run = JSON.parse(options.body).fn_index, call = {}, before = [latest.get(run)?.cancelled, ...direct];
    latest.set(run, call);
    const answering = Promise.all(before).then(() => send(address, options));
    call.number = answering.then(answer => answer.clone().json()).then(told => told.event_id).catch(() => null);
    return answering.then(answer => {
      const read = answer.json.bind(answer);
      answer.json = () => read().then(told => call.cancelled ? {event_id: `dropped-${told.event_id}`} : told);
      return answer;
    });
  }

  function cancel(address, options) {
    const asked = JSON.parse(options.body), call = latest.get(asked.fn_index);
    const stop = number => number && send(address, {...options, body: JSON.stringify({...asked, event_id: number})});
    const number = asked.event_id === null ? call?.number : asked.event_id;
    const cancelled = Promise.resolve(number).then(stop).catch(() => null);
    if (call) call.cancelled = cancelled;
    return done();
  }

  function predict(address, options) {
    const answering = send(address, options);
    const ended = answering.then(answer => answer.clone().text()).catch(() => null).then(() => direct.delete(ended));
    direct.add(ended);
    return answering;
  }

  window.fetch = (address, options) => {
    const act = {join, cancel, reset: done, predict}[String(address).split('?')[0].split('/').pop()];
    return options?.body && act ? act(address, options) : send(address, options);
  };
}"""


@dataclass
class _Side:
    """Components of the list of models."""

    picker: gr.Radio
    status: gr.HTML
    unload: gr.Button
    fetch: gr.Button
    message: gr.HTML


@dataclass
class _Page:
    """Components of a family's page that the choice of a model changes."""

    family: Family
    column: gr.Column
    card: gr.Markdown


def build(
    selected: str | None = None,
    *,
    store: ModelStore | None = None,
    make_family: Callable[[str, list[Card], ModelStore], Family] = family,
) -> gr.Blocks:
    """The gallery.

    Args:
        selected: name of the model that is chosen first, or of its family; the first bundled one when None.
        store: holds the models in memory.
        make_family: page of a family by its name, cards and the models in memory.

    Raises:
        UnknownModel: no card has this name.
    """
    first = choose(selected)
    cards = offered(first)
    store = store or ModelStore()
    with gr.Blocks(title="mmoe gallery", analytics_enabled=False, delete_cache=(CLEAN_EVERY, KEEP)) as app:
        with gr.Row(elem_classes="layout", equal_height=False):
            with gr.Column(scale=0, min_width=260, elem_classes="side"):
                side = _draw_side(cards, first, store)
            with gr.Column(scale=1, min_width=300, elem_classes="main"):
                head = gr.HTML(look.head(first), elem_id="head")
                shell = Shell(store, side.picker)
                shell.after_job.append(lambda event: _then_status(event, store, side))
                names = list(dict.fromkeys(card.family for card in cards))
                of_family = {name: [card for card in cards if card.family == name] for name in names}
                pages = [_draw_page(make_family(name, of_family[name], store), shell, first) for name in names]
        shell.wire_changes()
        _wire_models(shell, side, head, pages)
        app.load(
            lambda: _status(store), None, side.status, api_visibility="private", show_progress="hidden", queue=False
        )
        app.load(lambda: _warm_up(first), api_name="warm_up", api_visibility="private", show_progress="hidden")
    app.queue()
    return app


def choose(selected: str | None) -> Card:
    """The card of a model, or the first bundled one with experts of a family or of all."""
    if selected is not None and selected not in {card.family for card in zoo.list_models()}:
        return zoo.card(selected)
    cards = zoo.list_models(family=selected)
    return next((card for card in cards if card.bundled and card.moe), cards[0])


def offered(first: Card) -> list[Card]:
    """Cards of the families that have a page: those with a bundled model, and that of the first model."""
    families = {card.family for card in zoo.list_models(weights="bundled")} | {first.family}
    return [card for card in zoo.list_models() if card.family in families]


def launch_options() -> dict[str, Any]:
    """What gradio takes at `launch`, the look above all; files of the server are out of reach but for the examples."""
    return {
        "theme": look.theme(),
        "css": look.CSS,
        "js": CALLS_IN_ORDER,
        "footer_links": ["api"],
        "run_history": False,
        "show_error": False,
        "max_file_size": MAX_UPLOAD,
        "allowed_paths": [str(asset("examples"))],
        "ssr_mode": False,
        "enable_monitoring": False,
        "quiet": True,
    }


def _draw_side(cards: list[Card], first: Card, store: ModelStore) -> _Side:
    """The list of models and what is in memory; on a narrow screen it is folded behind a button."""
    gr.HTML(look.BRAND, js_on_load=look.BRAND_JS + look.MENU_JS, elem_classes="brand-row")
    with gr.Column(elem_id="models"):
        picker = _draw_picker(cards, first)
        status = gr.HTML(_status(store), elem_classes="picker-status", elem_id="status")
        with gr.Row():
            unload = gr.Button("Unload this model", size="sm", min_width=90, elem_id="unload")
            fetch = gr.Button("Fetch and load", size="sm", min_width=110, visible=_fetchable(first), elem_id="fetch")
        return _Side(picker, status, unload, fetch, message_area())


def _draw_picker(cards: list[Card], first: Card) -> gr.Radio:
    """The list of models, with menus for task and modality."""
    tasks = sorted({task for card in cards for task in card.tasks})
    kinds = sorted({kind for card in cards for kind in card.modalities})
    with gr.Accordion("Filter", open=False):
        task = gr.Dropdown([ANY, *tasks], value=ANY, label="Task", filterable=False)
        kind = gr.Dropdown([ANY, *kinds], value=ANY, label="Takes", filterable=False)
    picker = gr.Radio(_choices(cards), value=first.name, label="Models", elem_classes="picker", elem_id="picker")

    def models(task: str, modality: str, model: str) -> Any:
        fit = zoo.list_models(task=_wanted(task), modality=_wanted(modality))
        found = [card for card in cards if card in fit]
        return gr.Radio(_choices(found), value=model if model in [card.name for card in found] else None)

    gr.on([task.input, kind.input], models, [task, kind, picker], picker, api_name="models", show_progress="hidden")
    return picker


def _wanted(choice: str | None) -> str | None:
    return None if choice in (None, ANY) else choice


def _choices(cards: list[Card]) -> list[tuple[str, str]]:
    """Models for the list: name, sizes and where the weights are, a line each."""
    lines = [(card.name, look.sizes(card).replace(" parameters", ""), look.weights_chip(card)[0]) for card in cards]
    return [("\n".join(shown), shown[0]) for shown in lines]


def _draw_page(one: Family, shell: Shell, first: Card) -> _Page:
    """The tabs of a family."""
    shown = one.name == first.family
    with gr.Column(visible=shown, elem_classes="page") as column, gr.Tabs():
        with gr.Tab("Try"):
            sources = one.draw(shell)
        for name, panel in (("Routing", panels.routing_panel), ("Ablate", ablate.ablate_panel)):
            with gr.Tab(name, elem_id=f"{one.name}-{name.lower()}-tab") as tab:
                gr.HTML(look.hint(NO_EXPERTS), elem_classes="for-dense")
                with gr.Column(elem_classes="for-experts"):
                    panel(tab, one, shell, sources)
        with gr.Tab("Card"):
            text = gr.Markdown(panels.card_text(first if shown else one.cards[0]), elem_classes="card-text")
    return _Page(one, column, text)


def _wire_models(shell: Shell, side: _Side, head: gr.HTML, pages: list[_Page]) -> None:
    """Choosing, fetching and unloading a model."""
    store = shell.store

    def select(note: Any, model: str | None) -> tuple[Any, ...]:
        """Shows a model's page: its head, where it is, and its card."""
        if model is None:  # the filter took it off the list; the page stays
            return tuple(gr.skip() for _ in changed)
        card = zoo.card(model)
        updates: list[Any] = []
        for page in pages:
            own = page.family.name == card.family
            updates += [gr.Column(visible=own), panels.card_text(card) if own else gr.skip()]
        return look.head(card), _status(store), gr.Button(visible=_fetchable(card)), *updates

    def load(note: Any, model: str) -> str:
        """Loads a model, and fetches its weights when they are not here."""
        with store.use(model, note, fetch=True):
            return _status(store)

    def drop(note: Any, model: str) -> str:
        """Frees the memory of a model."""
        store.unload(model)
        return _status(store)

    changed = [head, side.status, side.fetch, *(part for page in pages for part in (page.column, page.card))]
    common = {"names": ["model"], "message": side.message}
    shell.on(
        side.picker.input,
        select,
        [side.picker],
        changed,
        api_name="select_model",
        blank=keep,
        heavy=False,
        show_progress="hidden",
        **common,
    )
    for follow in shell.after_choice:
        follow()
    shell.on(side.fetch.click, load, [side.picker], [side.status], api_name="load", blank=keep, **common)
    shell.on(side.unload.click, drop, [side.picker], [side.status], api_name="unload", blank=keep, **common)


def _fetchable(card: Card) -> bool:
    """Whether weights of a model can be brought to this machine."""
    return bool(card.weights) and not card.bundled


def _warm_up(card: Card) -> None:
    """Imports the libraries of the first model once a page is open, so that the first run is quicker."""
    from zoo.loading import family_class

    with contextlib.suppress(MmoeError):  # the visitor is told when running the model
        family_class(card.family)


def _then_status(event: Any, store: ModelStore, side: _Side) -> None:
    event.then(lambda: _status(store), None, side.status, api_visibility="private", show_progress="hidden", queue=False)


def _status(store: ModelStore) -> str:
    """Which models are in memory."""
    sizes: Mapping[str, float] = store.sizes()
    held = "".join(f"<br>{look.escape(one)}, {size:,.0f} MB" for one, size in sizes.items())
    return f"In memory:{held}" if sizes else "In memory: none. A model loads on its first run."
