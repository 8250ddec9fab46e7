"""Deep Distral on four small mazes learnt at once, beside hard sharing and independent experts, with equal env steps.

    nice -n 10 python -m benchmarks.distral_deep --work .stillhouse/distral            # what is not there yet, then the result
    python -m benchmarks.distral_deep --work .stillhouse/distral --seeds 0 --arms KL_2col   # development: no result is written

Every seed has four mazes of its own, with one goal each and random starts; each of them is a task. All arms have IMPALA with the same
settings, but for one number, which every arm gets the best of three of, on a development seed: Distral's beta, or the weight of the
entropy bonus, with the same costs. A run is kept as a JSON file in ``--work``, so that an interrupted study goes on where it was.

The curve of a task is what training sees anyway: the share of the episodes that ended in the last ``WINDOW`` env steps which found the goal,
actions sampled, from the first full window on. A score is its mean: the area under the curve.
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
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.evaluation.rollouts import evaluate, network_policy
from stillhouse.evaluation.statistics import (
    interval,
    mean,
    probability_of_improvement,
    stratified_bootstrap,
)
from stillhouse.files import write_json
from stillhouse.multi_task.distral import ARMS as FORMS
from stillhouse.multi_task.distral import DistralConfig, distral
from stillhouse.multi_task.hard_sharing import HardSharingConfig, hard_sharing
from stillhouse.multi_task.joint_training import JointTraining
from stillhouse.multi_task.soft_sharing import SoftSharingConfig, soft_sharing
from stillhouse.networks.multi_task import NetworkSize, parameter_count
from stillhouse.processor import use_one_core
from tasks.studies import Study

NAME = "multi_task/distral_deep"
CHOICE_SEEDS, SEEDS = (0,), (100, 101, 102, 103, 104)
TASKS = 4
LIMIT = 50  # env steps of an episode
WINDOW = 12_288  # env steps: more than the first episode of every copy takes
NETWORK = NetworkSize(conv_channels=16, features=64, layer_norm=True)
LEARNER: dict[str, Any] = {
    "algorithm": "impala",
    "env_steps": 102_400,
    "learning_rate": 3e-3,
    "learning_rate_decay": False,
}
HARD, EXPERTS = "hard sharing", "independent experts"
ARMS = ("KL+ent_2col", "KL+ent_1col", "KL_2col", "KL_1col", HARD, EXPERTS)
COSTS = (0.1, 0.03, 0.01)  # 1 / beta, or the weight of the entropy bonus


def mazes(seed: int) -> dict[str, EnvironmentConfig]:
    """The seed's four tasks."""
    return {
        f"maze {number + 1}": EnvironmentConfig(
            id="stillhouse/Maze-v0",
            options={"size": 7, "random_goal": False, "layout_seed": TASKS * seed + number},
            max_episode_steps=LIMIT,
        )
        for number in range(TASKS)
    }


def make(arm: str, cost: float, seed: int) -> JointTraining:
    """An arm's training."""
    if arm == HARD:
        return hard_sharing(
            HardSharingConfig(network=NETWORK), {**LEARNER, "entropy_coefficient": cost}, mazes(seed), seed
        )
    if arm == EXPERTS:
        alone = NETWORK.model_copy(update={"separate": True})
        config = SoftSharingConfig(method="soft_sharing", strength=0.0, network=alone)
        return soft_sharing(config, {**LEARNER, "entropy_coefficient": cost}, mazes(seed), seed)
    settings = {"beta": 1 / cost, "entropy_from_uniform": True, "network": NETWORK, **FORMS[arm]}
    return distral(DistralConfig(method="distral", **settings), LEARNER, mazes(seed), seed)


def run(arm: str, cost: float, seed: int) -> dict[str, Any]:
    """One training of all four tasks."""
    training = make(arm, cost, seed)
    learners: dict[str, Any] = dict(training.learners)
    for learner in learners.values():
        learner.recent_returns = deque()  # all of them, taken away as they come
    began = time.process_time()
    ended: dict[str, deque[tuple[int, list[float]]]] = {name: deque() for name in learners}
    curves: dict[str, list[float]] = {name: [] for name in learners}
    for _ in training.train():
        for name, learner in learners.items():
            now = learner.env_steps
            ended[name].append((now, list(learner.recent_returns)))
            learner.recent_returns.clear()
            while ended[name][0][0] <= now - WINDOW:
                ended[name].popleft()
            if now >= WINDOW:
                found = [value for _, returns in ended[name] for value in returns]
                curves[name].append(round(float(np.mean(found or [0.0])), 4))
    seconds = time.process_time() - began
    networks = {"acting": training.network} | (
        {"distilled": training.distilled} if training.distilled else {}
    )
    greedy = {
        kind: [
            float(evaluate(network_policy(network, name), each, 64, seed, epsilon=0.05).returns.mean())
            for name, each in mazes(seed).items()
        ]
        for kind, network in networks.items()
    }
    return {
        "curves": curves,
        "greedy": greedy,
        "parameters": parameter_count(training.network),
        "processor_seconds": round(seconds, 1),
    }


