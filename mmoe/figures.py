"""Pictures of routing: experts over image patches and text tokens, load as heatmap and bars.

Colours are those of Okabe and Ito (2008), for colour-blind eyes. Experts beyond the eighth repeat them under stripes,
and every picture prints the expert's number as well.
Shapes: P patches or tokens, E experts, L layers. Pillow and matplotlib are imported by the functions that draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmoe.atomic import atomic_path, check_writable
from mmoe.errors import BadInput, did_you_mean
from mmoe.routing import Routing
from mmoe.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image as Picture
    from PIL.ImageFont import FreeTypeFont

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#4D4D4D")
HATCHES = ("", "//", "\\\\", "xx")
INK, MUTED, PAPER = "#1A1A1A", "#6B6B6B", "#FFFFFF"

Ids = Tensor | NDArray[Any] | Sequence[int]
Shares = Tensor | NDArray[Any] | Sequence[Any]


def expert_color(expert: int) -> str:
    """Colour of an expert as "#RRGGBB"; expert 8 has the colour of expert 0.

    Example:
        >>> expert_color(0), expert_color(9) == expert_color(1)
        ('#0072B2', True)
    """
    return PALETTE[expert % len(PALETTE)]


def patch_overlay(
    image: Picture,
    experts: Ids,
    grid: tuple[int, int],
    *,
    weights: Shares | None = None,
    alpha: float = 0.45,
    numbers: bool = True,
    num_experts: int | None = None,
) -> Picture:
    """Tints the patches of a picture by their expert, with a legend below.

    A small picture is enlarged until the numbers can be read; its aspect stays.

    Args:
        image: any mode; transparency is put on white.
        experts: (P,) expert of each patch, row by row; see `first_choice`.
        grid: rows and columns of patches, P = rows * columns.
        weights: (P,) combine weights; the largest gets the full tint.
        alpha: opacity of the tint.
        numbers: prints the expert's number in each patch.
        num_experts: E; ids from E on are unused slots and stay untinted, like negative ones. None knows no sentinel.

    Raises:
        BadInput: the number of experts or weights is not that of the patches.

    Example:
        >>> from PIL import Image
        >>> patch_overlay(Image.new("RGB", (32, 16)), [0, 1], (1, 2)).width
        480
    """
    from PIL import Image, ImageDraw

    rows, cols = grid
    ids = _ids(experts, rows * cols, f"a grid of {rows} x {cols} patches", num_experts)
    strength = _strength(weights, ids) * alpha
    image = image.convert("RGBA")
    cell = min(image.width / cols, image.height / rows)
    scale = max(1.0, (26 if numbers else 0) / cell, 480 / max(image.size))
    size = round(image.width * scale), round(image.height * scale)
    canvas = Image.alpha_composite(Image.new("RGBA", size, PAPER), image.resize(size, Image.Resampling.BICUBIC))
    pixels = np.asarray(canvas.convert("RGB"), dtype=np.float32)
    canvas = Image.fromarray(_tint(pixels, ids.reshape(rows, cols), strength.reshape(rows, cols)))
    if numbers:
        draw, font = ImageDraw.Draw(canvas), _font(min(48, int(0.46 * cell * scale)))
        for patch, expert in enumerate(ids.tolist()):
            if expert >= 0:
                at = ((patch % cols + 0.5) * size[0] / cols, (patch // cols + 0.5) * size[1] / rows)
                draw.text(at, str(expert), PAPER, font, anchor="mm", stroke_width=2, stroke_fill=INK)
    return _with_legend(canvas, ids, num_experts, "patches")


def token_strip(
    tokens: Sequence[str],
    experts: Ids,
    *,
    weights: Shares | None = None,
    num_experts: int | None = None,
    width: int = 960,
) -> Picture:
    """Text tokens in boxes tinted by their expert, its number below; lines wrap, a newline token ends its line.

    Args:
        tokens: P pieces of text; the space markers of tokenizers are shown as spaces.
        experts: (P,) expert of each token; see `first_choice`.
        weights: (P,) combine weights; the largest gets the full tint.
        num_experts: E; as in `patch_overlay`.
        width: of the picture in pixels.

    Raises:
        BadInput: the number of experts or weights is not that of the tokens.
    """
    from PIL import Image, ImageDraw

    ids = _ids(experts, len(tokens), f"{len(tokens)} tokens", num_experts)
    strength = _strength(weights, ids)
    font, small = _font(20), _font(14)
    words = [_shown(token, font, width - 44) for token in tokens]
    widths = [max(24, round(font.getlength(word)) + 16) for word in words]
    boxes, bottom = _boxes(widths, [token.endswith(("\n", "Ċ")) for token in tokens], width)
    canvas = Image.new("RGB", (width, bottom), PAPER)
    draw = ImageDraw.Draw(canvas)
    for (left, top, right, base), word, expert, weight in zip(boxes, words, ids.tolist(), strength, strict=True):
        mask = Image.new("L", (right - left, base - top))
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, right - left - 1, base - top - 1), 5, 255)
        canvas.paste(_swatch(expert, mask.size, 0.15 + 0.4 * weight), (left, top), mask)
        outline = expert_color(expert) if expert >= 0 else "#C8C8C8"
        draw.rounded_rectangle((left, top, right - 1, base - 1), 5, None, outline)
        middle = (left + right) / 2
        draw.text((middle, top + 17), word, INK, font, anchor="mm")
        draw.text((middle, base - 11), str(expert) if expert >= 0 else "–", INK, small, anchor="mm")
    return _with_legend(canvas, ids, num_experts, "tokens")


def load_heatmap(load: Trace | Shares, *, names: Sequence[str] | None = None, title: str = "Load per expert") -> Figure:
    """Layers by experts, with the share printed in percent in each cell.

    Args:
        load: a trace, whose `use` is drawn, or a table (L, E), whose rows are normalised; NaN marks a missing expert.
        names: of the layers; those of the trace when None.
        title: of the figure.

    Example:
        >>> figure = load_heatmap([[3, 1], [2, 2]])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['75', '25', '50', '50']
    """
    from matplotlib.ticker import MaxNLocator

    table = 100 * _table(load)  # (L, E)
    names = names or (load.layers if isinstance(load, Trace) else [str(i) for i in range(len(table))])
    layers, width = table.shape
    size = max(3.9, 1.9 + 0.085 * max(map(len, names)) + 0.52 * width), 1.45 + 0.42 * layers
    figure, axes = _figure(size, f"{title} (%)")
    top = max(float(np.nanmax(table)), 200 / width)
    mesh = axes.pcolormesh(table, cmap="Blues", vmin=0, vmax=top, edgecolors=PAPER, linewidth=1.5)
    for (layer, expert), share in np.ndenumerate(table):
        if not np.isnan(share):
            ink = PAPER if share > 0.6 * top else INK
            axes.text(expert + 0.5, layer + 0.5, _percent(share), ha="center", va="center", color=ink, fontsize=9)
    axes.set_xticks(np.arange(width) + 0.5, [str(e) for e in range(width)])
    axes.set_yticks(np.arange(layers) + 0.5, names)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, format="%d %%", ticks=MaxNLocator(5, integer=True), fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    return figure


def load_bars(load: Routing | Shares | Mapping[str, Shares], *, title: str = "Load per expert") -> Figure:
    """How much each expert is used as bars, with the even share as a line.

    Args:
        load: a routing, whose `use` is drawn, the (E,) shares or counts of each expert, or several of these by
            group, such as {"image": ..., "text": ...}. Each is normalised to sum to 1.
        title: of the figure.

    Example:
        >>> figure = load_bars({"image": [3, 1], "text": [1, 1]})
        >>> [f"{bar.get_height():.0f}" for bar in figure.axes[0].patches]
        ['75', '25', '50', '50']
    """
    from matplotlib.ticker import MaxNLocator

    groups: Mapping[str, Any] = load if isinstance(load, Mapping) else {"": load}
    tables = {name: 100 * _table(v.use() if isinstance(v, Routing) else v) for name, v in groups.items()}
    if isinstance(load, Trace) or any(len(table) > 1 for table in tables.values()):
        raise BadInput("bars of several layers", "they show one", "load_bars(routing[0]), or load_heatmap(routing)")
    shares = {name: table[0] for name, table in tables.items()}
    widths = {name: len(share) for name, share in shares.items()}
    if len(set(widths.values())) != 1:
        found = ", ".join(f"{name}: {width}" for name, width in widths.items()) or "no groups"
        raise BadInput("bars of groups that do not have the same experts", found, "load_bars({'image': image_load})")
    (width,) = set(widths.values())
    figure, axes = _figure((max(4.2, 1.4 + width * max(0.5, 0.36 * len(shares))), 3.2), title)
    _draw_bars(axes, shares, width)
    axes.axhline(100 / width, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"even share ({100 / width:.3g} %)")
    axes.set_xticks(range(width), [str(e) for e in range(width)])
    axes.set(xlim=(-0.6, width - 0.4), ylim=(0, 1.2 * max(100 / width, *(share.max() for share in shares.values()))))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter("{x:.0f} %")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6")
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.2), ncols=2, frameon=False, fontsize=9)
    return figure


def save_figure(figure: Figure | Picture, path: str | Path) -> Path:
    """Writes a figure or picture, whole or not at all; the suffix gives the format.

    Raises:
        BadInput: the suffix is unknown, or a picture was asked for as vector graphics.
    """
    from PIL import Image

    path = Path(path)
    fix = f"save_figure(figure, '{path.stem or 'figure'}.png')"
    suffix = _suffix(path, fix, picture=isinstance(figure, Image.Image))
    with atomic_path(path) as temporary:
        if isinstance(figure, Image.Image):
            (figure.convert("RGB") if suffix in ("jpg", "jpeg") else figure).save(temporary)
        else:
            figure.savefig(temporary, format=suffix, dpi=150)
    return path


def check_figure_path(path: str | Path) -> None:
    """As `save_figure` would, raises where a figure cannot be written, before long work for it."""
    _suffix(Path(path), f"the name '{Path(path).stem or 'figure'}.png'", picture=False)
    check_writable(path)


def _suffix(path: Path, fix: str, picture: bool) -> str:
    """The format of a file; pictures have no vector graphics."""
    formats = ["png", "jpg", "jpeg", "webp", *([] if picture else ["svg", "pdf"])]
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in formats:
        asked = f"cannot write '{path}' as a {'picture' if picture else 'figure'}"
        raise BadInput(asked, did_you_mean(suffix, formats), fix)
    return suffix


def _array(value: Any) -> NDArray[Any]:
    if isinstance(value, Tensor):
        return (value.float() if value.is_floating_point() else value).detach().cpu().numpy()
    return np.asarray(value)


def _ids(experts: Ids, expected: int, what: str, num_experts: int | None) -> NDArray[np.int64]:
    """Experts as a flat array with -1 for unused slots."""
    ids = _array(experts).astype(np.int64).reshape(-1)
    if len(ids) != expected:
        raise BadInput(f"{len(ids)} experts for {what}", f"{expected} are needed", "first_choice(routing)[rows]")
    unused = (ids < 0) | (ids >= (num_experts if num_experts is not None else np.inf))
    return np.where(unused, -1, ids)


def _strength(weights: Shares | None, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Tint of each cell from 0 to 1, 0 for unused slots."""
    strength = np.ones(len(ids)) if weights is None else _array(weights).astype(np.float64).reshape(-1)
    if len(strength) != len(ids):
        raise BadInput(f"{len(strength)} weights for {len(ids)} experts", "each needs one", "weights=None")
    return np.where(ids < 0, 0.0, strength).clip(0) / max(strength[ids >= 0].max(initial=0.0), 1e-9)


