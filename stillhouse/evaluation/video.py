"""Record an agent's play as MP4 or GIF."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from stillhouse.envs.make import EnvironmentConfig, make
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import policy_outputs
from stillhouse.seeding import derive
from stillhouse.types import Policy

SUFFIXES = (".mp4", ".gif")
_SMALLEST_SIDE = 320  # pixels: MinAtar draws 10 x 10
_GIF_STEP_MS = 10  # a GIF counts time in hundredths of a second


def record(
    policy: Policy,
    environment: EnvironmentConfig,
    output: Path,
    seed: int,
    episodes: int = 1,
    max_steps: int = 1000,
) -> list[float]:
    """Play greedily and write what is seen; the file appears whole or not at all.

    Args:
        policy: observations [1, ...] to outputs [1, A].
        environment: must be able to render ``rgb_array``.
        output: ``.mp4`` (H.264) or ``.gif``.
        seed: of the episodes; the stream is not that of training, validation or test.
        episodes: how many, one after the other.
        max_steps: env steps of each episode at most.

    Returns:
        The episodes' returns (of what was shown).

    Raises:
        StillhouseError: another suffix, an environment that cannot render, or a missing encoder or display
            library, each with what to do.
    """
    suffix = output.suffix.lower()
    if suffix not in SUFFIXES:
        raise StillhouseError(f"{output}: a video is written as {' or '.join(SUFFIXES)}; name the file so")
    env = _renderable(environment)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.stem}.{os.getpid()}{suffix}")
    returns: list[float] = []
    try:
        fps = max(1, min(60, int(env.metadata.get("render_fps", 30))))
        writer = _writer(temporary, fps)
        try:
            for episode in range(episodes):
                observation, _ = env.reset(seed=derive(seed, "video", episode) % 2**31)
                _append(writer, env, environment)
                total = 0.0
                for count in range(max_steps):
                    outputs = policy_outputs(policy, np.asarray(observation)[None], np.array([count == 0]))
                    observation, reward, terminated, truncated, _ = env.step(int(outputs[0].argmax()))
                    total += float(reward)
                    _append(writer, env, environment)
                    if terminated or truncated:
                        break
                returns.append(total)
        finally:
            writer.close()
        os.replace(temporary, output)
    except OSError as error:
        raise StillhouseError(f"{output}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
        env.close()
    return returns


def _renderable(environment: EnvironmentConfig) -> gymnasium.Env[Any, Any]:
    plain = make(environment)
    modes = plain.metadata.get("render_modes", [])
    plain.close()
    if "rgb_array" not in modes:
        raise StillhouseError(
            f"environment {environment.id!r} cannot be recorded: it renders {modes}, not 'rgb_array'"
        )
    return make(environment, render_mode="rgb_array")


def _writer(path: Path, fps: int) -> Any:
    try:
        import imageio
    except ImportError as error:
        raise StillhouseError("recording needs imageio: pip install imageio imageio-ffmpeg") from error
    if path.suffix == ".gif":
        duration = max(2, round(1000 / fps / _GIF_STEP_MS)) * _GIF_STEP_MS
        return imageio.get_writer(path, format="GIF", mode="I", duration=duration, loop=0)
    try:
        importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise StillhouseError(
            "MP4 needs an encoder: pip install imageio-ffmpeg, or record to a .gif instead"
        ) from error
    return imageio.get_writer(
        path,
        format="FFMPEG",
        mode="I",
        fps=fps,
        codec="libx264",
        macro_block_size=2,
        ffmpeg_log_level="error",
    )


def _append(writer: Any, env: gymnasium.Env[Any, Any], environment: EnvironmentConfig) -> None:
    try:
        frame = env.render()
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise StillhouseError(
            f"environment {environment.id!r} cannot be drawn: {str(error).splitlines()[0]}; install "
            "what it draws with, for Gymnasium's classic control: pip install pygame"
        ) from error
    writer.append_data(enlarge(np.asarray(frame, np.uint8)))


def enlarge(frame: np.ndarray) -> np.ndarray:
    """Scale small frames up by a whole factor (nearest neighbour) and make both sides even, as H.264 needs.

    Args:
        frame: uint8 [H, W, 3].

    Returns:
        uint8 [H', W', 3], both sides even; the smaller one at least 320 pixels.
    """
    factor = -(-_SMALLEST_SIDE // min(frame.shape[:2]))
    if factor > 1:
        frame = frame.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = frame.shape[:2]
    return frame[: height - height % 2, : width - width % 2]
