"""`mmoe bench layer`: all candidates of a cell take turns in one process, after they were shown to agree.

A machine whose speed drifts hits all of them alike, so ratios are what to read: to the limit, a dense layer with the
same active work, and to the best peer. 1 is as fast; 2 twice as fast.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmoe import memory
from mmoe.errors import MmoeError
from train.bench.peers import LIMIT, OURS, PRODUCTS, THEIRS, Cell, Layer, layers, products

SIZES = ((512, 1024, 8, 2), (512, 256, 64, 8), (768, 3072, 4, 2), (1024, 512, 128, 8))
ROWS = (1, 8, 32, 256, 1024, 4096)
GRID = [Cell(rows, *sizes) for sizes in SIZES for rows in ROWS]
QUICK = [Cell(rows, *sizes) for sizes in SIZES[:2] for rows in (1, 32, 1024)]
PASSES = {"forward": False, "forward + backward": True}
MEMORY_ROWS = 4096  # cells of that many rows tell their peak memory
_LEAST, _MOST, _SECONDS = 3, 60, 1.0  # repeats, and seconds that one candidate of a cell may take
_SLOW = 4.0  # a candidate that takes so many seconds is timed once


@dataclass(kw_only=True)
class Timing:
    """What came out for one cell, type and pass.

    Attributes:
        cell: sizes.
        dtype: of all parameters.
        kind: "forward" or "forward + backward".
        ms: median milliseconds by candidate.
        peak_mb: memory above the start of the pass by candidate, for large cells on Linux.
    """

    cell: Cell
    dtype: str
    kind: str
    ms: dict[str, float]
    peak_mb: dict[str, float] = field(default_factory=dict)

    @property
    def peers(self) -> dict[str, float]:
        """Times of the others that are mixtures."""
        return {name: ms for name, ms in self.ms.items() if name not in (LIMIT, PRODUCTS) and not name.startswith(OURS)}

    @property
    def best_peer(self) -> str:
        """The fastest of them."""
        return min(self.peers, key=self.peers.__getitem__)

    def speed(self, of: str, over: str) -> float:
        """How many times as fast one candidate is as another."""
        return self.ms[over] / self.ms[of]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        ratios = {"to_limit": self.speed(OURS, LIMIT), "to_best_peer": self.speed(OURS, self.best_peer)}
        return {
            **asdict(self),
            "best_peer": self.best_peer,
            **{name: round(value, 3) for name, value in ratios.items()},
        }


def run(
    cells: Iterable[Cell],
    dtypes: Iterable[str],
    kinds: Iterable[str],
    seconds: float = _SECONDS,
    names: Container[str] | None = None,
    memory_rows: int = MEMORY_ROWS,
) -> Iterable[Timing]:
    """Times cell by cell.

    Args:
        cells: sizes.
        dtypes: "fp32", "bf16".
        kinds: of `PASSES`.
        seconds: about what one candidate of a cell may take.
        names: candidates; all when None.
        memory_rows: cells of at least so many rows tell their peak memory.

    Raises:
        MmoeError: a candidate computes something else than the others.
    """
    from zoo.loading import pick_dtype

    for dtype in dtypes:
        for cell in cells:
            torch.manual_seed(0)
            everyone, parameters = layers(cell, pick_dtype(dtype))
            candidates = {name: one for name, one in everyone.items() if names is None or name in names}
            x = torch.randn(cell.rows, cell.dim, dtype=pick_dtype(dtype), requires_grad=True)
            _check_agreement(candidates, x, parameters)
            multiply = products(everyone[OURS], x) if names is None or PRODUCTS in names else None
            for kind in kinds:
                passes = {name: _pass(layer, x, PASSES[kind]) for name, layer in candidates.items()}
                alone = {} if multiply is None else {PRODUCTS: partial(multiply, PASSES[kind])}
                ms = take_turns(passes | alone, partial(_clear, x, parameters), seconds)
                timing = Timing(cell=cell, dtype=dtype, kind=kind, ms=ms)
                if cell.rows >= memory_rows:
                    timing.peak_mb = _peaks(passes, partial(_clear, x, parameters))
                yield timing


def _pass(layer: Layer, x: Tensor, backward: bool) -> Callable[[], object]:
    def forward() -> None:
        with torch.no_grad():
            layer(x)

    return (lambda: layer(x).sum().backward()) if backward else forward


def _clear(x: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Backward would add to gradients that are there, those of all experts."""
    for value in (x, *parameters):
        value.grad = None


