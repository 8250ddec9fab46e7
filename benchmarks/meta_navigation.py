"""MAML for reinforcement learning: how far does one policy gradient step go on a task that training never saw?

    nice -n 10 python -m benchmarks.meta_navigation --work .stillhouse/meta_rl                         # every study, what of it is not there yet
    nice -n 10 python -m benchmarks.meta_navigation --work .stillhouse/meta_rl --study navigation
    nice -n 10 python -m benchmarks.meta_navigation --work .stillhouse/dev --study navigation --seeds 0 1   # development: no result is written

A run is kept as a JSON file in ``--work``, and its training state beside it while it goes on, so that an interrupted study continues
where it was. The last iterate is judged, on test tasks of its own seed; the published numbers are of the best iterate. HalfCheetah needs the
extra ``mujoco``.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import kept, provenance, save
from stillhouse.checkpoint import load_state, save_state
from stillhouse.config import parse
from stillhouse.meta import METHODS
from stillhouse.processor import use_one_core

SEEDS = (100, 101, 102)
STEPS = 3  # updates at test time
SAVE_EVERY = 10  # meta-updates

TRUST_REGION: dict[str, Any] = {
    "curvature_share": 0.1,
    "conjugate_gradients": 5,
    "max_kl": 0.03,
    "damping": 0.01,
}
PAPER_NAVIGATION = [-40.41, -11.68, -3.33, -3.23]
PAPER_CHEETAH = [-50.69, 293.19, 313.48, 315.65]


def navigation(family: str, meta_updates: int, gae_lambda: float) -> dict[str, dict[str, Any]]:
    """The arms on 2D navigation, of equally many episodes in training."""
    common = {
        "family": {"name": family},
        "meta_updates": meta_updates,
        "tasks": 20,
        "rollouts": 20,
        "inner_rate": 0.1,
        "gae_lambda": gae_lambda,
    }
    maml = {"method": "maml_rl", **common, **TRUST_REGION}
    return {
        "maml": maml,
        "maml_ppo": {"method": "maml_rl", **common, "outer": "ppo"},
        "pretrained": {**maml, "inner_steps": 0, "rollouts": 40},
        "reptile": {"method": "reptile_rl", **common, "inner_steps": 2},
    }


def with_pretrained(
    family: dict[str, Any], meta_updates: int, rollouts: int, **settings: Any
) -> dict[str, dict[str, Any]]:
    """MAML, and one policy for all tasks of as many episodes."""
    return {
        name: {
            "method": "maml_rl",
            "family": family,
            "meta_updates": meta_updates,
            "rollouts": rollouts * (2 - inner_steps),
            "inner_steps": inner_steps,
            "inner_rate": 0.1,
            **TRUST_REGION,
            **settings,
        }
        for name, inner_steps in (("maml", 1), ("pretrained", 0))
    }


STUDIES: dict[str, dict[str, Any]] = {
    "navigation": {
        "question": (
            "2D navigation: a point looks for a goal that it is not shown; reward -distance^2, as in the paper's text. Mean return on 40 unseen goals "
            "after 0 to 3 policy gradient updates of 40 episodes each."
        ),
        "arms": navigation("navigation", 30, 1.0),
        "tasks": 40,
        "paper": PAPER_NAVIGATION,
    },
    "navigation_distance": {
        "question": (
            "2D navigation with the reward of the authors' code, -distance. Mean return on 40 unseen goals after 0 to 3 policy gradient updates of 40 "
            "episodes each."
        ),
        "arms": navigation("navigation_distance", 75, 0.95),  # lambda found on seed 0
        "tasks": 40,
        "paper": PAPER_NAVIGATION,
    },
    "cheetah_direction": {
        "question": (
            "HalfCheetah, forwards or backwards, H = 200: mean return of both directions after 0 to 3 policy gradient updates of 40 episodes each. Both "
            "directions are trained on, as in the paper; its simulator is another, so returns cannot be compared, gains by size only."
        ),
        # Found on seed 0: many small meta-updates, and advantages of less variance than the paper's lambda of 1.
        "arms": {
            "maml": {
                "method": "maml_rl",
                "family": {"name": "cheetah_direction"},
                "meta_updates": 300,
                "tasks": 2,
                "rollouts": 20,
                "inner_rate": 0.1,
                "gae_lambda": 0.95,
                **TRUST_REGION,
                "damping": 0.001,
            }
        },
        "tasks": 2,
        "paper": PAPER_CHEETAH,
    },
    "cheetah_velocity": {
        "question": (
            "HalfCheetah at a given speed in [0, 2] m/s, H = 200, reward -|speed - wanted| less 0.05 of the squared action: mean return on 40 unseen "
            "speeds after 0 to 3 policy gradient updates of 40 episodes each."
        ),
        "arms": with_pretrained(
            {"name": "cheetah_velocity"}, 100, 20, tasks=10, gae_lambda=0.95, damping=0.001
        ),
        "tasks": 40,
        "paper": None,  # a curve in the paper, and no table
    },
    "minatar_views": {
        "question": (
            "Space Invaders in ways of seeing that training never saw (order of the planes, flip), episodes of 100 steps: mean return on 40 unseen ways "
            "after 0 to 3 policy gradient updates of 40 episodes each."
        ),
        "arms": with_pretrained(
            {"name": "minatar", "game": "space_invaders", "horizon": 100},
            60,
            10,
            tasks=20,
            gae_lambda=0.95,
            max_kl=0.05,
        ),
        "tasks": 40,
        "paper": None,
    },
    "cartpole_family": {
        "question": (
            "CartPole with other lengths, masses, gravity and push, H = 200: mean return on 40 unseen sets of constants after 0 to 3 policy gradient "
            "updates of 40 episodes each."
        ),
        "arms": with_pretrained({"name": "cartpole"}, 40, 10, tasks=20),
        "tasks": 40,
        "paper": None,
    },
    "cartpole_sides": {
        "question": (
            "CartPole with other lengths, masses, gravity and push, H = 200, and left and right swapped in half of the tasks, which nothing shows before a "
            "push: mean return on 40 unseen tasks after 0 to 3 policy gradient updates of 40 episodes each."
        ),
        "arms": with_pretrained({"name": "cartpole", "swapped": True}, 120, 20, tasks=20),
        "tasks": 40,
        "paper": None,
    },
}


def configured(settings: dict[str, Any]) -> tuple[Any, Any]:
    """The meta-learner's class, and its settings with all defaults."""
    module = importlib.import_module(f"stillhouse.meta.{settings['method']}")
    factory, config_class = METHODS[settings["method"]]
    return getattr(module, factory), parse(getattr(module, config_class), settings)


