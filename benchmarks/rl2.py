"""RL^2 on Bernoulli bandits and random tabular MDPs, beside the classical baselines and the paper's numbers (Duan et al. 2016, tables 1 and 2).

    python -m benchmarks.rl2 --baselines                       # every setting's baselines that have no result yet
    python -m benchmarks.rl2 --only bandits-10-5 --seeds 100 101 102
    python -m benchmarks.rl2 --results --only bandits-10-5     # these settings' committed results from what lies in --work

All runs of a setting and all its baselines meet the same test tasks with the same noise. Settings of baselines are chosen on tasks of their own, by the
grids of the paper's code. A run keeps its training state in --work, and goes on from it when it is called again. Seconds are of the process, on one
core that others may have used too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.machine import load, provenance, save
from stillhouse.checkpoint import load_state, save_state
from stillhouse.envs.bandits import BanditConfig
from stillhouse.envs.tabular import TabularConfig
from stillhouse.files import write_json
from stillhouse.meta import bandit_baselines as bandits
from stillhouse.meta import mdp_baselines as mdps
from stillhouse.meta.rl2 import RL2, RL2Config
from stillhouse.processor import use_one_core

CHOICE_SEED, TEST_SEED = 0, 1000  # of tasks: to choose baselines' settings on, to report
CHOICE_TRIALS, TEST_TRIALS = 2000, 10_000
SAVE_EVERY = 120  # seconds of wall clock

# Random, then the baselines in the paper's order, then RL^2.
BANDITS = ("random", "gittins", "thompson", "optimistic_thompson", "ucb1", "epsilon_greedy", "greedy", "rl2")
MDPS = ("random", "psrl", "opsrl", "ucrl2", "beb", "epsilon_greedy", "greedy", "rl2")
PAPER: dict[str, dict[str, float]] = {
    "bandits-10-5": dict(zip(BANDITS, (5.0, 6.6, 5.7, 6.5, 6.7, 6.6, 6.6, 6.7))),
    "bandits-10-10": dict(zip(BANDITS, (5.0, 6.6, 5.5, 6.2, 6.7, 6.6, 6.6, 6.7))),
    "bandits-100-5": dict(zip(BANDITS, (49.9, 78.3, 74.7, 77.9, 78.0, 75.4, 74.8, 78.7))),
    "bandits-100-10": dict(zip(BANDITS, (49.9, 82.8, 76.7, 81.4, 82.4, 77.4, 77.1, 83.5))),
    "mdps-10": dict(zip(MDPS, (100.1, 138.1, 144.1, 146.6, 150.2, 132.8, 134.8, 156.2))),
    "mdps-25": dict(zip(MDPS, (250.2, 408.8, 425.2, 424.1, 427.8, 377.3, 368.8, 445.7))),
}

# The defaults were found on the first development seed for bandits of 10 pulls; those for longer trials with returns of seed 0 on training tasks, of
# bandits and of MDPs.
LONG: dict[str, Any] = {"memory": 100, "state_action": "joint", "trials": 500, "reward_scale": 0.1}
PULLS: dict[str, Any] = {**LONG, "trace": 0.9, "entropy_coefficient": 0.05}
MDP: dict[str, Any] = {**LONG, "width": 128, "trace": 0.5, "entropy_coefficient": 0.1, "minibatches": 32}
SETTINGS: dict[str, RL2Config] = {
    "bandits-10-5": RL2Config(family=BanditConfig(arms=5, episodes=10)),
    "bandits-10-10": RL2Config(family=BanditConfig(arms=10, episodes=10)),
    "bandits-100-5": RL2Config(family=BanditConfig(arms=5, episodes=100), updates=500, **PULLS),
    "bandits-100-10": RL2Config(family=BanditConfig(arms=10, episodes=100), updates=600, **PULLS),
    "mdps-10": RL2Config(family=TabularConfig(episodes=10), updates=350, **MDP),
    "mdps-25": RL2Config(
        family=TabularConfig(episodes=25), updates=350, curriculum=0.6, **{**MDP, "width": 256, "memory": 250}
    ),
}

Run = Callable[[int, int, Literal["train", "test"]], np.ndarray]
"""Trials, seed of the tasks and their split to returns by trial and episode."""


def bandit_methods(family: BanditConfig) -> dict[str, dict[str, Run]]:
    """Every baseline's grid: settings' names to what runs them."""
    episodes = family.episodes

    def run(name: str, scores: bandits.Scores) -> Run:
        return lambda trials, seed, split: bandits.play(scores, family, trials, episodes, seed, name, split)

    tenths = [round(0.1 * step, 1) for step in range(11)]
    return {
        "random": {"": run("random", bandits.uniform)},
        "greedy": {"": run("greedy", bandits.greedy)},
        "epsilon_greedy": {
            f"epsilon={each}": run("epsilon_greedy", bandits.epsilon_greedy(each)) for each in tenths
        },
        "thompson": {"": run("thompson", bandits.thompson)},
        "optimistic_thompson": {
            f"samples={each}": run("optimistic_thompson", bandits.optimistic_thompson(each))
            for each in range(1, 21)
        },
        "ucb1": {f"c={each}": run("ucb1", bandits.ucb1(each)) for each in tenths},
        "gittins": {"": run("gittins", bandits.gittins(episodes))},
        "gittins_discounted": {
            f"discount={each}": run("gittins_discounted", bandits.gittins_discounted(each, episodes))
            for each in (0.9, 0.99, 0.999, 0.9999)
        },
    }


def mdp_methods(family: TabularConfig) -> dict[str, dict[str, Run]]:
    """The same, of MDPs; ``*_informed`` have the prior that the tasks' rewards are drawn from, with mean 1."""
    episodes = family.episodes

    def run(name: str, plan: mdps.Plan, epsilon: float = 0.0) -> Run:
        return lambda trials, seed, split: mdps.play(
            plan, family, trials, episodes, seed, name, epsilon, split
        )

    scalings = np.geomspace(1e-4, 1, 21)
    return {
        "random": {"": run("random", mdps.greedy, 1.0)},
        "greedy": {"": run("greedy", mdps.greedy)},
        "epsilon_greedy": {
            f"epsilon={each / 10}": run("epsilon_greedy", mdps.greedy, each / 10) for each in range(1, 10)
        },
        "psrl": {"": run("psrl", mdps.psrl())},
        "psrl_informed": {"": run("psrl", mdps.psrl(family.mean_reward))},
        # Of the paper's 1 to 20: one in three, for the time that they take.
        "opsrl": {f"samples={each}": run("opsrl", mdps.opsrl(each)) for each in range(2, 21, 3)},
        "beb": {f"scaling={each:.3g}": run("beb", mdps.beb(each)) for each in scalings},
        "beb_informed": {
            f"scaling={each:.3g}": run("beb", mdps.beb(each, family.mean_reward)) for each in scalings
        },
        "ucrl2": {f"scaling={each:.3g}": run("ucrl2", mdps.ucrl2(each)) for each in scalings},
    }


