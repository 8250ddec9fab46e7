"""Families of environments: splits that cannot meet, and copies that step together as one would alone."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from stillhouse.config import parse
from stillhouse.envs.families import FamilyConfig, Split, for_testing, make_family, sample_box
from stillhouse.envs.navigation import Navigation, NavigationDistance
from stillhouse.envs.physics import AcrobotFamily, CartPoleFamily
from stillhouse.envs.variants import AcrobotPhysicsEnv, CartPolePhysicsEnv
from stillhouse.errors import StillhouseError

SPLIT = [Navigation(), CartPoleFamily(), CartPoleFamily(swapped=True), AcrobotFamily()]


def in_its_box(family: object, tasks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tasks as points of the box that is cut into cells, and its ends."""
    if isinstance(family, CartPoleFamily | AcrobotFamily):
        low, high = np.log(np.array(list(family.ranges.values()))).T
        return np.log(tasks[:, : len(low)]), low, high
    return tasks, np.full(2, -0.5), np.full(2, 0.5)


@pytest.mark.parametrize("family", SPLIT, ids=lambda family: family.name)
@pytest.mark.parametrize("split", ["train", "test"])
def test_tasks_lie_in_their_splits_cells_only(family: Navigation, split: Split) -> None:
    tasks = family.sample(split, 500, np.random.default_rng(0))
    assert len(tasks) == 500
    tasks, low, high = in_its_box(family, tasks)
    assert ((tasks >= low - 1e-12) & (tasks <= high + 1e-12)).all()
    assert (for_testing(tasks, low, high) == (split == "test")).all()
    # Both reach all over the box.
    assert (tasks.min(axis=0) < low + 0.15 * (high - low)).all()
    assert (tasks.max(axis=0) > high - 0.15 * (high - low)).all()


def test_the_cells_of_the_square_by_hand() -> None:
    low, high = np.full(2, -0.5), np.full(2, 0.5)
    centres = np.array([[-0.45, -0.45], [-0.35, -0.35], [-0.35, -0.25], [0.45, 0.45]])
    # Cells (0, 0): 0; (1, 1): 3; (1, 2): 5; (9, 9): 27.
    assert for_testing(centres, low, high).tolist() == [True, False, True, False]


@pytest.mark.parametrize("dimension", [1, 2, 3, 4])
def test_a_fifth_of_the_cells_is_for_testing_whatever_the_dimension(dimension: int) -> None:
    low, high = np.zeros(dimension), np.ones(dimension)
    axes = np.meshgrid(*[(np.arange(10) + 0.5) / 10] * dimension, indexing="ij")
    cells = np.stack([axis.reshape(-1) for axis in axes], axis=1)
    found = for_testing(cells, low, high)
    assert found.mean() == 0.2
    for axis in range(dimension):  # and of every slice
        for at in (0.05, 0.95):
            if dimension > 1:
                assert found[np.isclose(cells[:, axis], at)].mean() == 0.2


def test_an_axis_without_extent_takes_no_part_in_the_split() -> None:
    low, high = np.array([1.0, 0.0]), np.array([1.0, 1.0])
    random = np.random.default_rng(1)
    train, test = (sample_box(split, 100, low, high, random) for split in ("train", "test"))
    assert (train[:, 0] == 1).all()
    assert not set(np.floor(train[:, 1] * 10)) & set(np.floor(test[:, 1] * 10))


@pytest.mark.parametrize("swapped", [False, True])
def test_half_of_the_tasks_have_swapped_sides_where_that_is_asked_for(swapped: bool) -> None:
    family = CartPoleFamily(swapped=swapped)
    random = np.random.default_rng(0)
    assert family.sample("test", 10, random)[:, 4].sum() == 5 * swapped
    alone = {float(family.sample("train", 1, random)[0, 4]) for _ in range(20)}
    assert alone == ({0.0, 1.0} if swapped else {0.0})


def test_a_critic_sees_tasks_from_minus_one_to_one() -> None:
    family = CartPoleFamily(ranges={"gravity": (9.8, 9.8), "force": (1.0, 100.0)}, swapped=True)
    tasks = np.array([[0.2, 9.8, 10.0, 1.0, 0], [1.5, 9.8, 100.0, 0.05, 1]])
    np.testing.assert_allclose(family.scaled(tasks), [[-1, 0, 0, 1, -1], [1, 0, 1, -1, 1]], atol=1e-6)


def test_sampling_depends_on_the_generator_alone() -> None:
    one, two = (Navigation().sample("train", 5, np.random.default_rng(3)) for _ in range(2))
    assert (one == two).all()


