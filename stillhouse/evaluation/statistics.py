"""Honest statistics over few runs (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264).

Scores are kept as a matrix ``[seeds, environments]`` of normalised scores: random play is 0, the teacher
is 1. Below ``SEEDS_FOR_INTERVALS`` seeds an estimate shows its points, from there on a 95 % interval by the
stratified percentile bootstrap: runs are resampled within each environment, the environments are kept.

Differences from ``rliable``: the bootstrap is seeded and vectorised (all resamples of a statistic are one
array), so a statistic here takes ``[..., seeds, environments]`` and returns ``[...]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from stillhouse.seeding import generator

SEEDS_FOR_INTERVALS = 5
FLOOR = 0.01
_CHUNK = 2_000_000  # elements resampled at once: bounds the memory of a bootstrap to some 50 MB

Statistic = Callable[..., np.ndarray]


def normalised_score(
    value: float | np.ndarray, random: float | np.ndarray, teacher: float | np.ndarray
) -> np.ndarray:
    """``(value - random) / (teacher - random)``, elementwise.

    NaN where the teacher is not better than random play: there is no scale then, and with a teacher *below*
    random a worse student would score higher. Such an environment must be named, not averaged (see
    :func:`aggregate`).
    """
    value, random, teacher = np.broadcast_arrays(
        *(np.asarray(x, np.float64) for x in (value, random, teacher))
    )
    span = teacher - random
    # Equal up to rounding counts as equal: two means of the same returns may differ in the last bits.
    defined = span > 1e-9 * np.maximum(1.0, np.maximum(np.abs(teacher), np.abs(random)))
    return np.where(defined, (value - random) / np.where(defined, span, 1.0), np.nan)


def geometric_mean(scores: np.ndarray) -> np.ndarray:
    """Geometric mean of ``max(score, 0.01)`` over all runs and environments, ``[..., S, E] -> [...]``."""
    return np.exp(np.log(np.maximum(scores, FLOOR)).mean(axis=(-2, -1)))


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half of all runs x environments (IQM), ``[..., S, E] -> [...]``."""
    flat = np.reshape(scores, (*np.shape(scores)[:-2], -1))
    return np.asarray(scipy.stats.trim_mean(flat, 0.25, axis=-1))


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean over all runs and environments, ``[..., S, E] -> [...]``."""
    return np.mean(scores, axis=(-2, -1))


def optimality_gap(scores: np.ndarray, target: float = 1.0) -> np.ndarray:
    """Mean shortfall from ``target``; a score above it counts as at it, ``[..., S, E] -> [...]``."""
    return target - np.minimum(scores, target).mean(axis=(-2, -1))


def probability_of_improvement(scores_x: np.ndarray, scores_y: np.ndarray) -> np.ndarray:
    """Probability that a run of X beats a run of Y on the same environment, averaged over environments.

    Ties count one half (the Mann-Whitney U statistic).

    Args:
        scores_x: ``[..., S_x, E]``.
        scores_y: ``[..., S_y, E]``.

    Returns:
        ``[...]``, in 0..1.
    """
    x, y = scores_x[..., :, None, :], scores_y[..., None, :, :]
    return ((x > y) + 0.5 * (x == y)).mean(axis=(-3, -2, -1))


def paired_improvement(
    candidate: np.ndarray, current: np.ndarray, random: np.ndarray, seed: int, resamples: int = 10_000
) -> tuple[float, np.ndarray]:
    """How sure it is that one agent is better than another, from episodes that both have played.

    Args:
        candidate, current, random: returns ``[episodes, environments]``; rows are the same episodes.
        seed: of the resampling.
        resamples: number of resamples of the rows, for each environment by itself.

    Returns:
        The share of resamples in which the geometric mean over the environments of (candidate - random) / (current -
        random), at least 0.01 each, is above 1; and these scores on all episodes, ``[environments]``. Where the current
        agent is no better than random play the score is NaN, and the candidate is not better there.
    """
    together = np.stack(
        [candidate, current, random], axis=-1
    )  # an episode is drawn with all that was made of it

    def scores(rows: np.ndarray) -> np.ndarray:
        means = rows.mean(axis=-3)
        return normalised_score(means[..., 0], means[..., 2], means[..., 1])

    generator_ = generator(seed, "bootstrap")
    episodes, environments = candidate.shape
    better = 0
    for _ in range(resamples):
        drawn = generator_.integers(episodes, size=(episodes, environments))
        found = scores(np.take_along_axis(together, drawn[..., None], axis=0))
        better += bool(np.log(np.maximum(found, FLOOR)).mean() > 0)
    return better / resamples, scores(together)


def performance_profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of runs x environments whose score is above each threshold, ``[..., S, E], [T] -> [..., T]``."""
    return (np.asarray(scores)[..., None] > thresholds).mean(axis=(-3, -2))


