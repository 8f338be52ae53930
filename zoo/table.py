"""Plain tables for the command line: aligned columns that a terminal, a file and a pipe show alike."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch import Tensor


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

    A number with a partner named "... sd" is shown with it; shares are shown in percent. A heading says where the
    numbers are from and how they are shown, where that is not as before.

    >>> row = {"data": "d", "model": "a", "total": 3000, "active": 2000, "R@1": 0.5, "R@1 sd": 0.01}
    >>> print(*metric_tables([{**row, "provenance": "ours", "command": "c"}])[0], sep="\\n")
    d; ours, in %, mean ± standard deviation: c
    model  active / total  R@1
    a      2.00k / 3.00k   50.0±1.0
    """
    tables, said = [], ""
    for (data, provenance, command), group in groupby(
        metrics, lambda m: (m["data"], m["provenance"], m.get("command"))
    ):
        rows = list(group)
        about = {"data", "model", "total", "active", "trained", "seeds", "provenance", "command"}
        keys = [key for key in rows[0] if key not in about and not key.endswith(" sd")]
        sizes = ["active / total"] if "total" in rows[0] else []
        sizes += ["trained"] if "trained" in rows[0] else []
        cells = [[str(row.get("model", "")), *(_value(row, key) for key in [*sizes, *keys])] for row in rows]
        seeds = f", seeds {', '.join(map(str, rows[0]['seeds']))}" if rows[0].get("seeds") else ""
        source = f"{provenance}{seeds}{_units(rows, keys)}" + (f": {command}" if command else "")
        heading = data if source == said else f"{data}; {source}"
        tables.append((heading, columns(["model", *sizes, *keys], cells)))
        said = source
    return tables


def _units(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """How the numbers of a table are shown."""
    shares = any(_is_share(row.get(key)) for row in rows for key in keys)
    spread = any(f"{key} sd" in row for row in rows for key in keys)
    return (", in %" if shares else "") + (", mean ± standard deviation" if spread else "")


def _is_share(value: Any) -> TypeGuard[float]:
    return isinstance(value, float) and 0 <= value <= 1


def _value(row: Mapping[str, Any], key: str) -> str:
    if key == "active / total":
        return f"{short(row['active'])} / {short(row['total'])}"
    if key == "trained":
        return short(row[key])
    value, spread = row.get(key), row.get(f"{key} sd")
    if not _is_share(value):
        return str(value)
    return f"{100 * value:.1f}" + ("" if spread is None else f"±{100 * spread:.1f}")


def routing_table(routing: Mapping[str, Any]) -> tuple[str, str]:
    """Measured use of the experts, as a heading and a table with a row per layer.

    >>> layer = {"layer": "block.0", "max_over_mean": 1.2, "dead": [], "entropy": 0.9, "load": [0.4, 0.6]}
    >>> print(*routing_table({"data": "d", "command": "c", "layers": [layer]}), sep="\\n")
    use of the experts on d: c
    layer    max/mean load  unused  entropy, nats  share of each expert in %
    block.0           1.20  none             0.90  40.0  60.0
    """
    rows = [
        [
            row["layer"],
            f"{row['max_over_mean']:.2f}",
            ", ".join(map(str, row["dead"])) or "none",
            f"{row['entropy']:.2f}",
            "  ".join(f"{100 * share:4.1f}" for share in row.get("use", row["load"])),
        ]
        for row in routing.get("layers", ())
    ]
    heading = (
        f"use of the experts on {routing.get('data', 'unknown data')}: {routing.get('command', 'unknown command')}"
    )
    header = ["layer", "max/mean load", "unused", "entropy, nats", "share of each expert in %"]
    return heading, columns(header, rows, right={1, 3})


def most_probable(labels: Sequence[str], probs: Tensor, k: int, picture: int) -> list[tuple[str, float]]:
    """The k most probable labels of one picture, of probabilities (pictures, labels).

    Raises:
        BadOverride: k is below 1, or there is no such picture.

    >>> import torch
    >>> most_probable(["fox", "dog"], torch.tensor([[0.25, 0.75]]), 1, 0)
    [('dog', 0.75)]
    """
    from mmoe.options import check_int

    check_int("k", k, 1)
    check_int("picture", picture, 0, len(probs) - 1)
    best = probs[picture].topk(min(k, len(labels)))
    return [(labels[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def shorten(text: str, width: int = 60) -> str:
    """A text on one line of at most `width` signs.

    >>> shorten("a fox that jumps", 8)
    'a fox t…'
    """
    line = "".join(sign if sign.isprintable() else " " for sign in " ".join(text.split()))
    return line if len(line) <= width else f"{line[: width - 1]}…"


def short(count: int) -> str:
    """A count of parameters in three digits.

    >>> short(1202429441), short(5417985), short(950)
    ('1.20B', '5.42M', '950')
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}" if count >= 100 * size else f"{count / size:#.3g}{unit}"
    return str(count)
