"""What a family of models gives the gallery, and the shell that pages are built with.

A family needs no file here: `Family` feeds pictures and texts to `model.predict` in the order of the card's modalities
and shows the labels with their probabilities. What is special to a family goes into `demos/<family>.py` as a subclass
named `Page`; the panels for routing, ablation and the card then work with its inputs.

    parameters   names of the inputs in the API
    defaults     values that are filled in, so that one click gives a result
    draw         draws the Try tab and returns the components that hold the inputs, in that order
    read         values of these components -> plain inputs of the model; raises MmoeError for what cannot be used
    predict      model, inputs -> numbers by name, for the Try tab and for comparisons
    headline     name of the number that the others explain; None where the largest is the answer
    contrast     model, inputs, a change -> such numbers before and after it
    answers      numbers before and after -> the answers that are told, which `answer` calls by a word
    seen         sentence about the picture of the Routing tab, where it is not the whole one that was given
    batch        model, inputs -> what the model sees, for `model.views`
    observe      model, inputs -> runs the model on that batch, for its routing; runs `predict` where that does it
    picture      model, inputs -> the picture as the model sees it, or None
"""

from __future__ import annotations

import inspect
from abc import ABCMeta
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.component_meta import ComponentMeta

from demos import look
from demos.endpoints import endpoint
from demos.store import Loaded, ModelStore, Note
from mmoe.errors import BadInput
from zoo.assets import asset
from zoo.card import Card
from zoo.images import read_image

if TYPE_CHECKING:
    from PIL import Image

    from zoo.model import Model
    from zoo.views import TokenView

HEAVY = "heavy"
# Makes what the outputs of an event become after an error, given their number and the chosen model. It is a function
# because a component that is made while the page is drawn would become a part of the page.
Blank = Callable[[int, str | None], list[Any]]
CARD_JS = f"watch('value', () => element.querySelector('.error-card'){look.INTO_VIEW});"
REDRAW: dict[str, Any] = {"heavy": False, "trigger_mode": "always_last", "show_progress": "hidden"}  # of `Shell.on`
MAX_TEXTS, MAX_CHARACTERS = 100, 1000
SHOWN_PIXELS = 640  # on a side, of pictures that are kept for drawing


@dataclass
class Shell:
    """What a page is built with.

    Attributes:
        store: models in memory.
        model: component whose value is the chosen model's name.
        after_job: functions that each add a follow-up to the event of a heavy job.
        after_choice: functions that each listen to the choice of a model once its page listens.
        results: what `forget` was told.
    """

    store: ModelStore
    model: gr.components.Component
    after_job: list[Callable[[Any], None]] = field(default_factory=list)
    after_choice: list[Callable[[], None]] = field(default_factory=list)
    results: list[_Results] = field(default_factory=list)

    def on(
        self,
        triggers: Any,
        work: Callable[..., Any],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        *,
        api_name: str,
        names: Sequence[str],
        message: gr.HTML,
        blank: Blank | None = None,
        heavy: bool = True,
        **options: Any,
    ) -> Any:
        """Calls `work(note, *inputs)` on an event; `note(text, share)` shows progress.

        An error becomes a card in `message`, and the outputs are cleared.

        Args:
            triggers: an event or several.
            work: returns one value per output (a tuple for several), or yields them again and again.
            inputs: components.
            outputs: components.
            api_name: name of the endpoint.
            names: of the inputs in the API.
            message: first output, an error card or empty.
            blank: what the outputs become after an error, None each by default.
            heavy: waits for other heavy jobs.
            options: of the event.
        """
        events = triggers if isinstance(triggers, list) else [triggers]
        event = gr.on(
            events,
            endpoint(work, names, partial(blank or clear, len(outputs)), heavy, self._chosen(inputs)),
            list(inputs),
            [message, *outputs],
            api_name=api_name,
            api_description=inspect.getdoc(work) or False,
            concurrency_limit=1 if heavy else None,
            concurrency_id=HEAVY if heavy else None,
            **options,
        )
        for follow in self.after_job if heavy else []:
            follow(event)
        return event

    def _chosen(self, inputs: Sequence[Any]) -> int | None:
        """Which of the inputs of an event is the chosen model."""
        return next((place for place, one in enumerate(inputs) if one is self.model), None)

    def forget(
        self,
        sources: Sequence[Any],
        outputs: Sequence[Any],
        *,
        runs: Sequence[Any],
        message: gr.HTML,
        blank: Blank | None = None,
    ) -> None:
        """Clears results as soon as something that they were made from changes, and drops runs that have not ended.

        Args:
            sources: components that the results are made from.
            outputs: components.
            runs: events that make the results.
            message: where the error card of these results is.
            blank: what the outputs become, None each by default. A page that is opened changes every component once,
                so this is what it shows at first.
        """
        self.results.append(_Results(list(sources), [message, *outputs], list(runs), blank or clear))

    def wire_changes(self) -> None:
        """Listens to every source of `forget`, once all are known, so that a change acts on all results at once."""
        sources = {source._id: source for results in self.results for source in results.sources}
        for source in sources.values():
            made = [results for results in self.results if source in results.sources]
            source.change(None, cancels=[run for results in made for run in results.runs])
            source.change(
                partial(_blank, made),
                self.model,
                [output for results in made for output in results.outputs],
                api_name="forget",
                api_visibility="private",
                show_progress="hidden",
                queue=False,
            )


