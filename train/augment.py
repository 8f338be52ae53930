"""Augmentation of drawings with transparency, for a whole batch at once on tensors.

One affine warp that also makes every drawing fill the frame alike, one colour matrix per picture, darker contours,
fewer colours, a random background under the transparent parts, blur or sharpening, and a cut-out. Contours and colours
are what drawing styles differ in. Shapes: n pictures, S pixels per side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.model import Model

GREY, CONTOURS, POSTERISE = 0.15, 0.25, 0.15  # shares of the pictures
_LUMA = torch.tensor([0.299, 0.587, 0.114])
_HUE_AXIS = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)


def on_background(pixels: Tensor, colour: Tensor | float = 1.0) -> Tensor:
    """Lays RGBA pictures over a background.

    Args:
        pixels: (n, 4, S, S) uint8.
        colour: white, or (n, 3, 1, 1) in [0, 1].

    Returns:
        (n, 3, S, S) floats in [0, 1].
    """
    rgba = pixels.float() / 255
    alpha = rgba[:, 3:]
    return rgba[:, :3] * alpha + colour * (1 - alpha)


def as_input(model: Model, image: Tensor) -> Tensor:
    """Pictures (n, 3, S, S) in [0, 1] as `model` takes them: at its size, normalised, of its type and on its device."""
    told = model.preprocessing
    if image.shape[-1] != told["image_size"]:
        image = F.interpolate(image, (told["image_size"], told["image_size"]), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(told[key]).view(3, 1, 1) for key in ("mean", "std"))
    return ((image - mean) / std).to(model.input_device, model.dtype)


def augment(pixels: Tensor, seeds: Sequence[int], strength: float = 1.0) -> Tensor:
    """Random variants of drawings.

    Args:
        pixels: (n, 4, S, S) uint8 RGBA.
        seeds: one for each picture: what becomes of it depends on no other.
        strength: scales warps and colour shifts; which pictures turn grey, get contours, fewer colours, blur or a
            cut-out does not depend on it.

    Returns:
        (n, 3, S, S) floats in [0, 1].

    Example:
        >>> augment(torch.zeros(2, 4, 64, 64, dtype=torch.uint8), [0, 1]).shape
        torch.Size([2, 3, 64, 64])
    """
    draw = _Draw(seeds)
    rgba = pixels.float() / 255
    rgba = _warp(torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1), draw, strength)  # premultiplied
    colour, alpha = rgba[:, :3], rgba[:, 3:]
    background = _background(draw)
    drawing = _recolour(colour, alpha, draw, strength)
    image = _fewer_colours(drawing + background * (1 - alpha), draw)
    image = _soften(_contours(image, draw), draw)
    return _cut_out(image, background, draw)


class _Draw:
    """Random numbers per picture, from one long row for each."""

    def __init__(self, seeds: Sequence[int], most: int = 64) -> None:
        self.n, self._taken = len(seeds), 0
        rows = [torch.rand(most, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self._numbers = torch.stack(rows) if rows else torch.zeros(0, most)  # (n, most)

    def _next(self, *shape: int) -> Tensor:
        count = math.prod(shape)
        self._taken += count
        assert self._taken <= self._numbers.shape[1], "a picture needs more numbers"
        return self._numbers[:, self._taken - count : self._taken].reshape(self.n, *shape)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return self._next(*shape) * (high - low) + low

    def normal(self, scale: float) -> Tensor:
        return torch.special.ndtri(self._next().clamp(1e-6, 1 - 1e-6)) * scale

    def chance(self, probability: float) -> Tensor:
        return self._next() < probability


def _warp(rgba: Tensor, draw: _Draw, strength: float) -> Tensor:
    """Rotation, scale, aspect, shear and shift in one resampling; drawings then fill 0.7 to 1.05 of the frame."""
    angle, shear = draw.normal(0.12 * strength), draw.normal(0.06 * strength)
    size, centre = _extent(rgba[:, 3])
    scale = size / draw.uniform(1 - 0.3 * strength, 1 + 0.05 * strength)
    aspect = draw.uniform(-0.09 * strength, 0.09 * strength).exp()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    stretch = torch.stack([scale * aspect, shear, zero, scale / aspect], dim=1).view(-1, 2, 2)
    shift = centre + draw.uniform(-0.09 * strength, 0.09 * strength, 2, 1)
    theta = torch.cat([rotation @ stretch, shift], dim=2)  # (n, 2, 3)
    grid = F.affine_grid(theta, list(rgba.shape), align_corners=False)
    return F.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _extent(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Larger side of each drawing as a share of the frame (n,), and its centre in [-1, 1] (n, 2, 1) as x, y."""
    places = (torch.arange(alpha.shape[-1]) + 0.5) / alpha.shape[-1] * 2 - 1
    spans = []
    for inside in (alpha.amax(1) > 0.1, alpha.amax(2) > 0.1):  # columns (x), rows (y): (n, S)
        low = torch.where(inside, places, 1.0).amin(1)
        high = torch.where(inside, places, -1.0).amax(1)
        spans.append((low, high))
    (left, right), (top, bottom) = spans
    size = torch.maximum(right - left, bottom - top) / 2
    empty = size <= 0
    centre = torch.stack([left + right, top + bottom], dim=1)[:, :, None] / 2
    return torch.where(empty, 1.0, size), torch.where(empty[:, None, None], 0.0, centre)


