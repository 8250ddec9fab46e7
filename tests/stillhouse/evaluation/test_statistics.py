"""The statistics against hand-computed values, properties, and rliable."""

from __future__ import annotations

import importlib.util
import math
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stillhouse.evaluation import statistics

# rliable needs arch 7 for its bootstrap alone, and arch 7's other models do not import beside pandas 3: a bare package
# in the place of arch/__init__.py leaves them out.
_arch = importlib.util.find_spec("arch")
assert _arch is not None
assert _arch.submodule_search_locations is not None
sys.modules["arch"] = types.ModuleType("arch")
sys.modules["arch"].__path__ = list(_arch.submodule_search_locations)

import rliable.library  # noqa: E402
import rliable.metrics  # noqa: E402

matrices = arrays(
    np.float64,
    st.tuples(st.integers(1, 7), st.integers(1, 4)),
    elements=st.floats(-2, 3, allow_subnormal=False),
)


def random_scores(runs: int, environments: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.8, 0.3, (runs, environments))


def test_normalised_score_of_negative_returns() -> None:
    # Acrobot: random -500, teacher -80. A student at -101 is a little worse than the teacher, not 1.26 times better.
    assert statistics.normalised_score(-101, -500, -80) == pytest.approx(0.95)
    assert statistics.normalised_score(-500, -500, -80) == 0
    assert statistics.normalised_score(-59, -500, -80) == pytest.approx(1.05)


@pytest.mark.parametrize("teacher", [20.0, 20.0 + 1e-12, 19.0])
def test_a_teacher_no_better_than_random_gives_no_score(teacher: float) -> None:
    assert math.isnan(statistics.normalised_score(30, 20.0, teacher))


def test_normalised_score_is_elementwise() -> None:
    scores = statistics.normalised_score(np.array([[5.0, 1.0]]), np.array([0.0, 1.0]), np.array([10.0, 1.0]))
    np.testing.assert_array_equal(scores, [[0.5, np.nan]])


def test_paired_improvement_by_hand() -> None:
    random = np.zeros((4, 2))
    current = np.full((4, 2), 10.0)
    # Better by a tenth on every episode of the first, the same on the second: in every resample.
    candidate = current * np.array([1.1, 1.0])
    probability, scores = statistics.paired_improvement(candidate, current, random, 0, 500)
    assert probability == 1
    np.testing.assert_allclose(scores, [1.1, 1.0])
    assert statistics.paired_improvement(current, current, random, 0, 500)[0] == 0  # the same is not better
    # One environment up by a half, the other down by a third: sqrt(1.5 * 2 / 3) = 1, and rounding does not decide.
    candidate = current * np.array([1.5, 0.6])
    assert statistics.paired_improvement(candidate, current, random, 0, 500)[0] == 0


def test_paired_improvement_takes_the_episodes_in_pairs() -> None:
    generator = np.random.default_rng(0)
    current = generator.normal(100, 50, (60, 1))  # episodes differ by far more than the agents do
    random = np.zeros_like(current)
    paired = statistics.paired_improvement(current + 1, current, random, 0, 2000)[0]
    unpaired = statistics.paired_improvement(generator.permutation(current + 1), current, random, 0, 2000)[0]
    assert paired == 1 and unpaired < 0.9


def test_paired_improvement_knows_no_better_where_there_is_no_scale() -> None:
    random, current = np.full((5, 2), 3.0), np.array([[10.0, 3.0]] * 5)
    probability, scores = statistics.paired_improvement(current + 5, current, random, 0, 100)
    assert probability == 0 and scores[0] > 1 and math.isnan(scores[1])


def test_geometric_mean_has_a_floor() -> None:
    assert statistics.geometric_mean(np.array([[0.5, 2.0]])) == pytest.approx(1.0)
    assert statistics.geometric_mean(np.array([[-3.0, 1.0]])) == pytest.approx(0.1)  # sqrt(0.01 * 1)


def test_interquartile_mean_drops_the_outer_quarters() -> None:
    assert statistics.interquartile_mean(np.array([[0.0, 1.0], [2.0, 100.0]])) == 1.5


def test_optimality_gap() -> None:
    assert statistics.optimality_gap(np.array([[0.5, 3.0]])) == pytest.approx(0.25)  # 1 - mean(0.5, 1)


def test_probability_of_improvement_counts_ties_half() -> None:
    x, y = np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[1.0, 0.0]])
    assert statistics.probability_of_improvement(x, y) == pytest.approx((0.75 + 0.5) / 2)


def test_performance_profile() -> None:
    profile = statistics.performance_profile(np.array([[0.2, 0.6], [0.8, 1.0]]), np.array([0.0, 0.5, 1.0]))
    np.testing.assert_array_equal(profile, [1.0, 0.75, 0.0])


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (10, 5), (7, 3)])
def test_values_are_those_of_rliable(shape: tuple[int, int]) -> None:
    x, y = random_scores(*shape), random_scores(*shape, seed=1)
    assert statistics.interquartile_mean(x) == pytest.approx(rliable.metrics.aggregate_iqm(x))
    assert statistics.optimality_gap(x) == pytest.approx(rliable.metrics.aggregate_optimality_gap(x))
    assert statistics.probability_of_improvement(x, y) == pytest.approx(
        rliable.metrics.probability_of_improvement(x, y)
    )
    thresholds = np.linspace(0, 1.5, 7)
    np.testing.assert_allclose(
        statistics.performance_profile(x, thresholds), rliable.library.score_distributions(x, thresholds)
    )


