"""Policy-distillation losses (Rusu et al. 2015, https://arxiv.org/abs/1511.06295).

Student outputs ``q_s`` and teacher outputs ``q_t`` are ``[B, A]`` tensors (Q-values or logits). Each loss is
summed over the actions and averaged over the samples, so that it does not change with the batch size. The
teacher's outputs are data: no gradient flows into them.

Conventions for the KL differ between codebases; this one is Rusu's. **Only the teacher is divided by the
temperature**: tau = 0.01 sharpens Q-values, whose differences between actions are small, towards the greedy
action, and the student learns that sharpened policy as its own at temperature 1. Hinton et al. (2015) divide
both sides by T > 1 to soften a classifier's probabilities, multiply the loss by T^2 to keep the gradients'
size, and use the student at T = 1 afterwards; with Hinton's form and T = 0.01 the student would have to match
Q-value differences, not the policy.

What a student's outputs are afterwards: Q-values with ``mse_loss``; logits, never to be bootstrapped from,
with ``nll_loss`` and ``kl_loss``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def nll_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``-log softmax(q_s)[argmax q_t]``: classification of the teacher's greedy action.

    Args:
        student: outputs ``[B, A]``.
        teacher: outputs ``[B, A]``.

    Returns:
        The mean over the batch, a scalar.
    """
    return functional.cross_entropy(student, teacher.argmax(1))


def mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``||q_t - q_s||^2``: regression on the teacher's outputs, summed over the actions.

    Args:
        student: outputs ``[B, A]``.
        teacher: outputs ``[B, A]``.

    Returns:
        The mean over the batch, a scalar.
    """
    return (student - teacher.detach()).square().sum(1).mean()


def kl_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``KL(softmax(q_t / tau) || softmax(q_s))``, with the teacher's entropy, so that 0 is the minimum.

    Safe for Q-value differences of hundreds at tau = 0.01: the maximum is subtracted before the division, and
    an action whose probability underflows to 0 adds exactly 0.

    Args:
        student: outputs ``[B, A]``.
        teacher: outputs ``[B, A]``.
        temperature: tau, greater than 0; divides the teacher's outputs only.

    Returns:
        The mean over the batch, a scalar.
    """
    return kl_to_policy(student, teacher_log_policy(teacher, temperature))


def kl_to_policy(student: Tensor, log_teacher: Tensor) -> Tensor:
    """:func:`kl_loss` for a teacher's policy that is known already.

    Args:
        student: outputs ``[B, A]``.
        log_teacher: :func:`teacher_log_policy`, ``[B, A]``.

    Returns:
        The mean over the batch, a scalar.
    """
    log_student = functional.log_softmax(student, 1)
    return functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def reverse_kl(student: Tensor, log_teacher: Tensor) -> Tensor:
    """``KL(softmax(q_s) || T)``: ``Hx(S || T)`` less the student's entropy, so that 0, at S = T, is the minimum.

    ``Hx(S || T)`` alone is least at the teacher's best action, whatever else T says.

    Args:
        student: logits ``[B, A]``.
        log_teacher: log T, bounded from below, ``[B, A]``: see :func:`floored_log_policy`.

    Returns:
        Of each sample, ``[B]``.
    """
    log_student = functional.log_softmax(student, 1)
    return (log_student.exp() * (log_student - log_teacher)).sum(1)


def feature_loss(predicted: Tensor, teacher: Tensor) -> Tensor:
    """``||f(h_s) - h_t||^2``: Actor-Mimic's feature regression (Parisotto et al. 2015,
    https://arxiv.org/abs/1511.06342), summed over the features.

    Args:
        predicted: the teacher's features as a linear layer ``f`` reads them off the student's, ``[B, F]``.
        teacher: the teacher's features, ``[B, F]``.

    Returns:
        The mean over the batch, a scalar.
    """
    return (predicted - teacher.detach()).square().sum(1).mean()


def action_gap_temperature(mean_action_gap: float, greedy_odds: float) -> float:
    """The temperature at which a state of mean action gap prefers its best action by ``greedy_odds`` to one over its
    second best: ``tau = gap / log(odds)``.

    Q-values grow with the rewards' scale and with training, and what a given tau makes of them grows along; odds do not.
    """
    return mean_action_gap / math.log(greedy_odds)


def constant_loss(loss: str, teacher: Tensor, temperature: float) -> float:
    """The loss of the best answer that does not look at the observation, over ``[N, A]`` outputs: what a student starts
    from, whatever the outputs' scale.

    For ``mse`` the variance of the outputs, summed over the actions; for ``nll`` the entropy of the share of rows in
    which each action is the greedy one; for ``kl`` the entropy of the mean policy less the policies' mean entropy.
    """
    if loss == "mse":
        return float(teacher.double().var(0, correction=0).sum())
    if loss == "nll":
        policy = functional.one_hot(teacher.argmax(1), teacher.shape[1]).double()
    else:
        policy = teacher_log_policy(teacher.double(), temperature).exp()
    mean_entropy = torch.special.entr(policy).sum(1).mean()
    return float(torch.special.entr(policy.mean(0)).sum() - mean_entropy)


def teacher_log_policy(teacher: Tensor, temperature: float) -> Tensor:
    """``log softmax(q_t / tau)``, ``[B, A]``, without a gradient."""
    teacher = teacher.detach()
    # Subtracting first keeps small differences between large Q-values, which division would round away.
    return torch.log_softmax((teacher - teacher.amax(1, keepdim=True)) / temperature, 1)


def floored_log_policy(teacher: Tensor, temperature: float, floor: float) -> Tensor:
    """``log T``, ``[B, A]``, of ``T = (1 - floor) softmax(q_t / tau) + floor / A``: at least ``log(floor / A)``, so that what is
    averaged over the student's actions stays bounded where the teacher would never go."""
    policy = teacher_log_policy(teacher, temperature).exp()
    return torch.log((1 - floor) * policy + floor / teacher.shape[1])
