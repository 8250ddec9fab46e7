"""UNREAL's auxiliary losses, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.losses.auxiliary import (
    pixel_control_loss,
    pixel_control_rewards,
    reward_prediction_loss,
    value_replay_loss,
)
from stillhouse.returns import lambda_returns


def test_pseudo_rewards_are_the_mean_absolute_change_of_each_cell() -> None:
    frames = torch.zeros(3, 1, 4, 4, 2, dtype=torch.bool)
    frames[1, 0, 0, 1, 0] = True  # one of eight values of the cell above on the left
    frames[1:, 0, 3, 3] = True  # two of the cell below on the right, which stay
    frames[2, 0, 2, 3, 1] = True  # one more there; above on the left it vanishes
    rewards = pixel_control_rewards(frames, 2)
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [[[[1 / 8, 0], [0, 2 / 8]]], [[[1 / 8, 0], [0, 1 / 8]]]]


def test_pseudo_rewards_of_pictures_are_in_units_of_full_brightness() -> None:
    frames = torch.zeros(2, 1, 2, 2, 1, dtype=torch.uint8)
    frames[0, 0, :, :, 0] = torch.tensor([[255, 10], [0, 51]])
    frames[1, 0, :, :, 0] = torch.tensor([[0, 0], [255, 0]])  # falls and rises do not cancel
    rewards = pixel_control_rewards(frames, 1)
    np.testing.assert_allclose(rewards[0, 0], [[1, 10 / 255], [1, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(pixel_control_rewards(frames, 2)[0, 0], [[(2.2 + 10 / 255) / 4]], rtol=1e-6)


def test_cells_lie_on_a_central_crop() -> None:
    frames = torch.zeros(2, 1, 7, 8, 1, dtype=torch.bool)
    frames[1, 0, 6] = True  # 6 of 7 rows and the middle 6 of 8 columns are left
    frames[1, 0, :, [0, 7]] = True
    frames[1, 0, 5, 6] = True
    rewards = pixel_control_rewards(frames, 3)
    assert rewards.shape == (1, 1, 2, 2)
    np.testing.assert_allclose(rewards[0, 0], [[0, 0], [0, 1 / 9]], rtol=1e-6)


def test_n_step_returns_per_cell_by_hand() -> None:
    # Two pieces of up to three steps, a cell of two. The first ends terminated after its second step; the second goes on,
    # and bootstraps from the best action at its end. gamma 0.9.
    rewards = torch.tensor([[[0.5, 0.0], [0.1, 0.0]], [[1.0, 0.2], [0.0, 0.0]], [[9.0, 9.0], [0.3, 0.4]]])
    best = torch.tensor([[[5.0, 6.0], [7.0, 8.0]], [[5.0, 6.0], [7.0, 8.0]], [[5.0, 6.0], [2.0, 1.0]]])
    terminated = torch.tensor([[0, 0], [1, 0], [0, 0]]).bool()
    valid = torch.tensor([[1, 1], [1, 1], [0, 1]]).bool()
    going_on = torch.cat([valid[1:], torch.zeros(1, 2, dtype=torch.bool)])
    returns = lambda_returns(
        rewards[..., None],
        (0.9 * ~terminated)[..., None, None],
        going_on.float()[..., None, None],
        best[..., None],
    )
    first = [[0.5 + 0.9 * 1.0, 0.9 * 0.2], [1.0, 0.2]]
    np.testing.assert_allclose(returns[:2, 0, :, 0], first, rtol=1e-6)
    last = [0.3 + 0.9 * 2.0, 0.4 + 0.9 * 1.0]
    second = [[0.1 + 0.81 * last[0], 0.81 * last[1]], [0.9 * last[0], 0.9 * last[1]], last]
    np.testing.assert_allclose(returns[:, 1, :, 0], second, rtol=1e-6)


def test_the_loss_of_pixel_control_by_hand() -> None:
    q = torch.tensor([[[[[1.0, 2.0]], [[3.0, 4.0]]]], [[[[0.0, 0.0]], [[7.0, 9.0]]]]], requires_grad=True)
    assert q.shape == (2, 1, 2, 1, 2)  # two steps of one piece, two actions, cells 1 x 2
    actions = torch.tensor([[1], [0]])
    returns = torch.tensor([[[[2.0, 6.0]]], [[[0.5, 0.0]]]], requires_grad=True)
    everything = torch.ones(2, 1, dtype=torch.bool)
    loss = pixel_control_loss(q, actions, returns, everything)
    assert loss.item() == pytest.approx(0.5 * ((1 + 4) + 0.25) / 2)
    (gradient,) = torch.autograd.grad(loss, q)
    assert returns.grad is None
    # (Q - R) / steps at the action taken, nothing elsewhere.
    np.testing.assert_allclose(gradient[:, 0, :, 0], [[[0, 0], [0.5, -1]], [[-0.25, 0], [0, 0]]])
    first_only = torch.tensor([[True], [False]])
    assert pixel_control_loss(q, actions, returns, first_only).item() == pytest.approx(2.5)


def test_the_loss_of_value_replay_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 100.0]], requires_grad=True)
    returns = torch.tensor([[2.0, 0.0], [3.0, 0.0]], requires_grad=True)
    valid = torch.tensor([[True, True], [True, False]])
    loss = value_replay_loss(values, returns, valid)
    assert loss.item() == pytest.approx(0.5 * (1 + 4 + 0) / 3)
    (gradient,) = torch.autograd.grad(loss, values)
    np.testing.assert_allclose(gradient, [[-1 / 3, 2 / 3], [0, 0]], rtol=1e-6)


def test_the_loss_of_reward_prediction_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 4.0], [3.0, 0.0, 0.0]])
    rewards = torch.tensor([0.0, 0.25, -7.0])  # zero, positive, negative
    expected = [np.log(3), np.log(np.exp([1, 2, 4]).sum()) - 4, np.log(np.exp([3, 0, 0]).sum()) - 3]
    assert float(reward_prediction_loss(logits, rewards)) == pytest.approx(np.mean(expected), rel=1e-6)


def test_losses_do_not_change_with_the_batchs_size() -> None:
    random = torch.Generator().manual_seed(0)
    q, returns = torch.randn(3, 4, 2, 5, 5, generator=random), torch.randn(3, 4, 5, 5, generator=random)
    actions, valid = torch.randint(2, (3, 4), generator=random), torch.rand(3, 4, generator=random) < 0.7

    def twice(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [torch.cat([tensor, tensor], dim=1) for tensor in tensors]

    assert float(pixel_control_loss(*twice(q, actions, returns, valid))) == pytest.approx(
        float(pixel_control_loss(q, actions, returns, valid)), rel=1e-6
    )
    assert float(value_replay_loss(*twice(q[:, :, 0, 0, 0], returns[..., 0, 0], valid))) == pytest.approx(
        float(value_replay_loss(q[:, :, 0, 0, 0], returns[..., 0, 0], valid)), rel=1e-6
    )
