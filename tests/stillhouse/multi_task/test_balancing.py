"""Balancing, on quadratic problems with known answers: L_e(x) = c_e / 2 ||x - a_e||^2, shared by all environments."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.checkpoint import load_state, save_state
from stillhouse.config import parse
from stillhouse.errors import StillhouseError
from stillhouse.multi_task.balancing import (
    Balancer,
    BalancingConfig,
    ByReturn,
    FixedWeights,
    GradNorm,
    PCGrad,
    Uncertainty,
    make_balancer,
    projected,
)

CENTRES = torch.tensor([[1.0, 0.0, 2.0], [-3.0, 4.0, 0.0]])
SCALES = torch.tensor([1.0, 25.0])
ALL = [slice(0, 3)]


def pcgrad(count: int = 2, shared: list[slice] = ALL, seed: int = 0) -> PCGrad:
    return PCGrad(count, shared, np.random.default_rng(seed))


def problem(point: Tensor, scales: Tensor = SCALES, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Gradients [E, P] and losses [E] at a point; no loss falls below ``c_e * least``."""
    apart = point - CENTRES
    return scales[:, None] * apart, scales * (apart.square().sum(1) / 2 + least)


def minimise(
    balancer: Balancer, scales: Tensor = SCALES, steps: int = 4000, rate: float = 0.02, least: float = 0.0
) -> Tensor:
    point = torch.zeros(3)
    for _ in range(steps):
        point = point - rate * balancer.combine(*problem(point, scales, least))
    return point


def along(point: Tensor) -> float:
    """Where between the two minima a point lies: 0 at the first, 1 at the second."""
    line = CENTRES[1] - CENTRES[0]
    return float((point - CENTRES[0]) @ line / (line @ line))


def test_fixed_weights_lead_to_the_minimum_of_the_weighted_sum() -> None:
    for weights in ([1.0, 1.0], [3.0, 0.5]):
        pull = torch.tensor(weights) * SCALES
        wanted = pull @ CENTRES / pull.sum()
        torch.testing.assert_close(minimise(FixedWeights(weights)), wanted, rtol=1e-4, atol=1e-5)
    assert FixedWeights([3.0, 1.0]).weights.tolist() == [0.75, 0.25]


def test_uncertaintys_variances_come_to_rest_at_the_losses() -> None:
    balancer = Uncertainty(2, 0.01)
    losses = torch.tensor([0.25, 8.0])
    for _ in range(3000):
        balancer.combine(torch.ones(2, 3), losses)
    torch.testing.assert_close(balancer.log_variances.detach().exp(), losses, rtol=1e-3, atol=0)
    # 1 / (2 sigma^2) each, of two environments: there every loss weighs alike, whatever its scale.
    torch.testing.assert_close(balancer.weights * losses, torch.full((2,), 0.25), rtol=1e-3, atol=0)


def test_uncertaintys_step_is_along_the_derivative_of_its_loss() -> None:
    losses = torch.tensor([0.7, 3.0, 1.2])
    balancer = Uncertainty(3, 0.1)
    balancer.combine(torch.zeros(3, 2), losses)
    found = balancer._parameters.gradient.clone()
    s = torch.zeros(3, requires_grad=True)
    ((torch.exp(-s) / 2 * losses + s / 2).sum() / 3).backward()
    assert s.grad is not None
    torch.testing.assert_close(found, s.grad)


def test_where_uncertainty_comes_to_rest_does_not_depend_on_the_losses_scale() -> None:
    """There it minimises the sum of the losses' logarithms. Both have the same least value, so the middle is the minimum."""
    for scales in (torch.tensor([1.0, 1.0]), torch.tensor([1.0, 4.0])):
        balancer = Uncertainty(2, 0.05)
        minimise(balancer, scales, rate=0.0, least=30.0, steps=3000)  # the variances first
        found = minimise(balancer, scales, rate=10.0, least=30.0, steps=1000)
        assert along(found) == pytest.approx(0.5, abs=0.01)
        uniform = minimise(FixedWeights([1.0, 1.0]), scales, rate=0.02, least=30.0, steps=1000)
        assert along(uniform) == pytest.approx(float(scales[1] / scales.sum()), abs=1e-3)


