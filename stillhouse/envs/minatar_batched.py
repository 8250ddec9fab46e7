"""MinAtar's games (Young & Tian 2019, arXiv:1903.03176) stepped for many copies at once, with array operations.

The rules are the ``minatar`` package's, in its order of events and with its quirks; ``test_minatar_batched`` plays the
package beside these games with the same random numbers and compares every plane, reward and end. One thing differs: a
new episode forgets the last action of the one before it, so that an episode depends on its seed alone.

Legend: B copies, K of them (``rows``, integers [K] or a slice), C planes; cells are counted 0..99, row by row.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np

Rows = np.ndarray | slice
ALL = slice(None)

# Actions: none, left, up, right, down, fire.
_LEFT, _UP, _RIGHT, _DOWN, _FIRE = 1, 2, 3, 4, 5


def _after(backwards: int, forwards: int, first: int, last: int) -> np.ndarray:
    """Where an action leads from each of 0..9, [6, 10], when places end at ``first`` and ``last``."""
    places = np.tile(np.arange(10), (6, 1))
    places[backwards] = np.maximum(places[backwards] - 1, first)
    places[forwards] = np.minimum(places[forwards] + 1, last)
    return places


_COLUMN_AFTER = _after(_LEFT, _RIGHT, 0, 9)


class RandomStreams:
    """One counter-based generator for each copy: splitmix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195).

    A copy's numbers depend on its seed alone, not on how many copies there are or what they draw.

    Attributes:
        counters: uint64 [B], the whole state.
    """

    _STEP = np.uint64(0x9E3779B97F4A7C15)
    _SHIFTS = np.array([30, 27, 31, 11], np.uint64)
    _FACTORS = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)

    def __init__(self, num_envs: int) -> None:
        self.counters = np.zeros(num_envs, np.uint64)

    def seed(self, rows: np.ndarray, seeds: np.ndarray) -> None:
        """Begin new streams for ``rows``, from ``seeds``, integers [K]."""
        # Mixed, so that neighbouring seeds begin far apart on the one sequence that all streams walk along.
        self.counters[rows] = self._mix(seeds.astype(np.uint64) * self._STEP)

    def draw(self, rows: Rows, count: int) -> np.ndarray:
        """The next ``count`` numbers of each of ``rows``, uniform in [0, 1), float64 [K, count]."""
        counters = self.counters[rows, None] + self._STEP * np.arange(1, count + 1, dtype=np.uint64)
        self.counters[rows] = counters[:, -1]
        return self._uniform(counters)

    def draw_one(self) -> np.ndarray:
        """The next number of every copy, float64 [B]."""
        self.counters += self._STEP
        return self._uniform(self.counters)

    def _uniform(self, counters: np.ndarray) -> np.ndarray:
        return (self._mix(counters) >> self._SHIFTS[3]) * 2.0**-53

    def _mix(self, values: np.ndarray) -> np.ndarray:
        values = (values ^ (values >> self._SHIFTS[0])) * self._FACTORS[0]
        values = (values ^ (values >> self._SHIFTS[1])) * self._FACTORS[1]
        return values ^ (values >> self._SHIFTS[2])


class BatchedGame(Protocol):
    """B copies of one game. ``arrays`` is all that a copy is, each array with copies on its first or only axis."""

    channels: ClassVar[int]
    minimal_actions: ClassVar[tuple[int, ...]]
    terminal: np.ndarray  # bool [B]
    arrays: dict[str, np.ndarray]

    def __init__(self, num_envs: int, ramping: bool) -> None: ...

    def begin(self, rows: np.ndarray, random: RandomStreams) -> None:
        """New episodes in ``rows``."""
        ...

    def act(self, actions: np.ndarray, random: RandomStreams) -> np.ndarray:
        """One step with ``actions``, integers 0..5 [B]; rewards, float32 [B]. Terminal copies move on, senselessly."""
        ...

    def planes(self, rows: Rows) -> np.ndarray:
        """What is seen of ``rows``, bool [K, 10, 10, C], newly allocated."""
        ...


def _canvas(num_envs: int, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Empty planes [K, 100, C], the same memory flat, and where each copy begins in it, [K]."""
    planes = np.zeros((num_envs, 100, channels), np.bool_)
    return planes, planes.reshape(-1), np.arange(num_envs) * (100 * channels)


