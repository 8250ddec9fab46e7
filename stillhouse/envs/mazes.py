"""Sparse mazes of ours, as planes or as a picture: one environment, plainly written, and a vector of copies.

Corridors one cell wide, carved by a random depth-first walk, with walls around; some of the inner walls may be opened, which
makes loops. The agent steps up, down, left or right; a wall stops it. Reaching the goal pays 1 and terminates; nothing else
pays or costs anything, and a time limit truncates. An episode is its layout, its start and its goal, all drawn from its
seed: the same in :class:`MazeEnv` and in :class:`MazeVectorEnv`, which the tests play side by side.

Legend: B copies, K of them, L layouts, N cells a side; cells are counted row by row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from stillhouse import seeding
from stillhouse.envs.minatar_batched import RandomStreams

ACTIONS = ("up", "down", "left", "right")
PLANES = ("wall", "agent", "goal")

_MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
_FLOOR, _WALL, _GOAL, _AGENT = range(4)
_COLOURS = np.array([(230, 230, 230), (40, 40, 40), (210, 60, 50), (40, 90, 200)], np.uint8)


@lru_cache(maxsize=16)
def layouts(size: int, first_seed: int, count: int, loops: float) -> np.ndarray:
    """Walls of ``count`` mazes, bool [L, N, N], read-only; maze i depends on ``first_seed + i``, ``size`` and ``loops`` alone.

    All have the same number of free cells. Two rooms (cells of odd row and column) are joined by exactly one way; then a
    share ``loops`` of the walls that still stand between neighbouring rooms is opened.
    """
    walls = np.stack([_layout(size, first_seed + number, loops) for number in range(count)])
    walls.flags.writeable = False
    return walls


def _layout(size: int, seed: int, loops: float) -> np.ndarray:
    random = seeding.generator(seed, "maze", size)
    walls = np.ones((size, size), np.bool_)
    path = [(1, 1)]
    walls[1, 1] = False
    while path:
        row, column = path[-1]
        rooms = [
            (row + 2 * down, column + 2 * right)
            for down, right in _MOVES
            if 0 < row + 2 * down < size and 0 < column + 2 * right < size
        ]
        rooms = [room for room in rooms if walls[room]]
        if not rooms:
            path.pop()
            continue
        room = rooms[int(random.integers(len(rooms)))]
        walls[room] = walls[(row + room[0]) // 2, (column + room[1]) // 2] = False
        path.append(room)
    between = np.add.outer(np.arange(size), np.arange(size)) % 2 == 1  # one of row and column is odd
    between[[0, -1]] = between[:, [0, -1]] = False
    standing = np.flatnonzero(between & walls)
    walls.reshape(-1)[random.permutation(standing)[: round(loops * len(standing))]] = False
    return walls


class _Rules:
    """What every copy shares: layouts, options and spaces.

    Raises:
        ValueError: an option that is not allowed, in one line.
    """

    def __init__(
        self,
        size: int,
        layouts_count: int,
        layout_seed: int,
        loops: float,
        random_start: bool,
        random_goal: bool,
        view: int,
        pixels: int,
    ) -> None:
        def whole(name: str, value: Any, lowest: int, highest: int, odd: bool = False) -> None:
            if type(value) is not int or not lowest <= value <= highest or (odd and value % 2 == 0):
                kind = "an odd whole number" if odd else "a whole number"
                raise ValueError(f"{name} must be {kind} in {lowest}..{highest}, not {value!r}")

        whole("size", size, 5, 31, odd=True)
        whole("layouts", layouts_count, 1, 10_000)
        whole("layout_seed", layout_seed, 0, 2**31)
        if isinstance(loops, bool) or not isinstance(loops, int | float) or not 0 <= loops <= 1:
            raise ValueError(f"loops must be a number in 0..1, not {loops!r}")
        for name, flag in (("random_start", random_start), ("random_goal", random_goal)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} must be true or false, not {flag!r}")
        if view != 0 or type(view) is not int:
            whole("view, where it is not 0 (the whole maze),", view, 3, 31, odd=True)
        whole("pixels", pixels, 0, 16)
        self.size = size
        self.random_start = random_start
        self.random_goal = random_goal
        self.view = view
        self.pixels = pixels
        self.walls = layouts(size, layout_seed, layouts_count, float(loops))
        flat = self.walls.reshape(layouts_count, -1)
        self.free = np.nonzero(~flat)[1].reshape(layouts_count, -1)  # cells, [L, F]
        side = (view or size) * max(1, pixels)
        highest, dtype = (255, np.uint8) if pixels else (1, np.bool_)
        self.observation_space = gymnasium.spaces.Box(0, highest, (side, side, 3), dtype)
        self.action_space = gymnasium.spaces.Discrete(len(ACTIONS))

    def episodes(self, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Layouts, starts and goals (cells) of K episodes, int64 [K] each, from ``uniforms`` in [0, 1), [K, 3].

        Without a random start it is the first free cell, without a random goal the goal is the last; start and goal differ.
        """
        count, free = self.free.shape
        layout = (uniforms[:, 0] * count).astype(np.int64)
        starts = free - (not self.random_goal)
        start = (uniforms[:, 1] * starts).astype(np.int64) if self.random_start else np.zeros_like(layout)
        if self.random_goal:
            goal = (uniforms[:, 2] * (free - 1)).astype(np.int64)
            goal += goal >= start
        else:
            goal = np.full_like(layout, free - 1)
        return layout, self.free[layout, start], self.free[layout, goal]


