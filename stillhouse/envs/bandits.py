"""Bernoulli bandits, many at once: k arms that pay 1 with a probability of their own, each pulled n times in a trial.

The first family of Duan et al. 2016 (https://arxiv.org/abs/1611.02779, section 3.1): every arm's probability is uniform in [0, 1]. A pull is an
episode of one step; there are no states. A task is the array of its probabilities.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.envs.trials import TrialStep


class BanditConfig(Config):
    """The family: how many arms, how often one is pulled."""

    family: Literal["bandits"] = "bandits"
    arms: int = Field(default=5, ge=2, le=1000, description="k, arms of a bandit")
    episodes: int = Field(default=10, ge=1, le=10_000, description="n, pulls of a trial")

    @property
    def states(self) -> int:
        """One: there are none to tell apart."""
        return 1

    @property
    def actions(self) -> int:
        """The arms."""
        return self.arms

    def random(self, split: Literal["train", "test"], seed: int, what: str) -> np.random.Generator:
        """The stream of a split's ``tasks`` or ``noise``; the two splits share none."""
        return seeding.generator(seed, "bandits", split, what)

    def draw(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Tasks: the arms' probabilities, float64 [count, k]."""
        return random.random((count, self.arms))

    def play(
        self, tasks: np.ndarray, random: np.random.Generator, episodes: int | None = None
    ) -> BanditTrials:
        """Trials of ``tasks`` [B, k], of ``episodes`` pulls or as many as the family has; all noise is drawn here."""
        return BanditTrials(tasks, random, self.episodes if episodes is None else episodes)


class BanditTrials:
    """A batch of trials: :class:`stillhouse.envs.trials.Trials`.

    Args:
        tasks: probabilities [B, k].
        random: for the noise, one uniform number for each time and trial, whatever arm is pulled.
        episodes: pulls of each.
    """

    def __init__(self, tasks: np.ndarray, random: np.random.Generator, episodes: int) -> None:
        count, self.actions = tasks.shape
        self.states = 1
        self.steps = episodes
        self.state = np.zeros(count, np.int64)
        self.episode = np.zeros(count, np.int64)
        self.running = np.ones(count, np.bool_)
        self._tasks = tasks
        self._rows = np.arange(count)
        self._chances = random.random((episodes, count))
        self._time = 0

    def step(self, actions: np.ndarray) -> TrialStep:
        """Pull arms ``actions``, int64 [B]."""
        counted = self.running
        if self._time == self.steps:
            return TrialStep(np.zeros(len(counted), np.float32), counted, counted)
        paid = self._chances[self._time] < self._tasks[self._rows, actions]
        self._time += 1
        self.episode = self.episode + 1
        self.running = np.full_like(counted, self._time < self.steps)
        return TrialStep(paid.astype(np.float32), counted, counted)
