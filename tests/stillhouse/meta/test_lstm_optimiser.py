"""The learned optimiser: preprocessing by hand, what its gradient flows through, truncation, its baselines; resume; refusals."""

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
from stillhouse.envs.optimisees import OptimiseeConfig, Problems
from stillhouse.errors import StillhouseError
from stillhouse.meta.lstm_optimiser import (
    CoordinatewiseLSTM,
    LSTMOptimiser,
    LSTMOptimiserConfig,
    by_rule,
    log_and_sign,
    minimise,
    tuned,
    unroll,
)

torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "optimisee": OptimiseeConfig(dimensions=2),
    "trajectories": 3,
    "batch": 2,
    "optimisee_steps": 6,
    "unroll": 3,
    "hidden": 4,
}


def trained(config: LSTMOptimiserConfig, seed: int = 0) -> LSTMOptimiser:
    learner = LSTMOptimiser(config, seed)
    for _ in learner.train():
        pass
    return learner


def slopes(power: int) -> Problems:
    """f = sum theta^power: of power 1 its gradient is constant."""
    return Problems(torch.full((1, 2), 0.5), lambda theta, step: theta.pow(power).sum(1))


# --- the network ----------------------------------------------------------------------------------------------


def test_log_and_sign_by_hand() -> None:
    k = 5.0
    found = log_and_sign(
        torch.tensor([1.0, -math.e, math.exp(-5), -math.exp(-6), 0.0, 0.5 * math.exp(-5)]), k
    )
    expected = [[0, 1], [0.2, -1], [-1, 1], [-1, -math.exp(-1)], [-1, 0], [-1, 0.5]]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-6)


def test_every_coordinate_is_treated_alike_with_a_state_of_its_own() -> None:
    network = CoordinatewiseLSTM(LSTMOptimiserConfig(**SMALL), 0)
    gradients = torch.tensor([[0.1, -2.0], [0.1, 3.0]])
    first, state = network(gradients, network.initial_state(4))
    assert first[0, 0] == first[1, 0] and first[0, 0] != first[0, 1]
    second, _ = network(torch.tensor([[0.1, 0.1], [0.1, 0.1]]), state)
    assert second[0, 0] == second[1, 0] and second[0, 0] != second[0, 1]  # the same gradient, another past


def test_the_scale_multiplies_the_step() -> None:
    gradients = torch.tensor([[0.3, -1.0]])
    steps = []
    for scale in (0.1, 0.2):
        network = CoordinatewiseLSTM(LSTMOptimiserConfig(**SMALL, output_scale=scale), 0)
        steps.append(network(gradients, network.initial_state(2))[0])
    assert torch.allclose(2 * steps[0], steps[1])


def test_fresh_weights_leave_torchs_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    CoordinatewiseLSTM(LSTMOptimiserConfig(**SMALL), 0)
    assert torch.equal(torch.rand(1), expected)


# --- what the gradient flows through --------------------------------------------------------------------------


