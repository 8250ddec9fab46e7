"""Losses of UNREAL's auxiliary tasks (Jaderberg et al. 2016, https://arxiv.org/abs/1611.05397, section 3).

Time-major tensors of S pieces of episodes; means over their steps, so that a loss does not change with the batch's size. Names
as in rlax where it has them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def pixel_control_rewards(observations: Tensor, cell_size: int) -> Tensor:
    """Mean absolute change of what is seen from one step to the next, cell by cell.

    As in the paper the cells lie on a central crop: where a side is no multiple of ``cell_size``, what is left over at both
    ends belongs to no cell.

    Args:
        observations: bool, or uint8 in units of 1/255, channels last, [T + 1, S, H, W, C].
        cell_size: cells are ``cell_size`` x ``cell_size``.

    Returns:
        float32 [T, S, H // cell_size, W // cell_size], in 0..1.
    """
    height, width = (side // cell_size * cell_size for side in observations.shape[2:4])
    top, left = (observations.shape[2] - height) // 2, (observations.shape[3] - width) // 2
    cropped = observations[:, :, top : top + height, left : left + width]
    scale = 1 / 255 if observations.dtype == torch.uint8 else 1.0
    change = torch.diff(cropped.float(), dim=0).abs_().mean(-1)
    return functional.avg_pool2d(change, cell_size) * scale


def pixel_control_loss(q_tm1: Tensor, a_tm1: Tensor, returns: Tensor, valid: Tensor) -> Tensor:
    """The sum over cells of 1/2 (R - Q(s, a))^2, mean over the steps; returns get no gradient.

    Args:
        q_tm1: [T, S, A, h, w].
        a_tm1: int64 [T, S].
        returns: n-step returns of the pseudo-rewards, [T, S, h, w].
        valid: bool [T, S], the rows that are steps.
    """
    chosen = a_tm1[..., None, None, None].expand(*a_tm1.shape, 1, *q_tm1.shape[3:])
    error = (q_tm1.gather(2, chosen).squeeze(2) - returns.detach()).square().sum((2, 3))
    return 0.5 * _mean(error, valid)


def value_replay_loss(v_tm1: Tensor, returns: Tensor, valid: Tensor) -> Tensor:
    """1/2 (R - V(s))^2, mean over the steps; returns get no gradient. All are [T, S]."""
    return 0.5 * _mean((v_tm1 - returns.detach()).square(), valid)


def reward_prediction_loss(logits: Tensor, rewards: Tensor) -> Tensor:
    """Cross-entropy of the reward's sign; classes are negative, zero, positive.

    Args:
        logits: [S, 3].
        rewards: [S].
    """
    return functional.cross_entropy(logits, (rewards.sign() + 1).long())


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    return (values * valid).sum() / valid.sum()
