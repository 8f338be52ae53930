"""Pristine pictures out of packages: photographs, drawings and textures, with their sources, authors and licences.

The list is assets/data/photos/photos.csv; no picture is in the repository. Those of scikit-image and scikit-learn are
read where these are installed, the others come from Debian's wallpapers (`zoo.packages`). Shapes: S side in pixels.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageOps

from zoo.assets import asset
from zoo.images import read_image
from zoo.packages import PackagedFile, find

SCENES = ("natural", "rendered", "texture")


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One picture.

    Attributes:
        id: its name.
        scene: "natural" (photographs), "rendered" (drawn or computed) or "texture" (surfaces, scientific pictures).
        colour: it is not only grey.
        file: where it comes from.
        author, licence: as the package tells them.
    """

    id: str
    scene: str
    colour: bool
    file: PackagedFile
    author: str
    licence: str


@cache
def photos(only_packaged: bool = False) -> tuple[Photo, ...]:
    """All pictures of the list, in its order.

    Args:
        only_packaged: those of Python packages alone.

    Example:
        >>> len(photos()), [photo.id for photo in photos(only_packaged=True)][:3]
        (87, ['astronaut', 'cameraman', 'chelsea'])
    """
    with (asset("data/photos") / "photos.csv").open(encoding="utf-8", newline="") as table:
        found = [
            Photo(
                id=row["id"],
                scene=row["scene"],
                colour=row["colour"] == "yes",
                file=PackagedFile(source=row["source"], sha256=row["sha256"]),
                author=row["author"],
                licence=row["licence"],
            )
            for row in csv.DictReader(table)
        ]
    return tuple(photo for photo in found if photo.file.source.startswith("pypi:") or not only_packaged)


def open_photo(photo: Photo, size: int, fix: str) -> Image.Image:
    """The square middle of a picture, brought to a side by Lanczos' filter, (S, S) RGB.

    Downsizing leaves nothing of the compression that most of the pictures went through.

    Args:
        photo: of the list.
        size: side in pixels.
        fix: command that fetches it, for the error.

    Raises:
        BadInput: it is not on this machine.
    """
    return ImageOps.fit(read_image(find(photo.file, fix=fix)), (size, size), Image.Resampling.LANCZOS)
