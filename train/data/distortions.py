"""Spoils pictures in 25 ways at 5 levels: distortions in the style of KADID-10k.

Paper: KADID-10k, a large-scale artificially distorted IQA database (Lin, Hosu, Saupe, QoMEX 2019), for the kinds, their
names and their order. Nothing here is made from the authors' code (MATLAB), and pictures come out another way: this is
KADID-style, not KADID. Ours are the textbook formulas with the values of the public tables. What the tables leave open
is inferred from the mean opinions that viewers had of each cell of kind and level:

* The curves of brightness and contrast, the angle and length of motion blur, the filter behind "denoise" (theirs is a
  network), and the five rounds of "jitter".
* Colour diffusion multiplies the colours too: viewers liked it as little as Lab saturation by the same factor.
* Values of mean shift and of contrast are in the order that has 0 at level 3, where viewers were happiest. So these two
  do not get worse with each level; all others do.
* Patches and blocks have KADID's number and share of the area, so their sides follow the size of the picture.

Shapes: H, W picture; colours last, float32 in [0, 1] between the kinds, 8 bits before and after.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # which imports its parts on first use
import torch
from PIL import Image

from mmoe.options import check_choice, check_int
from train.data.lab import from_lab, to_lab
from zoo.images import read_image

LEVELS = 5
GROUPS = ("blur", "colour", "compression", "noise", "brightness", "spatial", "sharpness")
NEED_COLOUR = ("color_diffusion", "color_saturation_hsv", "color_saturation_lab")  # they leave grey pictures alone
_AREA = 512 * 384  # pixels of KADID's pictures
_TO_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)
Draw = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to spoil a picture.

    Attributes:
        number: of the kind in KADID, from 1.
        group: one of `GROUPS`.
        values: strength at each level.
        spoil: (picture (H, W, 3), value, random numbers) -> picture, which may leave [0, 1].
    """

    number: int
    group: str
    values: tuple[float, ...]
    spoil: Callable[[np.ndarray, float, Draw], np.ndarray]


KINDS: dict[str, Kind] = {}


def distort(picture: Any, kind: str, level: int, seed: int = 0) -> Image.Image:
    """A spoilt copy of a picture, of its size.

    Args:
        picture: anything that `zoo.images.read_image` takes.
        kind: a name of `KINDS`.
        level: 1 to 5; 0 leaves the picture as it is.
        seed: of everything random. Levels of one kind share it: a stronger one has the same noise, patches or angle.

    Raises:
        BadOverride: no such kind or level.

    Example:
        >>> distort(Image.new("RGB", (64, 48), "orange"), "jpeg", 5).size
        (64, 48)
    """
    check_choice("kind", kind, KINDS)
    check_int("level", level, 0, LEVELS)
    image, chosen = read_image(picture), KINDS[kind]
    if level == 0:
        return image
    draw = np.random.default_rng([seed, chosen.number])
    pixels = np.asarray(image, np.float32) / 255  # (H, W, 3)
    return _as_image(chosen.spoil(pixels, chosen.values[level - 1], draw))