class Halving(torch.nn.Module):
    """An optimiser of one number: it adds -rate times the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.25, dtype=torch.float64))

    def forward(self, gradients: Tensor, state: Any) -> tuple[Tensor, Any]:
        return -self.rate * gradients, state


def test_no_gradient_flows_through_the_optimisees_gradient() -> None:
    # f = theta^2, theta' = theta - r g. With g = 2 theta: theta_1 = theta_0 (1 - 2 r), theta_2 = theta_1 - 2 r theta_1.
    # With g_2 constant, d theta_2 / dr = d theta_1 / dr - g_2 = -g_1 - g_2; through g_2 it would have the factor (1 - 2 r) on the first.
    functions = Problems(
        torch.tensor([[1.0]], dtype=torch.float64), lambda theta, step: theta.square().sum(1)
    )
    network, r = Halving(), 0.25
    losses, theta, _ = unroll(network, functions, functions.start, [], 0, 2)  # type: ignore[arg-type]
    one, two = 1 - 2 * r, (1 - 2 * r) ** 2
    assert torch.allclose(losses.flatten(), torch.tensor([one**2, two**2], dtype=torch.float64))
    losses.sum().backward()
    by_hand = 2 * one * -2 + 2 * two * (-2 - 2 * one)
    through_the_gradient = 2 * one * -2 + 2 * two * (-2 * one - 2 * one)
    assert np.isclose(float(network.rate.grad), by_hand)
    assert not np.isclose(by_hand, through_the_gradient)
    assert np.isclose(float(theta.detach()), two)


def test_backpropagation_ends_where_an_unroll_begins() -> None:
    network = CoordinatewiseLSTM(LSTMOptimiserConfig(**SMALL), 0)
    functions = slopes(2)
    _, theta, state = unroll(network, functions, functions.start, network.initial_state(2), 0, 3)
    assert theta.requires_grad and state[0][0].requires_grad
    cut = [(h.detach().clone(), c.detach().clone()) for h, c in state]
    gradients = []
    for begin, past in ((theta, state), (theta.detach().clone(), cut)):
        network.zero_grad()
        unroll(network, functions, begin, past, 3, 3)[0].mean().backward()
        gradients.append(torch.cat([each.grad.flatten() for each in network.parameters()]))
    assert torch.equal(*gradients)
    # Within an unroll it does flow: the whole six steps at once have another gradient.
    network.zero_grad()
    losses, *_ = unroll(network, functions, functions.start, network.initial_state(2), 0, 6)
    losses[3:].mean().backward()
    whole = torch.cat([each.grad.flatten() for each in network.parameters()])
    assert not torch.allclose(whole, gradients[0])


def test_two_unrolls_go_the_same_way_as_one() -> None:
    network, functions = CoordinatewiseLSTM(LSTMOptimiserConfig(**SMALL), 0), slopes(2)
    whole, end, _ = unroll(network, functions, functions.start, network.initial_state(2), 0, 6)
    first, theta, state = unroll(network, functions, functions.start, network.initial_state(2), 0, 3)
    second, last, _ = unroll(network, functions, theta, state, 3, 3)
    assert torch.allclose(torch.cat([first, second]), whole) and torch.allclose(last, end)


# --- the ordinary optimisers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [("sgd", torch.optim.SGD), ("rmsprop", torch.optim.RMSprop), ("adam", torch.optim.Adam)],
)
def test_the_baselines_are_torchs(rule: Any, theirs: Any) -> None:
    functions = slopes(4)
    ours = minimise(functions, by_rule(rule, 0.1), 5)
    theta = functions.start.clone().requires_grad_()
    optimiser = theirs([theta], lr=0.1)
    expected = []
    for step in range(6):
        loss = functions.losses(theta, step).sum()
        expected.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert ours.shape == (1, 6) and np.allclose(ours[0], expected, rtol=1e-5)


def test_the_rate_is_the_one_that_ends_lowest_and_never_one_that_diverges() -> None:
    # theta' = theta (1 - 2 r): one step ends at 0 for r = 1/2, the grid has 0.562; from r = 1 on it diverges.
    assert np.isclose(tuned(slopes(2), "sgd", 1), 10**-0.25)


# --- training -------------------------------------------------------------------------------------------------


def test_it_learns_to_minimise() -> None:
    config = LSTMOptimiserConfig(
        optimisee=OptimiseeConfig(dimensions=2),
        trajectories=40,
        batch=8,
        optimisee_steps=20,
        unroll=10,
        hidden=8,
        meta_rate=0.01,
    )
    fresh, learner = LSTMOptimiser(config, 0), trained(config)
    before, after = fresh.evaluate(50, 20, 0), learner.evaluate(50, 20, 0)
    assert (
        after.values.shape == (50, 21)
        and after.unit == "updates"
        and set(after.baselines) == {"sgd", "rmsprop", "adam"}
    )
    assert np.array_equal(before.values[:, 0], after.values[:, 0])
    assert np.array_equal(before.baselines["adam"], after.baselines["adam"])
    assert after.values[:, -1].mean() < 0.5 * before.values[:, -1].mean()


@pytest.mark.parametrize("kind", ["quadratic", "spirals"])
def test_an_interrupted_run_ends_in_the_same_bytes(kind: str, tmp_path: Path) -> None:
    optimisee = OptimiseeConfig(kind=kind, dimensions=2, hidden=2, minibatch=4)  # type: ignore[arg-type]
    config = LSTMOptimiserConfig(**{**SMALL, "optimisee": optimisee}, meta_rate_decay="cosine")
    whole = trained(config)
    broken = LSTMOptimiser(config, 0)
    next(broken.train())
    save_state(tmp_path / "state", broken.get_state())
    resumed = LSTMOptimiser(config, 0)
    resumed.set_state(load_state(tmp_path / "state"))
    reports = list(resumed.train())
    assert [(report.done, report.total) for report in reports] == [(4, 6), (6, 6)]
    for name, tensor in whole.learnt().items():
        assert torch.equal(tensor, resumed.learnt()[name])
    assert not torch.equal(trained(config, 1).learnt()["output.weight"], whole.learnt()["output.weight"])


def test_what_was_learnt_is_taken_over() -> None:
    source, target = trained(LSTMOptimiserConfig(**SMALL)), LSTMOptimiser(LSTMOptimiserConfig(**SMALL), 5)
    target.load(source.learnt())
    assert np.array_equal(source.evaluate(4, 9, 0).values, target.evaluate(4, 9, 0).values)
    with pytest.raises(StillhouseError, match="of another network"):
        LSTMOptimiser(LSTMOptimiserConfig(**{**SMALL, "hidden": 5}), 0).load(source.learnt())


def test_too_few_test_problems_are_refused() -> None:
    config = LSTMOptimiserConfig(**{**SMALL, "optimisee": OptimiseeConfig(dimensions=2, test_tasks=3)})
    with pytest.raises(StillhouseError, match="4 test tasks were asked for, but 1 to 3 are there"):
        LSTMOptimiser(config, 0).evaluate(4, 2, 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"unroll": 30}, "optimisee_steps 100 are no whole number of unrolls of 30"),
        ({"unroll": 0}, "unroll"),
        ({"output_scale": 0}, "output_scale"),
        ({"preprocessing": "log"}, "preprocessing"),
        ({"optimisee": {"kind": "mnist"}}, "optimisee.kind"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(StillhouseError, match=words) as error:
        parse(LSTMOptimiserConfig, settings, "meta_train.lstm")
    assert "\n" not in str(error.value)
