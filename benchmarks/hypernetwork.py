"""The hypernetwork on unseen members of a CartPole family, against one common policy and against a teacher for each task.

    nice -n 10 python -m benchmarks.hypernetwork --work FOLDER          # about eight minutes on a free core

Two families: physics alone, and physics with left and right swapped in half of the tasks. A run that was cut off goes on with the next
part. Settings were chosen on seeds below 10. Writes ``benchmarks/results/meta_learning/hypernetwork.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import kept, provenance, save
from stillhouse import seeding
from stillhouse.agents import make_learner
from stillhouse.envs.cartpole_family import environment
from stillhouse.envs.physics import CartPoleFamily
from stillhouse.evaluation.rollouts import evaluate, network_policy
from stillhouse.evaluation.statistics import interval, mean, normalised_score, stratified_bootstrap
from stillhouse.meta.hypernetwork import Hypernetwork, HypernetworkConfig
from stillhouse.processor import use_one_core

NAME = "meta_learning/hypernetwork"
SEEDS = range(100, 105)
TEST_TASKS, EPISODES_OF_DATA, EPISODES = 8, 3, 32
SETTINGS: dict[str, Any] = {"updates": 100, "evaluation_episodes": EPISODES}
# Other ranges than the family's own; the pole's mass does not vary.
RANGES: dict[str, tuple[float, float]] = {
    "pole_length": (0.1, 2.0),
    "force": (2.0, 30.0),
    "gravity": (5.0, 15.0),
    "pole_mass": (0.1, 0.1),
}
FAMILIES = {"physics": False, "physics, sides": True}  # whether sides are swapped
KINDS = {"physics": ("none", "film"), "physics, sides": ("none", "context", "film", "weights")}
TEACHER: dict[str, Any] = {
    "algorithm": "ppo",
    "env_steps": 100_000,
    "num_envs": 32,
    "rollout_length": 32,
    "minibatches": 4,
    "trace": 0.95,
    "reward_scale": 0.1,
    "network": {"features": 32, "torso": [32]},
}


def configured(kind: str, swapped: bool) -> HypernetworkConfig:
    """All settings of one meta-training."""
    return HypernetworkConfig.model_validate(
        {**SETTINGS, "conditioning": kind, "family": {"ranges": RANGES, "swapped": swapped}}
    )


def learn(config: HypernetworkConfig, seed: int) -> dict[str, Any]:
    """One meta-training, judged on the test tasks."""
    learner = Hypernetwork(config, seed)
    for report in learner.train():
        last = report.metrics
    found = learner.evaluate(TEST_TASKS, EPISODES_OF_DATA, seed)
    return {
        "values": found.values.tolist(),
        "random": found.baselines["random"].ravel().tolist(),
        "env_steps": learner.env_steps,
        "parameters": sum(tensor.numel() for tensor in learner.learnt().values()),
        "training_return": last["rollout/return"],
    }


def teach(seed: int) -> list[float]:
    """A PPO teacher of its own for each test task: mean greedy test returns. Swapped tasks are the same by symmetry."""
    tasks = CartPoleFamily(ranges=RANGES).sample("test", TEST_TASKS, seeding.generator(seed, "test tasks"))
    found = []
    for index, task in enumerate(tasks):
        learner = make_learner(TEACHER, "cartpole", environment(task), seeding.derive(seed, "teacher", index))
        for _ in learner.train():
            pass
        policy = network_policy(learner.network, "cartpole")
        found.append(float(evaluate(policy, environment(task), EPISODES, seed).returns.mean()))
    return found


def measure(seed: int, work: Path) -> dict[str, Any]:
    """All parts of a seed: by family and conditioning, and the teachers."""
    judged = {"ranges": RANGES, "tasks": TEST_TASKS, "episodes": EPISODES}
    found: dict[str, Any] = {
        "teacher": kept(work / f"teacher-{seed}.json", {"teacher": TEACHER, **judged}, lambda: teach(seed))
    }
    for family, swapped in FAMILIES.items():
        for kind in KINDS[family]:
            path = work / f"{'sides' if swapped else 'physics'}-{kind}-{seed}.json"
            config = configured(kind, swapped)
            settings = {"config": config.model_dump(mode="json"), "data": EPISODES_OF_DATA, **judged}
            found[f"{family}/{kind}"] = kept(path, settings, lambda config=config: learn(config, seed))
            print(path.name, flush=True)
    return found


def study(runs: list[dict[str, Any]], seeds: list[int], circumstances: dict[str, Any]) -> dict[str, Any]:
    """The committed form of all seeds' results."""
    random = np.array([[np.mean(run[f"{family}/none"]["random"]) for family in FAMILIES] for run in runs])
    teacher = np.array([[np.mean(run["teacher"])] * len(FAMILIES) for run in runs])
    arms: dict[str, Any] = {}

    def add(name: str, families: list[str], returns: np.ndarray, **extra: Any) -> None:
        columns = [list(FAMILIES).index(family) for family in families]
        scores = normalised_score(returns, random[:, columns], teacher[:, columns])
        bounds = [
            interval(stratified_bootstrap(mean, returns[:, [column]], seed=0))
            for column in range(len(families))
        ]
        arms[name] = {
            "environments": families,
            "scores": scores.round(4).tolist(),
            "returns": returns.round(3).tolist(),
            "extra": {
                "mean_returns": returns.mean(0).round(1).tolist(),
                "intervals": np.round(bounds, 1).tolist(),
                **extra,
            },
        }

    add("a teacher for each task", list(FAMILIES), teacher, env_steps_each_task=TEACHER["env_steps"])
    for kind in ("none", "context", "film", "weights"):
        families = [family for family in FAMILIES if kind in KINDS[family]]
        values = np.array([[run[f"{family}/{kind}"]["values"] for family in families] for run in runs])
        first = [run[f"{families[0]}/{kind}"] for run in runs]
        extra = {
            "network_parameters": first[0]["parameters"],
            "env_steps": int(np.mean([each["env_steps"] for each in first])),
        }
        for step in (0,) if kind == "none" else range(EPISODES_OF_DATA + 1):
            name = "one common policy" if kind == "none" else f"{kind}, {step} episodes of data"
            worst = values[..., step].min(axis=2)
            add(
                name,
                families,
                values[..., step].mean(axis=2),
                **extra,
                worst_task=worst.mean(0).round(1).tolist(),
            )
    return {
        "study": "hypernetwork",
        "question": (
            f"CartPole with other physics (half pole length 0.1 to 2 m, force 2 to 30 N, gravity 5 to 15 m/s^2), and the same with left and right swapped in "
            f"half of the tasks: how well are {TEST_TASKS} unseen members played, without and after episodes of data? A score is (x - random) / (teacher - "
            f"random) of mean returns over the tasks, {EPISODES} greedy episodes each; a teacher is PPO on the one task for {TEACHER['env_steps']:,} env steps."
        ),
        "provenance": circumstances,
        "environments": list(FAMILIES),
        "seeds": seeds,
        "arms": arms,
        "order": list(arms),
        "reference": {"random": random.round(4).tolist(), "teacher": teacher.round(4).tolist()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, metavar="FOLDER", help="parts that are done lie there"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(SEEDS), help="others than the study's print only"
    )
    given = parser.parse_args()
    use_one_core()
    given.work.mkdir(parents=True, exist_ok=True)
    circumstances = kept(given.work / "provenance.json", {}, provenance)  # of the commit it began with
    runs = [measure(seed, given.work) for seed in given.seeds]
    result = study(runs, given.seeds, circumstances)
    if given.seeds == list(SEEDS):
        save(NAME, result)
    for name, arm in result["arms"].items():
        print(f"{name:32}", arm["environments"], arm["extra"]["mean_returns"], arm["extra"]["intervals"])


if __name__ == "__main__":
    main()
