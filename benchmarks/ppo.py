"""PPO against stable-baselines3's on CartPole-v1: env steps per second, learning included, and the final greedy return.

    python -m benchmarks.ppo                            # makes an environment for stable-baselines3 first
    python -m benchmarks.ppo --peer path/to/bin/python  # with one that exists

Both learn with the same settings: 8 copies, rollouts of 128 steps, actor and critic of two layers of 64 units each, ReLU
(stable-baselines3's default is tanh), its default coefficients; at its default batch (64 transitions, 10 passes) and at a
larger one (256, 4 passes). The runs are interleaved, in processes of one thread on one core, and timed in processor seconds,
which a busy machine distorts less than wall time; both are kept. stable-baselines3 steps its copies one by one, stillhouse
takes Gymnasium's own vectorised CartPole: that is part of what is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import RESULTS, provenance, save
from stillhouse.agents import make_learner
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.evaluation.rollouts import evaluate

PEER = "stable-baselines3==2.9.2"
TORCH = "torch==2.13.0"
SETTINGS: dict[str, Any] = {
    "environment": "CartPole-v1",
    "env_steps": 100_000,
    "num_envs": 8,
    "rollout_length": 128,
    "learning_rate": 3e-4,
    "gamma": 0.99,
    "trace": 0.95,
    "clip_range": 0.2,
    "entropy_coefficient": 0.0,
    "value_coefficient": 0.5,
    "max_gradient_norm": 0.5,
    "widths": [64, 64],
    "episodes": 100,
}
# case: batch size, passes over each rollout, seeds
CASES = {"batch 64, 10 passes": (64, 10, 5), "batch 256, 4 passes": (256, 4, 3)}


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """One run of ours."""
    shared = {
        "env_steps",
        "num_envs",
        "rollout_length",
        "epochs",
        "learning_rate",
        "gamma",
        "trace",
        "clip_range",
        "entropy_coefficient",
        "value_coefficient",
        "max_gradient_norm",
    }
    first, *torso = settings["widths"]
    ours = {name: settings[name] for name in shared} | {
        "algorithm": "ppo",
        "minibatches": settings["num_envs"] * settings["rollout_length"] // settings["batch_size"],
        "learning_rate_decay": False,
        "critic": "separate",
        "network": {"features": first, "torso": torso},
    }
    environment = EnvironmentConfig(id=settings["environment"])
    learner = make_learner(ours, "cartpole", environment, settings["seed"])
    wall, processor = time.perf_counter(), time.process_time()
    for _ in learner.train():
        pass
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    returns = evaluate(learner.outputs, environment, settings["episodes"], settings["seed"]).returns
    return {
        "env_steps": learner.env_steps,
        "wall_seconds": wall,
        "processor_seconds": processor,
        "mean_return": float(returns.mean()),
    }


def make_peer(folder: Path) -> Path:
    """An environment with stable-baselines3 in ``folder``; its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    for requirement in (TORCH, PEER):
        subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True)
    return python


def run(command: list[str | Path], settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON that ``command`` prints when given the settings."""
    done = subprocess.run(
        [*command, json.dumps(settings)], check=True, capture_output=True, text=True, env=_one_thread()
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def compare(case: str, python: Path) -> dict[str, Any]:
    """All seeds of a case, ours and theirs in turn."""
    batch_size, epochs, seeds = CASES[case]
    runs: dict[str, list[dict[str, Any]]] = {"stillhouse": [], "stable-baselines3": []}
    script = Path(__file__).with_name("ppo_stable_baselines3.py")
    for seed in range(seeds):
        settings = SETTINGS | {"batch_size": batch_size, "epochs": epochs, "seed": seed}
        runs["stillhouse"].append(run([sys.executable, "-m", "benchmarks.ppo", "--one"], settings))
        runs["stable-baselines3"].append(run([python, script], settings))
        print(case, f"seed {seed}", {name: results[-1] for name, results in runs.items()}, flush=True)
    speed = {
        kind: {
            name: [result["env_steps"] / result[f"{kind}_seconds"] for result in results]
            for name, results in runs.items()
        }
        for kind in ("processor", "wall")
    }
    ratios = {
        kind: [
            ours / theirs
            for ours, theirs in zip(speeds["stillhouse"], speeds["stable-baselines3"], strict=True)
        ]
        for kind, speeds in speed.items()
    }
    return {
        "runs": runs,
        "env_steps_per_second": {
            name: round(float(np.median(values))) for name, values in speed["processor"].items()
        },
        "ratio": {kind: round(float(np.median(values)), 2) for kind, values in ratios.items()},
        "ratio_range": {
            kind: [round(min(values), 2), round(max(values), 2)] for kind, values in ratios.items()
        },
        "mean_returns": {
            name: [result["mean_return"] for result in results] for name, results in runs.items()
        },
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# PPO",
        "",
        "CartPole-v1, 100,000 env steps, 8 copies × 128 steps, the same settings for both; made by `python -m benchmarks.ppo` from "
        "`ppo.json`, which holds the settings, every run, the commit and the machine. Speed includes learning, in processor "
        "seconds of one core, median over seeds; the ratio is that of the two interleaved runs of a seed, median [lowest, "
        "highest]. Returns are greedy means over 100 test episodes of the last network, one per seed.",
        "",
        "| case | stillhouse, env steps/s | stable-baselines3 2.9.2 | ratio | in wall time | returns, stillhouse | returns, stable-baselines3 |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        result = results["cases"][case]
        speed, ratio, bounds = result["env_steps_per_second"], result["ratio"], result["ratio_range"]
        returns = {
            name: ", ".join(f"{value:.0f}" for value in values)
            for name, values in result["mean_returns"].items()
        }
        lines.append(
            f"| {case} | {speed['stillhouse']:,} | {speed['stable-baselines3']:,} | {ratio['processor']} {bounds['processor']} | "
            f"{ratio['wall']} {bounds['wall']} | {returns['stillhouse']} | {returns['stable-baselines3']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path, help="a Python that has stable-baselines3 2.9.2")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        torch.set_num_threads(1)
        print(json.dumps(train(json.loads(arguments.one))))
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the runs inherit it
    with tempfile.TemporaryDirectory() as folder:
        python = arguments.peer or make_peer(Path(folder))
        results = {
            "settings": SETTINGS,
            "peer": PEER,
            "cases": {case: compare(case, python) for case in CASES},
            "provenance": provenance(),
        }
    save("ppo", results)
    (RESULTS / "ppo.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
