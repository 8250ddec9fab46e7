"""Recorded play: the files open again and show what was played."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import gymnasium
import imageio.v2 as imageio
import numpy as np
import pytest

from stillhouse.envs.make import EnvironmentConfig
from stillhouse.errors import StillhouseError
from stillhouse.evaluation import video
from stillhouse.evaluation.rollouts import MemoryPolicy

BREAKOUT = EnvironmentConfig(id="MinAtar/Breakout-v1")
CARTPOLE = EnvironmentConfig(id="CartPole-v1")


def first_action(observations: np.ndarray) -> np.ndarray:
    return np.array([[1.0, 0.0, 0.0]])


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_minatar_is_scaled_up(tmp_path: Path, suffix: str) -> None:
    output = tmp_path / "folder" / f"play{suffix}"
    returns = video.record(first_action, BREAKOUT, output, seed=0, episodes=2, max_steps=12)
    frames = imageio.mimread(output)
    assert frames[0].shape[:2] == (320, 320)
    assert len(returns) == 2
    assert 4 < len(frames) <= 26
    assert list(output.parent.iterdir()) == [output]


def test_classic_control(tmp_path: Path) -> None:
    output = tmp_path / "play.mp4"
    (total,) = video.record(first_action, CARTPOLE, output, seed=0, max_steps=100)
    frames = imageio.mimread(output)
    assert frames[0].shape == (400, 600, 3)
    assert len(frames) == total + 1


def test_the_same_seed_shows_the_same_play(tmp_path: Path) -> None:
    paths = [tmp_path / "a.gif", tmp_path / "b.gif"]
    for path in paths:
        video.record(first_action, BREAKOUT, path, seed=1, max_steps=5)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_memory_begins_each_episode_anew(tmp_path: Path) -> None:
    starts: list[bool] = []

    class Spy(MemoryPolicy):
        def __init__(self) -> None:
            pass

        def step(self, observations: np.ndarray, starting: np.ndarray) -> np.ndarray:
            assert len(observations) == 1
            starts.extend(starting.tolist())
            return np.array([[1.0, 0.0, 0.0]])

    video.record(Spy(), BREAKOUT, tmp_path / "play.gif", seed=0, episodes=3, max_steps=4)
    assert starts == [True, False, False, False] * 3


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((10, 10), (320, 320)), ((7, 21), (322, 966)), ((401, 599), (400, 598)), ((107, 107), (320, 320))],
)
def test_enlarge(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    frame = np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)
    larger = video.enlarge(frame)
    assert larger.shape == (*expected, 3)
    np.testing.assert_array_equal(larger[0, 0], frame[0, 0])


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StillhouseError, match=r"written as \.mp4 or \.gif"):
        video.record(first_action, BREAKOUT, tmp_path / "play.avi", seed=0)


def test_an_environment_that_cannot_render_is_refused(tmp_path: Path) -> None:
    class Blind(gymnasium.Env[Any, Any]):
        observation_space = gymnasium.spaces.Box(0, 1, (1,))
        action_space = gymnasium.spaces.Discrete(2)

        def __init__(self, render_mode: str | None = None) -> None:
            self.render_mode = render_mode

    gymnasium.register("tests/Blind-v0", entry_point=Blind)
    try:
        with pytest.raises(StillhouseError, match="tests/Blind-v0' cannot be recorded"):
            video.record(first_action, EnvironmentConfig(id="tests/Blind-v0"), tmp_path / "a.gif", seed=0)
    finally:
        del gymnasium.registry["tests/Blind-v0"]


def test_a_missing_encoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(StillhouseError, match="pip install imageio-ffmpeg"):
        video._writer(tmp_path / "play.mp4", 30)


def test_missing_drawing_is_named_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gymnasium.envs.classic_control.cartpole import CartPoleEnv

    frames = iter([np.zeros((400, 600, 3), np.uint8)] * 3)

    def undrawable(self: CartPoleEnv) -> np.ndarray:
        for frame in frames:
            return frame
        raise gymnasium.error.DependencyNotInstalled("pygame is not installed")

    monkeypatch.setattr(CartPoleEnv, "render", undrawable)
    with pytest.raises(StillhouseError, match="pip install pygame"):
        video.record(first_action, CARTPOLE, tmp_path / "play.gif", seed=0)
    assert not list(tmp_path.iterdir())
