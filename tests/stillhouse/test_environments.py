"""Environments: ids, user modules, variants, spaces that are refused."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import minatar
import numpy as np
import pytest
from gymnasium import spaces

from stillhouse.envs.make import EnvironmentConfig, describe, make, make_vector
from stillhouse.errors import StillhouseError
from stillhouse.types import environment_spec


def refusal(config: EnvironmentConfig) -> str:
    with pytest.raises(StillhouseError) as caught:
        environment_spec(*describe(config), "here")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_id_names_near_ones() -> None:
    assert "'CartPole-v1'" in refusal(EnvironmentConfig(id="Cartpol-v1"))
    assert "MinAtar/Breakout-v0" in refusal(EnvironmentConfig(id="minatar/breakut-v0"))
    assert "CartPole-v1" in refusal(EnvironmentConfig(id="CartPole-v7"))


def test_unsupported_spaces_are_named_with_what_is_supported() -> None:
    continuous = refusal(EnvironmentConfig(id="Pendulum-v1"))
    assert "Box(-2.0, 2.0, (1,), float32)" in continuous and "Discrete" in continuous
    for space, adapter in (
        (spaces.Tuple([spaces.Discrete(2)]), "FlattenObservation"),
        (spaces.MultiBinary(3), "FlattenObservation"),
        (spaces.Box(0, 255, (8, 9), np.uint8), r"ReshapeObservation\(env, \(8, 9, 1\)\)"),
        (
            spaces.Box(0, 255, (8, 9, 3), np.float32),
            "DtypeObservation, else a vector with FlattenObservation",
        ),
        (spaces.Box(0, 1, (2, 2, 2), np.bool_), "FlattenObservation"),
        (spaces.Box(0, 1, (2, 9), np.float32), "FlattenObservation"),
        (spaces.Discrete(3, start=1), "subtract its start"),
        (spaces.Sequence(spaces.Discrete(2)), "of one fixed size"),
    ):
        with pytest.raises(
            StillhouseError, match=rf"^cards: .* there are adapters for .*{adapter}"
        ) as caught:
            environment_spec(space, spaces.Discrete(2), "cards")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "first"),
    [
        ((10, 10, 4), False),
        ((8, 8, 119), False),
        ((84, 84, 4), False),
        ((4, 84, 84), True),
        ((3, 210, 160), True),
        ((210, 160, 3), False),
        ((5, 5, 5), False),
    ],
)
def test_where_the_channels_are(shape: tuple[int, ...], first: bool) -> None:
    space = spaces.Box(0, 255, shape, np.uint8)
    assert environment_spec(space, spaces.Discrete(2), "x").observation.channels_first == first


def test_planes_too_small_for_a_convolution_are_refused() -> None:
    with pytest.raises(StillhouseError, match="sides of at least 3"):
        environment_spec(spaces.Box(0, 1, (2, 10, 4), np.bool_), spaces.Discrete(2), "x")
    with pytest.raises(StillhouseError, match="sides of at least 3"):
        environment_spec(spaces.Box(0, 1, (10, 2, 4), np.bool_), spaces.Discrete(2), "x")


def test_user_module_that_does_not_import() -> None:
    text = refusal(EnvironmentConfig(id="Mine-v0", module="no_such_module_of_mine"))
    assert "no_such_module_of_mine" in text and "does not import" in text


def test_user_module_registers_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_worlds.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "gymnasium.register('Mine/World-v0', entry_point=CartPoleEnv, max_episode_steps=10)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    observation, action = describe(EnvironmentConfig(id="Mine/World-v0", module="my_worlds"))
    assert observation.shape == (4,) and action == spaces.Discrete(2)


def test_wrong_option_is_one_line() -> None:
    assert "gravty" in refusal(EnvironmentConfig(id="stillhouse/CartPole-v1", options={"gravty": 1.0}))
    assert "above 0" in refusal(EnvironmentConfig(id="stillhouse/CartPole-v1", options={"pole_length": -1.0}))


def test_module_must_be_a_dotted_name() -> None:
    with pytest.raises(ValueError, match="dotted name"):
        EnvironmentConfig(id="X-v0", module="os; import sys")


@pytest.mark.parametrize("game", ["asterix", "breakout", "freeway", "seaquest", "space_invaders"])
def test_minatar_single_follows_the_package(game: str) -> None:
    """The same seed and actions give the package's own states, rewards and ends."""
    title = game.title().replace("_", "")
    config = EnvironmentConfig(id=f"MinAtar/{title}-v0")
    single = make(config)
    package = minatar.Environment(game)
    package.seed(5)
    package.reset()
    first, _ = single.reset(seed=5)
    np.testing.assert_array_equal(first, package.state())
    generator = np.random.default_rng(0)
    for _ in range(300):
        action = int(generator.integers(6))
        reward, ended = package.act(action)
        observation, single_reward, single_ended, _, _ = single.step(action)
        np.testing.assert_array_equal(observation, package.state())
        assert reward == single_reward and ended == single_ended
        if ended:
            package.last_action = 0  # the package keeps it; here an episode depends on its seed alone
            package.reset()
            single.reset()


def test_default_physics_are_gymnasiums() -> None:
    ours, theirs = (
        make_vector(EnvironmentConfig(id="stillhouse/CartPole-v1"), 3),
        gymnasium.make_vec("CartPole-v1", 3),
    )
    longer = make_vector(EnvironmentConfig(id="stillhouse/CartPole-v1", options={"pole_length": 1.0}), 3)
    for envs in (ours, theirs, longer):
        envs.reset(seed=3)
    actions = np.array([1, 0, 1])
    same, expected, other = (envs.step(actions)[0] for envs in (ours, theirs, longer))
    np.testing.assert_array_equal(same, expected)
    assert not np.array_equal(other, expected)


def test_single_and_vectorised_physics_agree() -> None:
    options: dict[str, bool | int | float | str | list[int]] = {
        "pole_length": 0.8,
        "gravity": 12.0,
        "force": 7.0,
    }
    config = EnvironmentConfig(id="stillhouse/CartPole-v1", options=options)
    single, vector = make(config), make_vector(config, 1)
    single.reset(seed=0)
    vector.reset(seed=0)
    single.unwrapped.state = np.array([0.01, 0.02, 0.03, 0.04])  # type: ignore[attr-defined]
    vector.unwrapped.state = np.array([[0.01], [0.02], [0.03], [0.04]])  # type: ignore[attr-defined]
    for action in (1, 0, 0, 1):
        np.testing.assert_allclose(single.step(action)[0], vector.step(np.array([action]))[0][0], rtol=1e-6)


def test_acrobot_masses_change_the_dynamics() -> None:
    plain = make(EnvironmentConfig(id="stillhouse/Acrobot-v1"))
    heavy = make(EnvironmentConfig(id="stillhouse/Acrobot-v1", options={"mass_2": 1.5}))
    theirs = gymnasium.make("Acrobot-v1")
    for env in (plain, heavy, theirs):
        env.reset(seed=0)
    first, second, third = (env.step(2)[0] for env in (plain, heavy, theirs))
    np.testing.assert_array_equal(first, third)
    assert not np.array_equal(first, second)


def test_the_games_package_draws_with_the_real_seaborn() -> None:
    import minatar.environment

    picture = make(EnvironmentConfig(id="MinAtar/Breakout-v0"), "rgb_array")
    picture.reset(seed=0)
    frame = picture.render()
    assert isinstance(frame, np.ndarray) and frame.shape == (10, 10, 3) and frame.max() > 0
    assert len(minatar.environment.sns.color_palette("cubehelix", 4)) == 4
