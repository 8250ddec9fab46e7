"""Trajectories of many tasks at once, and what a policy gradient takes from them.

The baseline is Duan et al. 2016's (https://arxiv.org/abs/1604.06778, section 4.1.1): for each task a ridge regression of the discounted
return on ``[o, o^2, t, t^2, t^3, 1]``, with o the observation clipped to [-10, 10] and t hundreds of env steps. It is fitted to the same
trajectories that it is subtracted from. Advantages are generalised advantage estimates (Schulman et al. 2016,
https://arxiv.org/abs/1506.02438), made to have mean 0 and standard deviation 1 over each task's env steps.

Of observations of more than 32 numbers (MinAtar's planes) the baseline sees the time alone: their weights would fit the few trajectories of
a task by heart, and leave no advantages.

The horizon is the end of the task: nothing is bootstrapped from there. The baseline knows the time, so this is the value of a problem with
so many steps, and no step's value depends on what would come after.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stillhouse.envs.families import Family
from stillhouse.meta.stochastic_policy import StochasticPolicy
from stillhouse.returns import generalized_advantages

_RIDGE = 1e-5
_LARGEST_FEATURE = 10.0
_WIDEST = 32  # numbers of an observation that the baseline is fitted to


class Trajectories(NamedTuple):
    """K episodes of each of N tasks, up to T env steps.

    Attributes:
        observations: float32 [N, K, T, o].
        actions: int64 [N, K, T], or float32 [N, K, T, a], as they were drawn.
        distribution: that they were drawn from, float32 [N, K, T, k].
        rewards: float64 [N, K, T], 0 after the end.
        valid: bool [N, K, T], env steps before and at the end.
        terminated: bool [N, K, T], the env step at which the episode terminated.
    """

    observations: np.ndarray
    actions: np.ndarray
    distribution: np.ndarray
    rewards: np.ndarray
    valid: np.ndarray
    terminated: np.ndarray

    def returns(self) -> np.ndarray:
        """Undiscounted, of each episode [N, K]."""
        return self.rewards.sum(axis=-1)


class Batch(NamedTuple):
    """What a policy gradient takes: B = K T rows for each of N tasks.

    Attributes:
        observations: [N, B, o].
        actions: [N, B] or [N, B, a].
        distribution: that acted, [N, B, k].
        log_mu: log-probabilities of the actions under it, [N, B].
        advantages: [N, B].
        weights: of the rows, [N, B]: 1 / (the task's env steps), 0 after an end.
    """

    observations: Tensor
    actions: Tensor
    distribution: Tensor
    log_mu: Tensor
    advantages: Tensor
    weights: Tensor


def play(
    policy: StochasticPolicy,
    family: Family,
    parameters: Tensor,
    tasks: np.ndarray,
    rollouts: int,
    random: np.random.Generator,
) -> Trajectories:
    """K episodes of each task, by the policy of its row of ``parameters`` [N, P]."""
    state = family.reset(tasks, rollouts, random)
    shape = len(tasks), rollouts, family.horizon
    observations = np.zeros((*shape, family.observations), np.float32)
    actions = np.zeros(shape, np.int64) if family.discrete else np.zeros((*shape, family.actions), np.float32)
    wide = family.actions if family.discrete else 2 * family.actions
    distribution = np.zeros((*shape, wide), np.float32)
    rewards = np.zeros(shape)
    valid = np.zeros(shape, dtype=bool)
    ends = np.zeros(shape, dtype=bool)
    alive = np.ones(shape[:2], dtype=bool)
    for t in range(family.horizon):
        observed = family.observe(state)
        with torch.no_grad():
            found = policy.distribution(parameters, torch.from_numpy(observed).to(parameters.device))
        of_step = found.cpu().numpy()
        drawn = policy.sample(of_step, random)
        state, reward, terminated = family.step(tasks, state, drawn)
        observations[:, :, t] = observed
        actions[:, :, t] = drawn
        distribution[:, :, t] = of_step
        rewards[:, :, t] = reward * alive
        valid[:, :, t] = alive
        ends[:, :, t] = alive & terminated
        alive = alive & ~terminated
        if not alive.any():
            break
    return Trajectories(observations, actions, distribution, rewards, valid, ends)


def discounted_returns(trajectories: Trajectories, discount: float) -> np.ndarray:
    """Of what follows each env step, that step's reward included, [N, K, T]; 0 after the end."""
    nothing = np.zeros_like(trajectories.rewards)
    return _advantages(trajectories, nothing, discount, 1.0)


def baseline(trajectories: Trajectories, targets: np.ndarray) -> np.ndarray:
    """The linear baseline fitted to targets [N, K, T], at each env step [N, K, T]; 0 after the end."""
    observed = (
        trajectories.observations
        if trajectories.observations.shape[-1] <= _WIDEST
        else trajectories.observations[..., :0]
    )
    observed = np.clip(observed, -_LARGEST_FEATURE, _LARGEST_FEATURE).astype(np.float64)
    count, rollouts, length = targets.shape
    time = np.arange(length)[:, None] / 100
    of_time = np.broadcast_to(
        np.concatenate([time, time**2, time**3, np.ones_like(time)], axis=1), (count, rollouts, length, 4)
    )
    features = np.concatenate([observed, observed**2, of_time], axis=-1)
    features = (features * trajectories.valid[..., None]).reshape(count, rollouts * length, -1)
    products = features.transpose(0, 2, 1) @ features + _RIDGE * np.eye(features.shape[-1])
    weights = np.linalg.solve(products, features.transpose(0, 2, 1) @ targets.reshape(count, -1, 1))
    fitted: np.ndarray = (features @ weights).reshape(targets.shape)
    return fitted


def advantages(trajectories: Trajectories, discount: float, trace: float) -> np.ndarray:
    """Generalised advantage estimates over the fitted baseline, before they are normalised, [N, K, T]; 0 after the end.

    Args:
        trajectories: of N tasks.
        discount: gamma.
        trace: GAE's lambda.
    """
    values = baseline(trajectories, discounted_returns(trajectories, discount))
    return _advantages(trajectories, values, discount, trace)


def _advantages(trajectories: Trajectories, values: np.ndarray, discount: float, trace: float) -> np.ndarray:
    shape = values.shape
    # The value after the horizon, and after a terminated step, is 0.
    following = np.concatenate([values[..., 1:], np.zeros((*shape[:2], 1))], axis=-1)
    ends = trajectories.terminated
    parts = trajectories.rewards, np.where(ends, 0.0, discount), np.where(ends, 0.0, trace), values, following
    time_major = [
        torch.from_numpy(np.ascontiguousarray(np.moveaxis(part, -1, 0).reshape(shape[-1], -1)))
        for part in parts
    ]
    found = generalized_advantages(*time_major).numpy().reshape(shape[-1], *shape[:2])
    return np.where(trajectories.valid, np.moveaxis(found, 0, -1), 0.0)


def make_batch(
    policy: StochasticPolicy,
    trajectories: Trajectories,
    discount: float,
    trace: float,
    device: str = "cpu",
) -> Batch:
    """The trajectories with normalised advantages, as tensors, in their own precision but for float32 advantages and weights."""
    valid = trajectories.valid
    weights = valid / valid.sum(axis=(1, 2), keepdims=True)
    found = advantages(trajectories, discount, trace)
    found = found - (weights * found).sum(axis=(1, 2), keepdims=True)
    found = found / (np.sqrt((weights * found**2).sum(axis=(1, 2), keepdims=True)) + 1e-8)
    count = len(valid)

    def rows(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.reshape(count, -1, *array.shape[3:])).to(device)

    distribution, actions = rows(trajectories.distribution), rows(trajectories.actions)
    return Batch(
        rows(trajectories.observations),
        actions,
        distribution,
        policy.log_probability(distribution, actions),
        rows((found * valid).astype(np.float32)),
        rows(weights.astype(np.float32)),
    )


def some_of(batch: Batch, share: float) -> Batch:
    """The first rows of every task, a share of them, with weights that add up to 1 again."""
    rows = max(1, round(share * batch.weights.shape[1]))
    part = Batch(*(tensor[:, :rows] for tensor in batch))
    return part._replace(weights=part.weights / part.weights.sum(1, keepdim=True))
