"""A trust-region step (Schulman et al. 2015, https://arxiv.org/abs/1502.05477, appendix C).

    x ~ F^-1 g (conjugate gradients),   s = sqrt(2 delta / x^T F x) x,   theta <- theta + rho^j s

with the first j = 0, 1, ... for which the objective is larger than before and the mean KL is at most delta.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_SHRINK = 0.5


class TrustRegionStep(NamedTuple):
    """What came of it.

    Attributes:
        parameters: the new ones [P], or the old ones where nothing was accepted.
        improvement: of the objective; 0 where nothing was accepted.
        divergence: mean KL in nats; the same.
        shrinkings: how often the step was halved; -1 where nothing was accepted.
    """

    parameters: Tensor
    improvement: float
    divergence: float
    shrinkings: int


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], vector: Tensor, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """x with ``A x ~ vector`` [P], for a symmetric positive definite A given by its product; it stops early at this squared residual,
    relative to the vector's."""
    solution = torch.zeros_like(vector)
    residual, direction = vector.clone(), vector.clone()
    square = first = residual @ residual
    for _ in range(iterations):
        if square <= tolerance * first or square == 0:
            break
        image = product(direction)
        along = direction @ image
        if (
            along <= 0
        ):  # rounding, or a matrix that is not positive definite: what there is so far is the best
            break
        length = square / along
        solution = solution + length * direction
        residual = residual - length * image
        following = residual @ residual
        direction = residual + following / square * direction
        square = following
    return solution


def trust_region_step(
    parameters: Tensor,
    gradient: Tensor,
    before: float,
    product: Callable[[Tensor], Tensor],
    evaluate: Callable[[Tensor], tuple[float, float]],
    max_divergence: float,
    iterations: int,
    shrinkings: int = 10,
) -> TrustRegionStep:
    """One step.

    Args:
        parameters: theta [P].
        gradient: of the objective there, [P].
        before: the objective there.
        product: F times a vector [P]: the KL's Hessian, damped as wanted.
        evaluate: parameters to (objective, mean KL from the policy at theta).
        max_divergence: delta, in nats.
        iterations: of the conjugate gradients.
        shrinkings: halvings of the step before it is given up.
    """
    unchanged = TrustRegionStep(parameters, 0.0, 0.0, -1)
    direction = conjugate_gradients(product, gradient, iterations)
    square = float(direction @ product(direction))
    if not square > 0:
        return unchanged
    step = (2 * max_divergence / square) ** 0.5 * direction
    for tried in range(shrinkings + 1):
        candidate = parameters + _SHRINK**tried * step
        objective, divergence = evaluate(candidate)
        # A comparison with NaN is false, so that nothing unsound is accepted.
        if objective > before and divergence <= max_divergence:
            return TrustRegionStep(candidate, objective - before, divergence, tried)
    return unchanged
