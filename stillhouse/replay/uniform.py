"""Uniform replay of (n-step) transitions from many environment copies, in preallocated arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from stillhouse.types import ObservationSpec


class UniformReplay:
    """A ring of transitions, sampled uniformly with replacement.

    A transition is (s, a, R, discount, s'): R the discounted sum of up to ``n_step`` rewards, discount gamma to the
    number of rewards summed, or 0 where the episode terminated, s' the observation after the last of them (the true
    final observation at an episode's end). An n-step sum stops at an episode's end of either kind. Besides, each row knows its
    own reward and its place in its episode, so that what was played can be told from the replay.

    Args:
        observation: what is stored; planes are kept as bits.
        capacity: transitions.
        num_envs: copies that are stepped together, B.
        n_step: rewards summed.
        gamma: discount per env step.
    """

    def __init__(
        self, observation: ObservationSpec, capacity: int, num_envs: int, n_step: int, gamma: float
    ) -> None:
        self._shape = observation.stored_shape
        self._bits = observation.kind == "planes"
        self._packed = int(np.prod(self._shape, dtype=np.int64) + 7) // 8
        stored = (self._packed,) if self._bits else self._shape
        dtype = np.dtype(np.uint8) if self._bits else observation.dtype
        self.capacity = capacity
        self.size = 0
        self._next = 0
        self._gamma = gamma
        self._n_step = n_step
        self._observations = np.zeros((capacity, *stored), dtype)
        self._successors = np.zeros((capacity, *stored), dtype)
        self._actions = np.zeros(capacity, np.int64)
        self._returns = np.zeros(capacity, np.float32)
        self._discounts = np.zeros(capacity, np.float32)
        self._rewards = np.zeros(capacity, np.float32)
        self._places_in_episodes = np.zeros(
            (capacity, 3), np.uint32
        )  # episode, step in it, steps to its end or 0 where the sum did not reach it
        # The last n steps of each copy, whose sums are still growing; age counts the rewards summed so far, 0 is free.
        self._open_observations = np.zeros((n_step, num_envs, *stored), dtype)
        self._open_actions = np.zeros((n_step, num_envs), np.int64)
        self._open_returns = np.zeros((n_step, num_envs), np.float32)
        self._open_age = np.zeros((n_step, num_envs), np.int64)
        self._open_rewards = np.zeros((n_step, num_envs), np.float32)
        self._open_places_in_episodes = np.zeros((n_step, num_envs, 3), np.uint32)
        self._open_slot = 0
        self._place = np.zeros((num_envs, 3), np.uint32)  # each copy's episode and step
        self._next_episode = 0
        self._begin_episodes(np.ones(num_envs, np.bool_))

    def add(
        self,
        observations: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        successors: np.ndarray,
        valid: np.ndarray,
    ) -> None:
        """Add one step of every copy: [B, ...] arrays; rows with ``valid`` False are passed over."""
        slot = self._open_slot
        self._open_observations[slot] = self._pack(observations)
        self._open_actions[slot] = actions
        self._open_returns[slot] = 0
        self._open_age[slot] = valid
        self._open_rewards[slot] = rewards
        self._open_places_in_episodes[slot] = self._place
        growing = (self._open_age > 0) & valid
        self._open_returns += growing * np.float32(self._gamma) ** (self._open_age - 1).clip(0) * rewards
        finished = growing & ((self._open_age == self._n_step) | terminated | truncated)
        if finished.any():
            slots, rows = np.nonzero(finished)
            count = len(rows)
            places = (self._next + np.arange(count)) % self.capacity
            self._observations[places] = self._open_observations[slots, rows]
            self._actions[places] = self._open_actions[slots, rows]
            self._returns[places] = self._open_returns[slots, rows]
            ages = self._open_age[slots, rows]
            self._discounts[places] = np.where(terminated[rows], 0, np.float32(self._gamma) ** ages)
            self._successors[places] = self._pack(successors)[rows]
            self._rewards[places] = self._open_rewards[slots, rows]
            self._places_in_episodes[places] = self._open_places_in_episodes[slots, rows]
            self._places_in_episodes[places, 2] = np.where(terminated[rows] | truncated[rows], ages, 0)
            self._next = (self._next + count) % self.capacity
            self.size = min(self.size + count, self.capacity)
            self._open_age[finished] = 0
        self._open_age += self._open_age > 0
        self._open_slot = (slot + 1) % self._n_step
        self._place[:, 1] += valid
        if (ended := valid & (terminated | truncated)).any():
            self._begin_episodes(ended)

    def _begin_episodes(self, copies: np.ndarray) -> None:
        count = int(copies.sum())
        self._place[copies, 0] = self._next_episode + np.arange(count)
        self._place[copies, 1] = 0
        self._next_episode += count

    def sample(self, count: int, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
        """``count`` transitions: observations, actions, returns, discounts, successors, each [count, ...]."""
        rows = generator.integers(self.size, size=count)
        return (
            self._unpack(self._observations[rows]),
            self._actions[rows],
            self._returns[rows],
            self._discounts[rows],
            self._unpack(self._successors[rows]),
        )

    def drop_open(self) -> None:
        """Forget the sums that still grow: the episodes they belong to were cut."""
        self._open_age[:] = 0
        self._begin_episodes(np.ones(len(self._place), np.bool_))

    def get_state(self) -> dict[str, Any]:
        """The filled part, as arrays."""
        return {
            "size": self.size,
            "next": self._next,
            "open_slot": self._open_slot,
            "next_episode": self._next_episode,
            **{name: getattr(self, f"_{name}")[: self.size].copy() for name in self._stored()},
            **{name: getattr(self, f"_{name}").copy() for name in self._open()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state`` of a replay with the same arguments."""
        self.size, self._next, self._open_slot = state["size"], state["next"], state["open_slot"]
        self._next_episode = state["next_episode"]
        for name in self._stored():
            getattr(self, f"_{name}")[: self.size] = state[name]
        for name in self._open():
            getattr(self, f"_{name}")[:] = state[name]

    def take_over(self, state: dict[str, Any]) -> None:
        """Begin with what another replay's ``get_state`` has stored; its open sums, and so its number of copies, do not count.

        The ring is unrolled, oldest first, so that the capacities may differ: in a larger one rows that were never
        written would else be sampled, and a smaller one keeps the newest.
        """
        oldest_first = (state["next"] + np.arange(state["size"])) % max(1, state["size"])
        kept = oldest_first[max(0, len(oldest_first) - self.capacity) :]
        for name in self._stored():
            getattr(self, f"_{name}")[: len(kept)] = np.asarray(state[name])[kept]
        self.size, self._next = len(kept), len(kept) % self.capacity
        self._next_episode = state["next_episode"]  # no two episodes of one number
        self.drop_open()

    @staticmethod
    def _stored() -> tuple[str, ...]:
        return (
            "observations",
            "successors",
            "actions",
            "returns",
            "discounts",
            "rewards",
            "places_in_episodes",
        )

    @staticmethod
    def _open() -> tuple[str, ...]:
        return (
            "open_observations",
            "open_actions",
            "open_returns",
            "open_age",
            "open_rewards",
            "open_places_in_episodes",
            "place",
        )

    def _pack(self, observations: np.ndarray) -> np.ndarray:
        return (
            np.packbits(observations.reshape(len(observations), -1), axis=1) if self._bits else observations
        )

    def _unpack(self, stored: np.ndarray) -> np.ndarray:
        if not self._bits:
            return stored
        size = int(np.prod(self._shape))
        return np.unpackbits(stored, axis=1, count=size).reshape(len(stored), *self._shape).view(np.bool_)
