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


def play_seaquest(planes: np.ndarray) -> np.ndarray:
    """Keep away from enemies and bullets, fire along a row with enemies, fetch divers, come up with six or for air."""
    copies = np.arange(len(planes))
    x, y = first_column(planes[..., 0]), first_row(planes[..., 0])
    threats = planes[..., 4] | planes[..., 5] | planes[..., 6]
    facing = np.sign(x - first_column(planes[..., 1]))
    oxygen, rescued = planes[:, 9, :, 7].sum(1), planes[:, 9, :, 8].sum(1)
    divers = planes[..., 9].any((1, 2))
    goal_y = np.where(divers, first_row(planes[..., 9]), 4)
    goal_x = np.where(divers, planes[..., 9].any(1).argmax(1), 4)
    up = (rescued == 6) | ((oxygen <= 3) & (rescued > 0) & (copies % 4 > 0))  # every fourth drowns
    goal_y = np.where(up, 0, goal_y)
    ahead = (np.arange(10) - x[:, None]) * facing[:, None] > 0
    target = ((planes[..., 5] | planes[..., 6])[copies, y] & ahead).any(1)
    costs = []
    for step_x, step_y in ((0, 0), (-1, 0), (0, -1), (1, 0), (0, 1)):
        column, row = np.clip(x + step_x, 0, 9), np.clip(y + step_y, 0, 8)
        distance = np.abs(np.arange(10) - column[:, None])
        danger = (threats[copies, row] * np.select([distance <= 1, distance == 2], [100, 20], 0)).sum(1)
        danger = danger + 1000 * ((row == 0) & ~up & (y > 0))
        costs.append(danger + np.abs(goal_x - column) + 2 * np.abs(goal_y - row))
    best = np.argmin(costs, 0)
    moves = np.array([NONE, LEFT, UP, RIGHT, DOWN])[best]
    return np.where(target & (np.array(costs)[0] < 100), FIRE, moves)


PLAYERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "asterix": play_asterix,
    "breakout": play_breakout,
    "freeway": play_freeway,
    "seaquest": play_seaquest,
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
        "seaquest": lambda: {
            "hits": episode_return > 0,
            "surfaced": batch.ramps > 0,
            "surfaced with six": batch.rescued < 0,
            "faster moves": batch.move_interval < 5,
            "no oxygen": batch.oxygen <= 0,
            "two bullets": (batch.bullet > 0).all(1),
            "two divers": (batch.diver > 0).all(1),
            "seven enemies came": batch.enemies >= 7,
        },
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
    "seaquest": {
        "hits",
        "surfaced",
        "surfaced with six",
        "faster moves",
        "no oxygen",
        "two bullets",
        "two divers",
        "seven enemies came",
    },
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


def crowded_sea(generator: np.random.Generator) -> dict[str, Any]:
    """A state of the package's Seaquest that play hardly reaches: a few rows full of enemies, all about to meet."""
    speed = int(generator.integers(2, 6))
    fish: list[list[Any]] = []
    subs: list[list[Any]] = []
    bullets: list[list[Any]] = []
    for _ in range(generator.integers(1, 9)):
        x, y, rightwards = (
            int(generator.integers(1, 9)),
            int(generator.integers(1, 4)),
            bool(generator.integers(2)),
        )
        enemies, shot_timer = (
            (fish, []) if generator.random() < 0.5 else (subs, [int(generator.integers(0, 11))])
        )
        timer = int(generator.integers(0, speed + 1))
        if generator.random() < 0.5:  # one that will equal the next after its move, but has had its own move
            enemies.append([x + (1 if rightwards else -1), y, rightwards, speed, *shot_timer])
            timer = 0
        enemies.append([x, y, rightwards, timer, *shot_timer])
        if len(bullets) < 2 and generator.random() < 0.5:  # where it comes after both have moved
            ahead = x + (1 if rightwards else -1)
            leftwards = bool(generator.integers(2))
            bullets.append([ahead + (1 if leftwards else -1), y, not leftwards])
    if len(bullets) == 2 and bullets[0] == bullets[1]:
        bullets.pop()
    divers = [
        [int(generator.integers(10)), int(generator.integers(1, 4)), bool(generator.integers(2)), int(timer)]
        for timer in generator.permutation(6)[: generator.integers(3)]
    ]
    return {
        "e_fish": fish,
        "e_subs": subs,
        "f_bullets": bullets,
        "divers": divers,
        "e_bullets": [
            [int(generator.integers(10)), int(generator.integers(1, 5)), bool(generator.integers(2))]
            for _ in range(3)
        ],
        "sub_x": int(generator.integers(1, 9)),
        "sub_y": int(generator.integers(0, 9)),
        "sub_or": bool(generator.integers(2)),
        "oxygen": int(generator.integers(-1, 201)),
        "diver_count": int(generator.integers(-2, 7)),
        "surface": bool(generator.integers(2)),
        "move_speed": speed,
        "e_spawn_speed": int(generator.integers(1, 21)),
        "e_spawn_timer": int(generator.integers(0, 2)),
        "d_spawn_timer": 30 if len(divers) == 2 else int(generator.integers(0, 30)),
        "ramp_index": int(generator.integers(0, 20)),
        "shot_timer": 5 if len(bullets) == 2 else int(generator.integers(0, 6)),
    }


