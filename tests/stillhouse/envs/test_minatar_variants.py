"""The MinAtar variants: what is seen changes, the game does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stillhouse.envs.make import EnvironmentConfig, make, make_vector
from stillhouse.envs.minatar import MinAtarEnv, MinAtarVectorEnv
from stillhouse.envs.minatar_batched import GAMES, RandomStreams
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError

Change = Callable[[np.ndarray], np.ndarray]


def shifted(planes: np.ndarray, down: int, right: int) -> np.ndarray:
    """Cell by cell, [..., 10, 10, C]."""
    moved = np.zeros_like(planes)
    for row in range(10):
        for column in range(10):
            if 0 <= row + down < 10 and 0 <= column + right < 10:
                moved[..., row + down, column + right, :] = planes[..., row, column, :]
    return moved


def variants(game: str) -> dict[str, tuple[dict[str, Any], Change]]:
    """Options, and what they do to the game's own planes, [..., 10, 10, C]; the noise plane is left out."""
    order = [*range(2, GAMES[game].channels), 1, 0]
    return {
        "horizontal": ({"flip": "horizontal"}, lambda planes: planes[..., ::-1, :]),
        "vertical": ({"flip": "vertical"}, lambda planes: planes[..., ::-1, :, :]),
        "both": ({"flip": "both"}, lambda planes: planes[..., ::-1, ::-1, :]),
        "permuted": ({"permute_planes": order}, lambda planes: planes[..., order]),
        "shifted": ({"shift": [2, -3]}, lambda planes: shifted(planes, 2, -3)),
        "noise": ({"noise_plane": True}, lambda planes: planes),
        "all": (
            {"permute_planes": order, "flip": "vertical", "shift": [-1, 4], "noise_plane": True},
            lambda planes: shifted(planes[..., ::-1, :, :][..., order], -1, 4),
        ),
    }


@pytest.mark.parametrize("game", sorted(GAMES))
def test_a_vector_shows_the_same_game_differently(game: str) -> None:
    plain = MinAtarVectorEnv(4, game)
    others = [(MinAtarVectorEnv(4, game, **options), change) for options, change in variants(game).values()]
    observations, _ = plain.reset(seed=2)
    for envs, change in others:
        np.testing.assert_array_equal(
            envs.reset(seed=2)[0][..., : GAMES[game].channels], change(observations)
        )
    ends = 0
    for actions in np.random.default_rng(7).integers(6, size=(300, 4)):
        observations, rewards, terminated, _, _ = plain.step(actions)
        ends += terminated.sum()
        for envs, change in others:
            shown, its_rewards, its_terminated, _, _ = envs.step(actions)
            np.testing.assert_array_equal(shown[..., : GAMES[game].channels], change(observations))
            np.testing.assert_array_equal(its_rewards, rewards)
            np.testing.assert_array_equal(its_terminated, terminated)
            assert shown.flags.c_contiguous and shown.dtype == np.bool_
            assert shown[0].shape == envs.single_observation_space.shape
        for envs in (plain, *(envs for envs, _ in others)):
            envs.reset(options={"reset_mask": terminated})
    assert ends or game == "freeway"  # which ends after 2,500 steps only


