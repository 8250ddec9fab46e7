"""Returns: pure functions of time-major [T, B] tensors.

``discount_t`` is gamma, and 0 only where the episode terminated. ``trace_t`` is 0 where an episode ended either way, so
that no return runs into the next episode. ``v_tp1`` is per step: the value of the state that the transition really led
to, at a truncation that of the true final observation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lambda_returns(r_t: Tensor, discount_t: Tensor, trace_t: Tensor, v_tp1: Tensor) -> Tensor:
    """Returns mixed over all horizons, backwards in time:

        G_t = r_t + discount_t * ((1 - trace_t) * v_tp1_t + trace_t * G_{t+1}),   G_T = v_tp1_{T-1}

    With ``trace_t = lambda`` inside an episode and ``v_tp1 = max_a Q(s_{t+1}, a)`` this is Q(lambda) of Gallici et al.
    2024 (arXiv:2407.04811, eq. 7, Peng's form without cutting the trace at exploratory actions).

    Args:
        r_t: rewards [T, B].
        discount_t: [T, B], 0 where terminated.
        trace_t: [T, B], lambda inside an episode, 0 where one ended.
        v_tp1: bootstrap values of the successors [T, B].

    Returns:
        [T, B].
    """
    returns = torch.empty_like(r_t)
    following = v_tp1[-1]
    for t in range(len(r_t) - 1, -1, -1):
        following = r_t[t] + discount_t[t] * torch.lerp(v_tp1[t], following, trace_t[t])
        returns[t] = following
    return returns


def generalized_advantages(
    r_t: Tensor, discount_t: Tensor, trace_t: Tensor, v_t: Tensor, v_tp1: Tensor
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16), backwards in time:

        delta_t = r_t + discount_t * v_tp1_t - v_t,   A_t = delta_t + discount_t * trace_t * A_{t+1},   A_T = 0

    ``A_t + v_t`` is the lambda-return that a critic is fitted to.

    Args:
        r_t: rewards [T, B].
        discount_t: [T, B], 0 where terminated.
        trace_t: [T, B], lambda inside an episode, 0 where one ended.
        v_t: values of the states acted in [T, B].
        v_tp1: bootstrap values of the successors [T, B].

    Returns:
        [T, B].
    """
    advantages = torch.addcmul(r_t - v_t, discount_t, v_tp1)
    decay = discount_t * trace_t
    for t in range(len(r_t) - 2, -1, -1):
        advantages[t].addcmul_(decay[t], advantages[t + 1])
    return advantages
