"""The student in training: the core that offline, on-policy and online distillation share.

It holds one network for several environments, draws batches of what their teachers labelled, descends

    sum_e w_e L(student(o_e), teacher_e(o_e)) / sum_e w_e        with o_e a batch of environment e's data

for one of the losses of ``stillhouse.losses.distillation``, measures the agreement on held-out rows and keeps the best
weights. Where the rows come from is the caller's: :class:`LabelledData` may be a dataset on disk or a buffer in memory,
and may grow or be replaced while training goes on.

With MSE the student learns standardised outputs: ``q_s = mean_e + std_e * head(...)``, folded into the head's weights at
the end. The loss is unchanged; without it the head's bias, moving by about the learning rate per update, would need tens
of thousands of updates to reach Q-values of a hundred.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.errors import StillhouseError
from stillhouse.losses.distillation import (
    action_gap_temperature,
    constant_loss,
    feature_loss,
    kl_to_policy,
    mse_loss,
    teacher_log_policy,
)
from stillhouse.networks.multi_task import (
    MultiTaskNetwork,
    NetworkSize,
    NetworkSpec,
    build_network,
    parameter_count,
)
from stillhouse.networks.parameters import FlatParameters
from stillhouse.types import EnvironmentSpec, OutputKind

LOGITS_TEMPERATURE = 1.0  # they are a policy already
# Agreement on so many rows has a standard error below 0.8 %; more would only take time.
MAXIMUM_HOLDOUT_ROWS = 4096
# Mean and deviation of the teacher's outputs are taken over at most so many rows, evenly spaced.
_STATISTICS_ROWS = 65_536
_EVALUATION_BATCH = 1024
# Observations of several batches are gathered at once, up to about a processor's second-level cache.
_GATHERED_BYTES = 2**20
# A resting environment is woken when its agreement has fallen by more than measurements scatter.
_WAKING_LOSS = 0.01
# Nats, about 1 % of rows with another greedy action than all the others.
_SMALLEST_CONSTANT_LOSS = 0.05


class TeacherFacts(Protocol):
    """What must be known of the teacher behind some data."""

    @property
    def environment(self) -> EnvironmentSpec: ...
    @property
    def output(self) -> OutputKind: ...
    @property
    def teacher_parameters(self) -> int: ...
    @property
    def mean_action_gap(self) -> float: ...


class LabelledData(Protocol):
    """Observations of one environment with its teacher's outputs; rows are numbered from 0."""

    @property
    def schema(self) -> TeacherFacts:
        """Facts that hold for all rows."""
        ...

    def __len__(self) -> int: ...

    def observations(self, rows: np.ndarray) -> np.ndarray:
        """Observations ``[B, ...]`` of ``rows`` ``[B]``, in the environment's own type."""
        ...

    def outputs(self, rows: np.ndarray) -> np.ndarray:
        """The teacher's outputs of ``rows``, float32 ``[B, A]``."""
        ...

    def split(self, holdout_fraction: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rows for training and rows held out, both uint32 and sorted; the second may be empty."""
        ...


class StudentConfig(Config):
    """How a student is trained, and how large it is: what every method of distillation has in common."""

    loss: Literal["kl", "nll", "mse"] = Field(
        default="kl", description="kl and nll give a policy (logits), mse gives Q-values"
    )
    temperature: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="kl: divides the teacher's outputs; null: for Q-values from their mean action gap and greedy_odds, 1 for logits",
    )
    greedy_odds: float = Field(
        default=2.0,
        gt=1,
        le=1e9,
        description="kl without a temperature: in a state of mean action gap the teacher's best action is so many times as probable as its "
        "second best",
    )
    batch_size: int = Field(default=256, ge=1, le=65536, description="transitions per environment and update")
    batch_shares: dict[str, float] = Field(
        default_factory=dict,
        description="an environment's batch as a multiple of batch_size, by name; 1 where none is given",
    )
    updates: int = Field(default=20_000, ge=1, le=100_000_000)
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    linear_decay: bool = Field(default=True, description="let the learning rate fall to 0 over all updates")
    evaluation_interval: int = Field(
        default=500, ge=1, le=1_000_000, description="updates between two measurements of held-out agreement"
    )
    patience: int = Field(
        default=10,
        ge=0,
        le=1_000_000,
        description="stop after so many measurements without a better one; 0: never",
    )
    holdout_fraction: float = Field(
        default=0.1, gt=0, le=0.5, description="share of transitions held out, by episode"
    )
    weights: dict[str, float] = Field(
        default_factory=dict, description="weight of an environment's loss, by name; 1 where none is given"
    )
    normalise_loss: bool = Field(
        default=False,
        description="divide each environment's loss by that of the best constant answer (mse: the variance of the teacher's "
        "outputs), so that large Q-values do not drown small ones",
    )
    environment_patience: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="an environment whose held-out agreement has not grown for so many measurements rests until it falls: it "
        "takes part in one of rest_interval updates; 0: never",
    )
    rest_interval: int = Field(
        default=10, ge=1, le=10_000, description="updates from one of a resting environment to the next"
    )
    feature_weight: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="weight of Actor-Mimic's feature regression, there 0.01; needs the teachers' networks",
    )
    size: NetworkSize = NetworkSize()
    parameter_fraction: float = Field(
        default=0,
        ge=0,
        le=1,
        description="scale the widths of size to at most this share of the teachers' parameters together; "
        "0: as given",
    )

    @field_validator("weights", "batch_shares")
    @classmethod
    def _positive(cls, values: dict[str, float]) -> dict[str, float]:
        if not all(value > 0 for value in values.values()):
            raise ValueError("numbers greater than 0 are allowed")
        return values

    @model_validator(mode="after")
    def _possible_size(self) -> Self:
        # Each environment's Q-values have a mean and deviation of their own, which are folded into a head of its own.
        if self.size.separate:
            raise ValueError("a student is one network: size.separate must be false")
        if self.loss == "mse" and self.size.share_head:
            raise ValueError("size.share_head is allowed with loss kl or nll, not with mse")
        return self


@dataclass
class _Source:
    """One environment's data, and where sampling stands."""

    name: str
    data: LabelledData
    random: np.random.Generator
    batch_size: int
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))  # for training
    held_rows: np.ndarray = field(
        default_factory=lambda: np.zeros(0, np.uint32)
    )  # at most MAXIMUM_HOLDOUT_ROWS
    held_actions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # the teacher's
    # Of the teacher's outputs, once there are any:
    measured: bool = False
    weight: float = 0.0  # of the loss, including the normalisation
    temperature: float = 1.0
    shift: float = 0.0  # mse: the student's outputs are shift + scale * head
    scale: float = 1.0
    # How it stands:
    loss: float = 0.0  # mean over the latest updates it took part in
    best: float = -1.0  # agreement
    since_best: int = 0  # measurements
    resting: bool = False

    def get_state(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in _SOURCE_STATE}
        return {**state, "random": self.random.bit_generator.state}

    def set_state(self, state: dict[str, Any]) -> None:
        for name in _SOURCE_STATE:
            setattr(self, name, state[name])
        self.random.bit_generator.state = state["random"]


