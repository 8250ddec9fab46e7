"""CartPole and Acrobot as families: a task is a set of physical constants, drawn from ranges uniformly in their logarithms.

CartPole's tasks may have left and right swapped, too: they look like their twins until an action is taken. What past pushes have done is seen in
the speeds alone.

The dynamics, rewards and ends are those of ``stillhouse/CartPole-v1`` and ``stillhouse/Acrobot-v1`` (:mod:`stillhouse.envs.variants`), which are
Gymnasium's with the constants as options; here all copies of all tasks step together, in float64. A policy that is learnt
here acts in those environments as it is, unless sides are swapped. Episodes begin as Gymnasium's do.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from stillhouse.envs.families import Split, check_ranges, sample_box

Ranges = Mapping[str, tuple[float, float]]

CARTPOLE_RANGES: Ranges = MappingProxyType(
    {"pole_length": (0.2, 1.5), "gravity": (5.0, 20.0), "force": (3.0, 20.0), "pole_mass": (0.05, 1.0)}
)
"""Half length of the pole (m), gravity (m/s^2), push (N), mass of the pole (kg)."""

ACROBOT_RANGES: Ranges = MappingProxyType(
    {"mass_1": (0.5, 1.5), "mass_2": (0.5, 1.5), "length_1": (0.5, 1.5)}
)
"""Masses of the links (kg), length of the first (m)."""

_NONE: Ranges = MappingProxyType({})


class _PhysicsFamily:
    """What is drawn, and from where.

    Args:
        horizon: env steps of an episode.
        ranges: least and largest value of a constant, over the family's own.

    Raises:
        StillhouseError: ranges that are none.
    """

    name: str
    discrete = True
    splits = True
    own_ranges: Ranges

    def __init__(self, horizon: int, ranges: Ranges) -> None:
        self.horizon = horizon
        self.ranges = check_ranges(self.name, ranges, self.own_ranges)
        self._low, self._high = np.array(list(self.ranges.values())).T

    def members(self, split: Split) -> int | None:
        return None

    def sample(self, split: Split, count: int, random: np.random.Generator) -> np.ndarray:
        drawn = np.exp(sample_box(split, count, np.log(self._low), np.log(self._high), random))
        return np.clip(drawn, self._low, self._high)  # a range without extent is its value to the last digit


class CartPoleFamily(_PhysicsFamily):
    """A task is (pole_length, gravity, force, pole_mass, swapped); reward 1 per step, and the episode ends when the pole falls.

    Args:
        horizon: env steps of an episode.
        ranges: least and largest value of a constant, over :data:`CARTPOLE_RANGES`.
        swapped: half of the tasks have left and right swapped.

    Raises:
        StillhouseError: ranges that are none.
    """

    name = "cartpole"
    observations = 4
    actions = 2
    own_ranges = CARTPOLE_RANGES

    def __init__(self, horizon: int = 200, ranges: Ranges = _NONE, swapped: bool = False) -> None:
        super().__init__(horizon, ranges)
        self.swapped = swapped

    def sample(self, split: Split, count: int, random: np.random.Generator) -> np.ndarray:
        physics = super().sample(split, count, random)
        sides = np.zeros((count, 1))
        if self.swapped:  # half of them in random order; who gets the odd one is drawn
            sides[random.permutation(count)[: (count + int(random.integers(2))) // 2]] = 1
        return np.concatenate([physics, sides], axis=1)

    def scaled(self, tasks: np.ndarray) -> np.ndarray:
        """Tasks [N, 5] as a critic may see them, float32: each column from -1 to 1 over its range, 0 where it does not vary."""
        low, high = np.log(self._low), np.log(self._high)
        physics = 2 * (np.log(tasks[:, :-1]) - low) / np.where(high > low, high - low, 1.0) - 1
        return np.concatenate([physics * (high > low), 2 * tasks[:, -1:] - 1], axis=1).astype(np.float32)

    def reset(self, tasks: np.ndarray, rollouts: int, random: np.random.Generator) -> np.ndarray:
        return random.uniform(-0.05, 0.05, (len(tasks), rollouts, 4))

    def observe(self, state: np.ndarray) -> np.ndarray:
        return state.astype(np.float32)

    def step(
        self, tasks: np.ndarray, state: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        length, gravity, push, pole_mass, swapped = tasks.T[..., None]
        x, x_dot, theta, theta_dot = np.moveaxis(state, -1, 0)
        cosine, sine = np.cos(theta), np.sin(theta)
        total_mass = 1.0 + pole_mass
        moment = pole_mass * length
        force = np.where((actions == 1) != (swapped == 1), push, -push)
        along = (force + moment * theta_dot**2 * sine) / total_mass
        theta_acceleration = (gravity * sine - cosine * along) / (
            length * (4 / 3 - pole_mass * cosine**2 / total_mass)
        )
        x_acceleration = along - moment * theta_acceleration * cosine / total_mass
        seconds = 0.02
        state = np.stack(
            [
                x + seconds * x_dot,
                x_dot + seconds * x_acceleration,
                theta + seconds * theta_dot,
                theta_dot + seconds * theta_acceleration,
            ],
            axis=-1,
        )
        terminated = (np.abs(state[..., 0]) > 2.4) | (np.abs(state[..., 2]) > np.deg2rad(12))
        # A copy that is stepped on after its end must not overflow.
        return np.clip(state, -1e3, 1e3), np.ones(x.shape), terminated

    def oracle_return(self, tasks: np.ndarray) -> np.ndarray | None:
        """The horizon: an upper bound, which not every set of constants may allow."""
        return np.full(len(tasks), float(self.horizon))


class AcrobotFamily(_PhysicsFamily):
    """A task is (mass_1, mass_2, length_1); reward -1 per step until the tip is above the line.

    Args:
        horizon: env steps of an episode.
        ranges: least and largest value of a constant, over :data:`ACROBOT_RANGES`.

    Raises:
        StillhouseError: ranges that are none.
    """

    name = "acrobot"
    observations = 6
    actions = 3
    own_ranges = ACROBOT_RANGES

    def __init__(self, horizon: int = 500, ranges: Ranges = _NONE) -> None:
        super().__init__(horizon, ranges)

    def reset(self, tasks: np.ndarray, rollouts: int, random: np.random.Generator) -> np.ndarray:
        return random.uniform(-0.1, 0.1, (len(tasks), rollouts, 4))

    def observe(self, state: np.ndarray) -> np.ndarray:
        first, second, first_dot, second_dot = np.moveaxis(state, -1, 0)
        parts = [np.cos(first), np.sin(first), np.cos(second), np.sin(second), first_dot, second_dot]
        return np.stack(parts, axis=-1).astype(np.float32)

    def step(
        self, tasks: np.ndarray, state: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        torque = actions - 1.0
        seconds = 0.2
        # Runge-Kutta of order 4 over one step, as Gymnasium's rk4 does.
        k1 = self._derivative(tasks, state, torque)
        k2 = self._derivative(tasks, state + seconds / 2 * k1, torque)
        k3 = self._derivative(tasks, state + seconds / 2 * k2, torque)
        k4 = self._derivative(tasks, state + seconds * k3, torque)
        state = state + seconds / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        angles = (state[..., :2] + np.pi) % (2 * np.pi) - np.pi
        bounds = np.array([4 * np.pi, 9 * np.pi])
        state = np.concatenate([angles, np.clip(state[..., 2:], -bounds, bounds)], axis=-1)
        terminated = -np.cos(state[..., 0]) - np.cos(state[..., 1] + state[..., 0]) > 1.0
        return state, np.where(terminated, 0.0, -1.0), terminated

    def _derivative(self, tasks: np.ndarray, state: np.ndarray, torque: np.ndarray) -> np.ndarray:
        """Sutton & Barto's equations of motion ("book"), with l1 of the task and the rest as in Gymnasium."""
        mass_1, mass_2, length = tasks.T[..., None]
        centre_1, centre_2, inertia, gravity = length / 2, 0.5, 1.0, 9.8
        theta_1, theta_2, dot_1, dot_2 = np.moveaxis(state, -1, 0)
        cosine, sine = np.cos(theta_2), np.sin(theta_2)
        d1 = (
            mass_1 * centre_1**2
            + mass_2 * (length**2 + centre_2**2 + 2 * length * centre_2 * cosine)
            + 2 * inertia
        )
        d2 = mass_2 * (centre_2**2 + length * centre_2 * cosine) + inertia
        phi2 = mass_2 * centre_2 * gravity * np.cos(theta_1 + theta_2 - np.pi / 2)
        phi1 = (
            -mass_2 * length * centre_2 * dot_2**2 * sine
            - 2 * mass_2 * length * centre_2 * dot_2 * dot_1 * sine
            + (mass_1 * centre_1 + mass_2 * length) * gravity * np.cos(theta_1 - np.pi / 2)
            + phi2
        )
        second = (torque + d2 / d1 * phi1 - mass_2 * length * centre_2 * dot_1**2 * sine - phi2) / (
            mass_2 * centre_2**2 + inertia - d2**2 / d1
        )
        first = -(d2 * second + phi1) / d1
        return np.stack([dot_1, dot_2, first, second], axis=-1)

    def oracle_return(self, tasks: np.ndarray) -> np.ndarray | None:
        return None
