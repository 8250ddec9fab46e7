"""Distral with tables in two rooms (Teh et al. 2017, section 4.1): does a distilled policy make eight tasks faster to learn?

    nice -n 10 python -m benchmarks.distral_two_rooms            # choose settings, run, draw: some twenty minutes on one core
    python -m benchmarks.distral_two_rooms --figure              # the figure alone, from the result

Every arm gets the best of one grid of beta and learning rate, on seeds of their own; the results are of others. A score is the mean
reward per step of the policies that act, over the whole training, as a share of what the shortest ways would earn: the area
under the learning curve.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import load, provenance, save
from stillhouse.envs.two_rooms import TwoRooms, state
from stillhouse.evaluation.statistics import (
    interval,
    mean,
    probability_of_improvement,
    stratified_bootstrap,
)
from stillhouse.multi_task.distral_tabular import Arm, TabularDistral

NAME = "multi_task/distral_two_rooms"
FIGURE = Path("docs/images/distral-two-rooms.svg")
ROOMS = TwoRooms(side=5, corridor=5, bump=-0.1)
TASKS, GAMMA, ROLLOUT = 8, 0.95, 10
PRIOR, FORGETTING = 1.0, 0.1  # of pi_0's counts, for all forms of Distral
BLOCKS, ROLLOUTS_PER_BLOCK = 30, 100
END = 3  # blocks: the last tenth
BETAS = (5.0, 10.0, 25.0, 50.0, 100.0, 200.0)
RATES = (0.1, 0.3, 0.5, 0.9)
CHOICE_SEEDS, SEEDS = range(1000, 1010), range(2000, 2020)
COUNTS = ((0.2, 1.0, 3.0), (0.03, 0.1, 0.3))  # other priors and rates of forgetting

BEST, KL, INDEPENDENT, SHARED = "KL+ent_2col", "KL_2col", "independent soft Q", "one shared policy"
FORMS = {
    BEST: Arm(alpha=0.5, columns=2),
    "KL+ent_1col": Arm(alpha=0.5, columns=1),
    KL: Arm(alpha=1.0, columns=2),
    "KL_1col": Arm(alpha=1.0, columns=1),
    INDEPENDENT: Arm(),
    SHARED: Arm(shared=True),
}


def run(
    arms: Sequence[Arm], seeds: Sequence[int], prior: float = PRIOR, forgetting: float = FORGETTING
) -> tuple[np.ndarray, TabularDistral]:
    """Rewards per step as a share of the best, [blocks, arms, seeds, tasks], and how it ended."""
    learners = TabularDistral(ROOMS, arms, seeds, TASKS, GAMMA, ROLLOUT, prior, forgetting)
    steps = ROLLOUT * ROLLOUTS_PER_BLOCK * ROOMS.best_rates(learners.goals)
    blocks = [sum(learners.iterate() for _ in range(ROLLOUTS_PER_BLOCK)) / steps for _ in range(BLOCKS)]
    return np.array(blocks), learners


def choose(form: Arm) -> tuple[Arm, list[list[float]]]:
    """The setting of the largest area on the seeds to choose on; of every one [beta, learning rate, area, end]."""
    grid = list(itertools.product(BETAS, RATES))
    tried = [dataclasses.replace(form, beta=beta, learning_rate=rate) for beta, rate in grid]
    curves = run(tried, CHOICE_SEEDS)[0].mean(axis=(2, 3))
    areas, ends = curves.mean(axis=0), curves[-END:].mean(axis=0)
    found = [
        [*setting, round(float(area), 4), round(float(end), 4)]
        for setting, area, end in zip(grid, areas, ends, strict=True)
    ]
    return tried[int(areas.argmax())], found


def carries_on(distilled: np.ndarray) -> np.ndarray:
    """pi_0's probability of going on in the direction of travel, the mean over the corridor's cells and both ways; [K, S, A] -> [K]."""
    corridor = ROOMS.room_cells + np.arange(ROOMS.corridor)
    both = [distilled[:, state(corridor, move, False), move] for move in (2, 3)]
    found: np.ndarray = np.mean(both, axis=(0, 2))
    return found


def improvement(first: np.ndarray, second: np.ndarray) -> tuple[float, list[float]]:
    """How probably a run of the first is above one of the second, each [K], and its 95 % interval."""
    x, y = first[:, None], second[:, None]
    low, high = interval(stratified_bootstrap(probability_of_improvement, x, y, seed=0))
    return float(probability_of_improvement(x, y)), [low, high]


def measure() -> dict[str, Any]:
    """The whole study."""
    chosen, grids = {}, {}
    for name, form in FORMS.items():
        chosen[name], grids[name] = choose(form)
        print(name, chosen[name], flush=True)
    curves, learners = run(list(chosen.values()), SEEDS)
    areas, ends = curves.mean(axis=0), curves[-END:].mean(axis=0)  # [arms, seeds, tasks]
    distilled = learners.distilled()
    arms: dict[str, Any] = {}
    for index, (name, arm) in enumerate(chosen.items()):
        by_seed = curves[:, index].mean(axis=-1)  # [blocks, seeds]
        spreads = [interval(stratified_bootstrap(mean, row[:, None], seed=0)) for row in by_seed]
        end = ends[index].mean(axis=-1, keepdims=True)
        low, high = interval(stratified_bootstrap(mean, end, seed=0))
        areas_of_grid = [area for _, _, area, _ in grids[name]]
        arms[name] = {
            "scores": areas[index].mean(axis=-1, keepdims=True).round(4).tolist(),
            "extra": {
                "beta": arm.beta,
                "learning_rate": arm.learning_rate,
                "last_tenth": f"{end.mean():.3f} [{low:.3f}, {high:.3f}]",
                "median_of_the_grid": round(float(np.median(areas_of_grid)), 3),
                "areas": areas[index].round(4).tolist(),
                "ends": ends[index].round(4).tolist(),
                "curve": by_seed.mean(axis=1).round(4).tolist(),
                "curve_intervals": np.round(spreads, 4).tolist(),
                "grid": grids[name],
            },
        }
        if arm.alpha:
            on = carries_on(distilled[index])
            arms[name]["extra"]["carries_on"] = round(float(on.mean()), 3)
            arms[name]["extra"]["carries_on_by_seed"] = on.round(4).tolist()
    arms[BEST]["extra"]["distilled"] = {  # pi_0 by cell, after a move to the left and to the right
        side: distilled[0].mean(axis=0)[state(np.arange(len(ROOMS.cells())), move, False)].round(3).tolist()
        for side, move in (("left", 2), ("right", 3))
    }
    arms[BEST]["extra"]["counts"] = sensitivity(chosen[BEST])
    return {
        "study": "distral_two_rooms",
        "question": question(),
        "provenance": provenance(),
        "environments": ["two rooms"],
        "seeds": list(SEEDS),
        "order": list(FORMS),
        "arms": arms,
        "notes": notes(arms),
    }


def sensitivity(arm: Arm) -> list[list[float]]:
    """With other counts behind pi_0, on the seeds to choose on: [prior, forgetting, area, end]."""
    found = []
    for prior, forgetting in itertools.product(*COUNTS):
        curve = run([arm], CHOICE_SEEDS, prior, forgetting)[0].mean(axis=(1, 2, 3))
        area, end = float(curve.mean()), float(curve[-END:].mean())
        found.append([prior, forgetting, round(area, 4), round(end, 4)])
    return found


def question() -> str:
    return (
        f"Eight tasks, each with a goal of its own in one of two rooms, which a corridor joins: does a distilled policy help to learn them? A score "
        f"is the area under the learning curve over {BLOCKS * ROLLOUTS_PER_BLOCK * ROLLOUT:,} env steps of each task: the mean reward per step in "
        "training, as a share of what the shortest ways earn; a seed draws its own eight goals and counts as one run. The last tenth "
        "is the same share over the last tenth of the training. Every arm has the best of one grid of beta and learning rate, on 10 other "
        "seeds; beside it the median over that grid. How the arms differ: `stillhouse/multi_task/distral_tabular.py`."
    )


def notes(arms: dict[str, Any]) -> list[str]:
    """What the numbers say."""

    def by_seed(name: str, key: str) -> np.ndarray:
        found: np.ndarray = np.mean(arms[name]["extra"][key], axis=1)
        return found

    lines = []
    for other in (INDEPENDENT, SHARED):
        pairs = []
        for name in (BEST, KL):
            value, (low, high) = improvement(by_seed(name, "areas"), by_seed(other, "areas"))
            won = int((by_seed(name, "areas") > by_seed(other, "areas")).sum())
            pairs.append(
                f"{name} {value:.3f} [{low:.3f}, {high:.3f}] (larger on {won} of {len(SEEDS)} seeds with the same goals)"
            )
        lines.append(f"Probability of a larger area than {other}: {'; '.join(pairs)}.")
    value, (low, high) = improvement(by_seed(BEST, "ends"), by_seed(KL, "ends"))
    lines.append(
        f"Probability that {BEST} is above {KL} in the last tenth: {value:.3f} [{low:.3f}, {high:.3f}]; the means are "
        f"{by_seed(BEST, 'ends').mean():.3f} and {by_seed(KL, 'ends').mean():.3f}."
    )
    on = ", ".join(
        f"{name} {arm['extra']['carries_on']:.2f}"
        for name, arm in arms.items()
        if "carries_on" in arm["extra"]
    )
    lines.append(
        f"In the corridor pi_0 carries on in the direction of travel, with a probability of {on}; chance is 0.25."
    )
    counts = arms[BEST]["extra"]["counts"]
    areas = [area for _, _, area, _ in counts]
    lines.append(
        f"The counts behind pi_0 (prior {PRIOR:g}, forgetting {FORGETTING:g} per rollout) were chosen on the same 10 seeds as the grid's settings. With "
        f"priors {', '.join(f'{each:g}' for each in COUNTS[0])} and forgetting {', '.join(f'{each:g}' for each in COUNTS[1])} the area of {BEST} is "
        f"{min(areas):.3f} to {max(areas):.3f} there, that of {INDEPENDENT} {max(row[2] for row in arms[INDEPENDENT]['extra']['grid']):.3f}."
    )
    return lines


COLORS = {
    BEST: "#0072b2",
    "KL+ent_1col": "#56b4e9",
    KL: "#d55e00",
    "KL_1col": "#e69f00",
    INDEPENDENT: "#333333",
    SHARED: "#999999",
}


def draw(study: dict[str, Any]) -> None:
    """The figure: learning curves, and the distilled policy after a move to the right and to the left."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "stillhouse", "svg.fonttype": "none"}  # the same bytes every time
    from matplotlib import pyplot

    figure, axes = pyplot.subplot_mosaic(
        [["curves", "right"], ["curves", "left"]], figsize=(9.5, 3.8), layout="constrained"
    )
    steps = (np.arange(BLOCKS) + 0.5) * ROLLOUTS_PER_BLOCK * ROLLOUT
    for name in study["order"]:
        extra = study["arms"][name]["extra"]
        axes["curves"].plot(steps, extra["curve"], color=COLORS[name], label=name)
        low, high = np.transpose(extra["curve_intervals"])
        axes["curves"].fill_between(steps, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
    axes["curves"].set(xlabel="env steps of each task", ylabel="reward per step / best", xlim=(0, None))
    axes["curves"].legend(frameon=False, fontsize=8)
    axes["curves"].spines[["top", "right"]].set_visible(False)
    rows, columns = ROOMS.cells().T
    ways = np.array([(0, 1), (0, -1), (-1, 0), (1, 0)])  # of the moves, on the page
    for side in ("right", "left"):
        panel = axes[side]
        panel.scatter(columns, -rows, marker="s", s=150, color="#eeeeee", linewidth=0)
        policy = np.array(study["arms"][BEST]["extra"]["distilled"][side])
        for move, way in enumerate(ways):
            along = 0.75 * policy[:, [move]] * way
            panel.quiver(
                columns,
                -rows,
                *along.T,
                angles="xy",
                scale_units="xy",
                scale=1,
                width=0.004,
                color=COLORS[BEST],
            )
        panel.set(title=f"pi_0 after a move to the {side}", aspect="equal")
        panel.title.set_fontsize(9)
        panel.axis("off")
    figure.savefig(FIGURE, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", action="store_true", help="draw the figure only")
    if not parser.parse_args().figure:
        save(NAME, measure())
    if study := load(NAME):
        draw(study)


if __name__ == "__main__":
    main()
