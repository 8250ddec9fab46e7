"""Aggregation of Breakout agents: averages of weights, with and without alignment, soups, ensembles, and one network distilled from all.

    nice -n 10 python -m benchmarks.aggregation --work FOLDER           # about six minutes on a free core

Four agents of each seed, (a) trained from different initial weights, (b) fine-tuned from one common parent. A run that was cut off
goes on with the next seed. Settings were chosen on seeds below 10. Writes ``benchmarks/results/meta_learning/aggregation.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import provenance, save
from stillhouse import seeding
from stillhouse.agents import continued_settings, make_learner
from stillhouse.datasets.collect import CollectConfig, Teacher, collect
from stillhouse.datasets.reader import Dataset
from stillhouse.distillation.offline import Distillation, DistillationConfig
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.evaluation.rollouts import evaluate, network_policy
from stillhouse.evaluation.statistics import interval, mean, normalised_score, stratified_bootstrap
from stillhouse.files import write_json
from stillhouse.meta.aggregation import AggregationConfig, Validation, aggregate, average
from stillhouse.meta.ensemble import Ensemble
from stillhouse.meta.weight_matching import match_weights
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize, parameter_count
from stillhouse.processor import use_one_core
from stillhouse.types import Policy

NAME = "meta_learning/aggregation"
HEAD, BREAKOUT = "breakout", EnvironmentConfig(id="MinAtar/Breakout-v0")
SEEDS = range(100, 105)
AGENTS = 4
SIZE = NetworkSize(conv_channels=8, features=64, layer_norm=True)
PQN: dict[str, Any] = {
    "algorithm": "pqn",
    "env_steps": 100_000,
    "num_envs": 64,
    "network": SIZE.model_dump(mode="json"),
}
FINE_TUNING_STEPS, FINE_TUNING_RATE = 50_000, 1.0  # env steps; share of the learning rate
EPISODES, VALIDATION_EPISODES = 128, 64
STUDENT = DistillationConfig(loss="kl", updates=2_000, batch_size=128, size=SIZE)
COLLECT = CollectConfig(transitions=20_000)
GROUPS = {"apart": "different initial weights", "parent": "one parent"}
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
ORDER = [
    "single agents (mean of 4)",
    "best of 4 by validation",
    "average",
    "average, aligned",
    "greedy soup",
    "greedy soup, aligned",
    "ensemble, mean policy",
    "ensemble, mean Q-values",
    "ensemble, vote",
    "distilled from the ensemble",
]


def train(seed: int, settings: dict[str, Any], network: MultiTaskNetwork | None = None) -> MultiTaskNetwork:
    """An agent; ``network`` is trained on in place."""
    learner = make_learner(settings, HEAD, BREAKOUT, seed, network=network)
    for _ in learner.train():
        pass
    return learner.network.eval()


def agents(seed: int) -> dict[str, dict[str, MultiTaskNetwork]]:
    """Both groups of a seed; the parent is the first group's first."""
    apart = {f"agent {i}": train(seeding.derive(seed, "agent", i), PQN) for i in range(AGENTS)}
    settings = continued_settings(PQN, FINE_TUNING_STEPS, FINE_TUNING_RATE)
    tuned = {
        f"agent {i}": train(seeding.derive(seed, "fine-tuned", i), settings, copy.deepcopy(apart["agent 0"]))
        for i in range(AGENTS)
    }
    return {"apart": apart, "parent": tuned}


def judge(policy: Policy, seed: int, epsilon: float = 0.0) -> float:
    """Mean greedy test return."""
    return float(evaluate(policy, BREAKOUT, EPISODES, seed, epsilon, num_envs=64).returns.mean())


def observations_of(network: MultiTaskNetwork, seed: int) -> np.ndarray:
    """Some observations of play, on a stream of their own, for calibration."""
    seen: list[np.ndarray] = []
    inner = network_policy(network, HEAD)

    def policy(observations: np.ndarray) -> np.ndarray:
        seen.append(observations.copy())
        return inner(observations)

    evaluate(policy, BREAKOUT, 32, seeding.derive(seed, "calibration"), 0.05, stream="validation")
    return np.concatenate(seen)[:2048]


def distilled(ensemble: Ensemble, seed: int, work: Path) -> MultiTaskNetwork:
    """One network of the agents' size that learnt from what the ensemble saw and thought."""
    teacher = Teacher(ensemble, ensemble.output, "0" * 64, ensemble.parameters)
    folder = work / "dataset"
    for _ in collect(teacher, BREAKOUT, COLLECT, seed, folder):
        pass
    distillation = Distillation(STUDENT, {HEAD: Dataset.open(folder)}, seed)
    for _ in distillation.train():
        pass
    return distillation.student()


