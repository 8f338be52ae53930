"""Pictures that pages offer as tiles: bundled drawings, and photographs of packages that are on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image, ImageOps

from demos import look
from demos.family import Shell, keep, message_area
from demos.store import Note
from mmoe.errors import BadInput
from train.data.photos import photos
from zoo.assets import asset
from zoo.images import read_image
from zoo.packages import find_local

SIDE = 768  # of offered pictures at the most, in pixels
_TILE = (64, 64)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One picture, or something else that can be shown as one, to try a model with.

    Attributes:
        id: what it is called in the API.
        name: what visitors read.
        read: opens it.
        mark: short remark on its tile.
        drawn: the picture of its tile; itself when None.
    """

    id: str
    name: str
    read: Callable[[], Any]
    mark: str = ""
    drawn: Callable[[], Image.Image] | None = None


def bundled(folder: str) -> list[Example]:
    """Those of a folder of the assets: drawings in "examples", pictures of the earth in "places".

    >>> bundled("examples")[0].id, len(bundled("places"))
    ('example/airplane', 8)
    """
    return [
        Example(
            id=f"{folder.removesuffix('s')}/{file.stem}",
            name=file.stem.replace("_", " "),
            read=partial(read_image, file, None),
            drawn=partial(read_image, file),
        )
        for file in sorted(asset(folder).glob("*.png"))
    ]


def photographs() -> list[Example]:
    """Those of scikit-image and scikit-learn that are on this machine."""
    found = [(photo, find_local(photo.file)) for photo in photos(only_packaged=True)]
    return [
        Example(id=f"photo/{photo.id}", name=photo.id.replace("_", " "), read=partial(_smaller, path))
        for photo, path in found
        if path is not None
    ]


def _smaller(path: Any) -> Image.Image:
    picture = read_image(path)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return picture


def chooser(
    shell: Shell, family: str, offered: Sequence[Example], *targets: gr.components.Component, what: str = "picture"
) -> None:
    """Draws the tiles of some examples; one that is pressed becomes the value of an input, or of several.

    Args:
        shell: of the page.
        family: its name, which the endpoint begins with.
        offered: the examples.
        targets: the inputs; the first one's id is the family's name, "-" and `what`.
        what: they are.
    """
    by_id = {one.id: one for one in offered}

    def pick(note: Note, choice: Any) -> Any:
        """An example by the id of its tile."""
        if str(choice) not in by_id:
            wrong = f"ids are such as {', '.join(list(by_id)[:3])}" if by_id else "none is offered here"
            raise BadInput(f"there is no {what} {look.quoted(str(choice))}", wrong, "upload one")
        return by_id[str(choice)].read()

    message = message_area()
    name = "chooser" if what == "picture" else f"{what}-chooser"
    shown = {"size": 42, "elem_id": f"{family}-{name}", "elem_classes": "short-list"}
    grid = look.tiles([_tile(one) for one in offered], label=f"{what.capitalize()}s to pick", **shown)
    picked = shell.on(
        grid.select,
        pick,
        [grid],
        list(targets),
        api_name=f"{family}_pick" if what == "picture" else f"{family}_pick_{what}",
        names=["choice"],
        message=message,
        blank=keep,
        heavy=False,
        show_progress="hidden",
    )
    picked.then(None, js=look.scroll_to(f"{family}-{what}"), api_visibility="private")


def _tile(one: Example) -> dict[str, str]:
    small = ImageOps.fit((one.drawn or one.read)(), _TILE, Image.Resampling.LANCZOS)
    return {"id": one.id, "name": one.name, "src": look.data_url(small, lossless=False), "note": "", "mark": one.mark}
