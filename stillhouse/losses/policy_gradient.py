"""Policy-gradient losses on [B] tensors; means over the batch, so that they do not change with its size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClippedLoss(NamedTuple):
    """PPO's loss by its parts, before their means over the batch, and the gradients of the whole.

    Attributes:
        policy: minus the clipped objective [B].
        value: squared error of the critic [B].
        entropy: of the policy, in nats [B].
        log_ratio: log-probability of the action now, minus that when it was taken [B].
        logits_gradient: of the loss, [B, A].
        values_gradient: of the loss, [B].
    """

    policy: Tensor
    value: Tensor
    entropy: Tensor
    log_ratio: Tensor
    logits_gradient: Tensor
    values_gradient: Tensor

    def total(self, value_coefficient: float, entropy_coefficient: float) -> Tensor:
        """The whole's mean over the batch, a scalar."""
        whole = torch.add(self.policy, self.value, alpha=value_coefficient)
        return whole.sub_(self.entropy, alpha=entropy_coefficient).mean()


@torch.no_grad()
def clipped_loss(
    logits: Tensor,
    values: Tensor,
    actions: Tensor,
    log_mu: Tensor,
    advantages: Tensor,
    returns: Tensor,
    clip_range: float,
    value_coefficient: float,
    entropy_coefficient: float,
) -> ClippedLoss:
    """PPO's loss (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7 and 9), negated for descent:

        rho = pi(a | s) / mu(a | s)
        loss = mean[ -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) + c1 (V(s) - G)^2 - c2 H(pi(. | s)) ]

    The gradients are written out, with d log pi(a) / d logits = onehot(a) - pi and dH / d logits = -pi (log pi + H):
    automatic differentiation of so many small operations takes a quarter of an update's time at a batch of 64.

    Args:
        logits: the policy's, [B, A].
        values: the critic's, [B].
        actions: taken, int64 [B].
        log_mu: their log-probabilities when they were taken, [B].
        advantages: A, [B].
        returns: G, what the critic is fitted to, [B].
        clip_range: epsilon.
        value_coefficient: c1.
        entropy_coefficient: c2.
    """
    batch = len(logits)
    chosen = actions.unsqueeze(1)
    log_policy = torch.log_softmax(logits, 1)
    policy = log_policy.exp()
    log_ratio = log_policy.gather(1, chosen).squeeze(1) - log_mu
    ratio = log_ratio.exp()
    objective = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    # d objective / d log pi(a) is rho A where the minimum is the unclipped term, and 0 where it is the clipped one.
    chosen_gradient = (objective * (objective <= clipped)).mul_(-1 / batch).unsqueeze(1)
    logits_gradient = (policy * chosen_gradient).neg_().scatter_add_(1, chosen, chosen_gradient)
    weighted = policy * log_policy
    negative_entropy = weighted.sum(1, keepdim=True)
    if entropy_coefficient:
        entropy_gradient = torch.addcmul(weighted, policy, negative_entropy, value=-1)
        logits_gradient.add_(entropy_gradient, alpha=entropy_coefficient / batch)
    error = values - returns
    return ClippedLoss(
        policy=torch.minimum(objective, clipped).neg_(),
        value=error.square(),
        entropy=negative_entropy.squeeze(1).neg(),
        log_ratio=log_ratio,
        logits_gradient=logits_gradient,
        values_gradient=error * (2 * value_coefficient / batch),
    )


def normalise(advantages: Tensor) -> Tensor:
    """Advantages with mean 0 and standard deviation 1 in each row of [K, B]; all 0 where there is one only."""
    centred = advantages - advantages.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-8)


class ActorCriticLoss(NamedTuple):
    """An actor-critic's loss, and its parts before their means over the batch.

    Attributes:
        total: of the whole, a scalar with its graph.
        policy: minus the log-probability times the advantage, detached [N].
        value: half the squared error of the critic, detached [N].
        entropy: of the policy, in nats, detached [N].
    """

    total: Tensor
    policy: Tensor
    value: Tensor
    entropy: Tensor


def actor_critic_loss(
    log_policy: Tensor,
    values: Tensor,
    actions: Tensor,
    advantages: Tensor,
    targets: Tensor,
    weights: Tensor,
    value_coefficient: float,
    entropy_coefficient: float,
) -> ActorCriticLoss:
    """The advantage actor-critic's loss (Mnih et al. 2016, https://arxiv.org/abs/1602.01783, section 4):

        loss = sum_i weights_i [ -A_i log pi(a_i | s_i) + c1 1/2 (V(s_i) - G_i)^2 - c2 H(pi(. | s_i)) ]

    Args:
        log_policy: log-probabilities of all actions, [N, A].
        values: the critic's, [N].
        actions: taken, int64 [N].
        advantages: A, importance weights included; no gradient flows into it, [N].
        targets: G, what the critic is fitted to; none into this either, [N].
        weights: of the rows, [N]: 1/N each for the mean, 0 where a row is no transition.
        value_coefficient: c1.
        entropy_coefficient: c2.
    """
    policy = -advantages.detach() * log_policy.gather(1, actions.unsqueeze(1)).squeeze(1)
    value = (values - targets.detach()).square() / 2
    entropy = -(log_policy.exp() * log_policy).sum(1)
    total = weights @ (policy + value_coefficient * value - entropy_coefficient * entropy)
    return ActorCriticLoss(total, policy.detach(), value.detach(), entropy.detach())
