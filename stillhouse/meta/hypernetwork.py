"""A meta-network: from a few transitions of a task it makes a policy for that task.

What the policy's layers are is decided by a set of transitions, through an encoder that knows no order (Zaheer et al. 2017, deep sets,
https://arxiv.org/abs/1703.06114) and one of three ways (:mod:`stillhouse.networks.conditioned`): as further inputs, by scale and shift
of the hidden units (FiLM, Perez et al. 2018, https://arxiv.org/abs/1709.07871), or by changing all weights (hypernetworks, Ha et al.
2016, https://arxiv.org/abs/1609.09106; in meta reinforcement learning Beck et al. 2022, https://arxiv.org/abs/2210.11348). Encoder and
policy are trained together by PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347) on many tasks of a family at once:

    D_k subset of task k's transitions in the last rollout,    theta_k = H(D_k)
    loss = mean over tasks k, steps t of L_PPO( pi(. | s; theta_k), a, A ),    V = V(s, task k's parameters)

At test time a new task is played for an episode, its transitions give a policy, which plays the next one: no gradient is needed.

Deviations from the papers:

1. A set is given from outside and fixed for a rollout; the papers' meta-learners feed a recurrent network or a posterior as they act.
   Its size is uniform from 0 to ``transitions``, so that a policy without any data is learnt too.
2. The critic sees the task's true parameters (physics), in training alone; the policy never does.
3. Minibatches are whole copies of environments over the rollout's time, so that each set is encoded once.
4. The initial changes are small beside common weights (Beck et al.'s bias initialisation), in all three ways.

``conditioning: none`` is the same learner without a set: one common policy for all tasks, the baseline.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.envs.cartpole_family import TRANSITION_WIDTH, CartPoleFamilyVectorEnv, transition_features
from stillhouse.envs.families import FamilyConfig, make_family
from stillhouse.envs.physics import CARTPOLE_RANGES, CartPoleFamily
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.losses.policy_gradient import ClippedLoss, clipped_loss, normalise
from stillhouse.meta import Adaptation
from stillhouse.networks.batched import take_over
from stillhouse.networks.conditioned import (
    ConditionedPolicy,
    Conditioning,
    Layers,
    as_network,
    outputs,
)
from stillhouse.networks.multi_task import MultiTaskNetwork
from stillhouse.networks.parameters import FlatParameters
from stillhouse.returns import generalized_advantages
from stillhouse.types import Report

HEAD = "cartpole"  # of the networks that are made
_OBSERVATIONS, _ACTIONS = 4, 2
_TASK_WIDTH = len(CARTPOLE_RANGES) + 1  # and whether sides are swapped
_FRESH_LOGITS = 0.01  # factor on the fresh output layer: learning starts from a nearly uniform policy


class CartPoleFamilyConfig(FamilyConfig):
    """The one family whose transitions a hypernetwork can read."""

    name: Literal["cartpole"] = Field(default="cartpole", description="the family of environments")
    horizon: int = Field(default=500, ge=1, le=10_000, description="env steps of an episode")


class HypernetworkConfig(Config):
    """Settings; the defaults suit the family."""

    method: Literal["hypernetwork"] = Field(
        default="hypernetwork", description="a network that makes a task's policy from its transitions"
    )
    family: CartPoleFamilyConfig = CartPoleFamilyConfig()
    conditioning: Conditioning = Field(
        default="film",
        description="how a set of transitions changes the policy: further inputs (context), scale and shift (film), all weights "
        "(weights), not at all (none: the baseline)",
    )
    tasks: int = Field(default=64, ge=1, le=4096, description="training tasks")
    copies: int = Field(default=2, ge=1, le=256, description="environment copies of each task")
    updates: int = Field(
        default=150, ge=1, le=1_000_000, description="rollouts of all copies, each learnt from once"
    )
    rollout_length: int = Field(
        default=32, ge=1, le=4096, description="env steps of each copy between updates"
    )
    transitions: int = Field(default=32, ge=1, le=4096, description="largest set that a policy is made from")
    widths: tuple[int, ...] = Field(
        default=(64, 64),
        min_length=1,
        max_length=8,
        description="the policy's hidden layers; the critic's too",
    )
    encoder_width: int = Field(default=32, ge=1, le=4096, description="hidden width of the set encoder")
    context: int = Field(default=8, ge=1, le=4096, description="numbers that are kept of a set")
    epochs: int = Field(default=4, ge=1, le=100, description="passes over each rollout")
    minibatches: int = Field(default=4, ge=1, le=4096, description="gradient steps per pass")
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    learning_rate_decay: bool = Field(default=True, description="linearly to 0 over the updates")
    max_gradient_norm: float = Field(default=0.5, ge=0, description="0 does not clip")
    gamma: float = Field(default=0.99, ge=0, le=1, description="discount per env step")
    trace: float = Field(
        default=0.95, ge=0, le=1, description="lambda of the generalised advantage estimates"
    )
    clip_range: float = Field(
        default=0.2, gt=0, le=1, description="how far the probability ratio may move from 1"
    )
    value_coefficient: float = Field(default=0.5, ge=0, le=1000, description="weight of the value loss")
    entropy_coefficient: float = Field(default=0.01, ge=0, le=1000, description="weight of the entropy bonus")
    reward_scale: float = Field(default=0.1, gt=0, description="rewards are multiplied by it in learning")
    evaluation_episodes: int = Field(
        default=32,
        ge=1,
        le=100_000,
        description="greedy episodes on each test task after each episode of data",
    )

    @model_validator(mode="after")
    def _whole_minibatches(self) -> Self:
        if self.minibatches > self.tasks * self.copies:
            raise ValueError("at most tasks * copies minibatches are allowed")
        if self.rollout_length < 2:
            raise ValueError(
                "a rollout_length of at least 2 is allowed: a row of each may be spent on a reset"
            )
        if any(not 1 <= width <= 8192 for width in self.widths):
            raise ValueError("widths from 1 to 8192 are allowed")
        return self


class Hypernetwork:
    """The meta-learner: construct, iterate :meth:`train`, then :meth:`evaluate` or :meth:`network`.

    Args:
        config: settings.
        seed: the stage's seed.
        device: of the networks.

    Attributes:
        tasks: the training tasks, [tasks, 5].
        policy: what makes policies.
        env_steps: taken in training so far.
    """

    columns = {
        "rollout/return": "return",
        "loss/policy": "policy_loss",
        "loss/value": "value_loss",
        "policy/entropy": "entropy",
        "policy/kl": "kl",
    }

    def __init__(self, config: HypernetworkConfig, seed: int, device: str = "cpu") -> None:
        self.config = config
        family = make_family(config.family)
        assert isinstance(family, CartPoleFamily)
        self._family = family
        self.tasks = family.sample("train", config.tasks, seeding.generator(seed, "training tasks"))
        self._tasks = np.repeat(self.tasks, config.copies, axis=0)  # of each copy
        self.envs = VectorEnvironment.over(
            CartPoleFamilyVectorEnv(self._tasks, family.horizon), seed, "train", "CartPole family"
        )
        self.device = device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.derive(seed, "network"))
            self.policy = ConditionedPolicy(
                _OBSERVATIONS,
                _ACTIONS,
                config.widths,
                config.conditioning,
                TRANSITION_WIDTH,
                config.encoder_width,
                config.context,
            ).to(device)
            torch.manual_seed(seeding.derive(seed, "critic"))
            self._critic = _critic(config.widths).to(device)
        with torch.no_grad():
            self.policy.dense[-1].weight.mul_(_FRESH_LOGITS)  # type: ignore[operator]
        self.parameters = FlatParameters(
            self.policy, config.learning_rate, epsilon=1e-5, beside={"critic": self._critic}
        )
        self.updates = 0
        self.env_steps = 0
        self.episodes = 0
        self.recent_returns: deque[float] = deque(maxlen=4 * len(self._tasks))
        self._sampling = seeding.generator(seed, "actions")
        self._choosing = seeding.generator(seed, "sets")
        self._shuffling = seeding.torch_generator(seed, "shuffling")
        self._observations = self.envs.reset()
        self._parameters_seen = torch.from_numpy(family.scaled(self._tasks)).to(device)
        shape = (config.rollout_length, len(self._tasks))
        self._rollout: dict[str, np.ndarray] = {
            "observations": np.zeros((*shape, _OBSERVATIONS), np.float32),
            "successors": np.zeros((*shape, _OBSERVATIONS), np.float32),
            "logits": np.zeros((*shape, _ACTIONS), np.float32),
            "actions": np.zeros(shape, np.int64),
            "rewards": np.zeros(shape, np.float32),
            "terminated": np.zeros(shape, np.bool_),
            "ended": np.zeros(shape, np.bool_),
            "valid": np.zeros(shape, np.bool_),  # none yet: the first sets are empty
        }

    def train(self) -> Iterator[Report]:
        """Meta-train until all updates are done; a report per rollout.

        Raises:
            StillhouseError: the loss is not finite.
        """
        config = self.config
        while self.updates < config.updates:
            rate = config.learning_rate
            if config.learning_rate_decay:
                rate *= 1 - self.updates / config.updates
            rows, present = self._sets()
            self._play(rows, present)
            columns = self._columns()
            losses = []
            for _ in range(config.epochs):
                order = torch.randperm(len(self._tasks), generator=self._shuffling)
                for chosen in order.tensor_split(config.minibatches):
                    self.parameters.zero_gradient()
                    losses.append(self._backward(rows, present, columns, chosen))
                    self.parameters.step(rate, config.max_gradient_norm)
            self.updates += 1
            metrics = self._metrics(losses)
            if not np.isfinite(loss := metrics["loss/policy"] + metrics["loss/value"]):
                raise StillhouseError(
                    f"the hypernetwork's loss became {loss} after {self.updates} updates; no result is written; lower learning_rate"
                )
            yield Report(self.updates, config.updates, metrics)

    def _sets(self) -> tuple[Tensor, Tensor]:
        """For each copy some of its task's last transitions, rows [B, N, D] and which are there, bool [B, N]."""
        config, rollout = self.config, self._rollout
        count, copies = config.transitions, config.copies
        features = transition_features(rollout["observations"], rollout["actions"], rollout["successors"])
        steps = config.rollout_length
        # A task's copies stand side by side: [T, tasks, copies] -> [tasks, T * copies].
        valid = rollout["valid"].reshape(steps, -1, copies).transpose(1, 0, 2).reshape(config.tasks, -1)
        features = (
            features.reshape(steps, -1, copies, TRANSITION_WIDTH)
            .transpose(1, 0, 2, 3)
            .reshape(config.tasks, -1, TRANSITION_WIDTH)
        )
        rows = np.zeros((len(self._tasks), count, TRANSITION_WIDTH), np.float32)
        present = np.zeros((len(self._tasks), count), np.bool_)
        sizes = self._choosing.integers(count + 1, size=len(self._tasks))
        order = self._choosing.random((len(self._tasks), valid.shape[1]))
        for copy, size in enumerate(sizes):
            task = copy // copies
            there = np.flatnonzero(valid[task])
            chosen = there[np.argsort(order[copy, there], kind="stable")[:size]]
            rows[copy, : len(chosen)] = features[task, chosen]
            present[copy, : len(chosen)] = True
        return torch.from_numpy(rows).to(self.device), torch.from_numpy(present).to(self.device)

    def _play(self, rows: Tensor, present: Tensor) -> None:
        """Fill the rollout with samples of the sets' policies."""
        rollout = self._rollout
        noise = self._sampling.gumbel(size=rollout["logits"].shape)  # argmax of logits + noise is a sample
        with torch.inference_mode():
            layers = self.policy.layers(rows, present)
            for t in range(self.config.rollout_length):
                given = torch.from_numpy(self._observations).to(self.device)
                logits = outputs(layers, given.unsqueeze(1)).squeeze(1).cpu().numpy()
                actions = (logits + noise[t]).argmax(axis=1)
                step = self.envs.step(actions)
                rollout["observations"][t] = self._observations
                rollout["successors"][t] = step.next_observations()
                rollout["logits"][t] = logits
                rollout["actions"][t] = actions
                rollout["rewards"][t] = step.rewards
                rollout["terminated"][t] = step.terminated
                rollout["ended"][t] = step.terminated | step.truncated
                rollout["valid"][t] = step.valid
                self._observations = step.observations
                self.episodes += len(step.ended)
                self.recent_returns.extend(step.episode_returns.tolist())
        self.env_steps += int(rollout["valid"].sum())

    def _columns(self) -> dict[str, Tensor]:
        """What minibatches are cut from, copies first: [B, T, ...] each."""
        config = self.config
        rollout = {key: torch.from_numpy(value) for key, value in self._rollout.items()}
        with torch.inference_mode():
            values, following = (
                self._values(rollout[key].to(self.device).transpose(0, 1), self._parameters_seen)
                .transpose(0, 1)
                .cpu()
                for key in ("observations", "successors")
            )
            advantages = generalized_advantages(
                rollout["rewards"] * config.reward_scale,
                config.gamma * (~rollout["terminated"]).float(),
                config.trace * (~rollout["ended"]).float(),
                values.contiguous(),
                following.contiguous(),
            )
            policies = torch.log_softmax(rollout["logits"], 2)
            log_mu = policies.gather(2, rollout["actions"].unsqueeze(2)).squeeze(2)
        columns = {key: rollout[key] for key in ("observations", "actions", "valid")}
        columns |= {"advantages": advantages, "returns": advantages + values, "log_mu": log_mu}
        return {key: column.transpose(0, 1).contiguous().to(self.device) for key, column in columns.items()}

    def _backward(
        self, rows: Tensor, present: Tensor, columns: dict[str, Tensor], chosen: Tensor
    ) -> ClippedLoss:
        """Add the gradient of some copies' loss."""
        config = self.config
        chosen = chosen.to(self.device)
        batch = {key: column[chosen] for key, column in columns.items()}
        valid = batch["valid"]
        layers = self.policy.layers(rows[chosen], present[chosen])
        logits = outputs(layers, batch["observations"])[valid]
        values = self._values(batch["observations"], self._parameters_seen[chosen])[valid]
        loss = clipped_loss(
            logits,
            values,
            batch["actions"][valid],
            batch["log_mu"][valid],
            normalise(batch["advantages"][valid].unsqueeze(0)).squeeze(0),
            batch["returns"][valid],
            config.clip_range,
            config.value_coefficient,
            config.entropy_coefficient,
        )
        torch.autograd.backward([logits, values], [loss.logits_gradient, loss.values_gradient])
        return loss

    def _values(self, observations: Tensor, parameters: Tensor) -> Tensor:
        """Values [B, T] of observations [B, T, 4] in tasks of these scaled parameters [B, 5]."""
        seen = parameters.unsqueeze(1).expand(-1, observations.shape[1], -1)
        values: Tensor = self._critic(torch.cat([observations, seen], 2)).squeeze(2)
        return values

    def _metrics(self, losses: list[ClippedLoss]) -> dict[str, float]:
        log_ratio = torch.cat([loss.log_ratio for loss in losses[-self.config.minibatches :]])
        metrics = {
            "loss/policy": float(torch.cat([loss.policy for loss in losses]).mean()),
            "loss/value": float(torch.cat([loss.value for loss in losses]).mean()),
            "policy/entropy": float(torch.cat([loss.entropy for loss in losses]).mean()),
            "policy/kl": float((log_ratio.exp() - 1 - log_ratio).mean()),
            "rollout/episodes": float(self.episodes),
        }
        if self.recent_returns:
            metrics["rollout/return"] = float(np.mean(self.recent_returns))
        return metrics

    @torch.inference_mode()
    def network(self, transitions: np.ndarray) -> MultiTaskNetwork:
        """The policy for a task of which these transitions were seen: an ordinary network of logits, whose head is ``cartpole``.

        Args:
            transitions: rows of :func:`stillhouse.envs.cartpole_family.transition_features`, float32 [n, 9]; none: what is played
                before anything is known. All of them are used.
        """
        given = torch.from_numpy(np.array(transitions, np.float32).reshape(1, -1, TRANSITION_WIDTH))
        present = torch.ones(given.shape[:2], dtype=torch.bool)
        layers = self.policy.layers(given.to(self.device), present.to(self.device))
        return as_network(layers, 0, HEAD)

    def evaluate(self, tasks: int, steps: int, seed: int) -> Adaptation:
        """Unseen tasks after 0 to ``steps`` episodes of data; see :class:`stillhouse.meta.MetaLearner`.

        Each episode of data is sampled from the policy so far; ``transitions`` random ones of all so far make the next policy, which
        is judged by greedy episodes that all policies share. The baseline is random play.
        """
        drawn = self._family.sample("test", tasks, seeding.generator(seed, "test tasks"))
        episodes, horizon = self.config.evaluation_episodes, self._family.horizon
        uniform = [(torch.zeros(tasks, _ACTIONS, _OBSERVATIONS), torch.zeros(tasks, _ACTIONS))]
        sampling = seeding.generator(seed, "adaptation actions")
        random_play = play(
            uniform, drawn, horizon, episodes, seed, "test", seeding.generator(seed, "random play")
        )
        pools = [np.zeros((0, TRANSITION_WIDTH), np.float32)] * tasks
        choosing = seeding.generator(seed, "adaptation sets")
        values = np.zeros((tasks, steps + 1))
        for step in range(steps + 1):
            if step and self.config.conditioning == "none":  # data change nothing
                values[:, step] = values[:, 0]
                continue
            if step:
                data = play(
                    self._made(pools, choosing), drawn, horizon, 1, seed, f"adaptation {step}", sampling
                )
                pools = [np.concatenate(pair) for pair in zip(pools, data.transitions, strict=True)]
            judged = play(self._made(pools, choosing), drawn, horizon, episodes, seed, "test", None)
            values[:, step] = judged.returns.mean(axis=1)
        baselines = {"random": random_play.returns.mean(axis=1, keepdims=True)}
        return Adaptation("return", "episodes", list(range(steps + 1)), values, baselines)

    @torch.inference_mode()
    def _made(self, pools: list[np.ndarray], choosing: np.random.Generator) -> Layers:
        """Policies of at most ``transitions`` rows of each task's pool, drawn without repetition."""
        count = self.config.transitions
        rows = torch.zeros(len(pools), count, TRANSITION_WIDTH)
        present = torch.zeros(len(pools), count, dtype=torch.bool)
        for index, pool in enumerate(pools):
            chosen = pool[choosing.permutation(len(pool))[:count]]
            rows[index, : len(chosen)] = torch.from_numpy(chosen)
            present[index, : len(chosen)] = True
        layers = self.policy.layers(rows.to(self.device), present.to(self.device))
        return [(weight.cpu(), bias.cpu()) for weight, bias in layers]

    def learnt(self) -> dict[str, Any]:
        """The weights that make policies; the critic served training alone."""
        return {name: tensor.detach().clone() for name, tensor in self.policy.state_dict().items()}

    def load(self, learnt: dict[str, Any]) -> None:
        """Take over what :meth:`learnt` gave.

        Raises:
            StillhouseError: it is of another structure.
        """
        take_over(dict(self.policy.state_dict()), learnt)

    def get_state(self) -> dict[str, Any]:
        """The whole training state, between two reports."""
        return {
            "parameters": self.parameters.get_state(),
            "envs": self.envs.get_state(),
            "updates": self.updates,
            "env_steps": self.env_steps,
            "episodes": self.episodes,
            "recent_returns": list(self.recent_returns),
            "rollout": {key: value.copy() for key, value in self._rollout.items()},
            "sampling": self._sampling.bit_generator.state,
            "choosing": self._choosing.bit_generator.state,
            "shuffling": self._shuffling.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self.parameters.set_state(state["parameters"])
        self._observations = self.envs.set_state(state["envs"])
        self.updates = state["updates"]
        self.env_steps = state["env_steps"]
        self.episodes = state["episodes"]
        self.recent_returns = deque(state["recent_returns"], maxlen=self.recent_returns.maxlen)
        for key, value in self._rollout.items():
            value[...] = state["rollout"][key]
        self._sampling.bit_generator.state = state["sampling"]
        self._choosing.bit_generator.state = state["choosing"]
        self._shuffling.set_state(torch.from_numpy(np.array(state["shuffling"])))


class Played(NamedTuple):
    """One episode in each copy: returns [K, copies], and each task's transitions' features, K times [n, 9]."""

    returns: np.ndarray
    transitions: list[np.ndarray]


@torch.inference_mode()
def play(
    layers: Layers,
    tasks: np.ndarray,
    horizon: int,
    copies: int,
    seed: int,
    stream: str,
    sampling: np.random.Generator | None,
) -> Played:
    """Play one episode in each of some copies of each task.

    Args:
        layers: of each task's policy, on the CPU.
        tasks: [K, 5].
        horizon: env steps of an episode at most.
        copies: of each task.
        seed: of the episodes.
        stream: theirs.
        sampling: draws the actions; none: the greedy ones.
    """
    envs = VectorEnvironment.over(
        CartPoleFamilyVectorEnv(np.repeat(tasks, copies, axis=0), horizon), seed, stream, "CartPole family"
    )
    observations = envs.reset()
    returns = np.zeros(len(observations))
    going = np.ones(len(observations), np.bool_)
    seen: list[list[np.ndarray]] = [[] for _ in tasks]
    while going.any():
        given = torch.from_numpy(observations).unflatten(0, (len(tasks), copies))
        logits = outputs(layers, given).flatten(0, 1).numpy()
        if sampling is not None:
            logits = logits + sampling.gumbel(size=logits.shape)
        actions = logits.argmax(axis=1)
        step = envs.step(actions)
        features = transition_features(observations, actions, step.next_observations())
        for index in range(len(tasks)):
            rows = slice(index * copies, (index + 1) * copies)
            seen[index].append(features[rows][going[rows]])
        ended = step.ended[going[step.ended]]
        returns[ended] = step.episode_returns[going[step.ended]]
        going[ended] = False
        observations = step.observations
    envs.close()
    transitions = [np.concatenate(rows) for rows in seen]
    return Played(returns.reshape(len(tasks), copies), transitions)


def _critic(widths: tuple[int, ...]) -> nn.Sequential:
    """Observations beside the task's scaled parameters to a value."""
    sizes = (_OBSERVATIONS + _TASK_WIDTH, *widths)
    layers: list[nn.Module] = []
    for inputs, width in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
