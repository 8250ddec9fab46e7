"""MinAtar (Young & Tian 2019, arXiv:1903.03176) as a Gymnasium environment and as a vector of copies.

One copy is the ``minatar`` package's own game; a vector is ``stillhouse.envs.minatar_batched``, the same rules for many
copies at once. 10x10 boolean planes, sticky actions 0.1, difficulty ramping on. The package registers nothing by itself;
``stillhouse.envs.variants`` registers ``MinAtar/<Game>-v0`` (6 actions) and ``-v1`` (the minimal action set), as the
package's ``register_envs`` would.

Variants for transfer: the planes flipped, and the planes permuted.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from stillhouse.envs.minatar_batched import ALL, GAMES, RandomStreams

FLIPS = {"none": (1, 1), "horizontal": (1, -1), "vertical": (-1, 1), "both": (-1, -1)}


class _View:
    """What every copy of a game shares: the action set, the observation space and how planes are shown."""

    def __init__(self, game: str, use_minimal_action_set: bool, flip: str, permutation: list[int]) -> None:
        rules = GAMES[game]
        channels = rules.channels
        if flip not in FLIPS:
            raise ValueError(f"flip is one of {', '.join(FLIPS)}, not {flip!r}")
        if permutation and sorted(permutation) != list(range(channels)):
            raise ValueError(f"permutation must hold each of 0..{channels - 1} once, not {permutation}")
        self.actions = np.asarray(rules.minimal_actions if use_minimal_action_set else range(6))
        self.rows, self.columns = FLIPS[flip]
        self.permutation = permutation or None
        self.observation_space = gymnasium.spaces.Box(0, 1, (10, 10, channels), np.bool_)  # type: ignore[arg-type] # its stub knows float32 only
        self.action_space = gymnasium.spaces.Discrete(len(self.actions))

    def __call__(self, planes: np.ndarray) -> np.ndarray:
        """Planes of the game, bool [..., 10, 10, C], as this variant shows them."""
        planes = planes[..., :: self.rows, :: self.columns, :]
        return planes if self.permutation is None else planes[..., self.permutation]


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
        flip: str = "none",
        permutation: list[int] | None = None,
    ) -> None:
        self.render_mode = render_mode
        self._view = _View(game, use_minimal_action_set, flip, permutation or [])
        # Imported when made: no stage that plays the vector need wait for the package.
        self.game = _import_minatar().Environment(game, sticky_action_prob, difficulty_ramping)
        self.observation_space = self._view.observation_space
        self.action_space = self._view.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.game.seed(seed % 2**32)  # NumPy's legacy generator takes 32 bits
        self.game.last_action = 0  # which the package keeps: an episode would depend on the one before it
        self.game.reset()
        return self._view(self.game.state()), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward, terminated = self.game.act(self._view.actions[action])
        return self._view(self.game.state()), float(reward), bool(terminated), False, {}

    def render(self) -> np.ndarray | None:
        """The planes in the package's colours, uint8 [10, 10, 3]."""
        if self.render_mode is None:
            return None
        planes = self._view(self.game.state())
        channels = planes.shape[2]
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
        flip: str = "none",
        permutation: list[int] | None = None,
    ) -> None:
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.sticky_action_prob = sticky_action_prob
        self._view = _View(game, use_minimal_action_set, flip, permutation or [])
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
        everyone = np.arange(num_envs)
        self.random.seed(everyone, np.random.default_rng().integers(2**32, size=num_envs))
        self.game.begin(everyone, self.random)
        self._observations = self._show(ALL)

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
        self.game.begin(rows, self.random)
        self._last_actions[rows] = 0
        self._steps[rows] = 0
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
        self._observations = self._show(ALL)
        return self._observations, rewards, self.game.terminal.copy(), truncated, {}

    def _show(self, rows: np.ndarray | slice) -> np.ndarray:
        return np.ascontiguousarray(self._view(self.game.planes(rows)))

    def get_state(self) -> dict[str, Any]:
        """Everything the games hold: exact continuation without replaying."""
        return {name: value.copy() for name, value in self._arrays.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        for name, value in self._arrays.items():
            value[...] = state[name]
        self._observations = self._show(ALL)
