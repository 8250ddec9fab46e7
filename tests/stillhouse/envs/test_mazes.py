"""Sparse mazes: the vector against the plain environment, layouts, rewards and ends, resume, refusals."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from stillhouse.envs.make import EnvironmentConfig, make, make_vector
from stillhouse.envs.mazes import ACTIONS, PLANES, MazeEnv, MazeVectorEnv, layouts
from stillhouse.envs.names import action_names, component_names
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError

UP, DOWN, LEFT, RIGHT = range(4)


def config(max_episode_steps: int = 0, **options: Any) -> EnvironmentConfig:
    return EnvironmentConfig(id="stillhouse/Maze-v0", options=options, max_episode_steps=max_episode_steps)


def reachable(walls: np.ndarray) -> np.ndarray:
    """bool [N, N]: what can be walked to from (1, 1)."""
    seen = np.zeros_like(walls)
    seen[1, 1] = True
    while True:
        grown = seen.copy()
        grown[1:] |= seen[:-1]
        grown[:-1] |= seen[1:]
        grown[:, 1:] |= seen[:, :-1]
        grown[:, :-1] |= seen[:, 1:]
        grown &= ~walls
        if (grown == seen).all():
            return seen
        seen = grown


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": 5, "layouts": 3, "layout_seed": 7},
        {"size": 9, "layouts": 50, "loops": 0.3, "random_start": False},
        {"size": 7, "loops": 1.0, "random_goal": False},
        {"size": 7, "random_start": False, "random_goal": False},
        {"size": 9, "layouts": 4, "view": 5},
        {"size": 5, "view": 11},
        {"size": 5, "pixels": 3},
        {"size": 7, "view": 3, "pixels": 2, "layouts": 2},
    ],
)
def test_the_vector_plays_as_the_plain_environment(options: dict[str, Any]) -> None:
    copies, steps = 6, 300
    vector = make_vector(config(40, **options), copies)
    singles = [make(config(40, **options)) for _ in range(copies)]
    random = np.random.default_rng(0)
    seeds = [int(seed) for seed in random.integers(2**31, size=copies)]
    shown, _ = vector.reset(seed=seeds, options={"reset_mask": np.ones(copies, np.bool_)})  # type: ignore[arg-type]
    plain = [single.reset(seed=seed)[0] for single, seed in zip(singles, seeds, strict=True)]
    ends = np.zeros(2, np.int64)
    for _ in range(steps):
        np.testing.assert_array_equal(shown, plain)
        assert shown.dtype == singles[0].observation_space.dtype and shown[0] in singles[0].observation_space
        actions = random.integers(4, size=copies)
        shown, rewards, terminated, truncated, _ = vector.step(actions)
        played = [single.step(action) for single, action in zip(singles, actions, strict=True)]
        plain = [step[0] for step in played]
        np.testing.assert_array_equal(shown, plain)
        for given, place in ((rewards, 1), (terminated, 2), (truncated, 3)):
            np.testing.assert_array_equal(given, [step[place] for step in played])
        ended = terminated | truncated
        ends += terminated.sum(), (truncated & ~terminated).sum()
        if ended.any():
            for row in np.flatnonzero(ended):
                seeds[row] = int(random.integers(2**31))
                plain[row] = singles[row].reset(seed=seeds[row])[0]
            shown, _ = vector.reset(seed=seeds, options={"reset_mask": ended})  # type: ignore[arg-type]
    assert ends.min() > 0


def test_a_perfect_maze_reaches_every_room_by_one_way() -> None:
    for size in (5, 11, 19):
        walls = layouts(size, 3, 20, 0.0)
        rooms = (size // 2) ** 2
        for maze in walls:
            assert maze[[0, -1]].all() and maze[:, [0, -1]].all() and not maze[1::2, 1::2].any()
            assert (reachable(maze) == ~maze).all()
            assert (~maze).sum() == 2 * rooms - 1  # a tree: a passage less than there are rooms
    assert len({maze.tobytes() for maze in layouts(11, 0, 50, 0.0)}) == 50


def test_loops_open_a_share_of_the_walls_between_rooms() -> None:
    perfect = (~layouts(11, 0, 10, 0.0)).sum(axis=(1, 2))
    for share, opened in ((0.0, 0), (0.25, 4), (0.5, 8), (1.0, 16)):  # of 2 * 5 * 4 - 24 = 16 that stand
        walls = layouts(11, 0, 10, share)
        np.testing.assert_array_equal((~walls).sum(axis=(1, 2)), perfect + opened)
        assert all((reachable(maze) == ~maze).all() for maze in walls)
        assert walls[:, 2:-1:2, 2:-1:2].all()  # the posts between four rooms stay


def test_a_layout_depends_on_its_seed_alone_and_is_never_written_to() -> None:
    many = layouts(9, 10, 5, 0.2)
    np.testing.assert_array_equal(layouts(9, 13, 1, 0.2)[0], many[3])
    with pytest.raises(ValueError, match="read-only"):
        many[0, 0, 0] = False


def episodes(**options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Observations, starts and goals (row, column) of 2,000 episodes."""
    shown, _ = make_vector(config(**options), 2000).reset(seed=0)
    return shown, np.argwhere(shown[..., 1])[:, 1:], np.argwhere(shown[..., 2])[:, 1:]