def test_navigation_by_hand() -> None:
    family = Navigation()
    tasks = np.array([[0.1, 0.0], [0.3, -0.4]])
    state = family.reset(tasks, 2, np.random.default_rng(0))
    assert (state == 0).all()
    actions = np.array([[[1.0, 0.0], [5.0, 0.5]], [[-3.0, 0.0], [0.5, -1.0]]])
    after, rewards, terminated = family.step(tasks, state, actions)
    assert (state == 0).all()
    np.testing.assert_allclose(after[0], [[0.1, 0], [0.1, 0.05]])  # the larger action is clipped
    np.testing.assert_allclose(rewards, [[0, -(0.05**2)], [-(0.4**2 + 0.4**2), -(0.25**2 + 0.3**2)]])
    assert terminated.tolist() == [[True, False], [False, False]]
    distances = NavigationDistance().step(tasks, state, actions)[1]
    np.testing.assert_allclose(distances, -np.sqrt(-rewards))


def test_the_oracle_of_navigation_walks_straight() -> None:
    tasks = np.array([[0.25, 0.0], [0.05, -0.2]])
    # The first is 0.15 and 0.05 away after its first two moves; the second halfway after one.
    np.testing.assert_allclose(
        Navigation().oracle_return(tasks), [-(0.15**2 + 0.05**2), -(0.025**2 + 0.1**2)]
    )
    np.testing.assert_allclose(NavigationDistance().oracle_return(tasks), [-0.2, -math.hypot(0.025, 0.1)])


def naive_cartpole(task: np.ndarray) -> CartPolePhysicsEnv:
    return CartPolePhysicsEnv(
        **dict(zip(("pole_length", "gravity", "force", "pole_mass"), task[:4], strict=True))
    )


def naive_acrobot(task: np.ndarray) -> AcrobotPhysicsEnv:
    return AcrobotPhysicsEnv(**dict(zip(("mass_1", "mass_2", "length_1"), task, strict=True)))


@pytest.mark.parametrize(
    ("family", "naive"), [(CartPoleFamily(), naive_cartpole), (AcrobotFamily(), naive_acrobot)]
)
def test_copies_step_as_gymnasiums_environment_does_alone(family: CartPoleFamily, naive: object) -> None:
    random = np.random.default_rng(5)
    tasks = family.sample("train", 3, random)
    state = family.reset(tasks, 2, random)
    single = [[naive(task) for _ in range(2)] for task in tasks]  # type: ignore[operator]
    for n in range(3):
        for k in range(2):
            single[n][k].reset(seed=0)
            single[n][k].state = state[n, k].copy()
    alive = np.ones((3, 2), dtype=bool)
    for _ in range(60):
        actions = random.integers(family.actions, size=(3, 2))
        state, rewards, terminated = family.step(tasks, state, actions)
        observed = family.observe(state)
        for n, k in zip(*np.nonzero(alive), strict=True):
            expected, reward, ended, _, _ = single[n][k].step(int(actions[n, k]))
            np.testing.assert_allclose(observed[n, k], expected, rtol=1e-5, atol=1e-6)
            assert (rewards[n, k], terminated[n, k]) == (reward, ended)
        alive &= ~terminated
    assert alive.all() if family.name == "acrobot" else not alive.all()


def test_a_copy_that_is_stepped_on_after_its_end_stays_finite() -> None:
    family = CartPoleFamily()
    tasks = family.sample("train", 2, np.random.default_rng(0))
    state = family.reset(tasks, 1, np.random.default_rng(0))
    for _ in range(3000):
        state, _, _ = family.step(tasks, state, np.ones((2, 1), dtype=np.int64))
    assert np.isfinite(state).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "navigation", "ranges": {"gravity": (1, 2)}}, "navigation has no physical constants"),
        (
            {"name": "cartpole", "ranges": {"colour": (1, 2)}},
            "cartpole has no 'colour'; allowed are pole_length",
        ),
        (
            {"name": "cartpole", "ranges": {"gravity": (0, 2)}},
            "0 to 2 was given; values from 0.01 to 1000 are allowed",
        ),
        ({"name": "acrobot", "ranges": {"mass_1": (2, 1)}}, "the least not above the largest"),
        ({"name": "acrobot", "ranges": {"mass_1": (1, 1e300)}}, "1 to 1e+300 was given; values from 0.01"),
        (
            {"name": "acrobot", "ranges": {"mass_1": (1, 1), "mass_2": (1, 1), "length_1": (1, 1)}},
            "one member only",
        ),
        ({"name": "acrobot", "swapped": True}, "acrobot has no sides to swap"),
        ({"name": "pendulum"}, "name: Input should be 'navigation'"),
        ({"name": "cartpole", "horizon": 0}, "horizon: Input should be greater than or equal to 1"),
    ],
)
def test_a_mistake_is_one_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(StillhouseError) as error:
        make_family(parse(FamilyConfig, settings))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_mujoco_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(StillhouseError, match=r"pip install 'stillhouse\[mujoco\]'"):
        make_family(FamilyConfig(name="cheetah_direction"))


def test_the_horizon_and_ranges_can_be_set() -> None:
    family = make_family(FamilyConfig(name="cartpole", horizon=7, ranges={"gravity": (9.8, 9.8)}))
    assert family.horizon == 7
    assert (family.sample("test", 4, np.random.default_rng(0))[:, 1] == 9.8).all()
    assert family.members("test") is None
