"""Agreement of scores with opinions; that it is what others compute is shown by tests/parity/test_gamma.py."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from mmoe.errors import BadInput, UnknownName
from train.quality import SCALES, OpinionScale, agreement, fit_logistic, rmse


def bent(count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and opinions that rise with them along a logistic curve."""
    x = np.linspace(0, 1, count)
    return x, 3 / (1 + np.exp(-(x - 0.6) / 0.05)) + 1


def test_a_curve_takes_out_what_is_not_linear() -> None:
    x, y = bent()
    found = agreement(x.tolist(), y.tolist())
    assert found["SRCC"] == found["KRCC"] == found["PLCC logistic-4"] == 1.0 and found["PLCC"] < 0.95
    for curve in ("logistic-4", "logistic-5"):
        fitted = fit_logistic(x, y, curve)
        assert rmse(fitted, y) < (1e-6 if curve == "logistic-4" else 0.2)
    assert agreement((-x).tolist(), y.tolist())["SRCC"] == -1.0


def test_where_nothing_can_be_fitted() -> None:
    none = dict.fromkeys(("SRCC", "PLCC", "KRCC", "PLCC logistic-4"), 0.0)
    assert agreement([1.0, 1.0], [1.0, 2.0]) == agreement([1.0, 2.0], [1.0, 1.0]) == none
    assert agreement([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == dict.fromkeys(none, 1.0), "too few for a curve"
    noise = np.random.default_rng(0).normal(size=(2, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert -1 <= agreement(noise[0].tolist(), noise[1].tolist())["PLCC logistic-4"] <= 1
    with pytest.raises(BadInput, match="some are no numbers"):
        agreement([1.0, float("nan")], [1.0, 2.0])
    with pytest.raises(UnknownName, match="did you mean: logistic-4"):
        fit_logistic([1.0], [1.0], "logistic4")  # type: ignore[arg-type]  # wrong on purpose


def test_scales_of_opinions() -> None:
    for scale in SCALES.values():
        worst, best = (scale.high, scale.low) if scale.lower_is_better else (scale.low, scale.high)
        assert scale.to_unit([worst, best]).tolist() == [0.0, 1.0]
    assert OpinionScale(low=1, high=5).to_unit([2.0]).tolist() == [0.25]
    assert {name for name, scale in SCALES.items() if scale.lower_is_better} == {"LIVE", "CSIQ"}


def test_correlations_by_hand() -> None:
    found = agreement([1, 2, 3, 4], [1, 2, 4, 3])
    assert (found["SRCC"], found["KRCC"]) == (0.8, 0.6667)
    found = agreement([1, 10, 100], [1, 2, 3])
    assert found["SRCC"] == 1.0 and found["PLCC"] < 0.95


def test_a_curve_falls_where_scores_do() -> None:
    scores = np.linspace(0, 1, 30)
    found = agreement(scores.tolist(), (1 - scores).tolist())
    assert found["PLCC"] == -1.0 and found["PLCC logistic-4"] > 0.99
