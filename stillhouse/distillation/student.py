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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.errors import StillhouseError
from stillhouse.losses.distillation import kl_loss, mse_loss, nll_loss
from stillhouse.networks.multi_task import (
    MultiTaskNetwork,
    NetworkSize,
    NetworkSpec,
    build_network,
    parameter_count,
)
from stillhouse.networks.parameters import FlatParameters
from stillhouse.types import EnvironmentSpec, OutputKind

# Sharpens Q-values, whose action gaps are small; logits are a policy already.
DEFAULT_TEMPERATURE: dict[OutputKind, float] = {"q_values": 0.01, "logits": 1.0}
# Agreement on so many rows has a standard error below 0.8 %; more would only take time.
MAXIMUM_HOLDOUT_ROWS = 4096
# Mean and deviation of the teacher's outputs are taken over at most so many rows, evenly spaced.
_STATISTICS_ROWS = 65_536
_EVALUATION_BATCH = 1024


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
        """Rows for training and rows held out, both sorted; the second may be empty."""
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
        description="kl: divides the teacher's outputs; null: 0.01 for Q-values, 1 for logits",
    )
    batch_size: int = Field(default=256, ge=1, le=65536, description="transitions per environment and update")
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
    normalise_mse: bool = Field(
        default=False,
        description="mse: divide each environment's loss by the variance of its teacher's outputs, so that "
        "large Q-values do not drown small ones",
    )
    size: NetworkSize = NetworkSize()
    parameter_fraction: float = Field(
        default=0,
        ge=0,
        le=1,
        description="scale the widths of size to at most this share of the teachers' parameters together; "
        "0: as given",
    )

    @field_validator("weights")
    @classmethod
    def _positive(cls, weights: dict[str, float]) -> dict[str, float]:
        if not all(weight > 0 for weight in weights.values()):
            raise ValueError("weights greater than 0 are allowed")
        return weights


@dataclass
class _Source:
    """One environment's data, and where sampling stands."""

    name: str
    data: LabelledData
    random: np.random.Generator
    weight: float = 0.0  # share of the total loss, including the normalisation
    temperature: float = 1.0
    shift: float = 0.0  # mse: the student's outputs are shift + scale * head
    scale: float = 1.0
    measured: bool = False  # whether the teacher's outputs were, for temperature, shift and scale
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))  # for training
    held_rows: np.ndarray = field(
        default_factory=lambda: np.zeros(0, np.uint32)
    )  # at most MAXIMUM_HOLDOUT_ROWS
    held_actions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # the teacher's


