"""Returns and temporal-difference losses against values worked by hand, and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.losses.td import q_learning_target, td_loss
from stillhouse.returns import generalized_advantages, lambda_returns, vtrace


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


VTRACE = (column(1, 0, 2), column(0.9, 0.9, 0.9), column(1, 1, 1), column(5, 6, 4), column(6, 4, 3))


def test_vtrace_by_hand() -> None:
    # gamma 0.9, V = 5, 6, 4, then 3, pi/mu = 1.5, 0.5, 2. delta = 1 * 1.4, 0.5 * -2.4, 1 * 0.7.
    # v2 = 4 + 0.7; v1 = 6 - 1.2 + 0.9*0.5*0.7 = 5.115; v0 = 5 + 1.4 + 0.9*1*(5.115 - 6) = 5.6035.
    # q = 1 + 0.9*5.115, 0 + 0.9*4.7, 2 + 0.9*3.
    found = vtrace(*VTRACE, column(1.5, 0.5, 2.0))
    torch.testing.assert_close(found.targets, column(5.6035, 5.115, 4.7))
    torch.testing.assert_close(found.q_t, column(5.6035, 4.23, 4.7))
    torch.testing.assert_close(found.rho_t, column(1, 0.5, 1))
    torch.testing.assert_close(found.q_t - VTRACE[3], column(0.6035, -1.77, 0.7))


def test_vtrace_bounds_by_hand() -> None:
    # rho_bar 2: delta = 1.5 * 1.4, 0.5 * -2.4, 2 * 0.7; c_bar 0.25 in all steps.
    # v2 = 4 + 1.4; v1 = 6 - 1.2 + 0.9*0.25*1.4 = 5.115; v0 = 5 + 2.1 + 0.9*0.25*-0.885 = 6.900875.
    found = vtrace(*VTRACE, column(1.5, 0.5, 2.0), rho_bar=2.0, c_bar=0.25)
    torch.testing.assert_close(found.targets, column(6.900875, 5.115, 5.4))
    torch.testing.assert_close(found.rho_t, column(1.5, 0.5, 2.0))


def test_vtrace_ends_with_the_episode() -> None:
    # Step 0 terminates: 1. Step 1 is truncated in a state worth 10: 2 + 0.9*10, nothing of step 2; its target half way there.
    found = vtrace(
        column(1, 2, 2),
        column(0, 0.9, 0.9),
        column(0, 0, 1),
        column(5, 6, 4),
        column(7, 10, 3),
        column(1, 0.5, 1),
    )
    torch.testing.assert_close(found.q_t, column(1, 11, 4.7))
    torch.testing.assert_close(found.targets, column(1, 8.5, 4.7))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 3), st.booleans())
def test_vtrace_equals_its_sum(seed: int, steps: int, copies: int, on_policy: bool) -> None:
    """Equation 1 of the paper, term by term; on-policy, the n-step return, whatever the values in between are."""
    generator = np.random.default_rng(seed)
    gamma, trace = generator.random(), 1.0 if on_policy else generator.random()
    rho_bar, c_bar = (1.0, 1.0) if on_policy else 2 * generator.random(2)
    rewards, last, values = generator.normal(size=(3, steps, copies))
    ratios = np.ones((steps, copies)) if on_policy else np.exp(generator.normal(size=(steps, copies)))
    terminated = generator.random((steps, copies)) < 0.2
    truncated = ~terminated & (generator.random((steps, copies)) < 0.2)
    ended = terminated | truncated
    successors = np.where(truncated, last, np.concatenate([values[1:], last[-1:]]))
    arrays = (rewards, gamma * ~terminated, trace * ~ended, values, successors, ratios)
    found = vtrace(*(torch.tensor(array) for array in arrays), rho_bar, c_bar)
    targets, q_t = found.targets.numpy(), found.q_t.numpy()

    def following(t: int, row: int) -> float:
        return float(successors[t, row] if t == steps - 1 or ended[t, row] else targets[t + 1, row])

    for row in range(copies):
        for start in range(steps):
            total, weight, n_step = values[start, row], 1.0, 0.0
            for t in range(start, steps):
                bootstrap = 0.0 if terminated[t, row] else gamma * successors[t, row]
                rho, c = min(rho_bar, ratios[t, row]), trace * min(c_bar, ratios[t, row])
                total += weight * rho * (rewards[t, row] + bootstrap - values[t, row])
                n_step += gamma ** (t - start) * rewards[t, row]
                weight *= gamma * c
                if ended[t, row] or t == steps - 1:
                    n_step += gamma ** (t - start) * bootstrap
                    break
            assert targets[start, row] == pytest.approx(total, abs=1e-9)
            mixed = (1 - trace) * successors[start, row] + trace * following(start, row)
            expected_q = rewards[start, row] + gamma * (not terminated[start, row]) * mixed
            assert q_t[start, row] == pytest.approx(expected_q, abs=1e-9)
            if on_policy:
                assert targets[start, row] == pytest.approx(n_step, abs=1e-9)
                assert q_t[start, row] == pytest.approx(n_step, abs=1e-9)


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
