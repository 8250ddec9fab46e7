"""HalfCheetah as families: run forwards or backwards, or at a given speed (Finn et al. 2017, https://arxiv.org/abs/1703.03400, section 5.3).

    direction   reward = d v - 0.05 ||a||^2,           d in {-1, +1}
    velocity    reward = -|v - w| - 0.05 ||a||^2,      w in [0, 2] m/s

v is the body's mean speed along x over the step, a the action, clipped to [-1, 1]. H = 200, and no episode ends before. Needs MuJoCo: the extra
``mujoco``.

Deviations, and choices:

1. The model, its five simulation steps of 0.01 s per env step, the observation (positions without x, and velocities: 17 numbers) and the
   first states are Gymnasium's HalfCheetah-v5. The paper's is rllab's (20 numbers, other dynamics): returns cannot be compared with it.
2. The paper's text has no cost of control for the direction; 0.05 is of the authors' code (``HalfCheetahEnvRandDirec``).
3. There are two directions, and both are trained on and tested on, as in the paper: there is no split.
4. Speeds for testing come from tenths of the range that training never sees; the paper draws both from the whole range.
5. The solver of contacts starts every env step cold, so that a state is positions and velocities alone. Gymnasium starts it from the last step's
   solution; the two agree to the solver's tolerance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from stillhouse.envs.families import Split, sample_box
from stillhouse.errors import StillhouseError

_FRAMES = 5  # simulation steps of an env step
_NOISE = 0.1  # of the first state
_CONTROL_COST = 0.05


class _HalfCheetah:
    """The simulator of many copies. A state is (time, 9 positions, 9 velocities).

    Raises:
        StillhouseError: MuJoCo is not installed.
    """

    observations = 17
    actions = 6
    discrete = False

    def __init__(self, horizon: int = 200) -> None:
        try:
            import mujoco
            from mujoco import rollout
        except ImportError as error:
            raise StillhouseError(
                f"{type(self).__name__}: MuJoCo cannot be imported ({error}); install the extra: pip install 'stillhouse[mujoco]'"
            ) from None
        self.horizon = horizon
        path = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / "half_cheetah.xml"
        self._model: Any = mujoco.MjModel.from_xml_path(str(path))
        self._data: Any = mujoco.MjData(self._model)
        self._rollout: Any = rollout.rollout
        self._seconds = _FRAMES * self._model.opt.timestep

    def reset(self, tasks: np.ndarray, rollouts: int, random: np.random.Generator) -> np.ndarray:
        shape = len(tasks), rollouts, 9
        positions = self._model.qpos0 + random.uniform(-_NOISE, _NOISE, shape)
        velocities = _NOISE * random.standard_normal(shape)
        return np.concatenate([np.zeros((*shape[:2], 1)), positions, velocities], axis=-1)

    def observe(self, state: np.ndarray) -> np.ndarray:
        return state[..., 2:].astype(np.float32)

    def _advance(self, state: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The next states, the speeds [N, K] in m/s, and the costs of control [N, K]."""
        actions = np.clip(actions, -1, 1).astype(np.float64)
        flat = np.ascontiguousarray(state.reshape(-1, state.shape[-1]))
        controls = np.repeat(actions.reshape(len(flat), 1, -1), _FRAMES, axis=1)
        frames, _ = self._rollout(self._model, self._data, flat, controls)
        reached = frames[:, -1].reshape(state.shape)
        speeds = (reached[..., 1] - state[..., 1]) / self._seconds
        return reached, speeds, _CONTROL_COST * np.square(actions).sum(axis=-1)


class CheetahDirection(_HalfCheetah):
    """A task is +1 (forwards) or -1 (backwards)."""

    name = "cheetah_direction"
    splits = False

    def members(self, split: Split) -> int | None:
        return 2

    def sample(self, split: Split, count: int, random: np.random.Generator) -> np.ndarray:
        # Who gets the odd one is drawn.
        return np.resize(random.permutation([1.0, -1.0]), count)[:, None]

    def step(
        self, tasks: np.ndarray, state: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        state, speeds, costs = self._advance(state, actions)
        return state, tasks * speeds - costs, np.zeros(speeds.shape, dtype=bool)

    def oracle_return(self, tasks: np.ndarray) -> np.ndarray | None:
        return None


class CheetahVelocity(_HalfCheetah):
    """A task is a speed in m/s, in [0, 2]."""

    name = "cheetah_velocity"
    splits = True

    def members(self, split: Split) -> int | None:
        return None

    def sample(self, split: Split, count: int, random: np.random.Generator) -> np.ndarray:
        return sample_box(split, count, np.array([0.0]), np.array([2.0]), random)

    def step(
        self, tasks: np.ndarray, state: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        state, speeds, costs = self._advance(state, actions)
        return state, -np.abs(speeds - tasks) - costs, np.zeros(speeds.shape, dtype=bool)

    def oracle_return(self, tasks: np.ndarray) -> np.ndarray | None:
        return None
