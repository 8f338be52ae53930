"""Pictures of routing: colours follow experts, sizes and aspect hold, nothing is drawn for unused slots."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import mmoe
from mmoe import FFNExperts, MoE, Routing, TopKRouter, first_choice
from mmoe.errors import BadInput
from mmoe.figures import (
    PALETTE,
    expert_color,
    load_bars,
    load_heatmap,
    patch_overlay,
    save_figure,
    token_strip,
)

GRAY = (128, 128, 128)


def rgb(color: str) -> NDArray[np.float64]:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], dtype=float)


def gray_image(width: int = 480, height: int = 480) -> Image.Image:
    return Image.new("RGB", (width, height), GRAY)


def centers(picture: Image.Image, rows: int, cols: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """Colour in the middle of each patch, (rows, cols, 3), of a picture whose patches take up `size`."""
    pixels = np.asarray(picture, dtype=float)
    y = ((np.arange(rows) + 0.5) * size[1] / rows).astype(int)
    x = ((np.arange(cols) + 0.5) * size[0] / cols).astype(int)
    return pixels[y][:, x]


# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
RGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def seen_as(color: str, blindness: str) -> NDArray[np.float64]:
    """CIELAB of a colour as seen with a colour blindness."""
    value = rgb(color) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = RGB_TO_XYZ @ (BLINDNESS[blindness] @ linear).clip(0, 1) / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


class TestColors:
    @pytest.mark.parametrize("blindness", list(BLINDNESS))
    def test_the_first_eight_are_told_apart(self, blindness: str) -> None:
        seen = [seen_as(color, blindness) for color in PALETTE[:8]]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15

    def test_the_check_would_find_red_beside_green(self) -> None:
        red, green = (seen_as(color, "deuteranopia") for color in ("#B35A2A", "#7F7A2B"))
        assert np.linalg.norm(red - green) < 15

    def test_colors_repeat(self) -> None:
        assert len(set(PALETTE)) == 8 and [expert_color(e) for e in range(16)] == [*PALETTE, *PALETTE]


class TestPatchOverlay:
    @pytest.mark.parametrize("grid", [(2, 4), (8, 8), (16, 16), (3, 5)])
    def test_every_patch_has_the_colour_of_its_expert(self, grid: tuple[int, int]) -> None:
        ids = torch.randint(0, 8, grid)
        picture = patch_overlay(gray_image(), ids.flatten(), grid, numbers=False, alpha=0.45)
        found = centers(picture, *grid, (480, 480))
        expected = np.array([[0.55 * 128 + 0.45 * rgb(PALETTE[e]) for e in row] for row in ids.tolist()])
        assert np.abs(found - expected).max() <= 1

    def test_alpha_is_the_opacity(self) -> None:
        clear = patch_overlay(gray_image(), [3] * 4, (2, 2), numbers=False, alpha=0.0)
        full = patch_overlay(gray_image(), [3] * 4, (2, 2), numbers=False, alpha=1.0)
        assert (centers(clear, 2, 2, (480, 480)) == 128).all()
        assert (centers(full, 2, 2, (480, 480)) == rgb(PALETTE[3])).all()

    def test_weights_scale_the_tint(self) -> None:
        picture = patch_overlay(gray_image(), [0, 0, 0], (1, 3), weights=[0.1, 0.2, 0.4], numbers=False)
        tint = np.abs(centers(picture, 1, 3, (480, 480))[0] - 128).sum(-1)
        assert tint == pytest.approx(tint[2] * np.array([0.25, 0.5, 1.0]), abs=2)

    def test_unused_patches_keep_their_pixels(self) -> None:
        photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (480, 480, 3), dtype=np.uint8))
        picture = patch_overlay(photo, [4, 2, -1, 1], (2, 2), num_experts=4)
        inside = (slice(4, 236), slice(4, 236))
        assert (np.asarray(picture)[inside] == np.asarray(photo)[inside]).all(), "sentinel"
        lower = (slice(244, 476), slice(4, 236))
        assert (np.asarray(picture)[lower] == np.asarray(photo)[lower]).all(), "negative id"
        right = (slice(4, 236), slice(244, 476))
        assert (np.asarray(picture)[right] != np.asarray(photo)[right]).any()

    def test_numbers_are_printed(self) -> None:
        plain = np.asarray(patch_overlay(gray_image(), [0] * 4, (2, 2), numbers=False))
        numbered = np.asarray(patch_overlay(gray_image(), [0] * 4, (2, 2)))
        changed = (plain != numbered).any(-1)[:480]
        for rows, cols in itertools.product((slice(60, 180), slice(300, 420)), repeat=2):
            assert changed[rows, cols].sum() > 100
        assert not changed[:30].any() and not changed[:, 225:255].any(), "in the middle of the patches only"

    def test_two_experts_differ_also_where_the_colour_repeats(self) -> None:
        for a, b in itertools.combinations([0, 1, 8, 16, 24], 2):
            one, other = (
                patch_overlay(gray_image(), [e], (1, 1), numbers=False).crop((0, 0, 480, 480)) for e in (a, b)
            )
            assert np.abs(np.asarray(one, dtype=float) - np.asarray(other)).max() > 20, (a, b)

    @pytest.mark.parametrize(
        ("size", "grid"), [((32, 32), (4, 4)), ((224, 224), (16, 16)), ((100, 60), (3, 5)), ((30, 90), (9, 3))]
    )
    def test_small_pictures_are_enlarged_in_their_aspect(self, size: tuple[int, int], grid: tuple[int, int]) -> None:
        picture = patch_overlay(Image.new("RGB", size, (255, 0, 0)), [-1] * (grid[0] * grid[1]), grid)
        red = np.asarray(picture, dtype=int)
        width, height = ((red[..., 0] - red[..., 1] > 50).any(axis).sum() for axis in (0, 1))
        assert width / height == pytest.approx(size[0] / size[1], rel=0.01)
        assert max(width, height) >= 480 and min(width / grid[1], height / grid[0]) >= 26

    def test_large_pictures_keep_their_size(self) -> None:
        picture = patch_overlay(gray_image(1000, 600), [0] * 6, (2, 3))
        assert picture.width == 1000 and 600 < picture.height < 720

    def test_the_picture_itself_is_not_changed(self) -> None:
        image = gray_image()
        patch_overlay(image, [0] * 4, (2, 2))
        assert image.getcolors() == [(480 * 480, GRAY)] and image.mode == "RGB"

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
    def test_any_mode(self, mode: str) -> None:
        assert patch_overlay(gray_image(64, 64).convert(mode), [0, 1, 2, 3], (2, 2)).mode == "RGB"

    def test_transparency_is_put_on_white(self) -> None:
        picture = patch_overlay(Image.new("RGBA", (480, 480), (0, 0, 0, 0)), [-1], (1, 1))
        assert picture.getpixel((240, 240)) == (255, 255, 255)

    def test_the_legend_names_every_expert(self) -> None:
        one = patch_overlay(gray_image(), [0] * 4, (2, 2))
        four = patch_overlay(gray_image(), [0] * 4, (2, 2), num_experts=4)
        colors = {color for _, color in four.crop((0, 484, *four.size)).getcolors(100_000)}
        assert {tuple(rgb(color).astype(int)) for color in PALETTE[:4]} <= colors
        colors = {color for _, color in one.crop((0, 484, *one.size)).getcolors(100_000)}
        assert tuple(rgb(PALETTE[1]).astype(int)) not in colors

    def test_wrong_numbers(self) -> None:
        with pytest.raises(BadInput) as error:
            patch_overlay(gray_image(), [0] * 5, (2, 2))
        assert str(error.value) == (
            "5 experts for a grid of 2 x 2 patches\n  4 are needed\n  try: first_choice(routing)[rows]"
        )
        with pytest.raises(BadInput, match="3 weights for 4 experts"):
            patch_overlay(gray_image(), [0] * 4, (2, 2), weights=[1, 1, 1])


class TestTokenStrip:
    def test_boxes_have_the_colours_of_their_experts(self) -> None:
        picture = token_strip(["a", "b", "c"], torch.tensor([0, 1, 2]))
        colors = {color for count, color in picture.crop((0, 0, 960, 64)).getcolors(100_000) if count > 200}
        for e in range(3):
            assert tuple((0.55 * rgb(PALETTE[e]) + 0.45 * 255).round().astype(int)) in colors

    def test_unused_tokens_stay_white(self) -> None:
        picture = token_strip(["word"], [2], num_experts=2).crop((0, 0, 960, 64))
        assert all(red == green == blue for _, (red, green, blue) in picture.getcolors(100_000))

    def test_two_experts_differ_also_where_the_colour_repeats(self) -> None:
        pictures = [np.asarray(token_strip(["word"], [e])).astype(int)[:64, :200] for e in (0, 1, 8)]
        assert all(np.abs(a - b).max() > 20 for a, b in itertools.combinations(pictures, 2))

    def test_lines_wrap_at_the_width(self) -> None:
        one, many = (token_strip(["token"] * count, [0] * count, width=400) for count in (1, 40))
        assert one.width == many.width == 400
        lines = (many.height - one.height) / 57
        assert lines == int(lines) and 5 < lines < 13
        border = np.asarray(many)[:, -10:]
        assert (border == 255).all(), "nothing reaches over the border"

    def test_a_newline_ends_its_line(self) -> None:
        together, apart = (token_strip(["a", end, "b"], [0, 0, 0]) for end in ("x", "\n"))
        assert apart.height == together.height + 57

    def test_long_and_blank_tokens(self) -> None:
        picture = token_strip(["long" * 200, " ", "", "▁the", "Ġthe"], [0] * 5, width=300)
        assert picture.width == 300 and (np.asarray(picture)[:, -10:] == 255).all()

    def test_markers_of_spaces_are_not_printed(self) -> None:
        plain, *marked = (np.asarray(token_strip([token], [0])) for token in ("the", "▁the", "Ġthe", " the"))
        assert all((plain == picture).all() for picture in marked)

    def test_nothing(self) -> None:
        assert token_strip([], []).width == 960

    def test_wrong_number(self) -> None:
        with pytest.raises(BadInput, match="2 experts for 3 tokens\n  3 are needed"):
            token_strip(["a", "b", "c"], [0, 1])


def texts(figure: object) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


class TestHeatmap:
    def test_cells_print_the_share(self) -> None:
        figure = load_heatmap(torch.tensor([[0.25, 0.75], [0.5, 0.5]]), names=["a", "b"])
        assert texts(figure) == ["25", "75", "50", "50"]
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]

    def test_counts_are_normalised_and_rare_is_not_never(self) -> None:
        assert texts(load_heatmap([[999, 1, 0], [0, 0, 0]])) == ["100", "<1", "0", "0", "0", "0"]

    def test_first_layer_is_on_top(self) -> None:
        low, high = sorted(load_heatmap([[1, 0], [0, 1]]).axes[0].get_ylim())
        assert (low, high) == (0, 2) and load_heatmap([[1, 0]]).axes[0].yaxis_inverted()

    def test_of_a_trace(self) -> None:
        host = torch.nn.ModuleDict({"big": moe_layer(4), "small": moe_layer(2)})
        with mmoe.trace(host) as routing:
            host["big"](torch.randn(6, 8)), host["small"](torch.randn(6, 8))
        figure = load_heatmap(routing)
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["big", "small"]
        expected = [f"{100 * share:.0f}" for share in [*routing["big"].load(), *routing["small"].load()]]
        assert texts(figure) == expected, "experts that a layer lacks stay empty"

    def test_labels_are_readable_on_their_cell(self) -> None:
        axes = load_heatmap([[98, 2]]).axes[0]
        assert [text.get_color() for text in axes.texts] == ["#FFFFFF", "#1A1A1A"]

    def test_no_layer(self) -> None:
        with pytest.raises(BadInput, match="a figure of no load"):
            load_heatmap(mmoe.Trace())


class TestBars:
    def test_height_is_the_share(self) -> None:
        axes = load_bars([3, 1, 0, 0]).axes[0]
        assert [bar.get_height() for bar in axes.patches] == [75, 25, 0, 0]
        assert texts(load_bars([3, 1, 0, 0])) == ["75", "25", "0", "0"]

    def test_even_share_is_a_line(self) -> None:
        (line,) = load_bars([3, 1, 0, 0]).axes[0].lines
        assert list(line.get_ydata()) == [25, 25] and line.get_label() == "even share (25 %)"

    def test_bars_have_the_experts_colours(self) -> None:
        from matplotlib.colors import to_hex

        bars = load_bars(np.ones(16)).axes[0].patches
        assert [to_hex(bar.get_facecolor()).upper() for bar in bars] == [expert_color(e) for e in range(16)]
        assert bars[0].get_hatch() != bars[8].get_hatch()

    @pytest.mark.parametrize("loads", [torch.ones(2, 4), {"image": torch.ones(4), "text": torch.ones(2, 4)}])
    def test_bars_of_several_layers_are_an_error(self, loads: Any) -> None:
        with pytest.raises(BadInput, match="bars of several layers"):
            load_bars(loads)

    def test_groups_stand_side_by_side(self) -> None:
        axes = load_bars({"image": torch.tensor([1, 3]), "text": torch.tensor([1, 1])}).axes[0]
        bars = [(round(bar.get_x() + bar.get_width() / 2), bar.get_height()) for bar in axes.patches]
        assert bars == [(0, 25), (1, 75), (0, 50), (1, 50)]
        edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
        assert all(left[1] < right[0] for left, right in itertools.pairwise(edges)), "bars do not overlap"
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["even share (50 %)", "image", "text"]

    def test_of_a_routing(self) -> None:
        routing = Routing(experts=torch.tensor([[0], [0], [2], [3]]), weights=torch.ones(4, 1), num_experts=3)
        assert texts(load_bars(routing)) == ["67", "0", "33"]

    def test_groups_of_different_width(self) -> None:
        with pytest.raises(BadInput) as error:
            load_bars({"image": [1, 1], "text": [1, 1, 1]})
        assert str(error.value).splitlines()[:2] == [
            "bars of groups that do not have the same experts",
            "  image: 2, text: 3",
        ]
        with pytest.raises(BadInput, match="no groups"):
            load_bars({})


class TestSave:
    @pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "svg", "pdf", "PNG"])
    def test_figures(self, tmp_path: Path, suffix: str) -> None:
        path = save_figure(load_bars([1, 2]), tmp_path / f"bars.{suffix}")
        head = path.read_bytes()[:300]
        magic = {"png": b"\x89PNG", "jpg": b"\xff\xd8", "jpeg": b"\xff\xd8", "webp": b"RIFF", "pdf": b"%PDF"}
        assert head.startswith(magic.get(suffix.lower(), b"<?xml"))
        assert [file.name for file in tmp_path.iterdir()] == [f"bars.{suffix}"], "no temporary file stays"

    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
    def test_pictures(self, tmp_path: Path, suffix: str) -> None:
        picture = patch_overlay(gray_image(), [0, 1, 2, 3], (2, 2))
        path = save_figure(picture, str(tmp_path / "new" / f"overlay.{suffix}"))
        assert Image.open(path).size == picture.size

    def test_a_transparent_picture_as_jpeg(self, tmp_path: Path) -> None:
        assert save_figure(gray_image().convert("RGBA"), tmp_path / "a.jpg").exists()

    def test_unknown_suffix(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput) as error:
            save_figure(load_bars([1, 2]), tmp_path / "a.pgn")
        assert str(error.value) == (
            f"cannot write '{tmp_path}/a.pgn' as a figure\n"
            "  did you mean: jpg, png\n"
            "  try: save_figure(figure, 'a.png')"
        )
        with pytest.raises(BadInput, match="as a picture\n  known: jpeg, jpg, png, webp"):
            save_figure(gray_image(), tmp_path / "a.svg")
        assert list(tmp_path.iterdir()) == []

    def test_a_failure_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = save_figure(gray_image(), tmp_path / "a.png")
        before = path.read_bytes()

        def broken(self: Image.Image, target: Path) -> None:
            Path(target).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", broken)
        with pytest.raises(BadInput, match="No space left on device"):
            save_figure(gray_image(), path)
        assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.png"]


def moe_layer(num_experts: int) -> MoE:
    return MoE(TopKRouter(8, num_experts, top_k=1), FFNExperts(8, 8, num_experts))


class TestFirstChoice:
    def test_is_the_largest_weight_not_the_first_slot(self) -> None:
        routing = mmoe.DenseRouter(8, 4)(torch.randn(20, 8))
        assert torch.equal(first_choice(routing), routing.weights.argmax(-1))

    def test_of_padding_is_the_sentinel(self) -> None:
        routing = TopKRouter(8, 4)(torch.randn(4, 8), mmoe.Context(valid=torch.tensor([True, False, True, False])))
        assert (first_choice(routing) == 4).tolist() == [False, True, False, True]

    def test_unused_slots_do_not_count(self) -> None:
        weights = torch.tensor([[0.0, -0.2]])
        routing = Routing(experts=torch.tensor([[3, 1]]), weights=weights, num_experts=3)
        assert first_choice(routing).tolist() == [1]


def test_threads_draw_the_same() -> None:
    def draw() -> None:
        pictures.append(np.asarray(patch_overlay(gray_image(96, 96), list(range(16)), (4, 4))).tobytes())
        bars.append([patch.get_height() for patch in load_bars([1, 2, 3]).axes[0].patches])

    pictures: list[bytes] = []
    bars: list[list[float]] = []
    threads = [threading.Thread(target=draw) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pictures) == len(bars) == 6 and len(set(pictures)) == 1 and bars == [bars[0]] * 6


def test_drawing_libraries_are_imported_on_use_and_pyplot_never() -> None:
    code = (
        "import sys, mmoe.figures as f\n"
        "print('matplotlib' in sys.modules, 'PIL' in sys.modules)\n"
        "f.load_bars([1, 2]); f.load_heatmap([[1, 2]])\n"
        "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True", "False"]