def _percent(value: float | np.floating[Any]) -> str:
    """Rounded to integers; "<1" tells a rare expert from one that is never used."""
    return "<1" if 0 < value < 0.5 else f"{value:.0f}"


def _stripes(round_: NDArray[np.int64], y: NDArray[np.int64], x: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where the stripes of repeated colours are: none, rising, falling, both."""
    rising, falling = (x + y) % 8 < 2, (x - y) % 8 < 2
    return (round_ % 4 == 1) & rising | (round_ % 4 == 2) & falling | (round_ % 4 == 3) & (rising | falling)


def _tint(pixels: NDArray[np.float32], ids: NDArray[np.int64], strength: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Blends the cells' colours over pixels (H, W, 3), made nearly gray below, and draws faint lines between cells."""
    y, x = np.arange(pixels.shape[0])[:, None], np.arange(pixels.shape[1])[None]
    row, col = y * ids.shape[0] // len(y), x * ids.shape[1] // x.shape[1]
    colors = np.array([list(bytes.fromhex(expert_color(int(e))[1:])) for e in ids.flat])
    colors = colors.reshape(*ids.shape, 3)[row, col]  # (H, W, 3)
    opacity = strength[row, col][..., None]
    gray = pixels @ np.array([0.299, 0.587, 0.114])
    pixels = np.where(opacity > 0, 0.25 * pixels + 0.75 * gray[..., None], pixels)
    pixels = pixels * (1 - opacity) + colors * opacity
    striped = _stripes(ids.clip(0)[row, col] // len(PALETTE), y, x)
    pixels[striped] += 0.45 * (255 - pixels[striped])
    lines = (np.diff(row, axis=0, prepend=0) > 0) | (np.diff(col, axis=1, prepend=0) > 0)
    pixels[lines] += 0.45 * (255 - pixels[lines])
    return pixels.round().astype(np.uint8)


def _font(size: int) -> FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: more scripts than Pillow's own font."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _shown(token: str, font: FreeTypeFont, width: float) -> str:
    """What is printed for a token: markers of spaces as spaces, blanks visible, cut to a width."""
    text = token.replace("Ġ", " ").replace("▁", " ").replace("</w>", "").replace("Ċ", "\n")
    text = text.strip() or ("↵" if "\n" in text else "␣")
    while len(text) > 1 and font.getlength(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def _boxes(widths: Sequence[int], ends_line: Sequence[bool], width: int) -> tuple[list[tuple[int, int, int, int]], int]:
    """Boxes (left, top, right, bottom) of the given widths set in lines, and the height of all."""
    margin, gap, height = 12, 5, 52
    left = top = margin
    boxes = []
    for box, end in zip(widths, ends_line, strict=True):
        if left + box > width - margin and left > margin:
            left, top = margin, top + height + gap
        boxes.append((left, top, left + box, top + height))
        left, top = (margin, top + height + gap) if end else (left + box + gap, top)
    return boxes, boxes[-1][3] + margin if boxes else margin


def _swatch(expert: int, size: tuple[int, int], strength: float = 1.0) -> Picture:
    """A piece of an expert's colour on white with its stripes; plain white for an unused slot."""
    from PIL import Image

    pixels = np.full((size[1], size[0], 3), 255, dtype=np.float32)
    return Image.fromarray(_tint(pixels, np.array([[expert]]), np.array([[strength if expert >= 0 else 0.0]])))


def _with_legend(canvas: Picture, ids: NDArray[np.int64], num_experts: int | None, unit: str) -> Picture:
    """Puts the experts' colours and shares below a picture; absent experts are left out where E is large."""
    from PIL import Image, ImageDraw

    present = sorted(set(ids.tolist()) - {-1})
    shown = list(range(num_experts)) if num_experts is not None and num_experts <= len(PALETTE) else present
    shown += [-1] * bool((ids < 0).any())
    shares = [(e, f"{e if e >= 0 else 'none'}   {_percent(100 * np.mean(ids == e))} %") for e in shown]
    font, title = _font(16), f"expert, share of {unit}"
    width = max(canvas.width, round(font.getlength(title)) + 24)
    column = max([font.getlength(text) for _, text in shares], default=0) + 48
    columns = max(1, int((width - 12) // column))
    lines = -(-len(shares) // columns)
    whole = Image.new("RGB", (width, canvas.height + 38 + 28 * lines), PAPER)
    whole.paste(canvas)
    draw = ImageDraw.Draw(whole)
    draw.text((12, canvas.height + 19), title, MUTED, font, anchor="lm")
    for i, (expert, text) in enumerate(shares):
        left, top = 12 + round(i % columns * column), canvas.height + 36 + 28 * (i // columns)
        whole.paste(_swatch(expert, (18, 18)), (left, top))
        draw.rectangle((left, top, left + 17, top + 17), outline="#9A9A9A")
        draw.text((left + 26, top + 9), text, INK, font, anchor="lm")
    return whole


def _table(load: Trace | Any) -> NDArray[np.float64]:
    """Shares (L, E) with rows that sum to 1; NaN where a layer has no such expert."""
    if isinstance(load, Trace):
        table = load.use().double().numpy()
        for row, name in zip(table, load.layers, strict=True):
            row[load.select(name)[0].num_experts :] = np.nan
    else:
        table = np.atleast_2d(_array(load)).astype(np.float64)
    if not table.size:
        raise BadInput("a figure of no load", "no layer was recorded", "with mmoe.trace(model) as routing")
    total = np.nansum(table, axis=1, keepdims=True)
    return np.where(total > 0, table / np.where(total > 0, total, 1), table)


def _figure(size: tuple[float, float], title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    axes = figure.add_subplot(xlabel="expert")
    axes.set_title(title, loc="left", fontsize=11)
    axes.tick_params(length=0)
    return figure, axes


def _draw_bars(axes: Axes, shares: Mapping[str, NDArray[np.float64]], width: int) -> None:
    """One cluster of bars per expert; a single group is coloured by expert, several by group."""
    thick = 0.8 / len(shares)
    for i, (name, share) in enumerate(shares.items()):
        at = np.arange(width) + (i - (len(shares) - 1) / 2) * thick
        experts = range(width) if len(shares) == 1 else [i] * width
        colors, hatches = zip(
            *((expert_color(e), HATCHES[e // len(PALETTE) % len(HATCHES)]) for e in experts), strict=True
        )
        bars = axes.bar(at, share, 0.94 * thick, color=colors, edgecolor=PAPER, hatch=hatches, label=name or None)
        behind = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6}
        axes.bar_label(bars, [_percent(value) for value in share], padding=2.5, fontsize=8, zorder=3, bbox=behind)
