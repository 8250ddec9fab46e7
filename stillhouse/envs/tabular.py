"""Random tabular Markov decision processes, many at once, each played for n short episodes in a trial.

The second family of Duan et al. 2016 (https://arxiv.org/abs/1611.02779, section 3.2), after Osband et al. 2013: 10 states, 5 actions, episodes of
10 steps that begin in state 0; the distribution of an action's successors is Dirichlet(1, ..., 1); its mean reward is normal with mean 1 and
variance 1, and so is the noise that is added to it. Nothing tells the agent how far an episode is.

``stop_probability`` is ours: after each step an episode may end before its time, so that trials of as many episodes have unequal lengths.

A task is an array [S, A, S + 1]: the probabilities of the successors, then the mean reward.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.envs.trials import TrialStep


class TabularConfig(Config):
    """The family."""

    family: Literal["tabular"] = "tabular"
    states: int = Field(default=10, ge=2, le=1000, description="|S|")
    actions: int = Field(default=5, ge=2, le=1000, description="|A|")
    episode_length: int = Field(default=10, ge=1, le=1000, description="env steps of an episode, at most")
    episodes: int = Field(default=10, ge=1, le=10_000, description="n, of a trial")
    mean_reward: float = Field(
        default=1.0, ge=-1000, le=1000, description="mean of the actions' mean rewards"
    )
    reward_deviation: float = Field(default=1.0, ge=0, le=1000, description="standard deviation of these")
    noise: float = Field(
        default=1.0, ge=0, le=1000, description="standard deviation of a reward about its mean"
    )
    stop_probability: float = Field(
        default=0.0, ge=0, lt=1, description="of an episode's end after a step that is not its last"
    )

    def random(self, split: Literal["train", "test"], seed: int, what: str) -> np.random.Generator:
        """The stream of a split's ``tasks`` or ``noise``; the two splits share none."""
        return seeding.generator(seed, "tabular", split, what)

    def draw(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Tasks, float32 [count, S, A, S + 1]."""
        tasks = random.standard_exponential(
            (count, self.states, self.actions, self.states + 1), dtype=np.float32
        )
        successors = tasks[..., :-1]
        successors /= successors.sum(-1, keepdims=True)  # exponentials over their sum are Dirichlet(1)
        rewards = random.standard_normal((count, self.states, self.actions), dtype=np.float32)
        tasks[..., -1] = self.mean_reward + self.reward_deviation * rewards
        return tasks

    def play(
        self, tasks: np.ndarray, random: np.random.Generator, episodes: int | None = None
    ) -> TabularTrials:
        """Trials of ``tasks`` [B, S, A, S + 1], of ``episodes`` or as many as the family has; all noise is drawn here."""
        return TabularTrials(self, tasks, random, self.episodes if episodes is None else episodes)


class TabularTrials:
    """A batch of trials: :class:`stillhouse.envs.trials.Trials`.

    Args:
        config: the family's.
        tasks: [B, S, A, S + 1].
        random: for the noise, of each time and trial, whatever is done.
        episodes: of each trial.

    Attributes:
        time: env steps since the episode began, int64 [B].
    """

    def __init__(
        self, config: TabularConfig, tasks: np.ndarray, random: np.random.Generator, episodes: int
    ) -> None:
        count, self.states, self.actions, _ = tasks.shape
        self.steps = episodes * config.episode_length
        self.state = np.zeros(count, np.int64)
        self.time = np.zeros(count, np.int64)
        self.episode = np.zeros(count, np.int64)
        self.running = np.ones(count, np.bool_)
        self._config = config
        self._episodes = episodes
        # Rows of (trial, state, action).
        self._rewards = tasks[..., -1].reshape(-1)
        self._cumulative = tasks[..., :-1].reshape(-1, self.states).cumsum(1)
        self._first = np.arange(count) * self.states
        self._chances = random.random((self.steps, count), dtype=np.float32)
        self._noise = random.standard_normal((self.steps, count), dtype=np.float32)
        self._noise *= np.float32(config.noise)
        if config.stop_probability:
            self._stops = random.random((self.steps, count)) < config.stop_probability
        self._step = 0

    def step(self, actions: np.ndarray) -> TrialStep:
        """Do ``actions``, int64 [B]."""
        counted = self.running
        if not counted.any():
            return TrialStep(np.zeros(len(counted), np.float32), counted, counted)
        row = (self._first + self.state) * self.actions + np.where(counted, actions, 0)
        rewards = (self._rewards[row] + self._noise[self._step]) * counted
        successor = (self._cumulative[row] <= self._chances[self._step, :, None]).sum(1)
        self.time = self.time + counted
        ended = self.time >= self._config.episode_length
        if self._config.stop_probability:
            ended |= self._stops[self._step]
        ended &= counted
        # The last entry of a row may be just below 1.
        self.state = np.where(ended | ~counted, 0, np.minimum(successor, self.states - 1))
        self.time = np.where(ended, 0, self.time)
        self.episode = self.episode + ended
        self.running = self.episode < self._episodes
        self._step += 1
        return TrialStep(rewards, ended, counted)
