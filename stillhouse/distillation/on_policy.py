"""On-policy distillation: the student acts, the teacher says what it would have done.

Ross, Gordon & Bagnell 2011, DAgger (https://arxiv.org/abs/1011.0686): the student is trained on the states that it meets
itself, labelled by the teacher, so that it learns to get out of what its own mistakes lead into. Actor-Mimic (Parisotto et
al. 2015, https://arxiv.org/abs/1511.06342) found the student the better actor too. With ``beta`` the teacher's share,

    a_t ~ beta_i teacher(o_t) + (1 - beta_i) student(o_t),     D <- D + {(o_t, teacher(o_t))}
    sum_e w_e L(student(o_e), teacher_e(o_e)) / sum_e w_e      with o_e a batch from D_e

for the losses of ``stillhouse.losses.distillation``. Copies of every environment are stepped together, in turn with a number
of updates.

This update is not the gradient of anything (Czarnecki et al. 2019, https://arxiv.org/abs/1902.02186, theorem 1): the states
depend on the student, and no gradient flows through that. ``objective: expected_entropy`` is the form that is one:
``stillhouse.distillation.expected_entropy``.

Deviations from the papers:

1. DAgger aggregates everything and fits anew in every iteration; here ``D`` is a ring of ``capacity`` rows for each
   environment and the student is fitted as it goes on.
2. DAgger's beta falls with the iteration. Here it falls linearly over ``teacher_share_fraction`` of the updates; the default,
   the teacher for the first ``warmup_steps`` and the student from then on, is DAgger's parameter-free form.
3. Adam on the mean over environments, as offline.
4. The result is the last weights: the states on which agreement is measured are those of an ever better student, so that
   measurements at different times cannot be compared. ``validation_episodes`` chooses by validation returns instead.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from stillhouse import seeding
from stillhouse.distillation.buffer import LabelledBuffer
from stillhouse.distillation.expected_entropy import ExpectedEntropy, ExpectedEntropyConfig
from stillhouse.distillation.student import LabelledData, StudentConfig, StudentTraining
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import evaluate, network_policy
from stillhouse.exploration import epsilon_greedy, linear_schedule
from stillhouse.networks.multi_task import MultiTaskNetwork, parameter_count
from stillhouse.types import Policy, Report

# Env steps of all copies between two looks at what the buffers hold: new rows wait so long to be drawn.
_REFRESH_STEPS = 25
# Rows copied at once from a dataset into a buffer.
_CHUNK = 4096


class OnPolicyConfig(StudentConfig):
    """A student that learns where it goes itself."""

    method: Literal["on_policy"] = Field(description="the student acts, the teachers label what it meets")
    objective: Literal["distill", "expected_entropy"] = Field(
        default="distill",
        description="distill: the loss on the states met, from a buffer; expected_entropy: KL(student || teacher) with its policy "
        "gradient, on each rollout once",
    )
    num_envs: int = Field(default=64, ge=2, le=4096, description="copies of each environment")
    updates_per_step: int = Field(
        default=2, ge=1, le=1000, description="distill: updates after each env step of all copies"
    )
    capacity: int = Field(
        default=100_000, ge=1000, le=100_000_000, description="labelled transitions kept for each environment"
    )
    warmup_steps: int = Field(
        default=200,
        ge=1,
        le=1_000_000,
        description="env steps of all copies that the teacher plays before the first update, unless datasets are given",
    )
    teacher_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of actions that are the teacher's at the first update",
    )
    teacher_share_end: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="what teacher_share falls to; 1, with a teacher_share of 1: the teacher alone acts",
    )
    teacher_share_fraction: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of the updates over which teacher_share falls to teacher_share_end",
    )
    epsilon: float = Field(default=0.0, ge=0, le=1, description="share of random actions")
    patience: int = Field(default=0, ge=0, le=0, description="0: on-policy distillation does all its updates")
    validation_episodes: int = Field(
        default=0,
        ge=0,
        le=100_000,
        description="0: the last weights are the result; else those with the best normalised return over so many greedy validation "
        "episodes of each environment, at every evaluation_interval",
    )
    expected_entropy: ExpectedEntropyConfig = ExpectedEntropyConfig()

    @model_validator(mode="after")
    def _expected_entropy_samples(self) -> Self:
        if self.objective == "expected_entropy":
            if self.loss != "kl" or self.feature_weight:
                raise ValueError(
                    "objective expected_entropy has a loss of its own: loss kl and no feature_weight are allowed"
                )
            if self.epsilon or self.teacher_share or self.teacher_share_end:
                raise ValueError(
                    "objective expected_entropy needs the student's own sampled actions: epsilon, teacher_share and "
                    "teacher_share_end 0 are allowed"
                )
        return self


@dataclass
class _Actor:
    """One environment: who acts there and where its episodes stand."""

    environment: EnvironmentConfig
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
        datasets: of the same teachers, by the same names: what the buffers hold at first, as far as it fits; optional.

    Attributes:
        training: the student's network and parameters.
        env_steps: taken so far, all environments together, without those of validation.

    Raises:
        StillhouseError: a dataset of another environment or kind of outputs; see
            :class:`stillhouse.distillation.student.StudentTraining` for more.
    """

    def __init__(
        self,
        config: OnPolicyConfig,
        teachers: Mapping[str, MultiTaskNetwork],
        environments: Mapping[str, EnvironmentConfig],
        seed: int,
        device: str = "cpu",
        datasets: Mapping[str, LabelledData] = MappingProxyType({}),
    ) -> None:
        self.config = config
        self.seed = seed
        self.device = device
        self.env_steps = 0
        self._latest: dict[str, float] = {}
        self._actors: dict[str, _Actor] = {}
        for name, teacher in teachers.items():
            envs = VectorEnvironment(environments[name], config.num_envs, seed, "on_policy")
            buffer = LabelledBuffer(envs.spec, teacher.spec.output, parameter_count(teacher), config.capacity)
            self._actors[name] = _Actor(
                environment=environments[name],
                teacher=network_policy(teacher.to(device), name, device),
                envs=envs,
                buffer=buffer,
                observations=envs.reset(),
                random=seeding.generator(seed, "on_policy", name),
                returns=deque(maxlen=100),
            )
        held = round(config.num_envs * config.holdout_fraction)
        self._held_out = np.arange(config.num_envs) < held  # always the same copies
        for name, dataset in datasets.items():
            self._fill(name, dataset)
        data = {name: actor.buffer for name, actor in self._actors.items()}
        feature_teachers = dict(teachers) if config.feature_weight else {}
        self.training = StudentTraining(config, data, seed, device, feature_teachers)
        self._students = {name: network_policy(self.training.network, name, device) for name in self._actors}
        self._references: dict[str, tuple[float, float]] = {}  # validation returns: teacher, random
        self._expected_entropy: ExpectedEntropy | None = None
        if config.objective == "expected_entropy":
            self._expected_entropy = ExpectedEntropy(
                config.expected_entropy, self.training, config.learning_rate, list(teachers), seed
            )

    @property
    def updates(self) -> int:
        """Done so far."""
        return self.training.updates

    @property
    def teacher_parameters(self) -> int:
        """Of all teachers together."""
        return self.training.teacher_parameters

    @property
    def best(self) -> dict[str, float]:
        """The metrics of the weights that are the result so far."""
        return self.training.best if self.config.validation_episodes else self._latest

    def train(self) -> Iterator[Report]:
        """Act and learn until all updates are done; :meth:`get_state` is exact whenever this has yielded.

        Yields:
            Per evaluation interval, in updates: what :meth:`StudentTraining.measure` gives, and ``return/<environment>``,
            the mean of the last 100 returns in training; ``rollout/teacher_share``.

        Raises:
            StillhouseError: the loss is not finite, or a teacher is no better than random where validation returns
                are normalised by it.
        """
        config = self.config
        method = self._expected_entropy
        if not self.env_steps and not all(len(actor.buffer) for actor in self._actors.values()):
            for _ in range(config.warmup_steps):
                self._act(1.0)
            self._refresh()
        while self.updates < config.updates:
            interval = min(config.evaluation_interval, config.updates - self.updates)
            losses = self._distill(interval) if method is None else self._descend(method, interval)
            self._refresh()  # so that a resumed training, which looks anew, sees the same rows
            score = self._validation_score() if config.validation_episodes else None
            metrics = {"update": float(self.updates), **self.training.measure(losses, score)}
            self._latest = metrics
            metrics = {**metrics, "rollout/teacher_share": self.teacher_share()}
            for name, actor in self._actors.items():
                if actor.returns:
                    metrics[f"return/{name}"] = float(np.mean(actor.returns))
            yield Report(self.updates, config.updates, metrics)

    def teacher_share(self) -> float:
        """Share of actions that are the teacher's at present: DAgger's beta."""
        config = self.config
        duration = config.teacher_share_fraction * config.updates
        return linear_schedule(config.teacher_share, config.teacher_share_end, duration, self.updates)

    def student(self) -> MultiTaskNetwork:
        """A network of its own, in evaluation mode: the weights of now, or the best on validation episodes.

        Raises:
            StillhouseError: there shall be a best, but nothing was measured yet.
        """
        return self.training.student(best=self.config.validation_episodes > 0)

    @property
    def _step_size(self) -> int:
        return self.config.num_envs * len(self._actors)

    def _distill(self, interval: int) -> dict[str, float]:
        """``interval`` updates from the buffers, which grow meanwhile; the environments' mean losses."""
        config = self.config
        losses, count = dict.fromkeys(self._actors, 0.0), 0
        while count < interval:
            self._act(self.teacher_share())
            if self.env_steps // self._step_size % _REFRESH_STEPS == 0:
                self._refresh()
            updates = min(config.updates_per_step, interval - count)
            for name, loss in self.training.update(updates).items():
                losses[name] += loss * updates
            count += updates
        return {name: loss / count for name, loss in losses.items()}

    def _descend(self, method: ExpectedEntropy, interval: int) -> dict[str, float]:
        """``interval`` updates, each on a part of a rollout that no other update sees; the environments' mean losses."""
        learning = ~self._held_out
        steps = method.config.rollout_length
        parts = max(1, steps * int(learning.sum()) // self.config.batch_size)
        sums, count = dict.fromkeys(self._actors, 0.0), 0
        while count < interval:
            batches = {}
            for name, actor in self._actors.items():
                rollout = method.play(
                    name,
                    actor.envs,
                    actor.observations,
                    self._students[name],
                    actor.teacher,
                    learning,
                    actor.random,
                )
                for observations, labels in zip(rollout.observations, rollout.labels, strict=True):
                    actor.buffer.append(observations, labels, self._held_out)  # to measure agreement
                actor.observations = rollout.following
                actor.returns.extend(rollout.episode_returns.tolist())
                batches[name] = method.split(rollout.batch, parts, actor.random)
            self.env_steps += steps * self._step_size
            for part in range(min(parts, interval - count)):
                losses = method.update({name: batch[part] for name, batch in batches.items()})
                for name, loss in losses.items():
                    sums[name] += float(loss)
                count += 1
        means = {name: total / count for name, total in sums.items()}
        if (
            not all(map(math.isfinite, means.values()))
            or not self.training.parameters.values.isfinite().all()
        ):
            raise StillhouseError(
                f"the expected-entropy loss or a weight is not finite after {self.updates} updates; no result is written; "
                f"lower learning_rate ({self.config.learning_rate:g}) or correction ({method.config.correction:g})"
            )
        return means

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

    def _fill(self, name: str, dataset: LabelledData) -> None:
        """Copy a dataset into the buffer: all of it or, evenly spaced, as much as fits."""
        if name not in self._actors:
            raise StillhouseError(
                f"a dataset for {name} was given, which is none of the student's environments; allowed are "
                + ", ".join(self._actors)
            )
        buffer, given = self._actors[name].buffer, dataset.schema
        if given.environment != buffer.schema.environment or given.output != buffer.schema.output:
            raise StillhouseError(
                f"{name}: the dataset must have the environment's spaces and the teacher's kind of outputs; "
                f"{given.environment} with {given.output} was given, {buffer.schema.environment} with "
                f"{buffer.schema.output} is allowed"
            )
        _, held = dataset.split(
            self.config.holdout_fraction, seeding.generator(self.seed, "distillation", "holdout", name)
        )
        held_out = np.zeros(len(dataset), np.bool_)
        held_out[held] = True
        count = min(len(dataset), buffer.capacity)
        rows = np.linspace(0, len(dataset) - 1, count).astype(np.int64)
        for start in range(0, count, _CHUNK):
            chunk = rows[start : start + _CHUNK]
            buffer.append(dataset.observations(chunk), dataset.outputs(chunk), held_out[chunk])

    def _validation_score(self) -> float:
        """Mean over the environments of the normalised greedy return on validation episodes."""
        episodes = self.config.validation_episodes

        def play(name: str, policy: Policy, epsilon: float = 0.0) -> float:
            environment = self._actors[name].environment
            found = evaluate(policy, environment, episodes, self.seed, epsilon, stream="validation")
            return float(found.returns.mean())

        scores = []
        for name, actor in self._actors.items():
            if name not in self._references:
                self._references[name] = play(name, actor.teacher), play(name, actor.teacher, epsilon=1.0)
            teacher, random = self._references[name]
            if teacher <= random:
                raise StillhouseError(
                    f"{name}: over {episodes} validation episodes the teacher's return is {teacher:.4g}, not above random "
                    f"play's {random:.4g}, so returns cannot be normalised; train it longer, or set validation_episodes to 0"
                )
            scores.append((play(name, self._students[name]) - random) / (teacher - random))
        return sum(scores) / len(scores)

    def get_state(self) -> dict[str, Any]:
        """Everything needed to continue exactly: plain data, arrays and tensors."""
        return {
            "training": self.training.get_state(),
            "env_steps": self.env_steps,
            "latest": [[name, value] for name, value in self._latest.items()],
            "references": {name: list(returns) for name, returns in self._references.items()},
            "critics": self._expected_entropy and self._expected_entropy.get_state(),
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
        if self._expected_entropy is not None:
            self._expected_entropy.set_state(state["critics"])
        self.env_steps = state["env_steps"]
        self._latest = dict(state["latest"])
        self._references = {
            name: (teacher, random) for name, (teacher, random) in state["references"].items()
        }
