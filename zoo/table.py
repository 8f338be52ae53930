"""Plain tables for the command line: aligned columns that a terminal, a file and a pipe show alike."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any


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


def metric_tables(metrics: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Metrics of a card that share their data, as a heading and a table each.

    A number with a partner named "... sd" is shown with it; shares are shown in percent.

    >>> rows = [{"data": "d", "model": "a", "R@1": 0.5, "R@1 sd": 0.01, "provenance": "ours", "command": "c"}]
    >>> print(*metric_tables(rows)[0], sep="\\n")
    d; ours: c
    model  R@1
    a      50.0±1.0
    """
    tables = []
    for (data, provenance, command), group in groupby(metrics, lambda m: (m["data"], m["provenance"], m["command"])):
        rows = list(group)
        about = {"data", "model", "total", "active", "seeds", "provenance", "command"}
        keys = [key for key in rows[0] if key not in about and not key.endswith(" sd")]
        cells = [[str(row.get("model", "")), *(_value(row, key) for key in keys)] for row in rows]
        seeds = f", seeds {', '.join(map(str, rows[0]['seeds']))}" if rows[0].get("seeds") else ""
        tables.append((f"{data}; {provenance}{seeds}: {command}", columns(["model", *keys], cells)))
    return tables


def _value(row: Mapping[str, Any], key: str) -> str:
    value, spread = row.get(key), row.get(f"{key} sd")
    if not isinstance(value, float) or not 0 <= value <= 1:
        return str(value)
    return f"{100 * value:.1f}" + ("" if spread is None else f"±{100 * spread:.1f}")


def short(count: int) -> str:
    """A count of parameters in three digits.

    >>> short(1202429441), short(5417985), short(950)
    ('1.20B', '5.42M', '950')
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}" if count >= 100 * size else f"{count / size:#.3g}{unit}"
    return str(count)
