"""RL^2: a recurrent policy that is itself the learning algorithm (Duan et al. 2016, https://arxiv.org/abs/1611.02779).

A trial is n episodes in one task of a family. The policy's GRU sees, besides the state, what it did, what that paid and whether the episode ended:

    h_t = GRU(h_{t-1}, [onehot(s_t), onehot(a_{t-1}), r_{t-1}, end_{t-1}]),   pi(. | h_t),   V(h_t),   h_{-1} = 0

and keeps its hidden state from an episode to the next, so that it can explore first and use what it found; only a new trial, of another task, begins
with zeros. The weights are trained to maximise E sum_t gamma^t r_t over whole trials, so that acting well in a new task is all that it learns. What is
optimised for a batch of trials is PPO's loss (Schulman et al. 2017, https://arxiv.org/abs/1707.06347) of whole trials as sequences,

    loss = mean_t [ -min(rho_t A_t, clip(rho_t, 1 - epsilon, 1 + epsilon) A_t) + c1 (V(h_t) - G_t)^2 - c2 H(pi(. | h_t)) ]

with the generalised advantages A_t of the trial, which run over the ends of its episodes; the trial's end is terminal. In testing no weight changes.

Deviations from the paper and its code:

1. PPO with a value head on the policy's own GRU, instead of TRPO with a recurrent baseline of its own.
2. tanh in the GRU and no weight normalisation, instead of ReLU with it; by default fewer hidden units than 256.
3. All trials of a batch are new tasks and are played from their first step to their last together; trials of unequal length are padded, and what is
   padded counts in no loss and no statistic.
4. ``curriculum`` may begin with shorter trials, of few episodes; the paper's are of full length from the first.
5. The entropy bonus and the learning rate fall linearly over the budget.
6. Rewards are scaled for the critic's sake, not clipped; with bandits there is no state to be shown.
7. With ``memory``, units begin with memories of different length (chrono initialisation), where the paper's begin as they come.
8. With ``state_action: joint``, the GRU also sees the pair (s_{t-1}, a_{t-1}) as one of |S||A| and r_{t-1} at that pair's place, and pi and V have an
   output layer for every state: what a state's actions paid can be kept apart by one linear layer and read by another. The paper's GRU must find
   such a code for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.envs.bandits import BanditConfig
from stillhouse.envs.tabular import TabularConfig
from stillhouse.envs.trials import Trials
from stillhouse.errors import StillhouseError
from stillhouse.losses.policy_gradient import ClippedLoss, clipped_loss, normalise
from stillhouse.meta import Adaptation
from stillhouse.meta.bandit_baselines import play_bandits
from stillhouse.meta.mdp_baselines import play_mdps
from stillhouse.networks.gru import GRU
from stillhouse.networks.parameters import FlatParameters
from stillhouse.returns import generalized_advantages
from stillhouse.types import Report


class RL2Config(Config):
    """Settings; the defaults suit bandits of 10 pulls."""

    method: Literal["rl2"] = "rl2"
    family: Annotated[BanditConfig | TabularConfig, Field(discriminator="family")] = BanditConfig()
    width: int = Field(default=64, ge=1, le=4096, description="hidden units of the GRU")
    memory: int = Field(
        default=0,
        ge=0,
        le=10**6,
        description="chrono initialisation: how many env steps the GRU's slowest units remember at first; 0: torch's",
    )
    state_action: Literal["separate", "joint"] = Field(
        default="separate",
        description="joint: beside the rest, the GRU sees the pair of the last state and action, and its reward at that pair's place, and every state has "
        "its own output layer",
    )
    updates: int = Field(default=250, ge=1, le=10**7, description="budget in batches of trials")
    trials: int = Field(default=2000, ge=2, le=10**6, description="of a batch, each of a new task")
    epochs: int = Field(default=2, ge=1, le=100, description="passes over each batch")
    minibatches: int = Field(default=16, ge=1, le=10_000, description="per pass, of whole trials")
    learning_rate: float = Field(default=3e-3, gt=0, le=1, description="falls linearly to 0 over the budget")
    max_gradient_norm: float = Field(default=0.5, ge=0, description="0 does not clip")
    clip_range: float = Field(default=0.2, gt=0, le=10, description="epsilon of the objective")
    gamma: float = Field(default=0.99, ge=0, le=1, description="discount per env step of a trial")
    trace: float = Field(default=0.3, ge=0, le=1, description="lambda of the advantages")
    value_coefficient: float = Field(default=0.5, ge=0, le=1000, description="weight of the value loss")
    entropy_coefficient: float = Field(
        default=0.02, ge=0, le=1000, description="of the entropy bonus at first"
    )
    entropy_fraction: float = Field(
        default=0.8, gt=0, le=1, description="share of the budget over which it falls linearly to 0"
    )
    reward_scale: float = Field(
        default=0.2, gt=0, le=1e6, description="rewards are multiplied by it in learning, not in reports"
    )
    curriculum: float = Field(
        default=0.0, ge=0, le=1, description="share of the budget over which trials grow to their full length"
    )
    curriculum_episodes: int = Field(
        default=10, ge=1, le=10_000, description="length of the first trials then, at most the family's"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RL2Config:
        if self.memory == 1:
            raise ValueError("memory is 0 or at least 2 env steps, but it is 1: a unit that keeps nothing")
        if self.minibatches * 2 > self.trials:
            raise ValueError(
                f"a minibatch is of two trials at least: at most {self.trials // 2} minibatches are allowed for "
                f"trials = {self.trials}, but minibatches is {self.minibatches}"
            )
        return self


class RecurrentPolicy(nn.Module):
    """What remembers a trial, acts and values.

    Args:
        states: of an environment; with 1 no state is shown.
        actions: A.
        width: hidden units.
        generator: of the initial weights.
        state_action: how states and actions enter and leave.
        memory: of the GRU at first.

    Attributes:
        inputs: numbers that the GRU sees at a step.
        pairs: |S||A| with ``joint``, else 0.
        outputs: how many output layers there are: one, or with ``joint`` one for each state.
    """

    def __init__(
        self,
        states: int,
        actions: int,
        width: int,
        generator: torch.Generator,
        state_action: Literal["separate", "joint"] = "separate",
        memory: int = 0,
    ) -> None:
        super().__init__()
        self.states = states if states > 1 else 0
        self.actions = actions
        self.pairs = states * actions if state_action == "joint" else 0
        self.inputs = self.states + actions + 2 * self.pairs + 2
        self.gru = GRU(self.inputs, width, generator, memory)
        self.outputs = self.states if self.pairs and self.states else 1
        self.policy = nn.Linear(width, self.outputs * actions)
        self.value = nn.Linear(width, self.outputs)
        with torch.no_grad():
            for head in (self.policy, self.value):
                head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * (0.01 / width**0.5))
                head.bias.zero_()

    def write_inputs(
        self,
        inputs: np.ndarray,
        state: np.ndarray,
        previous: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None,
    ) -> None:
        """Fill a row of zeros.

        Args:
            inputs: float32 [B, ``inputs``], overwritten.
            state: int64 [B].
            previous: states, actions, rewards and whether the episode ended then, [B] each; none at a trial's first step.
        """
        rows = np.arange(len(inputs))
        if self.states:
            inputs[rows, state] = 1
        if previous:
            states, actions, rewards, ended = previous
            inputs[rows, self.states + actions] = 1
            if self.pairs:
                pair = self.states + self.actions + states * self.actions + actions
                inputs[rows, pair] = 1
                inputs[rows, self.pairs + pair] = rewards
            inputs[:, -2] = rewards
            inputs[:, -1] = ended

    def heads(self, hidden: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, A] and values [N] of hidden states [N, width] in ``states``, int64 [N]."""
        logits, values = self.policy(hidden), self.value(hidden)
        if self.outputs == 1:
            return logits, values.squeeze(1)
        rows = torch.arange(len(states), device=hidden.device)
        return logits.view(-1, self.outputs, self.actions)[rows, states], values[rows, states]