def test_intervals_are_those_of_rliable() -> None:
    x, y = random_scores(10, 4), random_scores(8, 4, seed=1)
    np.random.seed(0)  # rliable resamples from NumPy's global generator
    single = rliable.library.StratifiedBootstrap(x)
    expected = single.conf_int(
        lambda scores: np.array([rliable.metrics.aggregate_iqm(scores)]), reps=4000, method="percentile"
    )
    samples = statistics.stratified_bootstrap(statistics.interquartile_mean, x, seed=0, resamples=20_000)
    np.testing.assert_allclose(statistics.interval(samples), expected[:, 0], atol=0.01)

    pair = rliable.library.StratifiedIndependentBootstrap(x, y)
    expected = pair.conf_int(
        lambda a, b: np.array([rliable.metrics.probability_of_improvement(a, b)]),
        reps=1000,
        method="percentile",
    )
    samples = statistics.stratified_bootstrap(statistics.probability_of_improvement, x, y, seed=0)
    np.testing.assert_allclose(statistics.interval(samples), expected[:, 0], atol=0.02)


def test_resampling_stays_within_each_environment() -> None:
    scores = np.array([[0.0, 10.0], [1.0, 11.0], [2.0, 12.0]])
    samples = statistics.stratified_bootstrap(lambda drawn: drawn, scores, seed=3, resamples=500)
    assert samples.shape == (500, 3, 2)
    assert set(np.unique(samples[..., 0])) == {0.0, 1.0, 2.0}
    assert set(np.unique(samples[..., 1])) == {10.0, 11.0, 12.0}
    # The columns are drawn independently, not whole rows.
    assert (samples[..., 1] - samples[..., 0] != 10).any()


def test_the_bootstrap_is_seeded_and_chunks_change_only_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = random_scores(6, 3)
    first = statistics.stratified_bootstrap(statistics.mean, scores, seed=1, resamples=300)
    assert (first == statistics.stratified_bootstrap(statistics.mean, scores, seed=1, resamples=300)).all()
    assert (first != statistics.stratified_bootstrap(statistics.mean, scores, seed=2, resamples=300)).any()
    monkeypatch.setattr(statistics, "_CHUNK", 100 * scores.size)
    np.testing.assert_array_equal(
        first, statistics.stratified_bootstrap(statistics.mean, scores, seed=1, resamples=300)
    )


def test_points_below_five_seeds_and_intervals_from_five() -> None:
    few = statistics.aggregate(random_scores(4, 2), ["a", "b"])
    many = statistics.aggregate(random_scores(5, 2), ["a", "b"])
    assert few.interquartile_mean is not None
    assert few.interquartile_mean.interval is None
    assert len(few.interquartile_mean.points) == 4
    assert many.interquartile_mean is not None
    assert many.interquartile_mean.interval is not None
    low, high = many.interquartile_mean.interval
    assert low < many.interquartile_mean.value < high
    assert few.environments["a"].interval is None
    assert many.environments["a"].interval is not None


def test_the_worst_environment_is_named_and_an_undefined_one_left_out() -> None:
    scores = np.array([[1.0, np.nan, 0.5], [0.9, 0.3, 0.7]])
    result = statistics.aggregate(scores, ["a", "b", "c"])
    assert result.worst == "c"
    assert result.undefined == ("b",)
    assert list(result.environments) == ["a", "c"]
    assert result.geometric_mean is not None
    assert result.geometric_mean.value == pytest.approx((1.0 * 0.9 * 0.5 * 0.7) ** 0.25)
    assert result.geometric_mean.points == pytest.approx((math.sqrt(0.5), math.sqrt(0.63)))


def test_no_defined_environment_gives_no_aggregate() -> None:
    result = statistics.aggregate(np.array([[np.nan]]), ["a"])
    assert (result.worst, result.geometric_mean, result.undefined) == (None, None, ("a",))


@pytest.mark.parametrize("scores", [np.zeros((2, 3)), np.zeros((0, 2)), np.zeros(2)])
def test_a_matrix_of_another_shape_is_refused(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match="scores must be"):
        statistics.aggregate(scores, ["a", "b"])


@given(matrices)
@settings(max_examples=60, deadline=None)
def test_statistics_lie_within_the_scores_and_ignore_their_order(scores: np.ndarray) -> None:
    shuffled = scores[::-1, ::-1]
    for statistic in (statistics.mean, statistics.interquartile_mean):
        assert scores.min() - 1e-9 <= statistic(scores) <= scores.max() + 1e-9
        assert statistic(scores) == pytest.approx(statistic(shuffled))
    assert statistics.geometric_mean(scores) >= statistics.FLOOR - 1e-12
    assert statistics.optimality_gap(scores) >= -1e-12


@given(matrices, st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_improvement_over_itself_is_a_half_and_both_ways_sum_to_one(scores: np.ndarray, seed: int) -> None:
    other = np.random.default_rng(seed).normal(size=(3, scores.shape[1]))
    assert statistics.probability_of_improvement(scores, scores) == pytest.approx(0.5)
    there = statistics.probability_of_improvement(scores, other)
    assert there + statistics.probability_of_improvement(other, scores) == pytest.approx(1)


@given(
    st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(0.01, 1e3), st.floats(0.1, 10), st.floats(-50, 50)
)
@settings(max_examples=100, deadline=None)
def test_the_normalised_score_ignores_the_scale_of_the_rewards(
    value: float, random: float, span: float, scale: float, shift: float
) -> None:
    score = statistics.normalised_score(value, random, random + span)
    moved = statistics.normalised_score(
        scale * value + shift, scale * random + shift, scale * (random + span) + shift
    )
    assert moved == pytest.approx(score, rel=1e-6, abs=1e-6)
