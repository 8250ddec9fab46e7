"""PQN: parallelised Q-network (Gallici et al. 2024, arXiv:2407.04811, Algorithm 1).

Many environment copies are stepped together; after every T steps the network is fitted to the Q(lambda) returns of
just these T x B transitions, without replay and without a target network. LayerNorm keeps this stable (their theorem
2).

    G_t = r_t + gamma (1 - terminated_t) [ (1 - lambda) max_a Q(s_{t+1}, a) + lambda G_{t+1} ]
    loss = mean 1/2 (Q(s_t, a_t) - stop_gradient(G_t))^2

Deviations from the paper and its code (``mttga/purejaxql``):

1. Adam (fused, on one flat tensor) instead of RAdam.
2. The returns take the Q-values computed while acting, as theirs do; at a truncation the true final observation is
   evaluated, where theirs treats a time limit like a terminal state.
3. Observations that are no transitions (autoreset ``NEXT_STEP``) are left out of the minibatches.
4. A convolution's maps are normalised together, sample by sample (one group of GroupNorm), where theirs are normalised
   position by position over the channels: a quarter less time an update.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.exploration import epsilon_greedy, linear_schedule
from stillhouse.losses.td import td_loss
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize
from stillhouse.networks.parameters import FlatParameters
from stillhouse.returns import lambda_returns
from stillhouse.types import Report


class PQNConfig(Config):
    """Settings; the defaults are the paper's for MinAtar."""

    algorithm: Literal["pqn"] = "pqn"
    env_steps: int = Field(default=1_000_000, ge=1, le=10**10, description="budget in env steps")
    num_envs: int = Field(default=128, ge=1, le=4096, description="environment copies stepped together")
    rollout_length: int = Field(
        default=32, ge=1, le=4096, description="env steps of each copy between updates"
    )
    epochs: int = Field(default=2, ge=1, le=100, description="passes over each rollout")
    minibatches: int = Field(default=32, ge=1, le=4096, description="updates per pass")
    learning_rate: float = Field(default=5e-4, gt=0, le=1)
    learning_rate_decay: bool = Field(default=True, description="linearly to 0 over the budget")
    max_gradient_norm: float = Field(default=10.0, ge=0, description="0 does not clip")
    gamma: float = Field(default=0.99, ge=0, le=1, description="discount per env step")
    trace: float = Field(default=0.65, ge=0, le=1, description="lambda of Q(lambda)")
    epsilon_start: float = Field(default=1.0, ge=0, le=1)
    epsilon_end: float = Field(default=0.05, ge=0, le=1)
    epsilon_fraction: float = Field(
        default=0.1, ge=0, le=1, description="share of the budget over which epsilon falls"
    )
    reward_scale: float = Field(
        default=1.0, gt=0, description="rewards are multiplied by it in learning, not in reports"
    )
    network: NetworkSize = NetworkSize(conv_channels=16, features=128, torso=(), layer_norm=True)

    @model_validator(mode="after")
    def _whole_minibatches(self) -> PQNConfig:
        if self.minibatches > self.num_envs * self.rollout_length:
            raise ValueError("at most num_envs * rollout_length minibatches are allowed")
        return self


