"""Registered environments of ours: MinAtar, sparse mazes, and classic control with other physics.

``stillhouse/CartPole-v1`` and ``stillhouse/Acrobot-v1`` are Gymnasium's CartPole-v1 and Acrobot-v1 (same rewards, same
time limit) whose physical constants are options; with the default options they are the same environments.
"""

from __future__ import annotations

from typing import Any

import gymnasium
from gymnasium.envs.classic_control.acrobot import AcrobotEnv
from gymnasium.envs.classic_control.cartpole import CartPoleEnv, CartPoleVectorEnv

MINATAR_GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")


def _set_physics(env: Any, pole_length: float, gravity: float, force: float, pole_mass: float) -> None:
    """Set CartPole's constants; ``pole_length`` is the pole's half length, as in Gymnasium.

    Raises:
        ValueError: a constant is not above 0.
    """
    for name, value in (
        ("pole_length", pole_length),
        ("gravity", gravity),
        ("force", force),
        ("pole_mass", pole_mass),
    ):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, not {value}")
    env.gravity = gravity
    env.masspole = pole_mass
    env.total_mass = env.masspole + env.masscart
    env.length = pole_length
    env.polemass_length = env.masspole * env.length
    env.force_mag = force


class CartPolePhysicsEnv(CartPoleEnv):
    """CartPole with other physics: half pole length (m), gravity (m/s^2), push (N), pole mass (kg)."""

    def __init__(
        self,
        render_mode: str | None = None,
        pole_length: float = 0.5,
        gravity: float = 9.8,
        force: float = 10.0,
        pole_mass: float = 0.1,
    ) -> None:
        super().__init__(render_mode=render_mode)
        _set_physics(self, pole_length, gravity, force, pole_mass)


class CartPolePhysicsVectorEnv(CartPoleVectorEnv):
    """The vectorised form of :class:`CartPolePhysicsEnv`."""

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int = 500,
        render_mode: str | None = None,
        pole_length: float = 0.5,
        gravity: float = 9.8,
        force: float = 10.0,
        pole_mass: float = 0.1,
    ) -> None:
        super().__init__(num_envs, max_episode_steps, render_mode)
        _set_physics(self, pole_length, gravity, force, pole_mass)


class AcrobotPhysicsEnv(AcrobotEnv):
    """Acrobot with other link masses (kg) and lengths (m)."""

    def __init__(
        self,
        render_mode: str | None = None,
        mass_1: float = 1.0,
        mass_2: float = 1.0,
        length_1: float = 1.0,
    ) -> None:
        for name, value in (("mass_1", mass_1), ("mass_2", mass_2), ("length_1", length_1)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        super().__init__(render_mode=render_mode)
        # Instance attributes shadow the class constants that the dynamics read through self.
        self.LINK_MASS_1 = mass_1
        self.LINK_MASS_2 = mass_2
        self.LINK_LENGTH_1 = length_1
        self.LINK_COM_POS_1 = length_1 / 2


def _minatar(**options: Any) -> gymnasium.Env[Any, Any]:
    # Imported when made: other environments' stages need not know of it.
    from stillhouse.envs.minatar import MinAtarEnv

    return MinAtarEnv(**options)


def _minatar_vector(**options: Any) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    from stillhouse.envs.minatar import MinAtarVectorEnv

    return MinAtarVectorEnv(**options)


def _maze(**options: Any) -> gymnasium.Env[Any, Any]:
    from stillhouse.envs.mazes import MazeEnv

    return MazeEnv(**options)


def _maze_vector(**options: Any) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    from stillhouse.envs.mazes import MazeVectorEnv

    return MazeVectorEnv(**options)


def register() -> None:
    """Register our ids with Gymnasium, once."""
    if "stillhouse/CartPole-v1" in gymnasium.registry:
        return
    here = "stillhouse.envs.variants"
    gymnasium.register(
        "stillhouse/CartPole-v1",
        entry_point=f"{here}:CartPolePhysicsEnv",
        vector_entry_point=f"{here}:CartPolePhysicsVectorEnv",
        max_episode_steps=500,
        reward_threshold=475.0,
    )
    gymnasium.register(
        "stillhouse/Acrobot-v1",
        entry_point=f"{here}:AcrobotPhysicsEnv",
        max_episode_steps=500,
        reward_threshold=-100.0,
    )
    gymnasium.register(
        "stillhouse/Maze-v0", entry_point=_maze, vector_entry_point=_maze_vector, max_episode_steps=200
    )
    for game in MINATAR_GAMES:
        title = game.title().replace("_", "")
        for version, minimal in (("v0", False), ("v1", True)):
            gymnasium.register(
                f"MinAtar/{title}-{version}",
                entry_point=_minatar,
                vector_entry_point=_minatar_vector,
                # MinAtar's Freeway ends itself after 2,500 frames; the other games have no limit.
                kwargs={"game": game, "use_minimal_action_set": minimal},
            )
