"""PQN's speed: against stable-baselines3's DQN, against the processor's own ceiling, and five teachers on two cores.

    python -m benchmarks.pqn                            # makes an environment for stable-baselines3 first
    python -m benchmarks.pqn --part five                # five teachers of a million env steps, as many at once as cores

Part ``speed``, MinAtar Breakout, learning included, in turn: PQN; stable-baselines3's DQN with the same network (batch 32, an
update every env step, Mnih's way); a product of two 1024 x 1024 float32 matrices, by PyTorch's default and by the kernels
that stillhouse uses. One thread on one core. Times are processor seconds, which a busy machine distorts less than wall time;
both are kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import RESULTS, load, provenance, save
from benchmarks.peers import make_peer, one_thread
from stillhouse.agents import make_learner
from stillhouse.agents.pqn import PQNConfig
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.evaluation.rollouts import evaluate
from stillhouse.processor import use_one_core

PEERS = ("stable-baselines3==2.9.2", "minatar==1.0.15")
GAMES = {
    "asterix": "MinAtar/Asterix-v0",
    "breakout": "MinAtar/Breakout-v0",
    "freeway": "MinAtar/Freeway-v0",
    "seaquest": "MinAtar/Seaquest-v0",
    "space-invaders": "MinAtar/SpaceInvaders-v0",
}
REPETITIONS = 5


def train(game: str, env_steps: int, seed: int) -> dict[str, float]:
    """One run of PQN."""
    environment = EnvironmentConfig(id=GAMES[game])
    learner = make_learner({"algorithm": "pqn", "env_steps": env_steps}, game, environment, seed)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in learner.train():
        pass
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    returns = evaluate(learner.outputs, environment, 100, seed, num_envs=100).returns
    return {
        "env_steps": learner.env_steps,
        "wall_seconds": wall,
        "processor_seconds": processor,
        "mean_return": float(returns.mean()),
    }


def product_speed(precision: str) -> float:
    """GFLOP/s of a 1024 x 1024 x 1024 float32 product, the best of 20."""
    torch.set_float32_matmul_precision(precision)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = np.inf
    for _ in range(20):
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / float(best) / 1e9


def operations_per_env_step(channels: int = 4, actions: int = 6) -> float:
    """Floating-point operations of the network's products, per env step, with PQN's defaults.

    A forward pass to act; in each epoch a forward pass, the gradient of every weight, and of every layer's input but the
    first's.
    """
    config = PQNConfig()
    maps, features = config.network.conv_channels, config.network.features
    convolution = 2 * 64 * maps * 9 * channels
    dense = 2 * 64 * maps * features + 2 * features * actions
    forward, backward = convolution + dense, convolution + 2 * dense
    return forward + config.epochs * (forward + backward)


def one(kind: str) -> dict[str, Any]:
    """One measurement of part ``speed``, in a process of its own."""
    use_one_core()
    if kind == "pqn":
        return train("breakout", 204_800, 0)
    return {"gflops": product_speed("highest" if kind == "default" else "medium")}


def speed(python: Path) -> dict[str, Any]:
    """PQN, DQN and the ceilings in turn."""
    runs: dict[str, list[dict[str, Any]]] = {
        "pqn": [],
        "stable-baselines3 dqn": [],
        "default": [],
        "medium": [],
    }
    script = Path(__file__).with_name("dqn_stable_baselines3.py")
    for _ in range(REPETITIONS):
        for kind, results in runs.items():
            command: list[str | Path] = [sys.executable, "-m", "benchmarks.pqn", "--one", kind]
            if kind.startswith("stable"):
                command = [python, script]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=one_thread())
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(kind, results[-1], flush=True)
    rates = {
        name: [run["env_steps"] / run["processor_seconds"] for run in runs[name]]
        for name in ("pqn", "stable-baselines3 dqn")
    }
    ratios = [a / b for a, b in zip(rates["pqn"], rates["stable-baselines3 dqn"], strict=True)]
    operations = operations_per_env_step()
    shares = {
        kind: float(
            np.median(
                [
                    rate * operations / 1e9 / run["gflops"]
                    for rate, run in zip(rates["pqn"], runs[kind], strict=True)
                ]
            )
        )
        for kind in ("default", "medium")
    }
    return {
        "runs": runs,
        "env_steps_per_second": {name: round(float(np.median(values))) for name, values in rates.items()},
        "ratio": round(float(np.median(ratios)), 1),
        "ratio_range": [round(min(ratios), 1), round(max(ratios), 1)],
        "operations_per_env_step": operations,
        "ceiling_gflops": {
            kind: round(float(np.median([run["gflops"] for run in runs[kind]]))) for kind in shares
        },
        "share_of_ceiling": {kind: round(value, 3) for kind, value in shares.items()},
    }


def teacher(game: str) -> dict[str, float]:
    """One of the five, a million env steps."""
    use_one_core()
    return train(game, 1_000_000, 0)


def five() -> dict[str, Any]:
    """Five teachers, as many at once as there are cores, the slowest games first."""
    order = ["seaquest", "space-invaders", "asterix", "freeway", "breakout"]
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, max_tasks_per_child=1) as pool:
        teachers = dict(zip(order, pool.map(teacher, order), strict=True))
    return {
        "wall_seconds": round(time.perf_counter() - started, 1),
        "processes": os.cpu_count(),
        "teachers": teachers,
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# PQN's speed", "", "Made by `python -m benchmarks.pqn` from `pqn.json`.", ""]
    if "speed" in results:
        found = results["speed"]
        rates, share, ceiling = (
            found["env_steps_per_second"],
            found["share_of_ceiling"],
            found["ceiling_gflops"],
        )
        lines += [
            "MinAtar Breakout, one thread, learning included, median of interleaved runs, in processor seconds:",
            "",
            "| | |",
            "|---|---|",
            f"| PQN, env steps/s | {rates['pqn']:,} |",
            f"| stable-baselines3 2.9.2 DQN, env steps/s | {rates['stable-baselines3 dqn']:,} |",
            f"| ratio [lowest, highest] | {found['ratio']} {found['ratio_range']} |",
            f"| arithmetic | {found['operations_per_env_step'] / 1e6:.2f} MFLOP an env step |",
            f"| share of PyTorch's default 1024 x 1024 product ({ceiling['default']} GFLOP/s) | {share['default']:.0%} |",
            f"| share of the same by the kernels used ({ceiling['medium']} GFLOP/s) | {share['medium']:.0%} |",
            "",
        ]
    if "five" in results:
        found = results["five"]
        returns = ", ".join(f"{name} {run['mean_return']:.1f}" for name, run in found["teachers"].items())
        lines += [
            f"Five teachers of a million env steps, {found['processes']} processes: {found['wall_seconds']} s of wall time. Greedy "
            f"returns: {returns}.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """Measure, or print one measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path, help="a Python that has stable-baselines3 and minatar")
    parser.add_argument("--part", choices=("speed", "five"), action="append")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one)))
        return
    results = load("pqn")
    for part in arguments.part or ("speed", "five"):
        if part == "five":
            results["five"] = {**five(), "provenance": provenance()}
        else:
            cores = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {min(cores)})  # the runs inherit it
            with tempfile.TemporaryDirectory() as folder:
                python = arguments.peer or make_peer(Path(folder), PEERS)
                results["speed"] = {**speed(python), "provenance": provenance()}
            os.sched_setaffinity(0, cores)
        save("pqn", results)
    (RESULTS / "pqn.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