def measure_group(networks: Mapping[str, MultiTaskNetwork], seed: int, work: Path) -> dict[str, Any]:
    """All arms on one group of agents: test returns, and what aggregation reported."""
    first, second, *_ = networks.values()
    test = {name: judge(network_policy(network, HEAD), seed) for name, network in networks.items()}
    validation = Validation({HEAD: BREAKOUT}, networks, VALIDATION_EPISODES, seed)
    scores = {name: validation(network) for name, network in networks.items()}
    calibration = observations_of(first, seed)
    returns = {
        "single agents (mean of 4)": float(np.mean(list(test.values()))),
        "best of 4 by validation": test[max(scores, key=lambda name: scores[name])],
    }
    reports = {}
    for label, method in (("average", "uniform_soup"), ("greedy soup", "greedy_soup")):
        for align in (False, True):
            config = AggregationConfig.model_validate(
                {"method": method, "align": align, "episodes": VALIDATION_EPISODES}
            )
            found = aggregate(config, networks, {HEAD: BREAKOUT}, seed)
            name = label + (", aligned" if align else "")
            returns[name] = judge(network_policy(found.network, HEAD), seed)
            reports[name] = found.report
    mean_policy = Ensemble(networks, HEAD, "probabilities", calibration)
    returns["ensemble, mean policy"] = judge(mean_policy, seed)
    returns["ensemble, mean Q-values"] = judge(Ensemble(networks, HEAD, "q_values", calibration), seed)
    returns["ensemble, vote"] = judge(Ensemble(networks, HEAD, "vote", calibration), seed)
    student = distilled(mean_policy, seed, work)
    returns["distilled from the ensemble"] = judge(network_policy(student, HEAD), seed)
    matched = match_weights(first, second, seed).network
    path = {
        key: [judge(network_policy(average([first, other], [a, 1 - a]), HEAD), seed) for a in ALPHAS]
        for key, other in (("plain", second), ("aligned", matched))
    }
    return {"returns": returns, "agents": test, "validation": scores, "reports": reports, "path": path}


def measure(seed: int, work: Path) -> dict[str, Any]:
    """A whole seed."""
    groups = agents(seed)
    policy = network_policy(groups["apart"]["agent 0"], HEAD)
    found = {name: measure_group(networks, seed, work) for name, networks in groups.items()}
    return {
        "random": judge(policy, seed, epsilon=1.0),
        "groups": found,
        "parameters": parameter_count(groups["apart"]["agent 0"]),
    }


def study(runs: list[dict[str, Any]], seeds: list[int], circumstances: dict[str, Any]) -> dict[str, Any]:
    """The committed form of all seeds' results."""
    count = runs[0]["parameters"]

    def matrix(name: str) -> np.ndarray:
        return np.array([[run["groups"][group]["returns"][name] for group in GROUPS] for run in runs])

    random = np.array([[run["random"]] * len(GROUPS) for run in runs])
    single = matrix(ORDER[0])
    arms = {}
    for name in ORDER:
        returns = matrix(name)
        scores = normalised_score(returns, random, single)
        bounds = [
            interval(stratified_bootstrap(mean, returns[:, [column]], seed=0))
            for column in range(len(GROUPS))
        ]
        arms[name] = {
            "scores": scores.round(4).tolist(),
            "returns": returns.round(4).tolist(),
            "parameters": count * (AGENTS if name.startswith("ensemble") else 1),
            "extra": {
                "mean_returns": returns.mean(0).round(3).tolist(),
                "intervals": np.round(bounds, 3).tolist(),
            },
        }
    for name in ORDER[2:6]:
        found = [[run["groups"][group]["reports"][name] for group in GROUPS] for run in runs]
        arms[name]["extra"]["taken"] = [[len(report["taken"]) for report in row] for row in found]
        if name.endswith("aligned"):
            arms[name]["extra"]["distances"] = [
                [
                    [
                        round(float(np.mean([each[key] for each in report["matching"].values()])), 3)
                        for key in ("distance_before", "distance_after")
                    ]
                    for report in row
                ]
                for row in found
            ]
    arms[ORDER[0]]["extra"]["parent"] = [run["groups"]["apart"]["agents"]["agent 0"] for run in runs]
    arms[ORDER[0]]["extra"]["interpolation"] = {
        "alphas": list(ALPHAS),
        **{
            f"{group}, {key}": np.round([run["groups"][group]["path"][key] for run in runs], 3).tolist()
            for group in GROUPS
            for key in ("plain", "aligned")
        },
    }
    return {
        "study": "aggregation",
        "question": (
            f"Four agents of MinAtar Breakout (PQN, {PQN['env_steps']:,} env steps each) from different initial weights, and four that were fine-tuned for "
            f"{FINE_TUNING_STEPS:,} env steps from one of them: what is left of them in one network? A score is (x - random) / (mean of the four agents - "
            f"random), on {EPISODES} greedy test episodes; validation takes {VALIDATION_EPISODES} episodes of another stream."
        ),
        "provenance": circumstances,
        "environments": list(GROUPS.values()),
        "seeds": seeds,
        "arms": arms,
        "order": ORDER,
        "reference": {"random": random.round(4).tolist(), "teacher": single.round(4).tolist()},
    }


def run_all(seeds: list[int], work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    began = work / "provenance.json"  # a run that goes on keeps the commit it began with
    if not began.is_file():
        write_json(began, provenance())
    for seed in seeds:
        path = work / f"seed-{seed}.json"
        if not path.is_file():
            write_json(path, measure(seed, work))
            print(seed, flush=True)
    runs = [json.loads((work / f"seed-{seed}.json").read_text()) for seed in seeds]
    result = study(runs, seeds, json.loads(began.read_text()))
    if seeds == list(SEEDS):
        save(NAME, result)
    for name in ORDER:
        print(
            f"{name:32}",
            result["arms"][name]["extra"]["mean_returns"],
            result["arms"][name]["extra"]["intervals"],
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, metavar="FOLDER", help="seeds that are done lie there"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(SEEDS), help="others than the study's print only"
    )
    given = parser.parse_args()
    use_one_core()
    run_all(given.seeds, given.work)


if __name__ == "__main__":
    main()