class Breakout:
    """Planes: paddle, ball, the ball's last place, bricks."""

    channels: ClassVar[int] = 4
    minimal_actions: ClassVar[tuple[int, ...]] = (0, _LEFT, _RIGHT)

    def __init__(self, num_envs: int, ramping: bool) -> None:  # the game does not ramp
        self.paddle = np.zeros(num_envs, np.int64)
        self.x = np.zeros(num_envs, np.int64)
        self.y = np.zeros(num_envs, np.int64)
        self.last_x = np.zeros(num_envs, np.int64)
        self.last_y = np.zeros(num_envs, np.int64)
        self.step_x = np.zeros(num_envs, np.int64)  # -1 or 1
        self.step_y = np.zeros(num_envs, np.int64)
        self.struck = np.zeros(num_envs, np.bool_)  # a brick in the step before: it passes through the next
        self.bricks = np.zeros((num_envs, 100), np.bool_)
        self.bricks_left = np.zeros(num_envs, np.int64)
        self.terminal = np.zeros(num_envs, np.bool_)
        self.arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        self._cells = np.arange(num_envs) * 100

    def begin(self, rows: np.ndarray, random: RandomStreams) -> None:
        from_right = random.draw(rows, 1)[:, 0] >= 0.5
        self.paddle[rows] = 4
        self.x[rows] = self.last_x[rows] = np.where(from_right, 9, 0)
        self.y[rows] = self.last_y[rows] = 3
        self.step_x[rows] = np.where(from_right, -1, 1)
        self.step_y[rows] = 1
        self.struck[rows] = False
        self._refill(rows)
        self.terminal[rows] = False

    def _refill(self, rows: np.ndarray) -> None:
        self.bricks[rows, 10:40] = True
        self.bricks_left[rows] = 30

    def act(self, actions: np.ndarray, random: RandomStreams) -> np.ndarray:
        self.paddle[:] = _COLUMN_AFTER[actions, self.paddle]

        self.last_x[:] = self.x
        self.last_y[:] = self.y
        x = self.x + self.step_x
        y = self.y + self.step_y
        at_side = (x < 0) | (x > 9)
        np.maximum(x, 0, out=x)
        np.minimum(x, 9, out=x)
        at_top = y < 0
        np.maximum(y, 0, out=y)
        np.minimum(y, 9, out=y)  # below is nothing; only a ball that was lost before goes there
        cells = self._cells + y * 10 + x
        at_brick = self.bricks.reshape(-1)[cells] & ~at_top
        breaks = at_brick & ~self.struck
        at_bottom = y == 9  # where no brick ever is

        emptied = at_bottom & (self.bricks_left == 0)
        if emptied.any():
            self._refill(np.flatnonzero(emptied))
        above = at_bottom & (self.x == self.paddle)
        corner = at_bottom & ~above & (x == self.paddle)
        self.terminal |= at_bottom & ~above & ~corner
        self.struck[:] = at_brick

        self.bricks.reshape(-1)[cells[breaks]] = False
        self.bricks_left -= breaks
        self.step_x *= 1 - 2 * (at_side ^ corner)
        bounces = breaks | above | corner
        self.step_y *= 1 - 2 * (at_top | bounces)
        self.x[:] = x
        self.y[:] = np.where(bounces, self.last_y, y)
        return breaks.astype(np.float32)

    def planes(self, rows: Rows) -> np.ndarray:
        paddle = self.paddle[rows]
        planes, flat, first = _canvas(len(paddle), self.channels)
        planes[:, 10:40, 3] = self.bricks[rows, 10:40]
        flat[first + (90 + paddle) * 4] = True
        flat[first + (self.y[rows] * 10 + self.x[rows]) * 4 + 1] = True
        flat[first + (self.last_y[rows] * 10 + self.last_x[rows]) * 4 + 2] = True
        return planes.reshape(-1, 10, 10, self.channels)