def _as_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def _kind(group: str, *values: float) -> Callable[[Callable[..., np.ndarray]], Callable[..., np.ndarray]]:
    def register(spoil: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        KINDS[spoil.__name__] = Kind(number=len(KINDS) + 1, group=group, values=values, spoil=spoil)
        return spoil

    return register


def _blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    return scipy.ndimage.gaussian_filter(pixels, sigma, axes=(0, 1), truncate=3)


def _convolved(pixels: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """With the edges repeated outwards."""
    rows, columns = (side // 2 for side in kernel.shape)
    wide = np.pad(pixels, ((rows, rows), (columns, columns), (0, 0)), "edge")
    return scipy.signal.fftconvolve(wide, (kernel / kernel.sum())[:, :, None].astype(np.float32), "valid", axes=(0, 1))


@_kind("blur", 0.1, 0.5, 1, 2, 5)
def gaussian_blur(pixels: np.ndarray, sigma: float, draw: Draw) -> np.ndarray:
    """Mean with Gaussian weights of this standard deviation in pixels."""
    return _blurred(pixels, sigma)


@_kind("blur", 1, 2, 4, 6, 8)
def lens_blur(pixels: np.ndarray, radius: float, draw: Draw) -> np.ndarray:
    """Mean over a disc; pixels on its edge count by their share inside."""
    fine = 9  # parts of a pixel along a side
    side = fine * (2 * int(radius) + 1)
    places = (np.arange(side) - (side - 1) / 2) / fine
    inside = places[:, None] ** 2 + places**2 <= radius**2
    return _convolved(pixels, inside.reshape(side // fine, fine, -1, fine).mean((1, 3)))


@_kind("blur", 1, 2, 4, 6, 10)
def motion_blur(pixels: np.ndarray, length: float, draw: Draw) -> np.ndarray:
    """Mean along a line of this length in pixels, at a random angle."""
    angle, reach = draw.uniform(0, np.pi), int(length) // 2 + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    for place in np.linspace(-1, 1, 8 * int(length)) * (length - 1) / 2:
        row, column = reach + place * np.sin(angle), reach + place * np.cos(angle)
        top, left = int(row), int(column)
        down, right = row - top, column - left
        kernel[top : top + 2, left : left + 2] += np.outer([1 - down, down], [1 - right, right])
    return _convolved(pixels, kernel)


@_kind("colour", 1, 3, 6, 8, 12)
def color_diffusion(pixels: np.ndarray, amount: float, draw: Draw) -> np.ndarray:
    """Colours of Lab bleed over the edges by a wide Gaussian, and are multiplied."""
    lab = to_lab(pixels)
    lab[..., 1:] = amount * _blurred(lab[..., 1:], 1.5 * amount + 2)
    return from_lab(lab)


@_kind("colour", 1, 3, 6, 8, 12)
def color_shift(pixels: np.ndarray, distance: float, draw: Draw) -> np.ndarray:
    """Green moves by so many pixels in a random direction, where the picture has edges nearby."""
    angle = draw.uniform(0, 2 * np.pi)
    rows, columns = round(distance * float(np.sin(angle))), round(distance * float(np.cos(angle)))
    grey = np.pad(pixels.mean(2), 1, "edge")
    slopes = np.hypot(grey[2:, 1:-1] - grey[:-2, 1:-1], grey[1:-1, 2:] - grey[1:-1, :-2])
    edges = scipy.ndimage.gaussian_filter(slopes, 4)
    edges /= max(float(edges.max()), 1e-6)
    moved = _moved(pixels[..., 1], rows, columns)
    green = pixels[..., 1] + edges * (moved - pixels[..., 1])
    return np.stack([pixels[..., 0], green, pixels[..., 2]], 2)


def _moved(plane: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Content moves down and to the right; the edges are repeated."""
    height, width = plane.shape
    down, right = np.arange(height) - rows, np.arange(width) - columns
    return plane[down.clip(0, height - 1)][:, right.clip(0, width - 1)]


@_kind("colour", 64, 48, 32, 16, 8)
def color_quantization(pixels: np.ndarray, colors: float, draw: Draw) -> np.ndarray:
    """The nearest of so many colours that are chosen for the picture (median cut), without dithering."""
    few = _as_image(pixels).quantize(int(colors), Image.Quantize.MEDIANCUT)
    return np.asarray(few.convert("RGB"), np.float32) / 255


@_kind("colour", 0.4, 0.2, 0.1, 0, -0.4)
def color_saturation_hsv(pixels: np.ndarray, factor: float, draw: Draw) -> np.ndarray:
    """Saturation of HSV times a factor: each channel's distance from the largest one is scaled."""
    value = pixels.max(2, keepdims=True)
    return value - factor * (value - pixels)


@_kind("colour", 1, 2, 3, 6, 9)
def color_saturation_lab(pixels: np.ndarray, factor: float, draw: Draw) -> np.ndarray:
    """Both colours of Lab times a factor."""
    return from_lab(to_lab(pixels) * np.array([1, factor, factor], np.float32))


def _recoded(pixels: np.ndarray, format: str, **options: Any) -> np.ndarray:
    file = io.BytesIO()
    _as_image(pixels).save(file, format, **options)
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), np.float32) / 255


@_kind("compression", 16, 32, 45, 120, 170)
def jpeg2000(pixels: np.ndarray, ratio: float, draw: Draw) -> np.ndarray:
    """JPEG 2000, this many times smaller than the pixels."""
    resolutions = min(6, int(np.log2(min(pixels.shape[:2]))) + 1)
    rates = {"quality_mode": "rates", "quality_layers": [ratio], "irreversible": True}
    return _recoded(pixels, "JPEG2000", num_resolutions=resolutions, **rates)


@_kind("compression", 43, 36, 24, 7, 4)
def jpeg(pixels: np.ndarray, quality: float, draw: Draw) -> np.ndarray:
    """JPEG of this quality."""
    return _recoded(pixels, "JPEG", quality=int(quality))


def _noise(pixels: np.ndarray, variance: float, draw: Draw) -> np.ndarray:
    return np.float32(np.sqrt(variance)) * draw.standard_normal(pixels.shape, np.float32)


@_kind("noise", 0.001, 0.002, 0.003, 0.005, 0.01)
def white_noise(pixels: np.ndarray, variance: float, draw: Draw) -> np.ndarray:
    """Normal noise of this variance on all channels."""
    return pixels + _noise(pixels, variance, draw)


@_kind("noise", 0.0001, 0.0005, 0.001, 0.002, 0.003)
def white_noise_ycbcr(pixels: np.ndarray, variance: float, draw: Draw) -> np.ndarray:
    """Normal noise of this variance on all channels of YCbCr."""
    return pixels + _noise(pixels, variance, draw) @ np.linalg.inv(_TO_YCBCR).T


@_kind("noise", 0.001, 0.005, 0.01, 0.02, 0.03)
def impulse_noise(pixels: np.ndarray, share: float, draw: Draw) -> np.ndarray:
    """Salt and pepper: this share of the numbers becomes 0 or 1."""
    chance = draw.random(pixels.shape, np.float32)
    return np.where(chance < share / 2, 0, np.where(chance > 1 - share / 2, 1, pixels))


@_kind("noise", 0.001, 0.005, 0.01, 0.02, 0.05)
def multiplicative_noise(pixels: np.ndarray, variance: float, draw: Draw) -> np.ndarray:
    """Speckle: the picture times 1 plus normal noise of this variance."""
    return pixels * (1 + _noise(pixels, variance, draw))


@_kind("noise", 0.001, 0.002, 0.003, 0.005, 0.01)
def denoise(pixels: np.ndarray, variance: float, draw: Draw) -> np.ndarray:
    """White noise, and what an adaptive Wiener filter of 5 x 5 pixels leaves of it when it takes it for twice as much.

    m + max(0, 1 - n / v) (x - m) with mean m and variance v of the window, and n of the noise.
    """
    noisy = pixels + _noise(pixels, variance, draw)
    mean = scipy.ndimage.uniform_filter(noisy, 5, axes=(0, 1))
    spread = scipy.ndimage.uniform_filter(noisy**2, 5, axes=(0, 1)) - mean**2
    kept = 1 - 2 * variance / np.maximum(spread, 2 * variance)
    return mean + kept * (noisy - mean)


def _curve(values: np.ndarray, *points: tuple[float, float]) -> np.ndarray:
    """A smooth curve through (0, 0), the points and (1, 1), read from a table."""
    given, wanted = zip((0, 0), *points, (1, 1), strict=True)
    table = scipy.interpolate.PchipInterpolator(given, wanted)(np.linspace(0, 1, 1024)).astype(np.float32)
    return table[(values.clip(0, 1) * 1023).round().astype(np.intp)]


def _lightness(pixels: np.ndarray, middle: float) -> np.ndarray:
    lab = to_lab(pixels)
    lab[..., 0] = 100 * _curve(lab[..., 0] / 100, (0.5, middle))
    return from_lab(lab)


@_kind("brightness", 0.1, 0.2, 0.4, 0.7, 1.1)
def brighten(pixels: np.ndarray, amount: float, draw: Draw) -> np.ndarray:
    """Lightness of Lab on a curve that lifts its middle by half of the amount."""
    return _lightness(pixels, (1 + amount) / 2)


@_kind("brightness", 0.05, 0.1, 0.2, 0.4, 0.8)
def darken(pixels: np.ndarray, amount: float, draw: Draw) -> np.ndarray:
    """Lightness of Lab on a curve that lowers its middle by half of the amount."""
    return _lightness(pixels, (1 - amount) / 2)


@_kind("brightness", 0.15, 0.08, 0, -0.08, -0.15)
def mean_shift(pixels: np.ndarray, amount: float, draw: Draw) -> np.ndarray:
    """The same number is added everywhere."""
    return pixels + np.float32(amount)


@_kind("spatial", 0.05, 0.1, 0.2, 0.5, 1)
def jitter(pixels: np.ndarray, spread: float, draw: Draw) -> np.ndarray:
    """Five times, each pixel is taken from a place that is normally off by so many pixels, between its neighbours."""
    height, width = pixels.shape[:2]
    places = np.stack(np.meshgrid(np.arange(width), np.arange(height)), 2)  # (H, W, 2), x before y
    picture = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, H, W)
    for _ in range(5):
        found = places + spread * draw.standard_normal(places.shape, np.float32)
        grid = torch.from_numpy(((2 * found + 1) / (width, height) - 1).astype(np.float32))[None]
        picture = torch.nn.functional.grid_sample(picture, grid, padding_mode="border", align_corners=False)
    return picture[0].permute(1, 2, 0).numpy()


def _side(pixels: np.ndarray, of_kadid: int) -> int:
    """Side of a patch that covers the share of the picture that a patch of this side covers in KADID."""
    height, width = pixels.shape[:2]
    return min(height, width, max(1, round(of_kadid * (height * width / _AREA) ** 0.5)))


@_kind("spatial", 20, 40, 60, 80, 100)
def non_eccentricity_patch(pixels: np.ndarray, count: float, draw: Draw) -> np.ndarray:
    """So many patches are copied to a place nearby, at most their side away."""
    side, changed = _side(pixels, 16), pixels.copy()
    space = np.array(pixels.shape[:2]) - side
    for _ in range(int(count)):
        top, left = draw.integers(space, endpoint=True)
        down, right = (np.array([top, left]) + draw.integers(-side, side, 2, endpoint=True)).clip(0, space)
        changed[down : down + side, right : right + side] = pixels[top : top + side, left : left + side]
    return changed


@_kind("spatial", 0.01, 0.05, 0.1, 0.2, 0.5)
def pixelate(pixels: np.ndarray, amount: float, draw: Draw) -> np.ndarray:
    """Shrunk to .95 - amount^.6 of its sides and enlarged again, both by the nearest pixel."""
    image = _as_image(pixels)
    small = [max(1, round((0.95 - amount**0.6) * side)) for side in image.size]
    again = image.resize(small, Image.Resampling.NEAREST).resize(image.size, Image.Resampling.NEAREST)
    return np.asarray(again, np.float32) / 255


@_kind("spatial", 20, 16, 13, 10, 7)
def quantization(pixels: np.ndarray, levels: float, draw: Draw) -> np.ndarray:
    """All numbers come to the nearest of so many levels with the least squared error (Lloyd's iteration)."""
    values = np.arange(256) / 255
    counts = np.bincount((pixels.clip(0, 1) * 255).round().astype(np.intp).ravel(), minlength=256)
    centres = (np.arange(levels) + 0.5) / levels
    for _ in range(20):
        nearest = np.abs(values[:, None] - centres).argmin(1)  # (256,)
        weight = np.bincount(nearest, counts, len(centres))
        total = np.bincount(nearest, counts * values, len(centres))
        centres = np.where(weight > 0, total / weight.clip(1), centres)
    table = centres[np.abs(values[:, None] - centres).argmin(1)].astype(np.float32)
    return table[(pixels.clip(0, 1) * 255).round().astype(np.intp)]


@_kind("spatial", 2, 4, 6, 8, 10)
def color_block(pixels: np.ndarray, count: float, draw: Draw) -> np.ndarray:
    """So many squares of random colours."""
    side, changed = _side(pixels, 32), pixels.copy()
    space = np.array(pixels.shape[:2]) - side
    for _ in range(int(count)):
        top, left = draw.integers(space, endpoint=True)
        changed[top : top + side, left : left + side] = draw.random(3, np.float32)
    return changed


@_kind("sharpness", 1, 2, 3, 6, 12)
def high_sharpen(pixels: np.ndarray, amount: float, draw: Draw) -> np.ndarray:
    """Lightness of Lab plus so many times what a Gaussian of 3 pixels takes away."""
    lab = to_lab(pixels)
    lab[..., 0] += amount * (lab[..., 0] - scipy.ndimage.gaussian_filter(lab[..., 0], 3))
    return from_lab(lab)


@_kind("sharpness", 0.3, 0.15, 0, -0.4, -0.6)
def contrast_change(pixels: np.ndarray, amount: float, draw: Draw) -> np.ndarray:
    """All numbers on a curve through (1/4, 1/4 - amount/4) and (3/4, 3/4 + amount/4)."""
    return _curve(pixels, (0.25, (1 - amount) / 4), (0.75, (3 + amount) / 4))
