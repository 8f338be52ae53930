"""Uni-MoE in the gallery: a conversation about a picture and a recording, written word by word.

Picture and recording belong to the whole conversation: another one begins a new conversation. What is said is kept on
the visitor's page, as turns that user and model take in turn, and sent along with every question.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import gradio as gr

from demos import look
from demos.examples import bundled, chooser, photographs
from demos.family import Family, Shell, Words, as_sent, keep, message_area, picture_input, read_picture, shown
from demos.recordings import recordings
from demos.store import ModelStore, Note
from mmoe.errors import BadInput
from mmoe.options import check_choice
from zoo.card import Card
from zoo.sounds import FILES, read_sound

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from zoo.model import Model
    from zoo.uni_moe.model import UniMoE

QUESTION = "What is this?"
HINT = "Picture and recording belong to the whole conversation; with another one a new conversation begins."
KINDS = ("speech", "sound")
LONGEST = 600  # seconds of a recording
MOST_TOKENS = 128  # of a reply
MOST_CHARACTERS, MOST_TURNS = 2000, 40
EVERY = 0.08  # seconds between two states of a reply that is being written
EMPTY = "(nothing)"

Turns, Heard, Kind = (
    as_sent(gr.JSON),
    as_sent(gr.Audio, lambda payload: payload and payload.path),
    as_sent(gr.Radio),
)


@dataclass(frozen=True)
class Asked:
    """What a visitor gives.

    Attributes:
        turns: what user and model said in turn; the last one is the user's, or the model's where a reply is there.
        media: inputs of the model by name.
    """

    turns: tuple[str, ...]
    media: dict[str, Any]

    @property
    def question(self) -> list[str]:
        """Turns up to the last one of the user."""
        return list(self.turns[: len(self.turns) - 1 + len(self.turns) % 2])


def read_question(text: Any, media: dict[str, Any]) -> str:
    """What the user says; the usual question about what is given where the box is empty.

    Raises:
        BadInput: it is too long.
    """
    from zoo.uni_moe.model import QUESTIONS

    said = str(text or "").strip()
    if len(said) > MOST_CHARACTERS:
        wrong = f"at most {MOST_CHARACTERS} fit"
        raise BadInput(f"a question of {len(said)} characters", wrong, f"shorten {look.quoted(said, 40)}")
    return said or QUESTIONS[next(iter(media), "text")]


def read_turns(turns: Any) -> tuple[str, ...]:
    """A conversation so far: texts of user and model in turn, each question with its reply.

    Raises:
        BadInput: it is none, or too long to go on.

    >>> read_turns(["Hi", "Ho"]), read_turns(None)
    (('Hi', 'Ho'), ())
    """
    asked, fix = "go on with this conversation", 'turns=["What is this?", "A fox."]'
    if not isinstance(turns or [], list) or not all(isinstance(turn, str) for turn in turns or []):
        raise BadInput(asked, "turns are a list of texts", fix)
    found = tuple(turns or [])
    if len(found) % 2:
        raise BadInput(asked, f"there are {len(found)} turns, so a question has no reply", fix)
    if len(found) >= MOST_TURNS or sum(map(len, found)) > 20 * MOST_CHARACTERS:
        raise BadInput(asked, "it is too long", 'press "Clear"')
    return found


def read_recording(path: str | None) -> np.ndarray:
    """An uploaded recording at 16 kHz.

    Raises:
        BadInput: it cannot be read; the message names the file but no folder of the server.
    """
    name = str(path).replace("\\", "/").rsplit("/", 1)[-1]
    try:
        return read_sound(str(path), LONGEST)
    except BadInput as error:
        fix = error.fix if "/" not in error.fix else FILES
        raise BadInput(f"cannot hear the recording {look.quoted(name)}", error.wrong, fix) from error


def messages(turns: Sequence[str]) -> list[dict[str, str]]:
    """Turns as a chatbot shows them.

    >>> messages(["Hi", "Ho"])[1]
    {'role': 'assistant', 'content': 'Ho'}
    """
    return [{"role": ("user", "assistant")[at % 2], "content": turn} for at, turn in enumerate(turns)]


class Page(Family):
    """The Try tab of Uni-MoE: a conversation.

    Args:
        cards: of the family's models.
        store: models in memory.
    """

    answer = "reply"
    compared = "The percentages are the probability that a token of the reply has, as a geometric mean."
    seen = "The picture is its square middle. Routing is that of the whole conversation."

    def __init__(self, cards: Sequence[Card], store: ModelStore) -> None:
        super().__init__(cards, store)
        self.parameters = ("question", "image", "recording", "kind", "turns")
        self.offered = [*bundled("examples"), *photographs()]
        self.first = self.offered[0].read()
        self.defaults = (QUESTION, self.first, None, KINDS[0], [])

    def kinds(self, model: str | None) -> list[str]:
        """What recordings can be for a model; of the first one for another family's."""
        card = next((card for card in self.cards if card.name == model), self.cards[0])
        return [kind for kind in KINDS if kind in card.modalities]

    def read(self, *values: Any) -> tuple[Any, ...]:
        """The conversation, what is asked next, and what both are about."""
        question, picture, recording, kind, turns = values
        media: dict[str, Any] = {}
        if picture is not None and picture != "":
            media["image"] = read_picture(picture) if isinstance(picture, str) else picture
        if recording:
            check_choice("kind", str(kind), KINDS)
            media[str(kind)] = read_recording(recording)
        said = read_turns(turns)
        if not said or str(question or "").strip():
            said = (*said, read_question(question, media))
        return (Asked(said, media),)

    def predict(self, model: Model, inputs: tuple[Any, ...]) -> dict[str, float]:
        """The reply, and how likely its tokens are."""
        asked, talking = inputs[0], cast("UniMoE", model)
        reply = talking.predict(asked.question, max_new_tokens=MOST_TOKENS, **asked.media).text
        return likelihoods(talking, asked, [reply])

    def contrast(
        self, model: Model, inputs: tuple[Any, ...], changed: Callable[[], AbstractContextManager[Any]]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """How likely two replies are before and after a change: the first is that before, the last that after."""
        asked, talking = inputs[0], cast("UniMoE", model)
        replies = list(self.predict(model, inputs))
        with changed():
            replies += [reply for reply in self.predict(model, inputs) if reply not in replies]
            after = likelihoods(talking, asked, replies)
        return likelihoods(talking, asked, replies), after

    def answers(self, before: dict[str, float], after: dict[str, float]) -> tuple[str, str]:
        """The replies."""
        return next(iter(before)), list(after)[-1]

    def batch(self, model: Model, inputs: tuple[Any, ...]) -> Any:
        """The whole conversation, with the last reply where it is there."""
        asked = inputs[0]
        return model.preprocess(list(asked.turns), **asked.media, reply=len(asked.turns) % 2 == 1)

    def observe(self, model: Model, inputs: tuple[Any, ...]) -> None:
        """Runs the conversation once."""
        import torch

        with torch.no_grad():
            model(**self.batch(model, inputs))

    def picture(self, model: Model, inputs: tuple[Any, ...]) -> Image.Image | None:
        """The square middle of the picture, at a size for the screen."""
        picture = inputs[0].media.get("image")
        return picture if picture is None else shown(model.seen(picture))

    def draw(self, shell: Shell) -> list[gr.components.Component]:
        """Draws the picture and the recording, and the conversation about them."""
        about = "Ask about a picture, a recording, or both. Enter sends, Shift and Enter begin a new line."
        gr.HTML(look.section("Talk about what it sees and hears", about))
        with gr.Row():
            with gr.Column(scale=4, min_width=280):
                picture = picture_input(value=self.first, height=220, elem_id="uni_moe-picture")
                with gr.Accordion("Pick a picture", open=False):
                    chooser(shell, self.name, self.offered, picture)
                recording, kind = self._draw_recording(shell)
                with gr.Accordion("Pick a recording", open=False):
                    heard = [one for name in KINDS for one in recordings(name)]
                    chooser(shell, self.name, heard, recording, kind, what="recording")
            with gr.Column(scale=6, min_width=280):
                chat = gr.Chatbot(
                    label="Conversation",
                    height=340,
                    buttons=["copy"],
                    feedback_options=None,
                    render_markdown=False,
                    placeholder="Nothing was said yet.",
                    elem_id="uni_moe-chat",
                    elem_classes="captioned",
                )
                message = message_area()
                question = Words(QUESTION, label="You say", lines=1, max_lines=4, elem_id="uni_moe-question")
                with gr.Row():
                    send = gr.Button("Send", variant="primary", scale=3, min_width=120, elem_id="uni_moe-run")
                    fresh = gr.Button("Clear", scale=2, min_width=120, elem_id="uni_moe-clear")
                told = gr.HTML(look.hint(HINT))
        turns = Turns([], visible="hidden", label="Turns", elem_id="uni_moe-turns")
        inputs = [question, picture, recording, kind, turns]
        self._wire(shell, inputs, [send, fresh], [chat, turns, question, told], message)
        self._wire_kinds(shell, recording, kind)
        return inputs

    def _draw_recording(self, shell: Shell) -> tuple[Any, Any]:
        known = self.kinds(shell.model.value)
        recording = Heard(
            label="Recording",
            type="filepath",
            sources=["upload", "microphone"],
            editable=False,
            buttons=[],
            elem_id="uni_moe-recording",
            elem_classes="low",
            visible=bool(known),
        )
        kind = Kind(
            list(known),
            value=known[0] if known else KINDS[0],
            label="The recording is",
            visible=len(known) > 1,
            elem_id="uni_moe-kind",
        )
        return recording, kind

    def _wire(self, shell: Shell, inputs: list[Any], buttons: list[Any], shown: list[Any], message: gr.HTML) -> None:
        question, picture, recording, kind, _ = inputs
        (send, fresh), (chat, turns, _, told) = buttons, shown
        sent = shell.on(
            [send.click, question.submit],
            self.chat,
            [shell.model, *inputs],
            shown,
            api_name=f"{self.name}_chat",
            names=["model", *self.parameters],
            message=message,
            blank=keep,
            show_progress_on=[shown[-1]],
        )
        gr.on([fresh.click, chat.clear], None, cancels=[sent])
        shell.on(
            [fresh.click, chat.clear],
            _fresh,
            [],
            [chat, turns, told],
            api_name=f"{self.name}_fresh",
            names=[],
            message=message,
            heavy=False,
            api_visibility="private",
            show_progress="hidden",
        )
        sources = [shell.model, picture, recording, kind]
        blank = {"message": message, "blank": lambda *_: [[], [], look.hint(HINT)]}
        shell.forget(sources, [chat, turns, told], runs=[sent], **blank)

    def _wire_kinds(self, shell: Shell, recording: Any, kind: Any) -> None:
        message = message_area()

        def kinds(note: Note, model: str | None, kind: str) -> tuple[Any, ...]:
            """What recordings can be for the model that was just chosen."""
            known = self.kinds(model)
            shown = kind if kind in known else next(iter(known), KINDS[0])
            return gr.Audio(visible=bool(known)), gr.Radio(known, value=shown, visible=len(known) > 1)

        def follow() -> None:
            shell.on(
                shell.model.input,
                kinds,
                [shell.model, kind],
                [recording, kind],
                api_name=f"{self.name}_kinds",
                names=["model", "kind"],
                message=message,
                blank=keep,
                heavy=False,
                api_visibility="private",
                show_progress="hidden",
            )

        shell.after_choice.append(follow)

    def chat(self, note: Note, model: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """One more turn of a conversation, word by word: the messages, and at the end the turns to go on with.

        `turns` is what was said before, as a list of texts of user and model in turn; `kind` tells whether the
        recording is "speech" or "sound". Without a question the usual one is asked.
        """
        before, said = read_turns(values[-1]), values[0]
        asked = self.read(said if str(said or "").strip() else None, *values[1:-1], [])[0]
        turns, reply = [*before, asked.turns[0]], ""
        yield messages([*turns, "…"]), gr.skip(), "", look.hint("Reading, then writing …")
        try:
            with self.use(model, note) as loaded:
                note("Reading", 0.7)
                talking, begun = cast("UniMoE", loaded.model), time.perf_counter()
                for word in steadily(talking.stream(turns, max_new_tokens=MOST_TOKENS, **asked.media)):
                    reply += word
                    yield messages([*turns, reply or "…"]), gr.skip(), gr.skip(), gr.skip()
                seconds = time.perf_counter() - begun
        except Exception:
            yield messages(before), gr.skip(), said, look.hint(HINT)
            raise
        whole = [*turns, reply.strip()]
        yield messages([*turns, whole[-1] or EMPTY]), whole, gr.skip(), look.hint(f"Written in {seconds:.1f} s. {HINT}")


def _fresh(note: Note) -> tuple[Any, ...]:
    """An empty conversation."""
    return [], [], look.hint(HINT)


def steadily(words: Iterator[str], every: float = EVERY) -> Iterator[str]:
    """Words, those that come quickly put together.

    >>> "".join(steadily(iter("a fox")))
    'a fox'
    """
    waiting, last = "", 0.0
    try:
        for word in words:
            waiting += word
            if waiting and time.perf_counter() - last >= every:
                yield waiting
                waiting, last = "", time.perf_counter()
    finally:
        getattr(words, "close", bool)()
    if waiting:
        yield waiting


def likelihoods(model: UniMoE, asked: Asked, replies: Sequence[str]) -> dict[str, float]:
    """Geometric mean of the probabilities of each reply's tokens, by the reply."""
    logs, counts = model.reply_likelihoods(replies, asked.question, **asked.media)
    means = (logs / counts.clamp(min=1)).exp().tolist()
    return {reply or EMPTY: mean for reply, mean in zip(replies, means, strict=True)}
