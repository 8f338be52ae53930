"""Reads pictures from paths, arrays and PIL, with one clear error for whatever is not a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmoe.errors import BadInput

MAX_PIXELS = 50_000_000


def read_image(source: Any, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """A picture as RGB; transparency is laid over `background` and the camera's rotation applied.

    Args:
        source: path, PIL image, or array (H, W), (H, W, 3) or (H, W, 4) of uint8 or of floats in [0, 1].

    Raises:
        BadInput: no such file, not a picture, a broken one, or one of more than 50 megapixels.

    >>> read_image(np.zeros((4, 6, 3), dtype=np.uint8)).size
    (6, 4)
    """
    if isinstance(source, (str, Path)):
        return _flatten(_open(Path(source)), background)
    if isinstance(source, Image.Image):
        return _flatten(source, background)
    return _flatten(_from_array(np.asarray(source)), background)


def _open(path: Path) -> Image.Image:
    asked, fix = f"cannot read the picture '{path}'", "give a PNG, JPEG or WebP file"
    if not path.exists():
        raise BadInput(asked, f"no such file (looked in {path.absolute().parent})", fix)
    if path.is_dir():
        raise BadInput(asked, "it is a folder", fix)
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise BadInput(asked, f"it has {size} pixels; the limit is {MAX_PIXELS // 10**6} megapixels", fix)
            image.load()
            return image.copy()
    except UnidentifiedImageError as error:
        raise BadInput(asked, "it is not a picture in a known format", fix) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(asked, f"the file is damaged: {error}", fix) from error


def _from_array(array: np.ndarray) -> Image.Image:
    shape_ok = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not shape_ok or array.size == 0:
        raise BadInput(
            f"cannot read a picture from an array of shape {array.shape}",
            "a picture is (H, W), (H, W, 3) or (H, W, 4)",
            "give a path, a PIL image or such an array",
        )
    if array.dtype != np.uint8:
        array = (np.clip(array.astype(np.float64), 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(array)


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")
    return image.convert("RGB")