def test_every_cell_goes_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planes that no game shows: also what leaves the picture, and what no game puts into a corner."""
    planes = np.random.default_rng(5).random((3, 10, 10, 4)) < 0.5
    for options, change in variants("breakout").values():
        envs = MinAtarVectorEnv(3, "breakout", **options)
        monkeypatch.setattr(envs.game, "planes", lambda rows: planes[rows])
        np.testing.assert_array_equal(envs.reset(seed=0)[0][..., :4], change(planes))


@pytest.mark.parametrize("game", sorted(GAMES))
def test_a_single_game_is_shown_as_in_a_vector(game: str) -> None:
    plain = MinAtarEnv(game)
    channels = GAMES[game].channels
    for options, change in variants(game).values():
        single, vector = MinAtarEnv(game, **options), MinAtarVectorEnv(1, game, **options)
        assert single.observation_space == vector.single_observation_space
        expected, shown, beside = (env.reset(seed=3)[0] for env in (plain, single, vector))
        for action in np.random.default_rng(8).integers(6, size=60):
            np.testing.assert_array_equal(shown[..., :channels], change(expected))
            # The seeds' games differ, for their random numbers come from other generators; the noise is the same.
            np.testing.assert_array_equal(shown[..., channels:], beside[0][..., channels:])
            expected, reward, ended, _, _ = plain.step(action)
            shown, its_reward, its_ended, _, _ = single.step(action)
            assert (its_reward, its_ended) == (reward, ended)
            beside = vector.step(np.array([action]))[0]
            if ended:
                break


@pytest.mark.parametrize("make_env", [MinAtarEnv, MinAtarVectorEnv])
def test_a_shifted_picture_by_hand(make_env: Callable[..., Any]) -> None:
    """Breakout begins with the paddle at [9, 4], the ball at [3, 0] or [3, 9], and bricks in rows 1 to 3."""

    def first(seed: int, shift: list[int]) -> np.ndarray:
        planes = np.asarray(make_env(game="breakout", shift=shift).reset(seed=seed)[0])
        return planes.reshape(10, 10, 4)

    starts = {int(np.flatnonzero(first(seed, [0, 0])[3, :, 1])[0]): seed for seed in range(20)}
    assert sorted(starts) == [0, 9]

    for seed in starts.values():  # 2 down, 1 left: the paddle is lost below
        planes = first(seed, [2, -1])
        assert not planes[..., 0].any()
        assert planes[3:6, :9, 3].all() and planes[..., 3].sum() == 27
    assert not first(starts[0], [2, -1])[..., 1].any()  # lost on the left
    assert np.argwhere(first(starts[9], [2, -1])[..., 1]).tolist() == [[5, 8]]

    planes = first(starts[0], [-9, 5])
    assert np.argwhere(planes).tolist() == [[0, 9, 0]]  # the paddle is all that is left
    assert np.argwhere(first(starts[0], [0, 9])[..., 1]).tolist() == [[3, 9]]


def noise(envs: MinAtarVectorEnv, actions: np.ndarray) -> np.ndarray:
    """The noise planes that steps with ``actions``, [T, B], show, bool [T, B, 100]."""
    return np.stack([envs.step(row)[0][..., -1].reshape(-1, 100) for row in actions])


def test_noise_is_fair_and_differs_between_copies_steps_and_cells() -> None:
    envs = MinAtarVectorEnv(64, "breakout", noise_plane=True)
    envs.reset(seed=0)
    bits = noise(envs, np.zeros((100, 64), np.int64))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(bits.size)
    for pairs in (
        bits[1:] == bits[:-1],
        bits[2:] == bits[:-2],
        bits[:, 1:] == bits[:, :-1],
        bits[..., 1:] == bits[..., :-1],
        bits[..., 10:] == bits[..., :-10],
    ):
        assert abs(pairs.mean() - 0.5) < 5 * 0.5 / np.sqrt(pairs.size)
    assert np.abs(bits.mean((0, 1)) - 0.5).max() < 5 * 0.5 / np.sqrt(6400)  # of each cell
    assert np.abs(bits.mean((0, 2)) - 0.5).max() < 5 * 0.5 / np.sqrt(10000)  # of each copy


def test_noise_depends_on_the_episodes_seed_alone() -> None:
    """Not on the copy, on how many there are, on what is played, or even on the game."""
    generator = np.random.default_rng(1)
    alone = MinAtarVectorEnv(1, "breakout", noise_plane=True)
    first = alone.reset(seed=[7])[0][0, ..., -1]
    expected = noise(alone, generator.integers(6, size=(50, 1)))[:, 0]
    many = MinAtarVectorEnv(3, "seaquest", noise_plane=True)
    many.reset(seed=[1, 2, 3])
    noise(many, generator.integers(6, size=(9, 3)))
    before = many.step(np.zeros(3, np.int64))[0]
    observations, _ = many.reset(seed=[None, 7, None], options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_array_equal(observations[1, ..., -1], first)
    np.testing.assert_array_equal(observations[[0, 2]], before[[0, 2]])
    np.testing.assert_array_equal(noise(many, generator.integers(6, size=(50, 3)))[:, 1], expected)
    # Nor are they the numbers that the game draws from that seed.
    random = RandomStreams(1)
    random.seed(np.array([0]), np.array([7]))
    assert not np.array_equal(random.draw(slice(None), 100)[0] >= 0.5, first.reshape(100))
    # A next episode without a seed of its own has other noise.
    assert not np.array_equal(alone.reset()[0][0, ..., -1], first)
    assert not np.array_equal(noise(alone, np.zeros((50, 1), np.int64))[:, 0], expected)


def test_saved_state_goes_on_exactly_with_noise() -> None:
    options = variants("asterix")["all"][0]
    envs = MinAtarVectorEnv(3, "asterix", **options)
    observations, _ = envs.reset(seed=4)
    generator = np.random.default_rng(2)
    for actions in generator.integers(6, size=(40, 3)):
        observations = envs.step(actions)[0]
    state = envs.get_state()
    actions = generator.integers(6, size=(40, 3))
    expected = [envs.step(row)[0] for row in actions]
    other = MinAtarVectorEnv(3, "asterix", **options)
    other.set_state(state)
    kept, _ = other.reset(seed=9, options={"reset_mask": np.zeros(3, np.bool_)})
    np.testing.assert_array_equal(kept, observations)  # shown as it was, not drawn anew
    for row, its in zip(actions, expected, strict=True):
        np.testing.assert_array_equal(other.step(row)[0], its)


def test_a_stage_resumes_exactly_with_noise() -> None:
    config = EnvironmentConfig(
        id="MinAtar/Breakout-v0", options={"noise_plane": True, "flip": "both", "shift": [1, 1]}
    )
    whole = VectorEnvironment(config, 4, 0, "training")
    whole.reset()
    actions = np.random.default_rng(3).integers(6, size=(120, 4))
    for row in actions[:60]:
        whole.step(row)
    resumed = VectorEnvironment(config, 4, 0, "training")
    resumed.set_state(whole.get_state())
    for row in actions[60:]:
        expected, step = whole.step(row), resumed.step(row)
        np.testing.assert_array_equal(step.observations, expected.observations)
        np.testing.assert_array_equal(step.final_observations, expected.final_observations)
    assert resumed.cut_episodes == 0


def test_planes_once_returned_are_not_written_to() -> None:
    single = MinAtarEnv("breakout", noise_plane=True)
    vector = MinAtarVectorEnv(2, "breakout", noise_plane=True)
    for env, action in ((single, 0), (vector, np.zeros(2, np.int64))):
        reset: np.ndarray = env.reset(seed=0)[0]  # type: ignore[attr-defined]
        kept = reset.copy()
        env.step(action)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(reset, kept)


def test_a_picture_leaves_the_noise_out() -> None:
    plain = make(EnvironmentConfig(id="MinAtar/Breakout-v0"), "rgb_array")
    options: dict[str, Any] = {"noise_plane": True, "shift": [2, -1]}
    noisy = make(EnvironmentConfig(id="MinAtar/Breakout-v0", options=options), "rgb_array")
    plain.reset(seed=0)
    noisy.reset(seed=0)
    frame: Any = plain.render()
    np.testing.assert_array_equal(noisy.render(), shifted(frame, 2, -1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"flip": "diagonal"}, "flip must be one of '', 'horizontal', 'vertical', 'both', not 'diagonal'"),
        ({"flip": [1]}, "not [1]"),
        ({"permute_planes": [0, 1, 2]}, "permute_planes must hold each of 0..3 once, not [0, 1, 2]"),
        ({"permute_planes": [0, 1, 2, 2]}, "not [0, 1, 2, 2]"),
        ({"permute_planes": [0, 1, 2, 3, 4]}, "not [0, 1, 2, 3, 4]"),
        ({"permute_planes": 3}, "not 3"),
        ({"shift": [10, 0]}, "shift must be [down, right], each a whole number in -9..9, not [10, 0]"),
        ({"shift": [0, -10]}, "not [0, -10]"),
        ({"shift": [1]}, "not [1]"),
        ({"shift": 2}, "not 2"),
        ({"noise_plane": "yes"}, "noise_plane must be true or false, not 'yes'"),
        ({"noise_plane": 1}, "not 1"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], said: str) -> None:
    config = EnvironmentConfig(id="MinAtar/Breakout-v0", options=options)
    for attempt in (lambda: make(config), lambda: make_vector(config, 2)):
        with pytest.raises(StillhouseError) as caught:
            attempt()
        assert f"ValueError: {next(iter(options))} must" in str(caught.value)
        assert said in str(caught.value) and "\n" not in str(caught.value)
