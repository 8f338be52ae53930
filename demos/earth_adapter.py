"""Earth-Adapter in the gallery: what covers the ground, and what the adapters make of low and high frequencies.

The mask lies over the picture in the classes' colours; a class that is seen has its name written on it, so that nobody
has to tell colours apart. Example places are bundled.
Shapes: H and W of the picture, h and w of what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np
from gradio.processing_utils import save_pil_to_cache
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt

from demos import look
from demos.examples import bundled, chooser
from demos.family import REDRAW, Choice, Family, Shell, Steps, message_area, picture_input, read_picture
from demos.panels import read_layer
from demos.store import ModelStore, Note
from mmoe.errors import BadInput, Refused
from zoo.card import Card

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmoe.frequency_maps import FrequencyMaps
    from zoo.earth_adapter.result import Segmentation
    from zoo.model import Model
    from zoo.views import TokenView

KEEP_SECONDS = 3600
LONGEST = 2048  # pixels on the long side of a picture that is segmented
DRAWN = 640  # pixels on the long side of what is shown
OPACITY = 0.5
NAMED = 0.01  # of the picture: classes with a smaller share are in the legend alone
HINT = "Press Segment."
ABOUT_EXAMPLES = "NASA Blue Marble, 192 pixels or 12.8 degrees a side."
SPLIT = (
    "Adapters read the features of each patch (expert 0, spatial), their low frequencies (expert 1) and the rest, the "
    "high ones (expert 2); a router weighs the three, patch by patch. Bright is strong."
)


def drawing(result: Segmentation, picture: Image.Image) -> dict[str, Any]:
    """What is kept to draw a mask at any opacity: picture and colours at the size of the screen, places of names."""
    factor = DRAWN / max(picture.size)
    width, height = (max(1, round(side * factor)) for side in picture.size)
    painted = result.picture().resize((width, height), Image.Resampling.NEAREST)
    mask = np.asarray(painted)  # (h, w)
    names = []
    for number, (name, share) in enumerate(result.shares().items()):
        if share >= NAMED:
            depth = distance_transform_edt(np.pad(mask == number, 1))[1:-1, 1:-1]
            row, column = np.unravel_index(int(depth.argmax()), depth.shape)
            names.append((name, int(column), int(row)))
    return {"picture": picture.resize((width, height)), "painted": painted.convert("RGB"), "names": names}


def overlay(kept: dict[str, Any], opacity: float) -> Image.Image:
    """The colours over the picture, with the name of each class in the middle of its widest part."""
    import matplotlib

    canvas = Image.blend(kept["picture"], kept["painted"], opacity)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 24)
    for name, column, row in kept["names"]:
        half = font.getlength(name) / 2 + 4
        at = min(max(column, half), max(canvas.width - half, half)), min(max(row, 16), max(canvas.height - 16, 16))
        draw.text(at, name, "white", font, anchor="mm", stroke_width=3, stroke_fill="#1A1A1A")
    return canvas


def read_opacity(opacity: Any) -> float:
    """Opacity of the mask, 0 to 1.

    Raises:
        BadInput: it is none.
    """
    if isinstance(opacity, int | float) and 0 <= opacity <= 1:
        return float(opacity)
    asked = f"no opacity {look.quoted(str(opacity))}"
    raise BadInput(asked, "it is a number from 0, the picture alone, to 1, the mask alone", "opacity=0.5")


class Page(Family):
    """The Try tab of Earth-Adapter: a picture, its mask, and the split of frequencies in the adapters.

    Args:
        cards: of the family's models.
        store: models in memory.
    """

    seen = "The picture is seen as a whole here, while the mask of a large one is made of windows."

    def __init__(self, cards: Sequence[Card], store: ModelStore) -> None:
        super().__init__(cards, store)
        self.parameters = ("image",)
        self.offered = bundled("places")
        self.first = self.offered[0].read()
        self.defaults = (self.first,)

    def read(self, *values: Any) -> tuple[Any, ...]:
        """The picture, made smaller where segmenting it would take minutes."""
        picture = values[0] if isinstance(values[0], Image.Image) else read_picture(values[0])
        if max(picture.size) > LONGEST:
            picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
        return (picture,)

    def observe(self, model: Model, inputs: tuple[Any, ...]) -> None:
        """The whole picture at once, where `predict` cuts a large one into windows."""
        import torch

        with torch.no_grad():
            model(**self.batch(model, inputs))

    def views(self, model: Model) -> list[TokenView]:
        """Layers as a picture of any content shows them."""
        side = model.preprocessing["image_size"]
        return model.views(self.batch(model, (Image.new("RGB", (side, side)),)))

    def draw(self, shell: Shell) -> list[gr.components.Component]:
        """Draws the picture, its mask, the legend, and the split of frequencies."""
        gr.HTML(look.section("What covers the ground?", "Each pixel gets a class; the legend tells their shares."))
        with gr.Row():
            with gr.Column(scale=5, min_width=280):
                picture = picture_input(value=self.first, height=300, elem_id="earth_adapter-picture")
                with gr.Accordion("Pick a place", open=True):
                    chooser(shell, self.name, self.offered, picture)
                    gr.HTML(look.hint(ABOUT_EXAMPLES))
                run = gr.Button("Segment", variant="primary", elem_id="earth_adapter-run")
                message = message_area()
            with gr.Column(scale=6, min_width=280):
                mask = gr.Image(
                    label="Classes",
                    type="pil",
                    format="png",
                    alt_text="The picture with its classes in colours",
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="earth_adapter-mask",
                    elem_classes="captioned",
                )
                opacity = Steps(0, 1, OPACITY, step=0.05, label="Opacity", elem_id="earth_adapter-opacity")
                with gr.Column(elem_classes="with-result"):
                    legend = gr.HTML(look.hint(HINT), elem_id="earth_adapter-legend")
                    file = gr.DownloadButton("Download the mask (PNG)", size="sm", elem_id="earth_adapter-file")
        self._wire(shell, picture, run, message, [mask, opacity, legend, file])
        gr.HTML(look.section("Low and high frequencies", SPLIT))
        self._draw_split(shell, picture)
        return [picture]

    def _wire(self, shell: Shell, picture: gr.Image, run: gr.Button, message: gr.HTML, parts: list[Any]) -> None:
        mask, opacity, legend, file = parts
        state = gr.State(None, time_to_live=KEEP_SECONDS)
        numbers = gr.JSON(visible=False, label="numbers")

        def segment(note: Note, model: str, image: str, opacity: float) -> tuple[Any, ...]:
            """Segments a picture: the mask over it, a legend, a PNG whose pixels are the numbers of the classes, and
            the shares of the classes.
            """
            shown = read_opacity(opacity)
            (picture,) = self.read(image)
            with self.use(model, note) as loaded:
                note("Segmenting", 0.6)
                result = loaded.model.predict(picture)
                kept = drawing(result, loaded.model.seen(picture))
            path = save_pil_to_cache(result.picture(), file.GRADIO_CACHE, name="mask", format="png")
            return kept, overlay(kept, shown), _legend(result), path, result.as_dict()

        def again(note: Note, state: Any, opacity: float) -> Any:
            """The mask that this session made last, at another opacity."""
            shown = read_opacity(opacity)
            return gr.skip() if state is None else overlay(state, shown)

        outputs = [state, mask, legend, file, numbers]
        told = {
            "message": message,
            "blank": lambda *_: [None, None, look.hint(HINT), None, None],
        }
        ran = shell.on(
            run.click,
            segment,
            [shell.model, picture, opacity],
            outputs,
            api_name=f"{self.name}_predict",
            names=["model", "image", "opacity"],
            show_progress_on=[mask],
            **told,
        )
        shell.forget([shell.model, picture], outputs, runs=[ran], **told)
        shell.on(
            opacity.input,
            again,
            [state, opacity],
            [mask],
            api_name=f"{self.name}_opacity",
            names=["state", "opacity"],
            message=message,
            **REDRAW,
        )

    def _draw_split(self, shell: Shell, picture: gr.Image) -> None:
        state = gr.State(None, time_to_live=KEEP_SECONDS)
        with gr.Row(elem_classes="bottom-row"):
            layer = Choice([1], value=1, label="Layer", scale=4, min_width=200, elem_id="earth_adapter-layer")
            show = gr.Button("Show the split", scale=1, min_width=140, elem_id="earth_adapter-split")
        message = message_area()
        plot = gr.Plot(label="One layer", elem_id="earth_adapter-frequencies", elem_classes=["captioned", "wide"])
        told = {"message": message, "blank": lambda *_: [None, gr.skip(), None]}
        ran = shell.on(
            show.click,
            self.frequencies,
            [layer, shell.model, picture],
            [state, layer, plot],
            api_name=f"{self.name}_frequencies",
            names=["layer", "model", "image"],
            show_progress_on=[plot],
            **told,
        )
        shell.forget([shell.model, picture], [state, layer, plot], runs=[ran], **told)
        shell.on(
            layer.input,
            self.split,
            [state, layer],
            [plot],
            api_name=f"{self.name}_frequencies_layer",
            names=["state", "layer"],
            message=message,
            **REDRAW,
        )

    def frequencies(self, note: Note, layer: Any, model: str, image: str) -> tuple[Any, ...]:
        """Features of a picture in a layer, their low and high parts, and what the router gives each adapter."""
        from mmoe.frequency_maps import frequency_maps

        inputs = self.read(image)
        with self.use(model, note) as loaded:
            note("Running with the adapters watched", 0.6)
            try:
                found = frequency_maps(loaded.model, self.observe, loaded.model, inputs)
            except Refused as error:
                raise Refused(f"{model} splits no frequencies", error.wrong, "choose a model that does") from error
            seen = self.picture(loaded.model, inputs)
        kept = {"maps": [_strengths(maps) for maps in found.values()], "picture": seen}
        chosen = min(max(read_layer(layer), 1), len(found))
        choices = [(f"{place} (block {name.split('.')[-3]})", place) for place, name in enumerate(found, 1)]
        return kept, gr.Radio(choices, value=chosen), _figure(kept, chosen)

    def split(self, note: Note, state: Any, layer: Any) -> Figure:
        """Another layer of the split that this session made last."""
        if state is None:
            raise BadInput("there is no split to show", "nothing was run yet", 'press "Show the split"')
        return _figure(state, read_layer(layer))


def _legend(result: Segmentation) -> str:
    """Every class with its colour and share of the area, the largest first."""
    colors = dict(zip(result.classes, result.colors, strict=True))
    parts = [(name, share, colors[name]) for name, share in result.top(len(colors))]
    height, width = result.mask.shape
    sure = float(result.confidence.float().mean())
    told = f"Segmented at {width} x {height} pixels. The mean probability of the class that was chosen is {sure:.1%}."
    return look.shares(parts) + look.hint(told)


def _strengths(maps: FrequencyMaps) -> FrequencyMaps:
    """Maps of one picture with the length of each patch's vector in place of the vector, which is all that is drawn."""
    from mmoe.frequency_maps import FrequencyMaps

    features, low, high = (maps.strength(part).cpu()[None, ..., None] for part in ("features", "low", "high"))
    return FrequencyMaps(features=features, low=low, high=high, weights=maps.weights[:1].cpu())


def _figure(kept: dict[str, Any], place: int) -> Figure:
    """One layer, counted from 1; the last one where there are fewer."""
    from mmoe.frequency_maps import frequency_figure

    return frequency_figure(kept["maps"][min(max(place, 1), len(kept["maps"])) - 1], kept["picture"])
