"""PPO: proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347, Algorithm 1, clipped objective), actor and critic.

Environment copies are stepped together; after every T steps policy and critic are fitted, in a few passes over minibatches,
to just these T x B transitions. The advantages are generalised advantage estimates (Schulman et al. 2016,
arXiv:1506.02438, eq. 16).

    delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t),   A_t = delta_t + gamma lambda A_{t+1},   G_t = A_t + V(s_t)
    rho_t = pi(a_t | s_t) / mu(a_t | s_t)
    loss = mean [ -min(rho_t A_t, clip(rho_t, 1 - epsilon, 1 + epsilon) A_t) + c1 (V(s_t) - G_t)^2 - c2 H(pi(. | s_t)) ]

Deviations from the paper:

1. Advantages are normalised to mean 0 and standard deviation 1 within each minibatch, and the gradient's norm is clipped
   (``max_gradient_norm``): both as in the authors' later code (``openai/baselines``) and in stable-baselines3. The value
   loss is not clipped, as in the latter.
2. A time limit is no terminal state: the value of the true final observation is bootstrapped from, and no advantage runs over
   an episode's end.
3. Observations that are no transitions (autoreset ``NEXT_STEP``) are left out of the minibatches.
4. The critic is a value head on the actor's torso, or a network of its own of the same size (``critic``). The fresh policy
   head's weights are made 100 times smaller, so that learning starts from a nearly uniform policy.
5. ``critic_warmup``: for this share of the budget only the critic learns, so that a policy that was taken from elsewhere is
   not spoiled by the errors of a fresh critic.
6. The loss's gradients with respect to logits and values are written out (:func:`clipped_loss`).
7. A ``guide`` adds its weight times KL(guide || policy) on the rollout's states (kickstarting); there is none in plain training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.losses.policy_gradient import ClippedLoss, clipped_loss, normalise
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize, NetworkSpec, build_network
from stillhouse.networks.parameters import FlatParameters
from stillhouse.returns import generalized_advantages
from stillhouse.types import EnvironmentSpec, Report

CriticKind = Literal["shared", "separate"]

_EVALUATION_BATCH = 4096


class PPOConfig(Config):
    """Settings; the defaults suit MinAtar."""

    algorithm: Literal["ppo"] = "ppo"
    env_steps: int = Field(default=1_000_000, ge=1, le=10**10, description="budget in env steps")
    num_envs: int = Field(default=128, ge=1, le=4096, description="environment copies stepped together")
    rollout_length: int = Field(
        default=32, ge=1, le=4096, description="env steps of each copy between updates"
    )
    epochs: int = Field(default=4, ge=1, le=100, description="passes over each rollout")
    minibatches: int = Field(default=16, ge=1, le=4096, description="updates per pass")
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    learning_rate_decay: bool = Field(default=True, description="linearly to 0 over the budget")
    max_gradient_norm: float = Field(default=0.5, ge=0, description="0 does not clip")
    gamma: float = Field(default=0.99, ge=0, le=1, description="discount per env step")
    trace: float = Field(
        default=0.65, ge=0, le=1, description="lambda of the generalised advantage estimates"
    )
    clip_range: float = Field(
        default=0.2, gt=0, le=1, description="how far the probability ratio may move from 1"
    )
    value_coefficient: float = Field(default=0.5, ge=0, le=1000, description="weight of the value loss")
    entropy_coefficient: float = Field(default=0.01, ge=0, le=1000, description="weight of the entropy bonus")
    critic: CriticKind = Field(
        default="shared",
        description="shared: a value head on the actor's torso; separate: a network of its own",
    )
    critic_warmup: float = Field(
        default=0.0, ge=0, le=1, description="share of the budget in which only the critic learns"
    )
    reward_scale: float = Field(
        default=1.0, gt=0, description="rewards are multiplied by it in learning, not in reports"
    )
    network: NetworkSize = NetworkSize(conv_channels=16, features=128, torso=(), layer_norm=True)

    @model_validator(mode="after")
    def _whole_minibatches(self) -> PPOConfig:
        if self.minibatches > self.num_envs * self.rollout_length:
            raise ValueError("at most num_envs * rollout_length minibatches are allowed")
        return self


# Observations [b, ...], actions int64 [b], log mu [b], returns [b], with a guide its probabilities [b, A], advantages [b].
Batch = tuple[Tensor, ...]


def build_critic(config: PPOConfig, actor: MultiTaskNetwork, environment: str, seed: int) -> nn.Module:
    """A fresh critic: of the actor's features [B, last width], or of raw observations, to values [B, 1].

    Args:
        config: says which (``critic``).
        actor: whose torso is shared, or whose size the critic has.
        environment: name of the actor's head.
        seed: the learner's; torch's global generator is left as it was.
    """
    seed, device = seeding.derive(seed, "critic"), next(actor.parameters()).device
    if config.critic == "separate":
        observed = EnvironmentSpec(
            observation=actor.spec.environments[environment].observation, actions=1
        )  # one output: the state's value
        spec = NetworkSpec(size=actor.spec.size, environments={environment: observed}, output="q_values")
        return build_network(spec, seed).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(actor.feature_count, 1).to(device)


def build_parameters(
    config: PPOConfig, network: MultiTaskNetwork, beside: Mapping[str, nn.Module]
) -> FlatParameters:
    """A network's parameters, and its critics' ``beside`` it, with PPO's optimiser."""
    # The optimiser's epsilon is that of baselines and stable-baselines3.
    return FlatParameters(network, config.learning_rate, epsilon=1e-5, beside=beside)


