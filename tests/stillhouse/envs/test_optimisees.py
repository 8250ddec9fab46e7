"""Problems for a learned optimiser: values by hand, splits apart, minibatches, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.config import parse
from stillhouse.envs.optimisees import OptimiseeConfig, held_out, problems
from stillhouse.errors import StillhouseError

torch.set_num_threads(1)


def test_a_quadratic_is_the_squared_norm_of_what_is_left() -> None:
    functions = problems(OptimiseeConfig(dimensions=3), "training", np.arange(4), steps=1)
    start, theta = functions.start, torch.randn(4, 3, requires_grad=True)
    assert start.shape == (4, 3) and float(start.abs().max()) < 0.1
    losses = functions.losses(theta, 0)
    # f is quadratic: its gradient is 2 W^T (W theta - y), its Hessian 2 W^T W, and f = 0 where W theta = y.
    hessian = torch.func.hessian(lambda each: functions.losses(each, 0).sum())(theta.detach())
    (gradient,) = torch.autograd.grad(losses.sum(), theta)
    for index in range(4):
        own = hessian[index, :, index]
        assert float(hessian[index, :, (index + 1) % 4].abs().max()) == 0
        solution = theta[index].detach() - torch.linalg.solve(own, gradient[index])
        filled = theta.detach().clone()
        filled[index] = solution
        assert float(functions.losses(filled, 0)[index]) < 1e-3
        step = theta[index].detach() - solution
        assert torch.allclose(losses[index].detach(), 0.5 * step @ own @ step, rtol=1e-2, atol=1e-3)
    assert torch.equal(functions.losses(theta, 0), functions.losses(theta, 1))


def test_spirals_are_learnt_by_a_network_whose_loss_is_the_cross_entropy() -> None:
    config = OptimiseeConfig(kind="spirals", hidden=3, minibatch=8)
    functions = problems(config, "training", np.arange(2), steps=2)
    assert functions.start.shape == (2, config.size) == (2, 17)
    theta = torch.zeros(2, 17)
    assert torch.allclose(functions.losses(theta, 0), torch.full((2,), np.log(2), dtype=torch.float32))
    theta[:, -1] = 3.0  # the second class's bias: half of the points are of it
    expected = 0.5 * (np.log1p(np.exp(-3)) + np.log1p(np.exp(3)))
    assert np.allclose(functions.losses(theta, 1), expected, rtol=1e-5)
    # Another minibatch at every step, and one more than there are steps.
    assert len({float(functions.losses(functions.start, step)[0]) for step in range(3)}) == 3
    with pytest.raises(IndexError):
        functions.losses(functions.start, 3)


@pytest.mark.parametrize("kind", ["quadratic", "spirals"])
def test_no_problem_is_in_two_splits_and_a_number_is_one_problem(kind: str) -> None:
    config = OptimiseeConfig(kind=kind, minibatch=4)  # type: ignore[arg-type]
    numbers = np.arange(200)
    starts = {
        split: {tuple(row) for row in problems(config, split, numbers, 1).start.tolist()}
        for split in ("training", "tuning", "test")  # type: ignore[arg-type]
    }
    assert all(len(each) == 200 for each in starts.values())
    assert len(set.union(*starts.values())) == 600
    few = problems(config, "test", np.array([7, 3]), 1)
    many = problems(config, "test", np.arange(8), 1)
    assert torch.equal(few.start, many.start[[7, 3]])
    if kind == "quadratic":
        theta = torch.ones(8, config.size)
        assert torch.allclose(few.losses(theta[:2], 0), many.losses(theta, 0)[[7, 3]])


def test_test_problems_are_different_and_drawn_by_the_seed() -> None:
    config = OptimiseeConfig(test_tasks=20)
    first = held_out(config, 20, 0)
    assert sorted(first) == list(range(20)) and (first != held_out(config, 20, 1)).any()
    with pytest.raises(StillhouseError, match="21 test tasks were asked for, but 1 to 20"):
        held_out(config, 21, 0)


def test_bad_settings_are_one_line() -> None:
    for settings, words in (
        ({"kind": "mnist"}, "kind"),
        ({"dimensions": 0}, "dimensions"),
        ({"minibatch": 1}, "minibatch"),
    ):
        with pytest.raises(StillhouseError, match=words) as error:
            parse(OptimiseeConfig, settings)
        assert "\n" not in str(error.value)
