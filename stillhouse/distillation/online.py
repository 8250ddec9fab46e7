"""Online distillation: a student that follows its teachers while they still learn.

Rusu et al. 2015, "Policy Distillation" (https://arxiv.org/abs/1511.06295), the section on online distillation: while the
teacher still learns, every policy that is its best so far is distilled into the student. In rounds:

    every teacher learns for ``validation_interval`` env steps and is judged, greedily, on validation episodes
    where its return is above its best so far: D_e <- observations of its play, epsilon-greedy, with its outputs
    the student is updated on D, so often that updates and env steps end together

The student's curve is smoother than a teacher's: a teacher that becomes worse changes nothing for it.

Deviations from the paper, and choices it leaves open:

1. The validation episodes are the same in every round, so that returns are comparable; a return as good as the best is no
   improvement.
2. ``D_e`` is replaced as a whole, not mixed with what worse teachers played.
3. The result is the student's last weights: agreement with different teachers cannot be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from stillhouse import seeding
from stillhouse.agents import make_learner
from stillhouse.distillation.buffer import LabelledBuffer
from stillhouse.distillation.student import StudentConfig, StudentTraining
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import evaluate, network_policy
from stillhouse.exploration import epsilon_greedy
from stillhouse.networks.multi_task import MultiTaskNetwork, parameter_count
from stillhouse.types import Learner, Policy, Report


class OnlineConfig(StudentConfig):
    """A student that follows teachers which still learn."""

    method: Literal["online"] = Field(description="the teachers learn at the same time")
    validation_interval: int = Field(
        default=50_000,
        ge=1,
        le=1_000_000_000,
        description="env steps of each teacher from one round to the next: it is judged, and the student goes on",
    )
    validation_episodes: int = Field(
        default=32, ge=1, le=10_000, description="greedy episodes a teacher and the student are judged by"
    )
    transitions: int = Field(
        default=20_000,
        ge=100,
        le=100_000_000,
        description="collected anew from each teacher that has improved",
    )
    num_envs: int = Field(default=32, ge=2, le=4096, description="copies of the environment to collect in")
    epsilon: float = Field(default=0.05, ge=0, le=1, description="share of random actions while collecting")
    patience: int = Field(default=0, ge=0, le=0, description="0: the student follows to the end")
    environment_patience: int = Field(default=0, ge=0, le=0, description="0: no environment rests")
    feature_weight: float = Field(
        default=0.0, ge=0, le=0, description="0: features of teachers that change are not learnt"
    )


@dataclass
class _Teacher:
    """A teacher that learns, and what it last showed the student."""

    learner: Learner
    policy: Policy
    environment: EnvironmentConfig
    buffer: LabelledBuffer
    best: float | None = None  # validation return
    datasets: int = 0  # collected so far
    total: int = 0  # its budget in env steps, known once it has learnt


class OnlineDistillation:
    """Teachers and a student in training. :meth:`train` trains them; :meth:`student` is the result.

    Args:
        config: how.
        teachers: settings of each teacher's algorithm, by environment: the name of the student's head.
        environments: where to act, by the same names.
        seed: the stage's seed.
        device: torch device.

    Attributes:
        training: the student's network and parameters.
        curve: a row for each round: ``env_steps`` (of all teachers together), ``updates``, and by environment
            ``teacher/<name>``, ``best/<name>`` and ``student/<name>`` (validation returns) and ``agreement/<name>``.
        best: the latest metrics.

    Raises:
        StillhouseError: no teacher, an environment that is missing, or what the algorithms and
            :class:`stillhouse.distillation.student.StudentTraining` refuse.
    """

    def __init__(
        self,
        config: OnlineConfig,
        teachers: Mapping[str, dict[str, Any]],
        environments: Mapping[str, EnvironmentConfig],
        seed: int,
        device: str = "cpu",
    ) -> None:
        if missing := [name for name in teachers if name not in environments]:
            raise StillhouseError(
                f"no environment was given for the teachers {', '.join(missing)}; given are {', '.join(environments)}"
            )
        self.config = config
        self.seed = seed
        self.curve: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self._teachers = {
            name: self._make_teacher(settings, name, environments[name], device)
            for name, settings in teachers.items()
        }
        self._held_out = np.arange(config.num_envs) < max(1, round(config.num_envs * config.holdout_fraction))
        self.training = StudentTraining(
            config, {name: teacher.buffer for name, teacher in self._teachers.items()}, seed, device
        )
        self._students = {
            name: network_policy(self.training.network, name, device) for name in self._teachers
        }

    def _make_teacher(
        self, settings: dict[str, Any], name: str, environment: EnvironmentConfig, device: str
    ) -> _Teacher:
        learner = make_learner(
            settings, name, environment, seeding.derive(self.seed, "teacher", name), device
        )

        def policy(observations: np.ndarray) -> np.ndarray:
            return learner.outputs(observations) / np.float32(learner.reward_scale)

        buffer = LabelledBuffer(
            learner.envs.spec,
            learner.network.spec.output,
            parameter_count(learner.network),
            self.config.transitions,
        )
        return _Teacher(learner, policy, environment, buffer)

    @property
    def updates(self) -> int:
        """Of the student, done so far."""
        return self.training.updates

    @property
    def teacher_parameters(self) -> int:
        """Of all teachers together."""
        return self.training.teacher_parameters

    @property
    def env_steps(self) -> int:
        """Of all teachers together, so far; without what was played to collect and to judge."""
        return sum(teacher.learner.env_steps for teacher in self._teachers.values())

    def train(self) -> Iterator[Report]:
        """Train until every teacher has spent its budget; :meth:`get_state` is exact whenever this has yielded.

        Yields:
            Per round, in env steps of all teachers together: the row of :attr:`curve`, and what
            :meth:`StudentTraining.measure` gives.

        Raises:
            StillhouseError: a loss is not finite.
        """
        while not self._finished():
            target = (len(self.curve) + 1) * self.config.validation_interval
            row = {}
            for name, teacher in self._teachers.items():
                row[f"teacher/{name}"] = self._teach(name, teacher, target)
                assert teacher.best is not None
                row[f"best/{name}"] = teacher.best
            total = sum(teacher.total for teacher in self._teachers.values())
            done = min(self.env_steps, total)
            count = self.config.updates if self._finished() else round(self.config.updates * done / total)
            count = max(1, count - self.updates)
            self.best = {
                **self.training.measure(self.training.update(count)),
                "update": float(self.updates),
            }
            for name, teacher in self._teachers.items():
                row[f"student/{name}"] = self._judge(self._students[name], teacher)
                row[f"agreement/{name}"] = self.best[f"agreement/{name}"]
            self.curve.append({"env_steps": float(done), "updates": float(self.updates), **row})
            yield Report(done, total, {**self.best, **row})

    def student(self) -> MultiTaskNetwork:
        """A network of its own with the weights of now, in evaluation mode."""
        return self.training.student(best=False)

    def _finished(self) -> bool:
        return all(0 < teacher.total <= teacher.learner.env_steps for teacher in self._teachers.values())

    def _teach(self, name: str, teacher: _Teacher, target: int) -> float:
        """Let a teacher learn up to ``target`` env steps and judge it; collect its play where it has improved."""
        for report in teacher.learner.train():
            teacher.total = report.total
            if report.done >= target:
                break
        value = self._judge(teacher.policy, teacher)
        if teacher.best is None or value > teacher.best:
            teacher.best = value
            self._collect(name, teacher)
            self.training.replace(name, teacher.buffer)
        return value

    def _judge(self, policy: Policy, teacher: _Teacher) -> float:
        episodes = evaluate(
            policy,
            teacher.environment,
            self.config.validation_episodes,
            self.seed,
            stream="validation",
        )
        return float(episodes.returns.mean())

    def _collect(self, name: str, teacher: _Teacher) -> None:
        """Fill the buffer with the teacher's play, from fresh episodes; every row is overwritten."""
        config = self.config
        teacher.datasets += 1
        stream = f"online {name} {teacher.datasets}"
        envs = VectorEnvironment(teacher.environment, config.num_envs, self.seed, stream)
        random = seeding.generator(self.seed, stream, "epsilon")
        observations = envs.reset()
        collected = 0
        while collected < config.transitions:
            outputs = teacher.policy(observations)
            step = envs.step(epsilon_greedy(outputs, config.epsilon, random))
            rows = np.flatnonzero(step.valid)[: config.transitions - collected]
            teacher.buffer.append(observations[rows], outputs[rows], self._held_out[rows])
            collected += len(rows)
            observations = step.observations
        envs.close()

    def get_state(self) -> dict[str, Any]:
        """Everything needed to continue exactly: plain data, arrays and tensors."""
        return {
            "training": self.training.get_state(),
            "best": [[name, value] for name, value in self.best.items()],
            "curve": [[[name, value] for name, value in row.items()] for row in self.curve],
            "teachers": {
                name: {
                    "learner": teacher.learner.get_state(),
                    "buffer": teacher.buffer.get_state(),
                    "best": teacher.best,
                    "datasets": teacher.datasets,
                    "total": teacher.total,
                }
                for name, teacher in self._teachers.items()
            },
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get_state` of a distillation with the same arguments."""
        for name, teacher in self._teachers.items():
            saved = state["teachers"][name]
            teacher.learner.set_state(saved["learner"])
            teacher.buffer.set_state(saved["buffer"])
            teacher.best, teacher.datasets, teacher.total = saved["best"], saved["datasets"], saved["total"]
        self.training.set_state(state["training"])
        self.best = dict(state["best"])
        self.curve = [dict(row) for row in state["curve"]]