def run_baselines(work: Path, setting: str) -> None:
    """Choose every baseline's setting, and play the test tasks with it."""
    family = SETTINGS[setting].family
    methods = bandit_methods(family) if isinstance(family, BanditConfig) else mdp_methods(family)
    choice_trials = CHOICE_TRIALS if isinstance(family, BanditConfig) else CHOICE_TRIALS // 4
    for name, grid in methods.items():
        path = work / f"{setting}-{name}.json"
        if path.exists():
            continue
        began = time.process_time()
        tried = {}
        if len(grid) > 1:
            for each, run in grid.items():
                tried[each] = float(run(choice_trials, CHOICE_SEED, "train").sum(1).mean())
        chosen = max(tried, key=lambda each: tried[each]) if tried else ""
        returns = grid[chosen](TEST_TRIALS, TEST_SEED, "test")
        np.save(work / f"{setting}-{name}.npy", returns)
        seconds = time.process_time() - began
        write_json(path, {"setting": chosen, "tried": tried, "seconds": round(seconds, 1)})
        print(setting, name, chosen, f"{returns.sum(1).mean():.3f}  {seconds:.0f} s", flush=True)


def train(work: Path, setting: str, seed: int) -> None:
    """Meta-train from where an earlier call was, and play the test tasks."""
    path = work / f"{setting}-rl2-s{seed}.json"
    config = SETTINGS[setting]
    if path.exists():
        if RL2Config.model_validate(json.loads(path.read_text())["config"]) != config:
            raise SystemExit(f"{path} is of other settings; remove it")
        return
    learner = RL2(config, seed)
    state_path = work / f"{setting}-rl2-s{seed}-state"
    curve: list[list[float]] = []
    seconds = 0.0
    if state_path.exists():
        saved = load_state(state_path)
        if saved["config"] != config.model_dump_json():
            raise SystemExit(f"{state_path} is of other settings; remove it")
        learner.set_state(saved["learner"])
        curve, seconds = saved["curve"], saved["seconds"]
    began, written = time.process_time(), time.monotonic()
    recent: list[float] = []
    for report in learner.train():
        recent.append(report.metrics["rollout/return"])
        if report.done * 50 // report.total > (report.done - 1) * 50 // report.total:
            spent = seconds + time.process_time() - began
            curve.append(
                [report.done, learner.env_steps, learner.episodes, round(float(np.mean(recent)), 4), round(spent, 1)]
            )  # fmt: skip
            print(setting, seed, curve[-1], flush=True)
            recent = []
        if time.monotonic() - written > SAVE_EVERY:
            spent = seconds + time.process_time() - began
            save_state(
                state_path,
                {"config": config.model_dump_json(), "learner": learner.get_state(), "curve": curve, "seconds": spent},
            )  # fmt: skip
            written = time.monotonic()
    seconds += time.process_time() - began
    returns = learner.test_returns(TEST_TRIALS, config.family.episodes, TEST_SEED)
    np.save(work / f"{setting}-rl2-s{seed}.npy", returns)
    write_json(
        path,
        {
            "config": config.model_dump(mode="json"),
            "curve": curve,
            "env_steps": learner.env_steps,
            "seconds": round(seconds, 1),
        },
    )
    print(setting, seed, f"{returns.sum(1).mean():.3f}  {seconds:.0f} s", flush=True)