class Guide(Protocol):
    """A policy that the learner's is drawn to: see :mod:`stillhouse.transfer.kickstarting`."""

    def weight(self, env_steps: int) -> float:
        """Of the Kullback-Leibler divergence in the loss, after so many env steps; 0: the guide is not asked."""
        ...

    def policy(self, observations: Tensor) -> Tensor:
        """Probabilities [B, A] for raw observations [B, ...], without a gradient."""
        ...


class PPO:
    """The learner: construct, then iterate :meth:`train`.

    Args:
        config: settings.
        network: logits for ``environment``; trained in place.
        environment: name of the network's head and adapter.
        envs: the copies to act in; ``num_envs`` of them.
        seed: the stage's seed.
        parameters: the network's and the critic's, where others train them too: :func:`build_parameters`; none: its own.
        critic: values of the network's features or of raw observations: :func:`build_critic`, with ``parameters``; none: its own.

    Attributes:
        learning_rate: of the updates on the present rollout.
        guide: a policy that the learner's is drawn to, by KL(guide || policy) on the states that the learner meets; none at
            first.
    """

    def __init__(
        self,
        config: PPOConfig,
        network: MultiTaskNetwork,
        environment: str,
        envs: VectorEnvironment,
        seed: int,
        parameters: FlatParameters | None = None,
        critic: nn.Module | None = None,
    ) -> None:
        self.config = config
        self.network = network
        self.environment = environment
        self.reward_scale = 1.0  # logits have no scale of rewards
        self.guide: Guide | None = None
        self.envs = envs
        self.critic = critic or build_critic(config, network, environment, seed)
        self.parameters = parameters or build_parameters(config, network, {"critic": self.critic})
        self.learning_rate = config.learning_rate
        self.device = self.parameters.values.device
        self.env_steps = 0
        self.episodes = 0
        self.recent_returns: deque[float] = deque(maxlen=100)
        self._warming = config.critic_warmup > 0
        self._sampling = seeding.generator(seed, "actions")
        self._shuffling = seeding.torch_generator(seed, "shuffling")
        self._observations = envs.reset()
        observation, actions = envs.spec.observation, envs.spec.actions
        steps, copies = config.rollout_length, envs.num_envs
        self._rollout_observations = np.zeros((steps, copies, *observation.stored_shape), observation.dtype)
        self._rollout_logits = np.zeros((steps, copies, actions), np.float32)
        self._rollout_actions = np.zeros((steps, copies), np.int64)
        self._rollout_rewards = np.zeros((steps, copies), np.float32)
        self._rollout_terminated = np.zeros((steps, copies), np.bool_)
        self._rollout_truncated = np.zeros((steps, copies), np.bool_)
        self._rollout_valid = np.zeros((steps, copies), np.bool_)
        # Of the present rollout: what minibatches are cut from, [T * B, ...] each, advantages last; the guide's weight; losses.
        self._columns: tuple[Tensor, ...] = ()
        self._guided = 0.0
        self._losses: list[ClippedLoss] = []
        self._metrics: dict[str, float] = {}

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
            if not np.isfinite(loss := metrics["loss/policy"] + metrics["loss/value"]):
                raise StillhouseError(
                    f"PPO's loss became {loss} after {self.env_steps} env steps; no result is written; lower "
                    "learning_rate, or check the environment's rewards and observations"
                )
            yield Report(min(self.env_steps, config.env_steps), config.env_steps, metrics)

    def act(self) -> None:
        """Fill the next rollout with samples of the policy, and compute its advantages and returns."""
        config = self.config
        self._end_warmup()
        self.learning_rate = config.learning_rate
        if config.learning_rate_decay:
            self.learning_rate *= 1 - min(1.0, self.env_steps / config.env_steps)
        self._evaluate(*self._play())

    def batches(self) -> Iterator[Batch]:
        """The rollout's minibatches, in a fresh order each pass; their advantages are normalised."""
        config = self.config
        valid = torch.from_numpy(np.flatnonzero(self._rollout_valid))
        size = max(1, len(valid) // config.minibatches)
        count = min(config.minibatches, len(valid))
        for _ in range(config.epochs):
            order = valid[torch.randperm(len(valid), generator=self._shuffling)][: size * count]
            *shuffled, chosen = (column[order.to(self.device)] for column in self._columns)
            shuffled.append(normalise(chosen.view(count, size)).flatten())
            yield from zip(*(column.split(size) for column in shuffled), strict=True)

    def backward(self, batch: Batch) -> Tensor:
        """Add the loss's gradient to the parameters'; the loss without the guide's part, a scalar."""
        config = self.config
        observations, actions, log_mu, returns, *guides, advantages = batch
        features = self.network.features(observations, self.environment)
        logits = self.network.head(features, self.environment)
        values = self._value(observations, features.detach() if self._warming else features)
        loss = clipped_loss(
            logits,
            values.squeeze(1),
            actions,
            log_mu,
            advantages,
            returns,
            config.clip_range,
            config.value_coefficient,
            config.entropy_coefficient,
        )
        if guides:  # d KL(guide || policy) / d logits = policy - guide
            toward = torch.softmax(logits.detach(), 1).sub_(guides[0])
            loss.logits_gradient.add_(toward, alpha=self._guided / len(toward))
        values_gradient = loss.values_gradient.unsqueeze(1)
        if self._warming:
            values.backward(values_gradient)
        else:
            torch.autograd.backward([logits, values], [loss.logits_gradient, values_gradient])
        self._losses.append(loss)
        return loss.total(config.value_coefficient, config.entropy_coefficient)

    def metrics(self) -> dict[str, float]:
        """Of the present rollout, by the glossary's names."""
        metrics = {**self._metrics, "rollout/episodes": float(self.episodes)}
        if self._losses:
            metrics |= _loss_metrics(self._losses, self.config)
        if self.recent_returns:
            metrics["rollout/return"] = float(np.mean(self.recent_returns))
        return metrics

    @torch.inference_mode()
    def outputs(self, observations: np.ndarray) -> np.ndarray:
        """Logits, float32 [B, A], for raw observations [B, ...]."""
        logits: np.ndarray = (
            self.network(torch.from_numpy(observations).to(self.device), self.environment).cpu().numpy()
        )
        return logits

    def _end_warmup(self) -> None:
        if self._warming and self.env_steps >= self.config.critic_warmup * self.config.env_steps:
            self._warming = False
            self.parameters.forget_moments()

    def _play(self) -> tuple[np.ndarray, np.ndarray]:
        """Fill the rollout.

        Returns:
            Rows of the flattened rollout [T * B] whose successor is not the row one step later (truncations, the last
            step), and these true successors, [K] and [K, ...].
        """
        steps, copies, actions_count = self._rollout_logits.shape
        # argmax(logits + Gumbel noise) is a sample of softmax(logits), and needs no probabilities that sum to 1.
        noise = self._sampling.gumbel(size=(steps, copies, actions_count))
        observations = self._observations
        rows: list[np.ndarray] = []
        successors: list[np.ndarray] = []
        for t in range(steps):
            logits = self.outputs(observations)
            actions = (logits + noise[t]).argmax(axis=1)
            step = self.envs.step(actions)
            self._rollout_observations[t] = observations
            self._rollout_logits[t] = logits
            self._rollout_actions[t] = actions
            self._rollout_rewards[t] = step.rewards
            self._rollout_terminated[t] = step.terminated
            self._rollout_truncated[t] = step.truncated
            self._rollout_valid[t] = step.valid
            observations = step.observations
            if len(step.ended):
                at_limit = step.truncated[step.ended]
                rows.append(t * copies + step.ended[at_limit])
                successors.append(step.final_observations[at_limit])
                self.episodes += len(step.ended)
                self.recent_returns.extend(step.episode_returns.tolist())
        going_on = np.flatnonzero(~(step.terminated | step.truncated))
        rows.append((steps - 1) * copies + going_on)
        successors.append(observations[going_on])
        self._observations = observations
        self.env_steps += int(self._rollout_valid.sum())
        return np.concatenate(rows), np.concatenate(successors)

    def _evaluate(self, rows: np.ndarray, successors: np.ndarray) -> None:
        """Compute advantages and returns of the rollout, with what :meth:`_play` gave."""
        config = self.config
        steps, copies = self._rollout_rewards.shape
        observations = torch.from_numpy(self._rollout_observations).flatten(0, 1).to(self.device)
        values = self._values(observations)  # [T * B]
        next_values = torch.cat(
            [values[copies:], values.new_zeros(copies)]
        )  # 0 counts where it terminated only
        next_values[torch.from_numpy(rows)] = self._values(torch.from_numpy(successors).to(self.device))
        ended = self._rollout_terminated | self._rollout_truncated
        advantages = generalized_advantages(
            torch.from_numpy(self._rollout_rewards * np.float32(config.reward_scale)),
            torch.from_numpy(np.float32(config.gamma) * ~self._rollout_terminated),
            torch.from_numpy(np.float32(config.trace) * ~ended),
            values.view(steps, copies).cpu(),
            next_values.view(steps, copies).cpu(),
        ).to(self.device)
        actions = torch.from_numpy(self._rollout_actions).flatten().to(self.device)
        logits = torch.from_numpy(self._rollout_logits).flatten(0, 1).to(self.device)
        log_mu = torch.log_softmax(logits, 1).gather(1, actions.unsqueeze(1)).squeeze(1)
        self._guided = self.guide.weight(self.env_steps) if self.guide and not self._warming else 0.0
        guides = [self._guide_policy(self.guide, observations)] if self.guide and self._guided else []
        returns = advantages.flatten() + values
        self._columns = (observations, actions, log_mu, returns, *guides, advantages.flatten())
        self._losses = []
        self._metrics = {"rollout/value": float(values.mean())}
        if guides:
            log_policy = torch.log_softmax(logits, 1)
            self._metrics["policy/guide_kl"] = float(
                functional.kl_div(log_policy, guides[0], reduction="batchmean")
            )

    @torch.inference_mode()
    def _guide_policy(self, guide: Guide, observations: Tensor) -> Tensor:
        """The guide's probabilities [N, A] for raw observations [N, ...]."""
        return torch.cat([guide.policy(part) for part in observations.split(_EVALUATION_BATCH)])

    def _value(self, observations: Tensor, features: Tensor | None = None) -> Tensor:
        """Values [B, 1] of raw observations [B, ...], whose features by the actor may be known already."""
        values: Tensor
        if self.config.critic == "separate":
            values = self.critic(observations, self.environment)
        else:
            if features is None:
                features = self.network.features(observations, self.environment)
            values = self.critic(features)
        return values

    @torch.inference_mode()
    def _values(self, observations: Tensor) -> Tensor:
        """Values [N] of raw observations [N, ...]."""
        return torch.cat([self._value(part) for part in observations.split(_EVALUATION_BATCH)]).squeeze(1)

    def get_state(self) -> dict[str, Any]:
        """The whole training state, critic included, between two reports."""
        return {
            "parameters": self.parameters.get_state(),
            "envs": self.envs.get_state(),
            "env_steps": self.env_steps,
            "episodes": self.episodes,
            "recent_returns": list(self.recent_returns),
            "warming": self._warming,
            "sampling": self._sampling.bit_generator.state,
            "shuffling": self._shuffling.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self.parameters.set_state(state["parameters"])
        self._observations = self.envs.set_state(state["envs"])
        self.env_steps = state["env_steps"]
        self.episodes = state["episodes"]
        self.recent_returns = deque(state["recent_returns"], maxlen=100)
        self._warming = state["warming"]
        self._sampling.bit_generator.state = state["sampling"]
        self._shuffling.set_state(torch.from_numpy(np.array(state["shuffling"])))


def _loss_metrics(parts: list[ClippedLoss], config: PPOConfig) -> dict[str, float]:
    """Means over all updates of a rollout; of what the policy moved, over the last pass."""
    log_ratio = torch.cat([part.log_ratio for part in parts[-max(1, len(parts) // config.epochs) :]])
    ratio = log_ratio.exp()
    return {
        "loss/policy": float(torch.cat([part.policy for part in parts]).mean()),
        "loss/value": float(torch.cat([part.value for part in parts]).mean()),
        "policy/entropy": float(torch.cat([part.entropy for part in parts]).mean()),
        # KL(before || after), by an estimator that is never negative: E[rho - 1 - log rho] under the policy before.
        "policy/kl": float((ratio - 1 - log_ratio).mean()),
        "policy/clip_fraction": float(((ratio - 1).abs() > config.clip_range).float().mean()),
    }
