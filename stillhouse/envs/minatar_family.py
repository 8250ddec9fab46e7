"""A MinAtar game as a family: a task is a way in which the game is seen, its flip and the order of its planes.

The rules, actions, sticky actions (0.1) and ramping are MinAtar's (Young & Tian 2019, https://arxiv.org/abs/1903.03176); the views are those of
``stillhouse.envs.minatar``, after the Pong soup of Rusu et al. 2016 (https://arxiv.org/abs/1606.04671). There are 4 C! members for a game of C
planes. A member is for testing where the number of its order plus the number of its flip is a multiple of 5: the game as it usually is
is one of these. Observations are the planes, flattened.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from stillhouse.envs.families import Split
from stillhouse.envs.minatar import FLIPS, MinAtarVectorEnv
from stillhouse.envs.minatar_batched import GAMES

_TEST_SHARE = 5  # one member of so many is for testing
_FLIPS = tuple(FLIPS.values())
_ACTIONS = 6


class _State(NamedTuple):
    """N x K copies.

    Attributes:
        games: all that they hold.
        planes: of the game as it usually is, bool [N K, 100 C].
        cells: where each cell that is shown is taken from, int64 [N, 1, 100 C].
    """

    games: dict[str, np.ndarray]
    planes: np.ndarray
    cells: np.ndarray


class MinAtarFamily:
    """A task is (order, flip): the number of a permutation of the planes, and of ``FLIPS``.

    Args:
        game: one of ``GAMES``.
        horizon: env steps of an episode.
    """

    name = "minatar"
    actions = _ACTIONS
    discrete = True
    splits = True

    def __init__(self, game: str = "breakout", horizon: int = 200) -> None:
        self.horizon = horizon
        self.channels = GAMES[game].channels
        self.observations = 100 * self.channels
        self._orders = math.factorial(self.channels)
        self._game = game
        self._envs: dict[int, MinAtarVectorEnv] = {}

    def members(self, split: Split) -> int | None:
        testing = sum(
            (self._orders + flip + _TEST_SHARE - 1) // _TEST_SHARE - (flip > 0) for flip in range(len(_FLIPS))
        )
        return testing if split == "test" else len(_FLIPS) * self._orders - testing

    def sample(self, split: Split, count: int, random: np.random.Generator) -> np.ndarray:
        members = self.members(split)
        assert members is not None
        found: dict[tuple[int, int], None] = {}  # different ones, as far as there are
        while len(found) < min(count, members):
            order, flip = int(random.integers(self._orders)), int(random.integers(len(_FLIPS)))
            if ((order + flip) % _TEST_SHARE == 0) == (split == "test"):
                found[order, flip] = None
        tasks = np.array(list(found), np.float64)
        return np.resize(tasks, (count, 2))

    def reset(self, tasks: np.ndarray, rollouts: int, random: np.random.Generator) -> _State:
        env = self._env(len(tasks) * rollouts)
        seeds = random.integers(2**32, size=env.num_envs)
        planes, _ = env.reset(seed=[int(seed) for seed in seeds])
        cells = np.stack([self._cells(int(order), int(flip)) for order, flip in tasks])[:, None]
        return _State(env.get_state(), planes.reshape(env.num_envs, -1), cells)

    def observe(self, state: _State) -> np.ndarray:
        planes = state.planes.reshape(len(state.cells), -1, self.observations)
        return np.take_along_axis(planes, state.cells, axis=-1).astype(np.float32)

    def step(
        self, tasks: np.ndarray, state: _State, actions: np.ndarray
    ) -> tuple[_State, np.ndarray, np.ndarray]:
        env = self._env(actions.size)
        env.set_state(state.games)
        planes, rewards, terminated, _, _ = env.step(actions.reshape(-1))
        after = _State(env.get_state(), planes.reshape(env.num_envs, -1), state.cells)
        return after, rewards.reshape(actions.shape).astype(np.float64), terminated.reshape(actions.shape)

    def oracle_return(self, tasks: np.ndarray) -> np.ndarray | None:
        return None

    def options(self, task: np.ndarray) -> dict[str, Any]:
        """The task as options of the ordinary environment."""
        return {"permute_planes": self._order(int(task[0])), "flip": tuple(FLIPS)[int(task[1])]}

    def _env(self, copies: int) -> MinAtarVectorEnv:
        if copies not in self._envs:  # what it holds is set before every use
            self._envs = {copies: MinAtarVectorEnv(copies, self._game)}
        return self._envs[copies]

    def _order(self, number: int) -> list[int]:
        """The permutation of that number, in lexicographic order."""
        left, order = list(range(self.channels)), []
        for size in range(self.channels, 0, -1):
            place, number = divmod(number, math.factorial(size - 1))
            order.append(left.pop(place))
        return order

    def _cells(self, order: int, flip: int) -> np.ndarray:
        rows, columns = _FLIPS[flip]
        plain = np.arange(self.observations).reshape(10, 10, self.channels)
        return plain[::rows, ::columns, self._order(order)].reshape(-1)
