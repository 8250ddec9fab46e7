"""Offline policy distillation of one or many teachers into one student.

Rusu et al. 2015, "Policy Distillation" (https://arxiv.org/abs/1511.06295): the student is trained,
supervised, on what the teachers saw and thought, and never acts. Each update descends

    sum_e w_e L(student(o_e), teacher_e(o_e)) / sum_e w_e        with o_e a batch of environment e's dataset

for one of the losses of ``stillhouse.losses.distillation``.

Deviations from the paper:

1. Each update takes a batch from every environment; the paper's minibatches come from one game at a time.
2. Adam with a linearly falling learning rate instead of RMSProp.
3. A tenth of the episodes is held out; the weights with the best agreement there (share of observations in
   which student and teacher prefer the same action, mean over environments) are the result, and training
   stops when it no longer grows.
4. The student shares its torso only; the paper's has private layers after shared convolutions. Environments
   with equal observation shapes share an adapter.
5. With MSE the student learns standardised outputs: ``q_s = mean_e + std_e * head(...)``, folded into the
   head's weights at the end. The loss is unchanged; without it the head's bias, moving by about the learning
   rate per update, would need tens of thousands of updates to reach Q-values of a hundred.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.datasets.reader import Dataset
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
from stillhouse.types import EnvironmentSpec, OutputKind, Report

# Sharpens Q-values, whose action gaps are small; logits are a policy already.
DEFAULT_TEMPERATURE: dict[OutputKind, float] = {"q_values": 0.01, "logits": 1.0}
# Agreement on so many rows has a standard error below 0.8 %; more would only take time.
MAXIMUM_HOLDOUT_ROWS = 4096
_EVALUATION_BATCH = 1024


class DistillationConfig(Config):
    """How the student is trained, and how large it is."""

    method: Literal["offline"] = "offline"
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
    dataset: Dataset
    rows: np.ndarray  # int64, for training
    held_rows: np.ndarray  # int64, at most MAXIMUM_HOLDOUT_ROWS
    held_actions: Tensor  # int64, the teacher's choices there
    outputs: Tensor  # float32 [N, A], the teacher's, of all rows
    weight: float  # share of the total loss, including the normalisation
    temperature: float
    shift: float  # mse: the student's outputs are shift + scale * head
    scale: float
    random: np.random.Generator


class Distillation:
    """A student in training. :meth:`train` trains it; :meth:`student` is the result.

    Args:
        config: how.
        datasets: one per environment, by the name its head shall have.
        seed: the stage's seed.
        device: torch device.

    Raises:
        StillhouseError: weights for unknown environments, a budget too small for any network, a dataset of a
            single episode, or MSE on teachers of different kinds.
    """

    def __init__(
        self, config: DistillationConfig, datasets: Mapping[str, Dataset], seed: int, device: str = "cpu"
    ) -> None:
        self.config = config
        self.device = device
        self.updates = 0
        environments = {name: dataset.schema.environment for name, dataset in datasets.items()}
        self.teacher_parameters = sum(dataset.schema.teacher_parameters for dataset in datasets.values())
        size = config.size
        if config.parameter_fraction:
            size = size_for_budget(
                size, environments, math.floor(config.parameter_fraction * self.teacher_parameters)
            )
        spec = NetworkSpec(size=size, environments=environments, output=_output_kind(config, datasets))
        self.network: MultiTaskNetwork = build_network(
            spec, seeding.derive(seed, "distillation", "weights")
        ).to(device)
        self.parameters = FlatParameters(self.network, config.learning_rate)
        self._sources = _sources(config, datasets, seed, device)
        self._weights = torch.tensor([source.weight for source in self._sources], device=device)
        self.best: dict[str, float] = {}  # the metrics of the best measurement so far
        self._best_weights: Tensor | None = None
        self._intervals_since_best = 0

    @property
    def finished(self) -> bool:
        """All updates done, or agreement has stopped growing."""
        patience = self.config.patience
        return self.updates >= self.config.updates or 0 < patience <= self._intervals_since_best

    def train(self) -> Iterator[Report]:
        """Train until finished; :meth:`get_state` is exact whenever this has yielded.

        Yields:
            Per evaluation interval, in updates: ``loss/distill`` and ``loss/<environment>`` (means over the
            interval), ``eval/agreement`` and ``agreement/<environment>`` (on held-out episodes).

        Raises:
            StillhouseError: the loss is not finite.
        """
        while not self.finished:
            losses = self._train_interval()
            if not np.isfinite(losses).all() or not self.parameters.values.isfinite().all():
                raise StillhouseError(
                    f"the {self.config.loss} loss or a weight is not finite after {self.updates} updates; no "
                    f"result is written; lower learning_rate ({self.config.learning_rate:g})"
                )
            agreements = [self._agreement(source) for source in self._sources]
            agreement = sum(agreements) / len(agreements)
            weights = np.array([source.weight for source in self._sources])
            metrics = {"loss/distill": float(weights @ losses), "eval/agreement": agreement}
            for source, loss, value in zip(self._sources, losses, agreements, strict=True):
                metrics[f"loss/{source.name}"] = float(loss)
                metrics[f"agreement/{source.name}"] = value
            if agreement > self.best.get("eval/agreement", -1.0):
                self.best = {"update": float(self.updates), **metrics}
                self._best_weights = self.parameters.values.detach().clone()
                self._intervals_since_best = 0
            else:
                self._intervals_since_best += 1
            yield Report(self.updates, self.config.updates, metrics)

    def student(self) -> MultiTaskNetwork:
        """A network of its own with the best weights so far, in evaluation mode.

        Raises:
            StillhouseError: nothing was measured yet.
        """
        if self._best_weights is None:
            raise StillhouseError("the student has not been trained yet")
        student = MultiTaskNetwork(self.network.spec).to(self.device)
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(self._best_weights.clone(), student.parameters())
            for source in self._sources:
                head: Any = student.heads[source.name]
                head.weight.mul_(source.scale)
                head.bias.mul_(source.scale).add_(source.shift)
        return student.eval()

    def get_state(self) -> dict[str, Any]:
        """Everything needed to continue exactly: plain data and tensors."""
        return {
            "updates": self.updates,
            "parameters": self.parameters.get_state(),
            "random": {source.name: source.random.bit_generator.state for source in self._sources},
            "best": [[name, value] for name, value in self.best.items()],
            "best_weights": self._best_weights,
            "intervals_since_best": self._intervals_since_best,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get_state` of a distillation with the same arguments."""
        self.updates = state["updates"]
        self.parameters.set_state(state["parameters"])
        for source in self._sources:
            source.random.bit_generator.state = state["random"][source.name]
        self.best = dict(state["best"])
        best = state["best_weights"]
        self._best_weights = None if best is None else torch.as_tensor(best).to(self.device, copy=True)
        self._intervals_since_best = state["intervals_since_best"]

    def _train_interval(self) -> np.ndarray:
        """Train until the next evaluation; the environments' mean losses, float64 [E]."""
        config = self.config
        count = min(config.evaluation_interval, config.updates - self.updates)
        sums = torch.zeros(len(self._sources), dtype=torch.float64, device=self.device)
        learning_rate = config.learning_rate
        for _ in range(count):
            if config.linear_decay:
                learning_rate = config.learning_rate * (1 - self.updates / config.updates)
            losses = torch.stack([self._loss(source) for source in self._sources])
            self.parameters.zero_gradient()
            (losses @ self._weights).backward()
            self.parameters.step(learning_rate)
            sums += losses.detach()
            self.updates += 1
        return (sums / count).cpu().numpy()

    def _loss(self, source: _Source) -> Tensor:
        """The loss of a fresh batch, drawn with replacement; a scalar."""
        rows = source.rows[source.random.integers(len(source.rows), size=self.config.batch_size)]
        student = self._outputs(source, rows)  # [B, A]
        teacher = source.outputs.index_select(0, torch.from_numpy(rows).to(self.device))
        if self.config.loss == "kl":
            return kl_loss(student, teacher, source.temperature)
        if self.config.loss == "nll":
            return nll_loss(student, teacher)
        return mse_loss(student * source.scale + source.shift, teacher)

    def _outputs(self, source: _Source, rows: np.ndarray) -> Tensor:
        observations = torch.from_numpy(source.dataset.observations(rows)).to(self.device)
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


