"""Returns and temporal-difference losses against values worked by hand, and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.losses.td import q_learning_target, td_loss
from stillhouse.returns import generalized_advantages, lambda_returns


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def test_lambda_returns_by_hand() -> None:
    # lambda 0.5, gamma 0.9. Backwards: G2 = 3 + 0.9*4 = 6.6; G1 = 2 + 0.9*(0.5*3 + 0.5*6.6) = 6.32;
    # G0 = 1 + 0.9*(0.5*2 + 0.5*6.32) = 4.744.
    returns = lambda_returns(column(1, 2, 3), column(0.9, 0.9, 0.9), column(0.5, 0.5, 0.5), column(2, 3, 4))
    torch.testing.assert_close(returns, column(4.744, 6.32, 6.6))


def test_termination_stops_the_return_and_truncation_bootstraps() -> None:
    # Step 0 terminates: nothing follows its reward. Step 1 is truncated: its own successor's value, not the next return.
    returns = lambda_returns(column(1, 2, 3), column(0, 0.9, 0.9), column(0, 0, 0.5), column(7, 10, 4))
    torch.testing.assert_close(returns, column(1, 11, 6.6))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 3))
def test_lambda_returns_equal_the_mixture_of_n_step_returns(seed: int, steps: int, copies: int) -> None:
    generator = np.random.default_rng(seed)
    trace_value, gamma = generator.random(), generator.random()
    rewards, values = generator.normal(size=(2, steps, copies))
    terminated = generator.random((steps, copies)) < 0.2
    truncated = ~terminated & (generator.random((steps, copies)) < 0.2)
    computed = lambda_returns(
        *(
            torch.tensor(array)
            for array in (rewards, gamma * ~terminated, trace_value * ~(terminated | truncated), values)
        )
    ).numpy()
    for row in range(copies):
        for start in range(steps):
            total, n_step_sum, discount, weight = 0.0, 0.0, 1.0, 1.0
            for t in range(start, steps):
                n_step_sum += discount * rewards[t, row]
                discount *= gamma
                over = terminated[t, row] or truncated[t, row] or t == steps - 1
                n_step = n_step_sum + (0.0 if terminated[t, row] else discount * values[t, row])
                total += weight * (1.0 if over else 1 - trace_value) * n_step
                weight *= trace_value
                if over:
                    break
            assert computed[start, row] == pytest.approx(total, abs=1e-9)


def test_generalized_advantages_by_hand() -> None:
    # gamma 0.9, lambda 0.5, V = 5, 6, 4, then 3. delta = 1 + 0.9*6 - 5, 0 + 0.9*4 - 6, 2 + 0.9*3 - 4 = 1.4, -2.4, 0.7.
    # A2 = 0.7; A1 = -2.4 + 0.45*0.7 = -2.085; A0 = 1.4 + 0.45*-2.085 = 0.46175.
    advantages = generalized_advantages(
        column(1, 0, 2), column(0.9, 0.9, 0.9), column(0.5, 0.5, 0.5), column(5, 6, 4), column(6, 4, 3)
    )
    torch.testing.assert_close(advantages, column(0.46175, -2.085, 0.7))


def test_advantages_end_with_the_episode() -> None:
    # Step 0 terminates: 1 - 5. Step 1 is truncated in a state worth 10: 2 + 0.9*10 - 6, and nothing of step 2.
    advantages = generalized_advantages(
        column(1, 2, 2), column(0, 0.9, 0.9), column(0, 0, 0.5), column(5, 6, 4), column(7, 10, 3)
    )
    torch.testing.assert_close(advantages, column(-4, 5, 0.7))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 3))
def test_advantages_are_discounted_sums_of_errors_and_lambda_returns_less_the_value(
    seed: int, steps: int, copies: int
) -> None:
    generator = np.random.default_rng(seed)
    trace_value, gamma = generator.random(), generator.random()
    rewards, last, values = generator.normal(size=(3, steps, copies))
    terminated = generator.random((steps, copies)) < 0.2
    truncated = ~terminated & (generator.random((steps, copies)) < 0.2)
    successors = np.where(truncated, last, np.concatenate([values[1:], last[-1:]]))
    discounts, traces = gamma * ~terminated, trace_value * ~(terminated | truncated)
    arrays = [torch.tensor(array) for array in (rewards, discounts, traces, values, successors)]
    computed = generalized_advantages(*arrays).numpy()
    returns = lambda_returns(*arrays[:3], arrays[4]).numpy()
    np.testing.assert_allclose(computed, returns - values, atol=1e-9)
    for row in range(copies):
        for start in range(steps):
            total, weight = 0.0, 1.0
            for t in range(start, steps):
                bootstrap = 0.0 if terminated[t, row] else gamma * successors[t, row]
                total += weight * (rewards[t, row] + bootstrap - values[t, row])
                weight *= gamma * trace_value
                if terminated[t, row] or truncated[t, row]:
                    break
            assert computed[start, row] == pytest.approx(total, abs=1e-9)


Q = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 0.5]])
ACTIONS = torch.tensor([1, 0, 1])


def test_td_losses_by_hand() -> None:
    # errors 2-1.5 = 0.5, 3-0 = 3, 0.5-0.5 = 0
    targets = torch.tensor([1.5, 0.0, 0.5])
    assert td_loss(Q, ACTIONS, targets, "mse").item() == pytest.approx((0.125 + 4.5 + 0) / 3)
    assert td_loss(Q, ACTIONS, targets, "huber").item() == pytest.approx((0.125 + 2.5 + 0) / 3)


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_td_loss_does_not_change_with_batch_size_and_targets_get_no_gradient(kind: str) -> None:
    targets = torch.tensor([1.5, 0.0, 0.5], requires_grad=True)
    q = Q.clone().requires_grad_()
    loss = td_loss(q, ACTIONS, targets, kind)  # type: ignore[arg-type]
    twice = td_loss(q.repeat(2, 1), ACTIONS.repeat(2), targets.repeat(2), kind)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, twice)
    loss.backward()
    assert targets.grad is None
    assert q.grad is not None and q.grad[0, 0] == 0 and q.grad[1, 0] != 0


def test_q_learning_targets_by_hand() -> None:
    rewards, discounts = torch.tensor([1.0, 2.0]), torch.tensor([0.9, 0.0])
    target_q = torch.tensor([[1.0, 3.0], [5.0, 6.0]])
    online_q = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(q_learning_target(rewards, discounts, target_q), torch.tensor([3.7, 2.0]))
    # Double Q: the online network chooses action 0 in the first row, the target network says what it is worth.
    torch.testing.assert_close(
        q_learning_target(rewards, discounts, target_q, online_q), torch.tensor([1.9, 2.0])
    )
