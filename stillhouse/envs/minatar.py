"""MinAtar (Young & Tian 2019, arXiv:1903.03176) as a Gymnasium environment and as a vector of copies.

One copy is the ``minatar`` package's own game; a vector is ``stillhouse.envs.minatar_batched``, the same rules for many
copies at once. 10x10 boolean planes, sticky actions 0.1, difficulty ramping on. The package registers nothing by itself;
``stillhouse.envs.variants`` registers ``MinAtar/<Game>-v0`` (6 actions) and ``-v1`` (the minimal action set), as the
package's ``register_envs`` would.

Variants for transfer, after the Pong soup of Rusu et al. 2016 (arXiv:1606.04671): the same game with the same actions, seen
differently. The game's planes are put in the order of ``permute_planes``, then flipped, then shifted; then the noise plane
is appended, whole.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from stillhouse.envs.minatar_batched import ALL, GAMES, RandomStreams, Rows

FLIPS = {"": (1, 1), "horizontal": (1, -1), "vertical": (-1, 1), "both": (-1, -1)}
ACTIONS = ("none", "left", "up", "right", "down", "fire")


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(entry) is int for entry in value)


def _part(by: int) -> slice:
    """Of ten places those that a move ``by`` places leads to; those it comes from are ``_part(-by)``."""
    return slice(max(by, 0), 10 + min(by, 0))


class _View:
    """What every copy of a game shares: the actions, the spaces and how planes are shown.

    Raises:
        ValueError: an option that is not allowed, in one line.
    """

    def __init__(
        self,
        game: str,
        use_minimal_action_set: bool,
        flip: str,
        permute_planes: Sequence[int],
        shift: Sequence[int],
        noise_plane: bool,
    ) -> None:
        rules = GAMES[game]
        channels = rules.channels
        if flip not in list(FLIPS):  # a list: what is given may not be hashable
            raise ValueError(f"flip must be one of {', '.join(map(repr, FLIPS))}, not {flip!r}")
        if not _whole_numbers(permute_planes) or (
            permute_planes and sorted(permute_planes) != list(range(channels))
        ):
            raise ValueError(
                f"permute_planes must hold each of 0..{channels - 1} once, not {permute_planes!r}"
            )
        if not _whole_numbers(shift) or len(shift) != 2 or not all(-9 <= by <= 9 for by in shift):
            raise ValueError(f"shift must be [down, right], each a whole number in -9..9, not {shift!r}")
        if not isinstance(noise_plane, bool):
            raise ValueError(f"noise_plane must be true or false, not {noise_plane!r}")
        self.actions = np.asarray(rules.minimal_actions if use_minimal_action_set else range(6))
        self.order = list(permute_planes) or list(range(channels))
        self.observation_space = gymnasium.spaces.Box(0, 1, (10, 10, channels + noise_plane), np.bool_)  # type: ignore[arg-type] # its stub knows float32 only
        self.action_space = gymnasium.spaces.Discrete(len(self.actions))
        # Where each cell shown is taken from, counted over the game's planes and the noise after them: one gather for all
        # options. -1 is nowhere.
        plain = np.arange(100 * channels).reshape(10, 10, channels)
        rows, columns = FLIPS[flip]
        down, right = shift
        cells = np.full_like(plain, -1)
        cells[_part(down), _part(right)] = plain[::rows, ::columns, self.order][_part(-down), _part(-right)]
        if noise_plane:
            cells = np.concatenate([cells, 100 * channels + np.arange(100).reshape(10, 10, 1)], axis=2)
        self._cells = None if np.array_equal(cells, plain) else cells
        self._inside = cells >= 0

    def __call__(self, planes: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        """Planes of the game, bool [..., 10, 10, C], as this variant shows them, with the ``noise`` it has, bool [..., 100]."""
        if self._cells is None:
            return planes
        flat = planes.reshape(*planes.shape[:-3], 100 * planes.shape[-1])
        if noise is not None:
            flat = np.concatenate([flat, noise], axis=-1)
        return flat.take(self._cells, axis=-1) & self._inside


class _Noise:
    """A plane of fair random bits for each copy, on streams of its own: the game's random numbers stay what they are.

    Attributes:
        bits: bool [B, 100], as last drawn; part of a copy's state, for what is seen must come back with it.
    """

    def __init__(self, num_envs: int) -> None:
        self.random = RandomStreams(num_envs)
        self.bits = np.zeros((num_envs, 100), np.bool_)

    def seed(self, rows: np.ndarray, seeds: np.ndarray) -> None:
        """Begin new streams for ``rows``, from the seeds of their episodes, integers of at least 0 [K]."""
        self.random.seed(rows, ~seeds)  # below 0: no game's own seed

    def draw(self, rows: Rows) -> None:
        """New bits for ``rows``."""
        self.bits[rows] = self.random.draw(rows, 100) >= 0.5


class _SeabornWhenUsed(ModuleType):
    """Stands in for seaborn while the package is imported: it draws with it, but imports it, and with it pandas and half
    of SciPy, at once, which would cost two seconds."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("seaborn"), name)


