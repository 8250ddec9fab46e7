"""UNREAL's auxiliary tasks on sparse mazes: env steps until the goal is found in 0.8 of the episodes.

    python -m benchmarks.unreal_mazes --work .stillhouse/unreal             # what of the study is not there yet, then the result
    python -m benchmarks.unreal_mazes --work .stillhouse/unreal --seeds 0 1 # development: no result is written

Five arms with the same settings: IMPALA alone, with each auxiliary task, and with all three. Every seed has a maze of its own. A run is
kept as a JSON file in ``--work``, so that an interrupted study goes on where it was. The curve is what training sees anyway: the mean
return of the episodes that ended in the last ``WINDOW`` env steps, actions sampled; there is nothing before the first window is
full, because episodes that end early are those that found the goal. A run ends when its curve has come to ``SOLVED``, and counts
with its last value from there on. A score is the curve's mean: the area under it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import provenance, save
from stillhouse.agents import make_learner
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.evaluation.statistics import interval, probability_of_improvement, stratified_bootstrap
from stillhouse.files import write_json
from stillhouse.processor import use_one_core
from tasks.studies import Study

NAME = "multi_task/unreal_mazes"
SEEDS = (100, 101, 102, 103, 104)
THRESHOLD = 0.8  # of the episodes; always finding the goal is 1
SOLVED = 0.95
WINDOW = 40_000  # env steps: more than the first episode of every copy takes
EVERY = 20_000  # env steps between the points of a curve

MAZE: dict[str, Any] = {"id": "stillhouse/Maze-v0", "options": {"size": 11}, "max_episode_steps": 100}
SETTINGS: dict[str, Any] = {
    "algorithm": "unreal",
    "env_steps": 1_200_000,
    "learning_rate": 3e-3,
    "learning_rate_decay": False,
}
WEIGHTS = {"pixel_control": 0.01, "reward_prediction": 1.0, "value_replay": 1.0}
ARMS: dict[str, tuple[str, ...]] = {"plain": (), **{task: (task,) for task in WEIGHTS}, "all": tuple(WEIGHTS)}
ORDER = ("all", "reward_prediction", "value_replay", "pixel_control", "plain")  # in tables


def settings(arm: str) -> dict[str, Any]:
    """An arm's settings."""
    return SETTINGS | {f"{task}_weight": WEIGHTS[task] * (task in ARMS[arm]) for task in WEIGHTS}


