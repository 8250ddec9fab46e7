"""Reptile: an initialisation near the solutions of all tasks (Nichol et al. 2018, https://arxiv.org/abs/1803.02999, Algorithms 1 and 2).

    W_i = theta after k steps of stochastic gradient descent (or Adam) on task i
    theta <- theta + epsilon mean_i (W_i - theta)

Serial with a batch of one task (Algorithm 1), batched with more (Algorithm 2). There is no split into support and query points and no second
derivative; what favours learning from few points is that each of the k steps takes other points of the task. On few-shot regression of
sinusoids; the loss is the mean squared error.

The defaults are the constants of the authors' demonstration: phases to 2 pi, 50 points a task in minibatches of 10, one pass over them by
gradient descent at 0.02, epsilon 0.1 falling linearly to 0 over 30,000 outer steps, a network 1-64-64-1 with tanh. This is not MAML's
distribution of tasks: set ``family`` and ``network`` to compare the two.

Deviations:

1. The 50 points of a training task are drawn uniformly; the demonstration has 50 even ones, the same for every task.
2. ``inner_optimiser: adam`` is Adam without momentum (beta1 0, as in the paper's Omniglot runs); its moments start afresh for every task, where the
   authors' code carries them on from task to task.
3. Weights start as He et al. (2015) have them before ReLU, normal with a variance of 1 / in before tanh.
4. Training, validation and test tasks come from separate parts of the family (:mod:`stillhouse.envs.sinusoid`).
5. With ``max_gradient_norm`` a task's gradient is cut to that length, in training and in test: fresh weights diverge at rates that serve well later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.envs import sinusoid
from stillhouse.envs.sinusoid import SinusoidConfig
from stillhouse.meta import Adaptation
from stillhouse.meta.few_shot import TaskBatches, adaptation_errors, meta_training, squared_errors
from stillhouse.networks.batched import PerceptronSize, Weights, for_tasks, initial_weights, take_over
from stillhouse.types import Report

_DECAY, _EPSILON = 0.999, 1e-8  # Adam's beta2 and epsilon


class ReptileConfig(Config):
    """Settings; the defaults are those of the authors' demonstration on sinusoids."""

    method: Literal["reptile"] = "reptile"
    family: SinusoidConfig = SinusoidConfig(largest_phase=2 * math.pi)
    network: PerceptronSize = PerceptronSize(hidden=(64, 64), activation="tanh")
    meta_updates: int = Field(default=30_000, ge=1, le=10**8, description="budget in outer steps")
    meta_batch: int = Field(default=1, ge=1, le=4096, description="tasks of an outer step; 1: serial")
    points: int = Field(default=50, ge=1, le=4096, description="of a training task")
    minibatch: int = Field(default=10, ge=1, le=4096, description="points of an inner step")
    inner_steps: int = Field(
        default=5,
        ge=1,
        le=1000,
        description="k; minibatches follow each other, and begin again after the last",
    )
    inner_optimiser: Literal["sgd", "adam"] = Field(default="sgd", description="adam: without momentum")
    inner_rate: float = Field(default=0.02, gt=0, le=10, description="learning rate of the inner steps")
    max_gradient_norm: float = Field(
        default=0.0, ge=0, le=1e6, description="of a task's gradient in an inner step; 0 does not clip"
    )
    outer_rate: float = Field(default=0.1, gt=0, le=1, description="epsilon at first")
    outer_rate_decay: Literal["none", "linear"] = Field(
        default="linear", description="linear: to 0 at the end"
    )
    shots: int = Field(default=10, ge=1, le=4096, description="points of a test task to learn from")

    @model_validator(mode="after")
    def _whole_minibatches(self) -> ReptileConfig:
        if self.points % self.minibatch:
            raise ValueError(
                f"points {self.points} are no whole number of minibatches of {self.minibatch}; give a multiple of it"
            )
        return self


def inner_path(
    losses: Callable[[Weights, int], Tensor],
    weights: Mapping[str, Tensor],
    optimiser: Literal["sgd", "adam"],
    rate: float,
    steps: int,
    max_gradient_norm: float = 0.0,
) -> Iterator[Weights]:
    """The weights of all tasks after 0, 1, ..., ``steps`` inner steps, without any graph between them.

    Args:
        losses: weights [T, ...] and the step's number to the loss of every task, [T].
        weights: to start from, [T, ...] each.
        optimiser: which rule.
        rate: learning rate.
        steps: how many.
        max_gradient_norm: a task's longer gradients are cut to this length; 0 does not clip.
    """
    current = {name: tensor.detach() for name, tensor in weights.items()}
    squares = {name: torch.zeros_like(tensor) for name, tensor in current.items()}
    yield current
    for step in range(steps):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in current.items()}
        found = torch.autograd.grad(losses(leaves, step).sum(), list(leaves.values()))
        gradients = dict(zip(leaves, _clipped(found, max_gradient_norm), strict=True))
        if optimiser == "sgd":
            current = {
                name: torch.add(current[name], gradient, alpha=-rate) for name, gradient in gradients.items()
            }
        else:
            correction = 1 - _DECAY ** (step + 1)
            moved: Weights = {}
            for name, gradient in gradients.items():
                squares[name].mul_(_DECAY).addcmul_(gradient, gradient, value=1 - _DECAY)
                length = (squares[name] / correction).sqrt_().add_(_EPSILON)
                moved[name] = torch.addcdiv(current[name], gradient, length, value=-rate)
            current = moved
        yield current