class StudentTraining:
    """A student in training. Give it data, :meth:`update`, :meth:`measure`; :meth:`student` is the result.

    Args:
        config: how.
        data: one per environment, by the name its head shall have; may still be empty, see :meth:`grown`.
        seed: the stage's seed.
        device: torch device.

    Attributes:
        network: the student; its weights change with every update.
        updates: done so far.
        best: the metrics of the best measurement so far.

    Raises:
        StillhouseError: no data, weights for unknown environments, a budget too small for any network, a dataset of a
            single episode, or MSE on teachers of different kinds.
    """

    def __init__(
        self, config: StudentConfig, data: Mapping[str, LabelledData], seed: int, device: str = "cpu"
    ) -> None:
        _check(config, data)
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
        self.parameters = FlatParameters(self.network, config.learning_rate)
        self._sources = {
            name: _Source(name, given, seeding.generator(seed, "distillation", "batches", name))
            for name, given in data.items()
        }
        self._gather_weights()
        for name in data:
            self.grown(name)
        self.best: dict[str, float] = {}
        self._best_weights: Tensor | None = None
        self._measurements_since_best = 0

    @property
    def finished(self) -> bool:
        """All updates done, or agreement has stopped growing."""
        patience = self.config.patience
        return self.updates >= self.config.updates or 0 < patience <= self._measurements_since_best

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
        source.rows, source.held_rows = rows.astype(np.uint32), held.astype(np.uint32)
        source.held_actions = torch.from_numpy(source.data.outputs(held)).argmax(1).to(self.device)
        if not source.measured:
            self._measure_outputs(source)

    def replace(self, name: str, data: LabelledData) -> None:
        """Learn ``name`` from other data from now on, for example of a teacher that has become better.

        The student's outputs stay as they are; the measurements start anew, because agreement with another teacher cannot
        be compared with what was best so far.

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
        source.data, source.measured = data, False
        self.grown(name)
        self.best = {}
        self._best_weights = None
        self._measurements_since_best = 0

    def update(self, count: int) -> np.ndarray:
        """``count`` updates on fresh batches, drawn with replacement; the environments' mean losses, float64 [E].

        Raises:
            StillhouseError: an environment without data, or a loss or weight that is not finite.
        """
        if empty := [source.name for source in self._sources.values() if not len(source.rows)]:
            raise StillhouseError(f"{', '.join(empty)}: no transition to learn from yet; collect some first")
        sums = torch.zeros(len(self._sources), dtype=torch.float64, device=self.device)
        for _ in range(count):
            sums += self.descend([self._loss(source) for source in self._sources.values()])
        losses: np.ndarray = (sums / count).cpu().numpy()
        if not np.isfinite(losses).all() or not self.parameters.values.isfinite().all():
            raise StillhouseError(
                f"the {self.config.loss} loss or a weight is not finite after {self.updates} updates; no "
                f"result is written; lower learning_rate ({self.config.learning_rate:g})"
            )
        return losses

    def descend(self, losses: Sequence[Tensor]) -> Tensor:
        """One update on given losses, a scalar per environment in the order of the data; the losses, detached [E]."""
        config = self.config
        stacked = torch.stack(list(losses))
        self.parameters.zero_gradient()
        (stacked @ self._weights).backward()
        decay = 1 - self.updates / config.updates if config.linear_decay else 1.0
        self.parameters.step(config.learning_rate * max(0.0, decay))
        self.updates += 1
        return stacked.detach()

    def measure(self, losses: np.ndarray) -> dict[str, float]:
        """Agreement on held-out rows now; kept as the best where it is.

        Args:
            losses: of the environments since the last measurement, [E]: see :meth:`update`.

        Returns:
            ``loss/distill`` (weighted), ``loss/<environment>`` and, where rows are held out, ``agreement/<environment>``
            and their mean ``eval/agreement``. Without any held-out row the latest measurement is the best one.
        """
        metrics = {"loss/distill": float(self._weights.double().cpu().numpy() @ losses)}
        agreements = []
        for source, loss in zip(self._sources.values(), losses, strict=True):
            metrics[f"loss/{source.name}"] = float(loss)
            if len(source.held_rows):
                agreements.append(self._agreement(source))
                metrics[f"agreement/{source.name}"] = agreements[-1]
        if agreements:
            metrics["eval/agreement"] = sum(agreements) / len(agreements)
        if not agreements or metrics["eval/agreement"] > self.best.get("eval/agreement", -1.0):
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
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(weights.clone(), student.parameters())
            for source in self._sources.values():
                head: Any = student.heads[source.name]
                head.weight.mul_(source.scale)
                head.bias.mul_(source.scale).add_(source.shift)
        return student.eval()

    def get_state(self) -> dict[str, Any]:
        """Everything needed to continue exactly, but the data: plain values and tensors."""
        return {
            "updates": self.updates,
            "parameters": self.parameters.get_state(),
            "random": {name: source.random.bit_generator.state for name, source in self._sources.items()},
            "outputs": {
                name: [source.weight, source.temperature, source.shift, source.scale, source.measured]
                for name, source in self._sources.items()
            },
            "best": [[name, value] for name, value in self.best.items()],
            "best_weights": self._best_weights,
            "measurements_since_best": self._measurements_since_best,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get_state` of a training with the same arguments; the data must be as it was then."""
        self.updates = state["updates"]
        self.parameters.set_state(state["parameters"])
        for name, source in self._sources.items():
            source.random.bit_generator.state = state["random"][name]
            source.weight, source.temperature, source.shift, source.scale, source.measured = state["outputs"][
                name
            ]
            self.grown(name)
        self._gather_weights()
        self.best = dict(state["best"])
        best = state["best_weights"]
        self._best_weights = None if best is None else torch.as_tensor(best).to(self.device, copy=True)
        self._measurements_since_best = state["measurements_since_best"]

    def _measure_outputs(self, source: _Source) -> None:
        """Temperature, weight and, for MSE, the outputs' scale from the teacher's own outputs."""
        config = self.config
        source.temperature = config.temperature or DEFAULT_TEMPERATURE[source.data.schema.output]
        source.weight = config.weights.get(source.name, 1.0)
        if config.loss == "mse":
            count = len(source.data)
            outputs = source.data.outputs(
                np.linspace(0, count - 1, min(count, _STATISTICS_ROWS)).astype(np.int64)
            )
            shift, scale = float(outputs.mean(dtype=np.float64)), float(outputs.std(dtype=np.float64)) or 1.0
            self._rescale(source, shift, scale)
            if config.normalise_mse:
                source.weight /= scale**2
        source.measured = True
        self._gather_weights()

    def _rescale(self, source: _Source, shift: float, scale: float) -> None:
        """Change shift and scale; after any update the outputs stay as they are (fresh ones start standardised)."""
        if self.updates:
            head: Any = self.network.heads[source.name]
            with torch.no_grad():
                head.weight.mul_(source.scale / scale)
                head.bias.mul_(source.scale / scale).add_((source.shift - shift) / scale)
        source.shift, source.scale = shift, scale

    def _gather_weights(self) -> None:
        total = sum(self.config.weights.get(name, 1.0) for name in self._sources)
        weights = [source.weight / total for source in self._sources.values()]
        self._weights = torch.tensor(weights, device=self.device)

    def _loss(self, source: _Source) -> Tensor:
        """The loss of a fresh batch, drawn with replacement; a scalar."""
        rows = source.rows[source.random.integers(len(source.rows), size=self.config.batch_size)]
        student = self._outputs(source, rows)  # [B, A]
        teacher = torch.from_numpy(source.data.outputs(rows)).to(self.device)
        if self.config.loss == "kl":
            return kl_loss(student, teacher, source.temperature)
        if self.config.loss == "nll":
            return nll_loss(student, teacher)
        return mse_loss(student * source.scale + source.shift, teacher)

    def _outputs(self, source: _Source, rows: np.ndarray) -> Tensor:
        observations = torch.from_numpy(source.data.observations(rows)).to(self.device)
        outputs: Tensor = self.network(observations, source.name)
        return outputs

    @torch.inference_mode()
    def _agreement(self, source: _Source) -> float:
        chosen = [
            self._outputs(source, source.held_rows[start : start + _EVALUATION_BATCH]).argmax(1)
            for start in range(0, len(source.held_rows), _EVALUATION_BATCH)
        ]
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


def _check(config: StudentConfig, data: Mapping[str, LabelledData]) -> None:
    if not data:
        raise StillhouseError("distillation needs at least one dataset")
    if unknown := sorted(set(config.weights) - set(data)):
        raise StillhouseError(
            f"weights: {', '.join(unknown)} is not among the student's environments; allowed are "
            + ", ".join(data)
        )
