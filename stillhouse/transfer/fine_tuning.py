"""Transfer by fine-tuning: a student's layers as the start of a learner on a target environment.

    full      every tensor that fits is taken from the student, and all are trained
    frozen    the same, but what was taken stays as it is for the first part of the budget
    scratch   the same network with fresh weights: what the other two are judged against

What is taken: the shared torso always; the adapter where the target's observations have the same shape as a source's;
the head only where the student's outputs are what the learner's are. A policy-gradient learner takes a KL or NLL student's
logits as they are, and warms its critic up before the policy moves. For a value-based learner such a student's outputs are no
Q-values: bootstrapping from them destroys the network, so a fresh Q head is fitted to a source dataset's Q-values first (ridge
regression on the torso's features, in closed form). Where no dataset fits the target's spaces, the fresh head starts at
zero: it bootstraps from 0, not from noise. A policy head that cannot be taken starts at zero too: the uniform policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.agents import fresh_network
from stillhouse.config import Config
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.evaluation.rollouts import evaluate
from stillhouse.networks.multi_task import SHARED_HEAD, MultiTaskNetwork
from stillhouse.types import EnvironmentSpec, Learner, OutputKind, Report

Mode = Literal["full", "frozen", "scratch"]


class FineTuneConfig(Config):
    """Settings of a transfer run; the learner's own settings stand beside them."""

    frozen_fraction: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="mode frozen: share of the budget in which taken tensors do not move",
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


@dataclass(frozen=True)
class TensorReport:
    """Which of the target network's tensors came from the student.

    Attributes:
        kept: taken whole.
        sliced: taken where the shapes overlap, for example a head with another number of actions.
        new: freshly initialised.
    """

    kept: list[str]
    sliced: list[str]
    new: list[str]


class QDataset(Protocol):
    """What :func:`fit_head` needs of a dataset."""

    def __len__(self) -> int: ...
    def observations(self, rows: np.ndarray) -> np.ndarray: ...
    def outputs(self, rows: np.ndarray) -> np.ndarray: ...


def target_network(
    student: MultiTaskNetwork,
    name: str,
    environment: EnvironmentSpec,
    source: str,
    seed: int,
    mode: Mode,
    output: OutputKind = "q_values",
) -> tuple[MultiTaskNetwork, TensorReport]:
    """A network of the student's size for the target environment, with what can be taken from the student.

    Args:
        student: the network to take from.
        name: the target environment's name: the new network's head.
        environment: the target's spaces.
        source: the student's environment whose head is taken where its outputs are of the kind ``output``; "" takes no
            head.
        seed: of the fresh tensors, the same in every mode.
        mode: ``scratch`` takes nothing.
        output: what the learner's network gives.
    """
    size = student.spec.size.model_copy(update={"share_head": False})  # alone, it has a head of its own
    network = fresh_network(size, name, environment, output, seed)
    report = TensorReport([], [], [])
    own = dict(network.named_parameters())
    theirs = {} if mode == "scratch" else dict(student.named_parameters())
    with torch.no_grad():
        for key, tensor in own.items():
            is_head = key.startswith("heads.")
            source_key = key
            # An adapter, too, has its environment's name where planes share a body.
            for part in ("heads", "adapters"):
                if key.startswith(f"{part}.{name}."):
                    theirs_is = SHARED_HEAD if source and is_head and student.spec.size.share_head else source
                    source_key = key.replace(f"{part}.{name}.", f"{part}.{theirs_is}.", 1)
            usable = not is_head or student.spec.output == output
            given = theirs.get(source_key) if usable else None
            if given is None:
                report.new.append(key)
                if is_head and mode != "scratch":
                    tensor.zero_()
            elif given.shape == tensor.shape:
                tensor.copy_(given)
                report.kept.append(key)
            else:
                overlap = tuple(slice(0, min(a, b)) for a, b in zip(given.shape, tensor.shape, strict=True))
                tensor[overlap] = given[overlap]
                report.sliced.append(key)
    return network, report


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


class FineTuning:
    """Trains a learner on the target and judges it greedily at fixed points on validation episodes.

    Args:
        config: settings.
        learner: on the target environment, its network already prepared by :func:`target_network`.
        environment: the target, for the evaluations.
        budget: the learner's budget in env steps.
        frozen: names of tensors that stay as they are for the first part of the budget.
        seed: the stage's seed.
    """

    def __init__(
        self,
        config: FineTuneConfig,
        learner: Learner,
        environment: EnvironmentConfig,
        budget: int,
        frozen: list[str],
        seed: int,
    ) -> None:
        self.config = config
        self.learner = learner
        self.environment = environment
        self.budget = budget
        self.frozen = frozen
        self.seed = seed
        self.curve: list[tuple[int, float]] = []

    def train(self) -> Iterator[Report]:
        """Judge, train, judge at every ``budget / evaluations`` env steps; a report for each of the learner's."""
        if not self.curve:
            self._judge(0)
        self._set_frozen()
        for report in self.learner.train():
            self._set_frozen()
            if report.done >= len(self.curve) * self.budget / self.config.evaluations:
                self._judge(report.done)
            yield Report(report.done, report.total, {**report.metrics, "eval/return": self.curve[-1][1]})

    def _set_frozen(self) -> None:
        if self.frozen and self.learner.env_steps < self.config.frozen_fraction * self.budget:
            self.learner.parameters.freeze(self.frozen)
        else:
            self.learner.parameters.unfreeze()

    def _judge(self, env_steps: int) -> None:
        episodes = evaluate(
            self.learner.outputs,
            self.environment,
            self.config.evaluation_episodes,
            self.seed,
            stream="validation",
        )
        self.curve.append((env_steps, float(episodes.returns.mean())))

    def get_state(self) -> dict[str, Any]:
        """The whole state, between two reports."""
        return {"learner": self.learner.get_state(), "curve": [list(point) for point in self.curve]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self.learner.set_state(state["learner"])
        self.curve = [(int(env_steps), float(value)) for env_steps, value in state["curve"]]
