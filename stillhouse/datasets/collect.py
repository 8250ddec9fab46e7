"""Collecting a dataset: the teacher plays epsilon-greedily, every transition is kept with its full
outputs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.datasets.schema import SCHEMA_FILE, DatasetSchema, action_gaps, row_bytes
from stillhouse.datasets.writer import ShardWriter
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import policy_outputs
from stillhouse.exploration import epsilon_greedy
from stillhouse.files import replace_folder, write_json
from stillhouse.types import EnvironmentSpec, OutputKind, Policy, Report

NO_MINIMUM = -1e9


class CollectConfig(Config):
    """How much the teacher plays, and how good it must be."""

    transitions: int = Field(
        default=100_000,
        ge=1,
        le=1_000_000_000,
        description="env steps to keep; the last step of all copies is kept whole, so up to num_envs - 1 "
        "more",
    )
    epsilon: float = Field(
        default=0.05, ge=0, le=1, description="share of random actions in the teacher's play"
    )
    num_envs: int = Field(default=32, ge=1, le=4096, description="copies of the environment")
    minimum_return: float = Field(
        default=NO_MINIMUM,
        description="a teacher whose mean return is below this is weak, and collecting stops",
    )
    maximum_bytes: int = Field(
        default=2_000_000_000,
        ge=1,
        le=10**15,
        description="a dataset that would take more is refused before any step is played",
    )
    allow_weak_teacher: bool = Field(default=False, description="collect from a weak teacher all the same")


@dataclass(frozen=True)
class Teacher:
    """Who plays.

    Attributes:
        policy: observations ``[B, ...]`` to outputs float32 ``[B, A]``.
        output: what the outputs are.
        digest: SHA-256 of the checkpoint's manifest.
        parameters: number of weights.
        mean_return: greedy, on validation episodes; None: judged by the play collected here.
    """

    policy: Policy
    output: OutputKind
    digest: str
    parameters: int
    mean_return: float | None = None


def collect(
    teacher: Teacher, environment: EnvironmentConfig, config: CollectConfig, seed: int, path: Path
) -> Iterator[Report]:
    """Let the teacher play and write what it saw and thought to ``path``.

    Args:
        teacher: who plays; actions are the argmax of its outputs, random with probability epsilon.
        environment: where.
        config: how much.
        seed: the stage's seed.
        path: the dataset's folder, replaced when all is well and untouched otherwise.

    Yields:
        About a hundred reports in env steps. The first comes before any env step and announces
        ``dataset/bytes``, the last when the dataset is in place; ``rollout/return`` is the mean over the
        episodes that ended so far.

    Raises:
        StillhouseError: a weak teacher, outputs that are not finite, a dataset of more than ``maximum_bytes``, or too
            little space on the disk.
    """
    if teacher.mean_return is not None:
        check_return(teacher.mean_return, "its greedy validation episodes", config)
    envs = VectorEnvironment(environment, config.num_envs, seed, "collect")
    spec = envs.spec
    size = row_bytes(spec) * config.transitions
    yield Report(0, config.transitions, {"dataset/bytes": float(size)})
    check_size(spec, config.transitions, config.maximum_bytes, path)
    random = seeding.generator(seed, "collect", "epsilon")

    with replace_folder(path) as folder:
        writer = ShardWriter(folder, spec, config.transitions + config.num_envs - 1)
        observations, starts = envs.reset(), np.ones(config.num_envs, np.bool_)
        episode = np.arange(config.num_envs)  # [B], the number of each copy's open episode
        next_episode = config.num_envs
        done = ended_episodes = cut_episodes = 0
        report_every, reported = max(1, config.transitions // 100), 0
        return_sum = gap_sum = 0.0
        mean_return: float | None = None
        while done < config.transitions:
            outputs = policy_outputs(teacher.policy, observations, starts)  # [B, A]
            if not np.isfinite(outputs).all():
                raise StillhouseError(
                    f"the teacher's outputs for {environment.id} are not finite after {done} env steps; its "
                    f"training diverged: train it again with a lower learning rate"
                )
            step = envs.step(actions := epsilon_greedy(outputs, config.epsilon, random))
            valid = step.valid
            done += int(valid.sum())
            truncated = step.truncated
            if done >= config.transitions:
                # Episodes still open are cut: a truncation, with the observation the next step would have
                # started from.
                open_rows = np.flatnonzero(valid & ~step.terminated & ~step.truncated)
                truncated = truncated.copy()
                truncated[open_rows] = True
                cut_episodes = len(open_rows)
            writer.append(
                observations[valid],
                outputs=outputs[valid],
                actions=actions[valid],
                rewards=step.rewards[valid],
                terminated=step.terminated[valid],
                truncated=truncated[valid],
                episodes=episode[valid],
            )
            writer.append_final(episode[step.ended], step.final_observations)
            if cut_episodes:
                writer.append_final(episode[open_rows], step.observations[open_rows])
            gap_sum += float(action_gaps(outputs[valid]).sum(dtype=np.float64))
            return_sum += float(step.episode_returns.sum())
            ended_episodes += len(step.ended)
            episode[step.ended] = next_episode + np.arange(len(step.ended))
            next_episode += len(step.ended)
            observations, starts = step.observations, step.starts
            if ended_episodes:
                mean_return = return_sum / ended_episodes
            if reported + report_every <= done < config.transitions:
                reported = done
                yield _report(done, config.transitions, ended_episodes, mean_return)
        envs.close()
        if teacher.mean_return is None:
            check_return(mean_return, f"{ended_episodes} collected episodes", config)
        writer.close()
        schema = DatasetSchema(
            environment_id=environment.id,
            environment=spec,
            output=teacher.output,
            teacher=teacher.digest,
            teacher_parameters=teacher.parameters,
            epsilon=config.epsilon,
            shard_rows=writer.shard_rows,
            episodes=ended_episodes + cut_episodes,
            mean_return=mean_return,
            mean_action_gap=gap_sum / done,
        )
        write_json(folder / SCHEMA_FILE, schema.model_dump(mode="json"))
    yield _report(done, done, ended_episodes, mean_return)


def _report(done: int, total: int, episodes: int, mean_return: float | None) -> Report:
    metrics = {"rollout/episodes": float(episodes)}
    if mean_return is not None:
        metrics["rollout/return"] = mean_return
    return Report(done, total, metrics)


def check_size(environment: EnvironmentSpec, transitions: int, maximum_bytes: int, path: Path) -> None:
    """Refuse a dataset at ``path`` that is too large.

    Raises:
        StillhouseError: it would take more than ``maximum_bytes``, or than the disk has free.
    """
    size = row_bytes(environment) * transitions
    if size > maximum_bytes:
        raise StillhouseError(
            f"{path}: the dataset takes {size / 1e6:.0f} MB ({transitions} transitions of {row_bytes(environment)} bytes), "
            f"and maximum_bytes allows {maximum_bytes / 1e6:.0f} MB; raise maximum_bytes, or lower transitions to "
            f"{maximum_bytes // row_bytes(environment)}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise StillhouseError(
            f"{path}: the dataset takes {size / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free; free "
            f"space or lower transitions ({transitions})"
        )


def check_return(mean_return: float | None, source: str, config: CollectConfig) -> None:
    """Refuse a weak teacher.

    Raises:
        StillhouseError: its mean return is below ``minimum_return``, and weak teachers are not allowed.
    """
    if config.allow_weak_teacher or config.minimum_return == NO_MINIMUM:
        return
    if mean_return is None:
        raise StillhouseError(
            f"no episode ended, so minimum_return {config.minimum_return:.4g} cannot be checked; raise "
            f"transitions ({config.transitions}), or set allow_weak_teacher"
        )
    if mean_return < config.minimum_return:
        raise StillhouseError(
            f"weak teacher: a mean return of {mean_return:.4g} over {source}, below minimum_return "
            f"{config.minimum_return:.4g}; train it longer (its checkpoint is kept), lower minimum_return, "
            f"or set allow_weak_teacher"
        )