def _import_minatar() -> Any:
    stand_in = _SeabornWhenUsed("seaborn")
    if sys.modules.setdefault("seaborn", stand_in) is not stand_in:
        return importlib.import_module("minatar")
    try:
        return importlib.import_module("minatar")
    finally:
        del sys.modules["seaborn"]


class MinAtarEnv(gymnasium.Env[np.ndarray, np.int64]):
    """One game, the package's own; observations bool [10, 10, C]."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(
        self,
        game: str,
        render_mode: str | None = None,
        use_minimal_action_set: bool = False,
        sticky_action_prob: float = 0.1,
        difficulty_ramping: bool = True,
        flip: str = "",
        permute_planes: Sequence[int] = (),
        shift: Sequence[int] = (0, 0),
        noise_plane: bool = False,
    ) -> None:
        self.render_mode = render_mode
        self._view = _View(game, use_minimal_action_set, flip, permute_planes, shift, noise_plane)
        # Imported when made: no stage that plays the vector need wait for the package.
        self.game = _import_minatar().Environment(game, sticky_action_prob, difficulty_ramping)
        self.observation_space = self._view.observation_space
        self.action_space = self._view.action_space
        channels = self.game.env.channels
        names = sorted(channels, key=channels.__getitem__)
        self.metadata = {
            **self.metadata,
            "observation_names": [*(names[plane] for plane in self._view.order), *["noise"] * noise_plane],
            "action_names": [ACTIONS[action] for action in self._view.actions],
        }
        self._noise = _Noise(1) if noise_plane else None
        self._seed_noise(int(np.random.default_rng().integers(2**32)))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.game.seed(seed % 2**32)  # NumPy's legacy generator takes 32 bits
            self._seed_noise(seed)
        self.game.last_action = 0  # which the package keeps: an episode would depend on the one before it
        self.game.reset()
        return self._observe(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward, terminated = self.game.act(self._view.actions[action])
        return self._observe(), float(reward), bool(terminated), False, {}

    def _observe(self) -> np.ndarray:
        if self._noise is not None:
            self._noise.draw(ALL)
        return self._shown()

    def _shown(self) -> np.ndarray:
        return self._view(self.game.state(), None if self._noise is None else self._noise.bits[0])

    def _seed_noise(self, seed: int) -> None:
        if self._noise is not None:
            self._noise.seed(np.arange(1), np.array([seed % 2**63]))

    def render(self) -> np.ndarray | None:
        """The planes in the package's colours, without the noise plane, uint8 [10, 10, 3]."""
        if self.render_mode is None:
            return None
        channels = self.game.n_channels
        planes = self._shown()[..., :channels]
        import seaborn

        palette = np.array([(0.0, 0.0, 0.0), *seaborn.color_palette("cubehelix", channels)])
        shown = np.amax(planes * (np.arange(channels) + 1), axis=2)
        return (palette[shown] * 255).astype(np.uint8)


