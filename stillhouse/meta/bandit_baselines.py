"""What learns Bernoulli bandits without meta-training: the baselines of RL^2 (Duan et al. 2016, https://arxiv.org/abs/1611.02779, table 1).

All begin with the prior that the tasks are drawn from, Beta(1, 1) for every arm, so that an arm's estimate after s successes in m pulls is
(s + 1) / (m + 2); each pulls the arm of the greatest score, the first of several:

    random              uniform numbers
    greedy              the estimate
    epsilon_greedy      the estimate; with probability epsilon a random arm
    ucb1                the estimate + c sqrt(2 ln t / (m + 2)), t pulls of all arms so far (Auer et al. 2002)
    thompson            a sample of the posterior (Thompson 1933)
    optimistic_thompson of N samples of the posterior of all arms the one of the greatest density
    gittins             the index for the pulls that are left, undiscounted: max over stopping times tau of E[rewards until tau] / E[tau]
    gittins_discounted  the index for endless discounted play (Gittins 1979)

The last two are exact up to the grid on which they are calibrated. :func:`play` plays many trials at once; all methods meet the same tasks and the
same chances.

Deviations from the paper's baselines, as far as its code is known (``rllab-curriculum``, ``sandbox/rocky/neural_learner``):

1. The paper's index in its undiscounted form never stops: its look-ahead pulls the arm k more times whatever comes, which is worth k times the estimate,
   so that it is greedy play, but for rounding. Here the arm is left as soon as that pays, and the look-ahead is what is left of the trial.
2. ``gittins_discounted`` with the best of the discounts 0.9, 0.99, 0.999 and 0.9999 is the code's other form.
3. In the code's UCB1 the first pull's bonus is not a number; here it is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import numpy as np

from stillhouse import seeding
from stillhouse.envs.bandits import BanditConfig

Scores = Callable[[np.ndarray, np.ndarray, int, np.random.Generator], np.ndarray]
"""Successes [B, k], pulls [B, k], pulls of all arms so far and random numbers to scores [B, k]."""

_GRID = 1000  # charges on which indices are calibrated, in [0, 1)


def estimates(successes: np.ndarray, pulls: np.ndarray) -> np.ndarray:
    """Posterior means."""
    return (successes + 1) / (pulls + 2)


def uniform(successes: np.ndarray, pulls: np.ndarray, time: int, random: np.random.Generator) -> np.ndarray:
    """Of random play."""
    return random.random(pulls.shape)


def greedy(successes: np.ndarray, pulls: np.ndarray, time: int, random: np.random.Generator) -> np.ndarray:
    """Of play without exploration."""
    return estimates(successes, pulls)


def thompson(successes: np.ndarray, pulls: np.ndarray, time: int, random: np.random.Generator) -> np.ndarray:
    """Of Thompson sampling."""
    return random.beta(1 + successes, 1 + pulls - successes)


def epsilon_greedy(epsilon: float) -> Scores:
    """Greedy but for a share ``epsilon`` of random pulls."""

    def scores(
        successes: np.ndarray, pulls: np.ndarray, time: int, random: np.random.Generator
    ) -> np.ndarray:
        exploring = random.random(len(pulls)) < epsilon
        return np.where(exploring[:, None], random.random(pulls.shape), estimates(successes, pulls))

    return scores


def ucb1(c: float) -> Scores:
    """Upper confidence bounds, ``c`` times as wide as in UCB1."""

    def scores(
        successes: np.ndarray, pulls: np.ndarray, time: int, random: np.random.Generator
    ) -> np.ndarray:
        bonus = c * np.sqrt(2 * np.log(max(time, 1)) / (pulls + 2))
        return estimates(successes, pulls) + bonus

    return scores


def optimistic_thompson(samples: int) -> Scores:
    """The likeliest of so many samples."""

    def scores(
        successes: np.ndarray, pulls: np.ndarray, time: int, random: np.random.Generator
    ) -> np.ndarray:
        failures = pulls - successes
        drawn = random.beta(1 + successes, 1 + failures, (samples, *pulls.shape))
        # Of one posterior, so that its constant does not matter. A sample may be 0 or 1, to the precision of numbers.
        inside = np.clip(drawn, 1e-300, 1 - 1e-16)
        density = (successes * np.log(inside) + failures * np.log1p(-inside)).sum(2)
        chosen: np.ndarray = drawn[density.argmax(0), np.arange(len(pulls))]
        return chosen

    return scores


def gittins(episodes: int) -> Scores:
    """The undiscounted index of an arm for the pulls that are left of ``episodes``."""
    table = finite_horizon_indices(episodes)

    def scores(
        successes: np.ndarray, pulls: np.ndarray, time: int, random: np.random.Generator
    ) -> np.ndarray:
        return table[episodes - time, successes, pulls - successes]

    return scores


def gittins_discounted(discount: float, episodes: int, lookahead: int = 1000) -> Scores:
    """Gittins' index with ``discount``, whatever is left of ``episodes``; exact for ``lookahead`` pulls, from where on the arm is taken as known."""
    table = discounted_indices(discount, episodes, lookahead)

    def scores(
        successes: np.ndarray, pulls: np.ndarray, time: int, random: np.random.Generator
    ) -> np.ndarray:
        return table[successes, pulls - successes]

    return scores


