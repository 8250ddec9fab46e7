"""A family of tasks for meta-learning: CartPole with other physics, and, if wanted, with left and right swapped.

A task is ``[pole length (m, half), force (N), gravity (m/s^2), swapped (0 or 1)]``; physics are uniform in their logarithms. Every range is
cut into 8 equal parts (in the logarithm); a task whose parts' numbers sum to 3 modulo 4 is a test task, all others are training tasks.
The two splits are therefore disjoint and equally wide: a quarter of the family, spread over all of it, is never trained on.

Swapped tasks look like their twins until an action is taken: no policy of the observation alone can be good at both.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from stillhouse.config import Config
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.variants import CartPolePhysicsVectorEnv

Split = Literal["train", "test"]
PHYSICS = ("pole_length", "force", "gravity")

_PARTS = 8  # of each range
_TEST_PART, _PERIOD = 3, 4
# What an observation (position, velocity, angle, angular velocity) and its change in one step are of the order of.
_SCALE = np.array([2.4, 2.0, 0.2, 2.0], np.float32)
_CHANGE = np.array([0.02, 0.2, 0.02, 0.3], np.float32)
TRANSITION_WIDTH = 9


class CartPoleFamily(Config):
    """The family's ranges; a range of one value does not vary."""

    pole_length: tuple[float, float] = Field(default=(0.1, 2.0), description="half the pole's length, m")
    force: tuple[float, float] = Field(default=(2.0, 30.0), description="of a push, N")
    gravity: tuple[float, float] = Field(default=(5.0, 15.0), description="m/s^2")
    swapped: bool = Field(default=False, description="half of the tasks have left and right swapped")

    @field_validator(*PHYSICS)
    @classmethod
    def _range(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not 0.01 <= bounds[0] <= bounds[1] <= 1000:
            raise ValueError("a range from 0.01 to 1000, the smaller number first, is allowed")
        return bounds

    @model_validator(mode="after")
    def _varies(self) -> Self:
        if not self._varying().any():
            raise ValueError(
                "one of pole_length, force and gravity must vary, or training and test tasks are the same"
            )
        return self

    def _bounds(self) -> np.ndarray:
        return np.log(np.array([self.pole_length, self.force, self.gravity]))

    def _varying(self) -> np.ndarray:
        low, high = self._bounds().T
        return np.asarray(low < high)

    def sample(self, split: Split, count: int, random: np.random.Generator) -> np.ndarray:
        """Tasks of one split, float64 [count, 4]."""
        low, high = self._bounds().T
        tasks = np.zeros((count, len(PHYSICS) + 1))
        missing = np.arange(count)
        while len(missing):
            places = random.random((len(missing), len(PHYSICS)))  # in the ranges
            parts = np.floor(places[:, self._varying()] * _PARTS).sum(axis=1)
            wanted = (parts % _PERIOD == _TEST_PART) == (split == "test")
            tasks[missing, :-1] = np.exp(low + places * (high - low))
            missing = missing[~wanted]
        if self.swapped:  # exactly half of them, in random order
            tasks[random.permutation(count)[: count // 2], -1] = 1
        return tasks

    def scaled(self, tasks: np.ndarray) -> np.ndarray:
        """Tasks as a critic sees them, float32 [N, 4]: -1 to 1 over each range."""
        low, high = self._bounds().T
        width = np.where(high > low, high - low, 1.0)
        physics = 2 * (np.log(tasks[:, :-1]) - low) / width - 1
        return np.concatenate([physics * self._varying(), 2 * tasks[:, -1:] - 1], axis=1).astype(np.float32)


def environment(task: np.ndarray) -> EnvironmentConfig:
    """The task's physics as an ordinary environment, which never swaps."""
    options = {name: float(value) for name, value in zip(PHYSICS, task[:-1], strict=True)}
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
        tasks: one for each copy, [B, 4].
    """

    def __init__(self, tasks: np.ndarray) -> None:
        super().__init__(num_envs=len(tasks))
        # Gymnasium's dynamics broadcast: an array of constants serves as well as one.
        own: Any = self
        own.length, own.force_mag, own.gravity = (tasks[:, column].copy() for column in range(3))
        own.polemass_length = self.masspole * own.length
        self.swapped = tasks[:, 3].astype(np.bool_)

    def step(self, action: Any) -> Any:
        """As CartPole's, with each copy's own physics."""
        return super().step(np.where(self.swapped, 1 - action, action))
