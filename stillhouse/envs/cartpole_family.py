"""CartPole's family as an environment of Gymnasium's kind, and its transitions as a set encoder sees them.

A task is a row of :class:`stillhouse.envs.physics.CartPoleFamily`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.physics import CARTPOLE_RANGES
from stillhouse.envs.variants import CartPolePhysicsVectorEnv

# What an observation (position, velocity, angle, angular velocity) and its change in one step are of the order of.
_SCALE = np.array([2.4, 2.0, 0.2, 2.0], np.float32)
_CHANGE = np.array([0.02, 0.2, 0.02, 0.3], np.float32)
TRANSITION_WIDTH = 9


def environment(task: np.ndarray) -> EnvironmentConfig:
    """The task's physics as an ordinary environment, which never swaps."""
    options = {name: float(value) for name, value in zip(CARTPOLE_RANGES, task[:-1], strict=True)}
    return EnvironmentConfig(id="stillhouse/CartPole-v1", options=dict(options))


def transition_features(observations: np.ndarray, actions: np.ndarray, successors: np.ndarray) -> np.ndarray:
    """Transitions as a set encoder sees them, float32 [..., 9]: observation, action (-1 or 1), change.

    Args:
        observations: [..., 4].
        actions: chosen, [...]; of a swapped task as the policy named them.
        successors: the observations that they really led to, [..., 4].
    """
    change = (successors - observations) / _CHANGE
    return np.concatenate(
        [
            observations / _SCALE,
            (2 * actions[..., None] - 1).astype(np.float32),
            np.sign(change)
            * np.log1p(np.abs(change)),  # light, short poles jump a hundred times as far as heavy, long ones
        ],
        axis=-1,
        dtype=np.float32,
    )


class CartPoleFamilyVectorEnv(CartPolePhysicsVectorEnv):
    """Many tasks stepped together, one a copy.

    Args:
        tasks: one for each copy, [B, 5].
        horizon: env steps of an episode at most.
    """

    def __init__(self, tasks: np.ndarray, horizon: int) -> None:
        super().__init__(num_envs=len(tasks), max_episode_steps=horizon)
        # Gymnasium's dynamics broadcast: an array of constants serves as well as one.
        own: Any = self
        own.length, own.gravity, own.force_mag, own.masspole = (
            tasks[:, column].copy() for column in range(4)
        )
        own.total_mass = own.masspole + own.masscart
        own.polemass_length = own.masspole * own.length
        self.swapped = tasks[:, 4].astype(np.bool_)

    def step(self, action: Any) -> Any:
        """As CartPole's, with each copy's own physics."""
        return super().step(np.where(self.swapped, 1 - action, action))
