"""Contract of the vector environment over every autoreset mode, and of exact resume."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.checkpoint import load_state, save_state
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.vector import VectorEnvironment

MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]


class Counter(gymnasium.Env[np.ndarray, int]):
    """Counts its steps; episode lengths are drawn at reset; odd episodes terminate, even ones are truncated."""

    observation_space = gymnasium.spaces.Box(-1, 100, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    metadata = {"render_modes": []}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.length = int(self.np_random.integers(1, 6))
        self.terminates = bool(self.np_random.integers(2))
        self.count = 0
        return self._observe(), {}

    def _observe(self) -> np.ndarray:
        return np.array([self.count, self.length], np.float32)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        over = self.count == self.length
        return self._observe(), float(self.count), over and self.terminates, over and not self.terminates, {}


def counters(mode: AutoresetMode, copies: int = 3) -> VectorEnvironment:
    return VectorEnvironment.over(
        SyncVectorEnv([Counter] * copies, autoreset_mode=mode, copy=False), 0, "train"
    )


@pytest.mark.parametrize("mode", MODES)
def test_every_autoreset_mode_gives_the_same_kind_of_transitions(mode: AutoresetMode) -> None:
    envs = counters(mode)
    observations = envs.reset()
    ends, transitions = 0, 0
    for _ in range(200):
        step = envs.step(np.zeros(3, np.int64))
        successors = step.next_observations()
        for row in range(3):
            if not step.valid[row]:
                assert mode == AutoresetMode.NEXT_STEP
                assert step.rewards[row] == 0 and not step.terminated[row] and not step.truncated[row]
                continue
            transitions += 1
            count, length = observations[row]
            # The successor is the true one, of the same episode, even at its end.
            np.testing.assert_array_equal(successors[row], [count + 1, length])
            assert step.rewards[row] == count + 1
            assert (step.terminated[row] or step.truncated[row]) == (count + 1 == length)
        for place, row in enumerate(step.ended):
            ends += 1
            length = successors[row][1]
            assert step.episode_lengths[place] == length
            assert step.episode_returns[place] == length * (length + 1) / 2
            if mode != AutoresetMode.NEXT_STEP:
                assert step.observations[row][0] == 0  # the next episode's first observation, to act on
        observations = step.observations
    assert ends > 50 and transitions > 300


@pytest.mark.parametrize("mode", MODES)
def test_terminated_and_truncated_are_kept_apart(mode: AutoresetMode) -> None:
    envs = counters(mode)
    envs.reset()
    seen = set()
    for _ in range(100):
        step = envs.step(np.zeros(3, np.int64))
        assert not (step.terminated & step.truncated).any()
        seen |= {(bool(step.terminated[row]), bool(step.truncated[row])) for row in step.ended}
    assert seen == {(True, False), (False, True)}


CASES = {
    "own state (MinAtar)": EnvironmentConfig(id="MinAtar/Seaquest-v0"),
    "plain arrays (CartPole)": EnvironmentConfig(id="CartPole-v1"),
    "replayed (Acrobot)": EnvironmentConfig(id="Acrobot-v1", max_episode_steps=37),
    "variant": EnvironmentConfig(id="stillhouse/CartPole-v1", options={"pole_length": 1.0}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [1, 61, 250])
def test_resume_is_exact(name: str, steps: int, tmp_path: Any) -> None:
    def play(envs: VectorEnvironment, generator: np.random.Generator, count: int) -> list[np.ndarray]:
        seen = []
        for _ in range(count):
            step = envs.step(generator.integers(envs.spec.actions, size=4))
            seen += [step.observations, step.rewards, step.terminated, step.episode_returns]
        return seen

    whole = VectorEnvironment(CASES[name], 4, 7, "train")
    whole.reset()
    generator = np.random.default_rng(0)
    play(whole, generator, steps)
    save_state(tmp_path / "state", whole.get_state())
    expected = play(whole, generator, 80)

    resumed = VectorEnvironment(CASES[name], 4, 7, "train")
    resumed.set_state(load_state(tmp_path / "state"))
    generator = np.random.default_rng(0)
    [generator.integers(resumed.spec.actions, size=4) for _ in range(steps)]
    again = play(resumed, generator, 80)
    assert resumed.cut_episodes == 0
    for left, right in zip(expected, again, strict=True):
        np.testing.assert_array_equal(left, right)


def test_observations_are_in_c_order_before_and_after_a_resume() -> None:
    """CartPole's own vector hands out a transposed array, and networks round differently with the order."""
    envs = VectorEnvironment(EnvironmentConfig(id="CartPole-v1"), 3, 0, "train")
    assert envs.reset().flags.c_contiguous
    assert envs.step(np.zeros(3, np.int64)).observations.flags.c_contiguous
    assert envs.set_state(envs.get_state()).flags.c_contiguous


