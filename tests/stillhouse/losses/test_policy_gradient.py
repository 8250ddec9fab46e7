"""PPO's loss against values worked by hand, and its written-out gradients against automatic differentiation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stillhouse.losses.policy_gradient import ClippedLoss, clipped_loss, normalise


def loss_of(
    logits: Tensor, values: Tensor, actions: Tensor, log_mu: Tensor, advantages: Tensor, returns: Tensor
) -> ClippedLoss:
    return clipped_loss(logits, values, actions, log_mu, advantages, returns, 0.2, 0.5, 0.0)


def quarter(advantage: float, action: int = 1) -> ClippedLoss:
    """pi = (1/4, 3/4); the action was taken with probability 1/2; a value of 3 where 1 came back."""
    return loss_of(
        torch.tensor([[0.0, math.log(3)]]),
        torch.tensor([3.0]),
        torch.tensor([action]),
        torch.tensor([math.log(0.5)]),
        torch.tensor([advantage]),
        torch.tensor([1.0]),
    )


def test_parts_by_hand() -> None:
    loss = quarter(2.0)
    # rho = 0.75 / 0.5 = 1.5, clipped to 1.2: min(3, 2.4).
    assert loss.policy.item() == pytest.approx(-2.4)
    assert loss.log_ratio.item() == pytest.approx(math.log(1.5))
    assert loss.value.item() == pytest.approx(4.0)
    assert loss.entropy.item() == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert loss.values_gradient.item() == pytest.approx(2.0)  # 2 * 0.5 * (3 - 1)


def test_the_clipped_side_has_no_gradient_and_the_other_one_has() -> None:
    assert not quarter(2.0).logits_gradient.any()  # more likely already, and good: enough
    # More likely, but bad: min(-1.5, -1.2) = -1.5; the gradient is -rho A (onehot - pi) = 1.5 (-1/4, 1/4).
    loss = quarter(-1.0)
    assert loss.policy.item() == pytest.approx(1.5)
    torch.testing.assert_close(loss.logits_gradient, torch.tensor([[-0.375, 0.375]]))
    # Less likely (rho = 1/2), and bad: min(-0.5, -0.8) = -0.8, enough. Less likely, and good: min(0.5, 0.8), back.
    assert quarter(-1.0, action=0).policy.item() == pytest.approx(0.8)
    assert not quarter(-1.0, action=0).logits_gradient.any()
    torch.testing.assert_close(quarter(1.0, action=0).logits_gradient, torch.tensor([[-0.375, 0.375]]))


def batch(count: int = 40) -> tuple[Tensor, ...]:
    """Logits, values, actions, log mu, advantages and returns, off-policy enough for every side of the clip."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    values, advantages, returns = torch.randn(3, count, generator=generator, dtype=torch.float64)
    actions = torch.randint(3, (count,), generator=generator)
    moved = logits + 0.4 * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    log_mu = torch.log_softmax(moved, 1).gather(1, actions.unsqueeze(1)).squeeze(1)
    return logits, values, actions, log_mu, advantages, returns


@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.03])
def test_the_gradients_are_those_of_the_loss(entropy_coefficient: float) -> None:
    logits, values, actions, log_mu, advantages, returns = batch()
    for tensor in (logits, values):
        tensor.requires_grad_()
    policy = torch.distributions.Categorical(logits=logits)
    ratio = (policy.log_prob(actions) - log_mu).exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages)
    expected = (
        -objective.mean()
        + 0.7 * (values - returns).square().mean()
        - entropy_coefficient * policy.entropy().mean()
    )
    expected.backward()
    loss = clipped_loss(logits, values, actions, log_mu, advantages, returns, 0.1, 0.7, entropy_coefficient)
    total = loss.policy + 0.7 * loss.value - entropy_coefficient * loss.entropy
    torch.testing.assert_close(total.mean(), expected.detach())
    assert logits.grad is not None and values.grad is not None
    torch.testing.assert_close(loss.logits_gradient, logits.grad)
    torch.testing.assert_close(loss.values_gradient, values.grad)
    assert 0 < (loss.logits_gradient == 0).all(1).sum() < 40 or entropy_coefficient


def test_the_loss_does_not_change_with_batch_size() -> None:
    rows = batch()
    once, twice = loss_of(*rows), loss_of(*(torch.cat([row, row]) for row in rows))
    torch.testing.assert_close(once.policy.mean(), twice.policy.mean())
    # Each of two equal rows gets half of the gradient.
    torch.testing.assert_close(once.logits_gradient, 2 * twice.logits_gradient[:40])
    torch.testing.assert_close(once.values_gradient, 2 * twice.values_gradient[:40])


def test_nothing_flows_into_the_data() -> None:
    rows = [row.requires_grad_() if row.is_floating_point() else row for row in batch()]
    assert not any(part.requires_grad for part in loss_of(*rows))


def test_advantages_are_normalised_by_row_and_a_single_one_is_0() -> None:
    # Mean 3, variance (4 + 1 + 0 + 9) / 4; and the same ten times larger.
    rows = torch.tensor([[1.0, 2.0, 3.0, 6.0], [10.0, 20.0, 30.0, 60.0]])
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0]) / math.sqrt(3.5)
    torch.testing.assert_close(normalise(rows), torch.stack([expected, expected]))
    assert normalise(torch.tensor([[5.0]])).item() == 0
