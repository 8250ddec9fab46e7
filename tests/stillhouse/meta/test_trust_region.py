"""The trust-region step: conjugate gradients, its length and its line search, by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stillhouse.meta.trust_region import TrustRegionStep, conjugate_gradients, trust_region_step

MATRIX = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 2.0]], dtype=torch.float64)
VECTOR = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def test_conjugate_gradients_solve_in_as_many_iterations_as_there_are_dimensions() -> None:
    found = conjugate_gradients(lambda v: MATRIX @ v, VECTOR, 3)
    torch.testing.assert_close(found, torch.linalg.solve(MATRIX, VECTOR))
    one = conjugate_gradients(lambda v: MATRIX @ v, VECTOR, 1)
    torch.testing.assert_close(one, (VECTOR @ VECTOR) / (VECTOR @ MATRIX @ VECTOR) * VECTOR)


def test_conjugate_gradients_of_nothing_are_nothing() -> None:
    assert not conjugate_gradients(lambda v: MATRIX @ v, torch.zeros(3, dtype=torch.float64), 5).any()


def test_conjugate_gradients_stop_where_the_matrix_is_not_positive() -> None:
    assert not conjugate_gradients(lambda v: -v, VECTOR, 5).any()


def step(evaluate: Callable[[Tensor], tuple[float, float]], shrinkings: int = 10) -> TrustRegionStep:
    start = torch.zeros(2)
    gradient = torch.tensor([1.0, 0.0])
    return trust_region_step(start, gradient, 0.0, lambda v: 4 * v, evaluate, 0.02, 2, shrinkings)


def test_the_first_trial_is_as_long_as_the_bound_allows() -> None:
    # F = 4 I: x = g / 4, x^T F x = 1/4, s = sqrt(2 delta 4) g / 4; with delta = 0.02: 0.1 g.
    found = step(lambda p: (float(p[0]), 1.9 * float(p @ p)))
    torch.testing.assert_close(found.parameters, torch.tensor([0.1, 0.0]))
    assert found.shrinkings == 0
    assert found.improvement == pytest.approx(0.1)
    assert found.divergence == pytest.approx(0.019)


def test_the_step_is_halved_until_the_divergence_is_within_the_bound() -> None:
    found = step(lambda p: (float(p[0]), 19 * float(p @ p)))  # 0.19, 0.0475, 0.0119
    torch.testing.assert_close(found.parameters, torch.tensor([0.025, 0.0]))
    assert found.shrinkings == 2


def test_the_step_is_halved_until_the_objective_is_larger() -> None:
    def evaluate(parameters: Tensor) -> tuple[float, float]:
        at = float(parameters[0])
        return (at if at < 0.04 else -1.0), 0.0

    assert step(evaluate).shrinkings == 2


@pytest.mark.parametrize("objective", [-1.0, 0.0, float("nan")])
def test_nothing_that_is_no_improvement_is_accepted(objective: float) -> None:
    found = step(lambda p: (objective, 0.0), shrinkings=3)
    assert found == (found.parameters, 0.0, 0.0, -1)
    assert not found.parameters.any()