def statistics(returns: np.ndarray) -> dict[str, Any]:
    """Of returns [trials, episodes]."""
    totals = returns.sum(1)
    return {
        "mean": round(float(totals.mean()), 3),
        "standard_error": round(float(totals.std(ddof=1) / len(totals) ** 0.5), 3),
        "by_episode": [round(float(each), 3) for each in returns.mean(0)],
    }


def collect(work: Path, settings: Iterable[str]) -> dict[str, Any]:
    """All that ``work`` has of these settings."""
    result: dict[str, Any] = {}
    for setting in settings:
        baselines: dict[str, Any] = {}
        totals: dict[str, np.ndarray] = {}
        for path in sorted(work.glob(f"{setting}-*.json")):
            name = path.stem.removeprefix(f"{setting}-")
            returns = np.load(path.with_suffix(".npy"))
            totals[name] = returns.sum(1)
            baselines[name] = {**json.loads(path.read_text()), **statistics(returns)}
        runs = {name: baselines.pop(name) for name in list(baselines) if name.startswith("rl2-s")}
        if runs:
            mine = np.mean([totals[name] for name in runs], axis=0)  # of every task, over the seeds
            for name, baseline in baselines.items():
                gain = mine - totals[name]
                baseline["rl2_gain"] = round(float(gain.mean()), 3)
                baseline["rl2_gain_standard_error"] = round(float(gain.std(ddof=1) / len(gain) ** 0.5), 3)
        if baselines or runs:
            result[setting] = {
                "paper": PAPER[setting],
                "trials": TEST_TRIALS,
                "baselines": baselines,
                "rl2": {name.removeprefix("rl2-s"): run for name, run in runs.items()},
                "rl2_mean": round(float(np.mean([run["mean"] for run in runs.values()])), 3)
                if runs
                else None,
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(".stillhouse/study/rl2"))
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[])
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument("--results", action="store_true")
    arguments = parser.parse_args()
    use_one_core()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.baselines:
        for setting in arguments.only:
            run_baselines(arguments.work, setting)
    for setting in arguments.only:
        for seed in arguments.seeds:
            train(arguments.work, setting, seed)
    if arguments.results:
        about = provenance()  # before anything is written
        for name, kind in (("bandits", "bandits-"), ("tabular_mdps", "mdps-")):
            found = collect(
                arguments.work, [setting for setting in arguments.only if setting.startswith(kind)]
            )
            if found:
                before = load(f"meta_learning/{name}")
                settings = {  # others stay, with the provenance that they had
                    setting: {"provenance": before["provenance"], **result}
                    for setting, result in before.get("settings", {}).items()
                } | {setting: {**result, "provenance": about} for setting, result in found.items()}
                ordered = {setting: settings[setting] for setting in SETTINGS if setting in settings}
                save(f"meta_learning/{name}", {"settings": ordered, "provenance": about})


if __name__ == "__main__":
    main()
