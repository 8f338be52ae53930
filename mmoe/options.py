"""Checks option values where they are given, so that a wrong one fails there and says what would work.

>>> check_float("temperature", 0, above=0)
Traceback (most recent call last):
mmoe.errors.BadOverride: temperature=0
  temperature is a finite number above 0
  try: temperature=1
"""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

from mmoe.errors import BadOverride, did_you_mean, nearest


def check_int(option: str, value: Any, low: int, high: int | None = None) -> None:
    """A whole number, at least `low` and at most `high`.

    Raises:
        BadOverride: it is not.
    """
    number = isinstance(value, Integral) and not isinstance(value, bool)
    if number and low <= value <= (math.inf if high is None else high):
        return
    span = f"from {low} to {high}" if high is not None else f"of at least {low}"
    works = max(low, high) if number and high is not None and value > high else low
    raise BadOverride(f"{option}={value!r}", f"{option} is a whole number {span}", f"{option}={works}")


def check_float(
    option: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    usual: float | None = None,
) -> None:
    """A finite number: `low` to `high`, or more than `above`, and less than `below`; `usual` is what errors suggest.

    Raises:
        BadOverride: it is not.
    """
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if (
        number
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    ):
        return
    limits = {"of at least": low, "of at most": high, "above": above, "below": below}
    span = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
    works = usual if usual is not None else low if low is not None else (1.0 if above is not None else 0.0)
    raise BadOverride(f"{option}={value!r}", f"{option} is a finite number {span}".strip(), f"{option}={works:g}")


def check_bool(option: str, value: Any) -> None:
    """True or False, not what merely counts as one.

    Raises:
        BadOverride: it is neither.
    """
    if not isinstance(value, bool):
        raise BadOverride(f"{option}={value!r}", f"{option} is true or false", f"{option}=true")


def check_choice(option: str, value: Any, choices: Collection[str]) -> None:
    """One of some words.

    Raises:
        BadOverride: it is none of them.

    >>> check_choice("kind", "zeros", ["zero", "copy"])
    Traceback (most recent call last):
    mmoe.errors.BadOverride: kind='zeros'
      did you mean: zero
      try: kind='zero'
    """
    if value in choices:
        return
    works = (nearest(str(value), choices) or list(choices))[0]
    raise BadOverride(f"{option}={value!r}", did_you_mean(str(value), choices), f"{option}={works!r}")