@cache
def finite_horizon_indices(episodes: int) -> np.ndarray:
    """Indices [left, successes, failures] for every number of pulls left and what came before; 0 where these are more than ``episodes``.

    With a charge for every pull, an arm is worth V_m = max(0, p - charge + p V_{m-1}(s + 1, f) + (1 - p) V_{m-1}(s, f + 1)); the index is the
    charge at which V_m becomes 0.
    """
    charges = np.arange(_GRID) / _GRID
    counts = np.arange(episodes + 1)
    pulls = counts[:, None] + counts
    chances = estimates(counts[:, None], pulls)[..., None]
    indices = np.zeros((episodes + 1, episodes + 1, episodes + 1))
    values = np.zeros((episodes + 2, episodes + 2, _GRID))
    for left in range(1, episodes + 1):
        size = episodes - left + 1  # of successes, and of failures, that there can have been
        chance = chances[:size, :size]
        after_failure = values[:size, 1 : size + 1]
        worth = values[1 : size + 1, :size] - after_failure
        worth += 1
        worth *= chance
        worth += after_failure
        worth -= charges
        values[:size, :size] = np.maximum(worth, 0, out=worth)
        possible = pulls[:size, :size] + left <= episodes
        indices[left, :size, :size] = np.where(possible, _where_zero(worth, charges), 0)
    return indices


@cache
def discounted_indices(discount: float, episodes: int, lookahead: int) -> np.ndarray:
    """Indices [successes, failures] for up to ``episodes`` of these together."""
    charges = np.arange(_GRID) / _GRID
    indices = np.zeros((episodes + 1, episodes + 1))
    last = max(lookahead, episodes + 1)
    successes = np.arange(last + 1)
    values = np.maximum(estimates(successes, np.asarray(last))[:, None] - charges, 0) / (1 - discount)
    for pulls in range(last - 1, -1, -1):
        successes = np.arange(pulls + 1)
        chance = estimates(successes, np.asarray(pulls))[:, None]
        values = chance * (1 + discount * values[1:]) + (1 - chance) * discount * values[:-1] - charges
        np.maximum(values, 0, out=values)
        if pulls <= episodes:
            indices[successes, pulls - successes] = _where_zero(values, charges)
    return indices


def _where_zero(values: np.ndarray, charges: np.ndarray) -> np.ndarray:
    """Where ``values`` [..., G], convex and falling, become 0; on the line through their last two points that are positive."""
    last = np.maximum((values > 0).sum(-1) - 1, 1)
    right = np.take_along_axis(values, last[..., None], -1)[..., 0]
    before = np.take_along_axis(values, last[..., None] - 1, -1)[..., 0]
    fall = np.maximum(before - right, 1e-12)
    return charges[last] + np.minimum(right / fall, 1) / len(charges)


def play(
    scores: Scores,
    family: BanditConfig,
    tasks: int,
    episodes: int,
    seed: int,
    name: str,
    split: Literal["train", "test"] = "test",
) -> np.ndarray:
    """Rewards by trial and pull, float64 [``tasks``, ``episodes``].

    Args:
        scores: of the method.
        family: of the tasks.
        tasks: how many trials.
        episodes: pulls of each.
        seed: of tasks and noise: the same for all methods.
        name: of the stream of the method's own random numbers.
        split: ``test``, or ``train`` to choose settings on.
    """
    drawn = family.draw(tasks, family.random(split, seed, "tasks"))
    trials = family.play(drawn, family.random(split, seed, "noise"), episodes)
    random = seeding.generator(seed, "bandit baselines", split, name)
    successes = np.zeros((tasks, family.arms), np.int64)
    pulls = np.zeros_like(successes)
    rows = np.arange(tasks)
    rewards = np.zeros((tasks, episodes))
    for time in range(episodes):
        actions = scores(successes, pulls, time, random).argmax(1)
        paid = trials.step(actions).rewards
        rewards[:, time] = paid
        successes[rows, actions] += paid > 0
        pulls[rows, actions] += 1
    return rewards


def play_bandits(family: BanditConfig, tasks: int, episodes: int, seed: int) -> dict[str, np.ndarray]:
    """The baselines without settings, as :class:`stillhouse.meta.Adaptation` has them: rewards [``tasks``, ``episodes``] each.

    The index, whose table grows with the cube of the pulls, is left out above 100 of these.
    """
    methods: dict[str, Scores] = {"random": uniform, "greedy": greedy, "thompson": thompson}
    if episodes <= 100:
        methods["gittins"] = gittins(episodes)
    return {name: play(scores, family, tasks, episodes, seed, name) for name, scores in methods.items()}
