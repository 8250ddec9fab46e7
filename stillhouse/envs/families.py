"""Families of environments for meta-learning: a task is a row of numbers, and all copies of all tasks step at once.

A family holds no state: ``reset`` gives the state of N tasks x K copies, ``step`` the next one. Episodes have one
horizon, in env steps; a copy that has terminated may be stepped on, and what it gives then is not used.

Tasks to train on and to test on cannot meet. Where a task is a point of a box, the box is cut into ten cells along every axis, and a
fifth of the cells, spread evenly over the box, is for testing only (:func:`sample_box`). What has no such split says so
(``splits`` is false): it then trains and tests on the same few tasks, as the papers do there.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field

from stillhouse.config import Config
from stillhouse.errors import StillhouseError

Split = Literal["train", "test"]
FamilyName = Literal[
    "navigation",
    "navigation_distance",
    "cartpole",
    "acrobot",
    "minatar",
    "cheetah_direction",
    "cheetah_velocity",
]

CELLS = 10  # along each axis of a box of tasks
_TEST_SHARE = 5  # one cell of so many is for testing

FAMILIES: dict[str, tuple[str, str]] = {
    "navigation": ("navigation", "Navigation"),
    "navigation_distance": ("navigation", "NavigationDistance"),
    "cartpole": ("physics", "CartPoleFamily"),
    "acrobot": ("physics", "AcrobotFamily"),
    "minatar": ("minatar_family", "MinAtarFamily"),
    "cheetah_direction": ("cheetah", "CheetahDirection"),
    "cheetah_velocity": ("cheetah", "CheetahVelocity"),
}
"""Name to the module of ``stillhouse.envs`` that holds it, and its class there."""

PLAYED = {"cartpole": "stillhouse/CartPole-v1", "acrobot": "stillhouse/Acrobot-v1"}
"""Families whose policies are ordinary networks, to the id of their usual member."""


class Family(Protocol):
    """What a meta-learner needs of a family.

    Attributes:
        name: as in :class:`FamilyConfig`.
        observations: size of the observation vector, o.
        actions: number of actions, or size of the action vector, a.
        discrete: whether actions are integers; else they are vectors, and [-1, 1] is the range of each component.
        horizon: env steps of an episode at most.
        splits: whether the tasks for testing are others than those for training.
    """

    name: str
    observations: int
    actions: int
    discrete: bool
    horizon: int
    splits: bool

    def members(self, split: Split) -> int | None:
        """How many tasks there are; None: a continuum."""
        ...

    def sample(self, split: Split, count: int, random: np.random.Generator) -> np.ndarray:
        """Tasks float64 [N, d]; where there are fewer members than that, each as often as any other, give or take one."""
        ...

    def reset(self, tasks: np.ndarray, rollouts: int, random: np.random.Generator) -> Any:
        """The state in which N x K episodes begin, in a form of the family's own, float64 [N, K, s] for most."""
        ...

    def observe(self, state: Any) -> np.ndarray:
        """Observations float32 [N, K, o] of a state."""
        ...

    def step(self, tasks: np.ndarray, state: Any, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
        """One env step of every copy.

        Args:
            tasks: [N, d].
            state: of N x K copies; it is left as it is.
            actions: int64 [N, K], or float [N, K, a], which is clipped to [-1, 1].

        Returns:
            The next state, rewards float64 [N, K], terminated bool [N, K].
        """
        ...

    def oracle_return(self, tasks: np.ndarray) -> np.ndarray | None:
        """The return of who knows the task, [N], where it can be told."""
        ...


class FamilyConfig(Config):
    """Which family, and what of it may be set."""

    name: FamilyName = Field(default="navigation", description="the family of environments")
    horizon: int | None = Field(
        default=None, ge=1, le=10_000, description="env steps of an episode; null: the family's own"
    )
    game: Literal["asterix", "breakout", "freeway", "seaquest", "space_invaders"] = Field(
        default="breakout", description="minatar: which game"
    )
    ranges: dict[str, tuple[float, float]] = Field(
        default={},
        max_length=8,
        description="cartpole, acrobot: least and largest value of a physical constant; a constant that is not named keeps the family's range",
    )
    swapped: bool = Field(
        default=False,
        description="cartpole: half of the tasks have left and right swapped, which nothing shows before a push",
    )


def make_family(config: FamilyConfig) -> Family:
    """The family that is named.

    Raises:
        StillhouseError: ranges, sides or a game that the family does not have, or a simulator that is not installed.
    """
    module, name = FAMILIES[config.name]
    options: dict[str, Any] = {} if config.horizon is None else {"horizon": config.horizon}
    if config.ranges:
        if module != "physics":
            raise StillhouseError(
                f"family.ranges: {config.name} has no physical constants to set; cartpole and acrobot have; leave ranges out"
            )
        options["ranges"] = config.ranges
    if config.name == "cartpole":
        options["swapped"] = config.swapped
    elif config.swapped:
        raise StillhouseError(
            f"family.swapped: {config.name} has no sides to swap; cartpole has; leave swapped out"
        )
    if module == "minatar_family":
        options["game"] = config.game
    elif config.game != "breakout":
        raise StillhouseError(
            f"family.game: {config.game!r} was given, but {config.name} is no game of MinAtar; leave game out"
        )
    made: Family = getattr(importlib.import_module(f"stillhouse.envs.{module}"), name)(**options)
    return made


def for_testing(tasks: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whether tasks [N, d] of the box between ``low`` and ``high`` [d] lie in a cell for testing, bool [N].

    Cell (i, j, k, ...) is one if i + 2 j + 3 k + ... is a multiple of 5: a pattern that has as many of them in every row. An axis
    without extent is no axis.
    """
    extent = high > low
    cells = np.floor((tasks - low)[:, extent] / (high - low)[extent] * CELLS).astype(np.int64)
    cells = np.clip(cells, 0, CELLS - 1)
    # A weight that is a multiple of 5 would leave its axis out of the pattern.
    weights = np.arange(cells.shape[1]) % (_TEST_SHARE - 1) + 1
    found: np.ndarray = (cells * weights).sum(axis=1) % _TEST_SHARE == 0
    return found


def sample_box(
    split: Split, count: int, low: np.ndarray, high: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Tasks [N, d], uniform over the split's cells of the box between ``low`` and ``high`` [d]."""
    found = np.empty((0, len(low)))
    while len(found) < count:
        tasks = random.uniform(low, high, (max(64, 2 * count), len(low)))
        found = np.concatenate([found, tasks[for_testing(tasks, low, high) == (split == "test")]])
    return found[:count]


def check_ranges(
    name: str, ranges: Mapping[str, tuple[float, float]], defaults: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """A physics family's ranges, the user's put over its own.

    Raises:
        StillhouseError: an unknown constant, a range that is none, or no constant that differs between tasks.
    """
    for key, (low, high) in ranges.items():
        if key not in defaults:
            raise StillhouseError(f"family.ranges: {name} has no {key!r}; allowed are {', '.join(defaults)}")
        if not 0.01 <= low <= high <= 1000:
            raise StillhouseError(
                f"family.ranges.{key}: {low:g} to {high:g} was given; values from 0.01 to 1000 are allowed, the least not above the largest"
            )
    found = {**defaults, **ranges}
    if all(low == high for low, high in found.values()):
        raise StillhouseError(
            f"family.ranges: {name} has one member only, because no range has an extent, and one member cannot be split into tasks for "
            "training and tasks for testing; give a constant two different ends"
        )
    return found
