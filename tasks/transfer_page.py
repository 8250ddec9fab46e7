"""The page of transfer results: the suites' curves to Markdown and a heat map. Pure: the same bytes for the same results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.evaluation.statistics import estimate, mean
from stillhouse.transfer.metrics import Curve, area_under_curve, steps_to_reach
from tasks.results import retention
from tasks.results_page import table, text

FOLDER = Path("benchmarks/results/transfer")
PAGE = Path("docs/results/transfer.md")

# Rusu et al. 2016, table 1: mean and median transfer score, per cent.
PAPER = {
    "scratch": ("100 / 100", "100 / 100"),
    "head_only": ("35 / 7", "41 / 21"),
    "full": ("181 / 160", "133 / 110"),
    "progressive_random": ("134 / 131", "96 / 95"),
    "progressive_2": ("209 / 169", "132 / 112"),
    "progressive_3": ("222 / 183", "140 / 111"),
}
BASELINES = {
    "scratch": "B1, one column, from scratch",
    "head_only": "B2, taken, output layer trained",
    "full": "B3, taken, all trained",
    "progressive_random": "B4, two columns, the first random and frozen",
    "progressive_2": "progressive, 2 columns",
    "progressive_3": "progressive, 3 columns",
}


@dataclass(frozen=True)
class Way:
    """One way and source on one target, every seed.

    Attributes:
        name: as in the stage's name, for example ``full-breakout``.
        mode, source: its parts; the source may be "".
        curves: of each seed.
        test: greedy returns on test episodes, of each seed.
        retention: of each seed, mean over the source's environments; empty where nothing was moved.
        chosen: which source each seed chose, where it did.
        sensitivity: of each seed, where it was measured.
    """

    name: str
    mode: str
    source: str
    curves: list[Curve]
    test: list[float]
    retention: list[float]
    chosen: list[str]
    sensitivity: list[Mapping[str, Any]]


@dataclass(frozen=True)
class Target:
    """One target environment and all that was tried there."""

    name: str
    algorithm: str
    env_steps: int
    threshold: float | None
    random: np.ndarray
    ways: dict[str, Way]

    @property
    def areas(self) -> dict[str, np.ndarray]:
        """Area under each way's curve above random play, of each seed."""
        return {
            name: np.array([area_under_curve(curve, self._budget) for curve in way.curves]) - self.random
            for name, way in self.ways.items()
        }

    @property
    def _budget(self) -> float:
        return min(float(curve.env_steps[-1]) for way in self.ways.values() for curve in way.curves)

    @property
    def has_ratio(self) -> bool:
        """Whether scratch is above random play in every seed, so that areas may be divided."""
        return bool((self.areas["scratch"] > 1e-9 * np.maximum(1.0, np.abs(self.random))).all())

    def scores(self, name: str) -> np.ndarray:
        """Transfer scores of each seed: over scratch's, or less scratch's."""
        areas = self.areas
        return areas[name] / areas["scratch"] if self.has_ratio else areas[name] - areas["scratch"]

    def top(self, name: str, count: int = 3) -> float:
        """The paper's protocol: the mean area of the best ``count`` seeds over that of scratch's best."""
        best = [np.sort(self.areas[each])[-count:].mean() for each in (name, "scratch")]
        return float(best[0] / best[1])


def targets_of(result: Mapping[str, Any]) -> list[Target]:
    """The results of a suite, as ``benchmarks.transfer`` writes them."""
    found = []
    for name, target in sorted(result["targets"].items()):
        ways = {
            key: Way(
                name=key,
                mode=way["mode"],
                source=way["source"],
                curves=[Curve(np.array(run["env_steps"]), np.array(run["returns"])) for run in way["runs"]],
                test=[run["test"] for run in way["runs"]],
                retention=[retention(run["retention"]) for run in way["runs"] if "retention" in run],
                chosen=[run["choice"]["chosen"] for run in way["runs"] if "choice" in run],
                sensitivity=[run["sensitivity"] for run in way["runs"] if "sensitivity" in run],
            )
            for key, way in sorted(target["ways"].items())
        }
        found.append(
            Target(
                name=name,
                algorithm=target["algorithm"],
                env_steps=target["env_steps"],
                threshold=target["threshold"],
                random=np.array(target["random"]),
                ways=ways,
            )
        )
    return found


