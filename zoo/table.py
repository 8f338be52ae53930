"""Plain tables for the command line: aligned columns that a terminal, a file and a pipe show alike."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Rows under a header, two spaces between columns; wide characters count twice.

    >>> print(columns(["name", "size"], [["a", "1"], ["bcdef", "2"]]))
    name   size
    a      1
    bcdef  2
    """
    widths = [max(map(_width, column)) for column in zip(header, *rows, strict=True)]
    aligned = frozenset(right)

    def line(cells: Sequence[str]) -> str:
        padded = [
            " " * (width - _width(cell)) + cell if i in aligned else cell + " " * (width - _width(cell))
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, [header, *rows]))


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def short(count: int) -> str:
    """A count of parameters in three digits.

    >>> short(1202429441), short(5417985), short(950)
    ('1.20B', '5.42M', '950')
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}" if count >= 100 * size else f"{count / size:#.3g}{unit}"
    return str(count)