def _background(draw: _Draw) -> Tensor:
    """White for most, light grey or any colour for some: (n, 3, 1, 1)."""
    grey = draw.uniform(0.7, 1.0, 1).expand(-1, 3)
    coloured = torch.where(draw.chance(0.5)[:, None], draw.uniform(0.0, 1.0, 3), grey)
    return torch.where(draw.chance(0.3)[:, None], coloured, 1.0)[:, :, None, None]


def _recolour(colour: Tensor, alpha: Tensor, draw: _Draw, strength: float) -> Tensor:
    """Saturation, hue, brightness and channel gains as one matrix per picture, then a contrast shift."""
    k = 0.8 * strength
    saturation = torch.where(draw.chance(GREY), 0.0, draw.uniform(-0.5 * k, 0.4 * k).exp()).view(-1, 1, 1)
    hue = draw.normal(0.15 * k).view(-1, 1, 1)
    brightness = draw.uniform(-0.25 * k, 0.25 * k).exp().view(-1, 1, 1)
    identity = torch.eye(3)
    turned = hue.cos() * identity + (1 - hue.cos()) / 3 + hue.sin() * _HUE_AXIS  # rotation around the grey axis
    greyed = saturation * identity + (1 - saturation) * _LUMA.expand(3, 3)
    gains = 1 + draw.uniform(-0.12 * k, 0.12 * k, 3, 1)
    matrix = greyed @ turned * brightness * gains  # (n, 3, 3)
    recoloured = torch.bmm(matrix, colour.flatten(2)).view_as(colour)
    recoloured = recoloured + draw.uniform(-0.12 * k, 0.12 * k, 1, 1, 1) * alpha
    return torch.minimum(recoloured.clamp(min=0), alpha)


def _contours(image: Tensor, draw: _Draw) -> Tensor:
    """Darkens the edges of some pictures, as a drawing with outlines has them."""
    weight = torch.where(draw.chance(CONTOURS), draw.uniform(0.0, 1.0), 0.0)
    touched = weight.nonzero().flatten()
    if len(touched):
        part = image[touched]
        edges = (F.max_pool2d(part, 3, 1, 1) + F.max_pool2d(-part, 3, 1, 1)).amax(1, keepdim=True)
        image[touched] = part * (1 - weight[touched].view(-1, 1, 1, 1) * edges)
    return image


def _fewer_colours(image: Tensor, draw: _Draw) -> Tensor:
    """Rounds the colours of some pictures to 3 to 6 levels, which takes shading away."""
    levels = draw.uniform(2.0, 6.0, 1, 1, 1).floor()
    touched = draw.chance(POSTERISE).nonzero().flatten()
    image[touched] = (image[touched] * levels[touched]).round() / levels[touched]
    return image


def _soften(image: Tensor, draw: _Draw) -> Tensor:
    """Blurs or sharpens a fifth of the pictures."""
    weight = torch.where(draw.chance(0.2), draw.uniform(-1.0, 1.0), 0.0)
    touched = weight.nonzero().flatten()
    if len(touched):
        part = image[touched]
        blurred = F.avg_pool2d(F.pad(part, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        image[touched] = torch.lerp(part, blurred, weight[touched].view(-1, 1, 1, 1)).clamp(0, 1)
    return image


def _cut_out(image: Tensor, background: Tensor, draw: _Draw) -> Tensor:
    """Covers a rectangle of some pictures with their background."""
    places = (torch.arange(image.shape[-1]) + 0.5) / image.shape[-1]
    height, width = draw.uniform(0.1, 0.45, 1), draw.uniform(0.1, 0.45, 1)
    rows = (places - draw.uniform(0.0, 1.0, 1)).abs() < height / 2  # (n, S)
    columns = (places - draw.uniform(0.0, 1.0, 1)).abs() < width / 2
    hole = rows[:, None, :, None] & columns[:, None, None, :] & draw.chance(0.15)[:, None, None, None]
    return torch.where(hole, background, image)