class MinAtarVectorEnv(gymnasium.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """``num_envs`` copies of one game, stepped together by array operations.

    The copies are reset by the caller (autoreset ``DISABLED``; ``options["reset_mask"]`` and a seed per copy). An
    episode depends on its seed alone: not on its copy, nor on how many there are. The planes returned are never written
    to again.
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}

    def __init__(
        self,
        num_envs: int = 1,
        game: str = "breakout",
        max_episode_steps: int | None = None,
        use_minimal_action_set: bool = False,
        sticky_action_prob: float = 0.1,
        difficulty_ramping: bool = True,
        flip: str = "",
        permute_planes: Sequence[int] = (),
        shift: Sequence[int] = (0, 0),
        noise_plane: bool = False,
    ) -> None:
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.sticky_action_prob = sticky_action_prob
        self._view = _View(game, use_minimal_action_set, flip, permute_planes, shift, noise_plane)
        self.single_observation_space = self._view.observation_space
        self.single_action_space = self._view.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.game = GAMES[game](num_envs, difficulty_ramping)
        self.random = RandomStreams(num_envs)
        self._last_actions = np.zeros(num_envs, np.int64)
        self._steps = np.zeros(num_envs, np.int64)
        self._arrays = {
            **self.game.arrays,
            "random": self.random.counters,
            "last_actions": self._last_actions,
            "steps": self._steps,
        }
        self._noise = _Noise(num_envs) if noise_plane else None
        if self._noise is not None:
            self._arrays |= {"noise": self._noise.bits, "noise_random": self._noise.random.counters}
        everyone = np.arange(num_envs)
        self._seed(everyone, np.random.default_rng().integers(2**32, size=num_envs))
        self._begin(everyone)
        self._observations = self._show(ALL)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        mask = (options or {}).get("reset_mask")
        rows = np.arange(self.num_envs) if mask is None else np.flatnonzero(mask)
        if isinstance(seed, int):
            self._seed(rows, seed + rows)
        elif seed is not None:
            seeded = np.array([row for row in rows if seed[row] is not None], np.int64)
            self._seed(seeded, np.array([seed[row] for row in seeded], np.int64))
        self._begin(rows)
        observations = self._observations.copy()
        observations[rows] = self._show(rows)
        self._observations = observations
        return observations, {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        np.copyto(
            self._last_actions,
            self._view.actions[actions],
            where=self.random.draw_one() >= self.sticky_action_prob,
        )
        over = np.flatnonzero(self.game.terminal)
        kept = {name: value[over] for name, value in self._arrays.items()} if len(over) else {}
        rewards = self.game.act(self._last_actions, self.random)
        if len(over):  # a game that has ended stands still until it is reset
            for name, value in kept.items():
                self._arrays[name][over] = value
            rewards[over] = 0
        self._steps += 1
        if self.max_episode_steps is None:
            truncated = np.zeros(self.num_envs, np.bool_)
        else:
            truncated = self._steps >= self.max_episode_steps
        if self._noise is not None:
            self._noise.draw(ALL)
        self._observations = self._show(ALL)
        return self._observations, rewards, self.game.terminal.copy(), truncated, {}

    def _seed(self, rows: np.ndarray, seeds: np.ndarray) -> None:
        self.random.seed(rows, seeds)
        if self._noise is not None:
            self._noise.seed(rows, seeds)

    def _begin(self, rows: np.ndarray) -> None:
        self.game.begin(rows, self.random)
        self._last_actions[rows] = 0
        self._steps[rows] = 0
        if self._noise is not None:
            self._noise.draw(rows)

    def _show(self, rows: Rows) -> np.ndarray:
        noise = None if self._noise is None else self._noise.bits[rows]
        return self._view(self.game.planes(rows), noise)

    def get_state(self) -> dict[str, Any]:
        """Everything the games hold: exact continuation without replaying."""
        return {name: value.copy() for name, value in self._arrays.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        for name, value in self._arrays.items():
            value[...] = state[name]
        self._observations = self._show(ALL)
