"""Plain tables for the command line: aligned columns that a terminal, a file and a pipe show alike."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

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
    """Metrics of a card as a heading and a table each: rows that share their data, with a line for each model.

    Many parts of one data set with few models each are one table, with a line for each part. A number with a partner
    named "... sd" is shown with it; shares are shown in percent, correlations as they are. A heading says where the
    numbers are from and how they are shown, where that is not as before.

    >>> row = {"data": "d", "model": "a", "total": 3000, "active": 2000, "R@1": 0.5, "R@1 sd": 0.01}
    >>> print(*metric_tables([{**row, "provenance": "ours", "command": "c"}])[0], sep="\\n")
    d; ours, in %, mean ± standard deviation: c
    model  active / total  R@1
    a      2.00k / 3.00k   50.0±1.0
    >>> parts = [{"data": f"d: {part}", "model": "a", "SRCC": 0.5, "provenance": "ours"} for part in ("blur", "noise")]
    >>> print(*metric_tables(parts)[0], sep="\\n")
    d; ours
    part   SRCC a
    blur   0.500
    noise  0.500
    """
    by_data = groupby(metrics, lambda m: (m["data"], m["provenance"], m.get("command")))
    tables, said = [], ""
    for _, alike in groupby([list(rows) for _, rows in by_data], _outline):
        groups = list(alike)
        turned = len(groups) > len(groups[0])
        for rows in [[row for group in groups for row in group]] if turned else groups:
            keys, source = _metrics(rows[0]), _source(rows)
            data = rows[0]["data"].partition(": ")[0] if turned else rows[0]["data"]
            heading = data if source == said else f"{data}; {source}"
            tables.append((heading, _by_part(groups, keys) if turned else _by_model(rows, keys)))
            said = source
    return tables


def _outline(rows: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """What tables have to share to be parts of one: the data set, the models, the metrics and where they are from."""
    data, _, part = rows[0]["data"].partition(": ")
    return (data, bool(part), [row.get("model") for row in rows], _metrics(rows[0]), _source(rows))


def _metrics(row: Mapping[str, Any]) -> list[str]:
    about = {"data", "model", "total", "active", "trained", "seeds", "provenance", "command"}
    return [key for key in row if key not in about and not key.endswith(" sd")]


def _source(rows: Sequence[Mapping[str, Any]]) -> str:
    seeds = f", seeds {', '.join(map(str, rows[0]['seeds']))}" if rows[0].get("seeds") else ""
    command = rows[0].get("command")
    return f"{rows[0]['provenance']}{seeds}{_units(rows, _metrics(rows[0]))}" + (f": {command}" if command else "")


def _by_model(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    sizes = ["active / total"] if "total" in rows[0] else []
    sizes += ["trained"] if "trained" in rows[0] else []
    cells = [[str(row.get("model", "")), *(_value(row, key) for key in [*sizes, *keys])] for row in rows]
    return columns(["model", *sizes, *keys], cells)


def _by_part(groups: Sequence[Sequence[Mapping[str, Any]]], keys: Sequence[str]) -> str:
    header = [f"{key} {row.get('model', '')}" for key in keys for row in groups[0]]
    cells = [
        [rows[0]["data"].partition(": ")[2], *(_value(row, key) for key in keys for row in rows)] for rows in groups
    ]
    return columns(["part", *header], cells)


def _units(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """How the numbers of a table are shown."""
    shares = any(_is_share(key, row.get(key)) for row in rows for key in keys)
    spread = any(f"{key} sd" in row for row in rows for key in keys)
    told = ("shares in %" if any(map(_is_correlation, keys)) else "in %") if shares else ""
    return (f", {told}" if told else "") + (", mean ± standard deviation" if spread else "")


def _is_correlation(key: str) -> bool:
    return key.startswith(("SRCC", "PLCC", "KRCC"))


def _is_share(key: str, value: Any) -> bool:
    return isinstance(value, float) and 0 <= value <= 1 and not _is_correlation(key)


def _value(row: Mapping[str, Any], key: str) -> str:
    if key == "active / total":
        return f"{short(row['active'])} / {short(row['total'])}"
    if key == "trained":
        return short(row[key])
    value, spread = row.get(key), row.get(f"{key} sd")
    if not isinstance(value, float) or not (_is_share(key, value) or _is_correlation(key)):
        return str(value)
    factor, decimals = (1, 3) if _is_correlation(key) else (100, 1)
    return f"{factor * value:.{decimals}f}" + ("" if spread is None else f"±{factor * spread:.{decimals}f}")


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
