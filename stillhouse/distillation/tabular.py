"""The forms of policy distillation side by side, with tables instead of networks.

Czarnecki et al. 2019, "Distilling Policy Distillation" (https://arxiv.org/abs/1902.02186). A student S with a softmax over
logits per state is moved against

    E_q [ sum_t  -grad log S(a_t | s_t) R_t  +  grad l_t ],        R_t = the pseudo-rewards from t on

on trajectories of the policy q. With ``Hx(p || q) = -E_p log q`` and the teacher T:

| variant           | loss l    | pseudo-reward                  | with q = S the gradient of                   |
|-------------------|-----------|--------------------------------|----------------------------------------------|
| cross_entropy     | Hx(T||S)  | 0                              | nothing (on-policy distill); with q = T of   |
|                   |           |                                | the expected Hx(T||S) along T (teacher       |
|                   |           |                                | distill)                                     |
| entropy           | 0         | log T(a_t)                     | E_S sum_t Hx(S||T)                           |
| n_distill         | Hx(T||S)  | -Hx(T||S) at t+1               | E_S sum_t Hx(T||S)                           |
| expected_entropy  | Hx(S||T)  | -Hx(S||T) at t+1               | E_S sum_t Hx(S||T), with less noise          |
| expected_kl       | KL(S||T)  | -KL(S||T) at t+1               | E_S sum_t KL(S||T)                           |
| teacher_values    | 0         | r + gamma V_T(s') - V_T(s)     | minus the return                             |

:func:`expected_update` is this update, exactly, for a small problem that is known; :func:`objective` what it is said to be the
gradient of. :class:`TabularStudents` samples it.

Hx(S||T) is least where S is the teacher's most probable action, not where S is T: ``expected_entropy`` and ``entropy`` sharpen the
teacher. ``expected_kl`` does not. T must be positive everywhere: :func:`teacher_policy` mixes in a floor, which bounds log T.

Deviations from the paper, and choices it leaves open:

1. ``expected_entropy`` is given the expectation -Hx(S||T) at t+1 instead of its sample log T(a_{t+1}).
2. R_t is estimated by a critic per state, learned with one-step temporal differences: ``R_t ~ r + V(s')``, less the baseline V(s). This
   advantage is clipped. The students learn at every step, not at the episode's end.
3. ``expected_kl`` is not in the paper's table.
4. Pseudo-returns are not discounted (episodes end by chance); those of ``teacher_values`` are, like the environment's return.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stillhouse import seeding
from stillhouse.envs.gridworld import GridWorlds

VariantName = Literal[
    "cross_entropy", "entropy", "n_distill", "expected_entropy", "expected_kl", "teacher_values"
]
SamplingName = Literal["student", "teacher", "uniform"]


@dataclass(frozen=True)
class Variant:
    """Coefficients of a variant: which per-state costs make its loss, and which pseudo-rewards it is given.

    Attributes:
        teacher_student: of Hx(T||S) in the loss.
        student_teacher: of Hx(S||T) in the loss.
        negative_entropy: of -H(S) in the loss.
        action_reward: of log T(a_t) in the pseudo-reward.
        next_loss: of minus the loss of the next state in the pseudo-reward.
        value_reward: of r + gamma V_T(s') - V_T(s) in the pseudo-reward.
    """

    teacher_student: float = 0.0
    student_teacher: float = 0.0
    negative_entropy: float = 0.0
    action_reward: float = 0.0
    next_loss: float = 0.0
    value_reward: float = 0.0

    @property
    def has_reward(self) -> bool:
        """Whether there is a policy-gradient part."""
        return bool(self.action_reward or self.next_loss or self.value_reward)


VARIANTS: dict[VariantName, Variant] = {
    "cross_entropy": Variant(teacher_student=1),
    "entropy": Variant(action_reward=1),
    "n_distill": Variant(teacher_student=1, next_loss=1),
    "expected_entropy": Variant(student_teacher=1, next_loss=1),
    "expected_kl": Variant(student_teacher=1, negative_entropy=1, next_loss=1),
    "teacher_values": Variant(value_reward=1),
}


@dataclass(frozen=True)
class Problem:
    """A small problem that is known.

    Attributes:
        transitions: probabilities [S, A, S] of going on in a state; what is missing to 1 is the episode's end.
        rewards: expected rewards [S, A].
        start: probabilities [S] of starting in a state.
        gamma: discount of rewards and of pseudo-rewards alike.
        teacher: T, positive, [S, A].
    """

    transitions: np.ndarray
    rewards: np.ndarray
    start: np.ndarray
    gamma: float
    teacher: np.ndarray

    def action_values(self, policy: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """Expected discounted sum of ``rewards`` [S, A] from each state and action, [S, A]."""
        values = np.linalg.solve(self._onward(policy), (policy * rewards).sum(axis=1))
        return rewards + self.gamma * self.transitions @ values

    def visits(self, policy: np.ndarray) -> np.ndarray:
        """Expected discounted number of visits [S] in an episode of ``policy`` [S, A]."""
        return np.linalg.solve(self._onward(policy).T, self.start)

    def _onward(self, policy: np.ndarray) -> np.ndarray:
        return np.eye(len(policy)) - self.gamma * np.einsum("sa,sax->sx", policy, self.transitions)


def expected_update(
    problem: Problem, logits: np.ndarray, variant: VariantName, sampling: np.ndarray | None = None
) -> np.ndarray:
    """What a student moves against, in expectation and with the true R_t, [S, A].

    Args:
        problem: with the teacher.
        logits: the student's, [S, A].
        variant: which form.
        sampling: q, [S, A]; None: the student itself.
    """
    given = VARIANTS[variant]
    student = softmax(logits)
    sampling = student if sampling is None else sampling
    teacher_values = (problem.teacher * problem.action_values(problem.teacher, problem.rewards)).sum(axis=1)
    shaped = problem.rewards + problem.gamma * problem.transitions @ teacher_values - teacher_values[:, None]
    rewards = given.action_reward * np.log(problem.teacher) + given.value_reward * shaped
    next_loss = given.next_loss * _loss(given, student, problem.teacher)
    rewards = rewards - problem.gamma * problem.transitions @ next_loss
    returns = sampling * problem.action_values(sampling, rewards)  # q(a) E[R_t | s, a]
    gradient = student * returns.sum(axis=1, keepdims=True) - returns
    gradient += _loss_gradient(given, student, problem.teacher)
    return problem.visits(sampling)[:, None] * gradient


def objective(problem: Problem, logits: np.ndarray, variant: VariantName) -> float:
    """What the student-driven update of ``variant`` is the gradient of; for ``cross_entropy``, the teacher-driven one."""
    given = VARIANTS[variant]
    student = softmax(logits)
    if variant == "teacher_values":
        action_values = problem.action_values(student, problem.rewards)
        return -float(problem.start @ (student * action_values).sum(axis=1))
    if variant == "entropy":
        given = VARIANTS["expected_entropy"]
    visits = problem.visits(problem.teacher if variant == "cross_entropy" else student)
    return float(visits @ _loss(given, student, problem.teacher))


def _loss(given: Variant, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """l for each row, [...]."""
    log_student, log_teacher = np.log(student), np.log(teacher)
    return (
        -given.teacher_student * (teacher * log_student).sum(axis=-1)
        - given.student_teacher * (student * log_teacher).sum(axis=-1)
        + given.negative_entropy * (student * log_student).sum(axis=-1)
    )


def _loss_gradient(given: Variant, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """The gradient of l by the student's logits, [..., A]."""
    surprise = given.negative_entropy * np.log(student) - given.student_teacher * np.log(teacher)
    surprise = surprise - (student * surprise).sum(axis=-1, keepdims=True)
    return given.teacher_student * (student - teacher) + student * surprise


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: np.ndarray = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities


def teacher_policy(
    q_values: np.ndarray,
    temperature: float = 0.1,
    floor: float = 0.01,
    noise: float = 0.0,
    copies: int = 1,
    use_copies: bool = False,
) -> np.ndarray:
    """``softmax(q / tau)``, mixed with uniform actions so that ``log T >= log(floor / A)``; [..., A].

    Args:
        q_values: over the four moves, [..., 4].
        temperature: tau.
        floor: share of uniformly random actions, greater than 0.
        noise: a further share of them, for a teacher that errs.
        copies: A = 4 * copies actions, of which number a makes the move a % 4.
        use_copies: the teacher takes all copies of a move alike; otherwise only the first of each.
    """
    moves = softmax(q_values / temperature)
    actions = 4 * copies
    policy = np.zeros((*q_values.shape[:-1], actions))
    if use_copies:
        policy[:] = np.tile(moves / copies, copies)
    else:
        policy[..., :4] = moves
    random_share = floor + noise - floor * noise
    return (1 - random_share) * policy + random_share / actions


def q_learning(worlds: GridWorlds, gamma: float, seed: int, steps: int = 30_000) -> np.ndarray:
    """Q-values [G, S, 4] after ``steps`` steps in each world, with learning rate 0.1 and epsilon from 1 to 0.1 over two thirds."""
    random = seeding.generator(seed, "q-learning")
    count, states = worlds.walls.shape
    q_values = np.zeros((count, states, 4))
    index = np.arange(count)
    state = np.full(count, worlds.start)
    for step in range(steps):
        epsilon = max(0.1, 1 - 0.9 * step / (2 / 3 * steps))
        values = q_values[index, state]
        greedy = (values + 1e-9 * random.random((count, 4))).argmax(axis=1)  # ties are broken at random
        move = np.where(random.random(count) < epsilon, random.integers(4, size=count), greedy)
        reached, reward, ended = worlds.step(index, state, move, random)
        target = reward + gamma * ~ended * q_values[index, reached].max(axis=1)
        q_values[index, state, move] += 0.1 * (target - values[index, move])
        state = np.where(ended, worlds.start, reached)
    return q_values


@dataclass(frozen=True)
class Condition:
    """How one student learns.

    Attributes:
        variant: the update.
        sampling: who acts.
        learning_rate: of the logits.
    """

    variant: VariantName
    sampling: SamplingName
    learning_rate: float


class TabularStudents:
    """One student per condition and world, all learning at once, each with an agent of its own.

    Args:
        worlds: G of them.
        teacher: T, [G, S, A], positive; action a makes the move a % 4.
        teacher_values: V_T [G, S]; only for ``teacher_values``.
        conditions: C of them.
        gamma: discount of the environment's rewards.
        seed: the stage's seed.
        critic_rate: learning rate of the critics.
        advantage_limit: advantages are clipped to plus or minus this.
        dtype: of the tables.

    Attributes:
        logits: [C * G * S, A], all 0 at first.
        critic: [C * G * S], the expected pseudo-return from each state, all 0 at first.
        state: int64 [C * G], where the agents are.
        episodes: ended so far, over all rows.
    """

    def __init__(
        self,
        worlds: GridWorlds,
        teacher: np.ndarray,
        teacher_values: np.ndarray,
        conditions: Sequence[Condition],
        gamma: float,
        seed: int,
        critic_rate: float = 0.2,
        advantage_limit: float = 1.0,
        dtype: type[np.floating] = np.float32,
    ) -> None:
        count, states, self.actions = teacher.shape
        rows = len(conditions) * count
        self.worlds = worlds
        self.conditions = conditions
        self.gamma = gamma
        self.critic_rate = critic_rate
        self.advantage_limit = advantage_limit
        self.random = seeding.generator(seed, "tabular students")
        self._teacher = teacher.reshape(-1, self.actions).astype(dtype)
        self._log_teacher = np.log(self._teacher)
        self._teacher_values = teacher_values.reshape(-1).astype(dtype)

        def column(values: Sequence[float]) -> np.ndarray:
            return np.repeat(np.array(values, dtype), count)

        given = [VARIANTS[condition.variant] for condition in conditions]
        self._learning_rate = column([condition.learning_rate for condition in conditions])
        self._teacher_student = column([variant.teacher_student for variant in given])
        self._student_teacher = column([variant.student_teacher for variant in given])
        self._negative_entropy = column([variant.negative_entropy for variant in given])
        self._action_reward = column([variant.action_reward for variant in given])
        self._next_loss = column([variant.next_loss for variant in given])
        self._value_reward = column([variant.value_reward for variant in given])
        self._has_reward = column([variant.has_reward for variant in given])
        self._discount = np.where(self._value_reward > 0, dtype(gamma), dtype(1))
        sampling = np.repeat([condition.sampling for condition in conditions], count)
        self._teacher_rows = np.flatnonzero(sampling == "teacher")
        self._uniform_rows = np.flatnonzero(sampling == "uniform")
        self._row = np.arange(rows)
        self._world = np.tile(np.arange(count), len(conditions))
        self._states = states
        self.logits = np.zeros((rows * states, self.actions), dtype)
        self.critic = np.zeros(rows * states, dtype)
        self.state = np.full(rows, worlds.start)
        self.episodes = 0
        # The step before: entries, actions, S there, pseudo-rewards known then, discounts to the state reached.
        self._last: tuple[np.ndarray, ...] | None = None

    def step(self) -> None:
        """One environment step of every student, and the updates it allows."""
        entry = self._row * self._states + self.state
        shared = self._world * self._states + self.state
        logits = self.logits[entry]
        logits -= logits.max(axis=1, keepdims=True)
        student = np.exp(logits)
        total = student.sum(axis=1, keepdims=True)
        student /= total
        log_student = logits - np.log(total)
        teacher, log_teacher = self._teacher[shared], self._log_teacher[shared]

        surprise = (
            self._negative_entropy[:, None] * log_student - self._student_teacher[:, None] * log_teacher
        )
        mean_surprise = (student * surprise).sum(axis=1)
        cross_entropy = -(teacher * log_student).sum(axis=1)
        loss = mean_surprise + self._teacher_student * cross_entropy
        self._policy_gradient(entry, -self._next_loss * loss)

        actions = self._act(student, teacher)
        reached, rewards, ended = self.worlds.step(self._world, self.state, actions % 4, self.random)
        discount = self._discount * ~ended
        values = self._teacher_values
        shaped = rewards + discount * values[self._world * self._states + reached] - values[shared]
        known = self._action_reward * log_teacher[self._row, actions] + self._value_reward * shaped
        self._last = entry, actions, student, known, discount

        gradient = student * (surprise - mean_surprise[:, None])
        gradient += self._teacher_student[:, None] * (student - teacher)
        self.logits[entry] -= self._learning_rate[:, None] * gradient
        self.state = np.where(ended, self.worlds.start, reached)
        self.episodes += int(ended.sum())

    def _act(self, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
        policy = student
        if len(self._teacher_rows) or len(self._uniform_rows):
            policy = student.copy()
            policy[self._teacher_rows] = teacher[self._teacher_rows]
            policy[self._uniform_rows] = 1 / self.actions
        thresholds = self.random.random(len(policy), dtype=np.float32)[:, None]
        actions: np.ndarray = (np.cumsum(policy, axis=1) < thresholds).sum(axis=1)
        return np.minimum(actions, self.actions - 1)

    def _policy_gradient(self, entry: np.ndarray, arriving: np.ndarray) -> None:
        """Learn from the step before, now that the pseudo-rewards ``arriving`` [R] with the state reached are known."""
        if self._last is None:
            return
        before, actions, student, known, discount = self._last
        error = known + discount * (arriving + self.critic[entry]) - self.critic[before]
        error *= self._has_reward
        self.critic[before] += self.critic_rate * error
        step = self._learning_rate * np.clip(error, -self.advantage_limit, self.advantage_limit)
        self.logits[before] -= step[:, None] * student
        self.logits[before, actions] += step

    def returns(self) -> np.ndarray:
        """Exact discounted returns of the students as they are, [C, G]."""
        count = len(self.worlds)
        results = np.empty((len(self.conditions), count))
        logits = self.logits.reshape(len(self.conditions), count, self._states, self.actions)
        for row, table in enumerate(logits):
            policy = softmax(table.astype(np.float64))
            moves = policy.reshape(count, self._states, -1, 4).sum(axis=2)
            results[row] = self.worlds.values(moves, self.gamma)[:, self.worlds.start]
        return results