def test_gradnorm_without_alpha_makes_the_norms_equal() -> None:
    for scales in (SCALES, torch.tensor([400.0, 0.5])):
        balancer = GradNorm(2, ALL, 0.02, 0.0)
        gradients, losses = problem(torch.zeros(3), scales)
        for _ in range(800):
            combined = balancer.combine(gradients, losses)
        norms = balancer.weights * gradients.norm(dim=1)
        assert float(norms[0] / norms[1]) == pytest.approx(1, abs=0.1)  # the sign's steps do not end
        assert float(balancer.weights.sum()) == pytest.approx(1)
        # Equal norms: the direction is that of the unit vectors' sum, whatever the scales.
        units = (gradients / gradients.norm(dim=1, keepdim=True)).sum(0)
        assert float(torch.cosine_similarity(combined, units, dim=0)) > 0.995


def test_gradnorms_first_step_by_hand() -> None:
    """Norms 3 and 1 under weights 1 and 1: mean 2, the first above it and the second below."""
    balancer = GradNorm(2, [slice(0, 1)], 0.1, 0.0)
    # What is not shared, the second column, counts for nothing.
    combined = balancer.combine(torch.tensor([[3.0, 9.0], [-1.0, 0.0]]), torch.ones(2))
    assert combined.tolist() == [1.0, 4.5]
    first, second = -0.1 * 3 / 2, 0.1 * 1 / 2
    wanted = math.exp(first) / (math.exp(first) + math.exp(second))
    assert balancer.weights.tolist() == pytest.approx([wanted, 1 - wanted])


def test_gradnorm_favours_who_trains_slowly() -> None:
    balancer = GradNorm(2, ALL, 0.02, 1.5)
    gradients = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    balancer.combine(gradients, torch.tensor([4.0, 100.0]))
    for _ in range(
        500
    ):  # since then the first has fallen to 3/4, the second to 1/4: relative rates 1.5 and 0.5
        balancer.combine(gradients, torch.tensor([3.0, 25.0]))
    ratio = balancer.weights[0] / balancer.weights[1]
    assert float(ratio) == pytest.approx(3**1.5, rel=0.1)


def test_pcgrad_by_hand() -> None:
    """g = (1, 0) and h = (-1, 1): g.h = -1, so g' = g + h/2 = (1/2, 1/2) and h' = h + g = (0, 1)."""
    balancer = PCGrad(2, [slice(0, 2)], np.random.default_rng(0))
    gradients = torch.tensor([[1.0, 0.0, 6.0], [-1.0, 1.0, 0.0]])
    combined = balancer.combine(gradients, torch.ones(2))
    assert combined.tolist() == [0.25, 0.75, 3.0]  # the third is not shared: the mean
    assert balancer.metrics() == {"balancing/conflicts": 1.0}
    agreeing = torch.tensor([[1.0, 0.0, 6.0], [1.0, 1.0, 0.0]])
    assert torch.equal(balancer.combine(agreeing, torch.ones(2)), agreeing.mean(0))
    assert balancer.metrics() == {"balancing/conflicts": 0.0}


def test_after_pcgrads_projection_two_gradients_do_not_conflict_in_either_order() -> None:
    random = np.random.default_rng(0)
    conflicts = 0
    for _ in range(200):
        given = random.normal(size=(2, 5))
        others = [np.array([1]), np.array([0])]
        found = projected(given @ given.T, others, [0, 1]) @ given
        assert (found @ given.T >= -1e-9).all() and found[0] @ found[1] >= -1e-9
        # Both orders of two environments are one.
        again = projected(given @ given.T, others[::-1], [1, 0]) @ given
        np.testing.assert_allclose(found, again[::-1])
        conflicts += given[0] @ given[1] < 0
        # A projection takes away a direction, of whatever length: the other's scale is nothing to it.
        scaled = given * np.array([[1.0], [100.0]])
        np.testing.assert_allclose((projected(scaled @ scaled.T, others, [0, 1]) @ scaled)[0], found[0])
    assert 50 < conflicts < 150


def test_pcgrads_coefficients_are_the_papers_algorithm() -> None:
    """Against the projection of vectors, gradient by gradient, for five environments."""
    random = np.random.default_rng(1)
    given = random.normal(size=(5, 4))
    orders = [random.permutation([j for j in range(5) if j != i]) for i in range(5)]
    wanted = []
    for i in range(5):
        own = given[i].copy()
        for j in orders[i]:
            if own @ given[j] < 0:
                own -= own @ given[j] / (given[j] @ given[j]) * given[j]
        wanted.append(own)
    np.testing.assert_allclose(projected(given @ given.T, orders, range(5)) @ given, wanted)


def test_pcgrad_still_finds_the_minimum_of_two() -> None:
    """It changes the path; where gradients are opposed and equal, in the end, it stands still as the sum does."""
    point = minimise(pcgrad(), rate=0.005)
    assert 0.0 < along(point) < 1.0
    gradients, losses = problem(point)
    assert pcgrad().combine(gradients, losses).norm() < 1e-3


