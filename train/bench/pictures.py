"""Pictures of measurements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe.figures import save_figure
from train.bench import scaling
from train.bench.layer import PASSES, Timing
from train.bench.peers import LIMIT, NAIVE, OURS, PRODUCTS, THEIRS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOP = 1.6  # of the axes of ratios; what is above lies on the edge: dense layers that wait for memory are far slower
KINDS = list(PASSES)
LINES = {
    LIMIT: ("#333333", "D", "dense layer of the same active work"),
    OURS: ("#0072B2", "o", "mmoe"),
    f"{THEIRS} grouped_mm": ("#D55E00", "s", "transformers, grouped_mm"),
    f"{THEIRS} eager": ("#E69F00", "^", "transformers, eager"),
    NAIVE: ("#7F7F7F", "x", "plain loop"),
    PRODUCTS: ("#BBBBBB", ".", "the mixture's products alone"),
}


def draw_ratios(timings: list[Timing], path: Path) -> Path:
    """Speed relative to the dense layer over the number of rows, a panel for each size, type and pass."""
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(str(t.cell).partition(", ")[2] for t in timings))
    kinds = list(dict.fromkeys((t.dtype, t.kind) for t in timings))
    figure = Figure(figsize=(max(3.4 * len(sizes), 5.5), 2.5 * len(kinds) + 1.0), layout="constrained")
    axes = figure.subplots(len(kinds), len(sizes), squeeze=False, sharex=True, sharey=True)
    for row, (dtype, kind) in enumerate(kinds):
        for column, size in enumerate(sizes):
            panel = axes[row][column]
            found = [t for t in timings if (t.dtype, t.kind) == (dtype, kind) and str(t.cell).endswith(f", {size}")]
            for name, (color, marker, label) in LINES.items():
                points = [(t.cell.rows, t.speed(name, LIMIT)) for t in found if name in t.ms and name != LIMIT]
                if not points:
                    continue
                shown = [(rows, min(speed, TOP)) for rows, speed in points]
                panel.plot(
                    *zip(*shown, strict=True), color=color, marker=marker, markersize=4, label=label, clip_on=False
                )
            panel.axhline(1, color="#333333", linewidth=0.8, linestyle=(0, (4, 3)))
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:g}")
            panel.set_ylim(0, TOP)
            panel.spines[["top", "right"]].set_visible(False)
            if row == 0:
                panel.set_title(f"D, F, E, K = {size}", fontsize=9)
            if column == 0:
                panel.set_ylabel(f"{kind}, {dtype}\nspeed / dense, up to {TOP}", fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("rows T", fontsize=8)
    _add_legend(figure, axes[0][0])
    return save_figure(figure, path)


def _add_legend(figure: Figure, panel: Any) -> None:
    """Below all panels, in as many columns as there is room for."""
    handles, labels = panel.get_legend_handles_labels()
    columns = max(1, int(figure.get_figwidth() // 2.7))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def draw_scaling(timings: list[Timing], path: Path) -> Path:
    """Time per row over experts and over rows for both passes, and peak memory."""
    from matplotlib.figure import Figure

    rows, experts = scaling.EXPERTS[0].rows, scaling.ROWS[0].num_experts
    by_experts = [timing for timing in timings if timing.cell.rows == rows]
    by_rows = [timing for timing in timings if timing.cell.num_experts == experts]
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots(2, 3, sharex="row")
    for line, (found, name) in enumerate(((by_experts, "num_experts"), (by_rows, "rows"))):
        where = f"T = {rows}" if line == 0 else f"E = {experts}"
        for column, kind in enumerate(PASSES):
            _draw_costs(axes[line][column], [t for t in found if t.kind == kind], name, lambda t: t.ms, per_row=True)
            axes[line][column].set_title(f"{kind}, {where}", fontsize=10)
            axes[line][column].set_ylabel("µs per row")
        memory = axes[line][2]
        _draw_costs(memory, [t for t in found if t.kind == KINDS[-1] and t.peak_mb], name, lambda t: t.peak_mb)
        memory.set_title(f"peak memory of both passes, {where}", fontsize=10)
        memory.set_ylabel("MB")
        memory.set_ylim(bottom=0)
        for panel in axes[line]:
            panel.set_xlabel("experts E" if line == 0 else "rows T")
    _add_legend(figure, axes[0][0])
    return save_figure(figure, path)


def _draw_costs(
    panel: Any, timings: list[Timing], name: str, costs: Callable[[Timing], dict[str, float]], per_row: bool = False
) -> None:
    for candidate, (color, marker, label) in LINES.items():
        points = [
            (getattr(t.cell, name), costs(t)[candidate] * (1e3 / t.cell.rows if per_row else 1))
            for t in sorted(timings, key=lambda t: getattr(t.cell, name))
            if candidate in costs(t)
        ]
        if points:
            panel.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, label=label)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    if per_row:
        panel.set_ylim(bottom=0)
    panel.spines[["top", "right"]].set_visible(False)


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
