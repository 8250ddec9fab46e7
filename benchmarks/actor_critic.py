"""IMPALA's two claims at the scale of a core: V-trace bears an actor that is behind, PopArt bears rewards of any size.

    python -m benchmarks.actor_critic vtrace_lag --work .stillhouse/study/actor_critic     # about 20 minutes on one core
    python -m benchmarks.actor_critic popart_scales --work .stillhouse/study/actor_critic  # about 15

``vtrace_lag``: MinAtar Breakout, with an actor that is not behind and with one 16 updates behind, by each correction. ``popart_scales``:
one network learns three environments whose rewards are multiplied by 0.01, 1 and 100, with and without PopArt, beside an expert on
each alone with its own rewards. The last network is judged, over 100 greedy test episodes. Settings were chosen on seeds 0 and 1. A
run is kept as a JSON file in ``--work``, so that an interrupted study goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import provenance, save
from stillhouse.agents import make_learner
from stillhouse.config import parse
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.evaluation.rollouts import evaluate
from stillhouse.evaluation.statistics import normalised_score
from stillhouse.files import write_json
from stillhouse.multi_task.hard_sharing import HardSharingConfig, hard_sharing
from stillhouse.processor import use_one_core
from tasks.studies import Study

SEEDS = (100, 101, 102, 103, 104)
EPISODES = 100

LAG: dict[str, Any] = {"algorithm": "impala", "env_steps": 1_000_000, "learning_rate": 5e-4}
LAGS: dict[str, dict[str, Any]] = {
    "V-trace, no lag": {"policy_lag": 0, "correction": "vtrace"},
    "V-trace, 16 behind": {"policy_lag": 16, "correction": "vtrace"},
    "one-step correction, 16 behind": {"policy_lag": 16, "correction": "one_step"},
    "no correction, 16 behind": {"policy_lag": 16, "correction": "none"},
    "no correction, no lag": {"policy_lag": 0, "correction": "none"},
}
BREAKOUT = {"breakout": EnvironmentConfig(id="MinAtar/Breakout-v0")}

SCALES: dict[str, Any] = {
    "algorithm": "impala",
    "env_steps": 150_000,
    "num_envs": 32,
    "epochs": 4,
    "minibatches": 8,
}
NETWORK = {"features": 128, "torso": [128], "layer_norm": True}
CLASSIC = {
    "cartpole": EnvironmentConfig(id="CartPole-v1"),
    "acrobot": EnvironmentConfig(id="Acrobot-v1"),
    "cartpole-long": EnvironmentConfig(id="stillhouse/CartPole-v1", options={"pole_length": 1.0}),
}
REWARD_SCALES = {"cartpole": 0.01, "acrobot": 1.0, "cartpole-long": 100.0}


def judged(policies: dict[str, Any], environments: dict[str, EnvironmentConfig], seed: int) -> list[float]:
    """Mean test return of the policy of every environment."""
    return [
        round(float(evaluate(policies[name], config, EPISODES, seed).returns.mean()), 4)
        for name, config in environments.items()
    ]


def random_returns(environments: dict[str, EnvironmentConfig], seed: int) -> list[float]:
    """Mean test return of random play."""
    return [
        round(float(evaluate(lambda _: np.zeros(0), config, EPISODES, seed, epsilon=1.0).returns.mean()), 4)
        for config in environments.values()
    ]


def alone(
    settings: dict[str, Any], environments: dict[str, EnvironmentConfig], seed: int
) -> dict[str, list[float]]:
    """A network on each environment by itself: its test return, and the mean of its last 100 training episodes."""
    policies, training = {}, []
    for name, config in environments.items():
        learner = make_learner(settings, name, config, seed)
        for _ in learner.train():
            pass
        policies[name] = learner.outputs
        training.append(round(float(np.mean(learner.recent_returns)), 4))
    return {"returns": judged(policies, environments, seed), "training": training}


def together(settings: dict[str, Any], seed: int) -> dict[str, list[float]]:
    """One network on the three environments, with rewards of three sizes."""
    config = parse(HardSharingConfig, {"network": NETWORK, "reward_scales": REWARD_SCALES})
    joint = hard_sharing(config, settings, CLASSIC, seed)
    for _ in joint.train():
        pass
    policies = {name: learner.outputs for name, learner in joint.learners.items()}
    training = [round(float(np.mean(learner.recent_returns)), 4) for learner in joint.learners.values()]
    return {"returns": judged(policies, CLASSIC, seed), "training": training}


def runs_of(study: str, seed: int) -> dict[str, Any]:
    """What is run for a seed: name to settings and a function without arguments."""
    if study == "vtrace_lag":
        return {
            arm: (LAG | lag, lambda lag=lag: alone(LAG | lag, BREAKOUT, seed)) for arm, lag in LAGS.items()
        } | {"random": ({}, lambda: {"returns": random_returns(BREAKOUT, seed)})}
    expert = SCALES | {"popart": True, "network": NETWORK}
    return {
        "experts": (expert, lambda: alone(expert, CLASSIC, seed)),
        "random": ({}, lambda: {"returns": random_returns(CLASSIC, seed)}),
    } | {
        arm: (settings, lambda settings=settings: together(settings, seed))
        for arm, settings in (("PopArt", SCALES | {"popart": True}), ("unnormalised", SCALES))
    }


def measure(study: str, seeds: list[int], work: Path) -> dict[str, dict[int, dict[str, list[float]]]]:
    """All runs, those of before from their files: arm to seed to what it reached."""
    found: dict[str, dict[int, dict[str, list[float]]]] = {}
    for seed in seeds:
        for arm, (settings, run) in runs_of(study, seed).items():
            path = work / study / f"{arm.replace(' ', '-').replace(',', '')}-s{seed}.json"
            kept = json.loads(path.read_text()) if path.is_file() else {}
            if kept.get("settings") != settings:
                kept = {"settings": settings, **run()}
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, kept)
            found.setdefault(arm, {})[seed] = kept
            print(study, seed, arm, kept["returns"], kept.get("training"), flush=True)
    return found


QUESTIONS = {
    "vtrace_lag": (
        f"MinAtar Breakout by IMPALA, {LAG['env_steps']:,} env steps: what is left when the actor's policy is the learner's of 16 updates ago? A "
        "score is 1 for V-trace without lag on the same seed. One rollout is 16 updates, so that even without lag the last update of a "
        "rollout sees actions of 15 updates ago."
    ),
    "popart_scales": (
        f"One network learns three environments, {SCALES['env_steps']:,} env steps of each, whose rewards are multiplied by "
        f"{', '.join(f'{scale:g} ({name})' for name, scale in REWARD_SCALES.items())}. A score is 1 for an expert that learns the environment "
        "alone, with its own rewards and the same settings."
    ),
}


def as_study(name: str, seeds: list[int], found: dict[str, dict[int, dict[str, list[float]]]]) -> Study:
    """The form of committed results."""
    reference = "V-trace, no lag" if name == "vtrace_lag" else "experts"
    environments = list(BREAKOUT if name == "vtrace_lag" else CLASSIC)
    returns = {
        arm: np.array([runs[seed]["returns"] for seed in seeds], np.float64) for arm, runs in found.items()
    }
    random, teacher = returns.pop("random"), returns[reference]
    if name == "popart_scales":
        returns.pop("experts")
    unlearnt = [
        f"{environments[column]} on seed {seeds[row]}" for row, column in np.argwhere(~(teacher > random))
    ]
    arms = {
        arm: {
            "returns": matrix.tolist(),
            "scores": [
                [None if np.isnan(score) else round(float(score), 5) for score in row]
                for row in normalised_score(matrix, random, teacher)
            ],
            "extra": {"training": [found[arm][seed]["training"] for seed in seeds]},
        }
        for arm, matrix in returns.items()
    }
    return Study.model_validate(
        {
            "study": name,
            "question": QUESTIONS[name],
            "environments": environments,
            "seeds": seeds,
            "arms": arms,
            "order": list(arms),
            "reference": {"random": random.tolist(), "teacher": teacher.tolist()},
            "notes": [f"{reference} learnt nothing in {'; '.join(unlearnt)}: no score is defined there."]
            if unlearnt
            else [],
            "provenance": provenance(),
        }
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=QUESTIONS)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    given = parser.parse_args()
    use_one_core()
    found = measure(given.study, given.seeds, given.work)
    if given.seeds == list(SEEDS):
        save(f"multi_task/{given.study}", as_study(given.study, given.seeds, found).model_dump(mode="json"))


if __name__ == "__main__":
    main()
