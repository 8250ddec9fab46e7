"""The forms of policy distillation: which updates are gradients, and of what; the sampled ones are these on average."""

from __future__ import annotations

import numpy as np
import pytest

from stillhouse.distillation.tabular import (
    VARIANTS,
    Condition,
    Problem,
    TabularStudents,
    expected_update,
    objective,
    q_learning,
    softmax,
    teacher_policy,
)
from stillhouse.envs.gridworld import random_grid_worlds

STATES, ACTIONS = 4, 3
GRADIENTS = ["entropy", "n_distill", "expected_entropy", "expected_kl", "teacher_values"]


def problem(seed: int, gamma: float = 1.0) -> Problem:
    """Random transitions in which an episode ends with a probability of about 0.2 per step."""
    random = np.random.default_rng(seed)
    transitions = random.dirichlet(np.full(STATES, 0.5), size=(STATES, ACTIONS))
    return Problem(
        transitions=transitions * random.uniform(0.7, 0.9, (STATES, ACTIONS, 1)),
        rewards=random.normal(size=(STATES, ACTIONS)),
        start=random.dirichlet(np.ones(STATES)),
        gamma=gamma,
        teacher=random.dirichlet(np.ones(ACTIONS), size=STATES),
    )


def random_logits(seed: int) -> np.ndarray:
    return np.random.default_rng(1000 + seed).normal(size=(STATES, ACTIONS))


