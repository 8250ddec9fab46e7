"""Temporal-difference losses on [B] tensors; means over the batch, so that they do not change with its size."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

TDLoss = Literal["mse", "huber"]


def td_loss(q_tm1: Tensor, a_tm1: Tensor, target_tm1: Tensor, kind: TDLoss) -> Tensor:
    """Mean loss between the taken actions' values and their targets, which get no gradient.

    ``mse`` is 0.5 (q - y)^2. ``huber`` equals it for errors up to 1 and is |q - y| - 0.5 beyond: Mnih et al. 2015 clip
    the error's gradient to [-1, 1], which is this.

    Args:
        q_tm1: [B, A].
        a_tm1: int64 [B].
        target_tm1: [B].
        kind: ``mse`` or ``huber``.
    """
    taken = q_tm1.gather(1, a_tm1.unsqueeze(1)).squeeze(1)
    if kind == "mse":
        return 0.5 * functional.mse_loss(taken, target_tm1.detach())
    return functional.smooth_l1_loss(taken, target_tm1.detach())


def q_learning_target(
    r_t: Tensor, discount_t: Tensor, target_q_t: Tensor, online_q_t: Tensor | None = None
) -> Tensor:
    """One-step (or n-step) Q-learning targets, y = r + discount * Q_target(s', a*).

    Args:
        r_t: (n-step) rewards [B].
        discount_t: gamma^n, and 0 where terminated, [B].
        target_q_t: the target network's values of s', [B, A].
        online_q_t: the online network's values of s', [B, A]: where given, a* is their argmax (double Q-learning, van
            Hasselt et al. 2016, arXiv:1509.06461, eq. 4), else the target network's own.
    """
    chooser = target_q_t if online_q_t is None else online_q_t
    best = target_q_t.gather(1, chooser.argmax(1, keepdim=True)).squeeze(1)
    return torch.addcmul(r_t, discount_t, best)
