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
    log_teacher = teacher_log_policy(teacher, temperature)
    return (log_teacher.exp() * (log_teacher - functional.log_softmax(student, 1))).sum(1).mean()


def teacher_log_policy(teacher: Tensor, temperature: float) -> Tensor:
    """``log softmax(q_t / tau)``, ``[B, A]``, without a gradient."""
    teacher = teacher.detach()
    # Subtracting first keeps small differences between large Q-values, which division would round away.
    return torch.log_softmax((teacher - teacher.amax(1, keepdim=True)) / temperature, 1)
