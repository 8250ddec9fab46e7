"""The family: disjoint splits, each copy's own physics, swapped sides, features by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stillhouse import seeding
from stillhouse.envs.cartpole_family import (
    CartPoleFamily,
    CartPoleFamilyVectorEnv,
    environment,
    transition_features,
)
from stillhouse.envs.make import make_vector
from stillhouse.envs.vector import VectorEnvironment


def part_sum(family: CartPoleFamily, tasks: np.ndarray) -> np.ndarray:
    """Which of 8 parts every number lies in, added up, by another way than the module's."""
    total = np.zeros(len(tasks), int)
    for column, name in enumerate(("pole_length", "force", "gravity")):
        low, high = getattr(family, name)
        if low < high:
            edges = low * (high / low) ** (np.arange(1, 8) / 8)
            total += np.digitize(tasks[:, column], edges)
    return total


@given(seed=st.integers(0, 10**6), swapped=st.booleans(), fixed=st.booleans())
@settings(max_examples=25, deadline=None)
def test_training_and_test_tasks_are_disjoint(seed: int, swapped: bool, fixed: bool) -> None:
    family = CartPoleFamily(swapped=swapped, gravity=(9.8, 9.8) if fixed else (5.0, 15.0))
    random = seeding.generator(seed, "tasks")
    train, test = (family.sample(split, 50, random) for split in ("train", "test"))  # type: ignore[arg-type]
    assert (part_sum(family, train) % 4 != 3).all() and (part_sum(family, test) % 4 == 3).all()
    for tasks in (train, test):
        assert tasks.shape == (50, 4)
        for column, (low, high) in enumerate((family.pole_length, family.force, family.gravity)):
            assert (tasks[:, column] >= low * 0.999999).all() and (tasks[:, column] <= high * 1.000001).all()
        assert tasks[:, 3].sum() == (25 if swapped else 0)
        assert np.abs(family.scaled(tasks)).max() <= 1 + 1e-6


def test_the_same_stream_gives_the_same_tasks() -> None:
    first, second = (CartPoleFamily().sample("test", 8, seeding.generator(5, "test tasks")) for _ in range(2))
    assert np.array_equal(first, second)


def test_every_copy_has_its_own_physics_and_sides() -> None:
    tasks = np.array([[0.5, 10.0, 9.8, 0], [1.5, 3.0, 12.0, 0], [1.5, 3.0, 12.0, 1]])
    together = VectorEnvironment.over(CartPoleFamilyVectorEnv(tasks), 0, "train")
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
    np.testing.assert_allclose(velocity[1], velocity[2], rtol=0.05)


def test_features_by_hand() -> None:
    before = np.array([[2.4, 0, 0.2, 0]], np.float32)
    after = np.array([[2.42, -0.2, 0.2, 0.3 * (np.e - 1)]], np.float32)
    found = transition_features(before, np.array([0]), after)
    wanted = [[1, 0, 1, 0, -1, np.log(2), -np.log(2), 0, 1]]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert found.dtype == np.float32
    assert transition_features(before, np.array([1]), after)[0, 4] == 1


def test_bad_ranges_are_refused() -> None:
    with pytest.raises(ValidationError, match="the smaller number first"):
        CartPoleFamily(force=(3.0, 2.0))
    with pytest.raises(ValidationError, match="must vary"):
        CartPoleFamily(force=(3.0, 3.0), pole_length=(1.0, 1.0), gravity=(9.8, 9.8), swapped=True)