def _check_agreement(candidates: dict[str, Layer], x: Tensor, parameters: list[nn.Parameter]) -> None:
    """All mixtures give the same outputs and input gradients, up to rounding."""
    tolerance = 1e-4 if x.dtype == torch.float32 else 0.06
    results: dict[str, list[Tensor]] = {}
    for name, layer in candidates.items():
        if name != LIMIT:
            _clear(x, parameters)
            y = layer(x)
            y.float().square().sum().backward()
            assert x.grad is not None
            results[name] = [y.detach().float(), x.grad.float()]
    _clear(x, parameters)
    reference = results.get(f"{OURS} loop", results[OURS])
    for name, values in results.items():
        for value, expected in zip(values, reference, strict=True):
            difference = float((value - expected).norm() / expected.norm())
            if not difference <= tolerance:
                wrong = f"its results differ from the loop's by {difference:.1e} of their norm"
                raise MmoeError(f"the candidate {name!r} computes something else", wrong, "open an issue")


def take_turns(
    runs: dict[str, Callable[[], object]], prepare: Callable[[], object], seconds: float
) -> dict[str, float]:
    """Median milliseconds of functions that take turns in random order, after a turn of warm-up.

    Args:
        runs: what is timed, by name.
        prepare: called before each, untimed.
        seconds: about what all turns of one function may take; none has fewer than a few.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    draw, names = random.Random(0), list(runs)
    while names:
        draw.shuffle(names)
        for name in names:
            prepare()
            started = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - started)
        names = [name for name in names if len(times[name]) <= _turns(times[name], seconds)]
    return {name: round(1e3 * statistics.median(values[1:]), 4) for name, values in times.items()}


def _turns(times: list[float], seconds: float) -> int:
    """How many turns a function gets after its first one, which warms up."""
    return 1 if times[0] > _SLOW else max(_LEAST, min(_MOST, round(seconds / times[-1])))


def _peaks(passes: dict[str, Callable[[], object]], prepare: Callable[[], object]) -> dict[str, float]:
    found = {}
    for name, one in passes.items():
        prepare()
        taken = peak(one)
        if taken is not None:
            found[name] = taken
    return found


def peak(one: Callable[[], object]) -> float | None:
    """Largest resident memory during a call above that before it, in MB; None outside Linux."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, and is counted when it is taken again
    memory.release()
    reset.write_text("5")
    before = _memory(status, "VmRSS")
    one()
    return round((_memory(status, "VmHWM") - before) / 1e3, 1)


def _memory(status: Path, name: str) -> int:
    (line,) = [line for line in status.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])  # kB


def summary(timings: list[Timing]) -> dict[str, float | None]:
    """Medians over cells of the ratios that people compare."""

    def median(values: list[float]) -> float | None:
        return round(statistics.median(values), 3) if values else None

    def chosen(kind: str, least: int, most: int) -> list[Timing]:
        return [one for one in timings if one.kind == kind and least <= one.cell.rows <= most]

    grouped = f"{THEIRS} grouped_mm"
    forward, both = PASSES
    to_limit = {
        f"{prefix}to the limit, {kind}, T >= 1024": median([t.speed(name, LIMIT) for t in chosen(kind, 1024, 10**9)])
        for kind in PASSES
        for prefix, name in (("", OURS), (f"{PRODUCTS} ", PRODUCTS))
    }
    few = chosen(forward, 1, 32)
    least = round(min(t.speed(OURS, _best(t)) for t in timings), 3) if timings else None
    return {
        **to_limit,
        "to transformers' best, least of all cells": least,
        "to transformers' grouped_mm, all cells": median([t.speed(OURS, grouped) for t in timings]),
        "to transformers' best, forward, T <= 32": median([t.speed(OURS, _best(t)) for t in few]),
        f"{PRODUCTS} to transformers' best, forward, T <= 32": median([t.speed(PRODUCTS, _best(t)) for t in few]),
        "peak memory to transformers' grouped_mm, forward + backward, T = 4096": median(
            [t.peak_mb[OURS] / t.peak_mb[grouped] for t in chosen(both, MEMORY_ROWS, MEMORY_ROWS) if t.peak_mb]
        ),
    }


def _best(timing: Timing) -> str:
    theirs = {name: ms for name, ms in timing.ms.items() if name.startswith(THEIRS)}
    return min(theirs, key=theirs.__getitem__)