def _clipped(gradients: Sequence[Tensor], largest: float) -> list[Tensor]:
    """Gradients [T, ...] of all weights, none of any task longer than ``largest``, over all weights."""
    if not largest:
        return list(gradients)
    lengths = torch.stack([each.reshape(len(each), -1).square().sum(1) for each in gradients]).sum(0).sqrt_()
    shares = (largest / lengths.clamp_min(_EPSILON)).clamp_max_(1.0)
    return [each * shares.view(-1, *[1] * (each.dim() - 1)) for each in gradients]


class Reptile:
    """The meta-learner: construct, then iterate :meth:`train`.

    Args:
        config: settings.
        seed: the stage's.
        device: where to compute.

    Attributes:
        initialisation: theta, by name, [1, ...] each.
        meta_updates: outer steps done so far.
    """

    columns = {"loss/inner": "loss", "rate/outer": "outer_rate"}

    def __init__(self, config: ReptileConfig, seed: int, device: str = "cpu") -> None:
        self.config = config
        self.meta_updates = 0
        self._seed = seed
        self._device = device
        self.initialisation = initial_weights(config.network, 1, 1, seed, device)
        self._batches = TaskBatches(config.family, seed, config.meta_batch, config.points, 0, device)

    def train(self) -> Iterator[Report]:
        """Meta-train until the budget is spent; a report every 100 outer steps.

        Raises:
            StillhouseError: the loss is no longer finite.
        """
        config = self.config
        remedy = f"inner_rate ({config.inner_rate:g}), or clip with max_gradient_norm"
        for done, loss in meta_training(self._update, self.meta_updates, config.meta_updates, remedy):
            self.meta_updates = done
            yield Report(
                done,
                config.meta_updates,
                {"loss/inner": loss, "rate/outer": self.outer_rate(done - 1)},
            )

    def outer_rate(self, index: int) -> float:
        """Epsilon of outer step number ``index``."""
        config = self.config
        left = 1 - index / config.meta_updates if config.outer_rate_decay == "linear" else 1.0
        return config.outer_rate * left

    def _update(self, index: int) -> Tensor:
        """Outer step number ``index``; the mean loss at the last of its inner steps, a scalar."""
        config = self.config
        batch = self._batches.batch(index)
        last = torch.zeros(())

        def losses(weights: Weights, step: int) -> Tensor:
            nonlocal last
            start = step * config.minibatch % config.points
            part = slice(start, start + config.minibatch)
            last = squared_errors(
                config.network, weights, batch.support_inputs[:, part], batch.support_targets[:, part]
            )
            return last

        start = for_tasks(self.initialisation, config.meta_batch)
        *_, learnt = self._inner_path(losses, start, config.inner_steps)
        rate = self.outer_rate(index)
        for name, tensor in self.initialisation.items():
            tensor.lerp_(learnt[name].mean(0, keepdim=True), rate)
        return last.detach().mean()

    def _inner_path(
        self, losses: Callable[[Weights, int], Tensor], start: Weights, steps: int
    ) -> Iterator[Weights]:
        """From ``start``, [T, ...] each, as the settings say."""
        config = self.config
        return inner_path(
            losses, start, config.inner_optimiser, config.inner_rate, steps, config.max_gradient_norm
        )

    def evaluate(
        self,
        tasks: int,
        steps: int,
        seed: int,
        shots: int | None = None,
        split: Literal["validation", "test"] = "test",
    ) -> Adaptation:
        """Adapt to so many tasks never trained on, drawn by ``seed``, and measure the error after 0, 1, ... ``steps`` steps.

        All points of a test task are in every step. Beside it stands ``untrained``: the same steps from fresh weights.

        Args:
            tasks: how many.
            steps: gradient steps at most.
            seed: of the tasks and of their points.
            shots: points to learn from; none: the setting's.
            split: which tasks.

        Raises:
            StillhouseError: the split has fewer tasks than that.
        """
        config = self.config
        chosen = sinusoid.held_out(config.family, tasks, seed, split)

        def adapter(losses: Callable[[Weights], Tensor], start: Weights, count: int) -> Iterator[Weights]:
            return self._inner_path(lambda weights, step: losses(weights), start, count)

        def errors(weights: Mapping[str, Tensor]) -> np.ndarray:
            return adaptation_errors(
                config.network, weights, adapter, config.family, chosen, shots or config.shots, steps, seed
            )

        fresh = initial_weights(config.network, 1, 1, seeding.derive(self._seed, "untrained"), self._device)
        return Adaptation(
            "mse",
            "updates",
            list(range(steps + 1)),
            errors(self.initialisation),
            {"untrained": errors(fresh)},
        )

    def get_state(self) -> dict[str, Any]:
        """The whole training state, between two reports."""
        return {"initialisation": self.learnt(), "meta_updates": self.meta_updates}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self.load(state["initialisation"])
        self.meta_updates = int(state["meta_updates"])

    def learnt(self) -> dict[str, Any]:
        """The initialisation."""
        return {name: tensor.cpu().clone() for name, tensor in self.initialisation.items()}

    def load(self, learnt: dict[str, Any]) -> None:
        """Take an initialisation over.

        Raises:
            StillhouseError: it is of another network.
        """
        take_over(self.initialisation, learnt)