def test_starts_and_goals() -> None:
    shown, starts, goals = episodes(size=9, layouts=4)
    assert len(starts) == len(goals) == 2000 and (starts != goals).any(axis=1).all()
    assert not (shown[..., 0] & (shown[..., 1] | shown[..., 2])).any()
    mazes, counts = np.unique(shown[..., 0].reshape(2000, -1), axis=0, return_counts=True)
    assert len(mazes) == 4 and counts.min() > 400
    of_one = (shown[..., 0] == shown[0, ..., 0]).all(axis=(1, 2))
    for places in (starts, goals):  # 31 free cells, about 16 episodes each
        cells, counts = np.unique(places[of_one], axis=0, return_counts=True)
        assert len(cells) == 31 and counts.min() > 3
    _, starts, goals = episodes(size=7, random_start=False)
    assert (starts == 1).all() and len(np.unique(goals, axis=0)) == 16
    _, starts, goals = episodes(size=7, random_goal=False)
    assert (goals == 5).all() and len(np.unique(starts, axis=0)) == 16


def walk(env: gymnasium.Env[Any, Any], actions: list[int]) -> list[tuple[float, bool, bool]]:
    return [tuple(env.step(action)[1:4]) for action in actions]  # type: ignore[misc]


def test_the_goal_alone_pays_and_terminates_and_the_limit_truncates() -> None:
    # The maze (1,1) - (1,3) - (3,3) - (3,1), rooms by row and column: nothing opens between (1,1) and (3,1).
    seed = next(
        seed
        for seed in range(100)
        if (~layouts(5, seed, 1, 0.0)[0])[[1, 2, 3, 2], [2, 3, 2, 1]].tolist() == [True, True, True, False]
    )
    options = {"size": 5, "layout_seed": seed, "random_start": False, "random_goal": False}
    env = make(config(10, **options))
    env.reset(seed=0)
    nothing = (0.0, False, False)
    assert walk(env, [UP, LEFT, RIGHT, RIGHT, RIGHT, DOWN]) == [nothing] * 6
    assert walk(env, [DOWN]) == [(1.0, True, False)]
    env.reset()
    assert walk(env, [UP] * 10) == [nothing] * 9 + [(0.0, False, True)]
    # Arriving with the last step is an end of the environment's own, for whoever keeps the two apart.
    envs = VectorEnvironment(config(4, **options), 1, 0, "train")
    envs.reset()
    for action in (RIGHT, RIGHT, DOWN):
        assert not len(envs.step(np.array([action])).ended)
    step = envs.step(np.array([DOWN]))
    assert step.terminated[0] and not step.truncated[0] and step.rewards[0] == 1
    assert step.final_observations[0, 3, 3].tolist() == [False, True, True]
    assert step.observations[0, 1, 1].tolist() == [False, True, False]


def test_who_has_arrived_stands_still_until_it_is_reset() -> None:
    vector = MazeVectorEnv(4, size=5)
    vector.reset(seed=0)
    random = np.random.default_rng(0)
    paid = np.zeros(4)
    for _ in range(300):
        shown, rewards, terminated, _, _ = vector.step(random.integers(4, size=4))
        paid += rewards
    assert terminated.all() and (paid == 1).all()
    assert (shown[..., 1] == shown[..., 2]).all()


