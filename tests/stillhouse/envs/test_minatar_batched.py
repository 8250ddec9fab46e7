"""The batched games beside the package's own, with the same random numbers; streams, resets, variants, saved state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import minatar
import numpy as np
import pytest

from stillhouse.envs.minatar import MinAtarVectorEnv
from stillhouse.envs.minatar_batched import GAMES

NONE, LEFT, UP, RIGHT, DOWN, FIRE = range(6)


class ServedRandom:
    """Stands in for the package's RandomState: splitmix64 in plain integers, with Steele et al.'s constants."""

    def __init__(self, seed: int) -> None:
        self.counter = self._mix(seed * 0x9E3779B97F4A7C15)

    def _mix(self, value: int) -> int:
        value %= 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    def _next(self) -> float:
        self.counter += 0x9E3779B97F4A7C15
        return float((self._mix(self.counter) >> 11) * 2.0**-53)

    def rand(self, size: int | None = None) -> Any:
        return self._next() if size is None else np.array([self._next() for _ in range(size)])

    def randint(self, low: int, high: int | None = None, size: int | None = None) -> Any:
        low, high = (0, low) if high is None else (low, high)
        uniform = self.rand(size)
        if size is None:
            return low + int(uniform * (high - low))
        return low + (uniform * (high - low)).astype(int)


class Package:
    """Copies of the package's game on served random numbers."""

    def __init__(self, game: str, num_envs: int) -> None:
        self.games = [minatar.Environment(game) for _ in range(num_envs)]

    def reset(self, row: int, seed: int | None) -> None:
        game = self.games[row]
        if seed is not None:
            game.random = game.env.random = ServedRandom(seed)
        game.last_action = 0
        game.reset()

    def planes(self) -> np.ndarray:
        return np.stack([game.state() for game in self.games])

    def act(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        results = [game.act(int(action)) for game, action in zip(self.games, actions, strict=True)]
        return np.array([reward for reward, _ in results]), np.array([ended for _, ended in results])


def first_column(planes: np.ndarray) -> np.ndarray:
    """Column of the one cell set in each of [B, 10, 10]."""
    return planes.any(1).argmax(1)


def first_row(planes: np.ndarray) -> np.ndarray:
    return planes.any(2).argmax(1)


def towards(at: np.ndarray, goal: np.ndarray) -> np.ndarray:
    return np.select([goal < at, goal > at], [LEFT, RIGHT], NONE)


def play_breakout(planes: np.ndarray) -> np.ndarray:
    """Wait where the ball will land."""
    x, y, last = first_column(planes[..., 1]), first_row(planes[..., 1]), first_column(planes[..., 2])
    flight = (x + np.sign(x - last) * (8 - y)) % 20
    landing = np.where(flight > 9, 19 - flight, flight)
    falls = y > first_row(planes[..., 2])
    return towards(first_column(planes[:, 9:, :, 0]), np.where(falls, landing, x))


def play_space_invaders(planes: np.ndarray) -> np.ndarray:
    """Fire below an alien, else go below one, unless something comes down there; then step aside."""
    copies = np.arange(len(planes))
    at = first_column(planes[:, 9:, :, 0])
    left, right = np.maximum(at - 1, 0), np.minimum(at + 1, 9)
    danger = planes[:, 6:9, :, 5].any(1) | planes[:, 8:, :, 1].any(1)
    columns = planes[..., 1].any(1)
    nearest = np.where(columns, np.abs(np.arange(10) - at[:, None]), 99).argmin(1)
    wish = np.where(columns[copies, at], FIRE, towards(at, nearest))
    there = np.select([wish == LEFT, wish == RIGHT], [left, right], at)
    aside = np.select(
        [~danger[copies, at], ~danger[copies, left], ~danger[copies, right]], [FIRE, LEFT, RIGHT], LEFT
    )
    return np.where(danger[copies, there], aside, wish)


def play_freeway(planes: np.ndarray) -> np.ndarray:
    """Walk up."""
    return np.full(len(planes), UP)


def play_asterix(planes: np.ndarray) -> np.ndarray:
    """Of the five places in reach the one that enemies reach last; the nearest gold in its row breaks ties."""
    copies = np.arange(len(planes))
    x, y = first_column(planes[..., 0]), first_row(planes[..., 0])
    leftwards = planes[:, :, :9, 1] & planes[:, :, 1:, 2]  # its trail is on its right
    leftwards = np.pad(leftwards, ((0, 0), (0, 0), (0, 1)))
    costs = []
    for step_x, step_y in ((0, 0), (-1, 0), (0, -1), (1, 0), (0, 1)):
        column, row = np.clip(x + step_x, 0, 9), np.clip(y + step_y, 1, 8)
        distance = np.arange(10) - column[:, None]
        moves = np.where(leftwards[copies, row], distance, -distance)  # until it is here
        near = np.select([distance == 0, moves < 0, moves == 1, moves <= 3], [100, 0, 50, 5], 1)
        threat = planes[copies, row, :, 1] * near
        gold = planes[copies, row, :, 3] * (1 - np.abs(distance) / 20)
        costs.append(threat.sum(1) - gold.sum(1))
    return np.array([NONE, LEFT, UP, RIGHT, DOWN])[np.argmin(costs, 0)]


PLAYERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "asterix": play_asterix,
    "breakout": play_breakout,
    "freeway": play_freeway,
    "space_invaders": play_space_invaders,
}


