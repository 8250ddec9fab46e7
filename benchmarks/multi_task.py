"""Joint networks, over a whole suite: every network beside the experts and what is distilled from them, all seeds' scores.

    python -m benchmarks.multi_task multi-task-classic --work FOLDER
    python -m benchmarks.multi_task multi-task-minatar --work FOLDER

Runs the suite as a user would, in a clone of HEAD below FOLDER, and goes on where a run that was cut off stopped: what is up to
date is not run again. Writes ``benchmarks/results/multi_task/<suite>.json``, from which ``docs/results/multi-task.md`` is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.machine import RESULTS, save
from benchmarks.suites import arguments, run_suite
from stillhouse.evaluation.statistics import normalised_score
from tasks.results import Results, Run, experience
from tasks.studies import Study

QUESTION = (
    "Networks that learn several environments at once, beside experts with as many env steps on each (score 1), and what is "
    "distilled from these."
)


def matrix(results: Results, environments: list[str], pick: Callable[[Run], float]) -> np.ndarray:
    """A number of every evaluation, [seeds, environments]."""
    return np.array(
        [[pick(results.evaluations[name][seed]) for name in environments] for seed in results.seeds]
    )


def arm(results: Results, name: str, joint: bool) -> dict[str, Any]:
    """A network's returns and scores, [seeds][environments]."""
    environments = results.sources(name, joint)
    kind = "joint" if joint else "students"
    returns = matrix(results, environments, lambda run: float(run[kind][name]["greedy"]["mean"]))
    random = matrix(results, environments, lambda run: float(run["random"]["mean"]))
    teacher = matrix(results, environments, lambda run: float(run["teacher"]["greedy"]["mean"]))
    own = results.joint if joint else results.students
    settings = results.settings["train_multi_task"][name] if joint else results.made_by(name)[1]
    extra: dict[str, Any] = {"method": str(settings["method"]).replace("_", " ")}
    if joint:
        extra |= {"balancing": settings.get("balancing", ""), "learner": settings["learner"]["algorithm"]}
        diverged = [run["diverged"] for run in own[name].values() if run.get("diverged")]
        extra |= {"diverged": json.dumps(diverged)} if diverged else {}
    return {
        "environments": environments,
        "returns": returns.round(4).tolist(),
        "scores": [
            [None if np.isnan(score) else round(float(score), 5) for score in row]
            for row in normalised_score(returns, random, teacher)
        ],
        "parameters": results.evaluations[environments[0]][results.seeds[0]][kind][name]["parameters"],
        "extra": extra | {"env_steps": experience(results, name, joint)},
    }


def collect(suite: str, results: Results) -> dict[str, Any]:
    """The suite as a study."""
    environments = sorted(results.evaluations)
    arms = {name: arm(results, name, joint=False) for name in sorted(results.students)}
    arms |= {name: arm(results, name, joint=True) for name in sorted(results.joint)}
    reference = {
        "random": matrix(results, environments, lambda run: float(run["random"]["mean"])),
        "teacher": matrix(results, environments, lambda run: float(run["teacher"]["greedy"]["mean"])),
    }
    return {
        "study": suite.replace("-", "_"),
        "question": QUESTION,
        "environments": environments,
        "seeds": results.seeds,
        "arms": arms,
        "order": list(arms),
        "reference": {name: found.round(4).tolist() for name, found in reference.items()},
    }


def main() -> None:
    """The command line."""
    given = arguments(__doc__)
    _, results, about = run_suite(given.suite, given.work)
    study = Study.model_validate(collect(given.suite, results) | {"provenance": about})
    (RESULTS / "multi_task").mkdir(exist_ok=True)
    save(f"multi_task/{study.study}", study.model_dump(mode="json"))


if __name__ == "__main__":
    main()
