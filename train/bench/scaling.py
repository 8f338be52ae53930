"""What `mmoe bench scaling` measures: cost over the number of experts, and over the number of rows."""

from __future__ import annotations

from train.bench.layer import Timing
from train.bench.peers import LIMIT, OURS, THEIRS, Cell

NAMES = (LIMIT, OURS, f"{THEIRS} grouped_mm")
_DIM, _HIDDEN_DIM, _TOP_K = 512, 1024, 2
EXPERTS = [Cell(4096, _DIM, _HIDDEN_DIM, experts, _TOP_K) for experts in (4, 8, 16, 32, 64, 128, 256)]
ROWS = [Cell(rows, _DIM, _HIDDEN_DIM, 16, _TOP_K) for rows in (256, 512, 1024, 2048, 8192, 16384)]  # 4096 is above
SHORT = [*EXPERTS[:2], *ROWS[:2]]


def growth(timings: list[Timing], few: int = 8, many: int = 64) -> dict[str, float]:
    """Time of our layer with many experts over that with few at the same active work, by pass."""
    found: dict[str, dict[int, float]] = {}
    for timing in timings:
        if timing.cell.rows == EXPERTS[0].rows:
            found.setdefault(timing.kind, {})[timing.cell.num_experts] = timing.ms[OURS]
    return {kind: round(ms[many] / ms[few], 3) for kind, ms in found.items() if few in ms and many in ms}
