"""Distral with tables: the equations by hand, what acts, what is distilled, and whether it helps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from stillhouse import seeding
from stillhouse.envs.two_rooms import ACTIONS, TwoRooms, state
from stillhouse.multi_task.distral_tabular import Arm, TabularDistral, _Step, soft_values

SMALL = TwoRooms(side=3, corridor=2)


def trained(
    arms: Sequence[Arm], rollouts: int, seeds: Sequence[int] = (1, 2), **more: float
) -> TabularDistral:
    learners = TabularDistral(SMALL, arms, seeds, tasks=3, **more)
    for _ in range(rollouts):
        learners.iterate()
    return learners


# --- the equations --------------------------------------------------------------------------------------------


def test_soft_values_by_hand_with_the_kl_cost_alone() -> None:
    # alpha = 1, A = 2, pi_0 = (1/4, 3/4), exp(beta Q) = (8, 2): 1/4 * 8 + 3/4 * 2 = 3.5
    beta = 2.0
    q_values = np.log([8.0, 2.0]) / beta
    values, policy = soft_values(q_values, np.log(2 * np.array([0.25, 0.75])), beta)
    assert np.isclose(values, np.log(3.5) / beta)
    assert np.allclose(policy, [2 / 3.5, 1.5 / 3.5])


def test_soft_values_by_hand_with_kl_and_entropy() -> None:
    # alpha = 1/2, A = 2, A pi_0 = (1/4, 7/4) ... sqrt = (1/2, sqrt(7/4)); exp(beta Q) = (4, 1)
    log_prior = 0.5 * np.log(2 * np.array([0.125, 0.875]))
    values, policy = soft_values(np.log([4.0, 1.0]), log_prior, 1.0)
    weights = np.array([0.5 * 4, np.sqrt(1.75)])
    assert np.isclose(values, np.log(weights.sum() / 2))
    assert np.allclose(policy, weights / weights.sum())
    # The paper's own V, with pi_0^alpha and a sum, is larger by (1 - alpha) log(A) / beta.
    paper = np.log((np.array([0.125, 0.875]) ** 0.5 * [4, 1]).sum())
    assert np.isclose(paper - values, 0.5 * np.log(2))


def test_the_policy_is_the_prior_times_the_exponential_of_the_advantage() -> None:
    random = np.random.default_rng(0)
    q_values, prior = random.normal(size=(6, 4)), random.dirichlet(np.ones(4), size=6)
    values, policy = soft_values(q_values, 0.3 * np.log(4 * prior), 7.0)
    assert np.allclose(policy.sum(axis=1), 1)
    assert np.allclose(policy, (4 * prior) ** 0.3 * np.exp(7 * (q_values - values[:, None])) / 4)


@pytest.mark.parametrize("beta", [0.1, 1.0, 1000.0])
def test_the_soft_bellman_operator_is_a_contraction_to_one_fixed_point(beta: float) -> None:
    random = np.random.default_rng(1)
    rewards, gamma = random.normal(size=(5, 3)), 0.9
    transitions = random.dirichlet(np.ones(5), size=(5, 3))
    log_prior = 0.6 * np.log(3 * random.dirichlet(np.ones(3), size=5))

    def operator(q_values: np.ndarray) -> np.ndarray:
        return rewards + gamma * transitions @ soft_values(q_values, log_prior, beta)[0]

    first, second = random.normal(size=(5, 3)), random.normal(size=(5, 3))
    apart = np.abs(first - second).max()
    assert np.abs(operator(first) - operator(second)).max() <= gamma * apart
    for _ in range(400):
        first, second = operator(first), operator(second)
    assert np.allclose(first, second, atol=1e-9)
    assert np.allclose(first, operator(first), atol=1e-9)


def test_one_column_has_the_same_fixed_point_as_two() -> None:
    random = np.random.default_rng(2)
    rewards, gamma, alpha, beta = random.normal(size=(5, 3)), 0.9, 0.7, 3.0
    transitions = random.dirichlet(np.ones(5), size=(5, 3))
    log_distilled = np.log(3 * random.dirichlet(np.ones(3), size=5))
    two = one = np.zeros((5, 3))
    for _ in range(400):
        two = rewards + gamma * transitions @ soft_values(two, alpha * log_distilled, beta)[0]
        regularised = rewards + alpha / beta * log_distilled
        one = regularised + gamma * transitions @ soft_values(one, 0.0, beta)[0]
    assert np.allclose(one, two + alpha / beta * log_distilled)
    assert np.allclose(soft_values(one, 0.0, beta)[1], soft_values(two, alpha * log_distilled, beta)[1])


@pytest.mark.parametrize(("given", "what"), [({"alpha": 1.1}, "alpha: 1.1"), ({"beta": 0}, "beta: 0")])
def test_alpha_and_beta_out_of_bounds_are_refused(given: dict[str, float], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Arm(**given)


# --- the algorithm --------------------------------------------------------------------------------------------


def plain(arm: Arm, seed: int, rollouts: int, prior: float, forgetting: float) -> tuple[np.ndarray, ...]:
    """The same with loops: Q-values [N, S, A], counts [S, A] and rewards [rollouts, N]."""
    tasks, gamma, rollout = 3, 0.95, 10
    successors = SMALL.successors()
    goals = SMALL.random_goals(tasks, seeding.generator(seed, "two rooms", "goals"))
    random = seeding.generator(seed, "two rooms", "play")
    tables = np.zeros((1 if arm.shared else tasks, SMALL.states, ACTIONS))
    counts = np.zeros((SMALL.states, ACTIONS))
    where = SMALL.start(goals, random.random(tasks))

    def distilled(s: int) -> np.ndarray:
        return (counts[s] + prior) / (counts[s] + prior).sum()

    def soft(task: int, s: int) -> tuple[float, np.ndarray]:
        weights = np.exp(arm.beta * tables[0 if arm.shared else task, s])
        if arm.columns == 2:
            weights = (ACTIONS * distilled(s)) ** arm.alpha * weights
        return float(np.log(weights.mean()) / arm.beta), weights / weights.sum()

    earned = []
    for _ in range(rollouts):
        steps, total = [], np.zeros(tasks)
        for chance, place in random.random((rollout, 2, tasks)):
            now = []
            for task in range(tasks):
                s = int(where[task])
                policy = soft(task, s)[1]
                action = int((np.cumsum(policy) < chance[task]).sum())
                reached, reward, ended = SMALL.step(
                    successors, goals[[task]], np.array([s]), np.array([action])
                )
                now.append((s, action, float(reward[0]), bool(ended[0]), int(reached[0]), policy))
                total[task] += reward[0]
                where[task] = SMALL.start(goals[[task]], place[[task]])[0] if ended[0] else reached[0]
            steps.append(now)
        for now in reversed(steps):
            for task, (s, action, reward, ended, reached, _) in enumerate(now):
                target = reward + gamma * (not ended) * soft(task, reached)[0]
                if arm.columns == 1:
                    target += arm.alpha / arm.beta * np.log(ACTIONS * distilled(s)[action])
                table = tables[0 if arm.shared else task]
                table[s, action] += arm.learning_rate * (target - table[s, action])
        counts *= 1 - forgetting
        for now in steps:
            for s, *_, policy in now:
                counts[s] += policy
        earned.append(total)
    return tables, counts, np.array(earned)


ARMS = [
    Arm(alpha=0.5, beta=10, learning_rate=0.7),
    Arm(alpha=1.0, beta=10, learning_rate=0.7, columns=1),
    Arm(beta=10, learning_rate=0.7),
    Arm(beta=20, learning_rate=0.5, shared=True),
]


def test_all_rows_at_once_are_what_loops_give() -> None:
    learners = TabularDistral(SMALL, ARMS, (1, 2), tasks=3, prior=0.5, forgetting=0.2)
    earned = np.array([learners.iterate() for _ in range(30)])
    for index, arm in enumerate(ARMS):
        for place, seed in enumerate((1, 2)):
            tables, counts, rewards = plain(arm, seed, 30, prior=0.5, forgetting=0.2)
            assert np.allclose(learners.q_values[index, place, : len(tables)], tables)
            assert np.allclose(learners.counts[index, place], counts)
            assert np.allclose(earned[:, index, place], rewards)
            assert rewards.max() >= 1


def test_a_row_does_not_depend_on_the_others() -> None:
    together = trained(ARMS, 20)
    alone = trained(ARMS[1:2], 20, seeds=(2,))
    assert np.array_equal(together.q_values[1, 1], alone.q_values[0, 0])
    assert np.array_equal(together.counts[1, 1], alone.counts[0, 0])


def test_alpha_0_is_independent_soft_q_learning() -> None:
    """Whatever pi_0 is, and whether it would be joined to the table or paid."""
    arms = [Arm(beta=10, learning_rate=0.7), Arm(beta=10, learning_rate=0.7, columns=1)]
    learners = trained(arms, 30, prior=0.01)
    other = trained(arms[:1], 30, prior=100.0, forgetting=0.9)
    assert np.array_equal(learners.q_values[0], learners.q_values[1])
    assert np.array_equal(learners.q_values[0], other.q_values[0])
    assert not np.array_equal(learners.distilled()[0], other.distilled()[0])
    alone = TabularDistral(SMALL, arms[:1], (1, 2), tasks=3)
    alone.counts[...] = np.random.default_rng(0).random(alone.counts.shape)
    for _ in range(30):
        alone.iterate()
    assert np.array_equal(alone.q_values[0], learners.q_values[0])


@pytest.mark.parametrize("columns", [1, 2])
def test_what_acts_is_the_task_policy(columns: int) -> None:
    """Where Q_i prefers one action and pi_0 another: pi_i's shares, which are neither pi_0's nor those of argmax Q_i."""
    # Learning rate and distillation do not move the tables, so that every step has the same policy.
    arm = Arm(alpha=0.5, beta=2.0, learning_rate=1e-12, columns=columns)
    learners = TabularDistral(SMALL, [arm], range(20), tasks=8, prior=1.0, forgetting=0.0)
    distilled = np.array([0.7, 0.1, 0.1, 0.1])
    learners.counts[...] = 1e9 * distilled
    q_values = np.array([0.0, 0.0, 0.0, 1.0])
    learners.q_values[...] = q_values + (0.5 / 2.0 * np.log(4 * distilled) if columns == 1 else 0)
    weights = distilled**0.5 * np.exp(2.0 * q_values)
    expected = weights / weights.sum()  # about (0.22, 0.08, 0.08, 0.61)
    taken = np.zeros(ACTIONS)
    for _ in range(20):
        for step in learners._play():
            taken += np.bincount(step.actions, minlength=ACTIONS)
    shares = taken / taken.sum()
    assert np.allclose(shares, expected, atol=0.015)
    assert np.abs(expected - distilled).max() > 0.3
    assert expected.max() < 0.7


def test_the_distilled_policy_is_the_likeliest_for_what_the_tasks_do() -> None:
    """pi_0(a|s) = sum_i visits_i(s) pi_i(a|s) / sum_i visits_i(s), for task policies that stand still."""
    arm = Arm(alpha=0.0, beta=5.0, learning_rate=1e-12)
    learners = TabularDistral(SMALL, [arm], (4,), tasks=2, prior=1e-6, forgetting=0.0)
    learners.q_values[...] = np.random.default_rng(0).normal(size=learners.q_values.shape)
    policies = soft_values(learners.q_values[0, 0], 0.0, 5.0)[1]  # [2, S, A]
    visits = np.zeros((2, SMALL.states))
    play = learners._play

    def counting() -> list[_Step]:
        steps = play()
        for step in steps:
            visits[[0, 1], step.states] += 1
        return steps

    learners._play = counting  # type: ignore[method-assign] # to see where the tasks are
    for _ in range(300):
        learners.iterate()
    both = (visits > 0).all(axis=0)
    assert both.any()
    done = (visits[:, :, None] * policies).sum(axis=0)[both]
    distilled = learners.distilled()[0, 0][both]
    assert np.allclose(distilled, done / done.sum(axis=1, keepdims=True), atol=1e-5)
    random = np.random.default_rng(0)
    for _ in range(20):
        moved = distilled * np.exp(0.1 * random.normal(size=distilled.shape))
        moved /= moved.sum(axis=1, keepdims=True)
        assert (done * np.log(moved)).sum() < (done * np.log(distilled)).sum()


# --- learning -------------------------------------------------------------------------------------------------


@pytest.mark.learning
def test_distral_learns_faster_and_carries_on_through_the_corridor() -> None:
    """Six seeds with eight goals each: larger areas than independent soft Q-learning, by a permutation test."""
    from scipy.stats import permutation_test

    rooms = TwoRooms()
    arms = [Arm(alpha=0.5, beta=25, learning_rate=0.9), Arm(beta=50, learning_rate=0.9)]
    learners = TabularDistral(rooms, arms, range(6))
    area = sum(learners.iterate() for _ in range(2000)) / 20_000 / rooms.best_rates(learners.goals)
    distral, independent = area.mean(axis=2)
    found = permutation_test(
        (distral - independent,), np.mean, permutation_type="samples", alternative="greater", rng=0
    )
    assert found.pvalue < 0.05
    corridor = rooms.room_cells + np.arange(rooms.corridor)
    distilled = learners.distilled()[0]
    for move in (2, 3):
        on = distilled[:, state(corridor, move, False), move].mean(axis=1)
        back = distilled[:, state(corridor, move, False), 5 - move].mean(axis=1)
        assert (on > 0.5).all()
        assert (on > 2 * back).all()
