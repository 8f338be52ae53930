"""CLIP-MoE in the gallery: which label fits a picture, and which of 1,641 emoji fits some words.

Pictures of emoji are compared in a drawing style of one's choice; the default is the one that was never trained on.
Shapes: n emoji, C embedding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from demos import look
from demos.family import (
    Family,
    Shell,
    Words,
    keep,
    message_area,
    picture_input,
    pieces_of,
    read_picture,
    read_texts,
)
from demos.store import Loaded, ModelStore, Note
from mmoe.errors import BadInput, did_you_mean
from zoo.assets import asset
from zoo.card import Card

if TYPE_CHECKING:
    from torch import Tensor

    from train.data.emoji import Concept, EmojiSet

BEST, OFFERED, CHUNK, NAMED = 12, 18, 128, 3
STYLES = {"twemoji": "Twemoji", "noto": "Noto", "openmoji": "OpenMoji"}  # of the emoji, and their names in menus
FIRST_STYLE = "twemoji"  # the one that is not trained on
QUERY = "a red fruit"
SEARCH_HINT = "Press Search: the first search in a style looks at all 1,641 pictures once."


@cache
def emoji_set() -> EmojiSet:
    """The bundled emoji, read once."""
    from train.data.emoji import load_emoji

    return load_emoji()


@cache
def examples() -> dict[str, Path]:
    """Bundled example pictures by name, the one that is filled in first."""
    files = sorted(asset("examples").glob("*.png"), key=lambda path: (path.stem != "dog_face", path.stem))
    return {path.stem.replace("_", " "): path for path in files}


def image_features(loaded: Loaded, style: str, note: Note) -> Tensor:
    """Normalised features of all emoji in one style, (n, C), computed once per model and style."""
    import torch

    from train.emoji_retrieval import image_features as encode

    emoji, key = emoji_set(), ("emoji", style)
    count = len(emoji.concepts)
    if key not in loaded.derived:
        parts = []
        for start in range(0, len(emoji.concepts), CHUNK):
            note(f"Looking at {count:,} emoji, only the first time", 0.2 + 0.7 * start / count)
            parts.append(encode(loaded.model, emoji, style, range(start, min(start + CHUNK, count))))
        loaded.derived[key] = torch.cat(parts)
    return loaded.derived[key]


def nearest_emoji(loaded: Loaded, query: str, style: str, note: Note) -> list[tuple[int, float]]:
    """Indices and cosines of the emoji that fit a text best."""
    import torch

    features = image_features(loaded, style, note)
    with torch.no_grad():
        batch = loaded.model.preprocess(texts=[query])
        text = loaded.model.encode_text(batch["text"], normalize=True).float().cpu()[0]  # (C,)
    best = (features @ text).topk(BEST)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def told_cut(model: Any, texts: Sequence[str]) -> str:
    """A sentence about the texts of which the model reads only the beginning; empty when it reads all."""
    limit = model.config.context_length - 2  # the start and the end token
    cut = [look.quoted(text, 30) for text in texts if len(model.tokenizer.encode(text)) > limit]
    named = ", ".join(cut[:NAMED]) + (f" and {len(cut) - NAMED} more" if cut[NAMED:] else "")
    return f" Only the first {limit} tokens were read of {named}." if cut else ""


def find_emoji(word: str, most: int = OFFERED) -> list[int]:
    """Indices of the emoji whose name or keywords hold a word, names that begin with it first."""
    word = word.strip().lower()
    ranked = []
    for index, concept in enumerate(emoji_set().concepts):
        name = concept.name.lower()
        ranks = (name == word, name.startswith(word), f" {word}" in name, word in concept.keywords, word in name)
        if any(ranks):
            ranked.append((ranks.index(True), len(name), index))
    return [index for *_, index in sorted(ranked)[:most]]


@cache
def example_tiles() -> list[dict[str, str]]:
    """The bundled examples as tiles."""
    held_out = {concept.name for concept in emoji_set().concepts if concept.held_out}
    found = []
    for name, path in examples().items():
        with Image.open(path) as picture:
            src = look.data_url(picture.convert("RGBA").resize((64, 64), Image.Resampling.BOX))
        mark = "unseen" if name in held_out else ""
        found.append({"id": f"example/{name}", "name": name, "src": src, "note": "", "mark": mark})
    return found


def emoji_tile(index: int, style: str, note: str = "") -> dict[str, str]:
    """One emoji as a tile."""
    concept = emoji_set().concepts[index]
    mark = "unseen" if concept.held_out else ""
    src = look.data_url(emoji_set().image(index, style))
    return {"id": f"{style}/{concept.id}", "name": concept.name, "src": src, "note": note, "mark": mark}


def example_emoji(style: str) -> list[dict[str, str]]:
    """What the examples show as tiles, drawn in another style than theirs."""
    index = {concept.name: i for i, concept in enumerate(emoji_set().concepts)}
    return [emoji_tile(index[name], style) for name in examples()]


def check_style(style: str) -> str:
    """The style, if there is one of that name."""
    known = emoji_set().styles
    if style not in known:
        raise BadInput(
            f"no emoji style {look.quoted(str(style))}", did_you_mean(str(style), known), f"style={known[0]!r}"
        )
    return style


def style_choices() -> list[tuple[str, str]]:
    """Drawing styles for a menu; the one that was never trained on comes first and says so."""
    held_out = emoji_set().held_out_style
    styles = sorted(emoji_set().styles, key=lambda style: style != held_out)
    return [(STYLES[style] + (" (unseen)" if style == held_out else ""), style) for style in styles]


def style_menu(**options: Any) -> gr.Dropdown:
    """The menu of drawing styles."""
    return gr.Dropdown(style_choices(), value=FIRST_STYLE, label="Drawn by", filterable=False, **options)


class Page(Family):
    """The Try tab of CLIP-MoE: labels for a picture, emoji for words.

    Args:
        cards: of the family's models.
        store: models in memory.
    """

    def __init__(self, cards: Sequence[Card], store: ModelStore) -> None:
        super().__init__(cards, store)
        self.parameters = ("image", "labels")
        self.defaults = (str(next(iter(examples().values()))), ", ".join(examples()))

    def read(self, *values: Any) -> tuple[Any, ...]:
        """The picture and its labels."""
        picture, labels = values
        return read_picture(picture), read_texts(labels)

    def draw(self, shell: Shell) -> list[gr.components.Component]:
        """Draws both directions, picture to words and words to pictures."""
        gr.HTML(look.section("Picture to words", "How well does each label fit the picture, among those you give?"))
        with gr.Row():
            with gr.Column(scale=5, min_width=280):
                picture = picture_input(value=self.defaults[0], height=250, elem_id="clip_moe-picture")
                chooser = self._draw_chooser()
            with gr.Column(scale=5, min_width=280):
                labels = Words(
                    self.defaults[1],
                    label="Labels",
                    info="One per line, or separated by commas.",
                    lines=3,
                    max_lines=8,
                    elem_id="clip_moe-labels",
                )
                run = gr.Button("Compare", variant="primary", elem_id="clip_moe-run")
                message = message_area()
                result = gr.Label(look.NO_RESULT, label="Probabilities", num_top_classes=6, elem_id="clip_moe-result")
                note = gr.HTML(self._hint(None), elem_id="clip_moe-note")
        self._wire_chooser(shell, chooser, picture, labels)
        gr.HTML(look.section("Words to pictures", "Which of the 1,641 emoji is nearest to your words?"))
        self._draw_search(shell, picture, labels)
        made_from: list[Any] = [shell.model, picture, labels]
        shown = {"message": message, "blank": lambda _, model: [look.NO_RESULT, self._hint(model)]}
        ran = shell.on(
            [run.click, labels.submit],
            self.compare,
            made_from,
            [result, note],
            api_name="clip_moe_predict",
            names=["model", "image", "labels"],
            show_progress_on=[result],
            **shown,
        )
        shell.forget(made_from, [result, note], runs=[ran], **shown)
        return [picture, labels]

    def _hint(self, model: str | None) -> str:
        slow = "" if model in self.store.sizes() else " The first run takes some seconds, while the model loads."
        return look.hint(f"Press Compare.{slow}")

    def compare(self, note: Note, model: str, image: str, labels: str) -> tuple[dict[str, float], str]:
        """Probabilities of labels for a picture (labels one per line or separated by commas)."""
        inputs = self.read(image, labels)
        with self.use(model, note) as loaded:
            note("Comparing", 0.8)
            start = time.perf_counter()
            found = self.predict(loaded.model, inputs)
            took = 1000 * (time.perf_counter() - start)
            cut = told_cut(loaded.model, inputs[1])
        many = f"{len(found)} label{'s' if len(found) > 1 else ''}"
        told = f"{model}, {many}, {took:.0f} ms. The probabilities sum to 1 over your labels.{cut}"
        return found, look.hint(told)

    def _draw_chooser(self) -> tuple[gr.Textbox, gr.Dropdown, gr.HTML, gr.HTML]:
        with gr.Accordion("Pick a picture: an example or any emoji", open=True):
            with gr.Row():
                word = gr.Textbox(
                    label="Find an emoji",
                    placeholder="whale, music, heart …",
                    scale=3,
                    min_width=150,
                    elem_id="clip_moe-word",
                )
                style = style_menu(scale=3, min_width=150, elem_id="clip_moe-style")
            message = message_area()
            grid = look.tiles(example_tiles(), label="Pictures to pick", size=42, elem_id="clip_moe-chooser")
            gr.HTML(look.hint("Unseen: never trained on. A style can be unseen, and an emoji in every style."))
        return word, style, grid, message

    def _wire_chooser(self, shell: Shell, chooser: Any, picture: gr.Image, labels: gr.Textbox) -> None:
        word, style, grid, message = chooser
        shell.on(
            [word.change, style.change],
            self.find,
            [word, style],
            [grid],
            api_name="clip_moe_find",
            names=["word", "style"],
            message=message,
            blank=keep,
            heavy=False,
            trigger_mode="always_last",
            show_progress="hidden",
        )
        self._wire_pick(shell, "clip_moe_pick", grid, picture, labels, message)

    def _wire_pick(self, shell: Shell, name: str, grid: gr.HTML, picture: Any, labels: Any, message: gr.HTML) -> None:
        picked = shell.on(
            grid.select,
            self.pick,
            [grid, labels],
            [picture, labels],
            api_name=name,
            names=["choice", "labels"],
            message=message,
            blank=keep,
            heavy=False,
            show_progress="hidden",
        )

        picked.then(None, js=look.scroll_to("clip_moe-picture"), api_visibility="private")

    def _draw_search(self, shell: Shell, picture: gr.Image, labels: gr.Textbox) -> None:
        with gr.Row(equal_height=False, elem_classes="bottom-row"):
            query = gr.Textbox(QUERY, label="Words", scale=4, min_width=200, elem_id="clip_moe-query")
            style = style_menu(scale=3, min_width=200)
            search = gr.Button("Search", variant="primary", scale=1, min_width=110, elem_id="clip_moe-search")
        message = message_area()
        note = gr.HTML(look.hint(SEARCH_HINT), elem_id="clip_moe-search-note")
        grid = look.tiles([], label="Nearest emoji", elem_id="clip_moe-found")
        table = gr.JSON(visible=False, label="nearest")

        found = [grid, note, table]
        shown = {"message": message, "blank": lambda *_: [look.new_tiles([]), look.hint(SEARCH_HINT), None]}
        ran = shell.on(
            [search.click, query.submit],
            self.search,
            [shell.model, query, style],
            found,
            api_name="clip_moe_search",
            names=["model", "query", "style"],
            show_progress_on=[note],
            **shown,
        )
        shell.forget([shell.model, query, style], found, runs=[ran], **shown)
        self._wire_pick(shell, "clip_moe_pick_found", grid, picture, labels, message)

    def search(self, note: Note, model: str, query: str, style: str) -> tuple[Any, str, list[dict[str, Any]]]:
        """The twelve emoji nearest to a text, with cosines, in one drawing style."""
        text = " ".join((query or "").split())
        if not text:
            raise BadInput("there is nothing to search for", "the box is empty", QUERY)
        read_texts(text.replace(",", " "), "text")  # its length
        check_style(style)
        with self.use(model, note) as loaded:
            found = nearest_emoji(loaded, text, style, note)
            cut = told_cut(loaded.model, [text])
        concepts = [emoji_set().concepts[index] for index, _ in found]
        items = [emoji_tile(index, style, f"{cosine:.2f}") for index, cosine in found]
        rows = [
            {"name": c.name, "cosine": round(cosine, 4), "held_out": c.held_out, "id": c.id}
            for c, (_, cosine) in zip(concepts, found, strict=True)
        ]
        return look.new_tiles(items), look.hint(_told(concepts, text, style) + cut), rows

    def find(self, note: Note, word: str, style: str) -> Any:
        """Emoji by name or keyword in one drawing style; the examples without a word."""
        check_style(style)
        if not (word or "").strip():
            return look.new_tiles(example_tiles() if style == FIRST_STYLE else example_emoji(style))
        items = [emoji_tile(index, style) for index in find_emoji(word)]
        return look.new_tiles(items, "" if items else f"No emoji is called {look.quoted(word)}.")

    def pick(self, note: Note, choice: str, labels: Any) -> tuple[Any, str]:
        """A picture by the id of its tile ("example/fox", "twemoji/1F98A"); its name joins the labels."""
        choice = str(choice or "")
        kind, _, name = choice.partition("/")
        if kind == "example" and name in examples():
            return str(examples()[name]), _with_label(labels, name)
        found = [i for i, concept in enumerate(emoji_set().concepts) if concept.id == name]
        if not found or kind not in emoji_set().styles:
            raise BadInput(
                f"there is no picture {look.quoted(choice)}", "ids are STYLE/CODE or example/NAME", "twemoji/1F98A"
            )
        return emoji_set().image(found[0], kind), _with_label(labels, emoji_set().concepts[found[0]].name)


def _with_label(labels: Any, name: str) -> str:
    """The labels with a picture's name among them, in the form they were written in."""
    name = name.replace(",", "")
    text = "\n".join(map(str, labels)) if isinstance(labels, list) else str(labels or "")
    if name in pieces_of(labels):
        return text
    separator = "\n" if "\n" in text else ", "
    return f"{name}{separator}{text}" if text.strip() else name


def _told(concepts: Sequence[Concept], text: str, style: str) -> str:
    """What was searched, and what of it the model was never trained on."""
    emoji = emoji_set()
    unseen = sum(concept.held_out for concept in concepts)
    trained = "a style that was never trained on" if style == emoji.held_out_style else "a style that was trained on"
    total = sum(concept.held_out for concept in emoji.concepts)
    return (
        f"Nearest to {look.quoted(text)} among {len(emoji.concepts):,} emoji drawn as {STYLES[style]}, "
        f"{trained}. The number is the cosine. “Unseen” marks {unseen} of these {len(concepts)}: they were held out "
        f"of training in every style, as were {total} of all. Press one to use it as the picture above."
    )
