"""IMPALA: an actor-critic that learns from a policy some updates old, by V-trace (Espeholt et al. 2018, arXiv:1802.01561).

Environment copies are stepped together by the actor's policy mu, which is the learner's as it was ``policy_lag`` updates ago.
After every T steps the learner is fitted to just these T x B transitions, sequence by sequence. With rho_t = min(rho_bar,
pi(a_t | s_t) / mu(a_t | s_t)) and the V-trace targets v_t of :func:`stillhouse.returns.vtrace`, computed anew with the present
parameters at every update,

    q_t = r_t + gamma (1 - terminated_t) v_{t+1}
    loss = mean [ -rho_t (q_t - V(s_t)) log pi(a_t | s_t) + c1 1/2 (V(s_t) - v_t)^2 - c2 H(pi(. | s_t)) ]

with no gradient through rho, q and v. With ``popart`` (:mod:`stillhouse.popart`; Hessel et al. 2018, arXiv:1809.04474) the critic's
error and the advantage are both divided by sigma, the scale of this environment's targets.

A network with a memory (``network.recurrent``) is unrolled over each sequence from the state that the actor had at its first row;
where an episode begins, the state is the initial one again.

``correction`` names the paper's ablations (section 5.2.2): ``one_step`` fits the critic to uncorrected n-step returns and multiplies
the policy's gradient by the one weight rho_t; ``none`` has no weights at all.

Deviations from the paper and its code (``google-deepmind/scalable_agent``):

1. Actor and learner take turns in one process. The lag, which comes from many machines there, is a setting here, and is exact: the
   first update of a rollout sees actions of ``policy_lag`` updates ago, the last of ``minibatches * epochs - 1`` more.
2. Adam (fused, on one flat tensor) instead of RMSProp; means over the batch instead of sums.
3. A time limit is no terminal state: the value of the true final observation is bootstrapped from, and no target runs over
   an episode's end.
4. Observations that are no transitions (autoreset ``NEXT_STEP``) count neither in the losses nor in the statistics.
5. One bound rho_bar for the targets and for the policy's gradient, as in the text; the code has two. ``trace`` is the lambda of
   remark 2, 1 in the paper.
6. Rewards are not clipped; ``reward_scale`` or ``popart`` brings them to size.
7. The fresh policy head's weights are made 100 times smaller, so that learning starts from a nearly uniform policy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.envs.vector import Step, VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.losses.policy_gradient import actor_critic_loss
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize
from stillhouse.networks.parameters import FlatParameters
from stillhouse.popart import PopArt
from stillhouse.returns import VTrace, vtrace
from stillhouse.types import Report


class IMPALAConfig(Config):
    """Settings; the defaults suit MinAtar."""

    algorithm: Literal["impala"] = "impala"
    env_steps: int = Field(default=1_000_000, ge=1, le=10**10, description="budget in env steps")
    num_envs: int = Field(default=128, ge=1, le=4096, description="environment copies stepped together")
    rollout_length: int = Field(
        default=32, ge=1, le=4096, description="env steps of each copy between updates"
    )
    epochs: int = Field(default=1, ge=1, le=100, description="passes over each rollout")
    minibatches: int = Field(
        default=16, ge=1, le=4096, description="updates per pass, each on whole sequences of some copies"
    )
    policy_lag: int = Field(default=0, ge=0, le=1024, description="updates by which the actor is behind")
    correction: Literal["vtrace", "one_step", "none"] = Field(
        default="vtrace",
        description="vtrace; one_step: one importance weight on the policy's gradient; none: as if on-policy",
    )
    rho_bar: float = Field(
        default=1.0, gt=0, le=1000, description="bound of the importance weights in the errors"
    )
    c_bar: float = Field(default=1.0, gt=0, le=1000, description="their bound in the traces, at most rho_bar")
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    learning_rate_decay: bool = Field(default=True, description="linearly to 0 over the budget")
    max_gradient_norm: float = Field(default=0.5, ge=0, description="0 does not clip")
    gamma: float = Field(default=0.99, ge=0, le=1, description="discount per env step")
    trace: float = Field(default=1.0, ge=0, le=1, description="lambda of V-trace")
    value_coefficient: float = Field(default=0.5, ge=0, le=1000, description="weight of the value loss")
    entropy_coefficient: float = Field(default=0.01, ge=0, le=1000, description="weight of the entropy bonus")
    popart: bool = Field(default=False, description="normalise the critic's targets and the advantages")
    popart_beta: float = Field(default=3e-4, gt=0, le=1, description="rate of the statistics per target")
    popart_sigma_min: float = Field(
        default=1e-4, gt=0, le=1e12, description="lower bound of the targets' scale"
    )
    popart_sigma_max: float = Field(default=1e6, gt=0, le=1e12, description="upper bound of it")
    reward_scale: float = Field(
        default=1.0, gt=0, description="rewards are multiplied by it in learning, not in reports"
    )
    network: NetworkSize = NetworkSize(conv_channels=16, features=128, torso=(), layer_norm=True)

    @model_validator(mode="after")
    def _consistent(self) -> IMPALAConfig:
        if self.minibatches > self.num_envs:
            raise ValueError(
                f"minibatches are of whole copies: at most num_envs ({self.num_envs}) are allowed, but minibatches is "
                f"{self.minibatches}"
            )
        if self.c_bar > self.rho_bar:
            raise ValueError(f"c_bar must be at most rho_bar ({self.rho_bar:g}), but it is {self.c_bar:g}")
        if self.popart_sigma_min >= self.popart_sigma_max:
            raise ValueError(
                f"popart_sigma_min must be below popart_sigma_max ({self.popart_sigma_max:g}), but it is "
                f"{self.popart_sigma_min:g}"
            )
        return self


class Rollout:
    """T x B transitions as they were acted; overwritten by the next.

    Attributes:
        observations: acted on, [T, B, ...].
        logits: of the policy that acted, float32 [T, B, A].
        actions: int64 [T, B].
        rewards: float32 [T, B], unscaled.
        terminated, truncated: bool [T, B].
        valid: bool [T, B], False on rows that are no transitions.
        starts: bool [T, B], rows that begin an episode (or show the end of one, where the reset takes a row).
        memory: the network's state before the first row, [B, state width].
        successor_times, successor_copies: int64 [K], of the transitions whose successor is not the row one step later: the
            truncated ones, and the last of each copy.
        successors: what these led to, [K, ...].
    """

    def __init__(self, envs: VectorEnvironment, steps: int, memory: np.ndarray) -> None:
        observation, shape = envs.spec.observation, (steps, envs.num_envs)
        self.observations = np.zeros((*shape, *observation.stored_shape), observation.dtype)
        self.logits = np.zeros((*shape, envs.spec.actions), np.float32)
        self.actions = np.zeros(shape, np.int64)
        self.rewards = np.zeros(shape, np.float32)
        self.terminated = np.zeros(shape, np.bool_)
        self.truncated = np.zeros(shape, np.bool_)
        self.valid = np.zeros(shape, np.bool_)
        self.starts = np.zeros(shape, np.bool_)
        self.memory = memory
        self.successor_times = np.zeros(0, np.int64)
        self.successor_copies = np.zeros(0, np.int64)
        self.successors = self.observations[0, :0]


class Sequences(NamedTuple):
    """A minibatch: the whole sequences of b copies, and where they lead.

    Attributes:
        observations: [T, b, ...].
        actions: int64 [T, b].
        log_mu: their log-probabilities when they were taken [T, b].
        rewards: times the reward scale [T, b].
        discounts: gamma, 0 where terminated [T, b].
        traces: lambda, 0 where an episode ended [T, b].
        valid: bool [T, b], False on rows that are no transitions.
        starts: bool [T, b], rows that begin an episode.
        memory: the network's state before the first row, [b, state width].
        successor_rows: rows of the flattened minibatch [T * b] whose successor is not the row one step later, [K].
        successors: these, [K, ...].
    """

    observations: Tensor
    actions: Tensor
    log_mu: Tensor
    rewards: Tensor
    discounts: Tensor
    traces: Tensor
    valid: Tensor
    starts: Tensor
    memory: Tensor
    successor_rows: Tensor
    successors: Tensor


def build_value_head(network: MultiTaskNetwork, seed: int) -> nn.Linear:
    """A fresh critic for one environment: the network's features [N, last width] to values [N, 1].

    Args:
        network: whose features are its input, and on whose device it is.
        seed: the stage's seed; torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive(seed, "critic"))
        return nn.Linear(network.feature_count, 1).to(next(network.parameters()).device)