class Batch:
    """Trials as they were played; T is the length of the longest.

    Attributes:
        inputs: of the policy, float32 [T, B, n].
        states: int64 [T, B].
        actions: int64 [T, B].
        logits: of the policy that acted, float32 [T, B, A].
        values: float32 [T, B].
        rewards: float32 [T, B], unscaled.
        counted: bool [T, B], False where a trial is over.
        episodes: the episode that each step belongs to, int64 [T, B].
    """

    def __init__(self, steps: int, count: int, policy: RecurrentPolicy) -> None:
        self.inputs = torch.zeros(steps, count, policy.inputs)
        self.states = torch.zeros(steps, count, dtype=torch.int64)
        self.actions = torch.zeros(steps, count, dtype=torch.int64)
        self.logits = torch.zeros(steps, count, policy.actions)
        self.values = torch.zeros(steps, count)
        self.rewards = np.zeros((steps, count), np.float32)
        self.counted = np.zeros((steps, count), np.bool_)
        self.episodes = np.zeros((steps, count), np.int64)

    def cut(self, steps: int) -> None:
        """Forget what is after so many steps."""
        for name, value in vars(self).items():
            setattr(self, name, value[:steps])

    def returns(self, episodes: int) -> np.ndarray:
        """Sums of rewards by trial and episode, float64 [B, ``episodes``]."""
        count = self.rewards.shape[1]
        cells = (self.episodes + np.arange(count) * episodes)[self.counted]
        sums = np.bincount(cells, self.rewards[self.counted], count * episodes)
        return sums.reshape(count, episodes)


