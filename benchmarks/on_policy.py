"""Who should act in on-policy distillation, and how fresh should the data be: single students of 7 % of a teacher on three games.

    python -m benchmarks.on_policy --work FOLDER    # where benchmarks.policy_distillation left teachers and datasets
    python -m benchmarks.on_policy --page           # the table from the results alone

A result is kept per arm, game and seed, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import RESULTS, load, provenance, save
from benchmarks.policy_distillation import environment, teacher_network
from stillhouse.datasets.reader import Dataset
from stillhouse.distillation.offline import Distillation, DistillationConfig
from stillhouse.distillation.on_policy import OnPolicyConfig, OnPolicyDistillation
from stillhouse.evaluation.rollouts import evaluate, network_policy
from stillhouse.evaluation.statistics import geometric_mean
from stillhouse.processor import use_one_core

NAME = "on_policy"
GAMES = ("asterix", "breakout", "space-invaders")
SEEDS = (100, 101, 102)
EPISODES = 64
INTERVAL = 500
SETTINGS: dict[str, Any] = {
    "loss": "kl",
    "temperature": 0.1,
    "batch_size": 256,
    "updates": 4000,
    "evaluation_interval": INTERVAL,
    "patience": 0,
    "size": {"conv_channels": 16, "features": 128, "torso": (), "layer_norm": True},
    "parameter_fraction": 0.07,
}
TEACHER_ACTS = {"teacher_share": 1.0, "teacher_share_end": 1.0, "epsilon": 0.05}
# arm: what it is, and its settings
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "offline": ("a fixed dataset of 100,000 transitions of the teacher's play", {"method": "offline"}),
    "teacher": ("the teacher acts, with 5 % random actions, and its play is always fresh", TEACHER_ACTS),
    "mixed": ("the teacher's share falls from 1 to 0 over half of the updates", {"teacher_share": 1.0}),
    "student": ("the student acts (the default)", {}),
    "student, random 5 %": ("the same with 5 % random actions", {"epsilon": 0.05}),
    "student, fresh": (
        "the student acts, and only its last 10,000 transitions are kept",
        {"capacity": 10_000},
    ),
    "student, more play": ("one update per step of the 64 copies instead of two", {"updates_per_step": 1}),
    "expected entropy": ("objective `expected_entropy`", {"objective": "expected_entropy"}),
    "expected entropy, c = 1": (
        "the same with the whole policy gradient",
        {"objective": "expected_entropy", "expected_entropy": {"correction": 1.0}},
    ),
}


def measure(folder: Path, arm: str, game: str, seed: int) -> dict[str, Any]:
    """One student: normalised validation score after every interval, env steps taken."""
    network = teacher_network(folder, game, seed)

    def played(policy: Any, epsilon: float = 0.0) -> float:
        episodes = evaluate(
            policy, environment(game), EPISODES, seed, epsilon, num_envs=EPISODES, stream="validation"
        )
        return float(episodes.returns.mean())

    teacher = network_policy(network, game)
    best, random = played(teacher), played(teacher, 1.0)
    settings = {**SETTINGS, "method": "on_policy", **ARMS[arm][1]}
    distillation: Distillation | OnPolicyDistillation
    if settings["method"] == "offline":
        data = {game: Dataset.open(folder / "datasets" / f"{game}-s{seed}")}
        distillation = Distillation(DistillationConfig(**settings), data, seed)
    else:
        distillation = OnPolicyDistillation(
            OnPolicyConfig(**settings), {game: network}, {game: environment(game)}, seed
        )
    curve = []
    for _ in distillation.train():
        student = distillation.training.student(best=False)
        curve.append((played(network_policy(student, game)) - random) / (best - random))
    return {
        "curve": [round(value, 4) for value in curve],
        "env_steps": getattr(distillation, "env_steps", 0),
        "teacher": best,
        "random": random,
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    intervals = SETTINGS["updates"] // INTERVAL
    done = (1, 2, 4, intervals)
    lines = [
        "# Who acts in on-policy distillation",
        "",
        f"Single students of 7 % of a teacher's parameters on {', '.join(GAMES)}; teachers are PQN at 1.5M env steps, seeds "
        f"{SEEDS[0]} to {SEEDS[-1]}. KL at tau {SETTINGS['temperature']}, batches of {SETTINGS['batch_size']}, "
        f"{SETTINGS['updates']:,} updates with a learning rate that falls to 0. Normalised score (random play 0, teacher 1) over "
        f"{EPISODES} greedy validation episodes, geometric mean over games and seeds; in brackets the lowest of the games. "
        "Made by `python -m benchmarks.on_policy` from `on_policy.json`.",
        "",
        "| who acts | "
        + " | ".join(f"{mark * INTERVAL:,} updates" for mark in done)
        + " | updates to 0.95 | env steps |",
        "|---|" + "---|" * (len(done) + 2),
    ]
    for arm, (what, _) in ARMS.items():
        runs = [[results.get(f"{arm}/{game}/{seed}") for seed in SEEDS] for game in GAMES]
        if any(run is None for row in runs for run in row):
            continue
        curves = np.array([[run["curve"] for run in row] for row in runs])  # [games, seeds, intervals]
        games = geometric_mean(curves.transpose(2, 0, 1)[..., None])  # [intervals, games]
        whole = geometric_mean(curves.transpose(2, 0, 1))  # [intervals]
        cells = [f"{whole[mark - 1]:.2f} ({games[mark - 1].min():.2f})" for mark in done]
        reached = np.flatnonzero(whole >= 0.95)
        needed = f"{(reached[0] + 1) * INTERVAL:,}" if len(reached) else "not reached"
        lines.append(f"| {what} | {' | '.join(cells)} | {needed} | {runs[0][0]['env_steps']:,} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder of benchmarks.policy_distillation")
    parser.add_argument("--page", action="store_true", help="write the table only")
    arguments = parser.parse_args()
    if not arguments.page and arguments.work is None:
        parser.error("--work FOLDER or --page is needed")
    use_one_core()
    for seed in SEEDS if not arguments.page else ():
        for arm in ARMS:
            for game in GAMES:
                key = f"{arm}/{game}/{seed}"
                if key in load(NAME):
                    continue
                run = measure(arguments.work, arm, game, seed) | {"provenance": provenance()}
                save(NAME, load(NAME) | {key: run})
                print(key, run["curve"], flush=True)
    (RESULTS / f"{NAME}.md").write_text(table(load(NAME)))


if __name__ == "__main__":
    main()
