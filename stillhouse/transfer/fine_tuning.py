"""Fine-tuning: a learner on a target environment that starts from what was taken from a source.

    full            all is trained from the first update
    head_only       what was taken below the head stays as it is; the head, and what is new, is trained
    gradual         the same at first; layer after layer is freed, from the head down, over a part of the budget
                    (Howard & Ruder 2018, arXiv:1801.06146, section 3.3)
    discriminative  a layer's learning rate is ``layer_decay`` times that of the one above it (the same, section 3.2)
    l2_sp           w_taken is drawn to where it began: alpha / 2 ||w - w_source||^2 is added to the loss
                    (Li, Grandvalet & Davoine 2018, arXiv:1802.01483, eq. 3, without the second term, the decay of new weights)
    rehearsal       full, and the source's policy is kept on its own states: :mod:`stillhouse.transfer.rehearsal`
    scratch         fresh weights, nothing taken: what the others are judged against

What is taken, and how a Q head is made of a dataset's Q-values, is in :mod:`stillhouse.transfer.initialisation`. A policy that was
taken is not spoiled by a fresh critic: PPO warms its critic up first, and a decaying KL to the source's policy
(:mod:`stillhouse.transfer.kickstarting`) keeps it near what it knew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config import Config
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.evaluation.rollouts import evaluate
from stillhouse.networks.multi_task import MultiTaskNetwork
from stillhouse.networks.parameters import FlatParameters
from stillhouse.transfer.initialisation import Correspondence, Source, TensorReport, show
from stillhouse.transfer.rehearsal import Rehearsal
from stillhouse.types import Learner, ObservationSpec, OutputKind, Report

Mode = Literal[
    "auto",
    "discriminative",
    "features",
    "full",
    "gradual",
    "head_only",
    "kickstart",
    "l2_sp",
    "progressive_2",
    "progressive_3",
    "progressive_random",
    "rehearsal",
    "scratch",
]
Declaration = Literal["same", "index", "name"] | dict[str, str]


class FineTuneConfig(Config):
    """Settings of a transfer run; the learner's own settings stand beside them."""

    components: Declaration = Field(
        default="same",
        description="which of the source's observation components the target's are: same (as many, in order), index (in order, as far as both "
        "go), name, or target's to source's by name or number",
    )
    actions: Declaration = Field(
        default="index", description="the same of actions: same, index, name, or target's to source's"
    )
    take: list[str] = Field(
        default=["*"],
        min_length=1,
        max_length=100,
        description="patterns of tensors that are taken from the source",
    )
    freeze: list[str] = Field(
        default=[],
        max_length=100,
        description="patterns of tensors that stay as they are for the whole budget, in ways that take weights",
    )
    frozen_fraction: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="gradual: share of the budget after which every layer is trained",
    )
    layer_decay: float = Field(
        default=0.4,
        gt=0,
        le=1,
        description="discriminative: a layer's learning rate over that of the one above it",
    )
    l2_sp: float = Field(default=0.01, ge=0, description="l2_sp: alpha, how strongly weights are drawn back")
    rehearsal_share: float = Field(
        default=0.2, gt=0, lt=1, description="rehearsal: share of each batch that is of the source's dataset"
    )
    rehearsal_weight: float = Field(default=1.0, ge=0, description="rehearsal: weight of its loss")
    guide_weight: float = Field(
        default=1.0,
        ge=0,
        description="PPO: weight, at first, of the KL to the source's policy: kickstart, and wherever the policy was taken",
    )
    guide_fraction: float = Field(
        default=0.3, ge=0, le=1, description="share of the budget over which that weight falls to 0"
    )
    probe_fraction: float = Field(
        default=0.05, gt=0, le=0.5, description="auto: share of the budget that each source is tried for"
    )
    adapter_scale: float = Field(
        default=0.1, gt=0, le=10, description="progressive: what the adapters' scales start from"
    )
    sensitivity_episodes: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="progressive: episodes for each noise level of the sensitivity analysis; 0: none is made",
    )
    epsilon_start: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="DQN and PQN: exploration at the start where the head was taken or fitted; a fresh head explores like scratch",
    )
    critic_warmup: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="PPO: share of the budget in which only the critic learns, where the head was taken",
    )
    evaluations: int = Field(
        default=10, ge=1, le=1000, description="points of the learning curve after the first"
    )
    evaluation_episodes: int = Field(default=20, ge=1, le=10_000, description="greedy episodes per point")


