"""Two rooms joined by a corridor, many tasks at once, as arrays: what the tabular study of Distral runs on.

After Teh et al. 2017 (https://arxiv.org/abs/1707.04175, section 4.1): a grid of two rooms and a corridor; a task is a randomly chosen
goal; a state is (location, previous action, previous reward). The rest is not published and is ours: square rooms; the corridor joins
the middles of their facing sides; four moves, of which one against a wall leaves the agent where it is and pays ``bump``; reaching the
goal pays 1 and ends the episode, nothing else does; the next one starts in a random cell of the rooms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stillhouse.envs.gridworld import MOVES

ACTIONS = len(MOVES)
NO_ACTION = ACTIONS  # the previous one, at an episode's start


@dataclass(frozen=True)
class TwoRooms:
    """The map that all tasks share; a task is the number of its goal's cell.

    Attributes:
        side: cells along a side of each room, odd.
        corridor: cells of the corridor between them.
        bump: what a move against a wall pays.
    """

    side: int = 5
    corridor: int = 5
    bump: float = -0.1

    @property
    def room_cells(self) -> int:
        """How many cells the two rooms have; they are numbered first, the corridor's follow."""
        return 2 * self.side**2

    @property
    def states(self) -> int:
        """S."""
        return (self.room_cells + self.corridor) * (ACTIONS + 1) * 2

    def cells(self) -> np.ndarray:
        """(row, column) of every cell, int64 [C, 2]: the left room's, the right room's, then the corridor's."""
        left = np.argwhere(np.ones((self.side, self.side)))
        right = left + np.array([0, self.side + self.corridor])
        between = self.side + np.arange(self.corridor)
        return np.concatenate(
            [left, right, np.stack([np.full_like(between, self.side // 2), between], axis=1)]
        )

    def successors(self) -> np.ndarray:
        """The cell that each move leads to, int64 [C, 4]; the cell itself where there is a wall."""
        cells = [tuple(cell) for cell in self.cells().tolist()]
        number = {cell: index for index, cell in enumerate(cells)}
        return np.array(
            [
                [number.get((row + down, column + right), index) for down, right in MOVES.tolist()]
                for index, (row, column) in enumerate(cells)
            ]
        )

    def best_rates(self, goals: np.ndarray) -> np.ndarray:
        """Rewards per step of the shortest ways to ``goals`` [...]: one over their mean length from where episodes start."""
        successors = self.successors()
        steps = np.where(np.eye(len(successors), dtype=bool), 0.0, np.inf)  # [from, to]
        for _ in successors:
            steps = np.minimum(steps, 1 + steps[successors].min(axis=1))
        rates: np.ndarray = (self.room_cells - 1) / steps[: self.room_cells].sum(axis=0)[goals]
        return rates

    def random_goals(self, tasks: int, random: np.random.Generator) -> np.ndarray:
        """Cells of ``tasks`` different goals in the rooms, int64 [N]."""
        return random.choice(self.room_cells, size=tasks, replace=False)

    def start(self, goals: np.ndarray, chances: np.ndarray) -> np.ndarray:
        """First states [...] of episodes, in a cell of the rooms but the goal; ``chances`` are uniform in [0, 1), [...]."""
        cells = (chances * (self.room_cells - 1)).astype(np.int64)
        return state(cells + (cells >= goals), NO_ACTION, False)

    def step(
        self, successors: np.ndarray, goals: np.ndarray, states: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One step of agents in states [...].

        Args:
            successors: of :meth:`successors`, worked out once.
            goals: each agent's, [...].
            states: [...].
            actions: 0..3, [...].

        Returns:
            States reached, rewards and whether the episode ended, [...] each; an agent whose episode ended is not put back.
        """
        cells = states // (2 * (ACTIONS + 1))
        reached = successors[cells, actions]
        bumped = reached == cells
        terminated = reached == goals
        return state(reached, actions, bumped), terminated + self.bump * bumped, terminated


def state(cell: np.ndarray | int, previous_action: np.ndarray | int, bumped: np.ndarray | bool) -> np.ndarray:
    """The number of a state; the previous reward is ``bump`` or 0, for the goal's ends the episode."""
    return (np.asarray(cell) * (ACTIONS + 1) + previous_action) * 2 + bumped
