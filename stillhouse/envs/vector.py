"""One vector environment over every autoreset mode, with exact resume.

Gymnasium's vector environments end episodes in three ways (``AutoresetMode``): ``NEXT_STEP`` spends a row on the reset,
``SAME_STEP`` resets at once and hides the final observation in ``info``, ``DISABLED`` leaves the reset to the caller.
:class:`VectorEnvironment` shows all of them the same way: after ``step``, ``observations`` are what to act on next, the
true final observations of ended episodes stand apart, and rows that are no transitions are marked.

Exact resume. A vector environment with ``get_state``/``set_state`` is asked; one that holds plain arrays only
(Gymnasium's CartPole) is copied; in all others every episode starts from a seed of its own, and the open episodes are
replayed from their actions and compared with the saved observations. Only where that comparison fails, or where
episodes cannot be seeded one by one, are the open episodes cut, and ``cut_episodes`` counts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode

from stillhouse import seeding
from stillhouse.envs.make import EnvironmentConfig, make_vector
from stillhouse.types import EnvironmentSpec, environment_spec

_PLAIN = (np.ndarray, np.generic, int, float, bool, str, type(None))
_STATIC = (gymnasium.Space, gymnasium.envs.registration.EnvSpec, AutoresetMode)


@dataclass(frozen=True)
class Step:
    """What one step of B copies gave.

    Attributes:
        observations: to act on next, [B, ...]; first observations of new episodes where one was reset.
        rewards: float32 [B].
        terminated: bool [B], the environment ended the episode.
        truncated: bool [B], a time limit ended it (False where ``terminated``).
        valid: bool [B], False on rows that are no transitions (the reset rows of ``NEXT_STEP``).
        ended: rows [K] whose episode ended in this step.
        final_observations: the true last observations of these rows, [K, ...].
        episode_returns: float64 [K], undiscounted returns of the ended episodes.
        episode_lengths: int64 [K], in env steps.
    """

    observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    ended: np.ndarray
    final_observations: np.ndarray
    episode_returns: np.ndarray
    episode_lengths: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """Rows whose ``observations`` begin an episode, bool [B]; with ``NEXT_STEP`` those spent on the reset too."""
        return self.terminated | self.truncated | ~self.valid

    def next_observations(self) -> np.ndarray:
        """The observation that each transition really led to, [B, ...]."""
        if not len(self.ended):
            return self.observations
        successors = self.observations.copy()
        successors[self.ended] = self.final_observations
        return successors


class VectorEnvironment:
    """``num_envs`` copies of an environment, seeded from a named stream.

    Where episodes can be seeded one by one, each one's seed depends on the stream, its copy and its number alone.

    Args:
        config: the environment.
        num_envs: number of copies, B.
        seed: the stage's seed.
        stream: name of the stream: different names (training, validation, test) never share an episode.

    Raises:
        StillhouseError: the environment cannot be made, or its spaces are not supported.
    """

    def __init__(self, config: EnvironmentConfig, num_envs: int, seed: int, stream: str) -> None:
        self._wrap(make_vector(config, num_envs), config.id, seed, stream)

    @classmethod
    def over(
        cls,
        envs: gymnasium.vector.VectorEnv[Any, Any, Any],
        seed: int,
        stream: str,
        name: str = "environment",
    ) -> VectorEnvironment:
        """The same over a vector environment that exists already."""
        self = cls.__new__(cls)
        self._wrap(envs, name, seed, stream)
        return self

    def _wrap(
        self, envs: gymnasium.vector.VectorEnv[Any, Any, Any], name: str, seed: int, stream: str
    ) -> None:
        self.envs = envs
        self.num_envs = envs.num_envs
        self.spec: EnvironmentSpec = environment_spec(
            envs.single_observation_space, envs.single_action_space, name
        )
        self.mode = envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self.cut_episodes = 0
        self._dtype = self.spec.observation.dtype
        self._stream = (seed, stream)
        self._episodes = np.zeros(self.num_envs, np.int64)  # begun so far, by each copy
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, np.int64)
        self._was_ended = np.zeros(self.num_envs, np.bool_)
        self._observations = np.zeros((self.num_envs, *self.spec.observation.stored_shape), self._dtype)
        self._replays = self.mode == AutoresetMode.DISABLED and not hasattr(envs.unwrapped, "get_state")
        self._episode_seeds = np.zeros(self.num_envs, np.int64)
        self._log = np.zeros((1024, self.num_envs), np.int64)
        self._log_end = 0
        self._log_start = np.zeros(self.num_envs, np.int64)

    def reset(self) -> np.ndarray:
        """Start every copy anew; observations [B, ...]."""
        self._episodes[:] = 0
        self._returns[:] = 0
        self._lengths[:] = 0
        self._was_ended[:] = False
        self._log_end = 0
        self._log_start[:] = 0
        if self.mode == AutoresetMode.DISABLED:
            self._observations = self._reset_rows(np.ones(self.num_envs, np.bool_))
        else:
            # A vectorised implementation seeds all its copies from one number.
            observations, _ = self.envs.reset(seed=self._seed(0, 0))
            self._observations = self._typed(observations)
        return self._observations

    def step(self, actions: np.ndarray) -> Step:
        """Step every copy with ``actions``, integers [B]."""
        if self._replays:
            self._remember(actions)
        observations, rewards, terminated, truncated, infos = self.envs.step(actions)
        observations = self._typed(observations)
        valid = ~self._was_ended if self.mode == AutoresetMode.NEXT_STEP else np.ones(self.num_envs, np.bool_)
        terminated = np.asarray(terminated, np.bool_) & valid
        truncated = np.asarray(truncated, np.bool_) & valid & ~terminated
        rewards = np.where(valid, rewards, 0).astype(np.float32)
        self._returns += rewards
        self._lengths += valid
        ended_mask = terminated | truncated
        ended = np.flatnonzero(ended_mask)
        returns, lengths = self._returns[ended], self._lengths[ended]
        final = observations[ended]
        if len(ended):
            self._returns[ended] = 0
            self._lengths[ended] = 0
            if self.mode == AutoresetMode.SAME_STEP:
                final = np.stack([np.asarray(infos["final_obs"][row], self._dtype) for row in ended])
            elif self.mode == AutoresetMode.DISABLED:
                observations = self._reset_rows(ended_mask)
        self._was_ended = ended_mask
        self._observations = observations
        return Step(observations, rewards, terminated, truncated, valid, ended, final, returns, lengths)

    def close(self) -> None:
        """Release what the copies hold."""
        self.envs.close()

    def get_state(self) -> dict[str, Any]:
        """Everything needed to continue exactly: plain data and arrays."""
        state: dict[str, Any] = {
            "episodes": self._episodes.copy(),
            "returns": self._returns.copy(),
            "lengths": self._lengths.copy(),
            "was_ended": self._was_ended.copy(),
            "observations": self._observations.copy(),
            "cut_episodes": self.cut_episodes,
        }
        inner: Any = self.envs.unwrapped
        if hasattr(inner, "get_state"):
            state["own"] = inner.get_state()
        elif self._replays:
            first = int(self._log_start.min())
            state["replay"] = {
                "seeds": self._episode_seeds.copy(),
                "actions": self._log[first : self._log_end].copy(),
                "start": self._log_start - first,
            }
        elif _holds_plain_arrays(inner):
            state["plain"] = _plain_state(inner)
        return state

    def set_state(self, state: dict[str, Any]) -> np.ndarray:
        """Continue from ``get_state``; the observations to act on, [B, ...].

        Where the environment cannot be brought back exactly, new episodes are started instead, and ``cut_episodes``
        grows by the number of copies.
        """
        self.reset()
        inner: Any = self.envs.unwrapped
        if "own" in state:
            inner.set_state(state["own"])
            exact = True
        elif "plain" in state:
            _set_plain_state(inner, state["plain"])
            exact = True
        else:
            exact = "replay" in state and self._replay(state["replay"], state["observations"])
        self._episodes = np.array(state["episodes"], np.int64)
        self.cut_episodes = int(state["cut_episodes"])
        if not exact:
            self.cut_episodes += self.num_envs
            if self.mode == AutoresetMode.DISABLED:
                self._observations = self._reset_rows(np.ones(self.num_envs, np.bool_))
            else:  # from another seed: the first episodes were played already
                self._observations = self._typed(self.envs.reset(seed=self._seed(0, self.cut_episodes))[0])
            return self._observations
        self._returns[:] = state["returns"]
        self._lengths[:] = state["lengths"]
        self._was_ended = np.array(state["was_ended"], np.bool_)
        self._observations = np.array(state["observations"], self._dtype)
        return self._observations

    def _typed(self, observations: Any) -> np.ndarray:
        # A copy: Gymnasium's environments may hand out their own buffer. In C order, whatever theirs is (CartPole's is a transposed
        # state): a matrix product rounds differently with the order, and a saved state comes back in this one.
        return np.array(observations, self._dtype, order="C")

    def _reset_rows(self, mask: np.ndarray) -> np.ndarray:
        rows = np.flatnonzero(mask)
        for row in rows:
            self._episode_seeds[row] = self._seed(int(row), int(self._episodes[row]))
        self._episodes[rows] += 1
        self._log_start[rows] = self._log_end
        return self._reset_with_seeds(mask)

    def _seed(self, row: int, episode: int) -> int:
        # Of its copy and number alone: two agents judged on one stream meet the same episodes, however long each plays.
        return seeding.derive(self._stream[0], "episodes", self._stream[1], row, episode) % 2**31

    def _reset_with_seeds(self, mask: np.ndarray) -> np.ndarray:
        seeds = [
            int(seed) if chosen else None for seed, chosen in zip(self._episode_seeds, mask, strict=True)
        ]
        observations, _ = self.envs.reset(seed=seeds, options={"reset_mask": mask})  # type: ignore[arg-type]
        return self._typed(observations)

    def _remember(self, actions: np.ndarray) -> None:
        if self._log_end == len(self._log):
            first = int(self._log_start.min())
            kept = self._log[first : self._log_end]
            if len(kept) > len(self._log) // 2:
                self._log = np.concatenate(
                    [kept, np.zeros((len(self._log) * 2 - len(kept), self.num_envs), np.int64)]
                )
            else:
                self._log[: len(kept)] = kept.copy()
            self._log_end -= first
            self._log_start -= first
        self._log[self._log_end] = actions
        self._log_end += 1

    def _replay(self, saved: dict[str, Any], expected: np.ndarray) -> bool:
        """Bring the open episodes back by their seeds and actions; whether the observations came out the same.

        All copies are stepped together; each starts its episode so late that all arrive at the same time. Until then
        a copy plays anything (action 0), and is reset when that ends.
        """
        self._episode_seeds = np.array(saved["seeds"], np.int64)
        actions, start = np.array(saved["actions"], np.int64), np.array(saved["start"], np.int64)
        actions = actions.reshape(-1, self.num_envs)
        observations = self._reset_with_seeds(np.ones(self.num_envs, np.bool_))
        for time, row_actions in enumerate(actions):
            starting = start == time
            if time and starting.any():
                observations = self._reset_with_seeds(starting)
            stepped, _, terminated, truncated, _ = self.envs.step(np.where(start <= time, row_actions, 0))
            observations = self._typed(stepped)
            ended = np.asarray(terminated, np.bool_) | np.asarray(truncated, np.bool_)
            if (ended & (start <= time)).any():
                return False
            if ended.any():
                observations = self._reset_with_seeds(ended)
        if (start == len(actions)).any() and len(actions):
            observations = self._reset_with_seeds(start == len(actions))
        capacity = len(self._log)
        while capacity <= len(actions):
            capacity *= 2
        self._log = np.zeros((capacity, self.num_envs), np.int64)
        self._log[: len(actions)] = actions
        self._log_end, self._log_start = len(actions), start
        return bool(np.array_equal(observations, np.asarray(expected, self._dtype)))


def _holds_plain_arrays(inner: Any) -> bool:
    return all(
        key == "metadata" or isinstance(value, (*_PLAIN, *_STATIC))
        for key, value in vars(inner).items()
        if not key.startswith("_np_random")
    )


def _plain_state(inner: Any) -> dict[str, Any]:
    values = {
        key: (value.copy() if isinstance(value, np.ndarray) else value)
        for key, value in vars(inner).items()
        if isinstance(value, _PLAIN) and not key.startswith("_np_random")
    }
    return {"values": values, "random": inner.np_random.bit_generator.state}


def _set_plain_state(inner: Any, state: dict[str, Any]) -> None:
    for key, value in state["values"].items():
        setattr(inner, key, np.array(value) if isinstance(value, np.ndarray) else value)
    inner.np_random.bit_generator.state = state["random"]
