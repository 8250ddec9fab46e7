"""What learns random tabular MDPs without meta-training: the baselines of RL^2 (Duan et al. 2016, https://arxiv.org/abs/1611.02779, table 2).

All keep a posterior of the task: of an action's successors Dirichlet(alpha_0 + counts), of its mean reward normal, from a prior of mean mu_0 and precision
tau_0 with rewards of precision 1. Before each episode they compute values for its L steps, backwards from 0, and act greedily on them, ties at random:

    Q_h(s, a) = R(s, a) + P(s, a) . max_a Q_{h+1}(., a)

    random           acts uniformly
    greedy           R and P are the posterior's means
    epsilon_greedy   the same; with probability epsilon a random action
    psrl             R and P are a sample of the posterior (Strens 2000; Osband et al. 2013, https://arxiv.org/abs/1306.0940)
    opsrl            for every Q the greatest of N samples
    ucrl2            the best of all R and P near the means, for n visits and at time t (the episode, from 1) within w / sqrt(max(n, 1)) of them,
                     w = c sqrt(4 log(2 |S| |A| t / delta)), for P in L1 and sqrt(|S|) times wider (Jaksch et al. 2010)
    beb              R + 1 / (tau_0 + n + 1) + c 2 L^3 (L - 1 - h) / (1 + |S| alpha_0 + n) (Kolter & Ng 2009)

These are the forms of ``iosband/TabulaRL``, which the paper's code runs, with its priors: alpha_0 = tau_0 = 1 for psrl, opsrl and beb, nearly none (1e-5 or
1e-4) for the others, and mu_0 = 0. :func:`play` plays many trials at once; all methods meet the same tasks and the same noise.

Deviations:

1. UCRL2's widest P is found anew at every step back from the means; in TabulaRL it is written over them, so that it grows from step to step.
2. Where episodes may end early (``stop_probability``), following values are multiplied by the chance that the episode goes on, which is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from stillhouse import seeding
from stillhouse.envs.tabular import TabularConfig

Plan = Callable[["Beliefs", TabularConfig, np.ndarray, np.random.Generator], np.ndarray]
"""What is known of [b] tasks, their family, the episode [b] (from 0) and random numbers to values [L, b, S, A]."""


class Beliefs(NamedTuple):
    """What b trials have seen.

    Attributes:
        counts: of successors, float64 [b, S, A, S]; an episode's last step leads to none.
        rewards: their sums, float64 [b, S, A].
        visits: float64 [b, S, A].
    """

    counts: np.ndarray
    rewards: np.ndarray
    visits: np.ndarray

    def mean_rewards(self, mean: float, precision: float) -> np.ndarray:
        """Of the posterior with a prior of this mean and precision, [b, S, A]."""
        return (mean * precision + self.rewards) / (precision + self.visits)

    def mean_successors(self, alpha: float) -> np.ndarray:
        """Of the posterior with a prior of ``alpha`` for every successor, [b, S, A, S]."""
        counts = self.counts + alpha
        counts /= counts.sum(-1, keepdims=True)
        return counts


def backward_induction(
    rewards: np.ndarray, successors: np.ndarray, family: TabularConfig, bonus: np.ndarray | float = 0.0
) -> np.ndarray:
    """Q of every step of an episode, [L, b, S, A].

    Args:
        rewards: [b, S, A].
        successors: [b, S, A, S].
        family: of the tasks, for the length and the ends of episodes.
        bonus: added as often as there are steps to come, [b, S, A].
    """
    batch, states, actions, _ = successors.shape
    flat = successors.reshape(batch, states * actions, states)
    q_values = np.empty((family.episode_length, batch, states, actions))
    values = np.zeros((batch, states, 1))
    for to_come in range(family.episode_length):
        following = (flat @ values).reshape(rewards.shape)
        q = rewards + (1 - family.stop_probability) * following + to_come * bonus
        q_values[family.episode_length - 1 - to_come] = q
        values = q.max(2)[..., None]
    return q_values


def sample_tasks(
    beliefs: Beliefs, random: np.random.Generator, mean: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards [b, S, A] and successors [b, S, A, S] drawn from the posterior with alpha_0 = tau_0 = 1 and mu_0 = ``mean``."""
    rewards = random.standard_normal(beliefs.visits.shape) / np.sqrt(1 + beliefs.visits)
    rewards += beliefs.mean_rewards(mean, 1.0)
    successors = random.standard_gamma(1 + beliefs.counts)
    successors /= successors.sum(-1, keepdims=True)
    return rewards, successors


def psrl(mean: float = 0.0) -> Plan:
    """Posterior sampling; ``mean`` is the prior's of the rewards."""
    return opsrl(1, mean)


def opsrl(samples: int, mean: float = 0.0) -> Plan:
    """Optimistic posterior sampling, of so many samples."""

    def plan(
        beliefs: Beliefs, family: TabularConfig, episode: np.ndarray, random: np.random.Generator
    ) -> np.ndarray:
        best = backward_induction(*sample_tasks(beliefs, random, mean), family)
        for _ in range(samples - 1):
            np.maximum(best, backward_induction(*sample_tasks(beliefs, random, mean), family), out=best)
        return best

    return plan


