"""Distral with tables: soft Q-learning of every task, alternated with distillation into a shared policy.

Teh et al. 2017, "Distral: Robust Multitask Reinforcement Learning" (https://arxiv.org/abs/1707.04175, sections 2.1, 2.2 and 4.1). With
``alpha = c_KL / (c_KL + c_Ent)`` and ``beta = 1 / (c_KL + c_Ent)`` the policies pi_i of all tasks and the distilled policy pi_0 maximise

    sum_i E_pi_i [ sum_t gamma^t ( r_i(s_t, a_t) + alpha/beta log pi_0(a_t|s_t) - 1/beta log pi_i(a_t|s_t) ) ].

Given pi_0, soft Q-learning finds the task policies:

    V_i(s)    = 1/beta log sum_a pi_0(a|s)^alpha exp(beta Q_i(s, a))
    Q_i(s, a) = r_i(s, a) + gamma E V_i(s')
    pi_i(a|s) = pi_0(a|s)^alpha exp(beta (Q_i(s, a) - V_i(s)))

Given the task policies, the best pi_0 has the greatest likelihood of their actions: in each state the mixture of the pi_i, each weighted
by how often it is there. **What acts in task i is pi_i**: neither pi_0 nor the action of the largest Q_i.

The paper's tabular study has one form of Distral, with the KL cost alone (alpha = 1), beside a soft Q-learner for each task. The other
arms here take the paper's names for its deep forms, where a task's policy has one column when a network of its own holds it
whole, and two when its logits are ``alpha h_0 + beta f_i`` with h_0 those of the distilled policy. With tables:

* two columns: the table holds Q_i, and pi_0 is joined to it where the agent acts and where V_i is taken, as above (section 2.2). What pi_0
  learns is at once in every pi_i, in states too where the task has never been.
* one column: the table holds all of pi_i's logits, ``Q~_i = Q_i + alpha/beta log pi_0``. These are the soft Q-values of the regularised reward
  ``r_i + alpha/beta log pi_0``, with ``V_i = 1/beta log sum_a exp(beta Q~_i)`` and ``pi_i = exp(beta (Q~_i - V_i))``: the same fixed point, but
  pi_0 comes into the table only where the task has acted, through its rewards.

Deviations, and choices that the paper leaves open:

1. Entropies are counted from that of uniform play: pi_0 stands for A pi_0, and ``1/A sum_a`` for ``sum_a``. With alpha = 1 nothing
   changes; else every V_i has the constant ``(1 - alpha) log(A) / beta`` less per step, which would pay an agent for staying away from
   the end of its episode. All tables can start at 0, which is then what a world without rewards is worth.
2. A rollout is learned from its last step to its first, with one-step targets.
3. pi_0 is estimated from sums, over the visited states, of the whole distributions pi_i(.|s) rather than of the actions drawn from them; of all
   rollouts so far, older ones being forgotten at a rate; added to a prior of equal counts that keeps pi_0 positive. Visits are not
   weighted by gamma^t.
4. The shared policy, which the paper has among its deep baselines: one table of soft Q-values (alpha = 0) for all tasks, on the
   experience of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from stillhouse import seeding
from stillhouse.envs.two_rooms import ACTIONS, TwoRooms


@dataclass(frozen=True)
class Arm:
    """How the tasks learn.

    Attributes:
        alpha: c_KL / (c_KL + c_Ent), in [0, 1]; 0: soft Q-learning, each task by itself.
        beta: 1 / (c_KL + c_Ent), greater than 0.
        learning_rate: of the soft Q-values, in (0, 1].
        columns: 2: the table holds Q_i, pi_0 is joined to it; 1: it holds Q_i + alpha/beta log pi_0.
        shared: one table for all tasks.

    Raises:
        ValueError: alpha or beta is out of bounds.
    """

    alpha: float = 0.0
    beta: float = 5.0
    learning_rate: float = 0.1
    columns: Literal[1, 2] = 2
    shared: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: {self.alpha} was given; 0 to 1 are allowed")
        if not self.beta > 0:
            raise ValueError(f"beta: {self.beta} was given; numbers greater than 0 are allowed")


def soft_values(
    q_values: np.ndarray, log_prior: np.ndarray | float, beta: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """``V = 1/beta log 1/A sum_a prior(a) exp(beta Q(a))`` and ``pi`` proportional to ``prior exp(beta Q)``.

    Args:
        q_values: [..., A].
        log_prior: ``alpha log(A pi_0)``, [..., A] or one number.
        beta: [...] or one number.

    Returns:
        V [...] and pi [..., A].
    """
    inverse_temperature = np.asarray(beta)[..., None]
    logits = log_prior + inverse_temperature * q_values
    largest = logits.max(axis=-1, keepdims=True)
    policy = np.exp(logits - largest)
    values = (largest + np.log(policy.mean(axis=-1, keepdims=True))) / inverse_temperature
    policy /= policy.sum(axis=-1, keepdims=True)
    return values[..., 0], policy


class _Step(NamedTuple):
    """A step of all rows: [R], the last two [R, A]."""

    states: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    log_distilled: np.ndarray  # log(A pi_0) in ``states``
    policy: np.ndarray  # that acted


class TabularDistral:
    """All tasks of all seeds under every arm, learning at once.

    A row is an (arm, seed, task), R = M K N of them. All arms play the same tasks with the same random numbers, so that a row's course does
    not depend on which others there are.

    Args:
        rooms: the map.
        arms: M of them.
        seeds: K of them; each draws goals of its own.
        tasks: N goals of each.
        gamma: discount.
        rollout: env steps of each task between two distillations.
        prior: count of every action in every state before the first rollout, greater than 0.
        forgetting: share of the counts that is lost at every distillation.

    Attributes:
        goals: cells, int64 [K, N].
        q_values: the tables [M, K, N, S, A], all 0 at first; that of a shared arm is its first task's.
        counts: of pi_i's actions, without the prior, [M, K, S, A].
        state: where the agents are, int64 [R].
    """

    def __init__(
        self,
        rooms: TwoRooms,
        arms: Sequence[Arm],
        seeds: Sequence[int],
        tasks: int = 8,
        gamma: float = 0.95,
        rollout: int = 10,
        prior: float = 1.0,
        forgetting: float = 0.1,
    ) -> None:
        self.rooms = rooms
        self.shape = len(arms), len(seeds), tasks
        self.gamma = gamma
        self.rollout = rollout
        self.prior = prior
        self.forgetting = forgetting
        self.goals = np.stack(
            [rooms.random_goals(tasks, seeding.generator(seed, "two rooms", "goals")) for seed in seeds]
        )
        self.q_values = np.zeros((*self.shape, rooms.states, ACTIONS))
        self.counts = np.zeros((*self.shape[:2], rooms.states, ACTIONS))
        self._tables = self.q_values.reshape(-1, rooms.states, ACTIONS)
        self._counts = self.counts.reshape(-1, rooms.states, ACTIONS)

        arm, seed, task = (index.reshape(-1) for index in np.indices(self.shape))
        alpha, self._beta, self._learning_rate, columns, shared = (
            np.array([getattr(each, name) for each in arms])[arm]
            for name in ("alpha", "beta", "learning_rate", "columns", "shared")
        )
        self._joined = np.where(columns == 2, alpha, 0.0)  # how much of log pi_0 is joined to the table,
        self._paid = np.where(columns == 1, alpha, 0.0) / self._beta  # and how much comes as a reward
        self._group = arm * len(seeds) + seed  # whose pi_0
        self._of_task = seed * tasks + task  # whose goal and random numbers
        rows = np.arange(arm.size)
        self._table = np.where(shared, rows - task, rows)
        # No two rows of one part share a table, so that no update is lost in another.
        parts = [rows[~shared | (task == 0)], *(rows[shared & (task == each)] for each in range(1, tasks))]
        self._parts = [part for part in parts if len(part)]

        self._successors = rooms.successors()
        self._goal = self.goals.reshape(-1)[self._of_task]
        self._random = [seeding.generator(seed, "two rooms", "play") for seed in seeds]
        self.state = rooms.start(self._goal, self._draw())

    def _draw(self, *shape: int) -> np.ndarray:
        """Numbers uniform in [0, 1), the same for every arm, [*shape, R]."""
        drawn = [random.random((*shape, self.shape[2])) for random in self._random]
        return np.concatenate(drawn, axis=-1)[..., self._of_task]

    def distilled(self) -> np.ndarray:
        """pi_0, [M, K, S, A]."""
        counts = self.counts + self.prior
        return counts / counts.sum(axis=-1, keepdims=True)

    def _log_distilled(self, states: np.ndarray) -> np.ndarray:
        """log(A pi_0) of each row's pi_0 in ``states`` [R], [R, A]."""
        counts = self._counts[self._group, states] + self.prior
        return np.log(counts / counts.mean(axis=-1, keepdims=True))

    def _soft_values(
        self, rows: np.ndarray, states: np.ndarray, log_distilled: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """V_i and pi_i of some rows, in states [r] where log(A pi_0) is [r, A]."""
        log_prior = self._joined[rows, None] * log_distilled
        return soft_values(self._tables[self._table[rows], states], log_prior, self._beta[rows])

    def iterate(self) -> np.ndarray:
        """A rollout of every task, soft Q-learning on it, distillation; the rollout's rewards, summed, [M, K, N]."""
        steps = self._play()
        self._learn(steps)
        self.counts *= 1 - self.forgetting
        for step in steps:
            np.add.at(self._counts, (self._group, step.states), step.policy)
        return np.sum([step.rewards for step in steps], axis=0).reshape(self.shape)

    def _play(self) -> list[_Step]:
        everyone = np.arange(len(self.state))
        steps = []
        for chance, place in self._draw(self.rollout, 2):
            log_distilled = self._log_distilled(self.state)
            _, policy = self._soft_values(everyone, self.state, log_distilled)
            actions = _sample(policy, chance)
            reached, rewards, terminated = self.rooms.step(self._successors, self._goal, self.state, actions)
            steps.append(_Step(self.state, actions, rewards, terminated, log_distilled, policy))
            self.state = np.where(terminated, self.rooms.start(self._goal, place), reached)
        return steps

    def _learn(self, steps: list[_Step]) -> None:
        # What follows a step is the state of the next one; where an episode ended it counts for nothing.
        following = self.state, self._log_distilled(self.state)
        for step in reversed(steps):
            for rows in self._parts:
                states, actions = step.states[rows], step.actions[rows]
                next_values, _ = self._soft_values(rows, *(each[rows] for each in following))
                target = step.rewards[rows] + self._paid[rows] * step.log_distilled[rows, actions]
                target += self.gamma * ~step.terminated[rows] * next_values
                entry = self._table[rows], states, actions
                self._tables[entry] += self._learning_rate[rows] * (target - self._tables[entry])
            following = step.states, step.log_distilled


def _sample(policy: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """Actions of the policies [R, A], from numbers [R] uniform in [0, 1)."""
    actions = (np.cumsum(policy, axis=-1) < chances[:, None]).sum(axis=-1)
    return np.minimum(actions, ACTIONS - 1)