@torch.no_grad()
def play(policy: RecurrentPolicy, trials: Trials, noise: np.random.Generator, device: str = "cpu") -> Batch:
    """Play trials to their end with samples of the policy; its hidden state begins with zeros and lasts over all episodes.

    Args:
        policy: on ``device``.
        trials: as they are made.
        noise: for the samples.
        device: the policy's.
    """
    count = len(trials.state)
    batch = Batch(trials.steps, count, policy)
    hidden = torch.zeros(count, policy.gru.width, device=device)
    previous = None
    step = 0
    while trials.running.any():
        policy.write_inputs(batch.inputs[step].numpy(), trials.state, previous)
        hidden = policy.gru.step(batch.inputs[step].to(device), hidden)
        batch.states[step] = torch.from_numpy(trials.state)
        logits, values = policy.heads(hidden, batch.states[step].to(device))
        batch.logits[step] = logits
        batch.values[step] = values
        # argmax(logits + Gumbel noise) is a sample of softmax(logits); Gumbel noise is -log of exponential noise.
        drawn = noise.standard_exponential((count, policy.actions), dtype=np.float32)
        actions = (batch.logits[step].numpy() - np.log(np.maximum(drawn, np.float32(1e-30)))).argmax(1)
        batch.actions[step] = torch.from_numpy(actions)
        batch.episodes[step] = trials.episode
        result = trials.step(actions)
        batch.rewards[step] = result.rewards
        batch.counted[step] = result.counted
        previous = (batch.states[step].numpy(), actions, result.rewards, result.ended)
        step += 1
    batch.cut(step)
    return batch


