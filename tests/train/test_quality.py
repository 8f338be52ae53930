"""Correlations, the curves before them, and series of levels."""

from __future__ import annotations

import numpy as np
import pytest

from mmoe.errors import BadInput
from train.quality import agreement, fit_logistic4, fit_logistic5, plcc, srcc


def test_correlations_by_hand():
    assert srcc([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)
    assert srcc([1, 10, 100], [1, 2, 3]) == pytest.approx(1) and plcc([1, 10, 100], [1, 2, 3]) < 0.95
    assert plcc([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    for constant in ([1, 1, 1], [2.0, 2.0, 2.0]):
        assert srcc(constant, [1, 2, 3]) == plcc([1, 2, 3], constant) == 0
    with pytest.raises(BadInput, match="some are no numbers"):
        agreement([1, float("inf"), 2], [1, 2, 3])


@pytest.mark.parametrize("fit", [fit_logistic4, fit_logistic5])
def test_curves_straighten_bent_scores(fit):
    scores = np.linspace(-3, 3, 60)
    opinions = 1 + 4 / (1 + np.exp(-2 * scores))
    assert plcc(scores, opinions) < 0.98
    assert plcc(fit(scores, opinions), opinions) > 0.995
    assert np.abs(fit_logistic4(scores, opinions) - opinions).max() < 1e-4, "of this very form"
    assert (fit(scores[:3], opinions[:3]) == scores[:3]).all(), "too few for a curve"
    assert (fit(np.ones(9), opinions[:9]) == 1).all()


def test_logistic4_falls_where_scores_do():
    scores = np.linspace(0, 1, 30)
    assert agreement(scores, 1 - scores)["PLCC"] == -1.0
    assert agreement(scores, 1 - scores)["PLCC logistic-4"] > 0.99