class PQN:
    """The learner: construct, then iterate :meth:`train`.

    Args:
        config: settings.
        network: Q-values for ``environment``; trained in place.
        environment: name of the network's head and adapter.
        envs: the copies to act in; ``num_envs`` of them.
        seed: the stage's seed.
    """

    def __init__(
        self,
        config: PQNConfig,
        network: MultiTaskNetwork,
        environment: str,
        envs: VectorEnvironment,
        seed: int,
    ) -> None:
        self.config = config
        self.network = network
        self.environment = environment
        self.reward_scale = config.reward_scale
        self.envs = envs
        self.parameters = FlatParameters(network, config.learning_rate)
        self.device = self.parameters.values.device
        self.env_steps = 0
        self.episodes = 0
        self.recent_returns: deque[float] = deque(maxlen=100)
        self._exploration = seeding.generator(seed, "exploration")
        self._shuffling = seeding.torch_generator(seed, "shuffling")
        self._observations = envs.reset()
        observation = envs.spec.observation
        steps, copies = config.rollout_length, envs.num_envs
        self._rollout_observations = np.zeros((steps, copies, *observation.stored_shape), observation.dtype)
        self._rollout_actions = np.zeros((steps, copies), np.int64)
        self._rollout_rewards = np.zeros((steps, copies), np.float32)
        self._rollout_discounts = np.zeros((steps, copies), np.float32)
        self._rollout_traces = np.zeros((steps, copies), np.float32)
        self._rollout_valid = np.zeros((steps, copies), np.bool_)
        self._rollout_values = np.zeros((steps, copies), np.float32)

    def train(self) -> Iterator[Report]:
        """Act and learn until the budget is spent; a report per rollout.

        Raises:
            StillhouseError: the loss is not finite.
        """
        config = self.config
        while self.env_steps < config.env_steps:
            epsilon = self.epsilon()
            self._act(epsilon)
            loss = self._learn()
            if not np.isfinite(loss):
                raise StillhouseError(
                    f"PQN's loss became {loss} after {self.env_steps} env steps; no result is written; lower "
                    "learning_rate, or check the environment's rewards and observations"
                )
            metrics = {"loss/td": loss, "rollout/epsilon": epsilon, "rollout/episodes": float(self.episodes)}
            metrics["rollout/value"] = float(self._rollout_values.mean())
            if self.recent_returns:
                metrics["rollout/return"] = float(np.mean(self.recent_returns))
            yield Report(min(self.env_steps, config.env_steps), config.env_steps, metrics)

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

    def _act(self, epsilon: float) -> None:
        config = self.config
        observations = self._observations
        for t in range(config.rollout_length):
            values = self.outputs(observations)
            if t:
                self._rollout_values[t - 1] = values.max(axis=1)
            actions = epsilon_greedy(values, epsilon, self._exploration)
            step = self.envs.step(actions)
            self._rollout_observations[t] = observations
            self._rollout_actions[t] = actions
            self._rollout_rewards[t] = step.rewards * config.reward_scale
            self._rollout_discounts[t] = config.gamma * ~step.terminated
            self._rollout_traces[t] = config.trace * ~(step.terminated | step.truncated)
            self._rollout_valid[t] = step.valid
            self._bootstrap_at_truncations(t, step.truncated, step.ended, step.final_observations)
            self.episodes += len(step.ended)
            self.recent_returns.extend(step.episode_returns.tolist())
            observations = step.observations
        self._rollout_values[-1] = self.outputs(observations).max(axis=1)
        self._apply_truncations()
        self._observations = observations
        self.env_steps += int(self._rollout_valid.sum())

    def _bootstrap_at_truncations(
        self, t: int, truncated: np.ndarray, ended: np.ndarray, final: np.ndarray
    ) -> None:
        # Kept until the rollout's end: the next step overwrites row t with the new episode's first value.
        if t == 0:
            self._truncations: list[tuple[int, np.ndarray, np.ndarray]] = []
        at_limit = truncated[ended]
        if at_limit.any():
            values = self.outputs(final[at_limit]).max(axis=1)
            self._truncations.append((t, ended[at_limit], values))

    def _apply_truncations(self) -> None:
        for t, rows, values in self._truncations:
            self._rollout_values[t, rows] = values

    def _learn(self) -> float:
        config = self.config
        returns = lambda_returns(
            torch.from_numpy(self._rollout_rewards),
            torch.from_numpy(self._rollout_discounts),
            torch.from_numpy(self._rollout_traces),
            torch.from_numpy(self._rollout_values),
        )
        rows = torch.from_numpy(np.flatnonzero(self._rollout_valid))
        observations = torch.from_numpy(self._rollout_observations).flatten(0, 1).to(self.device)
        actions = torch.from_numpy(self._rollout_actions).flatten().to(self.device)
        targets = returns.flatten().to(self.device)
        learning_rate = config.learning_rate
        if config.learning_rate_decay:
            learning_rate *= 1 - min(1.0, (self.env_steps - len(rows)) / config.env_steps)
        size = max(1, len(rows) // config.minibatches)
        total = torch.zeros((), device=self.device)
        for _ in range(config.epochs):
            order = rows[torch.randperm(len(rows), generator=self._shuffling)].to(self.device)
            for minibatch in order.split(size)[: config.minibatches]:
                loss = self._update(
                    observations[minibatch], actions[minibatch], targets[minibatch], learning_rate
                )
                total += loss
        return float(total) / (config.epochs * config.minibatches)

    def _update(self, observations: Tensor, actions: Tensor, targets: Tensor, learning_rate: float) -> Tensor:
        loss = td_loss(self.network(observations, self.environment), actions, targets, "mse")
        self.parameters.zero_gradient()
        loss.backward()
        self.parameters.step(learning_rate, self.config.max_gradient_norm)
        return loss.detach()

    def get_state(self) -> dict[str, Any]:
        """The whole training state, between two reports."""
        return {
            "parameters": self.parameters.get_state(),
            "envs": self.envs.get_state(),
            "env_steps": self.env_steps,
            "episodes": self.episodes,
            "recent_returns": list(self.recent_returns),
            "exploration": self._exploration.bit_generator.state,
            "shuffling": self._shuffling.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self.parameters.set_state(state["parameters"])
        self._observations = self.envs.set_state(state["envs"])
        self.env_steps = state["env_steps"]
        self.episodes = state["episodes"]
        self.recent_returns = deque(state["recent_returns"], maxlen=100)
        self._exploration.bit_generator.state = state["exploration"]
        self._shuffling.set_state(torch.from_numpy(np.array(state["shuffling"])))