def test_the_default_time_limit_is_200_steps_for_one_and_for_many() -> None:
    single, vector = make(config(size=19)), make_vector(config(size=19), 1)
    single.reset(seed=0)
    vector.reset(seed=0)
    assert not any(single.step(np.int64(UP))[3] or vector.step(np.array([UP]))[3][0] for _ in range(199))
    assert single.step(np.int64(UP))[3] and vector.step(np.array([UP]))[3][0]


def test_an_episode_depends_on_its_seed_alone() -> None:
    many, _ = MazeVectorEnv(8, layouts=30).reset(seed=list(range(8)))  # type: ignore[arg-type]
    few, _ = MazeVectorEnv(2, layouts=30).reset(seed=[5, 3])  # type: ignore[arg-type]
    np.testing.assert_array_equal(few, many[[5, 3]])


def test_a_window_shows_walls_where_the_maze_ends() -> None:
    env = MazeEnv(size=5, view=7, random_start=False, random_goal=False)
    shown, _ = env.reset(seed=0)
    assert shown.shape == (7, 7, 3) and shown[3, 3].tolist() == [False, True, False]
    whole = np.ones((7, 7), np.bool_)  # the agent, at (1, 1), in the middle
    whole[2:, 2:] = env.walls
    np.testing.assert_array_equal(shown[..., 0], whole)
    assert np.argwhere(shown[..., 2]).tolist() == [[5, 5]]
    hidden, _ = MazeEnv(size=5, view=3, random_start=False, random_goal=False).reset(seed=0)
    assert not hidden[..., 2].any()


def test_a_picture_is_the_planes_in_colours() -> None:
    options = {"size": 9, "random_start": False, "random_goal": False, "layout_seed": 2}
    env = make(config(**options, pixels=4), render_mode="rgb_array")
    picture, _ = env.reset(seed=0)
    planes, _ = make(config(**options)).reset(seed=0)
    assert picture.shape == (36, 36, 3) and picture.dtype == np.uint8
    cells = picture[::4, ::4]
    np.testing.assert_array_equal(picture, np.kron(cells, np.ones((4, 4, 1), np.uint8)))
    assert len(np.unique(cells.reshape(-1, 3), axis=0)) == 4  # floor, wall, goal, agent
    for plane in range(3):
        shown = cells[planes[..., plane]]
        assert (shown == shown[0]).all()
    np.testing.assert_array_equal(env.render(), cells)


def test_a_saved_state_continues_to_the_same_bytes() -> None:
    options = {"size": 7, "layouts": 20, "view": 5}
    one, other = (VectorEnvironment(config(30, **options), 5, 3, "train") for _ in range(2))
    random = np.random.default_rng(0)
    one.reset()
    for _ in range(70):
        one.step(random.integers(4, size=5))
    np.testing.assert_array_equal(other.set_state(one.get_state()), one._observations)
    assert not other.cut_episodes
    for _ in range(100):
        actions = random.integers(4, size=5)
        first, second = one.step(actions), other.step(actions)
        for name, value in vars(first).items():
            np.testing.assert_array_equal(value, getattr(second, name), err_msg=name)


def test_names() -> None:
    assert component_names(config()) == list(PLANES)
    assert component_names(config(view=5)) == list(PLANES)
    assert component_names(config(pixels=4)) == ["red", "green", "blue"]
    assert action_names(config()) == list(ACTIONS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 10}, "size must be an odd whole number in 5..31, not 10"),
        ({"size": 3}, "size must be an odd whole number in 5..31, not 3"),
        ({"size": 11.0}, "size must be an odd whole number in 5..31, not 11.0"),
        ({"layouts": 0}, r"layouts must be a whole number in 1..10000, not 0"),
        ({"layout_seed": -1}, "layout_seed must be a whole number in 0..2147483648, not -1"),
        ({"loops": 1.5}, "loops must be a number in 0..1, not 1.5"),
        ({"loops": True}, "loops must be a number in 0..1, not True"),
        ({"random_goal": 1}, "random_goal must be true or false, not 1"),
        (
            {"view": 4},
            r"view, where it is not 0 \(the whole maze\), must be an odd whole number in 3..31, not 4",
        ),
        ({"view": False}, "view, where it is not 0 .* not False"),
        ({"pixels": 17}, "pixels must be a whole number in 0..16, not 17"),
        ({"walls": 3}, "unexpected keyword argument 'walls'"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    for made in (make, lambda given: make_vector(given, 2)):
        with pytest.raises(StillhouseError, match=said) as error:
            made(config(**options))
        assert "\n" not in str(error.value)
