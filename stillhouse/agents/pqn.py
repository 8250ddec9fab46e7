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
from stillhouse.losses.td import td_loss
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize
from stillhouse.networks.parameters import FlatParameters
from stillhouse.returns import lambda_returns
from stillhouse.types import Policy, Report


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


class Batch(NamedTuple):
    """A minibatch: observations [b, ...], actions int64 [b], Q(lambda) returns [b]."""

    observations: Tensor
    actions: Tensor
    returns: Tensor


class Rollout:
    """T x B transitions of one environment and their Q(lambda) returns; what :meth:`act` overwrites each time.

    Args:
        config: rollout length, discount, trace.
        envs: the copies to act in, B of them.
        outputs: the network's Q-values.
        exploration: random actions are drawn from it.
        reward_scale: rewards are multiplied by it.

    Attributes:
        env_steps, episodes: so far.
        recent_returns: of the last 100 episodes.
    """

    def __init__(
        self,
        config: PQNConfig,
        envs: VectorEnvironment,
        outputs: Policy,
        exploration: np.random.Generator,
        reward_scale: float,
    ) -> None:
        self.config = config
        self.envs = envs
        self.env_steps = 0
        self.episodes = 0
        self.recent_returns: deque[float] = deque(maxlen=100)
        self._outputs = outputs
        self._exploration = exploration
        self._reward_scale = reward_scale
        self._now = envs.reset()
        observation = envs.spec.observation
        steps, copies = config.rollout_length, envs.num_envs
        self._observations = np.zeros((steps, copies, *observation.stored_shape), observation.dtype)
        self._actions = np.zeros((steps, copies), np.int64)
        self._rewards = np.zeros((steps, copies), np.float32)
        self._discounts = np.zeros((steps, copies), np.float32)
        self._traces = np.zeros((steps, copies), np.float32)
        self._valid = np.zeros((steps, copies), np.bool_)
        self._values = np.zeros((steps, copies), np.float32)

    @property
    def observations(self) -> Tensor:
        """As they were acted on, [T * B, ...]."""
        return torch.from_numpy(self._observations).flatten(0, 1)

    @property
    def actions(self) -> Tensor:
        """Taken there, int64 [T * B]."""
        return torch.from_numpy(self._actions).flatten()

    @property
    def rows(self) -> Tensor:
        """Numbers of the rows that are transitions, int64."""
        return torch.from_numpy(np.flatnonzero(self._valid))

    @property
    def mean_value(self) -> float:
        """Mean greedy value of the last rollout's successors."""
        return float(self._values.mean())

    def act(self, epsilon: float) -> None:
        """Take T steps in every copy, a share ``epsilon`` of them at random."""
        config = self.config
        observations = self._now
        truncations: list[tuple[int, np.ndarray, np.ndarray]] = []
        for t in range(config.rollout_length):
            values = self._outputs(observations)
            if t:
                self._values[t - 1] = values.max(axis=1)
            actions = epsilon_greedy(values, epsilon, self._exploration)
            step = self.envs.step(actions)
            self._observations[t] = observations
            self._actions[t] = actions
            self._rewards[t] = step.rewards * self._reward_scale
            self._discounts[t] = config.gamma * ~step.terminated
            self._traces[t] = config.trace * ~(step.terminated | step.truncated)
            self._valid[t] = step.valid
            at_limit = step.truncated[step.ended]
            if at_limit.any():
                final = self._outputs(step.final_observations[at_limit]).max(axis=1)
                truncations.append((t, step.ended[at_limit], final))
            self.episodes += len(step.ended)
            self.recent_returns.extend(step.episode_returns.tolist())
            observations = step.observations
        self._values[-1] = self._outputs(observations).max(axis=1)
        # At the end: the step after a truncation wrote the new episode's first value into its row.
        for t, copies, final in truncations:
            self._values[t, copies] = final
        self._now = observations
        self.env_steps += int(self._valid.sum())

    def returns(self) -> Tensor:
        """Q(lambda) returns, float32 [T * B]."""
        return lambda_returns(
            torch.from_numpy(self._rewards),
            torch.from_numpy(self._discounts),
            torch.from_numpy(self._traces),
            torch.from_numpy(self._values),
        ).flatten()

    def get_state(self) -> dict[str, Any]:
        """What acting goes on from."""
        return {
            "envs": self.envs.get_state(),
            "env_steps": self.env_steps,
            "episodes": self.episodes,
            "recent_returns": list(self.recent_returns),
            "exploration": self._exploration.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self._now = self.envs.set_state(state["envs"])
        self.env_steps = state["env_steps"]
        self.episodes = state["episodes"]
        self.recent_returns = deque(state["recent_returns"], maxlen=100)
        self._exploration.bit_generator.state = state["exploration"]


class PQN:
    """The learner: construct, then iterate :meth:`train`.

    Args:
        config: settings.
        network: Q-values for ``environment``; trained in place.
        environment: name of the network's head and adapter.
        envs: the copies to act in; ``num_envs`` of them.
        seed: the stage's seed.
        parameters: the network's, where others train it too: :func:`build_parameters`; none: its own.

    Attributes:
        learning_rate: of the updates on the present rollout.
    """

    def __init__(
        self,
        config: PQNConfig,
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
        exploration = seeding.generator(seed, "exploration")
        self.rollout = Rollout(config, envs, self.outputs, exploration, config.reward_scale)
        self._shuffling = seeding.torch_generator(seed, "shuffling")
        self._epsilon = config.epsilon_start
        self._loss, self._updates = torch.zeros((), device=self.device), 0  # of the present rollout

    @property
    def env_steps(self) -> int:
        """Taken so far."""
        return self.rollout.env_steps

    @property
    def episodes(self) -> int:
        """Ended so far."""
        return self.rollout.episodes

    @property
    def recent_returns(self) -> deque[float]:
        """Of the last 100 episodes."""
        return self.rollout.recent_returns

    def train(self) -> Iterator[Report]:
        """Act and learn until the budget is spent; a report per rollout.

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
                    f"PQN's loss became {loss} after {self.env_steps} env steps; no result is written; lower "
                    "learning_rate, or check the environment's rewards and observations"
                )
            yield Report(min(self.env_steps, config.env_steps), config.env_steps, metrics)

    def act(self) -> None:
        """Fill the next rollout, epsilon-greedily."""
        self._epsilon = exploration_share(self.config, self.env_steps)
        self.learning_rate = decayed_learning_rate(self.config, self.env_steps)
        self.rollout.act(self._epsilon)
        self._loss.zero_()
        self._updates = 0

    def batches(self) -> Iterator[Batch]:
        """The rollout's minibatches, in a fresh order each pass."""
        rollout = self.rollout
        observations, actions = rollout.observations.to(self.device), rollout.actions.to(self.device)
        returns = rollout.returns().to(self.device)
        for rows in minibatches(self.config, rollout.rows, self._shuffling):
            chosen = rows.to(self.device)
            yield Batch(observations[chosen], actions[chosen], returns[chosen])

    def backward(self, batch: Batch) -> Tensor:
        """Add the loss's gradient to the parameters'; the loss, a scalar."""
        values = self.network(batch.observations, self.environment)
        loss = td_loss(values, batch.actions, batch.returns, "mse")
        loss.backward()
        self._loss += loss.detach()
        self._updates += 1
        return loss.detach()

    def metrics(self) -> dict[str, float]:
        """Of the present rollout, by the glossary's names."""
        metrics = {
            "loss/td": float(self._loss) / max(1, self._updates),
            "rollout/epsilon": self._epsilon,
            "rollout/episodes": float(self.episodes),
            "rollout/value": self.rollout.mean_value,
        }
        if self.rollout.recent_returns:
            metrics["rollout/return"] = float(np.mean(self.rollout.recent_returns))
        return metrics

    @torch.inference_mode()
    def outputs(self, observations: np.ndarray) -> np.ndarray:
        """Q-values, float32 [B, A], for raw observations [B, ...]."""
        values: np.ndarray = (
            self.network(torch.from_numpy(observations).to(self.device), self.environment).cpu().numpy()
        )
        return values

    def get_state(self) -> dict[str, Any]:
        """The whole training state, between two reports."""
        return {
            "parameters": self.parameters.get_state(),
            **self.rollout.get_state(),
            "shuffling": self._shuffling.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self.parameters.set_state(state["parameters"])
        self.rollout.set_state(state)
        self._shuffling.set_state(torch.from_numpy(np.array(state["shuffling"])))


def build_parameters(config: PQNConfig, network: MultiTaskNetwork) -> FlatParameters:
    """A network's parameters with PQN's optimiser."""
    return FlatParameters(network, config.learning_rate)


def exploration_share(config: PQNConfig, env_steps: int) -> float:
    """Share of random actions after so many env steps."""
    duration = config.epsilon_fraction * config.env_steps
    return linear_schedule(config.epsilon_start, config.epsilon_end, duration, env_steps)


def decayed_learning_rate(config: PQNConfig, env_steps: int) -> float:
    """The learning rate after so many env steps."""
    if not config.learning_rate_decay:
        return config.learning_rate
    return config.learning_rate * (1 - min(1.0, env_steps / config.env_steps))


def minibatches(config: PQNConfig, rows: Tensor, shuffling: torch.Generator) -> Iterator[Tensor]:
    """``epochs`` times ``minibatches`` parts of a shuffled rollout, int64 [b]; up to ``minibatches - 1`` rows are dropped."""
    size = max(1, len(rows) // config.minibatches)
    for _ in range(config.epochs):
        order = rows[torch.randperm(len(rows), generator=shuffling)]
        yield from order.split(size)[: config.minibatches]