def test_an_environment_that_cannot_be_replayed_is_cut_and_says_so() -> None:
    class Unseeded(Counter):
        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[np.ndarray, dict[str, Any]]:
            _, info = super().reset(seed=None, options=options)
            self.length = int(np.random.default_rng().integers(50, 10_000))
            return self._observe(), info

    make = lambda: SyncVectorEnv([Unseeded] * 2, autoreset_mode=AutoresetMode.DISABLED, copy=False)  # noqa: E731
    envs = VectorEnvironment.over(make(), 0, "train")
    envs.reset()
    for _ in range(5):
        envs.step(np.zeros(2, np.int64))
    resumed = VectorEnvironment.over(make(), 0, "train")
    observations = resumed.set_state(envs.get_state())
    assert resumed.cut_episodes == 2
    np.testing.assert_array_equal(observations[:, 0], 0)  # new episodes


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(0, 40))
def test_replay_at_any_moment(seed: int, steps: int) -> None:
    envs = VectorEnvironment.over(
        SyncVectorEnv([Counter] * 3, autoreset_mode=AutoresetMode.DISABLED, copy=False), seed, "train"
    )
    envs.reset()
    for _ in range(steps):
        envs.step(np.zeros(3, np.int64))
    resumed = VectorEnvironment.over(
        SyncVectorEnv([Counter] * 3, autoreset_mode=AutoresetMode.DISABLED, copy=False), seed, "train"
    )
    resumed.set_state(envs.get_state())
    assert resumed.cut_episodes == 0
    for _ in range(20):
        left, right = envs.step(np.zeros(3, np.int64)), resumed.step(np.zeros(3, np.int64))
        np.testing.assert_array_equal(left.observations, right.observations)
        np.testing.assert_array_equal(left.ended, right.ended)


def test_streams_do_not_share_episodes() -> None:
    firsts = [
        VectorEnvironment(EnvironmentConfig(id="CartPole-v1"), 4, seed, stream).reset()
        for seed in (0, 1)
        for stream in ("train", "validation", "test")
    ]
    assert len({first.tobytes() for first in firsts}) == 6


def test_the_environments_own_vectorised_version_is_used() -> None:
    envs = VectorEnvironment(EnvironmentConfig(id="CartPole-v1"), 4, 0, "train")
    assert type(envs.envs.unwrapped).__name__ == "CartPoleVectorEnv"


def test_episodes_are_the_same_however_long_each_is_played() -> None:
    """Two agents judged on one stream meet the same episodes: copy by copy, number by number."""

    def beginnings(limit: int) -> list[list[bytes]]:
        envs = VectorEnvironment(EnvironmentConfig(id="Acrobot-v1", max_episode_steps=limit), 2, 0, "test")
        seen: list[list[bytes]] = [[row.tobytes()] for row in envs.reset()]
        while min(len(row) for row in seen) < 4:
            step = envs.step(np.zeros(2, np.int64))
            for row in step.ended:
                seen[row].append(step.observations[row].tobytes())
        return [row[:4] for row in seen]

    short, long = beginnings(3), beginnings(7)
    assert short == long
    assert len({first for row in short for first in row}) == 8


def test_a_vector_environment_with_state_of_other_kinds_is_not_called_exact() -> None:
    envs = VectorEnvironment(EnvironmentConfig(id="CartPole-v1"), 2, 0, "train")
    envs.envs.unwrapped.extra = {"wind": [1, 2]}  # type: ignore[attr-defined]
    first = envs.reset()
    envs.step(np.zeros(2, np.int64))
    resumed = VectorEnvironment(EnvironmentConfig(id="CartPole-v1"), 2, 0, "train")
    observations = resumed.set_state(envs.get_state())
    assert resumed.cut_episodes == 2
    assert not np.array_equal(observations, first)  # new episodes, not the first ones again
