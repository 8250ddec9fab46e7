"""Meta-SGD: an initialisation and a learning rate for each of its weights, learnt together (Li et al. 2017, https://arxiv.org/abs/1707.09835).

    theta_i = theta - alpha o grad_theta L_i^support(theta)
    (theta, alpha) <- Adam((theta, alpha), grad_(theta, alpha) mean_i L_i^query(theta_i))

``o`` is the product by elements; alpha has theta's shape and may be negative, so that it says both how far and which way a task's update goes. The
gradient goes through the inner step with its second derivatives. On few-shot regression of sinusoids; L is the mean squared error. The other
learned update, a recurrent network that sees one gradient after another, is :mod:`stillhouse.meta.lstm_optimiser`.

Deviations:

1. The rates start uniform in [0.005, 0.1]; the paper says only that theta and alpha are initialised. The bounds are settings.
2. Tested with more than the one step of training (``inner_steps``), the same rates serve every step.
3. ``every_step`` and ``meta_rate_decay`` are as in :mod:`stillhouse.meta.maml`; off, as in the paper.
4. The network, its fresh weights and the split of the family are those of :mod:`stillhouse.meta.maml` too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.envs import sinusoid
from stillhouse.envs.sinusoid import SinusoidConfig
from stillhouse.meta import Adaptation
from stillhouse.meta.few_shot import TaskBatches, adaptation_errors, decayed, meta_training
from stillhouse.meta.inner_loop import adapt_for_evaluation
from stillhouse.meta.maml import meta_losses
from stillhouse.networks.batched import PerceptronSize, Weights, initial_weights, take_over
from stillhouse.networks.parameters import FlatParameters
from stillhouse.types import Report


class MetaSGDConfig(Config):
    """Settings; the defaults are the paper's."""

    method: Literal["learned_update"] = "learned_update"
    family: SinusoidConfig = SinusoidConfig()
    network: PerceptronSize = PerceptronSize()
    meta_updates: int = Field(default=60_000, ge=1, le=10**8, description="budget")
    meta_batch: int = Field(default=4, ge=1, le=4096, description="tasks of a meta-update")
    shots: int = Field(
        default=10, ge=1, le=4096, description="support points of a task, in training and testing"
    )
    queries: int = Field(default=10, ge=1, le=4096, description="points of a task that the outer loss is of")
    inner_steps: int = Field(default=1, ge=1, le=100, description="gradient steps on a task in training")
    smallest_rate: float = Field(default=0.005, ge=-10, le=10, description="of the rates at first")
    largest_rate: float = Field(default=0.1, ge=-10, le=10, description="of the rates at first")
    every_step: bool = Field(
        default=False, description="the outer loss is the mean over the inner steps, not that of the last"
    )
    meta_rate: float = Field(default=1e-3, gt=0, le=1, description="Adam's, of weights and rates")
    meta_rate_decay: Literal["none", "cosine"] = Field(default="none", description="cosine: to 0 at the end")

    @model_validator(mode="after")
    def _ordered(self) -> MetaSGDConfig:
        if self.smallest_rate > self.largest_rate:
            raise ValueError(
                f"smallest_rate {self.smallest_rate:g} is above largest_rate {self.largest_rate:g}; give them in this order"
            )
        return self


class MetaSGD:
    """The meta-learner: construct, then iterate :meth:`train`.

    Args:
        config: settings.
        seed: the stage's.
        device: where to compute.

    Attributes:
        initialisation: theta, by name, [1, ...] each; trained in place.
        rates: alpha, the same shapes; trained in place.
        meta_updates: done so far.
    """

    columns = {"loss/query": "loss", "rate/mean": "rate", "rate/negative": "negative_rates"}

    def __init__(self, config: MetaSGDConfig, seed: int, device: str = "cpu") -> None:
        self.config = config
        self.meta_updates = 0
        self._seed = seed
        self._device = device
        weights = initial_weights(config.network, 1, 1, seed, device)
        random = seeding.torch_generator(seed, "rates")
        span = config.largest_rate - config.smallest_rate
        rates = {
            name: (config.smallest_rate + span * torch.rand(tensor.shape, generator=random)).to(device)
            for name, tensor in weights.items()
        }
        modules = nn.ParameterDict(weights), nn.ParameterDict(rates)
        self.initialisation: Weights = dict(modules[0].items())
        self.rates: Weights = dict(modules[1].items())
        self._parameters = FlatParameters(modules[0], config.meta_rate, beside={"rates": modules[1]})
        self._batches = TaskBatches(
            config.family, seed, config.meta_batch, config.shots, config.queries, device
        )

    def train(self) -> Iterator[Report]:
        """Meta-train until the budget is spent; a report every 100 meta-updates.

        Raises:
            StillhouseError: the meta-loss is no longer finite.
        """
        config = self.config
        remedy = f"largest_rate ({config.largest_rate:g}) or meta_rate ({config.meta_rate:g})"
        for done, loss in meta_training(self._update, self.meta_updates, config.meta_updates, remedy):
            self.meta_updates = done
            yield Report(done, config.meta_updates, {"loss/query": loss, **self._rate_metrics()})

    def _rate_metrics(self) -> dict[str, float]:
        rates = torch.cat([rate.detach().flatten() for rate in self.rates.values()])
        return {"rate/mean": float(rates.mean()), "rate/negative": float((rates < 0).float().mean())}

    def _update(self, index: int) -> Tensor:
        """Meta-update number ``index``; its loss, a scalar without a gradient."""
        config = self.config
        self._parameters.zero_gradient()
        loss = meta_losses(
            config.network,
            self.initialisation,
            self._batches.batch(index),
            self.rates,
            config.inner_steps,
            every_step=config.every_step,
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

        Beside it stands ``one_rate``: the same steps from the same initialisation with the mean of the learnt rates for all.

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
        rates = {name: rate.detach() for name, rate in self.rates.items()}

        def errors(rates: float | Mapping[str, Tensor]) -> Any:
            return adaptation_errors(
                config.network,
                self.initialisation,
                lambda losses, start, count: adapt_for_evaluation(losses, start, rates, count),
                config.family,
                chosen,
                shots or config.shots,
                steps,
                seed,
            )

        return Adaptation(
            "mse",
            "updates",
            list(range(steps + 1)),
            errors(rates),
            {"one_rate": errors(self._rate_metrics()["rate/mean"])},
        )

    def get_state(self) -> dict[str, Any]:
        """The whole training state, between two reports."""
        return {"parameters": self._parameters.get_state(), "meta_updates": self.meta_updates}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self._parameters.set_state(state["parameters"])
        self.meta_updates = int(state["meta_updates"])

    def learnt(self) -> dict[str, Any]:
        """The initialisation, and the rates as ``rate_of_<name>``."""
        both = {**self.initialisation, **{f"rate_of_{name}": rate for name, rate in self.rates.items()}}
        return {name: tensor.detach().cpu().clone() for name, tensor in both.items()}

    def load(self, learnt: dict[str, Any]) -> None:
        """Take both over.

        Raises:
            StillhouseError: they are of another network.
        """
        take_over(
            {**self.initialisation, **{f"rate_of_{name}": rate for name, rate in self.rates.items()}}, learnt
        )