class QDataset(Protocol):
    """What :func:`fit_head` needs of a dataset."""

    def __len__(self) -> int: ...
    def observations(self, rows: np.ndarray) -> np.ndarray: ...
    def outputs(self, rows: np.ndarray) -> np.ndarray: ...


class OrderedDataset:
    """A source's dataset in the order of the target's components and actions.

    Args:
        dataset: of an environment of the same spaces.
        correspondence: one to one.
        observation: of both environments.
    """

    def __init__(
        self, dataset: QDataset, correspondence: Correspondence, observation: ObservationSpec
    ) -> None:
        assert correspondence.components is not None and correspondence.actions is not None
        self._dataset, self._observation = dataset, observation
        self._components, self._actions = correspondence.components, list(correspondence.actions)

    def __len__(self) -> int:
        return len(self._dataset)

    def observations(self, rows: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(self._dataset.observations(rows))
        return show(given, self._components, self._observation, self._observation).numpy()

    def outputs(self, rows: np.ndarray) -> np.ndarray:
        return self._dataset.outputs(rows)[:, self._actions]


@torch.inference_mode()
def fit_head(
    network: MultiTaskNetwork,
    name: str,
    dataset: QDataset,
    output: OutputKind,
    ridge: float = 1e-4,
    rows: int = 20_000,
) -> float:
    """Fit the head of ``name`` to a dataset's Q-values by ridge regression; everything else stays as it is.

    Args:
        network: its adapter must take the dataset's observations, its head as many actions as the dataset has.
        name: the head.
        dataset: observations and Q-values [N, A].
        output: what the dataset's outputs are; only ``q_values`` can be bootstrapped from.
        ridge: penalty on the weights, relative to the mean squared feature.
        rows: at most so many transitions, evenly spaced.

    Returns:
        The share of the Q-values' variance that the head explains, at most 1.

    Raises:
        ValueError: the dataset's outputs are logits.
    """
    if output != "q_values":
        raise ValueError("a Q head cannot be fitted to logits")
    chosen = np.linspace(0, len(dataset) - 1, min(rows, len(dataset))).astype(np.int64)
    head = network.heads[name]
    assert isinstance(head, nn.Linear)
    device = head.weight.device
    features = torch.cat(
        [
            network.features(torch.from_numpy(dataset.observations(part)).to(device), name).double()
            for part in np.array_split(chosen, max(1, len(chosen) // 2048))
        ]
    )
    targets = torch.from_numpy(dataset.outputs(chosen)).to(device).double()
    feature_mean, target_mean = features.mean(0), targets.mean(0)
    centred, wanted = features - feature_mean, targets - target_mean
    gram = centred.T @ centred
    penalty = ridge * gram.diagonal().mean().clamp(min=1e-12)
    weights: Tensor = torch.linalg.solve(
        gram + penalty * torch.eye(len(gram), device=device).double(), centred.T @ wanted
    )
    head.weight.copy_(weights.T)
    head.bias.copy_(target_mean - feature_mean @ weights)
    residual = wanted - centred @ weights
    return float(1 - residual.square().sum() / wanted.square().sum().clamp(min=1e-12))


class Schedule:
    """Which tensors stay as they are, over the budget.

    Args:
        mode: as above; every other mode freezes nothing of its own.
        layers: the tensors of each layer on the target's way, from the observations to the head.
        taken: those that came from the source.
        always: frozen whatever the mode.
        frozen_fraction: see :class:`FineTuneConfig`.
    """

    def __init__(
        self,
        mode: Mode,
        layers: Sequence[Sequence[str]],
        taken: Sequence[str],
        always: Sequence[str] = (),
        frozen_fraction: float = 0.0,
    ) -> None:
        self.mode, self.always, self.frozen_fraction = mode, list(always), frozen_fraction
        self.layers = [[name for name in layer if name in taken] for layer in layers[:-1]]

    def frozen(self, done: float) -> list[str]:
        """The tensors that stay, after a share ``done`` of the budget."""
        held = len(self.layers) if self.mode in ("head_only", "gradual") else 0
        if self.mode == "gradual":
            # The topmost layer is freed first, after one part of the time; the lowest at its end.
            freed = 1.0 if done >= self.frozen_fraction else done / self.frozen_fraction
            held -= int(freed * len(self.layers))
        return [*self.always, *(name for layer in self.layers[:held] for name in layer)]


def layer_paces(layers: Sequence[Sequence[str]], taken: Sequence[str], decay: float) -> dict[str, float]:
    """Factors on the learning rate of what was taken: 1 for the head, ``decay`` for the layer below, its square, ..."""
    return {
        name: decay**depth for depth, layer in enumerate(reversed(layers)) for name in layer if name in taken
    }


class StartingPoint:
    """L2-SP: adds ``alpha (w - w_source)`` to the gradient of these tensors, w_source being what they are now."""

    def __init__(self, parameters: FlatParameters, names: Sequence[str], alpha: float) -> None:
        self._parameters = parameters
        self._strength = torch.zeros_like(parameters.gradient)
        for name in names:
            self._strength[parameters.slices[name]] = alpha
        self._start = parameters.values.data.clone()

    def __call__(self) -> None:
        self._parameters.gradient.addcmul_(self._strength, self._parameters.values.data - self._start)


@dataclass(frozen=True)
class Origin:
    """Where a run began.

    Attributes:
        source: what it could take from.
        correspondence: of the target with the source's environment; None where nothing but the torso was taken.
        tensors: what was taken.
        head_variance_explained: by a Q head that was fitted; None where none was.
    """

    source: Source
    correspondence: Correspondence | None
    tensors: TensorReport
    head_variance_explained: float | None


class FineTuning:
    """Trains a learner on the target and judges it greedily at fixed points on validation episodes.

    Args:
        config: settings.
        learner: on the target environment, its network already prepared.
        environment: the target, for the evaluations.
        budget: the learner's budget in env steps.
        schedule: what stays as it is, and for how long.
        seed: the stage's seed.
        origin: where it began.
        rehearsal: of what the network knew, where there is one; a penalty of the learner's parameters already.
    """

    def __init__(
        self,
        config: FineTuneConfig,
        learner: Learner,
        environment: EnvironmentConfig,
        budget: int,
        schedule: Schedule,
        seed: int,
        origin: Origin,
        rehearsal: Rehearsal | None = None,
    ) -> None:
        self.config = config
        self.learner = learner
        self.environment = environment
        self.budget = budget
        self.schedule = schedule
        self.seed = seed
        self.origin = origin
        self.rehearsal = rehearsal
        self.curve: list[tuple[int, float]] = []

    def train(self) -> Iterator[Report]:
        """Judge, train, judge at every ``budget / evaluations`` env steps; a report for each of the learner's."""
        if not self.curve:
            self.curve.append((0, self.judge()))
        self._freeze()
        for report in self.learner.train():
            self._freeze()
            if report.done >= len(self.curve) * self.budget / self.config.evaluations:
                self.curve.append((report.done, self.judge()))
            yield Report(report.done, report.total, {**report.metrics, "eval/return": self.curve[-1][1]})

    def judge(self) -> float:
        """Mean return of greedy play on the validation episodes."""
        episodes = evaluate(
            self.learner.outputs,
            self.environment,
            self.config.evaluation_episodes,
            self.seed,
            stream="validation",
        )
        return float(episodes.returns.mean())

    def _freeze(self) -> None:
        self.learner.parameters.freeze(self.schedule.frozen(self.learner.env_steps / self.budget))

    def get_state(self) -> dict[str, Any]:
        """The whole state, between two reports."""
        return {
            "learner": self.learner.get_state(),
            "curve": [list(point) for point in self.curve],
            "rehearsal": self.rehearsal.get_state() if self.rehearsal else None,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self.learner.set_state(state["learner"])
        self.curve = [(int(env_steps), float(value)) for env_steps, value in state["curve"]]
        if self.rehearsal:
            self.rehearsal.set_state(state["rehearsal"])
