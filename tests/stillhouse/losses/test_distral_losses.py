"""Distral's rewards and likelihood, by hand and by autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.losses.distral import cross_entropy, regularised_rewards


def logs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities).log()


def test_rewards_by_hand() -> None:
    """pi_i 1/2 and 1/4, pi_0 1/8 and 1/2, beta 2: alpha/2 log pi_0 - 1/2 log pi_i, in multiples of log 2."""
    rewards, policy, distilled = torch.tensor([1.0, 0.0]), logs(0.5, 0.25), logs(0.125, 0.5)
    two = math.log(2)
    for alpha, wanted in (
        (0.0, [1 + two / 2, two]),  # the entropy alone
        (0.5, [1 - 3 * two / 4 + two / 2, -two / 4 + two]),
        (1.0, [1 - 3 * two / 2 + two / 2, -two / 2 + two]),  # the KL alone
    ):
        found = regularised_rewards(rewards, policy, distilled, alpha, 2.0)
        torch.testing.assert_close(found, torch.tensor(wanted))


@given(
    c_kl=st.floats(0, 3), c_ent=st.floats(0.01, 3), policy=st.floats(0.01, 1), distilled=st.floats(0.01, 1)
)
def test_they_are_the_costs_of_the_papers_first_equation(
    c_kl: float, c_ent: float, policy: float, distilled: float
) -> None:
    alpha, beta = c_kl / (c_kl + c_ent), 1 / (c_kl + c_ent)
    found = regularised_rewards(torch.tensor([2.0]), logs(policy), logs(distilled), alpha, beta)
    assert float(found) == pytest.approx(
        2 - c_kl * math.log(policy / distilled) - c_ent * math.log(policy), abs=1e-4
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_counted_from_uniform_play_a_step_of_it_pays_nothing(alpha: float) -> None:
    uniform = logs(0.2, 0.2)
    rewards = torch.tensor([0.0, 3.0])
    counted = regularised_rewards(rewards, uniform, uniform, alpha, 0.5, math.log(5))
    torch.testing.assert_close(counted, rewards)
    paper = regularised_rewards(rewards, uniform, uniform, alpha, 0.5)
    torch.testing.assert_close(paper, rewards + (1 - alpha) / 0.5 * math.log(5))


def test_likelihood_and_its_gradient_by_hand() -> None:
    policy = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    distilled = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]])
    logits = distilled.log().requires_grad_()
    told = policy.log().requires_grad_()
    found = cross_entropy(torch.log_softmax(logits, 1), told)
    two = math.log(2)
    torch.testing.assert_close(found, torch.tensor([0.5 * 2 + 0.25 + 0.25 * 2, 5 / 3]) * two)
    found.sum().backward()
    torch.testing.assert_close(logits.grad, distilled - policy)
    assert told.grad is None
