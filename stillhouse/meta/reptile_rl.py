"""Reptile with a policy gradient inside: move the initial policy towards where a few updates on each task lead.

Nichol et al. 2018, "On First-Order Meta-Learning Algorithms" (https://arxiv.org/abs/1803.02999, Algorithm 2, batched). For tasks i = 1..N

    theta_i <- theta;   k times: play task i by pi_theta_i, theta_i <- theta_i + alpha grad J(theta_i)
    theta <- theta + epsilon mean_i (theta_i - theta),   epsilon falls linearly to 0

The paper is about supervised tasks, and says of reinforcement learning only that the method did not help there; nothing here claims more than
what was measured (docs/algorithms/maml-rl.md).

Deviations, and choices:

1. The inner optimiser is plain gradient ascent on new episodes for each step, as at test time; the paper's is Adam without momentum, on minibatches.
2. Every inner update has the step size of the evaluation: alpha first, a share of it later (``later_rate_factor``).
3. The last episodes, after the last inner update, are not played: nothing is learnt from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from stillhouse import seeding
from stillhouse.envs.families import make_family
from stillhouse.errors import StillhouseError
from stillhouse.meta import Adaptation
from stillhouse.meta.inner_update import PolicyGradientConfig, compare, inner_gradient
from stillhouse.meta.stochastic_policy import StochasticPolicy
from stillhouse.meta.trajectories import make_batch, play
from stillhouse.networks.multi_task import MultiTaskNetwork
from stillhouse.processor import exact_products
from stillhouse.types import Report


class ReptileRlConfig(PolicyGradientConfig):
    """Settings; the defaults are for 2D navigation."""

    method: Literal["reptile_rl"] = "reptile_rl"
    inner_steps: int = Field(default=3, ge=1, le=100, description="k: policy gradient steps on a task")
    outer_rate: float = Field(default=1.0, gt=0, le=1, description="epsilon at first; it falls linearly to 0")


class ReptileRl:
    """The meta-learner.

    Args:
        config: settings.
        seed: the stage's.
        device: of the policy.

    Attributes:
        initial: the parameters that are learnt, [P].
        updates: meta-updates so far.
        env_steps: really played in training, of all tasks.
    """

    columns = {"return/before": "return_before", "return/after": "return_after"}

    def __init__(self, config: ReptileRlConfig, seed: int, device: str = "cpu") -> None:
        self.config = config
        self.seed = seed
        self.device = device
        self.family = make_family(config.family)
        self.policy = StochasticPolicy(self.family, config.hidden)
        self.initial = self.policy.initial(seed, config.initial_std).to(device)
        self.updates = 0
        self.env_steps = 0

    def train(self) -> Iterator[Report]:
        """Meta-train until the budget is spent.

        Raises:
            StillhouseError: the policy is no longer finite.
        """
        while self.updates < self.config.meta_updates:
            metrics = self.update()
            yield Report(self.updates, self.config.meta_updates, metrics)

    @exact_products()
    def update(self) -> dict[str, float]:
        """One meta-update; its metrics: returns before the first and before the last inner update."""
        config = self.config
        random = seeding.generator(self.seed, "meta-train", self.updates)
        tasks = self.family.sample("train", config.tasks, random)
        parameters = self.initial.repeat(config.tasks, 1)
        returns = []
        for step in range(config.inner_steps):
            played = play(self.policy, self.family, parameters, tasks, config.rollouts, random)
            batch = make_batch(self.policy, played, config.discount, config.gae_lambda, self.device)
            gradient = inner_gradient(self.policy, "log_probability", parameters, batch)
            parameters = parameters + config.rate(step) * gradient
            returns.append(float(played.returns().mean()))
            self.env_steps += int(played.valid.sum())
        pace = config.outer_rate * (1 - self.updates / config.meta_updates)
        moved = pace * (parameters - self.initial).mean(0)
        self.initial = self.initial + moved
        self.updates += 1
        if not torch.isfinite(self.initial).all():
            raise StillhouseError(
                f"reptile_rl: the policy is not finite after meta-update {self.updates}; lower inner_rate ({config.inner_rate:g})"
            )
        return {
            "return/before": returns[0],
            "return/after": returns[-1],
            "policy/moved": float(torch.linalg.vector_norm(moved)),
            "rollout/env_steps": float(self.env_steps),
        }

    def evaluate(self, tasks: int, steps: int, seed: int) -> Adaptation:
        """Returns of unseen tasks after 0 to ``steps`` updates, beside a fresh policy's and an oracle's.

        Raises:
            StillhouseError: the test split has fewer tasks than that.
        """
        return compare(self.config, self.policy, self.family, {"learnt": self.initial}, tasks, steps, seed)

    def network(self) -> MultiTaskNetwork:
        """What was learnt as an ordinary network with a head named after the family: a source for a transfer.

        Raises:
            StillhouseError: the family's actions are vectors.
        """
        return self.policy.network(self.initial)

    def get_state(self) -> dict[str, Any]:
        return {
            "initial": self.initial.cpu().numpy().copy(),
            "updates": self.updates,
            "env_steps": self.env_steps,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self.load(state)
        self.updates, self.env_steps = state["updates"], state["env_steps"]

    def learnt(self) -> dict[str, Any]:
        """``initial`` [P]."""
        return {"initial": self.initial.cpu().clone()}

    def load(self, learnt: dict[str, Any]) -> None:
        self.initial = self.policy.check(np.array(learnt["initial"])).to(self.device)
