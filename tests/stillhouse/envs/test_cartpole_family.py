"""CartPole's family as an environment: each copy's own physics, swapped sides, the horizon, features by hand."""

from __future__ import annotations

import numpy as np

from stillhouse.envs.cartpole_family import CartPoleFamilyVectorEnv, environment, transition_features
from stillhouse.envs.make import make_vector
from stillhouse.envs.physics import CartPoleFamily
from stillhouse.envs.vector import VectorEnvironment


def test_every_copy_has_its_own_physics_and_sides() -> None:
    tasks = np.array([[0.5, 9.8, 10.0, 0.1, 0], [1.5, 12.0, 3.0, 0.4, 0], [1.5, 12.0, 3.0, 0.4, 1]])
    together = VectorEnvironment.over(CartPoleFamilyVectorEnv(tasks, 500), 0, "train")
    start = together.reset()
    actions = np.array([1, 1, 0])
    moved = together.step(actions).observations
    for index, task in enumerate(tasks[:2]):
        alone = make_vector(environment(task), 1)
        alone.reset(seed=0)
        alone.unwrapped.state = start[index][:, None].astype(np.float64)  # type: ignore[attr-defined]
        wanted = alone.step(np.array([1]))[0][0]
        np.testing.assert_allclose(moved[index], wanted, rtol=1e-5, atol=1e-6)
    # The swapped twin is pushed to the other side than it says: its 0 is the other's 1.
    velocity = moved[:, 1] - start[:, 1]
    assert velocity[1] > 0 and velocity[2] > 0
    np.testing.assert_allclose(velocity[1], velocity[2], rtol=0.1)  # their starts differ


def test_it_steps_as_the_family_does() -> None:
    """Two forms of one family: the same states, rewards and ends, swapped tasks among them."""
    family, random = CartPoleFamily(swapped=True), np.random.default_rng(2)
    tasks = family.sample("train", 6, random)
    assert tasks[:, 4].sum() == 3
    env = CartPoleFamilyVectorEnv(tasks, 200)
    env.reset(seed=0)
    state = family.reset(tasks, 1, random)
    env.state = state[:, 0].T.copy()  # type: ignore[assignment]
    alive = np.ones(6, dtype=bool)
    for _ in range(60):
        actions = random.integers(2, size=6)
        state, _, terminated = family.step(tasks, state, actions[:, None])
        observed, _, ended, _, _ = env.step(actions)
        np.testing.assert_allclose(observed[alive], family.observe(state)[alive, 0], rtol=1e-5, atol=1e-6)
        assert (ended[alive] == terminated[alive, 0]).all()
        alive &= ~ended
    assert not alive.all()


def test_an_episode_ends_at_the_horizon() -> None:
    env = CartPoleFamilyVectorEnv(np.array([[0.5, 9.8, 10.0, 0.1, 0]]), 3)
    env.reset(seed=0)
    assert [bool(env.step(np.array([n % 2]))[3][0]) for n in range(3)] == [False, False, True]


def test_features_by_hand() -> None:
    before = np.array([[2.4, 0, 0.2, 0]], np.float32)
    after = np.array([[2.42, -0.2, 0.2, 0.3 * (np.e - 1)]], np.float32)
    found = transition_features(before, np.array([0]), after)
    wanted = [[1, 0, 1, 0, -1, np.log(2), -np.log(2), 0, 1]]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert found.dtype == np.float32
    assert transition_features(before, np.array([1]), after)[0, 4] == 1