_SOURCE_STATE = (
    "measured",
    "weight",
    "temperature",
    "shift",
    "scale",
    "loss",
    "best",
    "since_best",
    "resting",
)


class StudentTraining:
    """A student in training. Give it data, :meth:`update`, :meth:`measure`; :meth:`student` is the result.

    Args:
        config: how.
        data: one per environment, by the name its head shall have; may still be empty, see :meth:`grown`.
        seed: the stage's seed.
        device: torch device.
        teachers: their networks, by the same names; only for ``feature_weight``.

    Attributes:
        network: the student; its weights change with every update.
        updates: done so far.
        best: the metrics of the best measurement so far.

    Raises:
        StillhouseError: no data, weights for unknown environments, a budget too small for any network, a dataset of a
            single episode, MSE on teachers of different kinds, or a feature weight without teachers.
    """

    def __init__(
        self,
        config: StudentConfig,
        data: Mapping[str, LabelledData],
        seed: int,
        device: str = "cpu",
        teachers: Mapping[str, MultiTaskNetwork] = MappingProxyType({}),
        initial: MultiTaskNetwork | None = None,
    ) -> None:
        _check(config, data, teachers)
        self.config = config
        self.seed = seed
        self.device = device
        self.updates = 0
        environments = {name: given.schema.environment for name, given in data.items()}
        self.teacher_parameters = sum(given.schema.teacher_parameters for given in data.values())
        size = config.size
        if config.parameter_fraction:
            size = size_for_budget(
                size, environments, math.floor(config.parameter_fraction * self.teacher_parameters)
            )
        spec = NetworkSpec(size=size, environments=environments, output=_output_kind(config, data))
        self.network: MultiTaskNetwork = build_network(
            spec, seeding.derive(seed, "distillation", "weights")
        ).to(device)
        if initial is not None:
            _take_over(self.network, initial)
        self._continued = initial is not None
        self._teachers = dict(teachers) if config.feature_weight else {}
        self._readers = self._build_readers()
        self.parameters = FlatParameters(
            self.network, config.learning_rate, beside={"readers": self._readers}
        )
        self._sources = {
            name: _Source(
                name,
                given,
                seeding.generator(seed, "distillation", "batches", name),
                max(1, round(config.batch_size * config.batch_shares.get(name, 1.0))),
            )
            for name, given in data.items()
        }
        for name in data:
            self.grown(name)
        self.best: dict[str, float] = {}
        self._best_weights: Tensor | None = None
        self._measurements_since_best = 0

    @property
    def finished(self) -> bool:
        """All updates done, or agreement has stopped growing, on average or in every single environment."""
        patience = self.config.patience
        return (
            self.updates >= self.config.updates
            or 0 < patience <= self._measurements_since_best
            or all(source.resting for source in self._sources.values())
        )

    def grown(self, name: str) -> None:
        """Look at the data of ``name`` again: rows were added, or overwritten by more of the same teacher's."""
        source = self._sources[name]
        if not len(source.data):
            return
        rows, held = source.data.split(
            self.config.holdout_fraction, seeding.generator(self.seed, "distillation", "holdout", name)
        )
        if len(held) > MAXIMUM_HOLDOUT_ROWS:
            choice = seeding.generator(self.seed, "distillation", "holdout rows", name)
            held = np.sort(choice.choice(held, MAXIMUM_HOLDOUT_ROWS, replace=False))
        source.rows, source.held_rows = rows, held
        source.held_actions = torch.from_numpy(source.data.outputs(held)).argmax(1).to(self.device)
        if not source.measured:
            self._measure_outputs(source)

    def replace(self, name: str, data: LabelledData, teacher: MultiTaskNetwork | None = None) -> None:
        """Learn ``name`` from other data from now on, for example of a teacher that has become better.

        The student's outputs stay as they are; the measurements start anew, because agreement with another teacher
        cannot be compared with what was best so far.

        Args:
            name: the environment.
            data: the new data.
            teacher: its network, where ``feature_weight`` is set.

        Raises:
            StillhouseError: another environment or kind of outputs than before.
        """
        source = self._sources[name]
        before, after = source.data.schema, data.schema
        if after.environment != before.environment or after.output != before.output:
            raise StillhouseError(
                f"{name}: new data must have the spaces and the kind of outputs of the old; {after.environment} with "
                f"{after.output} was given, {before.environment} with {before.output} is allowed"
            )
        if self.config.feature_weight:
            _check_teachers(self.config, [name], {} if teacher is None else {name: teacher})
            assert teacher is not None
            self._teachers[name] = teacher
        source.data, source.measured = data, False
        source.best, source.since_best, source.resting = -1.0, 0, False
        self.grown(name)
        self.best = {}
        self._best_weights = None
        self._measurements_since_best = 0

    def update(self, count: int) -> dict[str, float]:
        """``count`` updates on fresh batches, drawn with replacement; the environments' mean losses.

        Raises:
            StillhouseError: an environment without data, or a loss or weight that is not finite.
        """
        if empty := [source.name for source in self._sources.values() if not len(source.rows)]:
            raise StillhouseError(f"{', '.join(empty)}: no transition to learn from yet; collect some first")
        losses: dict[str, list[Tensor]] = {name: [] for name in self._sources}
        batches = {name: self._batches(source, count) for name, source in self._sources.items()}
        for _ in range(count):
            batch_losses = {
                name: self._loss(source, *next(batches[name])) for name, source in self._active().items()
            }
            self.descend(batch_losses)
            for name, loss in batch_losses.items():
                losses[name].append(loss.detach())
        for name, values in losses.items():
            if values:
                self._sources[name].loss = float(torch.stack(values).double().mean())
        means = {name: source.loss for name, source in self._sources.items()}
        if not all(map(math.isfinite, means.values())) or not self.parameters.values.isfinite().all():
            raise StillhouseError(
                f"the {self.config.loss} loss or a weight is not finite after {self.updates} updates; no "
                f"result is written; lower learning_rate ({self.config.learning_rate:g})"
            )
        return means

    def descend(self, losses: Mapping[str, Tensor]) -> None:
        """One update on given losses, a scalar per environment that takes part."""
        config = self.config
        self.parameters.zero_gradient()
        shares = self._shares()
        # The same as the gradient of the weighted sum, without the operations that make the sum.
        torch.autograd.backward(
            list(losses.values()), [loss.new_tensor(shares[name]) for name, loss in losses.items()]
        )
        decay = 1 - self.updates / config.updates if config.linear_decay else 1.0
        self.parameters.step(config.learning_rate * max(0.0, decay))
        self.updates += 1

    def temperature(self, name: str) -> float:
        """What divides the outputs of the teacher of ``name``; known once there are any."""
        return self._sources[name].temperature

    def measure(self, losses: Mapping[str, float], score: float | None = None) -> dict[str, float]:
        """Agreement on held-out rows now; kept as the best where it is.

        Args:
            losses: of the environments since the last measurement: see :meth:`update`.
            score: what decides which measurement is the best, instead of the agreement; shown as ``eval/score``.

        Returns:
            ``loss/distill`` (weighted), ``loss/<environment>`` and, where rows are held out, ``agreement/<environment>``
            and their mean ``eval/agreement``. Without any held-out row the latest measurement is the best one. With
            ``environment_patience`` also ``resting/<environment>``, 0 or 1.
        """
        shares = self._shares()
        metrics = {"loss/distill": sum(shares[name] * loss for name, loss in losses.items())}
        agreements = []
        for name, source in self._sources.items():
            metrics[f"loss/{name}"] = losses[name]
            if len(source.held_rows):
                agreements.append(self._agreement(source))
                metrics[f"agreement/{name}"] = agreements[-1]
                if self.config.environment_patience:
                    self._rest_or_wake(source, agreements[-1])
                    metrics[f"resting/{name}"] = float(source.resting)
        if agreements:
            metrics["eval/agreement"] = sum(agreements) / len(agreements)
        decisive = "eval/agreement" if score is None else "eval/score"
        if score is not None:
            metrics["eval/score"] = score
        if decisive not in metrics or metrics[decisive] > self.best.get(decisive, -math.inf):
            self.best = {"update": float(self.updates), **metrics}
            self._best_weights = self.parameters.values.detach().clone()
            self._measurements_since_best = 0
        else:
            self._measurements_since_best += 1
        return metrics

    def student(self, best: bool = True) -> MultiTaskNetwork:
        """A network of its own, in evaluation mode, with the best weights so far or with those of now.

        Raises:
            StillhouseError: nothing was measured yet, so nothing is best.
        """
        weights = self._best_weights if best else self.parameters.values.detach()
        if weights is None:
            raise StillhouseError("the student has not been trained yet")
        student = MultiTaskNetwork(self.network.spec).to(self.device)
        weights = weights[: parameter_count(student)].clone()  # what follows was trained beside the network
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(weights, student.parameters())
            for source in self._sources.values() if self.config.loss == "mse" else ():
                head: Any = student.heads[source.name]
                head.weight.mul_(source.scale)
                head.bias.mul_(source.scale).add_(source.shift)
        return student.eval()

    def get_state(self) -> dict[str, Any]:
        """Everything needed to continue exactly, but the data: plain values and tensors."""
        return {
            "updates": self.updates,
            "parameters": self.parameters.get_state(),
            "sources": {name: source.get_state() for name, source in self._sources.items()},
            "best": [[name, value] for name, value in self.best.items()],
            "best_weights": self._best_weights,
            "measurements_since_best": self._measurements_since_best,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get_state` of a training with the same arguments; the data must be as it was then."""
        self.updates = state["updates"]
        self.parameters.set_state(state["parameters"])
        for name, source in self._sources.items():
            source.set_state(state["sources"][name])
            self.grown(name)
        self.best = dict(state["best"])
        best = state["best_weights"]
        self._best_weights = None if best is None else torch.as_tensor(best).to(self.device, copy=True)
        self._measurements_since_best = state["measurements_since_best"]

    def _shares(self) -> dict[str, float]:
        """Each environment's weight over the sum of the weights that were asked for."""
        total = sum(self.config.weights.get(name, 1.0) for name in self._sources)
        return {name: source.weight / total for name, source in self._sources.items()}

    def _active(self) -> dict[str, _Source]:
        """The environments that take part in the next update."""
        if self.updates % self.config.rest_interval == 0:
            return self._sources
        awake = {name: source for name, source in self._sources.items() if not source.resting}
        return awake or self._sources

    def _rest_or_wake(self, source: _Source, agreement: float) -> None:
        if agreement > source.best:
            source.best, source.since_best = agreement, 0
        else:
            source.since_best += 1
        if source.resting:
            source.resting = agreement >= source.best - _WAKING_LOSS
            source.since_best = 0 if not source.resting else source.since_best
        else:
            source.resting = source.since_best >= self.config.environment_patience

    def _measure_outputs(self, source: _Source) -> None:
        """Temperature, weight and, for MSE, the outputs' scale from the teacher's own outputs."""
        config = self.config
        count = len(source.data)
        rows = np.linspace(0, count - 1, min(count, _STATISTICS_ROWS)).astype(np.int64)
        outputs = torch.from_numpy(source.data.outputs(rows))
        source.temperature = _temperature(config, source.name, source.data.schema)
        source.weight = config.weights.get(source.name, 1.0)
        if config.normalise_loss:
            constant = constant_loss(config.loss, outputs, source.temperature)
            # A teacher that nearly always answers the same must not be weighted without limit for its exceptions.
            source.weight /= max(constant, 0.0 if config.loss == "mse" else _SMALLEST_CONSTANT_LOSS) or 1.0
        if config.loss == "mse":
            spread = outputs.double()
            self._rescale(source, float(spread.mean()), float(spread.std(correction=0)) or 1.0)
        source.measured = True

    def _rescale(self, source: _Source, shift: float, scale: float) -> None:
        """Change shift and scale; what has learnt keeps its outputs (what is fresh starts standardised)."""
        if self.updates or self._continued:
            head: Any = self.network.heads[source.name]
            with torch.no_grad():
                head.weight.mul_(source.scale / scale)
                head.bias.mul_(source.scale / scale).add_((source.shift - shift) / scale)
        source.shift, source.scale = shift, scale

    def _build_readers(self) -> nn.ModuleDict:
        """The linear layers that read each teacher's features off the student's; no part of the student."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.derive(self.seed, "distillation", "feature readers"))
            readers = {
                name: nn.Linear(self.network.feature_count, teacher.feature_count)
                for name, teacher in self._teachers.items()
            }
        return nn.ModuleDict(readers).to(self.device)

    def _batches(self, source: _Source, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """At most ``count`` batches, drawn with replacement: observations ``[B, ...]``, the loss's target and the
        teacher's features ``[B, F]``.

        Several batches are gathered at once, as far as they stay in the processor's cache: on small networks the fixed
        cost of an operation counts for more than its work.
        """
        size = source.batch_size
        observation = self.network.spec.environments[source.name].observation
        row_bytes = math.prod(observation.stored_shape) * observation.dtype.itemsize
        while count:
            together = min(count, max(1, _GATHERED_BYTES // (size * max(1, row_bytes))))
            rows = source.rows[source.random.integers(len(source.rows), size=together * size)]
            observations = torch.from_numpy(source.data.observations(rows)).to(self.device)
            target = self._target(source, torch.from_numpy(source.data.outputs(rows)).to(self.device))
            features = self._teacher_features(source.name, observations)
            for start in range(0, together * size, size):
                batch = slice(start, start + size)
                yield observations[batch], target[batch], None if features is None else features[batch]
            count -= together

    def _target(self, source: _Source, teacher: Tensor) -> Tensor:
        """What the loss compares with, from the teacher's outputs ``[B, A]``."""
        if self.config.loss == "kl":
            return teacher_log_policy(teacher, source.temperature)
        if self.config.loss == "nll":
            return teacher.argmax(1)
        return teacher

    @torch.no_grad()
    def _teacher_features(self, name: str, observations: Tensor) -> Tensor | None:
        if not self.config.feature_weight:
            return None
        teacher = self._teachers[name]
        (head,) = teacher.spec.environments  # a teacher knows its environment by its own name
        return teacher.features(observations, head)

    def _loss(
        self, source: _Source, observations: Tensor, target: Tensor, teacher_features: Tensor | None
    ) -> Tensor:
        features = self.network.features(observations, source.name)
        student = self.network.head(features, source.name)  # [B, A]
        if self.config.loss == "kl":
            loss = kl_to_policy(student, target)
        elif self.config.loss == "nll":
            loss = functional.cross_entropy(student, target)
        else:
            loss = mse_loss(student * source.scale + source.shift, target)
        if teacher_features is not None:
            predicted = self._readers[source.name](features)
            loss = loss + self.config.feature_weight * feature_loss(predicted, teacher_features)
        return loss

    @torch.inference_mode()
    def _agreement(self, source: _Source) -> float:
        chosen = []
        for start in range(0, len(source.held_rows), _EVALUATION_BATCH):
            rows = source.held_rows[start : start + _EVALUATION_BATCH]
            observations = torch.from_numpy(source.data.observations(rows)).to(self.device)
            chosen.append(self.network(observations, source.name).argmax(1))
        return float((torch.cat(chosen) == source.held_actions).double().mean())


def size_for_budget(
    size: NetworkSize, environments: Mapping[str, EnvironmentSpec], budget: int
) -> NetworkSize:
    """``size`` with all widths scaled by one factor, the largest with at most ``budget`` parameters.

    Raises:
        StillhouseError: even widths of 1 take more, naming how many.
    """

    def scaled(factor: int) -> NetworkSize:  # in 256ths
        def width(given: int, limit: int) -> int:
            return min(max(1, given * factor // 256), limit)

        return size.model_copy(
            update={
                "conv_channels": width(size.conv_channels, 1024),
                "features": width(size.features, 8192),
                "torso": tuple(width(given, 8192) for given in size.torso),
            }
        )

    def fits(factor: int) -> bool:
        return _parameters(scaled(factor), environments) <= budget

    if not fits(1):
        minimum = _parameters(scaled(1), environments)
        raise StillhouseError(
            f"a student of at most {budget} parameters is too small: the smallest network for "
            f"{', '.join(environments)} has {minimum}; raise parameter_fraction"
        )
    # The number of parameters grows with the factor, so bisect; factors beyond the limit change nothing.
    low, high = 1, 256 * 8192
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return scaled(low)


def _parameters(size: NetworkSize, environments: Mapping[str, EnvironmentSpec]) -> int:
    with torch.device("meta"):  # shapes without memory
        return parameter_count(
            MultiTaskNetwork(NetworkSpec(size=size, environments=dict(environments), output="logits"))
        )


def _output_kind(config: StudentConfig, data: Mapping[str, LabelledData]) -> OutputKind:
    if config.loss != "mse":
        return "logits"
    kinds = {given.schema.output for given in data.values()}
    if len(kinds) > 1:
        raise StillhouseError(
            "loss 'mse' makes one kind of student, but the teachers' outputs are of two: "
            + ", ".join(f"{name} {given.schema.output}" for name, given in data.items())
            + "; use 'kl' or 'nll'"
        )
    return kinds.pop()


def _temperature(config: StudentConfig, name: str, teacher: TeacherFacts) -> float:
    if (
        config.temperature
        or teacher.output == "logits"
        or teacher.environment.actions == 1
        or config.loss != "kl"
    ):
        return config.temperature or LOGITS_TEMPERATURE
    if not teacher.mean_action_gap > 0:
        raise StillhouseError(
            f"{name}: its teacher prefers no action anywhere (mean action gap {teacher.mean_action_gap:g}), so no temperature can be "
            "taken from it; train that teacher longer, or give a temperature"
        )
    return action_gap_temperature(teacher.mean_action_gap, config.greedy_odds)


def _take_over(network: MultiTaskNetwork, initial: MultiTaskNetwork) -> None:
    """Raises StillhouseError where the two are not of one shape and kind."""
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in each.state_dict().items()}
        for each in (network, initial)
    ]
    if shapes[0] != shapes[1] or network.spec.output != initial.spec.output:
        other = sorted(
            name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
        )
        raise StillhouseError(
            f"the student to go on from is another network ({', '.join(other[:3]) or initial.spec.output}); give it the same "
            "environments, size and kind of loss, or start afresh"
        )
    network.load_state_dict(initial.state_dict())


def _check(
    config: StudentConfig, data: Mapping[str, LabelledData], teachers: Mapping[str, MultiTaskNetwork]
) -> None:
    if not data:
        raise StillhouseError("distillation needs at least one dataset")
    for field_name in ("weights", "batch_shares"):
        if unknown := sorted(set(getattr(config, field_name)) - set(data)):
            raise StillhouseError(
                f"{field_name}: {', '.join(unknown)} is not among the student's environments; allowed are "
                + ", ".join(data)
            )
    _check_teachers(config, list(data), teachers)


def _check_teachers(
    config: StudentConfig, names: list[str], teachers: Mapping[str, MultiTaskNetwork]
) -> None:
    missing = [name for name in names if name not in teachers]
    if config.feature_weight and missing:
        raise StillhouseError(
            f"feature_weight {config.feature_weight:g} needs the teachers' networks, but none was given for "
            f"{', '.join(missing)}; give them, or set feature_weight to 0"
        )
