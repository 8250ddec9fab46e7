"""Hard parameter sharing: one network learns all environments by multi-task PQN.

Caruana 1997, "Multitask Learning" (https://doi.org/10.1023/A:1007379606734): a body shared by all tasks, a head for each.
The learner on top is PQN (``stillhouse.agents.pqn``); each update descends

    sum_e w_e mean 1/2 (Q_e(s, a) - stop_gradient(G_e))^2 / sum_e w_e     with a minibatch of every environment e

This is the baseline of multi-task distillation: the same network with as many env steps, but without teachers (Multi-DQN of
Rusu et al. 2015, https://arxiv.org/abs/1511.06295).

Deviations from the papers:

1. PQN in place of DQN, without replay: see there.
2. Every update takes a minibatch of every environment; Multi-DQN's come from one game at a time.
3. What is shared is decided by the network's size: with ``share_planes`` all but the first convolution and the heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator

from stillhouse import seeding
from stillhouse.agents.pqn import (
    PQNConfig,
    Rollout,
    decayed_learning_rate,
    exploration_share,
    minibatches,
)
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import network_policy
from stillhouse.losses.td import td_loss
from stillhouse.networks.multi_task import MultiTaskNetwork, scale_head
from stillhouse.networks.parameters import FlatParameters
from stillhouse.types import Report


class HardSharingConfig(PQNConfig):
    """PQN's settings; ``env_steps`` is the budget of each environment."""

    weights: dict[str, float] = Field(
        default_factory=dict, description="weight of an environment's loss, by name; 1 where none is given"
    )
    reward_scales: dict[str, float] = Field(
        default_factory=dict,
        description="an environment's reward_scale, by name, where it is not the common one",
    )

    @field_validator("weights", "reward_scales")
    @classmethod
    def _positive(cls, values: dict[str, float]) -> dict[str, float]:
        if not all(value > 0 for value in values.values()):
            raise ValueError("numbers greater than 0 are allowed")
        return values


class HardSharing:
    """The learner: construct, then iterate :meth:`train`; ``network`` is the result, see :meth:`rescale_heads`.

    Args:
        config: settings.
        network: Q-values for all environments; trained in place.
        environments: the copies to act in, by the names of the network's heads.
        seed: the stage's seed.

    Raises:
        StillhouseError: a weight or reward scale for an unknown environment, or several reward scales and one head.
    """

    def __init__(
        self,
        config: HardSharingConfig,
        network: MultiTaskNetwork,
        environments: Mapping[str, VectorEnvironment],
        seed: int,
    ) -> None:
        for where, values in (("weights", config.weights), ("reward_scales", config.reward_scales)):
            if unknown := sorted(set(values) - set(environments)):
                raise StillhouseError(
                    f"{where}: {', '.join(unknown)} is not among the environments; allowed are {', '.join(environments)}"
                )
        self.config = config
        if network.spec.size.share_head and len({self.reward_scale(name) for name in environments}) > 1:
            raise StillhouseError(
                "network.share_head: one head cannot give Q-values on several reward scales; set share_head to false, or "
                "the same reward scale for all environments"
            )
        self.network = network
        self.parameters = FlatParameters(network, config.learning_rate)
        self.device = self.parameters.values.device
        self.rollouts = {
            name: Rollout(
                config,
                envs,
                network_policy(network, name, str(self.device)),
                seeding.generator(seed, "exploration", name),
                self.reward_scale(name),
            )
            for name, envs in environments.items()
        }
        self._shuffling = {name: seeding.torch_generator(seed, "shuffling", name) for name in environments}
        weights = [config.weights.get(name, 1.0) for name in environments]
        self._weights = torch.tensor(weights, device=self.device) / sum(weights)

    @property
    def env_steps(self) -> int:
        """Taken so far, all environments together."""
        return sum(rollout.env_steps for rollout in self.rollouts.values())

    def reward_scale(self, name: str) -> float:
        """What the rewards of ``name`` are multiplied by in learning."""
        return self.config.reward_scales.get(name, self.config.reward_scale)

    def rescale_heads(self) -> None:
        """Bring the heads to the environments' own rewards: at the end, for a checkpoint."""
        shared = self.network.spec.size.share_head
        for name in list(self.rollouts)[: 1 if shared else None]:
            scale_head(self.network, name, 1 / self.reward_scale(name))

    def train(self) -> Iterator[Report]:
        """Act and learn until every environment's budget is spent; a report per rollout, in env steps of all together.

        Raises:
            StillhouseError: the loss is not finite.
        """
        config = self.config
        total = config.env_steps * len(self.rollouts)
        while (progress := self._progress()) < config.env_steps:
            epsilon = exploration_share(config, progress)
            learning_rate = decayed_learning_rate(config, progress)
            for rollout in self.rollouts.values():
                rollout.act(epsilon)
            losses = self._learn(learning_rate)
            if not np.isfinite(losses).all():
                raise StillhouseError(
                    f"a loss became {losses} after {self.env_steps} env steps; no result is written; lower learning_rate, or "
                    "check the environments' rewards and observations"
                )
            metrics = {
                "loss/td": float(losses @ self._weights.cpu().numpy()),
                "rollout/epsilon": epsilon,
                "rollout/episodes": float(sum(rollout.episodes for rollout in self.rollouts.values())),
            }
            for (name, rollout), loss in zip(self.rollouts.items(), losses, strict=True):
                metrics[f"loss/{name}"] = float(loss)
                if rollout.recent_returns:
                    metrics[f"return/{name}"] = float(np.mean(rollout.recent_returns))
            yield Report(min(self.env_steps, total), total, metrics)

    def _progress(self) -> int:
        # Copies with reset rows (autoreset NEXT_STEP) take fewer env steps a rollout: the slowest counts.
        return min(rollout.env_steps for rollout in self.rollouts.values())

    def _learn(self, learning_rate: float) -> np.ndarray:
        """An epoch's updates for every environment together; mean losses [E]."""
        config = self.config
        data = {
            name: (
                rollout.observations.to(self.device),
                rollout.actions.to(self.device),
                rollout.returns().to(self.device),
            )
            for name, rollout in self.rollouts.items()
        }
        parts = [
            minibatches(config, rollout.rows, self._shuffling[name])
            for name, rollout in self.rollouts.items()
        ]
        total, updates = torch.zeros(len(data), device=self.device), 0
        # Copies with many reset rows (autoreset NEXT_STEP) may have fewer transitions than minibatches: the fewest count.
        for chosen in zip(*parts, strict=False):
            losses = torch.stack(
                [
                    td_loss(self.network(observations[rows], name), actions[rows], targets[rows], "mse")
                    for (name, (observations, actions, targets)), rows in zip(
                        data.items(), (part.to(self.device) for part in chosen), strict=True
                    )
                ]
            )
            self.parameters.zero_gradient()
            (losses @ self._weights).backward()
            self.parameters.step(learning_rate, config.max_gradient_norm)
            total += losses.detach()
            updates += 1
        means: np.ndarray = (total / updates).cpu().numpy()
        return means

    def get_state(self) -> dict[str, Any]:
        """The whole training state, between two reports."""
        return {
            "parameters": self.parameters.get_state(),
            "rollouts": {name: rollout.get_state() for name, rollout in self.rollouts.items()},
            "shuffling": {name: generator.get_state() for name, generator in self._shuffling.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self.parameters.set_state(state["parameters"])
        for name, rollout in self.rollouts.items():
            rollout.set_state(state["rollouts"][name])
            self._shuffling[name].set_state(torch.from_numpy(np.array(state["shuffling"][name])))
