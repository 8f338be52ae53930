"""How well predicted scores of quality agree with opinions: rank and linear correlation, with and without a curve.

Opinions of people bend at the ends of their scales, so the field reports the linear correlation after a monotone curve
was fitted as well (VQEG 2003). Curves and start values as in IQA-PyTorch, which Gamma (arXiv 2503.06678) is built in:

    logistic-4   (b1 - b2) / (1 + exp(-(x - b3) / b4)) + b2                from [max y, min y, mean x, std x / 4]
    logistic-5   b1 (1/2 - 1 / (1 + exp(b2 (x - b3)))) + b4 x + b5         from [10, 0, mean y, 0.1, 0.1]

Shapes: n pictures.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import curve_fit
from scipy.special import expit
from scipy.stats import pearsonr, spearmanr

from mmoe.errors import BadInput

Scores = Sequence[float] | np.ndarray


def srcc(predicted: Scores, given: Scores) -> float:
    """Rank correlation (Spearman), -1 to 1; 0 where one side does not vary.

    >>> round(srcc([1, 2, 40], [1, 2, 3]), 4)
    1.0
    """
    return _correlation(spearmanr, predicted, given)


def plcc(predicted: Scores, given: Scores) -> float:
    """Linear correlation (Pearson), -1 to 1; 0 where one side does not vary.

    >>> round(plcc([1, 2, 3], [10, 20, 30]), 4)
    1.0
    """
    return _correlation(pearsonr, predicted, given)


def _correlation(measure: Any, predicted: Scores, given: Scores) -> float:
    x, y = np.asarray(predicted, float), np.asarray(given, float)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise BadInput("correlate scores", "some are no numbers", "a model whose training did not diverge")
    if len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return 0.0
    return float(measure(x, y).statistic)


def fit_logistic4(predicted: Scores, given: Scores) -> np.ndarray:
    """Predicted scores (n,) brought to the given ones by a logistic curve with 4 parameters.

    Where no such curve is found the scores come back as they are.
    """
    x, y = np.asarray(predicted, float), np.asarray(given, float)

    def curve(x: np.ndarray, b1: float, b2: float, b3: float, b4: float) -> np.ndarray:
        return (b1 - b2) * expit((x - b3) / b4) + b2

    return _fitted(curve, x, y, [y.max(), y.min(), x.mean(), x.std() / 4])


def fit_logistic5(predicted: Scores, given: Scores) -> np.ndarray:
    """As `fit_logistic4`, with 5 parameters: a logistic curve on a line."""
    x, y = np.asarray(predicted, float), np.asarray(given, float)

    def curve(x: np.ndarray, b1: float, b2: float, b3: float, b4: float, b5: float) -> np.ndarray:
        return b1 * (0.5 - expit(-b2 * (x - b3))) + b4 * x + b5

    return _fitted(curve, x, y, [10, 0, y.mean(), 0.1, 0.1])


def _fitted(curve: Any, x: np.ndarray, y: np.ndarray, start: Sequence[float]) -> np.ndarray:
    if len(x) < len(start) or len(np.unique(x)) < 2:
        return x
    try:
        with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
            found, _ = curve_fit(curve, x, y, start)
            values = curve(x, *found)
    except RuntimeError:  # no end in sight
        return x
    return values if np.isfinite(values).all() else x


def agreement(predicted: Scores, given: Scores) -> dict[str, float]:
    """SRCC, and PLCC before and after a logistic curve with 4 parameters.

    >>> agreement([0.1, 0.2, 0.3, 0.9], [1, 2, 3, 4])["SRCC"]
    1.0
    """
    found = {
        "SRCC": srcc(predicted, given),
        "PLCC": plcc(predicted, given),
        "PLCC logistic-4": plcc(fit_logistic4(predicted, given), given),
    }
    return {name: round(value, 4) for name, value in found.items()}