def greedy(
    beliefs: Beliefs, family: TabularConfig, episode: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Without exploration."""
    return backward_induction(beliefs.mean_rewards(0.0, 1e-4), beliefs.mean_successors(1e-4), family)


def beb(scaling: float, mean: float = 0.0) -> Plan:
    """Bayesian exploration bonus, ``scaling`` times as large as in theory; ``mean`` is the prior's of the rewards."""

    def plan(
        beliefs: Beliefs, family: TabularConfig, episode: np.ndarray, random: np.random.Generator
    ) -> np.ndarray:
        transitions = beliefs.counts.sum(-1)
        bonus = 2 * family.episode_length**3 * scaling / (1 + family.states + transitions)
        return backward_induction(
            beliefs.mean_rewards(mean, 1.0) + 1 / (2 + beliefs.visits),
            beliefs.mean_successors(1.0),
            family,
            bonus,
        )

    return plan


def ucrl2(scaling: float, delta: float = 0.05) -> Plan:
    """Optimism about all tasks within confidence bounds, ``scaling`` times as wide as in theory."""

    def plan(
        beliefs: Beliefs, family: TabularConfig, episode: np.ndarray, random: np.random.Generator
    ) -> np.ndarray:
        size = 2 * family.states * family.actions
        width = scaling * np.sqrt(4 * np.log(size * (episode + 1) / delta))[:, None, None]
        transitions = beliefs.counts.sum(-1)
        slack = np.sqrt(family.states) * width / np.sqrt(np.maximum(transitions, 1))
        rewards = beliefs.mean_rewards(0.0, 1e-4) + width / np.sqrt(np.maximum(beliefs.visits, 1))
        chances = np.ascontiguousarray(np.moveaxis(beliefs.mean_successors(1e-5), 3, 1))
        q_values = np.empty((family.episode_length, *rewards.shape))
        values = np.zeros(rewards.shape[:2])
        for time in range(family.episode_length - 1, -1, -1):
            following = optimistic_values(chances, slack, values)
            q_values[time] = rewards + (1 - family.stop_probability) * following
            values = q_values[time].max(2)
        return q_values

    return plan


def optimistic_values(chances: np.ndarray, slack: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The greatest expectation of ``values`` under distributions within ``slack`` (L1) of ``chances``, [b, S, A].

    Half of the slack goes to the best successor, and is taken from the worst ones.

    Args:
        chances: of the successors, which come first, [b, S, S, A].
        slack: [b, S, A].
        values: of the successors, [b, S].
    """
    batch, states = values.shape
    rows, order = np.arange(batch), values.argsort(1)
    best = order[:, -1]
    left = np.minimum(slack / 2, 1 - chances[rows, best])
    flat = chances.reshape(batch, states, -1)
    expected: np.ndarray = (values[:, None] @ flat).reshape(slack.shape)
    expected += left * values[rows, best][:, None, None]
    for worst in order[:, :-1].T:
        taken = np.minimum(left, chances[rows, worst])
        expected -= taken * values[rows, worst][:, None, None]
        left -= taken
        if not left.any():
            break
    return expected


def play(
    plan: Plan,
    family: TabularConfig,
    tasks: int,
    episodes: int,
    seed: int,
    name: str,
    epsilon: float = 0.0,
    split: Literal["train", "test"] = "test",
) -> np.ndarray:
    """Returns by trial and episode, float64 [``tasks``, ``episodes``].

    Args:
        plan: of the method.
        family: of the tasks.
        tasks: how many trials.
        episodes: of each.
        seed: of tasks and noise: the same for all methods.
        name: of the stream of the method's own random numbers.
        epsilon: share of random actions.
        split: ``test``, or ``train`` to choose settings on.
    """
    drawn = family.draw(tasks, family.random(split, seed, "tasks"))
    trials = family.play(drawn, family.random(split, seed, "noise"), episodes)
    random = seeding.generator(seed, "mdp baselines", split, name)
    shape = (tasks, family.states, family.actions)
    beliefs = Beliefs(np.zeros((*shape, family.states)), np.zeros(shape), np.zeros(shape))
    q_values = np.empty((family.episode_length, *shape))
    returns = np.zeros((tasks, episodes))
    starting = np.ones(tasks, np.bool_)
    rows = np.arange(tasks)
    while trials.running.any():
        if epsilon < 1 and starting.any():
            chosen = np.flatnonzero(starting)
            # Without a copy where, as mostly, all trials begin together.
            known = beliefs if starting.all() else Beliefs(*(each[chosen] for each in beliefs))
            q_values[:, chosen] = plan(known, family, trials.episode[chosen], random)
        states, episode, counted = trials.state, trials.episode, trials.running
        # Ties are broken at random; two values that differ do so by more than this.
        noise = random.random((tasks, family.actions))
        scores = noise if epsilon >= 1 else q_values[trials.time, rows, states] + 1e-9 * noise
        if 0 < epsilon < 1:
            exploring = random.random(tasks) < epsilon
            scores = np.where(exploring[:, None], noise, scores)
        actions = scores.argmax(1)
        step = trials.step(actions)
        returns[rows[counted], episode[counted]] += step.rewards[counted]
        place = rows[counted], states[counted], actions[counted]
        beliefs.visits[place] += 1
        beliefs.rewards[place] += step.rewards[counted]
        led = counted & ~step.ended
        beliefs.counts[rows[led], states[led], actions[led], trials.state[led]] += 1
        starting = step.ended & trials.running
    return returns


def play_mdps(family: TabularConfig, tasks: int, episodes: int, seed: int) -> dict[str, np.ndarray]:
    """The baselines without settings, as :class:`stillhouse.meta.Adaptation` has them: returns [``tasks``, ``episodes``] each."""
    return {
        "random": play(greedy, family, tasks, episodes, seed, "random", epsilon=1.0),
        "greedy": play(greedy, family, tasks, episodes, seed, "greedy"),
        "psrl": play(psrl(), family, tasks, episodes, seed, "psrl"),
    }
