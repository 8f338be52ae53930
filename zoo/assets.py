"""Finds the files that come with the project: inside the installed package, or beside the checkout."""

from __future__ import annotations

from pathlib import Path

from mmoe.errors import BadInput

_PLACES = (Path(__file__).parent / "_assets", Path(__file__).parent.parent / "assets")


def asset(name: str) -> Path:
    """Path of a bundled file or folder.

    Args:
        name: path below the assets, such as "examples/fox.png".

    Raises:
        BadInput: it is in neither place.

    >>> asset("examples/fox.png").name
    'fox.png'
    """
    for place in _PLACES:
        if (place / name).exists():
            return place / name
    raise BadInput(
        f"no bundled file {name!r}",
        "looked in " + " and ".join(str(place) for place in _PLACES),
        "pip install --force-reinstall mmoe",
    )