class RL2:
    """The meta-learner: construct, then iterate :meth:`train`.

    Args:
        config: settings.
        seed: the stage's seed.
        device: torch's name of it.

    Attributes:
        policy: what is trained.
        done: updates so far.
        env_steps: played so far.
        batch: the trials of the last update.
    """

    columns = {
        "rollout/return": "return",
        "loss/policy": "policy_loss",
        "loss/value": "value_loss",
        "policy/entropy": "entropy",
        "policy/kl": "kl",
    }

    def __init__(self, config: RL2Config, seed: int, device: str = "cpu") -> None:
        self.config = config
        self.device = device
        family = config.family
        self.policy = RecurrentPolicy(
            family.states,
            family.actions,
            config.width,
            seeding.torch_generator(seed, "rl2", "policy"),
            config.state_action,
            config.memory,
        ).to(device)
        self.parameters = FlatParameters(self.policy, config.learning_rate, epsilon=1e-5)
        self.done = 0
        self.env_steps = 0
        self.batch: Batch | None = None
        self._tasks = family.random("train", seed, "tasks")
        self._noise = family.random("train", seed, "noise")
        self._sampling = seeding.generator(seed, "rl2", "actions")
        self._shuffling = seeding.torch_generator(seed, "rl2", "shuffling")

    @property
    def learning_rate(self) -> float:
        """Of the present update."""
        return self.config.learning_rate * (1 - self.done / self.config.updates)

    @property
    def entropy_coefficient(self) -> float:
        """Of the present update."""
        config = self.config
        return config.entropy_coefficient * max(
            0.0, 1 - self.done / (config.entropy_fraction * config.updates)
        )

    @property
    def episodes(self) -> int:
        """Of the present update's trials."""
        config, full = self.config, self.config.family.episodes
        first = min(config.curriculum_episodes, full)
        if not config.curriculum:
            return full
        share = min(1.0, self.done / (config.curriculum * config.updates))
        return round(first + share * (full - first))

    def train(self) -> Iterator[Report]:
        """Meta-train until the budget is spent; a report per batch of trials.

        Raises:
            StillhouseError: the loss is not finite.
        """
        config = self.config
        while self.done < config.updates:
            metrics = self.update()
            if not np.isfinite(loss := metrics["loss/policy"] + metrics["loss/value"]):
                raise StillhouseError(
                    f"RL^2's loss became {loss} after {self.done} updates; no result is written; lower learning_rate"
                )
            yield Report(self.done, config.updates, metrics)

    def update(self) -> dict[str, float]:
        """Play a batch of new tasks, and fit the policy to it; the metrics."""
        config, episodes = self.config, self.episodes
        trials = config.family.play(config.family.draw(config.trials, self._tasks), self._noise, episodes)
        self.batch = batch = play(self.policy, trials, self._sampling, self.device)
        advantages, returns = self.advantages(batch)
        log_mu = torch.log_softmax(batch.logits, 2).gather(2, batch.actions.unsqueeze(2)).squeeze(2)
        counted = torch.from_numpy(batch.counted)
        losses: list[ClippedLoss] = []
        for _ in range(config.epochs):
            order = torch.randperm(config.trials, generator=self._shuffling)
            for chosen in order.tensor_split(config.minibatches):
                columns = (batch.states, batch.actions, log_mu, advantages, returns, counted)
                self.parameters.zero_gradient()
                losses.append(
                    self.backward(batch.inputs[:, chosen], *(column[:, chosen] for column in columns))
                )
                self.parameters.step(self.learning_rate, config.max_gradient_norm)
        self.done += 1
        self.env_steps += int(batch.counted.sum())
        return self._metrics(losses, batch, episodes)

    def advantages(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of every step, and what the critic is fitted to, float32 [T, B] each; a trial's end is terminal, an episode's is not.

        What stands in rows that do not count means nothing, and comes into no other row.
        """
        config = self.config
        counted = torch.from_numpy(batch.counted).float()
        going_on = torch.cat([counted[1:], torch.zeros_like(counted[:1])])
        discounts = config.gamma * going_on
        following = torch.cat([batch.values[1:], torch.zeros_like(batch.values[:1])])
        advantages = generalized_advantages(
            torch.from_numpy(batch.rewards) * config.reward_scale,
            discounts,
            torch.full_like(discounts, config.trace),
            batch.values,
            following,
        )
        return advantages, advantages + batch.values

    def backward(
        self,
        inputs: Tensor,
        states: Tensor,
        actions: Tensor,
        log_mu: Tensor,
        advantages: Tensor,
        returns: Tensor,
        counted: Tensor,
    ) -> ClippedLoss:
        """Add the gradient of the loss of whole trials, [T, b, ...] each, to the parameters'."""
        config = self.config
        hidden = self.policy.gru(inputs.to(self.device)).flatten(0, 1)
        rows = [column.flatten() for column in (states, actions, log_mu, advantages, returns)]
        if not counted.all():
            kept = counted.flatten().nonzero().squeeze(1)
            rows = [column[kept] for column in rows]
            hidden = hidden[kept.to(self.device)]
        states, actions, log_mu, advantages, returns = (column.to(self.device) for column in rows)
        logits, values = self.policy.heads(hidden, states)
        loss = clipped_loss(
            logits,
            values,
            actions,
            log_mu,
            normalise(advantages.unsqueeze(0)).squeeze(0),
            returns,
            config.clip_range,
            config.value_coefficient,
            self.entropy_coefficient,
        )
        torch.autograd.backward([logits, values], [loss.logits_gradient, loss.values_gradient])
        return loss

    def _metrics(self, losses: list[ClippedLoss], batch: Batch, episodes: int) -> dict[str, float]:
        last = torch.cat([part.log_ratio for part in losses[-self.config.minibatches :]])
        ratio = last.exp()
        by_episode = batch.returns(episodes)
        counted = torch.from_numpy(batch.counted)
        return {
            "rollout/return": float(by_episode.sum(1).mean()),
            "rollout/first_episode": float(by_episode[:, 0].mean()),
            "rollout/last_episode": float(by_episode[:, -1].mean()),
            "rollout/value": float(batch.values[counted].mean()),
            "loss/policy": float(torch.cat([part.policy for part in losses]).mean()),
            "loss/value": float(torch.cat([part.value for part in losses]).mean()),
            "policy/entropy": float(torch.cat([part.entropy for part in losses]).mean()),
            # KL(before || after), by an estimator that is never negative: E[rho - 1 - log rho] under the policy before.
            "policy/kl": float((ratio - 1 - last).mean()),
            "policy/clip_fraction": float(((ratio - 1).abs() > self.config.clip_range).float().mean()),
        }

    def test_returns(self, tasks: int, episodes: int, seed: int) -> np.ndarray:
        """Returns of every episode of trials in test tasks, float64 [``tasks``, ``episodes``], with samples of the policy."""
        family = self.config.family
        noise = seeding.generator(seed, "rl2", "test", "actions")
        drawn = family.draw(tasks, family.random("test", seed, "tasks"))
        trials = family.play(drawn, family.random("test", seed, "noise"), episodes)
        return play(self.policy, trials, noise, self.device).returns(episodes)

    def evaluate(self, tasks: int, steps: int, seed: int) -> Adaptation:
        """Play trials of ``steps`` episodes in so many tasks; the value after i episodes is the return of the next one.

        The baselines play the same tasks with the same noise. Nothing of the learner changes.

        Raises:
            StillhouseError: fewer than one task or episode.
        """
        if tasks < 1 or steps < 1:
            raise StillhouseError(
                f"tasks and steps of at least 1 are allowed, but {tasks} and {steps} were given: a trial has an episode or more"
            )
        family = self.config.family
        return Adaptation(
            "return",
            "episodes",
            list(range(steps)),
            self.test_returns(tasks, steps, seed),
            play_bandits(family, tasks, steps, seed)
            if isinstance(family, BanditConfig)
            else play_mdps(family, tasks, steps, seed),
        )

    def get_state(self) -> dict[str, Any]:
        """The whole training state, between two reports."""
        return {
            "parameters": self.parameters.get_state(),
            "done": self.done,
            "env_steps": self.env_steps,
            "tasks": self._tasks.bit_generator.state,
            "noise": self._noise.bit_generator.state,
            "sampling": self._sampling.bit_generator.state,
            "shuffling": self._shuffling.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self.parameters.set_state(state["parameters"])
        self.done = state["done"]
        self.env_steps = state["env_steps"]
        self._tasks.bit_generator.state = state["tasks"]
        self._noise.bit_generator.state = state["noise"]
        self._sampling.bit_generator.state = state["sampling"]
        self._shuffling.set_state(torch.from_numpy(np.array(state["shuffling"])))

    def learnt(self) -> dict[str, Any]:
        """The policy's weights by name."""
        return {name: value.detach().cpu().clone() for name, value in self.policy.state_dict().items()}

    def load(self, learnt: dict[str, Any]) -> None:
        """Take over what :meth:`learnt` gave.

        Raises:
            StillhouseError: it is another family's, or of another width.
        """
        mine = {name: tuple(value.shape) for name, value in self.policy.state_dict().items()}
        given = {name: tuple(np.shape(value)) for name, value in learnt.items()}
        if mine != given:
            name = next(name for name in {**mine, **given} if mine.get(name) != given.get(name))
            raise StillhouseError(
                f"RL^2: weight {name!r} has shape {given.get(name)}, but these settings make {mine.get(name)}; give the family, "
                "the width and state_action that it was trained with"
            )
        with torch.no_grad():
            for name, value in self.policy.state_dict().items():
                value.copy_(torch.as_tensor(np.array(learnt[name])))