class SpaceInvaders:
    """Planes: cannon, aliens, aliens moving left, aliens moving right, own bullets, their bullets."""

    channels: ClassVar[int] = 6
    minimal_actions: ClassVar[tuple[int, ...]] = (0, _LEFT, _RIGHT, _FIRE)

    _SHOT_COOL_DOWN = 5
    _ENEMY_MOVE_INTERVAL = 12
    _ENEMY_SHOT_INTERVAL = 10
    _WAVE = np.zeros(100, np.bool_)
    _WAVE.reshape(10, 10)[0:4, 2:8] = True
    # Which column's alien shoots: the nearest, of two as near the left one; smaller comes first.
    _SEARCH_ORDER = np.array([[2 * abs(x - at) + (x > at) for x in range(10)] for at in range(10)])

    def __init__(self, num_envs: int, ramping: bool) -> None:
        self._ramping = ramping
        self.cannon = np.zeros(num_envs, np.int64)  # its column
        self.direction = np.zeros(num_envs, np.int64)  # of the aliens: -1 or 1
        self.move_interval = np.zeros(num_envs, np.int64)
        self.move_timer = np.zeros(num_envs, np.int64)
        self.enemy_shot_timer = np.zeros(num_envs, np.int64)
        self.shot_timer = np.zeros(num_envs, np.int64)
        self.aliens_left = np.zeros(num_envs, np.int64)
        self.aliens = np.zeros((num_envs, 100), np.bool_)
        self.bullets = np.zeros((num_envs, 100), np.bool_)
        self.enemy_bullets = np.zeros((num_envs, 100), np.bool_)
        self.terminal = np.zeros(num_envs, np.bool_)
        self.arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        self._last_row = np.arange(num_envs) * 100 + 90

    def begin(self, rows: np.ndarray, random: RandomStreams) -> None:
        self.cannon[rows] = 5
        self.direction[rows] = -1
        self.move_interval[rows] = self.move_timer[rows] = self._ENEMY_MOVE_INTERVAL
        self.enemy_shot_timer[rows] = self._ENEMY_SHOT_INTERVAL
        self.shot_timer[rows] = 0
        self.bullets[rows] = False
        self.enemy_bullets[rows] = False
        self._refill(rows)
        self.terminal[rows] = False

    def _refill(self, rows: np.ndarray) -> None:
        self.aliens[rows] = self._WAVE
        self.aliens_left[rows] = 24

    def act(self, actions: np.ndarray, random: RandomStreams) -> np.ndarray:
        fires = np.flatnonzero((actions == _FIRE) & (self.shot_timer == 0))
        self.shot_timer[fires] = self._SHOT_COOL_DOWN
        self.cannon[:] = _COLUMN_AFTER[actions, self.cannon]

        self.bullets[:, :90] = self.bullets[:, 10:]
        self.bullets[:, 90:] = False
        self.bullets[fires, 80 + self.cannon[fires]] = True  # it has moved once already
        self.enemy_bullets[:, 10:] = self.enemy_bullets[:, :90]
        self.enemy_bullets[:, :10] = False
        cells = self._last_row + self.cannon
        self.terminal |= self.enemy_bullets.reshape(-1)[cells]
        self.terminal |= self.aliens.reshape(-1)[cells]
        moving = np.flatnonzero(self.move_timer == 0)
        if len(moving):
            self._move_aliens(moving)
        shooting = np.flatnonzero(self.enemy_shot_timer == 0)
        if len(shooting):
            self._shoot_back(shooting)
        rewards = np.zeros(len(actions), np.float32)
        hits = np.flatnonzero(self.aliens & self.bullets)
        if len(hits):
            self.aliens.reshape(-1)[hits] = False
            self.bullets.reshape(-1)[hits] = False
            killed = np.bincount(hits // 100, minlength=len(actions))
            self.aliens_left -= killed
            rewards += killed

        self.shot_timer -= self.shot_timer > 0
        self.move_timer -= 1
        self.enemy_shot_timer -= 1
        if len(hits):
            cleared = np.flatnonzero(self.aliens_left == 0)
            if self._ramping:
                self.move_interval[cleared] = np.maximum(self.move_interval[cleared] - 1, 6)
            self._refill(cleared)
        return rewards

    def _move_aliens(self, rows: np.ndarray) -> None:
        """One column on, or where one of them is at the edge: one row down, and back from there."""
        self.move_timer[rows] = np.minimum(self.aliens_left[rows], self.move_interval[rows])
        aliens = self.aliens[rows].reshape(-1, 10, 10)
        moved = np.empty_like(aliens)
        direction = self.direction[rows]
        left = direction < 0
        turns = np.where(left, aliens[:, :, 0].any(1), aliens[:, :, 9].any(1))
        self.terminal[rows] |= turns & aliens[:, 9].any(1)
        self.direction[rows] = np.where(turns, -direction, direction)
        moved[:, :, :9] = aliens[:, :, 1:]  # left; nothing is at the edge where they do not turn
        moved[:, :, 9] = False
        right = ~left
        moved[right, :, 1:] = aliens[right, :, :9]
        moved[right, :, 0] = False
        moved[turns, 1:] = aliens[turns, :9]
        moved[turns, 0] = aliens[turns, 9]
        self.aliens[rows] = moved.reshape(-1, 100)
        self.terminal[rows] |= self.aliens[rows, 90 + self.cannon[rows]]

    def _shoot_back(self, rows: np.ndarray) -> None:
        self.enemy_shot_timer[rows] = self._ENEMY_SHOT_INTERVAL
        aliens = self.aliens[rows].reshape(-1, 10, 10)
        column = np.where(aliens.any(1), self._SEARCH_ORDER[self.cannon[rows]], 99).argmin(1)
        lowest = 9 - aliens[np.arange(len(rows)), ::-1, column].argmax(1)
        self.enemy_bullets[rows, lowest * 10 + column] = True

    def planes(self, rows: Rows) -> np.ndarray:
        cannon, aliens = self.cannon[rows], self.aliens[rows]
        planes, flat, first = _canvas(len(cannon), self.channels)
        flat[first + (90 + cannon) * 6] = True
        left = (self.direction[rows] < 0)[:, None]
        planes[:, :, 1] = aliens
        np.logical_and(aliens, left, out=planes[:, :, 2])
        np.logical_and(aliens, ~left, out=planes[:, :, 3])
        planes[:, :, 4] = self.bullets[rows]
        planes[:, :, 5] = self.enemy_bullets[rows]
        return planes.reshape(-1, 10, 10, self.channels)


class Freeway:
    """Planes: chicken, cars, and behind each car its trail, in the plane of its speed: a move every 1..5 steps."""

    channels: ClassVar[int] = 7
    minimal_actions: ClassVar[tuple[int, ...]] = (0, _UP, _DOWN)

    _MOVE_INTERVAL = 3
    _TIME_LIMIT = 2500
    _WRAPPED = np.array([9, *range(10), 0])  # a column, counted from -1
    _ROW_AFTER = _after(_UP, _DOWN, 0, 9)

    def __init__(self, num_envs: int, ramping: bool) -> None:  # the game does not ramp
        self.chicken = np.zeros(num_envs, np.int64)  # its row
        self.move_timer = np.zeros(num_envs, np.int64)
        self.steps_left = np.zeros(num_envs, np.int64)
        # Eight cars, in rows 1 to 8.
        self.x = np.zeros((num_envs, 8), np.int64)
        self.timer = np.zeros((num_envs, 8), np.int64)
        self.interval = np.zeros((num_envs, 8), np.int64)  # 1..5
        self.direction = np.zeros((num_envs, 8), np.int64)  # -1 or 1
        self.terminal = np.zeros(num_envs, np.bool_)
        self.arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        self._copies = np.arange(num_envs)

    def begin(self, rows: np.ndarray, random: RandomStreams) -> None:
        self._change_cars(rows, random)
        self.x[rows] = 0
        self.chicken[rows] = 9
        self.move_timer[rows] = self._MOVE_INTERVAL
        self.steps_left[rows] = self._TIME_LIMIT
        self.terminal[rows] = False

    def _change_cars(self, rows: np.ndarray, random: RandomStreams) -> None:
        uniforms = random.draw(rows, 16)
        self.interval[rows] = self.timer[rows] = 1 + (uniforms[:, :8] * 5).astype(np.int64)
        self.direction[rows] = np.where(uniforms[:, 8:] < 0.5, -1, 1)

    def act(self, actions: np.ndarray, random: RandomStreams) -> np.ndarray:
        walks = (self.move_timer == 0) & ((actions == _UP) | (actions == _DOWN))
        np.copyto(self.move_timer, self._MOVE_INTERVAL, where=walks)
        np.copyto(self.chicken, self._ROW_AFTER[actions, self.chicken], where=walks)
        wins = self.chicken == 0
        if wins.any():
            self._change_cars(np.flatnonzero(wins), random)
            self.chicken[wins] = 9

        # Only the car in the chicken's row can meet it, before or after it moves.
        car = self._copies * 8 + np.minimum(self.chicken, 8) - 1
        before = self.x.reshape(-1)[car]
        moving = self.timer == 0
        self.timer -= 1
        np.copyto(self.timer, self.interval, where=moving)
        self.x[:] = self._WRAPPED[self.x + 1 + moving * self.direction]
        met = ((before == 4) | (self.x.reshape(-1)[car] == 4)) & (self.chicken < 9)
        np.copyto(self.chicken, 9, where=met)

        self.move_timer -= self.move_timer > 0
        self.steps_left -= 1
        self.terminal |= self.steps_left < 0
        return wins.astype(np.float32)

    def planes(self, rows: Rows) -> np.ndarray:
        chicken, x = self.chicken[rows], self.x[rows]
        planes, flat, first = _canvas(len(chicken), self.channels)
        flat[first + (chicken * 10 + 4) * 7] = True
        lanes = first[:, None] + np.arange(1, 9) * 70
        flat[lanes + x * 7 + 1] = True
        behind = self._WRAPPED[x + 1 - self.direction[rows]]
        flat[lanes + behind * 7 + 1 + self.interval[rows]] = True
        return planes.reshape(-1, 10, 10, self.channels)


class Asterix:
    """Planes: player, enemies, where enemies and gold come from, gold."""

    channels: ClassVar[int] = 4
    minimal_actions: ClassVar[tuple[int, ...]] = (0, _LEFT, _UP, _RIGHT, _DOWN)

    _RAMP_INTERVAL = 100
    _SPAWN_INTERVAL = 10
    _MOVE_INTERVAL = 5
    _NONE, _ENEMY, _GOLD = 0, 1, 3  # the kinds; also their planes
    _ROW_AFTER = _after(_UP, _DOWN, 1, 8)

    def __init__(self, num_envs: int, ramping: bool) -> None:
        self._ramping = ramping
        self.x = np.zeros(num_envs, np.int64)
        self.y = np.zeros(num_envs, np.int64)
        self.spawn_interval = np.zeros(num_envs, np.int64)
        self.spawn_timer = np.zeros(num_envs, np.int64)
        self.move_interval = np.zeros(num_envs, np.int64)
        self.move_timer = np.zeros(num_envs, np.int64)
        self.ramp_timer = np.zeros(num_envs, np.int64)
        self.ramps = np.zeros(num_envs, np.int64)
        # Eight places for enemies and gold, in rows 1 to 8.
        self.kind = np.zeros((num_envs, 8), np.int64)
        self.entity_x = np.zeros((num_envs, 8), np.int64)
        self.direction = np.zeros((num_envs, 8), np.int64)  # -1 or 1
        self.terminal = np.zeros(num_envs, np.bool_)
        self.arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        self._places = np.arange(num_envs) * 8

    def begin(self, rows: np.ndarray, random: RandomStreams) -> None:
        self.x[rows] = self.y[rows] = 5
        self.spawn_interval[rows] = self.spawn_timer[rows] = self._SPAWN_INTERVAL
        self.move_interval[rows] = self.move_timer[rows] = self._MOVE_INTERVAL
        self.ramp_timer[rows] = self._RAMP_INTERVAL
        self.ramps[rows] = 0
        self.kind[rows] = self._NONE
        self.terminal[rows] = False

    def act(self, actions: np.ndarray, random: RandomStreams) -> np.ndarray:
        spawning = np.flatnonzero(self.spawn_timer == 0)
        if len(spawning):
            self._spawn(spawning, random)
        self.x[:] = _COLUMN_AFTER[actions, self.x]
        self.y[:] = self._ROW_AFTER[actions, self.y]

        place = self._places + self.y - 1
        rewards = self._meet(place)
        moves = self.move_timer == 0
        np.copyto(self.move_timer, self.move_interval, where=moves)
        self.entity_x += self.direction * moves[:, None]
        np.copyto(self.kind, self._NONE, where=(self.entity_x < 0) | (self.entity_x > 9))
        # Where nothing moved, what was met is gold, gone by now, or an enemy, and the end is the same.
        rewards += self._meet(place)

        self.spawn_timer -= 1
        self.move_timer -= 1
        if self._ramping:
            self._ramp()
        return rewards

    def _meet(self, place: np.ndarray) -> np.ndarray:
        kind = self.kind.reshape(-1)[place]
        met = self.entity_x.reshape(-1)[place] == self.x
        gold = met & (kind == self._GOLD)
        self.terminal |= met & (kind == self._ENEMY)
        self.kind.reshape(-1)[place[gold]] = self._NONE
        return gold.astype(np.float32)

    def _spawn(self, rows: np.ndarray, random: RandomStreams) -> None:
        self.spawn_timer[rows] = self.spawn_interval[rows]
        uniforms = random.draw(rows, 2)
        free = self.kind[rows] == self._NONE
        number_free = free.sum(1)
        found = np.flatnonzero(number_free)
        rows, uniforms, free = rows[found], uniforms[found], free[found]
        chosen = (random.draw(rows, 1)[:, 0] * number_free[found]).astype(np.int64)
        place = (free.cumsum(1) == chosen[:, None] + 1).argmax(1)
        rightwards = uniforms[:, 0] < 1 / 2
        self.entity_x[rows, place] = np.where(rightwards, 0, 9)
        self.direction[rows, place] = np.where(rightwards, 1, -1)
        self.kind[rows, place] = np.where(uniforms[:, 1] < 1 / 3, self._GOLD, self._ENEMY)

    def _ramp(self) -> None:
        active = (self.spawn_interval > 1) | (self.move_interval > 1)
        due = active & (self.ramp_timer < 0)
        self.ramp_timer -= active
        if due.any():
            rows = np.flatnonzero(due)
            move_interval = self.move_interval[rows]
            self.move_interval[rows] -= (move_interval > 1) & (self.ramps[rows] % 2 == 1)
            self.spawn_interval[rows] = np.maximum(self.spawn_interval[rows] - 1, 1)
            self.ramps[rows] += 1
            self.ramp_timer[rows] = self._RAMP_INTERVAL

    def planes(self, rows: Rows) -> np.ndarray:
        x, kind, direction = self.x[rows], self.kind[rows], self.direction[rows]
        planes, flat, first = _canvas(len(x), self.channels)
        flat[first + (self.y[rows] * 10 + x) * 4] = True
        present = kind != self._NONE
        entity_x = self.entity_x[rows]
        lanes = first[:, None] + np.arange(1, 9) * 40
        flat[(lanes + entity_x * 4 + kind)[present]] = True
        behind = entity_x - direction
        trails = present & (behind >= 0) & (behind <= 9)
        flat[(lanes + behind * 4 + 2)[trails]] = True
        return planes.reshape(-1, 10, 10, self.channels)


class Seaquest:
    """Planes: submarine, its back, own bullets, trails, enemy bullets, fish, enemy submarines, oxygen, rescued, divers.

    The sea's cells are counted in 10 rows of 12 columns, one outside the screen on either side. What swims is kept in
    ``cell``, ``direction`` and ``kind``: two bullets of our own, two divers, and the enemies in the order in which they
    came, with gaps where one is gone; the package's rules depend on that order.
    """

    channels: ClassVar[int] = 10
    minimal_actions: ClassVar[tuple[int, ...]] = (0, _LEFT, _UP, _RIGHT, _DOWN, _FIRE)

    _OXYGEN = 200
    _SPAWN_INTERVAL = 20
    _DIVER_INTERVAL = 30
    _MOVE_INTERVAL = 5
    _DIVER_MOVE_INTERVAL = 5
    _SHOT_COOL_DOWN = 5
    _ENEMY_SHOT_INTERVAL = 10
    _BULLET, _TRAIL, _ENEMY_BULLET, _FISH, _SUBMARINE, _DIVER = 2, 3, 4, 5, 6, 9  # kinds, also planes

    # There are never more than two bullets or divers: the newer is the second, whether there is a first or not. At the
    # fastest an enemy comes every step and stays for 30; a few slower ones may still be there.
    _ENEMIES = 40
    # Cells for what is gone: outside, as are their neighbours, and two of them, so that nothing gone meets another.
    _GONE, _ENEMY_GONE = 121, 124
    _NOWHERE = np.array([_GONE] * 4 + [_ENEMY_GONE] * _ENEMIES)
    _ROWS, _COLUMNS = np.divmod(np.arange(126), 12)
    _OUTSIDE = (_COLUMNS == 0) | (_COLUMNS == 11) | (_ROWS >= 10)
    _IN_PLANES = np.where(_OUTSIDE, 2**40, (_ROWS * 10 + _COLUMNS - 1) * 10)  # outside: beyond all planes
    _CELL_AFTER = (
        12 * _after(_UP, _DOWN, 0, 8)[:, _ROWS % 10] + _COLUMN_AFTER[:, _COLUMNS.clip(1, 10) - 1] + 1
    )
    _NEVER = -1  # a timer that only falls
    _OXYGEN_GAUGE = np.arange(10) < np.arange(11)[:, None]
    _RESCUED_GAUGE = np.arange(9) >= 9 - np.arange(7)[:, None]

    def __init__(self, num_envs: int, ramping: bool) -> None:
        self._ramping = ramping
        (
            self.here,  # the submarine's cell
            self.facing,  # -1 or 1, as all directions
            self.oxygen,
            self.rescued,  # below 0 after six were brought up: a quirk of the package
            self.spawn_interval,
            self.move_interval,
            self.ramps,
            self.enemies,  # that have a place, gaps included
            self.spawn_timer,
            self.diver_timer,
            self.shot_timer,
        ) = self._numbers = np.zeros((11, num_envs), np.int64)
        self._timers = self._numbers[8:]
        self._start = np.array(
            [
                *(6, -1, self._OXYGEN, 0, self._SPAWN_INTERVAL, self._MOVE_INTERVAL, 0, 0),
                *(self._SPAWN_INTERVAL, self._DIVER_INTERVAL, 0),
            ]
        )[:, None]
        self.surfaced = np.zeros(num_envs, np.bool_)
        self.terminal = np.zeros(num_envs, np.bool_)
        self.cell, self.direction, self.kind = np.zeros((3, num_envs, 4 + self._ENEMIES), np.int64)
        self.kind[:, :4] = self._BULLET, self._BULLET, self._DIVER, self._DIVER
        self._bullet, self._diver, self._enemy = self.cell[:, :2], self.cell[:, 2:4], self.cell[:, 4:]
        self.diver_move_timer = np.zeros((num_envs, 2), np.int64)
        self.enemy_move_timer, self.enemy_shot_timer = np.zeros((2, num_envs, self._ENEMIES), np.int64)
        self._enemy_bullets = np.zeros((2, num_envs, 120), np.bool_)
        self.leftward_bullets, self.rightward_bullets = self._enemy_bullets
        self.arrays = {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray) and not name.startswith("_")
        }
        # Where in ``_enemy_bullets`` is what touches cell 0, after it has moved: there now, or there before.
        offsets = np.array([0, -1, num_envs * 120, num_envs * 120 + 1])
        self._touching = offsets[:, None] + np.arange(num_envs) * 120

    def begin(self, rows: np.ndarray, random: RandomStreams) -> None:
        self._numbers[:, rows] = self._start
        self.surfaced[rows] = True
        self.terminal[rows] = False
        self.cell[rows] = self._NOWHERE
        self._enemy_bullets[:, rows] = False

    def act(self, actions: np.ndarray, random: RandomStreams) -> np.ndarray:
        spawning = np.flatnonzero(self.spawn_timer == 0)
        if len(spawning):
            self._spawn_enemies(spawning, random)
        spawning = np.flatnonzero(self.diver_timer == 0)
        if len(spawning):
            self._spawn_divers(spawning, random)

        fires = np.flatnonzero((actions == _FIRE) & (self.shot_timer == 0))
        if len(fires):
            self.shot_timer[fires] = self._SHOT_COOL_DOWN
            self._make_room(fires, 1)
            self.cell[fires, 1] = self.here[fires]
            self.direction[fires, 1] = self.facing[fires]
        np.copyto(self.facing, actions - 2, where=(actions == _LEFT) | (actions == _RIGHT))
        self.here[:] = self._CELL_AFTER[actions, self.here]

        width = int(self.enemies.max())
        rewards = np.zeros(len(actions), np.float32)
        self._move_bullets(width, rewards)
        if (self.rescued == 5).any():  # there may be room for one of two: the newer is first
            self._move_divers(slice(1, 2))
            self._move_divers(slice(0, 1))
        else:
            self._move_divers(slice(0, 2))
        self._move_enemies(width, rewards)
        self._move_enemy_bullets()
        swimming = self.cell[:, : 4 + width]
        np.copyto(swimming, self._NOWHERE[: 4 + width], where=self._OUTSIDE[swimming])

        self._timers -= self._timers > 0
        self.terminal |= self.oxygen <= 0
        shallow = self.here < 12
        self.oxygen -= ~shallow
        surfacing = np.flatnonzero(shallow & ~self.surfaced)
        self.surfaced &= shallow
        if len(surfacing):
            self._surface(surfacing, rewards)
        return rewards

    def _make_room(self, rows: np.ndarray, newer: int) -> None:
        """For a new bullet or diver: the newer one, where there is one, becomes the older."""
        rows = rows[self.cell[rows, newer] != self._GONE]
        if len(rows):
            self.cell[rows, newer - 1] = self.cell[rows, newer]
            self.direction[rows, newer - 1] = self.direction[rows, newer]

    def _spawn_enemies(self, rows: np.ndarray, random: RandomStreams) -> None:
        self.spawn_timer[rows] = self.spawn_interval[rows]
        uniforms = random.draw(rows, 3)
        direction = np.where(uniforms[:, 0] < 1 / 2, 1, -1)
        kind = np.where(uniforms[:, 1] < 1 / 3, self._SUBMARINE, self._FISH)
        y = 1 + (uniforms[:, 2] * 8).astype(np.int64)
        # None comes into a row where others swim the other way.
        width = 4 + int(self.enemies.max())
        blocked = self._ROWS[self.cell[rows, 4:width]] == y[:, None]
        blocked &= self.direction[rows, 4:width] != direction[:, None]
        blocked_rows = blocked.any(1)
        if blocked_rows.any():
            free = ~blocked_rows
            rows, direction, kind, y = rows[free], direction[free], kind[free], y[free]
        full = rows[self.enemies[rows] % 12 == 11]
        if len(full):
            self._close_gaps(full)
        place = self.enemies[rows]
        self.cell[rows, 4 + place] = y * 12 + np.where(direction > 0, 1, 10)
        self.direction[rows, 4 + place] = direction
        self.kind[rows, 4 + place] = kind
        self.enemy_move_timer[rows, place] = self.move_interval[rows]
        self.enemy_shot_timer[rows, place] = np.where(
            kind == self._SUBMARINE, self._ENEMY_SHOT_INTERVAL, self._NEVER
        )
        self.enemies[rows] += 1

    def _close_gaps(self, rows: np.ndarray) -> None:
        gone = self._enemy[rows] == self._ENEMY_GONE
        order = np.argsort(gone, axis=1, kind="stable")
        for values in (self.cell[:, 4:], self.direction[:, 4:], self.kind[:, 4:]):
            values[rows] = values[rows[:, None], order]
        for values in (self.enemy_move_timer, self.enemy_shot_timer):
            values[rows] = values[rows[:, None], order]
        self.enemies[rows] = self._ENEMIES - gone.sum(1)

    def _spawn_divers(self, rows: np.ndarray, random: RandomStreams) -> None:
        self.diver_timer[rows] = self._DIVER_INTERVAL
        uniforms = random.draw(rows, 2)
        rightwards = uniforms[:, 0] < 1 / 2
        y = 1 + (uniforms[:, 1] * 8).astype(np.int64)
        self._make_room(rows, 3)
        self.diver_move_timer[rows, 0] = self.diver_move_timer[rows, 1]
        self.cell[rows, 3] = y * 12 + np.where(rightwards, 1, 10)
        self.direction[rows, 3] = np.where(rightwards, 1, -1)
        self.diver_move_timer[rows, 1] = self._DIVER_MOVE_INTERVAL

    def _move_bullets(self, width: int, rewards: np.ndarray) -> None:
        """Each hits the oldest fish where it comes, else the oldest submarine."""
        bullet, enemy = self._bullet, self._enemy[:, :width]
        bullet += self.direction[:, :2]
        for newer in (1, 0):
            met = enemy == bullet[:, newer : newer + 1]
            if met.any():
                rows = np.flatnonzero(met.any(1))
                rank = np.arange(width) + width * self.kind[rows, 4 : 4 + width]
                hit = np.where(met[rows], rank, 9 * width).argmin(1)
                enemy[rows, hit] = self._ENEMY_GONE
                bullet[rows, newer] = self._GONE
                rewards[rows] += 1

    def _move_divers(self, which: slice) -> None:
        diver, timer = self._diver[:, which], self.diver_move_timer[:, which]
        here, has_room = self.here[:, None], (self.rescued < 6)[:, None]
        picked = (diver == here) & has_room
        moving = (timer == 0) & ~picked
        timer -= 1
        np.copyto(timer, self._DIVER_MOVE_INTERVAL, where=moving)
        diver += self.direction[:, 2:4][:, which] * moving
        picked |= (diver == here) & has_room
        if picked.any():
            self.rescued += picked.sum(1)
            np.copyto(diver, self._GONE, where=picked)

    def _move_enemies(self, width: int, rewards: np.ndarray) -> None:
        enemy, timer = self._enemy[:, :width], self.enemy_move_timer[:, :width]
        shot_timer, direction = self.enemy_shot_timer[:, :width], self.direction[:, 4 : 4 + width]
        was_here = enemy == self.here[:, None]
        moving = timer == 0
        timer -= 1
        np.copyto(timer, self.move_interval[:, None], where=moving)
        enemy += direction * moving
        is_here = enemy == self.here[:, None]
        self.terminal |= (was_here | is_here).any(1)

        shooting = shot_timer == 0
        shot_timer -= 1
        if (
            shooting.any()
        ):  # even those that meet a bullet below, and in the package those that leave the screen
            shot_timer[shooting] = self._ENEMY_SHOT_INTERVAL
            rows, places = np.nonzero(shooting & ~self._OUTSIDE[enemy])
            self._enemy_bullets[(direction[rows, places] > 0).astype(np.int64), rows, enemy[rows, places]] = (
                True
            )

        met = (enemy == self._bullet[:, :1]) | (enemy == self._bullet[:, 1:])
        if met.any():
            self._meet_bullets(met & ~is_here & ~self._OUTSIDE[enemy], width, rewards)

    def _meet_bullets(self, met: np.ndarray, width: int, rewards: np.ndarray) -> None:
        """Enemies ran into bullets, ``met``: of each bullet it is a submarine before a fish, and the newest."""
        bullet, enemy = self._bullet, self._enemy[:, :width]
        rows = np.flatnonzero(met.any(1))
        while len(rows):  # twice at most: there are two bullets
            # The package takes off its list the first that equals this one. It is this one: another in the same place
            # had its move behind it, and the bullet, coming there, would have hit it already.
            rank = np.arange(width) + width * self.kind[rows, 4 : 4 + width]
            hit = np.where(met[rows], rank, 0).argmax(1)
            which = (bullet[rows, 0] != enemy[rows, hit]).astype(np.int64)
            bullet[rows, which] = self._GONE
            enemy[rows, hit] = self._ENEMY_GONE
            rewards[rows] += 1
            met[rows] &= (enemy[rows] == bullet[rows, :1]) | (enemy[rows] == bullet[rows, 1:])
            rows = rows[met[rows].any(1)]

    def _move_enemy_bullets(self) -> None:
        left, right = self._enemy_bullets
        left[:, :-1] = left[:, 1:]
        right[:, 1:] = right[:, :-1]
        self.terminal |= self._enemy_bullets.reshape(-1)[self._touching + self.here].any(0)
        self._enemy_bullets[:, :, 0::12] = False
        self._enemy_bullets[:, :, 11::12] = False

    def _surface(self, rows: np.ndarray, rewards: np.ndarray) -> None:
        empty = self.rescued[rows] == 0
        self.terminal[rows[empty]] = True
        rows = rows[~empty]
        if not len(rows):
            return
        self.surfaced[rows] = True
        full = rows[self.rescued[rows] == 6]
        rewards[full] += self.oxygen[full] * 10 // self._OXYGEN
        self.rescued[full] = 0
        self.rescued[rows] -= 1
        self.oxygen[rows] = self._OXYGEN
        if self._ramping:
            move_interval, spawn_interval = self.move_interval[rows], self.spawn_interval[rows]
            self.move_interval[rows] -= (move_interval > 2) & (self.ramps[rows] % 2 == 1)
            self.spawn_interval[rows] -= spawn_interval > 1
            self.ramps[rows] += (move_interval > 2) | (spawn_interval > 1)

    def planes(self, rows: Rows) -> np.ndarray:
        here, width = self.here[rows], 4 + int(self.enemies.max())
        planes, flat, first = _canvas(len(here), self.channels)
        planes[:, 90:, 7] = self._OXYGEN_GAUGE[np.maximum(self.oxygen[rows], 0) * 10 // self._OXYGEN]
        planes[:, 90:99, 8] = self._RESCUED_GAUGE[np.maximum(self.rescued[rows], 0)]
        enemy_bullets = self.leftward_bullets[rows] | self.rightward_bullets[rows]
        planes.reshape(-1, 10, 10, 10)[..., self._ENEMY_BULLET] = enemy_bullets.reshape(-1, 10, 12)[
            :, :, 1:11
        ]

        flat[first + self._IN_PLANES[here]] = True
        flat[first + self._IN_PLANES[here - self.facing[rows]] + 1] = True
        first = first[:, None]
        cell, nothing = self.cell[rows, :width], len(flat) - 1
        # The very last place, where no diver ever is, takes what is outside.
        flat[np.minimum(self._IN_PLANES[cell] + (first + self.kind[rows, :width]), nothing)] = True
        behind = (cell - self.direction[rows, :width])[:, 2:]
        flat[np.minimum(self._IN_PLANES[behind] + (first + self._TRAIL), nothing)] = True
        flat[nothing:] = False
        return planes.reshape(-1, 10, 10, self.channels)


GAMES: dict[str, type[BatchedGame]] = {
    "asterix": Asterix,
    "breakout": Breakout,
    "freeway": Freeway,
    "seaquest": Seaquest,
    "space_invaders": SpaceInvaders,
}
