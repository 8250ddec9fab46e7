"""Random grid worlds, many at once, as arrays: what the tabular studies run on.

After Czarnecki et al. 2019 (https://arxiv.org/abs/1902.02186, appendix): a square grid, the start in its middle; four moves;
walls, and the edge, stop a move; a move is replaced by a uniformly random one with probability ``noise``; some cells end
the episode with a reward; after any step the episode ends for no reason with probability ``end_chance``. The paper's
probabilities of walls and rewards are not known; those here are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_banded

from stillhouse import seeding

MOVES = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])  # up, down, left, right as (row, column)


@dataclass(frozen=True)
class GridWorlds:
    """G worlds of ``side * side`` cells, numbered row by row: S states.

    Attributes:
        walls: bool [G, S].
        goals: bool [G, S], cells that end the episode with ``reward``.
        successors: int64 [G, S, 4], where each move leads without noise.
        side: cells in a row.
        noise: probability that the move is replaced by a random one.
        end_chance: probability that a step ends the episode, whatever the move.
        reward: of reaching a goal.
    """

    walls: np.ndarray
    goals: np.ndarray
    successors: np.ndarray
    side: int
    noise: float
    end_chance: float
    reward: float

    def __len__(self) -> int:
        return len(self.walls)

    @property
    def start(self) -> int:
        """The state in the middle, where every episode starts."""
        return (self.side // 2) * (self.side + 1)

    def take(self, worlds: np.ndarray | slice) -> GridWorlds:
        """Some of the worlds."""
        return GridWorlds(
            self.walls[worlds],
            self.goals[worlds],
            self.successors[worlds],
            self.side,
            self.noise,
            self.end_chance,
            self.reward,
        )

    def step(
        self, worlds: np.ndarray, states: np.ndarray, moves: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One step of R agents.

        Args:
            worlds: which world each is in, int [R].
            states: where, int [R].
            moves: 0..3, int [R].
            random: three numbers per agent are drawn from it.

        Returns:
            States reached [R], rewards [R] and whether the episode ended [R]; an agent whose episode ended is not put back.
        """
        count = len(states)
        noisy = random.random(count) < self.noise
        moves = np.where(noisy, random.integers(4, size=count), moves)
        reached = self.successors[worlds, states, moves]
        stopped = random.random(count) < self.end_chance
        at_goal = self.goals[worlds, reached] & ~stopped
        return reached, self.reward * at_goal, stopped | at_goal

    def transitions(self) -> tuple[np.ndarray, np.ndarray]:
        """The same as probabilities [G, S, 4, S] of going on in a state, the rest being an end, and expected rewards
        [G, S, 4]. For small worlds."""
        count, states = self.walls.shape
        moved = np.zeros((count, states, 4, states))
        np.put_along_axis(moved, self.successors[..., None], 1.0, axis=3)
        moved = (1 - self.noise) * moved + self.noise * moved.mean(axis=2, keepdims=True)
        moved *= 1 - self.end_chance
        rewards = self.reward * (moved * self.goals[:, None, None, :]).sum(axis=3)
        return moved * ~self.goals[:, None, None, :], rewards

    def values(self, policy: np.ndarray, gamma: float) -> np.ndarray:
        """Exact discounted returns from every state, float64 [G, S], of policies over moves [G, S, 4]."""
        count, states = self.walls.shape
        moves = (1 - self.noise) * policy + self.noise / 4
        goals = np.take_along_axis(self.goals[:, :, None], self.successors, axis=1)
        rewards = self.reward * (1 - self.end_chance) * (moves * goals).sum(axis=2)
        onward = -gamma * (1 - self.end_chance) * moves * ~goals  # [G, S, 4]
        # One banded system for all worlds: a move changes the state's number by at most a row.
        band = np.zeros((2 * self.side + 1, count * states))
        band[self.side] = 1.0
        first = np.arange(count)[:, None] * states
        for move in range(4):
            reached = self.successors[:, :, move]
            offsets = self.side + np.arange(states) - reached
            band[offsets, first + reached] += onward[:, :, move]  # each row has one entry per move
        solved = solve_banded(
            (self.side, self.side), band, rewards.reshape(-1), overwrite_ab=True, check_finite=False
        )
        values: np.ndarray = solved.reshape(count, states)
        return values

    def optimal_q_values(self, gamma: float, tolerance: float = 1e-9) -> np.ndarray:
        """Q-values of the best policies [G, S, 4], by value iteration."""
        worlds = np.arange(len(self))[:, None, None]
        goals = self.goals[worlds, self.successors]
        values = np.zeros(self.walls.shape)
        while True:
            moved = (1 - self.end_chance) * np.where(
                goals, self.reward, gamma * values[worlds, self.successors]
            )
            q_values: np.ndarray = (1 - self.noise) * moved + self.noise * moved.mean(axis=2, keepdims=True)
            change = np.abs(q_values.max(axis=2) - values).max()
            values = q_values.max(axis=2)
            if change < tolerance:
                return q_values


def random_grid_worlds(
    count: int,
    seed: int,
    side: int = 20,
    wall_chance: float = 0.2,
    goal_chance: float = 0.01,
    noise: float = 0.1,
    end_chance: float = 0.01,
    reward: float = 10.0,
) -> GridWorlds:
    """``count`` worlds with a free start and at least one goal that can be reached from it.

    Args:
        count: G.
        seed: the stage's seed.
        side: cells in a row.
        wall_chance: of each cell.
        goal_chance: of each cell that is no wall.
        noise: see :class:`GridWorlds`.
        end_chance: see :class:`GridWorlds`.
        reward: see :class:`GridWorlds`.
    """
    random = seeding.generator(seed, "grid worlds")
    states = side * side
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    found = 0
    while found < count:
        walls = random.random((count, states)) < wall_chance
        goals = ~walls & (random.random((count, states)) < goal_chance)
        successors = _successors(walls, side)
        start = (side // 2) * (side + 1)
        good = ~walls[:, start] & ~goals[:, start] & _reachable(successors, goals, start)
        kept.append((walls[good], goals[good], successors[good]))
        found += int(good.sum())
    walls, goals, successors = (np.concatenate(parts)[:count] for parts in zip(*kept, strict=True))
    return GridWorlds(walls, goals, successors, side, noise, end_chance, reward)


def _successors(walls: np.ndarray, side: int) -> np.ndarray:
    cells = np.arange(side * side)
    rows, columns = np.divmod(cells, side)
    successors = np.empty((*walls.shape, 4), np.int64)
    for move, (down, right) in enumerate(MOVES):
        # A move over the edge leads back to where it started.
        reached = (rows + down).clip(0, side - 1) * side + (columns + right).clip(0, side - 1)
        successors[:, :, move] = np.where(walls[:, reached], cells, reached)
    return successors


def _reachable(successors: np.ndarray, goals: np.ndarray, start: int) -> np.ndarray:
    """bool [G]: a goal can be reached from ``start``."""
    count, states, _ = successors.shape
    seen = np.zeros((count, states), np.bool_)
    seen[:, start] = True
    while True:
        grown = seen.copy()
        for move in range(4):
            worlds, cells = np.nonzero(seen)
            grown[worlds, successors[worlds, cells, move]] = True
        if (grown == seen).all():
            reachable: np.ndarray = (seen & goals).any(axis=1)
            return reachable
        seen = grown
