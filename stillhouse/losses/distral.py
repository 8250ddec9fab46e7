"""What Distral adds to an actor-critic: rewards with the costs in them, and the likelihood of the distilled policy.

Teh et al. 2017, https://arxiv.org/abs/1707.04175, section 2.1 and eq. 8 to 10; alpha = c_KL / (c_KL + c_Ent), beta = 1 / (c_KL + c_Ent).
"""

from __future__ import annotations

from torch import Tensor


def regularised_rewards(
    rewards: Tensor,
    log_policy: Tensor,
    log_distilled: Tensor,
    alpha: float,
    beta: float,
    from_uniform: float = 0.0,
) -> Tensor:
    """``r + alpha/beta log pi_0(a|s) - 1/beta log pi_i(a|s)``: r - c_KL log(pi_i / pi_0) - c_Ent log pi_i. All of one shape, no gradient.

    Args:
        rewards: r, in the units of learning.
        log_policy: of the actions taken, by the task's policy.
        log_distilled: of the same, by the distilled policy.
        alpha: in [0, 1].
        beta: greater than 0, in 1 / units of the rewards.
        from_uniform: log A where entropies are counted from that of uniform play among A actions, ``log(A pi)`` in place of ``log pi``; 0:
            they are counted from 0.
    """
    told = log_policy.detach() + from_uniform
    return rewards + (alpha * (log_distilled.detach() + from_uniform) - told) / beta


def cross_entropy(log_distilled: Tensor, log_policy: Tensor) -> Tensor:
    """``-sum_a pi_i(a|s) log pi_0(a|s)``, [N], in nats: minus the expected log-likelihood of the task policy's action.

    Its gradient with respect to the distilled policy's logits is ``pi_0 - pi_i``; none flows into the task's policy.

    Args:
        log_distilled: of all actions, [N, A].
        log_policy: of all actions, [N, A].
    """
    return -(log_policy.detach().exp() * log_distilled).sum(1)