def test_by_return_weighs_by_what_is_lacking() -> None:
    balancer = ByReturn([100.0, None, None])
    balancer.begin([None, None, 5.0])
    assert balancer.weights.tolist() == pytest.approx([1 / 3] * 3)
    balancer.begin([0.0, 2.0, 5.0])
    balancer.begin([75.0, 12.0, 5.0])  # lacks 1/4; is its own best; has not moved, so it lacks all
    assert balancer.weights.tolist() == pytest.approx(np.array([0.45, 0.2, 1.2]) / 1.85)
    balancer.begin([130.0, 7.0, 10.0])  # above its reference; half of its best; best
    assert balancer.weights.tolist() == pytest.approx(np.array([0.2, 0.7, 0.2]) / 1.1)
    combined = balancer.combine(torch.eye(3), torch.zeros(3))
    assert torch.equal(combined, balancer.weights)


MAKERS: dict[str, Any] = {
    "fixed": lambda: FixedWeights([1.0, 2.0, 3.0]),
    "uncertainty": lambda: Uncertainty(3, 0.05),
    "gradnorm": lambda: GradNorm(3, ALL, 0.05, 1.5),
    "pcgrad": lambda: pcgrad(3),
    "by_return": lambda: ByReturn([None, 4.0, None]),
}


def steps(balancer: Balancer, seed: int, left_out: int = -1) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    found = []
    for count in range(5):
        balancer.begin([float(count), float(count) / 2, float(-count)])
        gradients = torch.randn(3, 3, generator=random)
        losses = torch.rand(3, generator=random)
        if left_out >= 0:
            gradients[left_out], losses[left_out] = 0, 0
        found.append(balancer.combine(gradients, losses))
    return found


@pytest.mark.parametrize("method", MAKERS)
def test_goes_on_exactly_from_a_saved_state(method: str, tmp_path: Path) -> None:
    whole, first, second = (MAKERS[method]() for _ in range(3))
    steps(whole, 0), steps(first, 0)
    save_state(tmp_path / "state", first.get_state())
    second.set_state(load_state(tmp_path / "state"))
    assert torch.equal(second.weights, whole.weights) and second.metrics() == whole.metrics()
    for wanted, found in zip(steps(whole, 1), steps(second, 1), strict=True):
        assert torch.equal(wanted, found)


@pytest.mark.parametrize("method", MAKERS)
def test_who_is_left_out_takes_no_part(method: str) -> None:
    balancer = MAKERS[method]()
    steps(balancer, 0)
    balancer.leave_out(1)
    found = steps(balancer, 1, left_out=1)
    assert all(torch.isfinite(each).all() for each in found)
    if method != "pcgrad":  # whose weights are what is left of each after projection
        assert balancer.weights[1] == 0
    if method in ("fixed", "gradnorm", "by_return"):
        assert float(balancer.weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize("method", ["fixed", "uncertainty", "gradnorm", "pcgrad", "by_return"])
def test_nothing_is_balanced_with_a_single_environment(method: str) -> None:
    config = BalancingConfig(balancing=method)  # type: ignore[arg-type]
    with pytest.raises(
        StillhouseError, match=rf"balancing: {method} .* one environment \(cartpole\)"
    ) as caught:
        make_balancer(config, ["cartpole"], ALL, "q_values", 0)
    assert "\n" not in str(caught.value)
    assert make_balancer(BalancingConfig(), ["cartpole"], ALL, "q_values", 0).weights.tolist() == [1.0]


def test_losses_of_either_sign_are_refused_where_they_mean_nothing() -> None:
    for config in (BalancingConfig(balancing="uncertainty"), BalancingConfig(balancing="gradnorm")):
        with pytest.raises(StillhouseError, match="needs losses that are never negative"):
            make_balancer(config, ["a", "b"], ALL, "logits", 0)
    equal = BalancingConfig(balancing="gradnorm", gradnorm_alpha=0)
    assert isinstance(make_balancer(equal, ["a", "b"], ALL, "logits", 0), GradNorm)


def test_settings_of_another_way_are_refused() -> None:
    for settings, said in (
        ({"weights": {"a": 2.0}}, "weights are allowed with balancing fixed, not with uniform"),
        ({"reference_returns": {"a": 2.0}, "balancing": "pcgrad"}, "reference_returns are allowed with"),
        ({"weights": {"a": 0.0}, "balancing": "fixed"}, "numbers greater than 0"),
        ({"balancing": "random"}, "Input should be 'uniform', 'fixed'"),
    ):
        with pytest.raises(StillhouseError, match=said):
            parse(BalancingConfig, settings, "joint")
