"""Names of observation components and actions."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium
import minatar
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.names import action_names, component_names
from stillhouse.errors import StillhouseError

BREAKOUT = ["paddle", "ball", "trail", "brick"]


def names(identifier: str, **options: Any) -> tuple[list[str], list[str]]:
    config = EnvironmentConfig(id=identifier, options=options)
    return component_names(config), action_names(config)


def test_known_environments() -> None:
    cartpole = (["position", "velocity", "angle", "angular_velocity"], ["left", "right"])
    assert names("CartPole-v1") == cartpole
    assert names("stillhouse/CartPole-v1", pole_length=1.0) == cartpole
    acrobot = names("Acrobot-v1")
    assert acrobot == (
        ["cos_1", "sin_1", "cos_2", "sin_2", "velocity_1", "velocity_2"],
        ["negative_torque", "no_torque", "positive_torque"],
    )
    assert names("stillhouse/Acrobot-v1") == acrobot
    assert names("MountainCar-v0") == (["position", "velocity"], ["left", "none", "right"])


def test_lunar_lander(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in: the real one takes a physics engine."""

    class Lander(gymnasium.Env[Any, Any]):
        observation_space = spaces.Box(-1, 1, (8,), np.float32)
        action_space = spaces.Discrete(4)

    monkeypatch.setitem(gymnasium.registry, "LunarLander-v3", EnvSpec("LunarLander-v3", Lander))
    components, actions = names("LunarLander-v3")
    assert len(components) == 8 and components[6:] == ["left_leg", "right_leg"]
    assert actions == ["none", "left_engine", "main_engine", "right_engine"]


def declared(
    monkeypatch: pytest.MonkeyPatch, identifier: str, metadata: dict[str, Any], space: gymnasium.Space[Any]
) -> EnvironmentConfig:
    """An environment of a user's, with two actions."""

    class World(gymnasium.Env[Any, Any]):
        observation_space = space
        action_space = gymnasium.spaces.Discrete(2)

    World.metadata = {"render_modes": [], **metadata}
    monkeypatch.setitem(gymnasium.registry, identifier, EnvSpec(identifier, World))
    return EnvironmentConfig(id=identifier)


def test_minatar_by_the_packages_names() -> None:
    every = ["none", "left", "up", "right", "down", "fire"]
    assert [name[0] for name in every] == minatar.Environment("breakout").env.action_map
    assert names("MinAtar/Breakout-v0") == (BREAKOUT, every)
    assert names("MinAtar/Breakout-v1") == (BREAKOUT, ["none", "left", "right"])
    assert names("MinAtar/Freeway-v1")[1] == ["none", "up", "down"]
    assert names("MinAtar/Seaquest-v0")[0][7:] == [
        "oxygen_guage",
        "diver_guage",
        "diver",
    ]  # as it spells them


def test_minatar_variants_are_named_as_they_are_shown() -> None:
    shown = names("MinAtar/Breakout-v1", permute_planes=[3, 0, 2, 1], noise_plane=True, flip="both")[0]
    assert shown == ["brick", "paddle", "trail", "ball", "noise"]
    assert names("MinAtar/Breakout-v0", shift=[1, 0])[0] == BREAKOUT


def test_an_environment_that_is_not_known_has_no_names() -> None:
    assert names("FrozenLake-v1") == ([], [])


@pytest.mark.parametrize(
    ("space", "count"),
    [
        (spaces.Box(0, 1, (3,), np.float32), 3),
        (spaces.Discrete(5), 5),
        (spaces.Box(0, 1, (10, 10, 4), np.bool_), 4),  # type: ignore[arg-type] # its stub knows float32 only
        (spaces.Box(0, 255, (4, 84, 84), np.uint8), 4),
    ],
)
def test_an_environments_own_names_come_first(
    monkeypatch: pytest.MonkeyPatch, space: gymnasium.Space[Any], count: int
) -> None:
    own = [f"part_{number}" for number in range(count)]
    config = declared(
        monkeypatch, "CartPole-v1", {"observation_names": own, "action_names": ("a", "b")}, space
    )
    assert component_names(config) == own
    assert action_names(config) == ["a", "b"]


def test_known_names_that_do_not_fit_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    config = declared(monkeypatch, "CartPole-v1", {}, spaces.Box(0, 1, (3,), np.float32))
    assert component_names(config) == []
    assert action_names(config) == ["left", "right"]


def test_declared_names_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = {"observation_names": ["x", "y"], "action_names": ["a", "b", "c"]}
    config = declared(monkeypatch, "Mine/World-v0", metadata, spaces.Box(0, 1, (3,), np.float32))
    with pytest.raises(StillhouseError, match=r"Mine/World-v0.*observation_names.* 2 names where 3 are"):
        component_names(config)
    with pytest.raises(StillhouseError, match=r"Mine/World-v0.*action_names.* 3 names where 2 are"):
        action_names(config)


def test_declared_names_must_be_a_list_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = {"observation_names": "xyz", "action_names": [0, 1]}
    config = declared(monkeypatch, "Mine/World-v0", metadata, spaces.Box(0, 1, (3,), np.float32))
    with pytest.raises(StillhouseError, match="must be a list of words, not 'xyz'"):
        component_names(config)
    with pytest.raises(StillhouseError, match=r"must be a list of words, not \[0, 1\]"):
        action_names(config)


def test_names_of_other_environments_do_without_the_games_package() -> None:
    program = (
        "import sys; from stillhouse.envs.make import EnvironmentConfig; from stillhouse.envs.names import action_names;"
        "print(action_names(EnvironmentConfig(id='CartPole-v1')), 'minatar' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['left', 'right'] False"
