"""Trials: a batch of tasks, each played for some episodes in a row by an agent that may remember the earlier ones.

All trials of a batch are stepped together, as arrays. A trial's noise belongs to its time, not to what is done: two methods that play the same
tasks with the same noise see the same rewards wherever they do the same (common random numbers).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class TrialStep(NamedTuple):
    """What a step of all trials gave, [B] each; in trials that were over before it, zeros.

    Attributes:
        rewards: float32.
        ended: bool, where it was the last step of an episode; what follows begins the trial's next one.
        counted: bool, where the trial was not over yet.
    """

    rewards: np.ndarray
    ended: np.ndarray
    counted: np.ndarray


class Trials(Protocol):
    """A batch of B trials; made at their first step.

    Attributes:
        states: how many an environment has; 1 where there are none to tell apart.
        actions: how many.
        steps: of the longest trial possible.
        state: where the trials are, int64 [B].
        episode: the number of the episode each is in, from 0, int64 [B]; how many there were where the trial is over.
        running: bool [B], False where the trial is over.
    """

    states: int
    actions: int
    steps: int
    state: np.ndarray
    episode: np.ndarray
    running: np.ndarray

    def step(self, actions: np.ndarray) -> TrialStep:
        """Do ``actions``, int64 [B]; what is given for trials that are over is not looked at."""
        ...