def place(sea: dict[str, Any], batch: Any, row: int) -> None:
    """The same state in one of our copies."""

    def cell(entity: list[Any]) -> int:
        return entity[1] * 12 + entity[0] + 1

    def direction(rightwards: bool) -> int:
        return 1 if rightwards else -1

    for ours, theirs in {
        "x": "sub_x",
        "y": "sub_y",
        "oxygen": "oxygen",
        "rescued": "diver_count",
        "surfaced": "surface",
        "move_interval": "move_speed",
        "spawn_interval": "e_spawn_speed",
        "spawn_timer": "e_spawn_timer",
        "diver_timer": "d_spawn_timer",
        "ramps": "ramp_index",
        "shot_timer": "shot_timer",
    }.items():
        getattr(batch, ours)[row] = sea[theirs]
    batch.facing[row] = direction(sea["sub_or"])
    for place, bullet in enumerate(sea["f_bullets"], 2 - len(sea["f_bullets"])):
        batch.bullet[row, place] = cell(bullet)
        batch.bullet_direction[row, place] = direction(bullet[2])
    for place, diver in enumerate(sea["divers"], 2 - len(sea["divers"])):
        batch.diver[row, place] = cell(diver)
        batch.diver_direction[row, place] = direction(diver[2])
        batch.diver_move_timer[row, place] = diver[3]
    for bullet in sea["e_bullets"]:
        (batch.rightward_bullets if bullet[2] else batch.leftward_bullets)[row, cell(bullet)] = True
    enemies = sea["e_fish"] + sea["e_subs"]
    batch.enemies[row] = len(enemies)
    for place, enemy in enumerate(enemies):
        batch.enemy[row, place] = cell(enemy)
        batch.enemy_direction[row, place] = direction(enemy[2])
        batch.enemy_move_timer[row, place] = enemy[3]
        batch.enemy_shoots[row, place] = len(enemy) == 5
        batch.enemy_shot_timer[row, place] = enemy[4] if len(enemy) == 5 else 10


def test_seaquest_keeps_the_packages_order_where_much_happens_at_once() -> None:
    num_envs, rounds = 32, 50
    generator = np.random.default_rng(2)
    package, ours = Package("seaquest", num_envs), MinAtarVectorEnv(num_envs, "seaquest")
    hits = 0
    for begun in range(rounds):
        seeds: list[int | None] = list(range(begun * num_envs, (begun + 1) * num_envs))
        ours.reset(seed=seeds)
        for row, seed in enumerate(seeds):
            package.reset(row, seed)
            sea = crowded_sea(generator)
            place(sea, ours.game, row)
            vars(package.games[row].env).update(sea)
        for _ in range(5):  # no third bullet can be fired in that time, and no third diver come
            actions = generator.integers(6, size=num_envs)
            expected_rewards, expected_ends = package.act(actions)
            observations, rewards, terminated, _, _ = ours.step(actions)
            np.testing.assert_array_equal(observations, package.planes())
            np.testing.assert_array_equal(rewards, expected_rewards)
            np.testing.assert_array_equal(terminated, expected_ends)
            hits += int(rewards.sum())
        for row, game in enumerate(package.games):
            theirs = [enemy[4] for enemy in game.env.e_subs]
            batch: Any = ours.game
            present = (batch.enemy[row] != 0) & batch.enemy_shoots[row]
            assert batch.enemy_shot_timer[row, present].tolist() == theirs
    assert hits > rounds * num_envs / 4
