"""On-policy distillation: the student acts, the teacher says what it would have done.

Ross, Gordon & Bagnell 2011, DAgger (https://arxiv.org/abs/1011.0686): the student is trained on the states that it meets
itself, labelled by the teacher, so that it learns to get out of what its own mistakes lead into. Actor-Mimic (Parisotto et
al. 2015, https://arxiv.org/abs/1511.06342) found the student the better actor too. With ``beta`` the teacher's share,

    a_t ~ beta_i teacher(o_t) + (1 - beta_i) student(o_t),     D <- D + {(o_t, teacher(o_t))}
    sum_e w_e L(student(o_e), teacher_e(o_e)) / sum_e w_e      with o_e a batch from D_e

for the losses of ``stillhouse.losses.distillation``. Copies of every environment are stepped together, in turn with a number
of updates.

Deviations from the papers:

1. DAgger aggregates everything and fits anew in every iteration; here ``D`` is a ring of ``capacity`` rows for each
   environment and the student is fitted as it goes on.
2. DAgger's beta falls with the iteration. Here it falls linearly over ``teacher_share_fraction`` of the updates; the default,
   the teacher for the first ``warmup_steps`` and the student from then on, is DAgger's parameter-free form.
3. Adam on the mean over environments, as offline.
4. The result is the last weights: the states on which agreement is measured are those of an ever better student, so that
   measurements at different times cannot be compared.

This update is not the gradient of anything (Czarnecki et al. 2019, https://arxiv.org/abs/1902.02186, theorem 1): the states
depend on the student, and no gradient flows through that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from stillhouse import seeding
from stillhouse.distillation.buffer import LabelledBuffer
from stillhouse.distillation.student import StudentConfig, StudentTraining
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.evaluation.rollouts import network_policy
from stillhouse.exploration import epsilon_greedy, linear_schedule
from stillhouse.networks.multi_task import MultiTaskNetwork, parameter_count
from stillhouse.types import Policy, Report

# Env steps of all copies between two looks at what the buffers hold: new rows wait so long to be drawn.
_REFRESH_STEPS = 25


class OnPolicyConfig(StudentConfig):
    """A student that learns where it goes itself."""

    method: Literal["on_policy"] = Field(description="the student acts, the teachers label what it meets")
    num_envs: int = Field(default=64, ge=2, le=4096, description="copies of each environment")
    updates_per_step: int = Field(
        default=2, ge=1, le=1000, description="updates after each env step of all copies"
    )
    capacity: int = Field(
        default=100_000, ge=1000, le=100_000_000, description="labelled transitions kept for each environment"
    )
    warmup_steps: int = Field(
        default=200,
        ge=1,
        le=1_000_000,
        description="env steps of all copies that the teacher plays before the first update",
    )
    teacher_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of actions that are the teacher's at the first update",
    )
    teacher_share_fraction: float = Field(
        default=0.5, ge=0, le=1, description="share of the updates over which teacher_share falls to 0"
    )
    epsilon: float = Field(default=0.0, ge=0, le=1, description="share of random actions")
    patience: int = Field(default=0, ge=0, le=0, description="0: on-policy distillation does all its updates")


@dataclass
class _Actor:
    """One environment: who acts there and where its episodes stand."""

    teacher: Policy
    envs: VectorEnvironment
    buffer: LabelledBuffer
    observations: np.ndarray
    random: np.random.Generator
    returns: deque[float]


class OnPolicyDistillation:
    """A student in training. :meth:`train` trains it; :meth:`student` is the result.

    Args:
        config: how.
        teachers: their networks, by environment: the name of their head and of the student's.
        environments: where to act, by the same names.
        seed: the stage's seed.
        device: torch device.

    Attributes:
        training: the student's network and parameters.
        env_steps: taken so far, all environments together.
        best: the latest metrics.

    Raises:
        StillhouseError: see :class:`stillhouse.distillation.student.StudentTraining`.
    """

    def __init__(
        self,
        config: OnPolicyConfig,
        teachers: Mapping[str, MultiTaskNetwork],
        environments: Mapping[str, EnvironmentConfig],
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.config = config
        self.env_steps = 0
        self.best: dict[str, float] = {}
        self._actors: dict[str, _Actor] = {}
        for name, teacher in teachers.items():
            envs = VectorEnvironment(environments[name], config.num_envs, seed, "on_policy")
            buffer = LabelledBuffer(envs.spec, teacher.spec.output, parameter_count(teacher), config.capacity)
            self._actors[name] = _Actor(
                teacher=network_policy(teacher.to(device), name, device),
                envs=envs,
                buffer=buffer,
                observations=envs.reset(),
                random=seeding.generator(seed, "on_policy", name),
                returns=deque(maxlen=100),
            )
        held = round(config.num_envs * config.holdout_fraction)
        self._held_out = np.arange(config.num_envs) < held  # always the same copies
        data = {name: actor.buffer for name, actor in self._actors.items()}
        feature_teachers = dict(teachers) if config.feature_weight else {}
        self.training = StudentTraining(config, data, seed, device, feature_teachers)
        self._students = {name: network_policy(self.training.network, name, device) for name in self._actors}

    @property
    def updates(self) -> int:
        """Done so far."""
        return self.training.updates

    @property
    def teacher_parameters(self) -> int:
        """Of all teachers together."""
        return self.training.teacher_parameters

    def train(self) -> Iterator[Report]:
        """Act and learn until all updates are done; :meth:`get_state` is exact whenever this has yielded.

        Yields:
            Per evaluation interval, in updates: what :meth:`StudentTraining.measure` gives, and ``return/<environment>``,
            the mean of the last 100 returns in training; ``rollout/teacher_share``.

        Raises:
            StillhouseError: the loss is not finite.
        """
        config = self.config
        if not self.env_steps:
            for _ in range(config.warmup_steps):
                self._act(1.0)
            self._refresh()
        while self.updates < config.updates:
            losses, count = dict.fromkeys(self._actors, 0.0), 0
            interval = min(config.evaluation_interval, config.updates - self.updates)
            while count < interval:
                self._act(self.teacher_share())
                if self.env_steps // self._step_size % _REFRESH_STEPS == 0:
                    self._refresh()
                updates = min(config.updates_per_step, interval - count)
                for name, loss in self.training.update(updates).items():
                    losses[name] += loss * updates
                count += updates
            self._refresh()  # so that a resumed training, which looks anew, sees the same rows
            losses = {name: loss / count for name, loss in losses.items()}
            self.best = {"update": float(self.updates), **self.training.measure(losses)}
            metrics = {**self.best, "rollout/teacher_share": self.teacher_share()}
            for name, actor in self._actors.items():
                if actor.returns:
                    metrics[f"return/{name}"] = float(np.mean(actor.returns))
            yield Report(self.updates, config.updates, metrics)

    def teacher_share(self) -> float:
        """Share of actions that are the teacher's at present: DAgger's beta."""
        config = self.config
        duration = config.teacher_share_fraction * config.updates
        return linear_schedule(config.teacher_share, 0.0, duration, self.updates)

    def student(self) -> MultiTaskNetwork:
        """A network of its own with the weights of now, in evaluation mode."""
        return self.training.student(best=False)

    @property
    def _step_size(self) -> int:
        return self.config.num_envs * len(self._actors)

    def _act(self, teacher_share: float) -> None:
        """One env step of every copy; what was met goes into the buffers with the teacher's outputs."""
        for name, actor in self._actors.items():
            observations = actor.observations
            labels = actor.teacher(observations)
            outputs = labels
            if teacher_share < 1:
                outputs = self._students[name](observations)
                if teacher_share:
                    teachers_turn = actor.random.random(len(outputs)) < teacher_share
                    outputs = np.where(teachers_turn[:, None], labels, outputs)
            step = actor.envs.step(epsilon_greedy(outputs, self.config.epsilon, actor.random))
            # A row that is no transition (autoreset NEXT_STEP) shows a state all the same: it is labelled too.
            actor.buffer.append(observations, labels, self._held_out)
            actor.observations = step.observations
            actor.returns.extend(step.episode_returns.tolist())
        self.env_steps += self._step_size

    def _refresh(self) -> None:
        for name in self._actors:
            self.training.grown(name)

    def get_state(self) -> dict[str, Any]:
        """Everything needed to continue exactly: plain data, arrays and tensors."""
        return {
            "training": self.training.get_state(),
            "env_steps": self.env_steps,
            "best": [[name, value] for name, value in self.best.items()],
            "actors": {
                name: {
                    "envs": actor.envs.get_state(),
                    "buffer": actor.buffer.get_state(),
                    "random": actor.random.bit_generator.state,
                    "returns": list(actor.returns),
                }
                for name, actor in self._actors.items()
            },
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get_state` of a distillation with the same arguments."""
        for name, actor in self._actors.items():
            saved = state["actors"][name]
            actor.observations = actor.envs.set_state(saved["envs"])
            actor.buffer.set_state(saved["buffer"])
            actor.random.bit_generator.state = saved["random"]
            actor.returns = deque(saved["returns"], maxlen=100)
        self.training.set_state(state["training"])
        self.env_steps = state["env_steps"]
        self.best = dict(state["best"])