def build_critic(config: IMPALAConfig, network: MultiTaskNetwork, environment: str, seed: int) -> nn.Linear:
    """The same, called as :func:`stillhouse.agents.ppo.build_critic` is: for joint training by either."""
    return build_value_head(network, seed)


def build_parameters(
    config: IMPALAConfig, network: MultiTaskNetwork, beside: Mapping[str, nn.Module]
) -> FlatParameters:
    """A network's parameters, and its value heads' ``beside`` it, with IMPALA's optimiser."""
    # The optimiser's epsilon is PPO's.
    return FlatParameters(network, config.learning_rate, epsilon=1e-5, beside=beside)


class IMPALA:
    """The learner: construct, then iterate :meth:`train`; or drive it from outside by :meth:`act`, :meth:`batches` and
    :meth:`backward`.

    What builds on it overrides :meth:`_stepped`, :meth:`_logits`, :meth:`_rewards` or :meth:`_loss`.

    Args:
        config: settings.
        network: logits for ``environment``; trained in place.
        environment: name of the network's head and adapter.
        envs: the copies to act in; ``num_envs`` of them.
        seed: the stage's seed.
        parameters: the network's and the value head's, where somebody else made them; own ones where none are given.
        value_head: from :func:`build_value_head`, with ``parameters``.

    Attributes:
        rollout: the last one.
        popart: statistics of the value head; with ``popart: false`` they stand still.
    """

    def __init__(
        self,
        config: IMPALAConfig,
        network: MultiTaskNetwork,
        environment: str,
        envs: VectorEnvironment,
        seed: int,
        parameters: FlatParameters | None = None,
        value_head: nn.Linear | None = None,
    ) -> None:
        self.config = config
        self.network = network
        self.environment = environment
        self.reward_scale = 1.0  # logits have no scale of rewards
        self.envs = envs
        self.value_head = value_head or build_value_head(network, seed)
        self.parameters = parameters or build_parameters(config, network, {"critic": self.value_head})
        self.device = self.parameters.values.device
        self.popart = PopArt(
            self.value_head,
            config.popart_beta if config.popart else 0.0,
            config.popart_sigma_min,
            config.popart_sigma_max,
        )
        self.env_steps = 0
        self.episodes = 0
        self.recent_returns: deque[float] = deque(maxlen=100)
        # The actor's: of the network's memory, and whether the next observations begin an episode.
        self._memory = network.initial_state(envs.num_envs)
        self._starts = np.ones(envs.num_envs, np.bool_)
        self.rollout = Rollout(envs, config.rollout_length, self._memory.cpu().numpy())
        # All parameters as they were before each of the last ``policy_lag`` updates, oldest first.
        self._snapshots: deque[Tensor] = deque(maxlen=config.policy_lag)
        self._sampling = seeding.generator(seed, "actions")
        self._shuffling = seeding.torch_generator(seed, "shuffling")
        self._observations = envs.reset()
        self._began = 0  # env steps when the last rollout began
        self._parts: list[dict[str, Tensor]] = []  # of the metrics, one an update

    @property
    def learning_rate(self) -> float:
        """For the updates on the last rollout."""
        config = self.config
        if not config.learning_rate_decay:
            return config.learning_rate
        return config.learning_rate * (1 - min(1.0, self._began / config.env_steps))

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
            loss = sum(value for name, value in metrics.items() if name.startswith("loss/"))
            if not np.isfinite(loss):
                raise StillhouseError(
                    f"{type(self).__name__}'s loss became {loss} after {self.env_steps} env steps; no result is written; lower "
                    "learning_rate, or check the environment's rewards and observations"
                )
            yield Report(min(self.env_steps, config.env_steps), config.env_steps, metrics)

    @torch.inference_mode()
    def outputs(self, observations: np.ndarray) -> np.ndarray:
        """The present policy's logits, float32 [B, A], for raw observations [B, ...].

        Raises:
            StillhouseError: the network has a memory; :func:`stillhouse.evaluation.rollouts.network_policy` can play with it.
        """
        self.network.check_memoryless(self.environment)
        given = torch.from_numpy(observations).to(self.device)
        logits = self._logits(given, self.network.features(given, self.environment))
        return logits.cpu().numpy()

    def act(self) -> None:
        """Fill the rollout with the policy of ``policy_lag`` updates ago."""
        self._began = self.env_steps
        self._parts.clear()
        if not self._snapshots:
            self._fill_rollout()
            return
        values = self.parameters.values.data
        present = values.clone()
        values.copy_(self._snapshots[0])
        self._fill_rollout()
        values.copy_(present)

    @torch.inference_mode()
    def _step(self, observations: np.ndarray) -> np.ndarray:
        """The logits to act by next, [B, A]; the memory takes the observations [B, ...] in."""
        given = torch.from_numpy(observations).to(self.device)
        starts = torch.from_numpy(self._starts).to(self.device)
        features, states = self.network.unroll(given[None], self.environment, self._memory, starts[None])
        self._memory = states[0]
        return self._logits(given, features[0]).cpu().numpy()

    def _fill_rollout(self) -> None:
        rollout, observations = self.rollout, self._observations
        rollout.memory = self._memory.cpu().numpy()
        # argmax(logits + Gumbel noise) is a sample of softmax(logits), and needs no probabilities that sum to 1.
        noise = self._sampling.gumbel(size=rollout.logits.shape)
        times: list[np.ndarray] = []
        copies: list[np.ndarray] = []
        successors: list[np.ndarray] = []
        for t in range(len(noise)):
            logits = self._step(observations)
            actions = (logits + noise[t]).argmax(axis=1)
            step = self.envs.step(actions)
            self._stepped(observations, actions, step)
            rollout.observations[t] = observations
            rollout.logits[t] = logits
            rollout.actions[t] = actions
            rollout.rewards[t] = step.rewards
            rollout.terminated[t] = step.terminated
            rollout.truncated[t] = step.truncated
            rollout.valid[t] = step.valid
            rollout.starts[t] = self._starts
            observations, self._starts = step.observations, step.starts
            if len(step.ended):
                at_limit = step.truncated[step.ended]
                copies.append(step.ended[at_limit])
                times.append(np.full(len(copies[-1]), t))
                successors.append(step.final_observations[at_limit])
                self.episodes += len(step.ended)
                self.recent_returns.extend(step.episode_returns.tolist())
        going_on = np.flatnonzero(~(step.terminated | step.truncated))
        copies.append(going_on)
        times.append(np.full(len(going_on), len(noise) - 1))
        successors.append(observations[going_on])
        rollout.successor_times = np.concatenate(times)
        rollout.successor_copies = np.concatenate(copies)
        rollout.successors = np.concatenate(successors)
        self._observations = observations
        self.env_steps += int(rollout.valid.sum())

    def _stepped(self, observations: np.ndarray, actions: np.ndarray, step: Step) -> None:
        """After each step of the copies: what was acted on [B, ...], the actions [B], and what came of them."""

    def batches(self) -> Iterator[Sequences]:
        """The rollout in shuffled parts, ``epochs`` times ``minibatches`` of them."""
        config, rollout = self.config, self.rollout
        copies = self.envs.num_envs
        actions = torch.from_numpy(rollout.actions)
        log_mu = torch.log_softmax(torch.from_numpy(rollout.logits), 2)
        ended = rollout.terminated | rollout.truncated
        columns = {
            "observations": torch.from_numpy(rollout.observations),
            "actions": actions,
            "log_mu": log_mu.gather(2, actions.unsqueeze(2)).squeeze(2),
            "rewards": torch.from_numpy(rollout.rewards * np.float32(config.reward_scale)),
            "discounts": torch.from_numpy(np.float32(config.gamma) * ~rollout.terminated),
            "traces": torch.from_numpy(np.float32(config.trace) * ~ended),
            "valid": torch.from_numpy(rollout.valid),
            "starts": torch.from_numpy(rollout.starts),
        }
        times, of_copies, successors, memory = (
            torch.from_numpy(part)
            for part in (
                rollout.successor_times,
                rollout.successor_copies,
                rollout.successors,
                rollout.memory,
            )
        )
        for _ in range(config.epochs):
            order = torch.randperm(copies, generator=self._shuffling)
            for chosen in order.tensor_split(config.minibatches):
                column_of = torch.full((copies,), -1)
                column_of[chosen] = torch.arange(len(chosen))
                here = column_of[of_copies] >= 0
                rows = times[here] * len(chosen) + column_of[of_copies[here]]
                yield Sequences(
                    **{name: column[:, chosen].to(self.device) for name, column in columns.items()},
                    memory=memory[chosen].to(self.device),
                    successor_rows=rows.to(self.device),
                    successors=successors[here].to(self.device),
                )

    def backward(self, batch: Sequences) -> Tensor:
        """Add the gradient of the loss on a minibatch to ``parameters.gradient``; the loss. One update's worth."""
        if self.config.policy_lag:
            self._snapshots.append(self.parameters.values.data.clone())
        loss = self._loss(batch)
        loss.backward()
        return loss.detach()

    def _logits(self, observations: Tensor, features: Tensor) -> Tensor:
        """The policy's logits [N, A] for raw observations [N, ...] and the network's features of them [N, last width]."""
        return self.network.head(features, self.environment)

    def _rewards(self, batch: Sequences, log_policy: Tensor) -> Tensor:
        """The rewards to learn from [T, b]; ``log_policy`` are the present log-probabilities of all actions [T, b, A]."""
        return batch.rewards

    def _loss(self, batch: Sequences) -> Tensor:
        """The loss on a minibatch, a scalar with its graph; PopArt's statistics move by the minibatch's targets."""
        steps, copies = batch.actions.shape
        unrolled, states = self.network.unroll(
            batch.observations, self.environment, batch.memory, batch.starts
        )
        features = unrolled.flatten(0, 1)
        log_policy = torch.log_softmax(self._logits(batch.observations.flatten(0, 1), features), 1)
        actions = batch.actions.flatten()
        with torch.no_grad():
            values = self._values(features)  # [T * b]
            next_values = torch.cat([values[copies:], values.new_zeros(copies)])  # 0 where it terminated only
            led_from, going_on = states.flatten(0, 1)[batch.successor_rows], batch.successor_rows[None] < 0
            led_to, _ = self.network.unroll(batch.successors[None], self.environment, led_from, going_on)
            next_values[batch.successor_rows] = self._values(led_to[0])
            log_pi = log_policy.gather(1, actions.unsqueeze(1)).view(steps, copies)
            log_ratio = log_pi - batch.log_mu
            rewards = self._rewards(batch, log_policy.detach().view(steps, copies, -1))
            found = self._corrected(
                log_ratio.exp(), rewards, batch, values.view(steps, copies), next_values.view(steps, copies)
            )
            targets = found.targets.flatten()
            valid = batch.valid.flatten()
            # First the statistics, then the loss with them, as in PopArt's Algorithm 1.
            self.popart.update(targets[valid])
            advantages = found.rho_t.flatten() * (found.q_t.flatten() - values) / self.popart.sigma
        loss = actor_critic_loss(
            log_policy,
            self.value_head(features).squeeze(1),
            actions,
            advantages,
            self.popart.normalise(targets),
            valid / valid.sum().clamp(min=1),
            self.config.value_coefficient,
            self.config.entropy_coefficient,
        )
        self._parts.append(
            {
                "loss/policy": loss.policy[valid],
                "loss/value": loss.value[valid],
                "policy/entropy": loss.entropy[valid],
                "policy/log_ratio": log_ratio.flatten()[valid],
                "rollout/value": values[valid],
            }
        )
        return loss.total

    def _values(self, features: Tensor) -> Tensor:
        """The critic's values [N] of features [N, last width], in the scaled rewards' own size."""
        return self.popart.unnormalise(self.value_head(features)).squeeze(1)

    def _corrected(
        self, ratio: Tensor, rewards: Tensor, batch: Sequences, values: Tensor, next_values: Tensor
    ) -> VTrace:
        """Targets and weights of the policy's gradient, by ``correction``; all [T, b]."""
        config, transitions = self.config, (rewards, batch.discounts, batch.traces, values, next_values)
        if config.correction == "vtrace":
            return vtrace(*transitions, ratio, config.rho_bar, config.c_bar)
        uncorrected = vtrace(*transitions, torch.ones_like(ratio))
        if config.correction == "one_step":
            return uncorrected._replace(rho_t=ratio.clamp(max=config.rho_bar))
        return uncorrected

    def metrics(self) -> dict[str, float]:
        """Of the last rollout: means over all its updates."""
        columns = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        log_ratio = columns.pop("policy/log_ratio")
        metrics = {name: float(column.mean()) for name, column in columns.items()}
        # KL(mu || pi), by an estimator that is never negative: E[ratio - 1 - log ratio] under mu.
        metrics["policy/kl"] = float((log_ratio.exp() - 1 - log_ratio).mean())
        if self.config.popart:
            metrics |= {"popart/mu": self.popart.mu, "popart/sigma": self.popart.sigma}
        metrics["rollout/episodes"] = float(self.episodes)
        if self.recent_returns:
            metrics["rollout/return"] = float(np.mean(self.recent_returns))
        return metrics

    def get_state(self) -> dict[str, Any]:
        """The whole training state, value head and its statistics included, between two reports."""
        return {
            "parameters": self.parameters.get_state(),
            "popart": self.popart.get_state(),
            "snapshots": [snapshot.cpu().numpy().copy() for snapshot in self._snapshots],
            "memory": self._memory.cpu().numpy().copy(),
            "starts": self._starts.copy(),
            "envs": self.envs.get_state(),
            "env_steps": self.env_steps,
            "episodes": self.episodes,
            "recent_returns": list(self.recent_returns),
            "sampling": self._sampling.bit_generator.state,
            "shuffling": self._shuffling.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self.parameters.set_state(state["parameters"])
        self.popart.set_state(state["popart"])
        self._snapshots.clear()
        self._snapshots.extend(
            torch.from_numpy(np.array(part)).to(self.device) for part in state["snapshots"]
        )
        self._memory = torch.from_numpy(np.array(state["memory"])).to(self.device)
        self._starts = np.array(state["starts"])
        self._observations = self.envs.set_state(state["envs"])
        self.env_steps = state["env_steps"]
        self.episodes = state["episodes"]
        self.recent_returns = deque(state["recent_returns"], maxlen=100)
        self._sampling.bit_generator.state = state["sampling"]
        self._shuffling.set_state(torch.from_numpy(np.array(state["shuffling"])))