def differences(function, logits: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences, [S, A, ...]."""
    results = []
    for index in np.ndindex(*logits.shape):
        moved = np.zeros_like(logits)
        moved[index] = step
        results.append((np.asarray(function(logits + moved)) - function(logits - moved)) / (2 * step))
    return np.array(results).reshape(*logits.shape, *np.shape(results[0]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("variant", GRADIENTS)
def test_student_driven_updates_are_the_gradients_they_are_said_to_be(
    variant: str, gamma: float, seed: int
) -> None:
    given = problem(seed, gamma)
    logits = random_logits(seed)
    expected = differences(lambda moved: objective(given, moved, variant), logits)
    update = expected_update(given, logits, variant)
    assert np.abs(update).max() > 0.01
    assert np.allclose(update, expected, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_teacher_distill_is_a_gradient(seed: int) -> None:
    given = problem(seed)
    logits = random_logits(seed)
    expected = differences(lambda moved: objective(given, moved, "cross_entropy"), logits)
    assert np.allclose(
        expected_update(given, logits, "cross_entropy", sampling=given.teacher), expected, atol=1e-7
    )


def asymmetry(given: Problem, logits: np.ndarray, variant: str) -> float:
    """Of the update's Jacobian, relative to its size: 0 for every gradient."""
    size = logits.size
    jacobian = differences(lambda moved: expected_update(given, moved, variant), logits).reshape(size, size)
    return float(np.abs(jacobian - jacobian.T).max() / np.abs(jacobian).max())


@pytest.mark.parametrize("seed", range(3))
def test_on_policy_distill_is_the_gradient_of_nothing(seed: int) -> None:
    given, logits = problem(seed), random_logits(seed)
    assert asymmetry(given, logits, "cross_entropy") > 0.01
    for variant in GRADIENTS:
        assert asymmetry(given, logits, variant) < 1e-6


def test_only_hx_s_t_leaves_the_teacher() -> None:
    """At S = T the KL forms and the cross-entropy of T rest; Hx(S||T) goes on towards the teacher's argmax."""
    given = problem(0)
    logits = np.log(given.teacher)
    for variant in ("cross_entropy", "expected_kl"):
        assert np.allclose(expected_update(given, logits, variant), 0, atol=1e-12)
    update = expected_update(given, logits, "expected_entropy")
    assert np.abs(update).max() > 0.01
    # Without what comes later, every state would move to its most probable action.
    alone = Problem(0 * given.transitions, given.rewards, given.start, 1.0, given.teacher)
    falling = -expected_update(alone, logits, "expected_entropy")
    assert (falling.argmax(axis=1) == given.teacher.argmax(axis=1)).all()


def test_the_entropy_forms_differ_in_noise_only() -> None:
    given, logits = problem(0), random_logits(0)
    assert np.allclose(
        expected_update(given, logits, "entropy"), expected_update(given, logits, "expected_entropy")
    )


def test_log_of_the_teacher_is_bounded() -> None:
    q_values = np.random.default_rng(0).normal(size=(5, 7, 4)) * 100
    for copies, floor in ((1, 0.01), (25, 0.01), (250, 0.1)):
        for use_copies in (False, True):
            policy = teacher_policy(q_values, 0.1, floor, 0.0, copies, use_copies)
            assert policy.shape == (5, 7, 4 * copies)
            assert np.allclose(policy.sum(axis=2), 1)
            assert np.log(policy).min() >= np.log(floor / (4 * copies)) - 1e-9
    moves = teacher_policy(q_values, copies=25, use_copies=True).reshape(5, 7, 25, 4).sum(axis=2)
    assert np.allclose(moves, teacher_policy(q_values))
    noisy = teacher_policy(q_values, noise=0.25)
    assert np.allclose(noisy, 0.75 * teacher_policy(q_values) + 0.25 / 4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("copies", [1, 2])
def test_the_sampled_updates_are_the_expected_ones_on_average(variant: str, copies: int) -> None:
    """With an exact critic that is kept, and logits that hardly move, the updates of many episodes add up to the expected one."""
    worlds = random_grid_worlds(1, seed=5, side=3, wall_chance=0.2, goal_chance=0.2, end_chance=0.2)
    random = np.random.default_rng(0)
    actions = 4 * copies
    teacher = random.dirichlet(np.ones(actions), size=(1, 9))
    transitions, rewards = worlds.transitions()
    gamma = 0.9 if variant == "teacher_values" else 1.0
    given = Problem(
        transitions=np.tile(transitions[0], (1, copies, 1)),
        rewards=np.tile(rewards[0], (1, copies)),
        start=np.eye(9)[worlds.start],
        gamma=gamma,
        teacher=teacher[0],
    )
    teacher_values = (teacher[0] * given.action_values(teacher[0], given.rewards)).sum(axis=1)
    rows, rate = 3000, 1e-9
    students = TabularStudents(
        worlds,
        teacher,
        teacher_values[None],
        [Condition(variant, "student", rate)] * rows,
        gamma,
        seed=0,
        critic_rate=0.0,
        advantage_limit=np.inf,
        dtype=np.float64,
    )
    logits = random.normal(size=(9, actions)) * 0.5
    students.logits[:] = np.tile(logits, (rows, 1))
    students.critic[:] = np.tile(exact_critic(given, logits, variant), rows)
    for _ in range(400):
        students.step()
    moved = (np.tile(logits, (rows, 1)) - students.logits).reshape(rows, 9, actions).sum(axis=0)
    average = moved / rate / students.episodes
    expected = expected_update(given, logits, variant)
    if gamma < 1:  # the update weighs a state by its undiscounted visits, as is usual: see deviation 4
        student = softmax(logits)
        discounted = given.visits(student)
        plain = Problem(given.transitions, given.rewards, given.start, 1.0, given.teacher).visits(student)
        expected = expected * (plain / np.maximum(discounted, 1e-12))[:, None]
    scale = np.abs(expected).max()
    assert scale > 0.01
    assert np.abs(average - expected).max() < 0.05 * scale


def exact_critic(given: Problem, logits: np.ndarray, variant: str) -> np.ndarray:
    """Expected pseudo-returns [S] of the student, by their definition in the module's table."""
    student = softmax(logits)
    log_student, log_teacher = np.log(student), np.log(given.teacher)
    losses = {
        "n_distill": -(given.teacher * log_student).sum(axis=1),
        "expected_entropy": -(student * log_teacher).sum(axis=1),
        "expected_kl": (student * (log_student - log_teacher)).sum(axis=1),
    }
    if variant in losses:
        rewards = -given.transitions @ losses[variant]
    elif variant == "entropy":
        rewards = log_teacher
    elif variant == "teacher_values":
        values = (given.teacher * given.action_values(given.teacher, given.rewards)).sum(axis=1)
        rewards = given.rewards + given.gamma * given.transitions @ values - values[:, None]
    else:
        rewards = np.zeros_like(student)
    return (student * given.action_values(student, rewards)).sum(axis=1)


def test_the_advantage_is_clipped() -> None:
    worlds = random_grid_worlds(4, seed=5, side=5)
    teacher = teacher_policy(worlds.optimal_q_values(0.99))
    for limit in (0.5, 2.0):
        students = TabularStudents(
            worlds,
            teacher,
            np.zeros((4, 25)),
            [Condition("entropy", "student", 1.0)],
            0.99,
            0,
            advantage_limit=limit,
        )
        students.step()
        students.step()
        assert students.logits.max() <= limit
        assert students.logits.min() < -limit / 2


@pytest.mark.learning
def test_students_learn_and_their_own_play_teaches_faster() -> None:
    """Twenty worlds; a paired permutation test between who acts, at the same learning rate."""
    from scipy.stats import permutation_test

    worlds = random_grid_worlds(20, seed=0)
    q_values = q_learning(worlds, 0.99, seed=0)
    teacher = teacher_policy(q_values)
    values = worlds.values(teacher, 0.99)
    target = values[:, worlds.start]
    conditions = [
        Condition("cross_entropy", "student", 0.3),
        Condition("cross_entropy", "teacher", 0.3),
        Condition("expected_kl", "student", 0.3),
        Condition("n_distill", "student", 0.3),
        Condition("entropy", "student", 0.3),
        Condition("expected_entropy", "student", 0.3),
        Condition("teacher_values", "student", 1.0),
    ]
    students = TabularStudents(worlds, teacher, values, conditions, 0.99, seed=0)
    untrained = students.returns()[0].mean() / target.mean()
    curve = []
    for step in range(1, 4001):
        students.step()
        if step % 400 == 0:
            curve.append(students.returns())
    shares = np.array(curve).mean(axis=2) / target.mean()  # [times, conditions]
    assert untrained < 0.4
    assert (shares[-1] > 0.9).all(), shares[-1].round(2)
    faster = np.array(curve)[:, 0].mean(axis=0) - np.array(curve)[:, 1].mean(axis=0)  # [worlds]
    assert (
        permutation_test(
            (faster,), np.mean, permutation_type="samples", alternative="greater", n_resamples=2000, rng=0
        ).pvalue
        < 0.01
    )


@pytest.mark.learning
def test_sampled_rewards_fail_among_many_actions_where_expectations_do_not() -> None:
    worlds = random_grid_worlds(8, seed=0)
    teacher = teacher_policy(worlds.optimal_q_values(0.99), copies=25)
    moves = teacher.reshape(8, 400, 25, 4).sum(axis=2)
    values = worlds.values(moves, 0.99)
    target = values[:, worlds.start].mean()
    rates = (0.3, 1.0, 3.0, 10.0)
    conditions = [
        Condition(variant, "student", rate)
        for variant in ("entropy", "expected_entropy", "expected_kl")
        for rate in rates
    ]
    students = TabularStudents(worlds, teacher, values, conditions, 0.99, seed=0)
    for _ in range(4000):
        students.step()
    entropy, expected_entropy, expected_kl = (
        students.returns().mean(axis=1).reshape(3, len(rates)).max(axis=1) / target
    )
    assert expected_kl > 0.9
    assert expected_entropy > 0.85
    assert entropy < 0.7
