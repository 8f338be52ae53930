"""Gamma in the gallery: how good a picture is, and how the score falls while a distortion grows.

A picture is made smaller until its short side has two crops, as the pictures that the tiny model was trained on, then
distorted as that data set is (`train.data.distortions`). All levels of a kind are scored at once, so that the slider
only chooses among them. Shapes: V crops of each picture, S side of a crop, 6 levels from 0, the picture as it came.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import gradio as gr
from PIL import Image

from demos import look
from demos.examples import Example, bundled, chooser, photographs
from demos.family import Family, Menu, Shell, Steps, keep, message_area, picture_input, read_picture
from demos.store import ModelStore, Note
from mmoe.errors import BadInput
from mmoe.options import check_choice
from train.data.distorted_photos import severity
from train.data.distortions import KINDS, LEVELS, distort
from zoo.card import Card
from zoo.images import read_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from zoo.gamma.model import Gamma
    from zoo.model import Model

KEEP_SECONDS = 3600
LONGEST = 2048  # pixels on the long side, however narrow a picture is
FIRST_KIND, SHOWN = "gaussian_blur", 260
HINT = "Press Score, or move the slider to spoil the picture."
SCORED = "of 1; higher is better"


def kind_choices() -> list[tuple[str, str]]:
    """Kinds of distortion for a menu, each with its group.

    >>> len(kind_choices()), kind_choices()[0]
    (25, ('Gaussian blur (blur)', 'gaussian_blur'))
    """
    return [(f"{kind.replace('_', ' ').capitalize()} ({one.group})", kind) for kind, one in KINDS.items()]


def told_kind(kind: str) -> str:
    """What a kind of distortion does, in a sentence or two."""
    about = (inspect.getdoc(KINDS[kind].spoil) or "").splitlines()[0]
    sides = "" if severity(kind, 1) == 1 else " Its levels go from one side of the picture as it is to the other."
    return about + sides


def read_level(level: Any) -> int:
    """A level of distortion.

    Raises:
        BadInput: it is none.

    >>> read_level(3.0)
    3
    """
    if isinstance(level, int | float) and not isinstance(level, bool) and level in range(LEVELS + 1):
        return int(level)
    wrong = f"levels are whole numbers from 0, the picture as it is, to {LEVELS}"
    raise BadInput(f"no level {look.quoted(str(level))} of distortion", wrong, "level=3")


def fitted(picture: Image.Image, model: Gamma) -> Image.Image:
    """A picture as small as the model scores it, or as two crops where it scores pictures as they are.

    Transparency is laid as the model lays it, before anything is done to the picture.
    """
    picture = read_image(picture, tuple(model.preprocessing["background"]))
    short = model.config.short_side or 2 * model.config.crop
    factor = min(short / min(picture.size), LONGEST / max(picture.size))
    if factor >= 1:
        return picture
    width, height = (max(1, round(side * factor)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def curve(scores: Sequence[float], kind: str, level: int) -> Figure:
    """The score over the levels of a kind, the present one marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.5), layout="constrained")
    axes = figure.add_subplot(xlabel="level", ylim=(min(-0.05, *scores), max(1.05, *scores)))
    axes.set_title(f"Score over the levels of {kind.replace('_', ' ')}", loc="left", fontsize=10)
    axes.plot(range(len(scores)), scores, color="#0072B2", marker="o", markersize=4)
    axes.axvline(level, color="#6B6B6B", linewidth=1, linestyle=(0, (4, 3)))
    axes.plot([level], [scores[level]], color="#D55E00", marker="o", markersize=9)
    above = scores[level] < 0.8
    axes.annotate(
        f"{scores[level]:.3f}",
        (level, scores[level]),
        (0, 9 if above else -9),
        textcoords="offset points",
        ha="left" if level == 0 else "right" if level == LEVELS else "center",
        va="bottom" if above else "top",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6")
    return figure


class Page(Family):
    """The Try tab of Gamma: a picture, a distortion with a slider, the score.

    Args:
        cards: of the family's models.
        store: models in memory.
    """

    headline = "score"
    seen = "The picture is the first of the crops that are scored, the centre unless they are random."

    def __init__(self, cards: Sequence[Card], store: ModelStore) -> None:
        super().__init__(cards, store)
        self.parameters = ("image", "scene", "kind", "level")
        self.offered: list[Example] = [*photographs(), *bundled("examples")]
        self.first = self.offered[0].read()
        self.defaults = (self.first, "auto", FIRST_KIND, 0)

    def scenes(self, model: str | None) -> list[str]:
        """Choices for the menu of scenes of a model; of the first one for another family's."""
        card = next((card for card in self.cards if card.name == model), self.cards[0])
        if "scenes" in card.config and card.config.get("prompts") != "naive":
            return ["auto", *card.config["scenes"]]
        from zoo.config import make_config
        from zoo.gamma.config import GammaConfig

        return ["auto", *make_config(GammaConfig, dict(card.config), self.name).patterns]

    def read(self, *values: Any) -> tuple[Any, ...]:
        """The picture, its scene, the kind of distortion and its level."""
        picture, scene, kind, level = values
        check_choice("kind", str(kind), KINDS)
        read = picture if isinstance(picture, Image.Image) else read_picture(picture)
        return read, str(scene or "auto"), str(kind), read_level(level)

    def predict(self, model: Model, inputs: tuple[Any, ...]) -> dict[str, float]:
        """The score, and the probability of each level of quality."""
        result = model.predict(self._spoilt(model, inputs), inputs[1])
        levels = zip(result.labels, result.probs[0].tolist(), strict=True)
        return {"score": float(result), **dict(levels)}

    def batch(self, model: Model, inputs: tuple[Any, ...]) -> Any:
        """The crops of the distorted picture."""
        return model.preprocess(self._spoilt(model, inputs), inputs[1])

    def picture(self, model: Model, inputs: tuple[Any, ...]) -> Image.Image:
        """The first crop, which is the centre unless the model takes random ones."""
        return model.seen(self._spoilt(model, inputs))

    def _spoilt(self, model: Any, inputs: tuple[Any, ...]) -> Image.Image:
        picture, _, kind, level = inputs
        return distort(fitted(picture, model), kind, level)

    def draw(self, shell: Shell) -> list[gr.components.Component]:
        """Draws the picture, what is done to it, and what the model says."""
        gr.HTML(look.section("How good is this picture?", "Score it, spoil it, and see how the score follows."))
        with gr.Row():
            with gr.Column(scale=5, min_width=280):
                picture = picture_input(value=self.first, height=SHOWN, elem_id="gamma-picture")
                with gr.Accordion("Pick a picture", open=True):
                    chooser(shell, self.name, self.offered, picture)
            with gr.Column(scale=6, min_width=280):
                with gr.Row():
                    kind = Menu(
                        kind_choices(),
                        value=FIRST_KIND,
                        label="Distortion",
                        filterable=False,
                        min_width=230,
                        elem_id="gamma-kind",
                    )
                    scene = Menu(
                        self.scenes(shell.model.value),
                        value="auto",
                        label="Scene",
                        filterable=False,
                        min_width=120,
                        elem_id="gamma-scene",
                    )
                level = Steps(0, LEVELS, 0, step=1, label="Level of the distortion", elem_id="gamma-level")
                run = gr.Button("Score", variant="primary", elem_id="gamma-run")
                message = message_area()
                verdict = gr.HTML(look.hint(HINT), elem_id="gamma-verdict")
                spoilt = gr.Image(
                    label="The picture that was scored",
                    type="pil",
                    format="png",
                    interactive=False,
                    buttons=["fullscreen"],
                    height=SHOWN,
                    elem_id="gamma-spoilt",
                    elem_classes=["captioned", "filled", "if-filled"],
                )
                plot = gr.Plot(label="All levels", elem_id="gamma-curve", elem_classes=["captioned", "if-filled"])
        numbers = gr.JSON(visible=False, label="numbers")
        self._wire(shell, [picture, scene, kind, level], run, message, [verdict, spoilt, plot, numbers])
        self._wire_scenes(shell, scene)
        return [picture, scene, kind, level]

    def _wire(self, shell: Shell, inputs: list[Any], run: gr.Button, message: gr.HTML, shown: list[Any]) -> None:
        state = gr.State(None, time_to_live=KEEP_SECONDS)
        picture, scene, kind, level = inputs
        outputs = [state, *shown]
        told = {"message": message, "blank": lambda *_: [None, look.hint(HINT), None, None, None]}
        ran = shell.on(
            [run.click, scene.input, kind.input, level.input],
            self.run,
            [state, shell.model, *inputs],
            outputs,
            api_name=f"{self.name}_predict",
            names=["state", "model", *self.parameters],
            trigger_mode="always_last",
            show_progress_on=[shown[0]],
            **told,
        )
        shell.forget([shell.model, picture], outputs, runs=[ran], **told)

    def _wire_scenes(self, shell: Shell, scene: gr.Dropdown) -> None:
        message = message_area()

        def scenes(note: Note, model: str | None, scene: str) -> Any:
            """The scenes of the model that was just chosen."""
            known = self.scenes(model)
            return gr.Dropdown(known, value=scene if scene in known else "auto")

        def follow() -> None:
            shell.on(
                shell.model.input,
                scenes,
                [shell.model, scene],
                [scene],
                api_name=f"{self.name}_scenes",
                names=["model", "scene"],
                message=message,
                blank=keep,
                heavy=False,
                api_visibility="private",
                show_progress="hidden",
            )

        shell.after_choice.append(follow)

    def run(self, note: Note, state: Any, model: str, *values: Any) -> tuple[Any, ...]:  # type: ignore[override]  # has a state
        """Scores a picture that was distorted: kind is a name such as "jpeg", level 0 (as it is) to 5, scene "auto" or
        one of the model's. The numbers hold the score, the probabilities of the levels of quality, and all scores of
        the kind.
        """
        picture, scene, kind, level = self.read(*values)
        key = (model, *values[:3])
        if state is None or state["key"] != key:
            with self.use(model, note) as loaded:
                note("Distorting and scoring", 0.7)
                state = {"key": key, **score_levels(cast("Gamma", loaded.model), picture, scene, kind)}
        figure = curve(state["scores"], kind, level)
        return state, _verdict(state, scene, kind, level), state["pictures"][level], figure, _numbers(state, level)


def score_levels(model: Gamma, picture: Image.Image, scene: str, kind: str) -> dict[str, Any]:
    """A picture at all levels of a kind, and what the model says of each, as plain data."""
    small = fitted(picture, model)
    spoilt = [distort(small, kind, level) for level in range(LEVELS + 1)]
    result = model.predict(spoilt, scene)
    return {
        **result.as_dict(),
        "pictures": spoilt,
        "kinds of scenes": len(model.scenes),
        "crop": model.config.crop,
        "given": picture.size,
    }


def _numbers(state: dict[str, Any], level: int) -> dict[str, Any]:
    """What a program wants to know."""
    return {
        "score": state["scores"][level],
        "levels": dict(zip(state["labels"], state["probs"][level], strict=True)),
        "scene": state["scenes"][level],
        "upscaled": state["upscaled"][level],
        "size": list(state["pictures"][level].size),
        "scores": state["scores"],
    }


def _verdict(state: dict[str, Any], scene: str, kind: str, level: int) -> str:
    """The score, the levels of quality, and how they came about."""
    shares = zip(state["labels"], state["probs"][level], strict=True)
    spoilt, pristine = state["pictures"][level], state["pictures"][0]
    told = []
    if state["kinds of scenes"] > 1:
        told.append(f"Scene: {state['scenes'][level]}{', chosen by the model' if scene == 'auto' else ''}.")
    if level:
        told.append(told_kind(kind))
        if spoilt.tobytes() == pristine.tobytes():
            told.append("At this level it leaves this picture as it is.")
    width, height = pristine.size
    if pristine.size != state["given"]:
        told.append(f"The picture was made smaller first, to {width} x {height} pixels.")
    if state["upscaled"][level]:
        told.append(f"It is smaller than a crop of {state['crop']} pixels and was scaled up from {min(width, height)}.")
    best = [(name, share, "") for name, share in reversed(list(shares))]
    return look.score(state["scores"][level], SCORED) + look.shares(best) + look.hint(" ".join(told))
