"""Teachers, over seeds, as the suites `classic` and `minatar` train them: the last checkpoint, 100 greedy test episodes.

    python -m benchmarks.teachers                      # every case that has no result yet
    python -m benchmarks.teachers --case cartpole-dqn  # one case, all its seeds

A result is kept per case and seed, so that an interrupted run goes on where it was. `--again` measures anew.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML

from benchmarks.machine import RESULTS, load, provenance, save
from stillhouse.agents import make_learner
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.evaluation.rollouts import evaluate

# Settings were chosen on seeds 0 to 4; they are judged on others.
FIRST_SEED = 100

# case: suite, environment's name there, seeds, what is to be reached, in words and as a check of the returns [S]
CASES: dict[str, tuple[str, str, int, str]] = {
    "cartpole-dqn": ("classic", "cartpole", 10, "at least 9 of 10 seeds at 475 or more"),
    "cartpole-pqn": ("classic", "cartpole-pqn", 10, "at least 9 of 10 seeds at 475 or more"),
    "acrobot-dqn": ("classic", "acrobot-dqn", 5, "mean at least -85"),
    "acrobot-pqn": ("classic", "acrobot", 5, "mean at least -85"),
    "breakout-pqn": ("minatar", "breakout", 3, "mean at least 12"),
}


def seeds_of(case: str) -> range:
    """The case's seeds."""
    return range(FIRST_SEED, FIRST_SEED + CASES[case][2])


def train(case: str, seed: int) -> dict[str, Any]:
    """One teacher from nothing: its greedy return, how long it took, its settings."""
    suite, name, *_ = CASES[case]
    params = YAML(typ="safe").load(Path("params/suites", f"{suite}.yaml").read_text())
    environment = EnvironmentConfig(**params["environments"][name])
    settings = dict(params["train_teacher"][name])
    if case == "breakout-pqn":
        settings["env_steps"] = 1_000_000
    learner = make_learner(settings, name, environment, seed)
    started = time.perf_counter()
    for _ in learner.train():
        pass
    seconds = time.perf_counter() - started
    returns = evaluate(learner.outputs, environment, 100, seed).returns
    return {
        "mean_return": float(returns.mean()),
        "standard_deviation_over_episodes": float(returns.std()),
        "env_steps": learner.env_steps,
        "env_steps_per_second": round(learner.env_steps / seconds),
        "settings": settings,
        "environment": environment.id,
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Teachers",
        "",
        "Greedy return of the last checkpoint over 100 test episodes, one row a case, seeds from 100 on (settings were chosen "
        "on seeds 0 to 4); made by "
        "`python -m benchmarks.teachers` from `teachers.json`, which holds the settings, commit and machine of every run.",
        "",
        "| case | environment | env steps | per seed | mean | env steps/s | to reach | reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, (_, _, seeds, goal) in CASES.items():
        runs = [results[case][str(seed)] for seed in seeds_of(case) if str(seed) in results.get(case, {})]
        if not runs:
            continue
        returns = np.array([run["mean_return"] for run in runs])
        reached = {
            "at least 9 of 10 seeds at 475 or more": (returns >= 475).sum() >= 9,
            "mean at least -85": returns.mean() >= -85,
            "mean at least 12": returns.mean() >= 12,
        }[goal]
        speed = np.median([run["env_steps_per_second"] for run in runs])
        each = ", ".join(f"{value:.1f}" for value in returns)
        done = ("yes" if reached else "no") if len(runs) == seeds else f"{len(runs)} of {seeds} seeds so far"
        lines.append(
            f"| {case} | {runs[0]['environment']} | {runs[0]['settings']['env_steps']:,} | {each} | {returns.mean():.1f} | "
            f"{speed:,.0f} | {goal} | {done} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=list(CASES), action="append")
    parser.add_argument("--again", action="store_true", help="measure anew what has a result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for case in arguments.case or CASES:
        for seed in seeds_of(case):
            if str(seed) in load("teachers").get(case, {}) and not arguments.again:
                continue
            run = train(case, seed) | {"provenance": provenance()}
            results = load("teachers")  # read again: another case may have been measured meanwhile
            results.setdefault(case, {})[str(seed)] = run
            save("teachers", results)
            (RESULTS / "teachers.md").write_text(table(results))
            print(
                f"{case} seed {seed}: {run['mean_return']:.1f}, {run['env_steps_per_second']:,} env steps/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
