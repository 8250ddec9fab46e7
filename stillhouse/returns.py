"""Returns: pure functions of time-major [T, B] tensors.

``discount_t`` is gamma, and 0 only where the episode terminated. ``trace_t`` is 0 where an episode ended either way, so
that no return runs into the next episode. ``v_tp1`` is per step: the value of the state that the transition really led
to, at a truncation that of the true final observation.
"""

from __future__ import annotations

from typing import NamedTuple

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


class VTrace(NamedTuple):
    """What V-trace gives, [T, B] each.

    Attributes:
        targets: v_t, what a critic is fitted to.
        q_t: the estimate of the action's value that the policy's gradient takes, before the baseline is subtracted.
        rho_t: the clipped importance weights of that gradient.
    """

    targets: Tensor
    q_t: Tensor
    rho_t: Tensor


def vtrace(
    r_t: Tensor,
    discount_t: Tensor,
    trace_t: Tensor,
    v_t: Tensor,
    v_tp1: Tensor,
    ratio_t: Tensor,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> VTrace:
    """V-trace (Espeholt et al. 2018, https://arxiv.org/abs/1802.01561, eq. 1 in the recursive form of remark 1), backwards:

        rho_t = min(rho_bar, ratio_t),   c_t = trace_t min(c_bar, ratio_t)
        delta_t = rho_t (r_t + discount_t v_tp1_t - v_t)
        targets_t = v_t + delta_t + discount_t c_t (targets_{t+1} - v_tp1_t),   targets_T = v_tp1_{T-1}
        q_t = r_t + discount_t ((1 - trace_t) v_tp1_t + trace_t targets_{t+1})

    Inside an episode ``v_tp1_t`` is ``v_t[t + 1]``. The policy's gradient there is ``rho_t (q_t - v_t)`` (section 4.2). With
    ``trace_t = 1`` inside an episode and all ratios 1 the targets are n-step returns, and equal ``q_t``; a ``trace_t`` between
    0 and 1 is the lambda of remark 2.

    Args:
        r_t: rewards [T, B].
        discount_t: [T, B], 0 where terminated.
        trace_t: [T, B], 1 (or lambda) inside an episode, 0 where one ended.
        v_t: values of the states acted in [T, B].
        v_tp1: values of the successors [T, B].
        ratio_t: pi(a|s) / mu(a|s), of the policy that is learnt to the one that acted [T, B].
        rho_bar: the ratio's bound in delta_t, which decides whose values are found: at infinity pi's, near 0 mu's.
        c_bar: its bound in the trace, which decides how fast; at most ``rho_bar`` in the paper.
    """
    rho_t = ratio_t.clamp(max=rho_bar)
    errors = rho_t * (torch.addcmul(r_t, discount_t, v_tp1) - v_t)  # delta_t, and soon targets_t - v_t
    decay = discount_t * trace_t * ratio_t.clamp(max=c_bar)
    for t in range(len(r_t) - 2, -1, -1):
        errors[t].addcmul_(decay[t], errors[t + 1])
    following = torch.cat([errors[1:], torch.zeros_like(errors[:1])])  # targets_{t+1} - v_tp1_t
    q_t = torch.addcmul(r_t, discount_t, torch.addcmul(v_tp1, trace_t, following))
    return VTrace(v_t + errors, q_t, rho_t)
