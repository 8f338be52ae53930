"""How well predicted scores of pictures agree with opinions: correlations, curves fitted first, and scales of opinions.

    logistic-4   (b1 - b2) / (1 + exp(-(x - b3) / b4)) + b2
    logistic-5   b1 (1/2 - 1 / (1 + exp(b2 (x - b3)))) + b4 x + b5

Papers on image quality report the linear correlation on raw scores or behind such a curve; both are given here, under
names of their own. The curves are those of the Video Quality Experts Group, fitted by `scipy.optimize.curve_fit`.
Opinions of different data sets are brought to [0, 1], higher is better, by the fixed range of each set, never by what
is found in the data (arXiv 2503.06678).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmoe.errors import BadInput, UnknownName, did_you_mean

Curve = Literal["logistic-4", "logistic-5"]


@dataclass(frozen=True, kw_only=True)
class OpinionScale:
    """Range of a data set's opinions.

    Attributes:
        low, high: ends of the scale.
        lower_is_better: as of differences to an original (DMOS).
    """

    low: float
    high: float
    lower_is_better: bool = False

    def to_unit(self, opinions: Sequence[float] | np.ndarray) -> np.ndarray:
        """Opinions in [0, 1], higher is better.

        >>> SCALES["LIVE"].to_unit([1.0, 100.0]).tolist()
        [1.0, 0.0]
        """
        unit = (np.asarray(opinions, dtype=np.float64) - self.low) / (self.high - self.low)
        return 1 - unit if self.lower_is_better else unit


SCALES = {
    "KonIQ-10k": OpinionScale(low=0, high=100),
    "LIVEC": OpinionScale(low=0, high=100),
    "KADID-10k": OpinionScale(low=1, high=5),
    "LIVE": OpinionScale(low=1, high=100, lower_is_better=True),
    "CSIQ": OpinionScale(low=0, high=1, lower_is_better=True),
    "AGIQA-3K": OpinionScale(low=0, high=5),
    "UWIQA": OpinionScale(low=0, high=1),
    "GFIQA-20k": OpinionScale(low=0, high=1),
    "SPAQ": OpinionScale(low=0, high=100),
    "TID2013": OpinionScale(low=0, high=9),
    "AADB": OpinionScale(low=0, high=1),
    "AVA": OpinionScale(low=0, high=10),
}


def agreement(predicted: Sequence[float], given: Sequence[float], *, digits: int = 4) -> dict[str, float]:
    """SRCC, PLCC and KRCC, -1 to 1, and "PLCC logistic-4" behind a fitted curve.

    Correlations are 0 where one side does not vary. Where no curve can be fitted, as with few scores, that behind one
    is PLCC itself.

    Raises:
        BadInput: some scores are no numbers.

    >>> agreement([1.0, 2.0, 4.0], [1.0, 2.0, 3.0])["SRCC"]
    1.0
    """
    from scipy.stats import kendalltau, pearsonr, spearmanr

    if not np.isfinite([*predicted, *given]).all():
        raise BadInput("correlate scores", "some are no numbers", "a model whose training did not diverge")
    names = ("SRCC", "PLCC", "KRCC", "PLCC logistic-4")
    if len(set(predicted)) < 2 or len(set(given)) < 2:
        return dict.fromkeys(names, 0.0)
    found = [test(predicted, given).statistic for test in (spearmanr, pearsonr, kendalltau)]
    fitted = fit_logistic(predicted, given)
    varies = fitted is not None and len(set(fitted.tolist())) > 1
    found.append(pearsonr(fitted, given).statistic if varies else found[1])
    return {name: round(float(value), digits) for name, value in zip(names, found, strict=True)}


def fit_logistic(
    predicted: Sequence[float] | np.ndarray, given: Sequence[float] | np.ndarray, curve: Curve = "logistic-4"
) -> np.ndarray | None:
    """Predicted scores behind the curve that brings them nearest to the given ones, (n,), or None without such a curve.

    Args:
        predicted: scores.
        given: opinions.
        curve: its name.

    Raises:
        UnknownName: there is no such curve.

    >>> fit_logistic([1.0, 2.0], [1.0, 2.0]) is None
    True
    """
    import warnings

    from scipy.optimize import OptimizeWarning, curve_fit

    if curve not in _CURVES:
        raise UnknownName(f"no curve {curve!r}", did_you_mean(curve, _CURVES), "fit_logistic(predicted, given)")
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(given, dtype=np.float64)
    function, start = _CURVES[curve]
    try:
        with warnings.catch_warnings(), np.errstate(over="ignore"):
            warnings.simplefilter("ignore", OptimizeWarning)
            parameters, _ = curve_fit(function, x, y, p0=start(x, y), maxfev=20_000)
    except (RuntimeError, TypeError, ValueError):  # no convergence, fewer points than parameters, values of infinity
        return None
    with np.errstate(over="ignore"):
        fitted = function(x, *parameters)
    return fitted if np.isfinite(fitted).all() else None


def rmse(predicted: Sequence[float] | np.ndarray, given: Sequence[float] | np.ndarray) -> float:
    """Root of the mean squared difference.

    >>> rmse([1.0, 2.0], [2.0, 1.0])
    1.0
    """
    return float(np.sqrt(np.mean((np.asarray(predicted) - np.asarray(given)) ** 2)))


def _logistic4(x: np.ndarray, b1: float, b2: float, b3: float, b4: float) -> np.ndarray:
    return (b1 - b2) / (1 + np.exp(-(x - b3) / b4)) + b2


def _logistic5(x: np.ndarray, b1: float, b2: float, b3: float, b4: float, b5: float) -> np.ndarray:
    return b1 * (0.5 - 1 / (1 + np.exp(b2 * (x - b3)))) + b4 * x + b5


def _start4(x: np.ndarray, y: np.ndarray) -> list[float]:
    return [y.max(), y.min(), x.mean(), x.std() / 4]


def _start5(x: np.ndarray, y: np.ndarray) -> list[float]:
    return [10.0, 0.0, y.mean(), 0.1, 0.1]


_Function, _Start = Callable[..., np.ndarray], Callable[[np.ndarray, np.ndarray], list[float]]
_CURVES: dict[str, tuple[_Function, _Start]] = {
    "logistic-4": (_logistic4, _start4),
    "logistic-5": (_logistic5, _start5),
}