def stratified_bootstrap(
    statistic: Statistic, *scores: np.ndarray, seed: int, resamples: int = 10_000
) -> np.ndarray:
    """The statistic on ``resamples`` resamples of the runs within each environment.

    Args:
        statistic: takes one array ``[..., S_i, E]`` per entry of ``scores`` and returns ``[..., *result]``.
        scores: matrices ``[S_i, E]``, resampled independently of each other.
        seed: of the resampling's own random stream.
        resamples: number of resamples.

    Returns:
        ``[resamples, *result]``.
    """
    random = generator(seed, "bootstrap")
    chunk = max(1, _CHUNK // max(matrix.size for matrix in scores))
    results = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = [
            np.take_along_axis(matrix[None], random.integers(len(matrix), size=(size, *matrix.shape)), axis=1)
            for matrix in scores
        ]
        results.append(statistic(*drawn))
    return np.concatenate(results)


def interval(samples: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap samples ``[R]``: (low, high)."""
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Estimate:
    """A number over seeds: its value, one point per seed, and from 5 seeds on a 95 % interval."""

    value: float
    points: tuple[float, ...]
    interval: tuple[float, float] | None


def estimate(statistic: Statistic, scores: np.ndarray, seed: int) -> Estimate:
    """``statistic`` of ``[S, E]``, with a point for each seed, and an interval from 5 seeds on."""
    scores = np.asarray(scores, np.float64)
    bounds = None
    if len(scores) >= SEEDS_FOR_INTERVALS:
        bounds = interval(stratified_bootstrap(statistic, scores, seed=seed))
    points = tuple(float(point) for point in statistic(scores[:, None, :]))
    return Estimate(float(statistic(scores)), points, bounds)


@dataclass(frozen=True)
class Aggregate:
    """What a matrix of normalised scores says; the estimates are None where no environment has a scale."""

    environments: dict[str, Estimate]
    geometric_mean: Estimate | None
    interquartile_mean: Estimate | None
    optimality_gap: Estimate | None
    worst: str | None
    undefined: tuple[str, ...]


def aggregate(scores: np.ndarray, environments: Sequence[str], seed: int = 0) -> Aggregate:
    """Aggregate normalised scores over seeds and environments; the worst environment is always named.

    An environment with a NaN (a teacher no better than random) enters no aggregate and is named in
    ``undefined``.

    Args:
        scores: ``[S, E]``.
        environments: the names of the columns, E of them.
        seed: of the bootstrap.

    Raises:
        ValueError: the matrix is empty or its columns are not the environments.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or scores.shape[1] != len(environments) or not scores.size:
        raise ValueError(f"scores must be [seeds, {len(environments)}] and not empty, not {scores.shape}")
    defined = ~np.isnan(scores).any(axis=0)
    undefined = tuple(name for name, keep in zip(environments, defined, strict=True) if not keep)
    kept = scores[:, defined]
    if not kept.size:
        return Aggregate({}, None, None, None, None, undefined)
    names = [name for name in environments if name not in undefined]
    by_environment = {name: estimate(mean, kept[:, [i]], seed) for i, name in enumerate(names)}
    return Aggregate(
        environments=by_environment,
        geometric_mean=estimate(geometric_mean, kept, seed),
        interquartile_mean=estimate(interquartile_mean, kept, seed),
        optimality_gap=estimate(optimality_gap, kept, seed),
        worst=min(by_environment, key=lambda name: by_environment[name].value),
        undefined=undefined,
    )
