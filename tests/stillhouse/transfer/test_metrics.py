"""Transfer measures against values worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.transfer import metrics
from stillhouse.transfer.metrics import Curve


def curve(*points: tuple[float, float]) -> Curve:
    steps, returns = zip(*points, strict=True)
    return Curve(np.array(steps), np.array(returns))


SCRATCH = curve((0, 0.0), (100, 10.0), (200, 20.0))
TRANSFER = curve((0, 8.0), (100, 28.0), (200, 30.0))


def test_jumpstart() -> None:
    assert metrics.jumpstart(TRANSFER, SCRATCH) == 8


def test_area_is_a_mean_return() -> None:
    assert metrics.area_under_curve(SCRATCH) == 10
    assert metrics.area_under_curve(TRANSFER) == (18 + 29) / 2
    assert metrics.area_under_curve(curve((0, 3.0), (7, 3.0))) == 3


def test_area_within_a_budget_between_points() -> None:
    # 0 at 0, 10 at 100, 15 at 150: (5 * 100 + 12.5 * 50) / 150
    assert metrics.area_under_curve(SCRATCH, 150) == pytest.approx(7.5)


def test_points_need_not_be_evenly_spaced() -> None:
    assert metrics.area_under_curve(curve((0, 0.0), (10, 10.0), (100, 10.0))) == pytest.approx(9.5)


def test_a_budget_beyond_the_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="no area over 300"):
        metrics.area_under_curve(SCRATCH, 300)


def test_the_score_is_a_ratio_above_random() -> None:
    # Acrobot-like: random -500. A raw ratio, -150 / -200 = 0.75, would call the better run worse.
    assert metrics.transfer_score(-150, -200, -500) == (pytest.approx(350 / 300), "ratio")


@pytest.mark.parametrize("random_return", [10.0, 12.0])
def test_the_score_is_a_difference_where_scratch_is_not_above_random(random_return: float) -> None:
    assert metrics.transfer_score(23.5, 10.0, random_return) == (13.5, "difference")


def test_steps_to_reach() -> None:
    assert metrics.steps_to_reach(SCRATCH, 5) == 50
    assert metrics.steps_to_reach(SCRATCH, 20) == 200
    assert metrics.steps_to_reach(SCRATCH, 20.1) == math.inf
    assert metrics.steps_to_reach(SCRATCH, -1) == 0
    # The first crossing counts, also where the curve falls again.
    assert metrics.steps_to_reach(curve((0, 0.0), (10, 4.0), (20, 0.0), (30, 9.0)), 2) == 5


def test_compare() -> None:
    result = metrics.compare(TRANSFER, SCRATCH, random_return=0)
    assert result == metrics.Comparison(
        jumpstart=8.0,
        area=23.5,
        scratch_area=10.0,
        score=2.35,
        score_kind="ratio",
        steps_to_scratch=60.0,  # 8 + 0.2 per step = 20
        budget=200.0,
    )


def test_compare_uses_the_shorter_budget() -> None:
    result = metrics.compare(TRANSFER, curve((0, 0.0), (50, 30.0)), random_return=0)
    assert result.budget == 50
    assert result.area == pytest.approx((8 + 18) / 2)
    assert result.steps_to_scratch == math.inf  # 30 is reached at 200, beyond the budget of 50


@pytest.mark.parametrize(
    ("steps", "returns"),
    [([0], [1]), ([0, 1], [1]), ([1, 2], [1, 1]), ([0, 2, 2], [1, 1, 1]), ([0, 1], [1, math.nan])],
)
def test_what_is_no_curve_is_refused(steps: list[float], returns: list[float]) -> None:
    with pytest.raises(ValueError, match="curve"):
        Curve(np.array(steps), np.array(returns))


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8), st.floats(-50, 50))
@settings(max_examples=50, deadline=None)
def test_shifting_a_curve_shifts_its_area(returns: list[float], shift: float) -> None:
    steps = np.arange(len(returns)) * 10.0
    area = metrics.area_under_curve(Curve(steps, np.array(returns)))
    assert min(returns) - 1e-9 <= area <= max(returns) + 1e-9
    moved = metrics.area_under_curve(Curve(steps, np.array(returns) + shift))
    assert moved == pytest.approx(area + shift, abs=1e-6)