@dataclass
class _Results:
    """Results that go when one of their sources changes."""

    sources: list[Any]
    outputs: list[Any]
    runs: list[Any]
    blank: Blank


def _blank(made: Sequence[_Results], model: str | None) -> list[Any]:
    return [value for results in made for value in ("", *results.blank(len(results.outputs) - 1, model))]


def clear(count: int, model: str | None) -> list[Any]:
    """Empties the outputs of an event that failed."""
    return [None] * count


def keep(count: int, model: str | None) -> list[Any]:
    """Leaves the outputs of an event that failed as they are."""
    return [gr.skip()] * count


def message_area() -> gr.HTML:
    """Where error cards appear and come into view; takes no room when there is none."""
    return gr.HTML("", elem_classes="error-area", js_on_load=CARD_JS)


class _NoStub(ComponentMeta):
    """Gradio's metaclass of components, without the stub file that it writes beside the source."""

    def __new__(meta, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> Any:
        return ABCMeta.__new__(meta, name, bases, members)


def as_sent(kind: Any, read: Callable[[Any], Any] = lambda payload: payload, **methods: Any) -> Any:
    """A kind of component whose value reaches the handler as it was sent, so that our errors say what is wrong with it.

    It is a class because gradio makes a new component for each session that updates one.

    Args:
        kind: of gradio.
        read: payload -> value.
        methods: that it has in place of the kind's.
    """
    members = {"is_template": True, "preprocess": lambda self, payload: read(payload), **methods}
    return _NoStub(kind.__name__, (kind,), members)


Choice, Words, Menu, Steps = as_sent(gr.Radio), as_sent(gr.Textbox), as_sent(gr.Dropdown), as_sent(gr.Slider)
Upload = as_sent(gr.Image, lambda payload: payload and payload.path)


def picture_input(label: str = "Picture", **options: Any) -> gr.Image:
    """An upload."""
    return Upload(
        label=label, type="filepath", format="png", sources=["upload", "clipboard"], image_mode=None, **options
    )


def read_picture(path: str | None) -> Image.Image:
    """An uploaded picture, with its transparency, for the model to lay over what it was trained with.

    Raises:
        BadInput: there is none, or it cannot be read; the message names the file but no folder of the server.
    """
    if not path:
        raise BadInput("there is no picture", "nothing was uploaded or picked", "upload one or press an example")
    try:
        return read_image(path, None)
    except BadInput as error:
        name = path.replace("\\", "/").rsplit("/", 1)[-1]
        raise BadInput(f"cannot read the picture {look.quoted(name)}", error.wrong, error.fix) from error


def pieces_of(text: Any) -> list[str]:
    """Words of a box that are separated by commas or on lines of their own; a list has them apart already."""
    if isinstance(text, list):
        return [str(piece).strip() for piece in text]
    return [piece.strip() for line in str(text or "").splitlines() for piece in line.split(",")]


def read_texts(text: Any, what: str = "label") -> list[str]:
    """Texts of a box or of a list, each once.

    >>> read_texts("a fox, a cat\\na fox"), read_texts(["a fox, red", "a cat"])
    (['a fox', 'a cat'], ['a fox, red', 'a cat'])
    """
    pieces = pieces_of(text)
    found = list(dict.fromkeys(filter(None, pieces)))
    if not found:
        wrong = f"there is no {what} between the commas" if pieces[1:] else "the box is empty"
        raise BadInput(f"there is no {what}", wrong, "a fox, a cat")
    if len(found) > MAX_TEXTS:
        raise BadInput(f"{len(found)} {what}s at once", f"at most {MAX_TEXTS} fit", f"leave {MAX_TEXTS} of them")
    longest = max(found, key=len)
    if len(longest) > MAX_CHARACTERS:
        raise BadInput(
            f"a {what} of {len(longest)} characters",
            f"at most {MAX_CHARACTERS} fit",
            f"shorten {look.quoted(longest, 40)}",
        )
    return found


class Family:
    """A family of models as the gallery sees it; see the head of this file.

    Args:
        cards: of its models.
        store: models in memory.
    """

    headline: str | None = None
    seen = ""
    answer = "first answer"
    compared = ""  # sentence about the numbers of a comparison

    def __init__(self, cards: Sequence[Card], store: ModelStore) -> None:
        self.cards = list(cards)
        self.store = store
        self.name = cards[0].family
        known = ("image", "text")
        self.parameters: tuple[str, ...] = tuple(one for one in cards[0].modalities if one in known)
        filled = {"image": str(asset("examples/fox.png")), "text": "a fox\na cat\na pizza"}
        self.defaults: tuple[Any, ...] = tuple(filled[name] for name in self.parameters)

    def use(self, model: str, note: Note) -> AbstractContextManager[Loaded]:
        """A model of the family for one job; see `ModelStore.use`.

        Raises:
            BadInput: it is of another family.
        """
        own = [card.name for card in self.cards]
        if model and model not in own:
            raise BadInput(f"run {look.quoted(model)} on this page", f"it shows {', '.join(own)}", own[0])
        return self.store.use(model, note)

    def draw(self, shell: Shell) -> list[gr.components.Component]:
        """Draws the Try tab: an input per modality, a button, probabilities."""
        with gr.Row():
            with gr.Column():
                components = [self._input(name) for name in self.parameters]
                run = gr.Button("Run", variant="primary", elem_id=f"{self.name}-run")
            with gr.Column():
                message = message_area()
                result = gr.Label(look.NO_RESULT, label="Result")
        inputs = [shell.model, *components]
        names = ["model", *self.parameters]
        shown = {"message": message, "blank": lambda *_: [look.NO_RESULT]}
        ran = shell.on(run.click, self.run, inputs, [result], api_name=f"{self.name}_predict", names=names, **shown)
        shell.forget(inputs, [result], runs=[ran], **shown)
        return components

    def run(self, note: Note, model: str, *values: Any) -> dict[str, float]:
        """Runs a model on plain inputs: numbers by name."""
        inputs = self.read(*values)
        with self.use(model, note) as loaded:
            return self.predict(loaded.model, inputs)

    def _input(self, name: str) -> gr.components.Component:
        value = self.defaults[self.parameters.index(name)]
        if name == "image":
            return picture_input(value=value, height=280)
        return Words(value, label="Texts", lines=4, info="One per line, or separated by commas.")

    def read(self, *values: Any) -> tuple[Any, ...]:
        """Values of the components -> plain inputs."""
        read = {"image": read_picture, "text": read_texts}
        return tuple(read[name](value) for name, value in zip(self.parameters, values, strict=True))

    def predict(self, model: Model, inputs: tuple[Any, ...]) -> dict[str, float]:
        """Numbers by name."""
        result = model.predict(*inputs)
        return dict(result.top(len(result.labels)))

    def contrast(
        self, model: Model, inputs: tuple[Any, ...], changed: Callable[[], AbstractContextManager[Any]]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Numbers of the same names before and after a change."""
        before = self.predict(model, inputs)
        with changed():
            return before, self.predict(model, inputs)

    def answers(self, before: dict[str, float], after: dict[str, float]) -> tuple[str, str]:
        """Names of what the model answers before and after."""
        return max(before, key=before.__getitem__), max(after, key=after.__getitem__)

    def batch(self, model: Model, inputs: tuple[Any, ...]) -> Any:
        """What the model sees."""
        return model.preprocess(*inputs)

    def observe(self, model: Model, inputs: tuple[Any, ...]) -> None:
        """Runs the model on what `batch` gives."""
        self.predict(model, inputs)

    def views(self, model: Model) -> list[TokenView]:
        """How the rows of the routings map to patches and tokens, shown on the inputs that are filled in."""
        return model.views(self.batch(model, self.read(*self.defaults)))

    def picture(self, model: Model, inputs: tuple[Any, ...]) -> Image.Image | None:
        """The picture as the model sees it, at a size for the screen."""
        by_name = dict(zip(self.parameters, inputs, strict=True))
        if "image" not in by_name:
            return None
        return shown(model.seen(by_name["image"]))


def shown(picture: Image.Image) -> Image.Image:
    """A copy at a size for the screen."""
    small = picture.copy()
    small.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    return small


def family(name: str, cards: Sequence[Card], store: ModelStore) -> Family:
    """The family's own page, or the one that every model has."""
    if find_spec(f"demos.{name}") is None:
        return Family(cards, store)
    page: type[Family] = import_module(f"demos.{name}").Page
    return page(cards, store)