def reached(game: str, episode_return: np.ndarray, envs: MinAtarVectorEnv) -> set[str]:
    """Which of a game's rare events the copies have met in the episodes they are in."""
    batch: Any = envs.game
    events = {
        "asterix": lambda: {
            "gold": episode_return > 0,
            "faster spawns": batch.spawn_interval <= 7,
            "faster moves": batch.move_interval <= 4,
            "every row full": (batch.kind != 0).all(1),
        },
        "breakout": lambda: {
            "wall refilled": episode_return > 30,
            "second wall": (batch.bricks_left == 30) & (episode_return == 30),
        },
        "freeway": lambda: {"crossed": episode_return > 0, "time is up": batch.terminal},
        "space_invaders": lambda: {
            "second wave": episode_return > 24,
            "third wave": episode_return > 48,
            "one left": batch.aliens_left == 1,
            "low aliens": batch.aliens.reshape(-1, 10, 10)[:, 7].any(1),
        },
    }[game]()
    return {event for event, where in events.items() if np.any(where)}


EVENTS = {
    "asterix": {"gold", "faster spawns", "faster moves", "every row full"},
    "breakout": {"wall refilled", "second wall"},
    "freeway": {"crossed", "time is up"},
    "space_invaders": {"second wave", "third wave", "one left", "low aliens"},
}


@pytest.mark.parametrize("game", sorted(GAMES))
@pytest.mark.parametrize("competent", [False, True], ids=["random", "competent"])
def test_every_plane_reward_and_end_is_the_packages(game: str, competent: bool) -> None:
    num_envs, steps = 16, 5000
    generator = np.random.default_rng(1)
    package, ours = Package(game, num_envs), MinAtarVectorEnv(num_envs, game)
    seeds: list[int | None] = [int(seed) for seed in generator.integers(2**31, size=num_envs)]
    for row, seed in enumerate(seeds):
        package.reset(row, seed)
    observations, _ = ours.reset(seed=seeds)
    np.testing.assert_array_equal(observations, package.planes())
    returns, events, ends = np.zeros(num_envs), set[str](), 0
    for _ in range(steps):
        actions = generator.integers(6, size=num_envs)
        if competent:
            random = generator.random(num_envs) < 0.02
            actions = np.where(random, actions, PLAYERS[game](observations))
        expected_rewards, expected_ends = package.act(actions)
        observations, rewards, terminated, truncated, _ = ours.step(actions)
        np.testing.assert_array_equal(observations, package.planes())
        np.testing.assert_array_equal(rewards, expected_rewards)
        np.testing.assert_array_equal(terminated, expected_ends)
        assert not truncated.any()
        returns += rewards
        events |= reached(game, returns, ours)
        ends += int(terminated.sum())
        # Some copies are left standing after their end; some go on with the random numbers that they have.
        mask = terminated & (generator.random(num_envs) < 0.7)
        if mask.any():
            seeds = [int(seed) if seed % 4 else None for seed in generator.integers(2**31, size=num_envs)]
            for row in np.flatnonzero(mask):
                package.reset(int(row), seeds[row])
            observations, _ = ours.reset(seed=seeds, options={"reset_mask": mask})
            np.testing.assert_array_equal(observations, package.planes())
            returns[mask] = 0
    assert ends >= num_envs
    if competent:
        assert events == EVENTS[game], EVENTS[game] - events
