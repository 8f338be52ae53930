"""Reads pictures from paths, arrays and PIL, with one clear error for whatever is not a picture."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmoe.errors import BadInput

MAX_PIXELS = 50_000_000
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


class _OutOfRange(BadInput):
    """Numbers that are no colours; `told` says it without naming the source."""

    def __init__(self, low: float, high: float, kind: str, top: int) -> None:
        self.told = f"its numbers lie between {low:g} and {high:g}; {kind} of a picture lie between 0 and {top}"
        fix = "array / 255" if 1 < high <= 255 else "scale the array first"
        asked = f"cannot read a picture from numbers between {low:g} and {high:g}"
        super().__init__(asked, f"{kind} of a picture lie between 0 and {top}", fix)


def read_image(source: Any, background: tuple[int, int, int] | None = (255, 255, 255)) -> Image.Image:
    """A picture as RGB; transparency is laid over `background` and the camera's rotation applied.

    Args:
        source: path, PIL image, or array (H, W), (H, W, 3) or (H, W, 4) of integers in [0, 255] or floats in [0, 1].
        background: colour behind what is transparent; None keeps transparency, as RGBA, for a model to lay.

    Raises:
        BadInput: no such file, not a picture, a broken one, one of more than 50 megapixels, or numbers out of range.

    >>> read_image(np.zeros((4, 6, 3), dtype=np.uint8)).size
    (6, 4)
    """
    if isinstance(source, (str, Path)):
        try:
            return _flatten(_open(source), background)
        except _OutOfRange as error:
            fix = "save it with 8 bits per channel"
            raise BadInput(f"cannot read the picture '{source}'", error.told, fix) from error
    if isinstance(source, Image.Image):
        _check_size("cannot read this picture", *source.size)
        return _flatten(source, background)
    if str(getattr(source, "dtype", "")) == "torch.bfloat16":  # numpy does not have it
        source = source.float()
    array = np.asarray(source)
    if array.dtype == object or not array.ndim:
        wrong = "a picture is a path, a PIL image or an array"
        raise BadInput(f"cannot read a picture from {type(source).__name__}", wrong, "model.predict('photo.png')")
    return _flatten(_from_array(array), background)


def as_seen(
    source: Any, resize_mode: str = "shortest", background: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """The square part of a picture that a model gets to see, at full resolution: what its grid of patches covers.

    Args:
        source: as for `read_image`.
        resize_mode: of the model's preprocessing: "shortest" crops the middle, "longest" pads with black, "squash"
            distorts, which leaves the picture as it is here.
        background: as for `read_image`.

    >>> as_seen(np.zeros((40, 60, 3), dtype=np.uint8)).size
    (40, 40)
    """
    image = read_image(source, background)
    if resize_mode == "shortest":
        return ImageOps.fit(image, (min(image.size),) * 2)
    return ImageOps.pad(image, (max(image.size),) * 2) if resize_mode == "longest" else image


def _open(source: str | Path) -> Image.Image:
    path, asked, fix = Path(source).expanduser(), f"cannot read the picture '{source}'", "give a PNG, JPEG or WebP file"
    if "://" in str(source):
        local = str(source).removeprefix("file://")
        fix = f"give its path: {local}" if local != str(source) else f"download it first: wget '{source}'"
        raise BadInput(asked, "it is an address, not a file", fix)
    if not os.path.exists(path):
        raise BadInput(asked, f"no such file (looked in {path.absolute().parent})", fix)
    if path.is_dir():
        raise BadInput(asked, "it is a folder", fix)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            _check_size(asked, *image.size)
            image.load()
            return image.copy()
    except UnidentifiedImageError as error:
        raise BadInput(asked, "it is not a picture in a known format", fix) from error
    except Image.DecompressionBombError as error:
        raise BadInput(asked, str(error), "make it smaller first") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise BadInput(asked, f"the file is damaged: {error}", fix) from error


def _check_size(asked: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        wrong = f"it has {width} x {height} pixels; the limit is {MAX_PIXELS // 10**6} megapixels"
        raise BadInput(asked, wrong, "make it smaller first")


def _from_array(array: np.ndarray) -> Image.Image:
    shape_ok = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not shape_ok or array.size == 0:
        raise BadInput(
            f"cannot read a picture from an array of shape {array.shape}",
            "a picture is (H, W), (H, W, 3) or (H, W, 4)",
            "give a path, a PIL image or such an array",
        )
    _check_size("cannot read a picture from this array", array.shape[1], array.shape[0])
    if array.dtype.kind not in "uifb":
        raise BadInput(
            f"cannot read a picture from an array of {array.dtype}", "it holds no real numbers", "an array of uint8"
        )
    top = 255 if array.dtype.kind in "ui" else 1
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= top):  # also for NaN
        raise _OutOfRange(low, high, "integers" if top == 255 else "floats", top)
    return Image.fromarray((array * (255 / top)).round().astype(np.uint8))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, which Pillow would cut off at 255.

    A file says by its mode when it has 16 bits. Of 32-bit whole numbers ("I"), those up to 255 are taken as 8 bits,
    larger ones as 16.
    """
    grey = np.asarray(image)
    deep = image.mode.startswith("I;16") or (grey.min() >= 0 and 255 < grey.max() < 2**16)
    return _from_array(grey >> 8 if deep else grey)


def _flatten(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    if 0 in image.size:
        raise BadInput("cannot read an empty picture", f"its size is {image.size}", "give a picture with pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    elif image.mode == "F":
        image = _from_array(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if background is None:
            return rgba
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")
    return image.convert("RGB")
