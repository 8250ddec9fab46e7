"""The bandits' classical baselines, against values by hand and independent programmes."""

from fractions import Fraction
from functools import cache

import numpy as np
import pytest

from stillhouse.envs.bandits import BanditConfig
from stillhouse.meta import bandit_baselines as baselines

SUCCESSES = np.array([[3, 0, 1]])
PULLS = np.array([[4, 1, 5]])


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_scores_by_hand() -> None:
    assert baselines.greedy(SUCCESSES, PULLS, 10, rng())[0] == pytest.approx([4 / 6, 1 / 3, 2 / 7])
    width = np.sqrt(2 * np.log(10))
    expected = [4 / 6 + 0.5 * width / 6**0.5, 1 / 3 + 0.5 * width / 3**0.5, 2 / 7 + 0.5 * width / 7**0.5]
    assert baselines.ucb1(0.5)(SUCCESSES, PULLS, 10, rng())[0] == pytest.approx(expected)
    # Neither the first pull's logarithm nor the second's is anything to explore by.
    assert baselines.ucb1(0.5)(SUCCESSES * 0, PULLS * 0, 0, rng())[0] == pytest.approx([0.5] * 3)


def test_thompson_samples_the_posterior() -> None:
    many = np.repeat(SUCCESSES, 50_000, 0), np.repeat(PULLS, 50_000, 0)
    drawn = baselines.thompson(*many, 10, rng())
    assert drawn.mean(0) == pytest.approx([4 / 6, 1 / 3, 2 / 7], abs=0.005)
    assert drawn.var(0) == pytest.approx(
        [8 / 252, 2 / 36, 10 / 392], rel=0.05
    )  # a b / ((a + b)^2 (a + b + 1))


def test_optimistic_thompson_takes_the_likeliest_sample() -> None:
    many = np.repeat(SUCCESSES, 20_000, 0), np.repeat(PULLS, 20_000, 0)
    one, likeliest = (baselines.optimistic_thompson(count)(*many, 10, rng()) for count in (1, 50))
    modes = SUCCESSES[0] / PULLS[0]
    assert one.mean(0) == pytest.approx([4 / 6, 1 / 3, 2 / 7], abs=0.01)
    assert (np.abs(likeliest - modes).mean(0) < np.abs(one - modes).mean(0) / 2).all()


def test_epsilon_is_the_share_of_random_pulls() -> None:
    many = np.repeat(SUCCESSES, 30_000, 0), np.repeat(PULLS, 30_000, 0)
    actions = baselines.epsilon_greedy(0.3)(*many, 10, rng()).argmax(1)
    assert np.bincount(actions) / 30_000 == pytest.approx([0.8, 0.1, 0.1], abs=0.01)


def exact_value(charge: Fraction, successes: int, failures: int, left: int) -> Fraction:
    if left == 0:
        return Fraction(0)
    chance = Fraction(successes + 1, successes + failures + 2)
    going_on = chance - charge
    going_on += chance * exact_value(charge, successes + 1, failures, left - 1)
    going_on += (1 - chance) * exact_value(charge, successes, failures + 1, left - 1)
    return max(Fraction(0), going_on)


@pytest.mark.parametrize(
    ("left", "successes", "failures"), [(1, 0, 0), (2, 0, 0), (3, 1, 0), (4, 0, 1), (5, 0, 0)]
)
def test_finite_horizon_indices_against_bisection(left: int, successes: int, failures: int) -> None:
    low, high = Fraction(0), Fraction(1)
    for _ in range(18):
        middle = (low + high) / 2
        if exact_value(middle, successes, failures, left) > 0:
            low = middle
        else:
            high = middle
    found = baselines.finite_horizon_indices(6)[left, successes, failures]
    assert found == pytest.approx(float(low), abs=1e-4)


def test_finite_horizon_indices_by_hand() -> None:
    table = baselines.finite_horizon_indices(6)
    assert table[1, 2, 1] == pytest.approx(3 / 5)  # a last pull is worth its estimate
    assert table[2, 0, 0] == pytest.approx(5 / 9)  # 1/2 - c + 1/2 (2/3 - c) = 0
    assert (np.diff(table[1:, 0, 0]) > 0).all()  # the more is left the more is there to find
    assert table[3, 4, 0] == 0  # there cannot have been so many


def test_discounted_indices_are_the_published_ones() -> None:
    """Gittins, Glazebrook & Weber 2011, tables of the Bernoulli reward process with discount 0.9; rows from Beta(1, 1)."""
    table = baselines.discounted_indices(0.9, 4, 300)
    assert [table[0, 0], table[1, 0], table[0, 1], table[1, 1]] == pytest.approx(
        [0.7029, 0.8001, 0.5001, 0.6346], abs=2e-4
    )


def optimal_value(episodes: int) -> float:
    """Of the best policy for two arms, by dynamic programming over all that can be known."""

    @cache
    def value(known: tuple[tuple[int, int], tuple[int, int]], left: int) -> float:
        if left == 0:
            return 0.0
        best = 0.0
        for arm, (s, f) in enumerate(known):
            chance = (s + 1) / (s + f + 2)
            after = []
            for new in ((s + 1, f), (s, f + 1)):
                changed = list(known)
                changed[arm] = new
                after.append(value(tuple(changed), left - 1))
            best = max(best, chance * (1 + after[0]) + (1 - chance) * after[1])
        return best

    return value(((0, 0), (0, 0)), episodes)


def test_play_is_near_the_optimum_and_no_better() -> None:
    family = BanditConfig(arms=2, episodes=6)
    optimum = optimal_value(6)
    totals = {
        name: baselines.play(scores, family, 40_000, 6, 1, name).sum(1).mean()
        for name, scores in {
            "random": baselines.uniform,
            "gittins": baselines.gittins(6),
            "greedy": baselines.greedy,
        }.items()
    }
    assert totals["random"] == pytest.approx(3, abs=0.03)
    assert totals["gittins"] == pytest.approx(optimum, abs=0.03)
    assert totals["random"] < totals["greedy"] < optimum + 0.02


def test_methods_with_the_same_choices_get_the_same_rewards() -> None:
    family = BanditConfig(arms=4, episodes=20)
    one, other = (
        baselines.play(scores, family, 50, 20, 3, "x") for scores in (baselines.greedy, baselines.ucb1(0.0))
    )
    assert np.array_equal(one, other)
    split = baselines.play(baselines.greedy, family, 50, 20, 3, "x", "train")
    assert not np.array_equal(one, split)


def test_the_learners_baselines() -> None:
    family = BanditConfig(arms=3, episodes=5)
    found = baselines.play_bandits(family, 30, 5, 0)
    assert set(found) == {"random", "greedy", "thompson", "gittins"}
    assert all(rewards.shape == (30, 5) for rewards in found.values())
    again = baselines.play_bandits(family, 30, 5, 0)
    assert all(np.array_equal(found[name], again[name]) for name in found)


def test_the_grid_is_fine_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = baselines.finite_horizon_indices(20)
    monkeypatch.setattr(baselines, "_GRID", 4000)
    fine = baselines.finite_horizon_indices.__wrapped__(20)
    assert np.abs(coarse - fine).max() < 1e-3
    assert coarse[3, 18, 0] == coarse[5, 8, 8] == 0  # of 20 pulls there cannot have been so many before
