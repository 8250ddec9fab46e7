"""MAML: an initialisation from which few gradient steps learn a task (Finn et al. 2017, https://arxiv.org/abs/1703.03400, Algorithm 2).

Supervised, on few-shot regression of sinusoids. For each task i of a batch, with its K support points and as many query points,

    theta_i = theta - alpha grad_theta L_i^support(theta)                      one or more inner steps
    theta <- Adam(theta, grad_theta mean_i L_i^query(theta_i)).

The gradient goes through the inner steps and has second derivatives of L_i^support; first-order MAML (``first_order``) leaves these out, and so
takes the gradient at theta_i for that at theta. L is the mean squared error.

Deviations:

1. ``inner_rate``: the paper's alpha is 0.01; the authors' code (``cbfinn/maml``) has 0.001 as its default, which its command for sinusoids
   leaves as it is.
2. ``every_step``: the outer loss may be the mean of the query losses after each of the inner steps, rather than that after the last, so that
   few steps serve as well as many (as in Antoniou et al. 2019, https://arxiv.org/abs/1810.09502, with equal weights). Off: as the paper.
3. ``one_step_share``: training may begin with a single inner step, which is cheaper, and go on with ``inner_steps``. Off: as the paper.
4. ``meta_rate_decay``: the meta-learning rate may fall to 0 along a cosine; it is constant in the paper.
5. Weights start as He et al. (2015) have them; in the authors' code they are truncated normal with a standard deviation of 0.01.
6. Training, validation and test tasks come from separate parts of the family (:mod:`stillhouse.envs.sinusoid`); the paper draws both from all of
   it. The error of a test task is the mean over 100 even points; the authors' code takes K random ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.envs import sinusoid
from stillhouse.envs.sinusoid import SinusoidConfig
from stillhouse.meta import Adaptation
from stillhouse.meta.few_shot import (
    TaskBatch,
    TaskBatches,
    adaptation_errors,
    decayed,
    meta_training,
    squared_errors,
)
from stillhouse.meta.inner_loop import adapt, adapt_for_evaluation
from stillhouse.networks.batched import PerceptronSize, Weights, for_tasks, initial_weights, take_over
from stillhouse.networks.parameters import FlatParameters
from stillhouse.types import Report


class MAMLConfig(Config):
    """Settings; the defaults are the paper's."""

    method: Literal["maml"] = "maml"
    family: SinusoidConfig = SinusoidConfig()
    network: PerceptronSize = PerceptronSize()
    meta_updates: int = Field(default=70_000, ge=1, le=10**8, description="budget")
    meta_batch: int = Field(default=25, ge=1, le=4096, description="tasks of a meta-update")
    shots: int = Field(
        default=10, ge=1, le=4096, description="support points of a task, in training and testing"
    )
    queries: int = Field(default=10, ge=1, le=4096, description="points of a task that the outer loss is of")
    inner_steps: int = Field(default=1, ge=1, le=100, description="gradient steps on a task in training")
    inner_rate: float = Field(
        default=0.01, gt=0, le=10, description="alpha, learning rate of the inner steps"
    )
    first_order: bool = Field(default=False, description="leave the second derivatives out")
    every_step: bool = Field(
        default=False, description="the outer loss is the mean over the inner steps, not that of the last"
    )
    one_step_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the budget with a single inner step, before inner_steps",
    )
    meta_rate: float = Field(default=1e-3, gt=0, le=1, description="Adam's learning rate")
    meta_rate_decay: Literal["none", "cosine"] = Field(default="none", description="cosine: to 0 at the end")