class MazeEnv(gymnasium.Env[np.ndarray, np.int64]):
    """One maze; observations bool [N, N, 3] or uint8 [N * pixels, N * pixels, 3], of a window where there is a ``view``."""

    metadata = {
        "render_modes": ["rgb_array"],
        "render_fps": 10,
        "observation_names": list(PLANES),
        "action_names": list(ACTIONS),
    }
    walls: np.ndarray  # bool [N, N]
    agent: tuple[int, int]  # row and column
    goal: tuple[int, int]

    def __init__(
        self,
        render_mode: str | None = None,
        size: int = 11,
        layouts: int = 1,
        layout_seed: int = 0,
        loops: float = 0.0,
        random_start: bool = True,
        random_goal: bool = True,
        view: int = 0,
        pixels: int = 0,
    ) -> None:
        self.render_mode = render_mode
        self._rules = _Rules(size, layouts, layout_seed, loops, random_start, random_goal, view, pixels)
        self.observation_space = self._rules.observation_space
        self.action_space = self._rules.action_space
        if pixels:
            self.metadata = {**self.metadata, "observation_names": ["red", "green", "blue"]}
        self._random = RandomStreams(1)
        self._random.seed(np.arange(1), np.random.default_rng().integers(2**32, size=1))
        self._begin()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self._random.seed(np.arange(1), np.array([seed]))
        self._begin()
        return self._observe(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = 0.0
        if self.agent != self.goal:
            down, right = _MOVES[int(action)]
            ahead = (self.agent[0] + down, self.agent[1] + right)
            if not self.walls[ahead]:
                self.agent = ahead
            reward = float(self.agent == self.goal)
        return self._observe(), reward, self.agent == self.goal, False, {}

    def _begin(self) -> None:
        (layout,), (start,), (goal,) = self._rules.episodes(self._random.draw(slice(None), 3))
        self.walls = self._rules.walls[layout]
        self.agent = divmod(int(start), self._rules.size)
        self.goal = divmod(int(goal), self._rules.size)

    def _observe(self) -> np.ndarray:
        planes, (row, column) = self._planes(), self.agent
        view, pixels = self._rules.view, self._rules.pixels
        if view:
            reach = view // 2
            planes = np.pad(planes, ((reach, reach), (reach, reach), (0, 0)))
            planes[..., 0] = np.pad(self.walls, reach, constant_values=True)
            planes = planes[row : row + view, column : column + view]
        return _picture(planes).repeat(pixels, axis=0).repeat(pixels, axis=1) if pixels else planes

    def _planes(self) -> np.ndarray:
        planes = np.zeros((*self.walls.shape, len(PLANES)), np.bool_)
        planes[..., 0] = self.walls
        planes[(*self.agent, 1)] = True
        planes[(*self.goal, 2)] = True
        return planes

    def render(self) -> np.ndarray | None:
        """The whole maze, a pixel a cell, uint8 [N, N, 3]."""
        return None if self.render_mode is None else _picture(self._planes())


def _picture(planes: np.ndarray) -> np.ndarray:
    """Planes bool [H, W, 3] in colours, uint8 [H, W, 3]; the agent hides the goal."""
    colours = np.tile(_COLOURS[_FLOOR], (*planes.shape[:2], 1))
    for plane, colour in ((0, _WALL), (2, _GOAL), (1, _AGENT)):
        colours[planes[..., plane]] = _COLOURS[colour]
    return colours


class MazeVectorEnv(gymnasium.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """``num_envs`` copies, stepped together by array operations.

    The copies are reset by the caller (autoreset ``DISABLED``; ``options["reset_mask"]`` and a seed per copy). An episode
    depends on its seed alone: not on its copy, nor on how many there are. What is returned is never written to again.
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int | None = None,
        size: int = 11,
        layouts: int = 1,
        layout_seed: int = 0,
        loops: float = 0.0,
        random_start: bool = True,
        random_goal: bool = True,
        view: int = 0,
        pixels: int = 0,
    ) -> None:
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self._rules = _Rules(size, layouts, layout_seed, loops, random_start, random_goal, view, pixels)
        self.single_observation_space = self._rules.observation_space
        self.single_action_space = self._rules.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.random = RandomStreams(num_envs)
        # Walls around the walls, so that a window never leaves the array; cells are counted in it.
        reach = view // 2
        self._width = size + 2 * reach
        padded = np.pad(self._rules.walls, ((0, 0), (reach, reach), (reach, reach)), constant_values=True)
        self._walls = padded.reshape(-1)
        self._reach = reach
        self._ahead = np.array([down * self._width + right for down, right in _MOVES])
        side = view or size
        first = -reach if view else 0
        self._window = (
            np.arange(first, first + side)[:, None] * self._width + np.arange(first, first + side)
        ).reshape(-1)  # cells seen, counted from the agent's where there is a view
        self._side = side
        self._maze = np.zeros(num_envs, np.int64)  # where its layout begins in ``_walls``
        self._agent = np.zeros(num_envs, np.int64)
        self._goal = np.zeros(num_envs, np.int64)
        self._steps = np.zeros(num_envs, np.int64)
        self._arrays = {
            "random": self.random.counters,
            "maze": self._maze,
            "agent": self._agent,
            "goal": self._goal,
            "steps": self._steps,
        }
        everyone = np.arange(num_envs)
        self.random.seed(everyone, np.random.default_rng().integers(2**32, size=num_envs))
        self._begin(everyone)
        self._observations = self._show(everyone)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        mask = (options or {}).get("reset_mask")
        rows = np.arange(self.num_envs) if mask is None else np.flatnonzero(mask)
        if isinstance(seed, int):
            self.random.seed(rows, seed + rows)
        elif seed is not None:
            seeded = np.array([row for row in rows if seed[row] is not None], np.int64)
            self.random.seed(seeded, np.array([seed[row] for row in seeded], np.int64))
        self._begin(rows)
        observations = self._observations.copy()
        observations[rows] = self._show(rows)
        self._observations = observations
        return observations, {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        searching = self._agent != self._goal  # who has arrived stands still until it is reset
        ahead = self._agent + self._ahead[actions]
        np.copyto(self._agent, ahead, where=searching & ~self._walls[self._maze + ahead])
        self._steps += 1
        terminated = self._agent == self._goal
        if self.max_episode_steps is None:
            truncated = np.zeros(self.num_envs, np.bool_)
        else:
            truncated = self._steps >= self.max_episode_steps
        self._observations = self._show(slice(None))
        return self._observations, (terminated & searching).astype(np.float32), terminated, truncated, {}

    def _begin(self, rows: np.ndarray) -> None:
        layout, start, goal = self._rules.episodes(self.random.draw(rows, 3))
        self._maze[rows] = layout * self._width**2
        for places, cells in ((self._agent, start), (self._goal, goal)):
            row, column = np.divmod(cells, self._rules.size)
            places[rows] = (row + self._reach) * self._width + column + self._reach
        self._steps[rows] = 0

    def _show(self, rows: np.ndarray | slice) -> np.ndarray:
        agent, goal = self._agent[rows, None], self._goal[rows, None]
        cells = self._window + agent * bool(self._rules.view)  # [K, cells seen]
        walls = self._walls[self._maze[rows, None] + cells]
        shape, pixels = (-1, self._side, self._side, 3), self._rules.pixels
        if not pixels:
            return np.stack([walls, cells == agent, cells == goal], axis=2).reshape(shape)
        colours = np.where(cells == goal, _GOAL, walls * np.uint8(_WALL))
        colours[cells == agent] = _AGENT
        return _COLOURS[colours].reshape(shape).repeat(pixels, axis=1).repeat(pixels, axis=2)

    def get_state(self) -> dict[str, Any]:
        """Everything the copies hold: exact continuation without replaying."""
        return {name: value.copy() for name, value in self._arrays.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        for name, value in self._arrays.items():
            value[...] = state[name]
        self._observations = self._show(slice(None))