def kept(work: Path, arm: str, cost: float, seed: int) -> dict[str, Any]:
    """A run: from its file where the settings are the same, else made and written there."""
    path = work / f"{arm.replace(' ', '-')}-{cost:g}-s{seed}.json"
    told = {
        "learner": LEARNER,
        "network": NETWORK.model_dump(mode="json"),
        "mazes": [config.model_dump(mode="json") for config in mazes(seed).values()],
        "window": WINDOW,
    }
    found = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("told") != told:
        found = {"told": told, "run": run(arm, cost, seed)}
        work.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    made: dict[str, Any] = found["run"]
    print(arm, cost, seed, f"{areas(made).mean():.3f}", made["processor_seconds"], flush=True)
    return made


def areas(made: dict[str, Any]) -> np.ndarray:
    """Scores of a run, [tasks]."""
    return np.array([np.mean(curve) for curve in made["curves"].values()])


def ends(made: dict[str, Any]) -> np.ndarray:
    """Shares found in the last tenth of the curves, [tasks]."""
    return np.array([np.mean(curve[-(len(curve) // 10) :]) for curve in made["curves"].values()])


def study(chosen: dict[str, float], tried: dict[str, list[list[float]]], work: Path) -> dict[str, Any]:
    """All arms on the study's seeds."""
    arms: dict[str, Any] = {arm: {} for arm in ARMS}
    runs = {arm: [] for arm in ARMS}  # type: dict[str, list[dict[str, Any]]]
    for seed in SEEDS:
        for arm in ARMS:
            runs[arm].append(kept(work, arm, chosen[arm], seed))
    for arm in ARMS:
        scores = np.array([areas(made) for made in runs[arm]])
        last = np.array([ends(made) for made in runs[arm]])
        low, high = interval(stratified_bootstrap(mean, last, seed=0))
        extra: dict[str, Any] = {
            "cost_per_nat": chosen[arm],
            "last_tenth": f"{last.mean():.3f} [{low:.3f}, {high:.3f}]",
            "curve": np.mean([list(made["curves"].values()) for made in runs[arm]], axis=(0, 1))
            .round(4)
            .tolist(),
            "ends": last.round(4).tolist(),
            "grid": tried[arm],
            "greedy_runs": [made["greedy"]["acting"] for made in runs[arm]],
            "greedy": round(float(np.mean([made["greedy"]["acting"] for made in runs[arm]])), 3),
            "processor_seconds": round(float(np.median([made["processor_seconds"] for made in runs[arm]]))),
        }
        if arm in FORMS:
            extra["distilled_greedy"] = round(
                float(np.mean([made["greedy"]["distilled"] for made in runs[arm]])), 3
            )
        arms[arm] = {
            "scores": scores.round(4).tolist(),
            "parameters": runs[arm][0]["parameters"],
            "extra": extra,
        }
    return {
        "study": NAME.rpartition("/")[2],
        "question": question(),
        "provenance": provenance(),
        "environments": list(mazes(0)),
        "seeds": list(SEEDS),
        "order": list(ARMS),
        "arms": arms,
        "notes": notes(arms),
    }


def question() -> str:
    return (
        f"Four mazes of 7 by 7 cells at a time, of which an agent sees walls, itself and the goal, with a reward of 1 at the goal alone: does a distilled "
        f"policy help to learn them? A score is the area under the learning curve over {LEARNER['env_steps']:,} env steps of each maze: the share of the "
        "episodes in training that found the goal, actions sampled; a seed has mazes of its own. The last tenth is the same share over the last tenth of "
        "the curve; greedy is that of the final policies with 5 % random actions, distilled greedy that of pi_0 alone. Every arm has IMPALA with the "
        f"same settings and the best of three costs per nat ({', '.join(f'{cost:g}' for cost in COSTS)}: Distral's 1/beta, else the weight of the entropy "
        f"bonus), by the area on development seed {', '.join(map(str, CHOICE_SEEDS))}. Where these three lie was decided by looking at KL+ent_2col on that "
        "seed; the learning rate is the same for all, tuned for none."
    )


def notes(arms: dict[str, Any]) -> list[str]:
    """What the numbers say."""
    lines = []
    for other in (EXPERTS, HARD):
        pairs = []
        for name in FORMS:
            x, y = (np.array(arms[each]["scores"]) for each in (name, other))
            low, high = interval(stratified_bootstrap(probability_of_improvement, x, y, seed=0))
            won = int((x.mean(axis=1) > y.mean(axis=1)).sum())
            pairs.append(
                f"{name} {float(probability_of_improvement(x, y)):.3f} [{low:.3f}, {high:.3f}] (larger on {won} of {len(SEEDS)} seeds)"
            )
        lines.append(f"Probability of a larger area than {other}: {'; '.join(pairs)}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="development: these alone")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    arguments = parser.parse_args()
    use_one_core()
    seeds = arguments.seeds or CHOICE_SEEDS
    tried: dict[str, list[list[float]]] = {arm: [[cost] for cost in COSTS] for arm in arguments.arms}
    for seed in seeds:
        for arm in arguments.arms:
            for row in tried[arm]:
                row.append(round(float(areas(kept(arguments.work, arm, row[0], seed)).mean()), 4))
    chosen = {arm: max(rows, key=lambda row: np.mean(row[1:]))[0] for arm, rows in tried.items()}
    print(chosen, flush=True)
    if not arguments.seeds and set(arguments.arms) == set(ARMS):
        found = study(chosen, tried, arguments.work)
        save(NAME, Study.model_validate(found).model_dump(mode="json"))


if __name__ == "__main__":
    main()