def _over(values: Sequence[float] | np.ndarray, form: str = ".2f") -> str:
    """A mean over seeds with its interval."""
    array = np.array(values, np.float64)[:, None]
    return text(estimate(mean, array, seed=0), form) if len(array) and np.isfinite(array).all() else "–"


def _steps(values: Sequence[float]) -> str:
    """Median env steps over seeds; in how many it was reached."""
    middle = float(np.median(values))
    reached = sum(math.isfinite(value) for value in values)
    shown = f"{middle:,.0f}" if math.isfinite(middle) else "never"
    return shown if reached == len(values) else f"{shown} ({reached} of {len(values)})"


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page.

    Args:
        results: of each suite, by its name.
    """
    lines = [HEAD]
    for suite, result in sorted(results.items()):
        targets = targets_of(result)
        seeds = len(result["seeds"])
        lines += ["", f"## Suite {suite}", "", SUITES.get(suite, ""), ""]
        lines += _baselines(targets, seeds)
        lines += ["### Every way and source on every target", "", MATRIX, *_matrix(targets), ""]
        for target in targets:
            lines += _target(target)
        lines += _sensitivities(targets)
        lines += [_origin(result), ""]
    return "\n".join(lines).rstrip() + "\n"


def _baselines(targets: list[Target], seeds: int) -> list[str]:
    """The soup in the manner of the paper's table 1."""
    soup = [
        target
        for target in targets
        if target.has_ratio and set(BASELINES) <= {way.mode for way in target.ways.values()}
    ]
    if not soup:
        return []
    rows = []
    for mode, what in BASELINES.items():
        matrix = _soup_scores(soup, mode)
        tops = [
            np.mean([target.top(way.name) for way in target.ways.values() if way.mode == mode])
            for target in soup
        ]
        over_targets = matrix.mean(0)
        rows.append(
            [
                what,
                text(estimate(mean, matrix, seed=0), ".2f"),
                f"{np.median(over_targets):.2f}",
                f"{(over_targets > 1).sum()} of {len(soup)}",
                f"{np.mean(tops):.2f}",
                *PAPER[mode],
            ]
        )
    head = [
        "",
        "mean transfer score",
        "median over targets",
        "targets above 1",
        f"top 3 of {seeds}",
        "paper: Pong soup, %",
    ]
    return [
        "### The soup, by baseline",
        "",
        *table([*head, "paper: Atari, %"], rows),
        "",
        *_against(soup),
        SOUP,
        "",
    ]


def _soup_scores(soup: list[Target], mode: str) -> np.ndarray:
    """A baseline's transfer scores, mean over its sources, [seeds, targets]."""
    columns = [
        [target.scores(way.name) for way in target.ways.values() if way.mode == mode] for target in soup
    ]
    return np.stack([np.mean(scores, axis=0) for scores in columns], 1)


def _against(soup: list[Target]) -> list[str]:
    """Differences that the paper's pattern rests on, with their intervals."""

    lines = []
    for first, second in (
        ("progressive_2", "progressive_random"),
        ("progressive_2", "full"),
        ("progressive_3", "progressive_2"),
    ):
        difference = estimate(mean, _soup_scores(soup, first) - _soup_scores(soup, second), seed=0)
        lines.append(f"- {BASELINES[first]}, less {BASELINES[second]}: {text(difference, '+.2f')}")
    return [*lines, ""]


def _matrix(targets: list[Target]) -> list[str]:
    names = sorted({name for target in targets for name in target.ways if name != "scratch"})
    rows = []
    for name in names:
        cells = []
        for target in targets:
            if name not in target.ways:
                cells.append("")
                continue
            shown = _over(target.scores(name))
            cells.append(shown if target.has_ratio else f"Δ {shown}")
        rows.append([f"`{name}`", *cells])
    return table(["way and source", *(target.name for target in targets)], rows)