def _output_kind(config: DistillationConfig, datasets: Mapping[str, Dataset]) -> OutputKind:
    if config.loss != "mse":
        return "logits"
    kinds = {dataset.schema.output for dataset in datasets.values()}
    if len(kinds) > 1:
        raise StillhouseError(
            "loss 'mse' makes one kind of student, but the teachers' outputs are of two: "
            + ", ".join(f"{name} {dataset.schema.output}" for name, dataset in datasets.items())
            + "; use 'kl' or 'nll'"
        )
    return kinds.pop()


def _sources(
    config: DistillationConfig, datasets: Mapping[str, Dataset], seed: int, device: str
) -> list[_Source]:
    if not datasets:
        raise StillhouseError("distillation needs at least one dataset")
    if unknown := sorted(set(config.weights) - set(datasets)):
        raise StillhouseError(
            f"weights: {', '.join(unknown)} is not among the student's environments; allowed are "
            + ", ".join(datasets)
        )
    sources = []
    for name, dataset in datasets.items():
        rows, held = dataset.split(
            config.holdout_fraction, seeding.generator(seed, "distillation", "holdout", name)
        )
        if len(held) > MAXIMUM_HOLDOUT_ROWS:
            choice = seeding.generator(seed, "distillation", "holdout rows", name)
            held = np.sort(choice.choice(held, MAXIMUM_HOLDOUT_ROWS, replace=False))
        outputs = dataset.column("outputs")
        shift, scale = 0.0, 1.0
        if config.loss == "mse":
            shift, scale = float(outputs.mean(dtype=np.float64)), float(outputs.std(dtype=np.float64)) or 1.0
        weight = config.weights.get(name, 1.0)
        sources.append(
            _Source(
                name=name,
                dataset=dataset,
                rows=rows,
                held_rows=held,
                held_actions=torch.from_numpy(outputs[held]).argmax(1).to(device),
                outputs=torch.from_numpy(outputs).to(device),
                weight=weight / scale**2 if config.normalise_mse else weight,
                temperature=config.temperature or DEFAULT_TEMPERATURE[dataset.schema.output],
                shift=shift,
                scale=scale,
                random=seeding.generator(seed, "distillation", "batches", name),
            )
        )
    total = sum(config.weights.get(name, 1.0) for name in datasets)
    for source in sources:
        source.weight /= total
    return sources
