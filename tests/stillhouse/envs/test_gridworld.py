"""Grid worlds: their rules, against single steps by hand and against the dense equations."""

from __future__ import annotations

import numpy as np
import pytest

from stillhouse.envs.gridworld import GridWorlds, random_grid_worlds


def small_worlds(count: int = 3) -> GridWorlds:
    return random_grid_worlds(count, seed=1, side=4, wall_chance=0.2, goal_chance=0.1)


def test_a_world_by_hand() -> None:
    # . . .      the start is in the middle, cell 4; cell 1 is a wall, cell 5 a goal
    worlds = random_grid_worlds(400, seed=0, side=3, wall_chance=0.15, goal_chance=0.15)
    chosen = np.flatnonzero(
        (worlds.walls == np.eye(9, dtype=bool)[1]).all(1) & (worlds.goals == np.eye(9, dtype=bool)[5]).all(1)
    )
    assert len(chosen)
    up, down, left, right = range(4)
    successors = worlds.successors[chosen[0]]
    assert worlds.start == 4
    assert successors[4].tolist() == [4, 7, 3, 5]  # the wall above stops it
    assert successors[0].tolist() == [0, 3, 0, 0]  # the corner's edges do too
    assert successors[8, right] == 8
    assert successors[8, left] == 7
    assert successors[6, up] == 3
    assert successors[6, down] == 6


def test_worlds_are_as_asked_for() -> None:
    worlds = random_grid_worlds(60, seed=3)
    assert worlds.walls.shape == (60, 400)
    assert worlds.start == 210
    assert not worlds.walls[:, 210].any()
    assert not worlds.goals[:, 210].any()
    assert not (worlds.walls & worlds.goals).any()
    assert worlds.walls.mean() == pytest.approx(0.2, abs=0.02)
    assert worlds.goals.mean() == pytest.approx(0.8 * 0.01, abs=0.003)
    # Walls are never entered, and a goal can always be reached.
    free = np.argwhere(~worlds.walls)
    assert not worlds.walls[free[:, :1], worlds.successors[free[:, 0], free[:, 1]]].any()
    assert (worlds.optimal_q_values(0.9)[:, worlds.start].max(axis=1) > 0).all()
    again = random_grid_worlds(60, seed=3)
    assert np.array_equal(worlds.successors, again.successors)
    assert not np.array_equal(worlds.walls, random_grid_worlds(60, seed=4).walls)


def test_steps_have_the_stated_probabilities() -> None:
    worlds = small_worlds(1)
    transitions, rewards = worlds.transitions()
    random = np.random.default_rng(0)
    count = 40_000
    for state in range(16):
        for move in range(4):
            zeros = np.zeros(count, np.int64)
            reached, reward, ended = worlds.step(zeros, zeros + state, zeros + move, random)
            shares = np.bincount(reached[~ended], minlength=16) / count
            assert np.allclose(shares, transitions[0, state, move], atol=0.012)
            assert reward.mean() == pytest.approx(rewards[0, state, move], abs=0.12)


def test_values_solve_the_bellman_equation() -> None:
    worlds = random_grid_worlds(4, seed=2, side=7)
    policy = np.random.default_rng(0).dirichlet(np.ones(4), size=(4, 49))
    transitions, rewards = worlds.transitions()
    values = worlds.values(policy, 0.9)
    expected = (policy * (rewards + 0.9 * np.einsum("gsax,gx->gsa", transitions, values))).sum(axis=2)
    assert np.allclose(values, expected, atol=1e-10)


def test_no_policy_is_better_than_the_optimal_one() -> None:
    worlds = random_grid_worlds(5, seed=2, side=7)
    q_values = worlds.optimal_q_values(0.95)
    best = worlds.values(np.eye(4)[q_values.argmax(axis=2)], 0.95)
    free = ~worlds.walls
    assert np.allclose(best[free], q_values.max(axis=2)[free], atol=1e-6)
    for seed in range(5):
        policy = np.random.default_rng(seed).dirichlet(np.ones(4), size=(5, 49))
        assert (worlds.values(policy, 0.95) <= best + 1e-9).all()


def test_some_worlds_can_be_taken() -> None:
    worlds = random_grid_worlds(5, seed=2, side=5)
    taken = worlds.take(slice(2, 4))
    assert len(taken) == 2
    assert np.array_equal(taken.walls, worlds.walls[2:4])
