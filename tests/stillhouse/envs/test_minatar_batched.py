"""The batched games beside the package's own, with the same random numbers; streams, resets, saved state."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import minatar
import numpy as np
import pytest

from stillhouse.envs.minatar import MinAtarVectorEnv
from stillhouse.envs.minatar_batched import GAMES, RandomStreams

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

    def __init__(self, game: str, num_envs: int, **options: Any) -> None:
        self.games = [minatar.Environment(game, **options) for _ in range(num_envs)]

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
            "two bullets": (batch.cell[:, 0:2] < 120).all(1),
            "two divers": (batch.cell[:, 2:4] < 120).all(1),
            "gaps to close": (batch.enemies == 11) & (batch.cell[:, 4:15] > 120).any(1),
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
        "gaps to close",
    },
    "space_invaders": {"second wave", "third wave", "one left", "low aliens"},
}


@pytest.mark.parametrize("game", sorted(GAMES))
@pytest.mark.parametrize("competent", [False, True], ids=["random", "competent"])
def test_every_plane_reward_and_end_is_the_packages(game: str, competent: bool) -> None:
    num_envs, steps = 16, 5000 if competent else 2600  # Freeway ends after 2501
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
    sub_x, sub_y, rescued = (
        int(generator.integers(1, 9)),
        int(generator.integers(0, 9)),
        int(generator.integers(-2, 7)),
    )
    if len(divers) == 2 and sub_y and generator.random() < 0.5:  # two in reach, and room for one
        divers[0][:2] = divers[1][:2] = [sub_x, sub_y]
        rescued = 5
    return {
        "e_fish": fish,
        "e_subs": subs,
        "f_bullets": bullets,
        "divers": divers,
        "e_bullets": [
            [int(generator.integers(10)), int(generator.integers(1, 5)), bool(generator.integers(2))]
            for _ in range(3)
        ],
        "sub_x": sub_x,
        "sub_y": sub_y,
        "sub_or": bool(generator.integers(2)),
        "oxygen": int(generator.integers(-1, 201)),
        "diver_count": rescued,
        "surface": bool(generator.integers(2)),
        "move_speed": speed,
        "e_spawn_speed": int(generator.integers(1, 21)),
        "e_spawn_timer": int(generator.integers(0, 2)),
        "d_spawn_timer": 30 if len(divers) == 2 else int(generator.integers(0, 30)),
        "ramp_index": int(generator.integers(0, 20)),
        "shot_timer": 5 if len(bullets) == 2 else int(generator.integers(0, 6)),
    }


def put_into(batch: Any, row: int, sea: dict[str, Any]) -> None:
    """The package's state ``sea`` into one of our copies."""

    def cell(entity: list[Any]) -> int:
        return entity[1] * 12 + entity[0] + 1

    def direction(rightwards: bool) -> int:
        return 1 if rightwards else -1

    for ours, theirs in {
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
    batch.here[row] = cell([sea["sub_x"], sea["sub_y"]])
    batch.facing[row] = direction(sea["sub_or"])
    for bullet in sea["e_bullets"]:
        (batch.rightward_bullets if bullet[2] else batch.leftward_bullets)[row, cell(bullet)] = True
    enemies = sea["e_fish"] + sea["e_subs"]
    for place, entity in (
        *enumerate(sea["f_bullets"], 2 - len(sea["f_bullets"])),
        *enumerate(sea["divers"], 4 - len(sea["divers"])),
        *enumerate(enemies, 4),
    ):
        batch.cell[row, place] = cell(entity)
        batch.direction[row, place] = direction(entity[2])
    for place, diver in enumerate(sea["divers"], 2 - len(sea["divers"])):
        batch.diver_move_timer[row, place] = diver[3]
    batch.enemies[row] = len(enemies)
    for place, enemy in enumerate(enemies):
        batch.kind[row, 4 + place] = 6 if len(enemy) == 5 else 5
        batch.enemy_move_timer[row, place] = enemy[3]
        batch.enemy_shot_timer[row, place] = enemy[4] if len(enemy) == 5 else -1


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
            put_into(ours.game, row, sea)
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
            present = (batch.cell[row, 4:] < 120) & (batch.kind[row, 4:] == 6)
            assert batch.enemy_shot_timer[row, present].tolist() == theirs
    assert hits > rounds * num_envs / 4


def test_space_invaders_goes_on_from_any_board_as_the_package_does() -> None:
    """Also from where play hardly comes: landed aliens, few and scattered ones, many bullets."""
    num_envs, rounds = 32, 40
    generator = np.random.default_rng(9)
    package, ours = Package("space_invaders", num_envs), MinAtarVectorEnv(num_envs, "space_invaders")
    batch: Any = ours.game
    landings = 0
    for begun in range(rounds):
        seeds: list[int | None] = list(range(begun * num_envs, (begun + 1) * num_envs))
        ours.reset(seed=seeds)
        for row, seed in enumerate(seeds):
            package.reset(row, seed)
            boards = generator.random((3, 10, 10)) < generator.choice([0.02, 0.1, 0.4], size=(3, 1, 1))
            boards[0, generator.integers(10), generator.integers(10)] = True
            env = package.games[row].env
            env.alien_map, env.f_bullet_map, env.e_bullet_map = boards.astype(float)
            env.pos = batch.cannon[row] = int(generator.integers(10))
            env.alien_dir = batch.direction[row] = int(generator.choice([-1, 1]))
            env.alien_move_timer = batch.move_timer[row] = int(generator.integers(3))
            env.alien_shot_timer = batch.enemy_shot_timer[row] = int(generator.integers(3))
            env.shot_timer = batch.shot_timer[row] = int(generator.integers(3))
            env.enemy_move_interval = batch.move_interval[row] = int(generator.integers(6, 13))
            batch.aliens[row], batch.bullets[row], batch.enemy_bullets[row] = boards.reshape(3, 100)
            batch.aliens_left[row] = boards[0].sum()
        for _ in range(4):
            landed = batch.aliens[:, 90:].any(1)
            actions = generator.integers(6, size=num_envs)
            expected_rewards, expected_ends = package.act(actions)
            observations, rewards, terminated, _, _ = ours.step(actions)
            np.testing.assert_array_equal(observations, package.planes())
            np.testing.assert_array_equal(rewards, expected_rewards)
            np.testing.assert_array_equal(terminated, expected_ends)
            landings += int((terminated & landed & ~batch.aliens[:, 90:].any(1)).sum())
    assert landings > rounds


@pytest.mark.parametrize("game", sorted(GAMES))
@pytest.mark.parametrize(
    "options", [{"difficulty_ramping": False}, {"sticky_action_prob": 0.6}], ids=["no ramping", "sticky"]
)
def test_the_packages_options_mean_the_same(game: str, options: dict[str, Any]) -> None:
    num_envs = 8
    generator = np.random.default_rng(3)
    package = Package(game, num_envs, **options)
    ours = MinAtarVectorEnv(num_envs, game, **options)
    for row in range(num_envs):
        package.reset(row, row)
    observations, _ = ours.reset(seed=0)
    for _ in range(600):
        actions = PLAYERS[game](observations)
        mask = generator.random(num_envs) < 0.1
        actions[mask] = generator.integers(6, size=mask.sum())
        rewards, ended = package.act(actions)
        observations, our_rewards, terminated, _, _ = ours.step(actions)
        np.testing.assert_array_equal(observations, package.planes())
        np.testing.assert_array_equal(our_rewards, rewards)
        np.testing.assert_array_equal(terminated, ended)
        if ended.any():
            for row in np.flatnonzero(ended):
                package.reset(int(row), None)
            observations, _ = ours.reset(options={"reset_mask": ended})


def play(envs: MinAtarVectorEnv, actions: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What steps with ``actions``, [T, B], give: planes, rewards, ends."""
    return [(step[0].copy(), step[1].copy(), step[2].copy()) for step in map(envs.step, actions)]


@pytest.mark.parametrize("game", sorted(GAMES))
def test_an_episode_depends_on_its_seed_alone(game: str) -> None:
    """Not on the copy, on how many there are, on what they play, or on what was played before."""
    actions = np.random.default_rng(4).integers(6, size=(400, 1))
    alone = MinAtarVectorEnv(1, game)
    first, _ = alone.reset(seed=[7])
    expected = play(alone, actions)
    many = MinAtarVectorEnv(5, game)
    many.reset(seed=[1, 2, 3, 4, 5])
    play(many, np.full((37, 5), FIRE))
    observations, _ = many.reset(
        seed=[None, None, None, 7, None], options={"reset_mask": np.array([False, False, False, True, False])}
    )
    np.testing.assert_array_equal(observations[3], first[0])
    others = np.random.default_rng(5).integers(6, size=(400, 5))
    others[:, 3] = actions[:, 0]
    for ours, theirs in zip(play(many, others), expected, strict=True):
        for mine, its in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine[3], its[0])
    alone.reset(seed=[8])
    assert any(not np.array_equal(step[0], its[0]) for step, its in zip(play(alone, actions), expected))


@pytest.mark.parametrize("game", sorted(GAMES))
def test_saved_state_goes_on_exactly(game: str) -> None:
    generator = np.random.default_rng(6)
    envs, other = MinAtarVectorEnv(6, game), MinAtarVectorEnv(6, game)
    observations, _ = envs.reset(seed=3)
    for _ in range(150):
        observations, _, terminated, _, _ = envs.step(PLAYERS[game](observations))
        observations, _ = envs.reset(options={"reset_mask": terminated})
    state = envs.get_state()
    assert all(isinstance(value, np.ndarray) for value in state.values())
    kept = {name: value.copy() for name, value in state.items()}
    actions = generator.integers(6, size=(100, 6))
    expected = play(envs, actions)
    for name, value in state.items():
        np.testing.assert_array_equal(value, kept[name])
    other.reset(seed=99)
    other.set_state(state)
    for ours, theirs in zip(play(other, actions), expected, strict=True):
        for mine, its in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine, its)
    # Copies that were not reset show what they showed, after ``set_state`` too.
    other.set_state(state)
    shown, _ = other.reset(seed=1, options={"reset_mask": np.arange(6) == 0})
    np.testing.assert_array_equal(shown[1:], observations[1:])


def test_planes_once_returned_are_not_written_to() -> None:
    envs = MinAtarVectorEnv(3, "breakout")
    envs.reset(seed=0)
    stepped = envs.step(np.array([0, 0, 0]))
    kept = [value.copy() for value in stepped[:3]]
    reset, _ = envs.reset(seed=[1, None, None], options={"reset_mask": np.array([True, False, False])})
    reset_kept = reset.copy()
    envs.step(np.array([1, 2, 3]))
    envs.reset(seed=5)
    for value, copy in zip((*stepped[:3], reset), (*kept, reset_kept), strict=True):
        np.testing.assert_array_equal(value, copy)


@pytest.mark.parametrize("game", sorted(GAMES))
def test_minimal_actions_are_the_packages(game: str) -> None:
    actions = minatar.Environment(game).minimal_action_set()
    minimal = MinAtarVectorEnv(4, game, use_minimal_action_set=True)
    every = MinAtarVectorEnv(4, game)
    assert minimal.single_action_space.n == len(actions)  # type: ignore[attr-defined]
    minimal.reset(seed=2)
    every.reset(seed=2)
    for chosen in np.random.default_rng(8).integers(len(actions), size=(60, 4)):
        np.testing.assert_array_equal(minimal.step(chosen)[0], every.step(np.array(actions)[chosen])[0])


def test_a_time_limit_truncates() -> None:
    envs = MinAtarVectorEnv(3, "freeway", max_episode_steps=4)
    envs.reset(seed=0)
    none = np.zeros(3, np.int64)
    for _ in range(3):
        assert not envs.step(none)[3].any()
    assert envs.step(none)[3].all()
    envs.reset(seed=1, options={"reset_mask": np.array([False, True, False])})
    assert envs.step(none)[3].tolist() == [True, False, True]


def test_streams_are_uniform_and_differ() -> None:
    random = RandomStreams(1000)
    random.seed(np.arange(1000), np.arange(1000))
    numbers = np.concatenate([random.draw(slice(None), 20), random.draw_one()[:, None]], axis=1)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, 50, (0, 1))[0]
    assert ((counts - 420) ** 2 / 420).sum() < 86  # chi-squared, 49 degrees of freedom, p = 0.001
    correlations = np.corrcoef(numbers.T) - np.eye(21)
    assert np.abs(correlations).max() < 5 / np.sqrt(1000)
    assert len(np.unique(numbers)) == numbers.size


def test_a_vector_of_games_does_without_the_package() -> None:
    program = (
        "import sys, numpy; from stillhouse.envs.make import EnvironmentConfig, make_vector;"
        "make_vector(EnvironmentConfig(id='MinAtar/Seaquest-v0'), 2).reset(seed=1);"
        "print('minatar' in sys.modules or 'seaborn' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
