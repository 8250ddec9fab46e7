"""Returns, baseline and advantages by hand, and what is played."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.envs.navigation import Navigation
from stillhouse.envs.physics import CartPoleFamily
from stillhouse.meta.stochastic_policy import StochasticPolicy
from stillhouse.meta.trajectories import (
    Trajectories,
    advantages,
    baseline,
    discounted_returns,
    make_batch,
    play,
    some_of,
)


def trajectories(rewards: list[list[float]], lengths: list[int], terminated: list[bool]) -> Trajectories:
    """One task, one-number observations; episode k has ``lengths[k]`` env steps."""
    given = np.array(rewards)[None]
    shape = given.shape
    valid = np.arange(shape[2]) < np.array(lengths)[:, None]
    ends = np.zeros(shape, dtype=bool)
    for k, (length, ended) in enumerate(zip(lengths, terminated, strict=True)):
        ends[0, k, length - 1] = ended
    observations = np.random.default_rng(0).normal(size=(*shape, 1)).astype(np.float32)
    return Trajectories(
        observations, np.zeros(shape, np.int64), np.zeros((*shape, 2), np.float32), given, valid[None], ends
    )


def test_discounted_returns_by_hand() -> None:
    played = trajectories([[1, 2, 4], [3, 5, 0]], [3, 2], [False, True])
    found = discounted_returns(played, 0.5)
    np.testing.assert_allclose(found, [[[1 + 1 + 1, 2 + 2, 4], [3 + 2.5, 5, 0]]])
    assert played.returns().tolist() == [[7, 8]]


def test_the_baseline_fits_what_is_linear_in_its_features() -> None:
    played = trajectories([[0] * 30] * 4, [30, 30, 30, 12], [False] * 3 + [True])
    observed = played.observations[..., 0].astype(np.float64)
    time = np.arange(30) / 100
    targets = 2 * observed - observed**2 + 3 * time - 5 * time**3 + 0.5
    targets = targets * played.valid
    np.testing.assert_allclose(baseline(played, targets), targets, atol=5e-3)


def test_the_baseline_is_the_ridge_regression_of_valid_env_steps_by_hand() -> None:
    played = trajectories([[0, 0, 0]], [2], [True])
    targets = np.array([[[1.0, 2.0, 0.0]]])
    observed = np.clip(played.observations[0, 0, :2, 0].astype(float), -10, 10)
    time = np.array([0, 0.01])
    features = np.stack([observed, observed**2, time, time**2, time**3, np.ones(2)], axis=1)
    weights = np.linalg.solve(features.T @ features + 1e-5 * np.eye(6), features.T @ [1.0, 2.0])
    found = baseline(played, targets)
    np.testing.assert_allclose(found[0, 0], [*(features @ weights), 0], rtol=1e-6)


def test_of_wide_observations_the_baseline_sees_the_time_alone() -> None:
    played = trajectories([[0] * 10] * 4, [10] * 4, [False] * 4)
    random = np.random.default_rng(1)
    targets = random.normal(size=(1, 4, 10))
    wide, other, narrow = (
        played._replace(observations=random.normal(size=(1, 4, 10, width)).astype(np.float32))
        for width in (33, 33, 32)
    )
    found = baseline(wide, targets)
    np.testing.assert_allclose(found[0, 0], found[0, 3])  # the same at the same time of every episode
    np.testing.assert_allclose(found, baseline(other, targets))
    assert (
        np.abs(baseline(narrow, targets) - targets).max() < 1e-3 < np.abs(found - targets).max()
    )  # by heart


def test_tasks_have_baselines_of_their_own() -> None:
    one = trajectories([[0] * 10] * 2, [10, 10], [False] * 2)
    both = Trajectories(*(np.concatenate([part, part]) for part in one))
    targets = np.stack([np.ones((2, 10)), 7 * np.ones((2, 10))])
    np.testing.assert_allclose(baseline(both, targets), targets, atol=1e-3)


def test_advantages_with_lambda_1_are_returns_minus_the_baseline() -> None:
    played = trajectories([[1, 2, 4, 1], [3, 5, 0, 0], [1, 1, 1, 1]], [4, 2, 4], [False, True, False])
    returns = discounted_returns(played, 0.9)
    expected = (returns - baseline(played, returns)) * played.valid
    np.testing.assert_allclose(advantages(played, 0.9, 1.0), expected, atol=1e-9)


def test_advantages_with_lambda_0_are_one_step_errors_and_nothing_follows_an_end() -> None:
    played = trajectories([[1, 2, 4, 1], [3, 5, 0, 0]], [4, 2], [False, True])
    values = baseline(played, discounted_returns(played, 0.9))[0]
    found = advantages(played, 0.9, 0.0)[0]
    assert found[0, 0] == pytest.approx(1 + 0.9 * values[0, 1] - values[0, 0])
    assert found[0, 3] == pytest.approx(1 - values[0, 3])
    assert found[1, 1] == pytest.approx(5 - values[1, 1])
    assert (found[1, 2:] == 0).all()


def test_a_batch_has_normalised_advantages_and_weights_that_add_up_to_1() -> None:
    family = CartPoleFamily(horizon=60)
    policy = StochasticPolicy(family, (8,))
    random = np.random.default_rng(0)
    parameters = policy.initial(0, 1.0).repeat(3, 1)
    played = play(policy, family, parameters, family.sample("train", 3, random), 5, random)
    assert not played.valid.all()
    batch = make_batch(policy, played, 0.99, 1.0)
    np.testing.assert_allclose(batch.weights.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose((batch.weights * batch.advantages).sum(1), 0, atol=1e-6)
    np.testing.assert_allclose((batch.weights * batch.advantages**2).sum(1), 1, rtol=1e-4)
    assert (batch.weights > 0).numpy().tolist() == played.valid.reshape(3, -1).tolist()
    # What acted is what the parameters give for the same observations.
    again = policy.distribution(parameters, batch.observations)
    used = batch.weights > 0
    torch.testing.assert_close(again[used], batch.distribution[used])
    part = some_of(batch, 0.4)
    assert part.weights.shape == (3, 120)
    np.testing.assert_allclose(part.weights.sum(1), 1, rtol=1e-6)


def test_play_stops_counting_where_an_episode_terminates() -> None:
    family = Navigation(horizon=20)
    policy = StochasticPolicy(family, (4,))
    # Means straight to the right, hardly any noise: the goal is reached at the second step.
    parameters = torch.zeros(1, policy.size)
    parameters[0, -4] = 1.0  # the head's bias for x
    parameters[0, -2:] = -20.0  # log standard deviations
    played = play(policy, family, parameters, np.array([[0.2, 0.0]]), 2, np.random.default_rng(0))
    assert played.valid[0].sum(axis=1).tolist() == [2, 2]
    assert played.terminated[0].sum(axis=1).tolist() == [1, 1]
    assert played.terminated[0, :, 1].all()
    np.testing.assert_allclose(played.returns(), -0.01, atol=1e-6)
    assert (played.rewards[0, :, 2:] == 0).all()


def test_the_same_generator_gives_the_same_play() -> None:
    family = CartPoleFamily(horizon=15)
    policy = StochasticPolicy(family, (4,))
    tasks = family.sample("train", 2, np.random.default_rng(0))
    both = [
        play(policy, family, policy.initial(1, 1.0).repeat(2, 1), tasks, 3, np.random.default_rng(7))
        for _ in range(2)
    ]
    for one, other in zip(*both, strict=True):
        assert (one == other).all()
