"""The tabular MDPs' classical baselines, against values by hand and naive programmes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.envs.tabular import TabularConfig
from stillhouse.meta import mdp_baselines as baselines
from stillhouse.meta.mdp_baselines import Beliefs

FAMILY = TabularConfig(states=2, actions=2, episode_length=3, episodes=2)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def beliefs(batch: int = 1) -> Beliefs:
    """In state 0 action 0 was done three times for a sum of 6, and led to state 1 twice and to 0 once."""
    counts, rewards = np.zeros((batch, 2, 2, 2)), np.zeros((batch, 2, 2))
    counts[:, 0, 0] = [1, 2]
    rewards[:, 0, 0] = 6
    visits = counts.sum(-1)
    return Beliefs(counts, rewards, visits)


def test_posterior_means_by_hand() -> None:
    known = beliefs()
    # Precision 1 of the prior and of each reward: (mu + 6) / (1 + 3).
    assert known.mean_rewards(0, 1)[0].tolist() == [[1.5, 0], [0, 0]]
    assert known.mean_rewards(1, 1)[0].tolist() == [[1.75, 1], [1, 1]]
    assert known.mean_successors(1)[0, 0].tolist() == [[2 / 5, 3 / 5], [1 / 2, 1 / 2]]


def test_psrls_samples_are_of_the_posterior() -> None:
    rewards, successors = baselines.sample_tasks(beliefs(50_000), rng(), mean=1.0)
    assert rewards[:, 0, 0].mean() == pytest.approx(1.75, abs=0.01)
    assert rewards[:, 0, 0].std() == pytest.approx(0.5, abs=0.01)  # 1 / sqrt(1 + 3)
    assert rewards[:, 1, 1].std() == pytest.approx(1, abs=0.01)
    # Dirichlet(2, 3): mean 2/5, variance 2 * 3 / (25 * 6).
    assert successors[:, 0, 0, 0].mean() == pytest.approx(0.4, abs=0.005)
    assert successors[:, 0, 0, 0].var() == pytest.approx(0.04, abs=0.002)


def test_backward_induction_against_every_plan() -> None:
    family = TabularConfig(states=2, actions=2, episode_length=2, episodes=1)
    task = family.draw(1, rng())
    successors, rewards = task[..., :-1].astype(float), task[..., -1].astype(float)
    found = baselines.backward_induction(rewards, successors, family)[0, 0].max(1)
    best = np.full(2, -np.inf)
    for plan in itertools.product(range(2), repeat=4):  # an action for every time and state
        values = np.zeros(2)
        for time in (1, 0):
            chosen = [plan[2 * time + state] for state in range(2)]
            values = np.array([rewards[0, s, a] + successors[0, s, a] @ values for s, a in enumerate(chosen)])
        best = np.maximum(best, values)
    assert found == pytest.approx(best)


def test_a_bonus_counts_for_every_step_to_come() -> None:
    zero, uniform = np.zeros((1, 2, 2)), np.full((1, 2, 2, 2), 0.5)
    found = baselines.backward_induction(zero, uniform, FAMILY, np.ones((1, 2, 2)))
    assert found[:, 0, 0, 0].tolist() == [2 + 1, 1, 0]
    early = FAMILY.model_copy(update={"stop_probability": 0.5})
    found = baselines.backward_induction(zero, uniform, early, np.ones((1, 2, 2)))
    assert found[:, 0, 0, 0].tolist() == [2 + 0.5, 1, 0]


def test_beb_by_hand() -> None:
    q_values = baselines.beb(0.01)(beliefs(), FAMILY, np.zeros(1, int), rng())
    # The last step has nothing to come: 1.5 + 1 / (2 + 3).
    assert q_values[2, 0, 0, 0] == pytest.approx(1.7)
    bonus = 2 * 27 * 0.01 / (1 + 2 + 3)
    following = 2 / 5 * 1.7 + 3 / 5 * 0.5
    assert q_values[1, 0, 0, 0] == pytest.approx(1.7 + bonus + following)


def test_optimistic_values_against_a_naive_loop() -> None:
    random = rng(4)
    chances = random.dirichlet(np.ones(4), (6, 3, 2))  # [b, S', A, S] of 3 states acted in
    slack, values = random.random((6, 3, 2)) * 1.5, random.normal(size=(6, 4))
    found = baselines.optimistic_values(np.moveaxis(chances, 3, 1), slack, values)
    for index in np.ndindex(6, 3, 2):
        order, best = values[index[0]].argsort(), chances[index].copy()
        best[order[-1]] = min(1, best[order[-1]] + slack[index] / 2)
        for worst in order:
            best[worst] = max(0, best[worst] - max(0, best.sum() - 1))
        assert found[index] == pytest.approx(best @ values[index[0]])


def test_ucrl2_by_hand() -> None:
    q_values = baselines.ucrl2(0.1)(beliefs(), FAMILY, np.zeros(1, int), rng())
    width = 0.1 * np.sqrt(4 * np.log(2 * 2 * 2 / 0.05))
    assert q_values[2, 0, 0, 0] == pytest.approx(2 + width / 3**0.5, rel=1e-4)
    assert q_values[2, 0, 1, 1] == pytest.approx(width)


def test_opsrl_is_more_hopeful_than_psrl() -> None:
    one, many = (
        baselines.opsrl(count)(beliefs(2000), FAMILY, np.zeros(2000, int), rng()) for count in (1, 10)
    )
    assert many.mean() > one.mean() + 0.5


@pytest.mark.parametrize("stop_probability", [0.0, 0.3])
def test_play(stop_probability: float) -> None:
    family = TabularConfig(episodes=10, stop_probability=stop_probability)
    random, greedy, psrl = (
        baselines.play(plan, family, 300, 10, 5, name, epsilon)
        for name, plan, epsilon in (
            ("random", baselines.greedy, 1.0),
            ("greedy", baselines.greedy, 0.0),
            ("psrl", baselines.psrl(), 0.0),
        )
    )
    length = 10 if not stop_probability else (1 - 0.7**10) / 0.3
    assert random.shape == (300, 10)
    assert random.mean() == pytest.approx(length, abs=0.1 * length)
    for better in (greedy, psrl):
        gain = better.sum(1) - random.sum(1)  # of the same tasks
        assert gain.mean() > 3 * gain.std() / 300**0.5
    assert psrl[:, -1].mean() > psrl[:, 0].mean()


def test_play_is_repeatable_and_its_noise_common() -> None:
    family = TabularConfig(episodes=2)
    one, again = (baselines.play(baselines.greedy, family, 20, 2, 7, "greedy") for _ in range(2))
    assert np.array_equal(one, again)

    # Another name gives the method other random numbers for its ties, but the same world: a method without any sees the same.
    def first(
        known: Beliefs, family: TabularConfig, episode: np.ndarray, random: np.random.Generator
    ) -> np.ndarray:
        q_values = np.zeros((family.episode_length, *known.visits.shape))
        q_values[..., 0] = 1
        return q_values

    fixed, other = (baselines.play(first, family, 20, 2, 7, name) for name in ("x", "y"))
    assert np.array_equal(fixed, other)


def test_the_learners_baselines() -> None:
    found = baselines.play_mdps(TabularConfig(episodes=2), 10, 2, 0)
    assert set(found) == {"random", "greedy", "psrl"}
    assert all(returns.shape == (10, 2) for returns in found.values())


@given(st.integers(0, 10**6), st.floats(0, 3))
@settings(max_examples=50, deadline=None)
def test_optimism_is_between_the_estimate_and_the_best(seed: int, width: float) -> None:
    random = rng(seed)
    chances, values = random.dirichlet(np.ones(5), (2, 3, 2)), random.normal(size=(2, 5))
    flat, slack = np.moveaxis(chances, 3, 1), np.full((2, 3, 2), width)
    found = baselines.optimistic_values(flat, slack, values)
    estimate = (chances * values[:, None, None]).sum(-1)
    assert (found >= estimate - 1e-12).all() and (found <= values.max(1)[:, None, None] + 1e-12).all()
    assert (baselines.optimistic_values(flat, slack + 0.1, values) >= found - 1e-12).all()
    # Two in L1 is any distribution.
    if width >= 2:
        np.testing.assert_allclose(found, np.broadcast_to(values.max(1)[:, None, None], found.shape))


def test_what_is_known_before_an_episode() -> None:
    """Every step's reward; every successor but an episode's last, which is where the next one begins."""
    family = TabularConfig(states=3, actions=2, episode_length=4, episodes=3)
    seen: list[Beliefs] = []

    def plan(
        known: Beliefs, family: TabularConfig, episode: np.ndarray, random: np.random.Generator
    ) -> np.ndarray:
        seen.append(Beliefs(*(each.copy() for each in known)))
        return np.zeros((family.episode_length, *known.visits.shape))

    returns = baselines.play(plan, family, 6, 3, 0, "x")
    for episode, known in enumerate(seen):
        assert (known.visits.sum((1, 2)) == 4 * episode).all()
        assert (known.counts.sum((1, 2, 3)) == 3 * episode).all()
        assert known.rewards.sum((1, 2)) == pytest.approx(returns[:, :episode].sum(1), abs=1e-5)
    assert len(seen) == 3
