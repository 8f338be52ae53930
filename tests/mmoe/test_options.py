"""Checks of option values: what passes, what does not, and that the proposed value passes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mmoe.errors import BadOverride
from mmoe.options import check_bool, check_choice, check_float, check_int

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [1, 4, np.int64(2)])
def test_whole_numbers(value: Any) -> None:
    check_int("k", value, 1, 4)


@pytest.mark.parametrize(
    ("check", "bad"),
    [
        (lambda value: check_int("k", value, 1, 4), [0, 5, 1.0, "2", True, None, NAN]),
        (lambda value: check_int("k", value, 3), [2, -1]),
        (lambda value: check_float("k", value, low=0), [-1, NAN, INF, "1", None, True]),
        (lambda value: check_float("k", value, low=0, high=1), [-1, 1.5, NAN]),
        (lambda value: check_float("k", value, above=0), [0, -0.5, INF]),
        (lambda value: check_float("k", value, low=0, below=1), [1, 1.5, -0.1]),
        (lambda value: check_choice("k", value, ["zero", "copy"]), ["", "zeros", "nothing", 3]),
        (lambda value: check_bool("k", True if value == "true" else value), [0, 1, "no", None]),
    ],
)
def test_what_is_proposed_passes(check: Callable[[Any], None], bad: list[Any]) -> None:
    for value in bad:
        with pytest.raises(BadOverride) as error:
            check(value)
        assert error.value.asked == f"k={value!r}"
        found = re.fullmatch(r"k=(?:'?([a-z]+)'?|([\d.]+))", error.value.fix)
        assert found is not None
        check(found[1] or float(found[2]) if found[1] or "." in found[2] else int(found[2]))


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.25)])
def test_numbers(value: Any) -> None:
    check_float("rate", value, low=0, below=1)
