"""The verb `mmoe bench`: layer, scaling, model, families, training, and pictures of what they measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from mmoe.errors import BadInput, BadOverride

app = typer.Typer(help="Time the MoE layer and models of the zoo on this machine.", invoke_without_command=True)


def _can_draw(plot: Path | None) -> Path | None:
    """A picture that cannot be written is told before the work for it."""
    if plot is not None:
        from mmoe.figures import check_figure_path

        check_figure_path(plot)
    return plot


Threads = Annotated[int, typer.Option(min=1, max=512, help="CPU threads.")]
Seconds = Annotated[float, typer.Option(min=0, max=3600, help="About what one candidate of a cell may take.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DType = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
STOPPED = 130


@app.callback()
def both(context: typer.Context) -> None:
    """Time the MoE layer and models of the zoo on this machine.

    \b
    mmoe bench                  a quick look at both
    mmoe bench layer --json     the whole grid, half an hour
    mmoe bench scaling          over experts and over rows
    mmoe bench model clip_moe_tiny --sweep top_k=1,2,4
    mmoe bench gamma            side experts against a plain loop
    mmoe bench adapters         beside a bare vision transformer
    mmoe bench generation       with a cache beside encoding all again
    """
    if context.invoked_subcommand is None:
        layer(quick=True)
        model("clip_moe_tiny")


@app.command()
def layer(
    quick: Annotated[bool, typer.Option("--quick", help="A few cells, within 3 minutes.")] = False,
    cells: Annotated[
        list[str] | None, typer.Option("--cell", metavar="T,D,F,E,K", help="Only this cell; may be repeated.")
    ] = None,
    dtypes: Annotated[
        list[str] | None, typer.Option("--dtype", help="fp32, bf16 or fp16; the first two by default.")
    ] = None,
    seconds: Seconds = 1.0,
    threads: Threads = 2,
    plot: Annotated[Path | None, typer.Option(callback=_can_draw, help="Draw the ratios here.")] = None,
    as_json: Json = False,
) -> None:
    """Time our MoE layer against a dense layer, transformers' blocks and a plain loop.

    All mixtures have the same weights and are shown to agree first. T rows, D width, F inner width of an expert,
    E experts, K per row.

    \b
    mmoe bench layer --quick
    mmoe bench layer --cell 1024,512,256,64,8 --dtype bf16
    mmoe bench layer --json --plot ratios.png > layer.json
    """
    chosen = [_cell(text) for text in cells or []]

    import torch

    from train.bench.layer import GRID, PASSES, QUICK, run, summary
    from zoo.loading import pick_dtype

    for dtype in dtypes or []:
        pick_dtype(dtype)
    torch.set_num_threads(threads)
    cells_, types = chosen or (QUICK if quick else GRID), dtypes or ["fp32", "bf16"]
    found = run(cells_, types, PASSES, min(seconds, 0.2) if quick else seconds)
    timings, complete = _measured("bench layer", found, len(cells_) * len(types) * len(PASSES))
    told = summary(timings)
    if as_json:
        _print_json(timings, threads, complete, summary=told)
    else:
        _show_layer(timings, told, threads)
    if plot is not None:
        from train.bench.pictures import draw_ratios

        draw_ratios(timings, plot)
    if not complete:
        raise typer.Exit(STOPPED)


@app.command()
def scaling(
    dtype: DType = "fp32",
    quick: Annotated[bool, typer.Option("--quick", help="Two points of each curve.")] = False,
    seconds: Seconds = 1.0,
    threads: Threads = 2,
    plot: Annotated[Path | None, typer.Option(callback=_can_draw, help="Draw the curves here.")] = None,
    as_json: Json = False,
) -> None:
    """Time the layer over the number of experts and over the number of rows, with its memory.

    A row always uses 2 experts of the same size, so the active work per row never changes.

    \b
    mmoe bench scaling --plot scaling.png
    mmoe bench scaling --dtype bf16 --json
    """
    import torch

    from train.bench.layer import PASSES, run
    from train.bench.scaling import EXPERTS, NAMES, ROWS, SHORT, growth
    from zoo.loading import pick_dtype

    pick_dtype(dtype)
    torch.set_num_threads(threads)
    cells = SHORT if quick else [*EXPERTS, *ROWS]
    found = run(cells, [dtype], PASSES, seconds, NAMES, memory_rows=0)
    timings, complete = _measured("bench scaling", found, len(cells) * len(PASSES))
    told = growth(timings)
    if as_json:
        _print_json(timings, threads, complete, growth=told)
    else:
        _show_layer(timings, {f"cost from E = 8 to E = 64, {kind}": value for kind, value in told.items()}, threads)
    if plot is not None:
        from train.bench.pictures import draw_scaling

        draw_scaling(timings, plot)
    if not complete:
        raise typer.Exit(STOPPED)


def _print_json(timings: list[Any], threads: int, complete: bool, **told: dict[str, Any]) -> None:
    import torch

    machine = {"threads": threads, "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    cells = [timing.as_dict() for timing in timings]
    print(json.dumps({"machine": machine, "complete": complete, "cells": cells, **told}, indent=1))


def _measured(what: str, found: Iterable[Any], total: int) -> tuple[list[Any], bool]:
    """All timings, or after Ctrl-C those that are there; whether they are all."""
    from train.progress import Progress

    timings: list[Any] = []
    try:
        with Progress(what, total) as bar:
            for timing in found:
                timings.append(timing)
                bar.update(len(timings))
    except KeyboardInterrupt:
        if not timings:
            raise
        typer.echo(f"stopped: {len(timings)} of {total} measurements follow", err=True)
    return timings, len(timings) == total


def _cell(text: str) -> Any:
    try:
        sizes = [int(part) for part in text.split(",")]
        if len(sizes) != 5 or min(sizes) < 1:
            raise ValueError
    except ValueError as error:
        wrong = "a cell is five whole numbers: rows, width, inner width, experts, experts per row"
        raise BadInput(f"no cell {text!r}", wrong, "--cell 1024,512,256,64,8") from error
    if sizes[1] % 8 or sizes[2] % 8:
        raise BadInput(f"no cell {text!r}", "grouped products want widths that 8 divides", "--cell 1024,512,256,64,8")
    from train.bench.peers import Cell

    return Cell(*sizes)


def _show_layer(timings: list[Any], medians: dict[str, float | None], threads: int) -> None:
    from train.bench.peers import LIMIT, OURS
    from zoo.table import columns

    for dtype in dict.fromkeys(timing.dtype for timing in timings):
        for kind in dict.fromkeys(timing.kind for timing in timings):
            found = [t for t in timings if (t.dtype, t.kind) == (dtype, kind)]
            numbers = [(t.ms[LIMIT], t.ms[OURS], t.speed(OURS, LIMIT), t.speed(OURS, t.best_peer)) for t in found]
            rows = [
                [str(t.cell), *(f"{number:.2f}" for number in told), t.best_peer]
                for t, told in zip(found, numbers, strict=True)
            ]
            header = ["T, D, F, E, K", "dense ms", "mmoe ms", "to dense", "to peer", "best peer"]
            typer.echo(f"MoE layer, {kind}, {dtype}, {threads} thread{'s' * (threads > 1)}")
            typer.echo(columns(header, rows, right={1, 2, 3, 4}) + "\n")
    typer.echo("To dense, to peer: how many times as fast; dense has the same active work.")
    for name, value in medians.items():
        if value is not None:
            typer.echo(f"  {name}: {value:.2f}")


@app.command()
def model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name, or a folder that a model was saved in.")],
    dtype: DType = "fp32",
    sweep: Annotated[
        str | None, typer.Option(metavar="KEY=A,B,C", help="Measure with each value of an option of the config.")
    ] = None,
    threads: Threads = 2,
    plot: Annotated[Path | None, typer.Option(callback=_can_draw, help="Draw the sweep here.")] = None,
    as_json: Json = False,
) -> None:
    """Time a model: latency, throughput, memory, parameters and FLOPs beside its dense twin.

    \b
    mmoe bench model clip_moe_tiny
    mmoe bench model clip_moe_tiny --sweep top_k=1,2,4 --plot sweep.png
    """
    key, values = _sweep(sweep)
    if plot is not None and not key:
        raise BadOverride("--plot without --sweep", "there is one point to draw", "--sweep top_k=1,2,4")
    from zoo.loading import pick_dtype

    pick_dtype(dtype)
    import torch

    from train.bench.model import measure

    torch.set_num_threads(threads)
    rows = [measure(name, dtype, {key: value} if key else {}) for value in values]
    if as_json:
        print(json.dumps({"threads": threads, "models": rows}, indent=1))
    else:
        _show_model(rows, key, threads)
    if plot is not None:
        from train.bench.pictures import draw_sweep

        draw_sweep(rows, key, plot)


@app.command()
def gamma(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model of the family gamma.")] = "gamma_vit_b16",
    batch: Annotated[int, typer.Option(min=1, help="Crops in a batch.")] = 4,
    dtype: DType = "fp32",
    seconds: Seconds = 20.0,
    threads: Threads = 2,
    as_json: Json = False,
) -> None:
    """Time Gamma's image tower beside the same tower with a plain loop over the experts.

    \b
    mmoe bench gamma
    mmoe bench gamma --batch 16 --dtype bf16
    """
    from zoo.loading import pick_dtype

    pick_dtype(dtype)
    import torch

    from train.bench.gamma import LOOP, OURS, measure

    torch.set_num_threads(threads)
    found = measure(name, batch, dtype, seconds)
    if as_json:
        print(json.dumps({"threads": threads, **found}, indent=1))
        return
    print(f"{name}, image tower, {batch} crops, {dtype}, {threads} thread{'s' * (threads > 1)}")
    for kind in ("forward", "forward + backward"):
        ours, loop, ratio = (found[kind][key] for key in (f"{OURS}_ms", f"{LOOP}_ms", "ratio"))
        print(f"  {kind}: {ours:.1f} ms, loop over experts {loop:.1f} ms, ratio {ratio:.2f}")


@app.command()
def generation(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are written.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Blocks of the language model.")] = 30,
    experts: Annotated[int, typer.Option(min=1, help="Experts in each block.")] = 4,
    threads: Threads = 2,
    as_json: Json = False,
) -> None:
    """Time Uni-MoE's generation with a cache beside encoding everything again at every step.

    \b
    mmoe bench generation
    mmoe bench generation --tokens 16 --layers 4
    """
    import torch

    from train.bench.generation import measure

    torch.set_num_threads(threads)
    found = measure(tokens, layers, experts)
    if as_json:
        print(json.dumps({"threads": threads, **found}, indent=1))
        return
    print(f"{tokens} tokens after a picture and 30 s of speech, {threads} thread{'s' * (threads > 1)}")
    print(f"  with a cache {found['cached_s']:.2f} s, encoding all again {found['re-encoding_s']:.2f} s")
    print(f"ratio {found['ratio']:.2f}")


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A bundled recipe or a file; its first stage is run.")
    ] = "clip_moe_router",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Options to change.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of a turn.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each loop.")] = 5,
    threads: Threads = 2,
    as_json: Json = False,
) -> None:
    """Time the training engine beside a bare PyTorch loop on the same model and data.

    \b
    mmoe bench train
    mmoe bench train clip_moe_router tune.method=full
    """
    from train.recipe import Recipe

    loaded = Recipe.load(recipe, "optim.name=adamw", "optim.muon_lr=null", "run.accumulate=1", *overrides or [])
    import torch

    from train.bench.training import measure

    torch.set_num_threads(threads)
    found = {"recipe": loaded.name, "steps": steps, "rounds": rounds, "threads": threads}
    measured = measure(loaded, steps, rounds)
    if as_json:
        print(json.dumps({**found, **measured}, indent=1))
        return
    print(f"{loaded.name}: a step takes {measured['engine_ms']:.1f} ms, in a bare loop {measured['bare_ms']:.1f} ms")
    print(f"ratio {measured['ratio']:.3f}, the median of {rounds} turns of {steps} steps")


@app.command()
def adapters(
    width: Annotated[int, typer.Option(min=64, help="Of the vision transformer.")] = 384,
    depth: Annotated[int, typer.Option(min=4, help="Blocks.")] = 12,
    size: Annotated[int, typer.Option(min=16, help="Side of the pictures in pixels, a multiple of 16.")] = 224,
    batch: Annotated[int, typer.Option(min=1, help="Pictures.")] = 4,
    seconds: Seconds = 3.0,
    threads: Threads = 2,
    as_json: Json = False,
) -> None:
    """Time Earth-Adapter's adapters beside the bare backbone.

    \b
    mmoe bench adapters
    mmoe bench adapters --width 1024 --depth 24 --size 512 --batch 1
    """
    import torch

    from train.bench.adapters import measure
    from zoo.table import columns

    torch.set_num_threads(threads)
    found = measure(width=width, depth=depth, size=size, batch=batch, seconds=seconds)
    if as_json:
        print(json.dumps({"threads": threads, **found}, indent=1))
        return
    header = ["adapters", "parameters", "forward, ms", "ratio", "step, ms", "ratio", "FLOPs ratio"]
    keys = ("forward_ms", "forward_ratio", "step_ms", "step_ratio", "flops_ratio")
    rows = [
        [row["name"], f"{row['parameters']:,}", *(f"{row[key]:.{1 if 'ms' in key else 3}f}" for key in keys)]
        for row in found["rows"]
    ]
    typer.echo(f"width {width}, {depth} blocks, {batch} x {size} px, fp32, {threads} thread{'s' * (threads > 1)}")
    typer.echo(columns(header, rows, right=range(1, len(header))))


def _sweep(text: str | None) -> tuple[str, list[Any]]:
    """Option and values; one empty run without a sweep."""
    if text is None:
        return "", [None]
    from zoo.cli import parse_settings

    key, equals, values = text.partition("=")
    if not equals or not values:
        raise BadInput(f"no sweep {text!r}", "a sweep is an option and its values", "--sweep top_k=1,2,4")
    return key, [parse_settings([f"{key}={value}"])[key] for value in values.split(",")]


def _show_model(rows: list[dict[str, Any]], key: str, threads: int) -> None:
    from zoo.table import columns, short

    for what in ("image", "text"):
        table = [
            [f"{row.get(key, '')}"] * bool(key)
            + [f"{short(row['params']['active'])} / {short(row['params']['total'])}"]
            + [f"{row[what]['latency_ms']:.2f}", f"{row[what]['per_second']:,.0f}", f"{row[what]['peak_mb'] or 0:.0f}"]
            + [f"{row[what]['mflops']:,.1f}", f"{row[what].get('mflops_dense_twin', '-')}"]
            for row in rows
            if what in row
        ]
        if table:
            header = [key] * bool(key) + ["active / total", "one, ms", f"{what}s/s", "peak MB", "MFLOPs", "dense twin"]
            typer.echo(f"{rows[0]['name']}, {what}s, {rows[0]['dtype']}, {threads} thread{'s' * (threads > 1)}")
            typer.echo(columns(header, table, right=range(1, len(header))) + "\n")
