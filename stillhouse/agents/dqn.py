"""DQN: deep Q-network (Mnih et al. 2015, doi:10.1038/nature14236, Algorithm 1).

    y = r + gamma (1 - terminated) max_a' Q_target(s', a')
    loss = mean huber(Q(s, a) - y)

with a uniform replay memory and a target network copied every ``target_update_interval`` updates.

Deviations from the paper:

1. Acting is vectorised: ``num_envs`` copies are stepped together, and after every ``train_every`` env steps
   ``updates_per_train`` updates follow (the paper: one copy, an update every 4 actions).
2. Adam instead of RMSProp.
3. Options the paper lacks, all off by default but one: double Q-learning (``double_q``, van Hasselt et al. 2016), n-step
   returns (``n_step``), squared error (``loss: mse``), a learning rate that falls linearly to 0 (on by default: the
   last checkpoint is judged, and without it a late bad update is what gets judged).
4. The gradient's norm is clipped (``max_gradient_norm``).
5. A time limit is no terminal state: the value of the true final observation is bootstrapped from.
6. Rewards are not clipped.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.exploration import epsilon_greedy, linear_schedule
from stillhouse.losses.td import TDLoss, q_learning_target, td_loss
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize
from stillhouse.networks.parameters import FlatParameters
from stillhouse.replay.uniform import UniformReplay
from stillhouse.types import Report


class DQNConfig(Config):
    """Settings; the defaults suit classic control."""

    algorithm: Literal["dqn"] = "dqn"
    env_steps: int = Field(default=50_000, ge=1, le=10**10, description="budget in env steps")
    num_envs: int = Field(default=8, ge=1, le=4096, description="environment copies stepped together")
    replay_capacity: int = Field(default=100_000, ge=1, le=10**8, description="transitions kept")
    learning_starts: int = Field(
        default=1_000, ge=0, description="transitions in the replay before the first update"
    )
    train_every: int = Field(default=256, ge=1, description="env steps between blocks of updates")
    updates_per_train: int = Field(default=128, ge=1, description="updates in a block")
    batch_size: int = Field(default=64, ge=1, le=65_536)
    learning_rate: float = Field(default=2.3e-3, gt=0, le=1)
    learning_rate_decay: bool = Field(default=True, description="linearly to 0 over the budget")
    max_gradient_norm: float = Field(default=10.0, ge=0, description="0 does not clip")
    target_update_interval: int = Field(
        default=128, ge=1, description="updates between copies to the target network"
    )
    gamma: float = Field(default=0.99, ge=0, le=1, description="discount per env step")
    n_step: int = Field(default=1, ge=1, le=100, description="rewards summed before bootstrapping")
    double_q: bool = Field(default=False, description="choose the bootstrap action with the online network")
    loss: TDLoss = "huber"
    reward_scale: float = Field(
        default=1.0, gt=0, description="rewards are multiplied by it in learning, not in reports"
    )
    epsilon_start: float = Field(default=1.0, ge=0, le=1)
    epsilon_end: float = Field(default=0.04, ge=0, le=1)
    epsilon_fraction: float = Field(
        default=0.16, ge=0, le=1, description="share of the budget over which epsilon falls"
    )
    network: NetworkSize = NetworkSize(features=256, torso=(256,))

    @model_validator(mode="after")
    def _can_learn(self) -> DQNConfig:
        if self.replay_capacity < max(self.learning_starts, self.num_envs):
            raise ValueError("replay_capacity must be at least learning_starts and num_envs")
        return self


class Batch(NamedTuple):
    """A minibatch of the replay: observations [b, ...], actions int64 [b], n-step returns [b], discounts [b], successors [b, ...]."""

    observations: Tensor
    actions: Tensor
    returns: Tensor
    discounts: Tensor
    successors: Tensor


def build_parameters(config: DQNConfig, network: MultiTaskNetwork) -> FlatParameters:
    """A network's parameters with DQN's optimiser."""
    return FlatParameters(network, config.learning_rate)


class DQN:
    """The learner: construct, then iterate :meth:`train`.

    Args:
        config: settings.
        network: Q-values for ``environment``; trained in place.
        environment: name of the network's head and adapter.
        envs: the copies to act in; ``num_envs`` of them.
        seed: the stage's seed.
        parameters: the network's, where others train it too: :func:`build_parameters`; none: its own.

    Attributes:
        learning_rate: of the present block of updates.
    """

    def __init__(
        self,
        config: DQNConfig,
        network: MultiTaskNetwork,
        environment: str,
        envs: VectorEnvironment,
        seed: int,
        parameters: FlatParameters | None = None,
    ) -> None:
        self.config = config
        self.network = network
        self.environment = environment
        self.reward_scale = config.reward_scale
        self.envs = envs
        self.parameters = parameters or build_parameters(config, network)
        self.learning_rate = config.learning_rate
        self.device = self.parameters.values.device
        self._target = copy.deepcopy(network)
        self._target_parameters = FlatParameters(self._target, config.learning_rate)
        self._target.requires_grad_(False)
        # Memory is taken as it fills, so that a long-lived agent's replay can be as large as it is allowed to be.
        self.replay = UniformReplay(
            envs.spec.observation, config.replay_capacity, envs.num_envs, config.n_step, config.gamma
        )
        self.env_steps = 0
        self.updates = 0
        self.episodes = 0
        self.recent_returns: deque[float] = deque(maxlen=100)
        self._trained_at = 0
        self._exploration = seeding.generator(seed, "exploration")
        self._sampling = seeding.generator(seed, "replay")
        self._observations = envs.reset()
        self._loss, self._block = torch.zeros((), device=self.device), 0  # of the latest block of updates

    def train(self) -> Iterator[Report]:
        """Act and learn until the budget is spent; a report per block of updates.

        Raises:
            StillhouseError: the loss is not finite.
        """
        config = self.config
        while self.env_steps < config.env_steps:
            self.act()
            for batch in self.batches():
                self.parameters.zero_gradient()
                self.backward(batch)
                self.parameters.step(self.learning_rate, config.max_gradient_norm)
            metrics = self.metrics()
            if not np.isfinite(loss := metrics["loss/td"]):
                raise StillhouseError(
                    f"DQN's loss became {loss} after {self.env_steps} env steps; no result is written; lower "
                    "learning_rate, or check the environment's rewards and observations"
                )
            yield Report(min(self.env_steps, config.env_steps), config.env_steps, metrics)

    def act(self) -> None:
        """Act until a block of updates is due, or the budget is spent."""
        config = self.config
        due = self._trained_at + config.train_every
        self._step()
        while self.env_steps < min(due, config.env_steps):
            self._step()
        self._trained_at = self.env_steps
        self.learning_rate = config.learning_rate
        if config.learning_rate_decay:
            self.learning_rate *= 1 - min(1.0, self.env_steps / config.env_steps)
        self._loss.zero_()
        self._block = 0

    def batches(self) -> Iterator[Batch]:
        """A block of minibatches from the replay; none before ``learning_starts``."""
        config = self.config
        if self.replay.size < max(1, config.learning_starts):
            return
        sample = self.replay.sample(config.updates_per_train * config.batch_size, self._sampling)
        blocks = [torch.from_numpy(array).to(self.device).split(config.batch_size) for array in sample]
        for batch in map(Batch, *blocks):
            yield batch._replace(
                returns=batch.returns * self.reward_scale
            )  # the replay keeps the rewards as they were

    def backward(self, batch: Batch) -> Tensor:
        """Add the loss's gradient to the parameters'; the loss, a scalar."""
        if self.updates % self.config.target_update_interval == 0:
            self._target_parameters.values.data.copy_(self.parameters.values.data)
        with torch.no_grad():
            target_q = self._target(batch.successors, self.environment)
            online_q = self.network(batch.successors, self.environment) if self.config.double_q else None
            targets = q_learning_target(batch.returns, batch.discounts, target_q, online_q)
        values = self.network(batch.observations, self.environment)
        loss = td_loss(values, batch.actions, targets, self.config.loss)
        loss.backward()
        self.updates += 1
        self._loss += loss.detach()
        self._block += 1
        return loss.detach()

    def metrics(self) -> dict[str, float]:
        """Of the present block of updates, by the glossary's names."""
        metrics = {
            "loss/td": float(self._loss) / max(1, self._block),
            "rollout/epsilon": self.epsilon(),
            "rollout/episodes": float(self.episodes),
        }
        if self.recent_returns:
            metrics["rollout/return"] = float(np.mean(self.recent_returns))
        return metrics

    def epsilon(self) -> float:
        """Share of random actions at present."""
        config = self.config
        duration = config.epsilon_fraction * config.env_steps
        return linear_schedule(config.epsilon_start, config.epsilon_end, duration, self.env_steps)

    @torch.inference_mode()
    def outputs(self, observations: np.ndarray) -> np.ndarray:
        """Q-values, float32 [B, A], for raw observations [B, ...]."""
        values: np.ndarray = (
            self.network(torch.from_numpy(observations).to(self.device), self.environment).cpu().numpy()
        )
        return values

    def _step(self) -> None:
        actions = epsilon_greedy(self.outputs(self._observations), self.epsilon(), self._exploration)
        step = self.envs.step(actions)
        self.replay.add(
            self._observations,
            actions,
            step.rewards,
            step.terminated,
            step.truncated,
            step.next_observations(),
            step.valid,
        )
        self._observations = step.observations
        self.env_steps += int(step.valid.sum())
        self.episodes += len(step.ended)
        self.recent_returns.extend(step.episode_returns.tolist())

    def get_state(self) -> dict[str, Any]:
        """The whole training state, replay included, between two reports."""
        return {
            "parameters": self.parameters.get_state(),
            "target": self._target_parameters.values.detach().cpu().numpy().copy(),
            "replay": self.replay.get_state(),
            "envs": self.envs.get_state(),
            "env_steps": self.env_steps,
            "trained_at": self._trained_at,
            "updates": self.updates,
            "episodes": self.episodes,
            "recent_returns": list(self.recent_returns),
            "exploration": self._exploration.bit_generator.state,
            "sampling": self._sampling.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self.parameters.set_state(state["parameters"])
        self._target_parameters.values.data.copy_(torch.from_numpy(np.array(state["target"])))
        self.replay.set_state(state["replay"])
        self._observations = self.envs.set_state(state["envs"])
        if self.envs.cut_episodes > state["envs"]["cut_episodes"]:
            self.replay.drop_open()
        self.env_steps = state["env_steps"]
        self._trained_at = state["trained_at"]
        self.updates = state["updates"]
        self.episodes = state["episodes"]
        self.recent_returns = deque(state["recent_returns"], maxlen=100)
        self._exploration.bit_generator.state = state["exploration"]
        self._sampling.bit_generator.state = state["sampling"]
