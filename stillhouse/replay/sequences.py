"""The last steps of every environment copy, in order, from which pieces of episodes are sampled."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from stillhouse.envs.vector import Step
from stillhouse.types import ObservationSpec

# What a row is: a step, or the frame with which an episode ended, after which nothing was done.
_EMPTY, _STEP, _TERMINATED, _TRUNCATED = range(4)


class ReplayedSequences(NamedTuple):
    """S pieces of episodes, of up to T steps each; rows after a piece's end are no steps.

    Attributes:
        observations: [T + 1, S, ...]; after a piece's end its last one, again and again.
        actions: int64 [T, S].
        rewards: float32 [T, S].
        terminated: bool [T, S], the step ended the episode by itself.
        valid: bool [T, S], the row is a step of the piece; the first always is.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    valid: np.ndarray


class SequenceReplay:
    """A ring of frames for each of B copies; an episode's last frame takes a row of its own.

    Args:
        observation: what is stored; planes are kept as bits.
        capacity: rows of each copy.
        num_envs: copies, B.
    """

    def __init__(self, observation: ObservationSpec, capacity: int, num_envs: int) -> None:
        self._shape = observation.stored_shape
        self._bits = observation.kind == "planes"
        packed = (int(np.prod(self._shape, dtype=np.int64)) + 7) // 8
        stored = (packed,) if self._bits else self._shape
        self.capacity = capacity
        self._observations = np.zeros(
            (num_envs, capacity, *stored), np.uint8 if self._bits else observation.dtype
        )
        self._actions = np.zeros((num_envs, capacity), np.int64)
        self._rewards = np.zeros((num_envs, capacity), np.float32)
        self._kinds = np.full((num_envs, capacity), _EMPTY, np.uint8)
        self._ages = np.zeros((num_envs, capacity), np.int64)  # steps of its episode before it
        self._next = np.zeros(num_envs, np.int64)  # the row to be written, the oldest of a full ring
        self._age = np.zeros(num_envs, np.int64)

    def add(self, observations: np.ndarray, actions: np.ndarray, step: Step) -> None:
        """Add one step of every copy: what was acted on, [B, ...], the actions [B], and what came of them."""
        rows = np.flatnonzero(step.valid)
        self._write(rows, observations[rows], actions[rows], step.rewards[rows], _STEP)
        self._age[rows] += 1
        if len(step.ended):
            kinds = np.where(step.terminated[step.ended], _TERMINATED, _TRUNCATED)
            self._write(step.ended, step.final_observations, 0, 0.0, kinds)
            self._age[step.ended] = 0

    def _write(
        self,
        rows: np.ndarray,
        observations: np.ndarray,
        actions: np.ndarray | int,
        rewards: np.ndarray | float,
        kinds: np.ndarray | int,
    ) -> None:
        places = self._next[rows]
        if self._bits:
            observations = np.packbits(observations.reshape(len(rows), -1), axis=1)
        self._observations[rows, places] = observations
        self._actions[rows, places] = actions
        self._rewards[rows, places] = rewards
        self._kinds[rows, places] = kinds
        self._ages[rows, places] = self._age[rows]
        self._next[rows] = (places + 1) % self.capacity

    def _read(self, copies: np.ndarray, places: np.ndarray) -> np.ndarray:
        stored = self._observations[copies, places]
        if not self._bits:
            return stored
        count = int(np.prod(self._shape))
        return np.unpackbits(stored, axis=-1, count=count).view(np.bool_).reshape(*places.shape, *self._shape)

    def sample_sequences(self, count: int, length: int, generator: np.random.Generator) -> ReplayedSequences:
        """``count`` pieces of up to ``length`` steps, each from a step drawn uniformly; none goes on after its episode's end.

        ``count`` must be at least 1, and at least one step with what it led to must have been added.
        """
        everyone = np.arange(len(self._next))
        complete = self._kinds == _STEP
        complete[everyone, self._next - 1] = False  # what the newest step led to is not here yet
        starts = np.flatnonzero(complete)
        starts = starts[generator.integers(len(starts), size=count)]
        copies, first = np.divmod(starts, self.capacity)
        places = (first + np.arange(length + 1)[:, None]) % self.capacity
        valid = np.logical_and.accumulate(complete[copies, places[:length]])
        steps = valid.sum(axis=0)
        frames = np.minimum(np.arange(length + 1)[:, None], steps)
        return ReplayedSequences(
            self._read(np.broadcast_to(copies, places.shape), (first + frames) % self.capacity),
            self._actions[copies, places[:length]],
            self._rewards[copies, places[:length]],
            valid & (self._kinds[copies, places[1:]] == _TERMINATED),
            valid,
        )

    def sample_rewards(
        self, count: int, frames: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Steps with the frames before them, half of them (in expectation) with a reward other than 0.

        Where there are steps of one kind alone, all are of that kind.

        Returns:
            Observations [K, frames, ...] of one episode in a row, and the rewards of the step taken on the last of them,
            float32 [K]; K is ``count``, or 0 where no episode here has so many frames.
        """
        everyone = np.arange(len(self._next))
        known = (self._kinds == _STEP) & (self._ages >= frames - 1)
        for older in range(frames - 1):  # whose frames before were overwritten
            known[everyone, (self._next + older) % self.capacity] = False
        rewarded = self._rewards != 0
        kinds = [np.flatnonzero(known & ~rewarded), np.flatnonzero(known & rewarded)]
        if not any(len(kind) for kind in kinds):
            count = 0
        wanted = generator.random(count) < 0.5
        wanted = (wanted & (len(kinds[1]) > 0)) | (len(kinds[0]) == 0)
        chosen = np.zeros(count, np.int64)
        for kind, wants in zip(kinds, (~wanted, wanted), strict=True):
            if wants.any():
                chosen[wants] = kind[generator.integers(len(kind), size=int(wants.sum()))]
        copies, last = np.divmod(chosen, self.capacity)
        places = (last[:, None] + np.arange(1 - frames, 1)) % self.capacity
        observations = self._read(np.broadcast_to(copies[:, None], places.shape), places)
        return observations, self._rewards[copies, last]

    def cut(self) -> None:
        """The open episodes will not go on: each ends with the frame that was added last, as a truncation."""
        everyone = np.arange(len(self._next))
        last = self._kinds[everyone, self._next - 1]
        self._kinds[everyone, self._next - 1] = np.where(last == _STEP, _TRUNCATED, last)
        self._age[:] = 0

    def get_state(self) -> dict[str, Any]:
        """Everything that was added and is still here."""
        return {name: getattr(self, f"_{name}").copy() for name in self._ARRAYS}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state`` of a replay with the same arguments."""
        for name in self._ARRAYS:
            getattr(self, f"_{name}")[...] = state[name]

    _ARRAYS = ("observations", "actions", "rewards", "kinds", "ages", "next", "age")