def meta_losses(
    size: PerceptronSize,
    weights: Mapping[str, Tensor],
    batch: TaskBatch,
    rates: float | Mapping[str, Tensor],
    steps: int,
    second_order: bool = True,
    every_step: bool = False,
) -> Tensor:
    """The query loss of every task after the inner steps, [T]; its gradient with respect to ``weights`` is the meta-gradient.

    Args:
        size: the network's.
        weights: the initialisation, [1, ...] each.
        batch: of T tasks.
        rates: of the inner steps.
        steps: how many of them.
        second_order: differentiate through the gradients too.
        every_step: the mean of the losses after every step.
    """

    def losses(weights: Weights) -> Tensor:
        return squared_errors(size, weights, batch.support_inputs, batch.support_targets)

    start = for_tasks(weights, len(batch.support_inputs))
    path = list(adapt(losses, start, rates, steps, second_order))
    after = [
        squared_errors(size, each, batch.query_inputs, batch.query_targets)
        for each in (path if every_step else path[-1:])
    ]
    return torch.stack(after).mean(0) if every_step else after[0]


class MAML:
    """The meta-learner: construct, then iterate :meth:`train`.

    Args:
        config: settings.
        seed: the stage's.
        device: where to compute.

    Attributes:
        initialisation: theta, by name, [1, ...] each; trained in place.
        meta_updates: done so far.
    """

    columns = {"loss/query": "loss"}

    def __init__(self, config: MAMLConfig, seed: int, device: str = "cpu") -> None:
        self.config = config
        self.meta_updates = 0
        self._seed = seed
        self._device = device
        self._module = nn.ParameterDict(initial_weights(config.network, 1, 1, seed, device))
        self.initialisation: Weights = dict(self._module.items())
        self._parameters = FlatParameters(self._module, config.meta_rate)
        self._batches = TaskBatches(
            config.family, seed, config.meta_batch, config.shots, config.queries, device
        )

    def train(self) -> Iterator[Report]:
        """Meta-train until the budget is spent; a report every 100 meta-updates.

        Raises:
            StillhouseError: the meta-loss is no longer finite.
        """
        config = self.config
        remedy = f"inner_rate ({config.inner_rate:g}) or meta_rate ({config.meta_rate:g})"
        for done, loss in meta_training(self._update, self.meta_updates, config.meta_updates, remedy):
            self.meta_updates = done
            yield Report(done, config.meta_updates, {"loss/query": loss})

    def _update(self, index: int) -> Tensor:
        """Meta-update number ``index``; its loss, a scalar without a gradient."""
        config = self.config
        self._parameters.zero_gradient()
        batch = self._batches.batch(index)
        loss = meta_losses(
            config.network,
            self.initialisation,
            batch,
            config.inner_rate,
            1 if index < config.one_step_share * config.meta_updates else config.inner_steps,
            not config.first_order,
            config.every_step,
        ).mean()
        loss.backward()
        self._parameters.step(decayed(config.meta_rate, config.meta_rate_decay, index, config.meta_updates))
        return loss.detach()

    def evaluate(
        self,
        tasks: int,
        steps: int,
        seed: int,
        shots: int | None = None,
        split: Literal["validation", "test"] = "test",
    ) -> Adaptation:
        """Adapt to so many tasks never trained on, drawn by ``seed``, and measure the error after 0, 1, ... ``steps`` steps.

        Beside it stands ``untrained``: the same steps from fresh weights.

        Args:
            tasks: how many.
            steps: gradient steps at most.
            seed: of the tasks and of their points.
            shots: support points; none: as in training.
            split: which tasks.

        Raises:
            StillhouseError: the split has fewer tasks than that.
        """
        config = self.config
        chosen = sinusoid.held_out(config.family, tasks, seed, split)

        def errors(weights: Mapping[str, Tensor]) -> np.ndarray:
            return adaptation_errors(
                config.network,
                weights,
                lambda losses, start, count: adapt_for_evaluation(losses, start, config.inner_rate, count),
                config.family,
                chosen,
                shots or config.shots,
                steps,
                seed,
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
        return {"parameters": self._parameters.get_state(), "meta_updates": self.meta_updates}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self._parameters.set_state(state["parameters"])
        self.meta_updates = int(state["meta_updates"])

    def learnt(self) -> dict[str, Any]:
        """The initialisation."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.initialisation.items()}

    def load(self, learnt: dict[str, Any]) -> None:
        """Take an initialisation over.

        Raises:
            StillhouseError: it is of another network.
        """
        take_over(self.initialisation, learnt)
