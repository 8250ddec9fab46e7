"""HalfCheetah as families; only with the extra ``mujoco``."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

pytest.importorskip("mujoco")

from stillhouse.envs.cheetah import CheetahDirection, CheetahVelocity


def test_copies_step_as_gymnasiums_environment_does_alone() -> None:
    family = CheetahDirection()
    random = np.random.default_rng(0)
    tasks = np.array([[1.0], [-1.0]])
    state = family.reset(tasks, 1, random)
    single = [gymnasium.make("HalfCheetah-v5").unwrapped for _ in tasks]
    for env, row in zip(single, state[:, 0], strict=True):
        env.reset(seed=0)
        env.set_state(row[1:10], row[10:])
    for _ in range(20):
        actions = random.uniform(-1, 1, (2, 1, 6))
        state, rewards, terminated = family.step(tasks, state, actions)
        observed = family.observe(state)
        assert not terminated.any()
        for n, env in enumerate(single):
            expected, _, _, _, found = env.step(actions[n, 0])
            np.testing.assert_allclose(observed[n, 0], expected, rtol=1e-3, atol=1e-4)
            reward = tasks[n, 0] * found["x_velocity"] - 0.05 * np.square(actions[n, 0]).sum()
            assert rewards[n, 0] == pytest.approx(reward, abs=1e-4)


def test_what_a_copy_does_depends_on_its_own_state_and_action_alone() -> None:
    family = CheetahDirection()
    random = np.random.default_rng(1)
    tasks = np.array([[1.0], [-1.0]])
    state = family.reset(tasks, 3, random)
    actions = random.uniform(-2, 2, (2, 3, 6))
    together = family.step(tasks, state, actions)[0]
    alone = family.step(tasks[1:], state[1:, :1], actions[1:, :1])[0]
    assert (together[1, 0] == alone[0, 0]).all()
    clipped = family.step(tasks, state, np.clip(actions, -1, 1))
    assert (clipped[0] == together).all()


def test_both_directions_are_trained_on_as_often_and_there_is_no_split() -> None:
    family = CheetahDirection()
    assert not family.splits
    assert family.members("test") == 2
    assert family.sample("train", 4, np.random.default_rng(0)).sum() == 0
    assert set(family.sample("test", 2, np.random.default_rng(0))[:, 0]) == {1.0, -1.0}


def test_speeds_for_testing_are_never_trained_on() -> None:
    family = CheetahVelocity()
    train, test = (family.sample(split, 200, np.random.default_rng(2))[:, 0] for split in ("train", "test"))
    assert not set(np.floor(train * 5)) & set(np.floor(test * 5))
    state = family.reset(np.array([[0.5]]), 1, np.random.default_rng(3))
    reached, rewards, _ = family.step(np.array([[0.5]]), state, np.zeros((1, 1, 6)))
    speed = (reached[0, 0, 1] - state[0, 0, 1]) / 0.05
    assert rewards[0, 0] == pytest.approx(-abs(speed - 0.5))