def run(arm: str, seed: int) -> dict[str, Any]:
    """One training."""
    environment = EnvironmentConfig(**MAZE | {"options": MAZE["options"] | {"layout_seed": seed}})
    learner: Any = make_learner(settings(arm), "maze", environment, seed)
    learner.recent_returns = deque()  # all of them, taken away as they come
    began = time.process_time()
    ended: deque[tuple[int, list[float]]] = deque()
    times: list[int] = []
    curve: list[float] = []
    for _ in learner.train():
        now = learner.env_steps
        ended.append((now, list(learner.recent_returns)))
        learner.recent_returns.clear()
        while ended[0][0] <= now - WINDOW:
            ended.popleft()
        if now >= WINDOW:
            times.append(now)
            curve.append(float(np.mean([value for _, returns in ended for value in returns] or [0.0])))
            if curve[-1] >= SOLVED:
                break
    reached = [now for now, value in zip(times, curve, strict=True) if value >= THRESHOLD]
    points = np.interp(np.arange(WINDOW, SETTINGS["env_steps"] + 1, EVERY), times, curve)
    return {
        "arm": arm,
        "seed": seed,
        "steps_to_threshold": reached[0] if reached else None,
        "env_steps": times[-1],
        "area": float(points.mean()),
        "processor_seconds": time.process_time() - began,
        "curve": [round(float(value), 4) for value in points],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By arm; a run that never got there counts with infinitely many steps."""
    steps = {
        arm: np.array([[one["steps_to_threshold"] or np.inf] for one in runs if one["arm"] == arm])
        for arm in ARMS
    }
    areas = {arm: np.array([[one["area"]] for one in runs if one["arm"] == arm]) for arm in ARMS}
    arms = {}
    for arm in ARMS:
        ratios = stratified_bootstrap(_ratio, steps["plain"], steps[arm], seed=0)
        arms[arm] = {
            "median_steps": _plain(np.median(steps[arm])),
            "speed_up": _plain(_ratio(steps["plain"], steps[arm])),
            "speed_up_interval": [_plain(bound) for bound in interval(ratios)],
            "mean_area": float(areas[arm].mean()),
            "probability_of_fewer_steps": float(probability_of_improvement(-steps[arm], -steps["plain"])),
            "probability_of_larger_area": float(probability_of_improvement(areas[arm], areas["plain"])),
            "processor_seconds": float(
                np.median([one["processor_seconds"] for one in runs if one["arm"] == arm])
            ),
        }
    return arms


def _ratio(plain: np.ndarray, arm: np.ndarray) -> np.ndarray:
    """How many times fewer steps in the median than the plain agent, [..., S, 1] each -> [...]."""
    return np.asarray(np.median(plain, axis=(-2, -1)) / np.median(arm, axis=(-2, -1)))


def _plain(value: Any) -> float | None:
    """A number for JSON, which has no infinity."""
    return float(value) if np.isfinite(value) else None


def _with_interval(arm: dict[str, Any]) -> str:
    """How many times fewer steps than the plain agent, with its interval, as text."""
    if not arm["speed_up"]:
        return "–"
    low, high = arm["speed_up_interval"]
    if low is None:
        return f"{arm['speed_up']:.2f}"
    return f"{arm['speed_up']:.2f} [{low:.2f}, {f'{high:.2f}' if high else '∞'}]"


def table(arms: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = [
        "| arm | median env steps to 0.8 | times fewer than plain | mean area under the curve | processor seconds |",
        "|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        steps = f"{arm['median_steps']:,.0f}" if arm["median_steps"] else "never"
        lines.append(
            f"| {name} | {steps} | {_with_interval(arm)} | {arm['mean_area']:.3f} | {arm['processor_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def study(runs: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """The runs of all arms and seeds as a study; ``about``: what they were made on and by."""
    found = summary(runs)
    seeds = sorted({one["seed"] for one in runs})
    arms: dict[str, Any] = {}
    for name in ORDER:
        own = sorted((one for one in runs if one["arm"] == name), key=lambda one: one["seed"])
        steps = found[name]["median_steps"]
        arms[name] = {
            "scores": [[round(one["area"], 4)] for one in own],
            "extra": {
                "median_env_steps_to_0.8": f"{steps:,.0f}" if steps else "never",
                "times_fewer_than_plain": _with_interval(found[name]),
                "probability_of_fewer_steps_than_plain": found[name]["probability_of_fewer_steps"],
                "processor_seconds": round(found[name]["processor_seconds"]),
                "env_steps_to_0.8": [one["steps_to_threshold"] for one in own],
                "env_steps": [one["env_steps"] for one in own],
                "curves": [one["curve"] for one in own],
            },
        }
    return {
        "study": NAME.rpartition("/")[2],
        "question": question(),
        "provenance": about,
        "environments": ["maze"],
        "seeds": seeds,
        "order": list(ORDER),
        "arms": arms,
        "notes": notes(runs),
    }


def question() -> str:
    return (
        f"A maze of {MAZE['options']['size']} by {MAZE['options']['size']} cells with a reward of 1 at the goal alone, {MAZE['max_episode_steps']} env steps an episode, a "
        f"maze of its own for every seed: which of UNREAL's auxiliary tasks make it faster to learn? All arms have the same settings; plain is IMPALA "
        f"alone. A score is the area under the learning curve over {SETTINGS['env_steps']:,} env steps: the share of the episodes in training that found the "
        f"goal, over the last {WINDOW:,} env steps. A run ends when that comes to {SOLVED:g}, and counts with it from there on."
    )


def notes(runs: list[dict[str, Any]]) -> list[str]:
    """What the numbers say."""
    never = {
        name: sum(one["steps_to_threshold"] is None for one in runs if one["arm"] == name) for name in ORDER
    }
    unsolved = ", ".join(f"{name} {count}" for name, count in never.items() if count) or "none"
    each = len(runs) // len(ORDER)
    return [
        f"Runs, of {each} an arm, that never came to {THRESHOLD:g}: {unsolved}. They count with infinitely many env steps. How many times fewer is the ratio of "
        "the medians over the seeds, with a 95 % bootstrap interval; none is given where in some resamples neither median is finite."
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    arguments = parser.parse_args()
    use_one_core()
    runs = []
    for seed in arguments.seeds:
        for arm in arguments.arms:
            path = arguments.work / f"{arm}-s{seed}.json"
            told = {"settings": settings(arm), "maze": MAZE}
            kept = json.loads(path.read_text()) if path.is_file() else {}
            if kept.get("told") != told:
                kept = {"told": told, "run": run(arm, seed)}
                arguments.work.mkdir(parents=True, exist_ok=True)
                write_json(path, kept)
            runs.append(kept["run"])
            shown = {name: value for name, value in kept["run"].items() if name != "curve"}
            print(json.dumps(shown), flush=True)
    if set(arguments.arms) == set(ARMS):
        arms = summary(runs)
        print(table(arms))
        if arguments.seeds == list(SEEDS):
            found = Study.model_validate(study(runs, provenance()))
            save(NAME, found.model_dump(mode="json"))


if __name__ == "__main__":
    main()
