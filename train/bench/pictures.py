"""Pictures of measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmoe.figures import save_figure
from train.bench.layer import Timing
from train.bench.peers import LIMIT, NAIVE, OURS, THEIRS

LINES = {
    OURS: ("#0072B2", "o", "mmoe"),
    f"{THEIRS} grouped_mm": ("#D55E00", "s", "transformers, grouped_mm"),
    f"{THEIRS} eager": ("#E69F00", "^", "transformers, eager"),
    NAIVE: ("#7F7F7F", "x", "plain loop"),
}


def draw_ratios(timings: list[Timing], path: Path) -> Path:
    """Speed relative to the dense layer over the number of rows, a panel for each size, type and pass."""
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(str(t.cell).partition(", ")[2] for t in timings))
    kinds = list(dict.fromkeys((t.dtype, t.kind) for t in timings))
    figure = Figure(figsize=(3.4 * len(sizes), 2.5 * len(kinds) + 0.6), layout="constrained")
    axes = figure.subplots(len(kinds), len(sizes), squeeze=False, sharex=True, sharey=True)
    for row, (dtype, kind) in enumerate(kinds):
        for column, size in enumerate(sizes):
            panel = axes[row][column]
            found = [t for t in timings if (t.dtype, t.kind) == (dtype, kind) and str(t.cell).endswith(f", {size}")]
            for name, (color, marker, label) in LINES.items():
                points = [(t.cell.rows, t.speed(name, LIMIT)) for t in found if name in t.ms]
                panel.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, label=label)
            panel.axhline(1, color="#333333", linewidth=0.8, linestyle=(0, (4, 3)))
            panel.set_xscale("log", base=2)
            panel.set_ylim(0, 1.25)
            panel.spines[["top", "right"]].set_visible(False)
            if row == 0:
                panel.set_title(f"D, F, E, K = {size}", fontsize=9)
            if column == 0:
                panel.set_ylabel(f"{kind}, {dtype}\nspeed / dense", fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("rows T", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(LINES), frameon=False, fontsize=9)
    return save_figure(figure, path)


def draw_sweep(rows: list[dict[str, Any]], key: str, path: Path) -> Path:
    """Throughput and FLOPs over the values of an option."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    places, values = range(len(rows)), [str(row[key]) for row in rows]
    for what, color, marker in (("image", "#0072B2", "o"), ("text", "#D55E00", "s")):
        if what in rows[0]:
            left.plot(places, [row[what]["per_second"] for row in rows], color=color, marker=marker, label=f"{what}s")
            right.plot(places, [row[what]["mflops"] for row in rows], color=color, marker=marker, label=f"{what}s")
    for panel, title in ((left, "per second"), (right, "MFLOPs each")):
        panel.set_title(title, fontsize=10)
        panel.set_xticks(places, values)
        panel.set_xlabel(key)
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=9)
    return save_figure(figure, path)
