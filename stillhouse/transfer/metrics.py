"""What transfer gained, from two learning curves (Taylor & Stone 2009, JMLR 10:1633-1685).

A curve is ``env_steps [N]`` (increasing, starting at 0 before any training) and ``returns [N]``. Transfer and
scratch are compared over one budget of env steps.

Deviations from the paper:
1. Areas are divided by the budget, so that they are returns.
2. The transfer ratio is taken over returns above random play, ``(area - random) / (scratch area - random)``:
   a raw ratio turns round where returns are negative. Where scratch is not above random, the difference of
   the areas stands in its place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Curve:
    """A learning curve.

    Attributes:
        env_steps: increasing, the first is 0, [N].
        returns: mean returns of the policy at these points, [N].

    Raises:
        ValueError: not a curve.
    """

    env_steps: np.ndarray
    returns: np.ndarray

    def __post_init__(self) -> None:
        steps, returns = np.asarray(self.env_steps, np.float64), np.asarray(self.returns, np.float64)
        if steps.ndim != 1 or steps.shape != returns.shape or len(steps) < 2:
            raise ValueError(f"a curve needs two or more points, not {steps.shape} and {returns.shape}")
        if steps[0] != 0 or not (np.diff(steps) > 0).all():
            raise ValueError("a curve's env steps must start at 0 and increase")
        if not np.isfinite(returns).all():
            raise ValueError("a curve's returns must be finite")
        object.__setattr__(self, "env_steps", steps)
        object.__setattr__(self, "returns", returns)


@dataclass(frozen=True)
class Comparison:
    """Transfer against scratch over the same budget.

    Attributes:
        jumpstart: how much higher transfer starts, before any training.
        area: transfer's mean return over the budget.
        scratch_area: the scratch agent's.
        score: the transfer ratio, or a difference of areas, see ``score_kind``.
        score_kind: ``ratio`` or ``difference``.
        steps_to_scratch: env steps until transfer reaches the scratch agent's final return; infinite if
            never.
        budget: env steps.
    """

    jumpstart: float
    area: float
    scratch_area: float
    score: float
    score_kind: Literal["ratio", "difference"]
    steps_to_scratch: float
    budget: float


def jumpstart(transfer: Curve, scratch: Curve) -> float:
    """Difference of the returns before any training."""
    return float(transfer.returns[0] - scratch.returns[0])


def area_under_curve(curve: Curve, budget: float | None = None) -> float:
    """Mean return over ``budget`` env steps (default: all): the trapezoidal area, divided by the budget.

    Raises:
        ValueError: the curve is shorter than the budget.
    """
    budget = float(curve.env_steps[-1]) if budget is None else budget
    if not 0 < budget <= curve.env_steps[-1]:
        raise ValueError(f"a curve of {curve.env_steps[-1]:g} env steps has no area over {budget:g}")
    inside = curve.env_steps < budget
    steps = np.append(curve.env_steps[inside], budget)
    returns = np.append(curve.returns[inside], np.interp(budget, curve.env_steps, curve.returns))
    return float(np.trapezoid(returns, steps) / budget)


def transfer_score(
    area: float, scratch_area: float, random_return: float
) -> tuple[float, Literal["ratio", "difference"]]:
    """The ratio of both areas above random play, or their difference where scratch is not above it."""
    gained = scratch_area - random_return
    if gained <= 1e-9 * max(1.0, abs(scratch_area), abs(random_return)):
        return area - scratch_area, "difference"
    return (area - random_return) / gained, "ratio"


def steps_to_reach(curve: Curve, threshold: float) -> float:
    """Env steps until the curve first reaches ``threshold``, linear between points; infinite if never."""
    reached = np.flatnonzero(curve.returns >= threshold)
    if not len(reached):
        return math.inf
    after = reached[0]
    if after == 0:
        return 0.0
    low, high = curve.returns[after - 1], curve.returns[after]
    start, end = curve.env_steps[after - 1], curve.env_steps[after]
    return float(start + (threshold - low) / (high - low) * (end - start))


def compare(transfer: Curve, scratch: Curve, random_return: float) -> Comparison:
    """All measures of one transfer run against one scratch run, over the shorter of their budgets."""
    budget = float(min(transfer.env_steps[-1], scratch.env_steps[-1]))
    area, scratch_area = area_under_curve(transfer, budget), area_under_curve(scratch, budget)
    score, kind = transfer_score(area, scratch_area, random_return)
    final = float(np.interp(budget, scratch.env_steps, scratch.returns))
    steps = steps_to_reach(transfer, final)
    return Comparison(
        jumpstart=jumpstart(transfer, scratch),
        area=area,
        scratch_area=scratch_area,
        score=score,
        score_kind=kind,
        steps_to_scratch=steps if steps <= budget else math.inf,
        budget=budget,
    )