def _target(target: Target) -> list[str]:
    """All measures on one target."""
    scratch = target.ways["scratch"]
    finals = [float(curve.returns[-1]) for curve in scratch.curves]
    rows = []
    for name, way in sorted(target.ways.items(), key=lambda item: (item[0] == "scratch", item[0])):
        row = [
            f"`{name}`",
            _over([curve.returns[0] for curve in way.curves], ".1f"),
            "" if name == "scratch" else _over(target.scores(name)),
            _steps([steps_to_reach(curve, final) for curve, final in zip(way.curves, finals, strict=True)]),
        ]
        if target.threshold is not None:
            row.append(_steps([steps_to_reach(curve, target.threshold) for curve in way.curves]))
        row += [_over([curve.returns[-1] for curve in way.curves], ".1f"), _over(way.test, ".1f")]
        row.append(_over(way.retention) if way.retention else "")
        rows.append(row)
    head = ["way and source", "start", "transfer score" if target.has_ratio else "area less scratch’s"]
    head.append("env steps to scratch’s final return")
    if target.threshold is not None:
        head.append(f"env steps to {target.threshold:g}")
    head += ["final return", "test return", "retention"]
    chosen = [
        f"`{way.name}` chose {', '.join(f'`{each}`' for each in way.chosen)} (seed by seed)."
        for way in target.ways.values()
        if way.chosen
    ]
    about = (
        f"{target.algorithm.upper()}, {target.env_steps:,} env steps; random play {target.random.mean():.1f}."
    )
    return [f"### {target.name}", "", " ".join([about, *chosen]), "", *table(head, rows), ""]


def _sensitivities(targets: list[Target]) -> list[str]:
    rows = []
    for target in targets:
        for way in target.ways.values():
            if not way.sensitivity:
                continue
            for kind in ("fisher", "perturbation"):
                measured = [found[kind] for found in way.sensitivity if found[kind]]
                if not measured:  # no seed's policy is better than random play
                    continue
                shares = np.array(measured).mean(0)  # [layers, columns]
                for layer, columns in enumerate(shares, 1):
                    rows.append(
                        [
                            f"{target.name} `{way.name}`",
                            {"fisher": "AFS", "perturbation": "APS"}[kind],
                            str(layer),
                            *(f"{share:.2f}" for share in columns[:-1]),
                            *([""] * (3 - len(columns))),
                            f"{columns[-1]:.2f}",
                        ]
                    )
    if not rows:
        return []
    head = ["", "analysis", "layer", "column 1", "column 2", "new column"]
    return ["### What is read of which column", "", SENSITIVITY, *table(head, rows), ""]


def _origin(result: Mapping[str, Any]) -> str:
    about = result["provenance"]
    return (
        f"`{about['command']}`, commit {about['commit']}, {about['machine']['cores']} cores ({about['machine']['processor']}), "
        f"seeds {', '.join(map(str, result['seeds']))}. Teachers, greedy: "
        + "; ".join(f"{name} {np.mean(returns):.1f}" for name, returns in sorted(result["teachers"].items()))
        + "."
    )


HEAD = """# Transfer

Does what was learnt before help on a new environment, and how should it be reused? Two suites, every seed committed in
[`benchmarks/results/transfer/`](../../benchmarks/results/transfer/); this page is drawn from them by the stage `publish_results`.
The ways are described in [transfer](../algorithms/transfer.md).

Transfer score: the area under the curve of greedy validation returns above random play, over that of the same network from
scratch with the same seed and budget. Means over seeds with 95 % stratified bootstrap intervals. The sources' own training is not
counted, as in the papers. Nothing here was chosen among seeds."""
MATRIX = "Below 1 what was carried over did harm. Δ: scratch is not above random play in every seed, so areas are subtracted.\n"
SOUP = """The paper's figures are A3C's on Pong variants and on Atari games, as means of the best 3 of 25 jobs with random
hyperparameters; here it is PQN on MinAtar variants with one setting for all, and every seed counts (the paper's protocol beside
it). Its third column is itself progressive; here the two frozen columns were trained apart."""
SENSITIVITY = """Shares of the columns, means over seeds: average Fisher sensitivity and average perturbation sensitivity
(noise that costs half the return). Layer 1 reads the observations.
"""
SUITES = {
    "transfer-classic": "A ladder of CartPoles with longer poles, two heavier or longer Acrobots, and MountainCar from CartPole.",
    "transfer-minatar": "A soup of Breakouts, and two games with a policy-gradient learner that start from the same game's or the other's "
    "teacher.",
}