def run(study: str, arm: str, seed: int, state_folder: Path) -> dict[str, Any]:
    """One training and its evaluation."""
    make, config = configured(STUDIES[study]["arms"][arm])
    learner: Any = make(config, seed)
    curve: list[list[float]] = []
    seconds = 0.0
    if state_folder.exists():
        state = load_state(state_folder)
        if state.get("settings") != config.model_dump(mode="json"):
            raise SystemExit(f"{state_folder} is of other settings; remove it")
        learner.set_state(state["learner"])
        curve, seconds = state["curve"], state["seconds"]
    began = time.process_time() - seconds
    for report in learner.train():
        metrics = report.metrics
        row = [report.done, learner.env_steps, metrics["return/before"], metrics["return/after"]]
        curve.append([round(float(each), 3) for each in row])
        if report.done % SAVE_EVERY == 0 and report.done < report.total:
            seconds = time.process_time() - began
            state = {
                "settings": config.model_dump(mode="json"),
                "learner": learner.get_state(),
                "curve": curve,
                "seconds": seconds,
            }
            save_state(state_folder, state)
            print(study, arm, seed, curve[-1], round(seconds), flush=True)
    seconds = time.process_time() - began
    found = learner.evaluate(STUDIES[study]["tasks"], STEPS, seed)
    return {
        "settings": config.model_dump(mode="json"),
        "returns": found.values.mean(axis=0).round(3).tolist(),
        "by_task": found.values.round(3).tolist(),
        "baselines": {
            name: values.mean(axis=0).round(3).tolist() for name, values in found.baselines.items()
        },
        "env_steps": learner.env_steps,
        "curve": curve,
        "processor_seconds": round(seconds, 1),
    }


def result(study: str, runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """The committed form of a study; a score is the return after one update, one row for each seed."""
    arms: dict[str, Any] = {}
    for arm, by_seed in runs.items():
        returns = np.array([found["returns"] for found in by_seed.values()])
        arms[arm] = {
            "scores": returns[:, [1]].tolist(),
            "extra": {
                "returns": returns.tolist(),
                "mean_returns": returns.mean(axis=0).round(2).tolist(),
                "env_steps": [found["env_steps"] for found in by_seed.values()],
                "processor_seconds": [found["processor_seconds"] for found in by_seed.values()],
                "curves": [found["curve"] for found in by_seed.values()],
                "settings": next(iter(by_seed.values()))["settings"],
            },
        }
    first = next(iter(runs.values()))
    seeds = list(first)
    for name in next(iter(first.values()))["baselines"]:
        returns = np.array([found["baselines"][name] for found in first.values()])
        arms[name] = {
            "scores": returns[:, [min(1, returns.shape[1] - 1)]].tolist(),
            "extra": {"returns": returns.tolist(), "mean_returns": returns.mean(axis=0).round(2).tolist()},
        }
    return {
        "study": study,
        "question": STUDIES[study]["question"],
        "provenance": provenance(),
        "environments": [study],
        "seeds": seeds,
        "order": list(arms),
        "arms": arms,
        "missing": [arm for arm in STUDIES[study]["arms"] if arm not in runs],
        "published": STUDIES[study]["paper"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--study", choices=list(STUDIES), nargs="+", default=list(STUDIES))
    parser.add_argument("--seeds", type=int, nargs="+", help="development seeds: no result is written")
    parser.add_argument("--arms", nargs="+", help="some arms only; the result names those that are missing")
    arguments = parser.parse_args()
    use_one_core()
    for study in arguments.study:
        runs: dict[str, dict[int, dict[str, Any]]] = {}
        for seed in arguments.seeds or SEEDS:
            for arm in arguments.arms or STUDIES[study]["arms"]:
                path = arguments.work / f"{study}-{arm}-{seed}.json"
                config = configured(STUDIES[study]["arms"][arm])[1]
                settings = {
                    "config": config.model_dump(mode="json"),
                    "tasks": STUDIES[study]["tasks"],
                    "steps": STEPS,
                }
                state_folder = path.with_suffix(".state")
                path.parent.mkdir(parents=True, exist_ok=True)
                found = kept(path, settings, lambda: run(study, arm, seed, state_folder))  # noqa: B023 - called at once
                shutil.rmtree(state_folder, ignore_errors=True)
                runs.setdefault(arm, {})[seed] = found
                print(study, arm, seed, runs[arm][seed]["returns"], runs[arm][seed]["baselines"], flush=True)
        if not arguments.seeds:
            save(f"meta_learning/{study}", result(study, runs))


if __name__ == "__main__":
    main()
