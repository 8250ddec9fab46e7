"""Transfer, over a whole suite: every way and source on every target, with all seeds' curves.

    python -m benchmarks.transfer transfer-classic --work FOLDER     # about half an hour on two cores
    python -m benchmarks.transfer transfer-minatar --work FOLDER     # about an hour

Runs the suite as a user would, in a clone of HEAD below FOLDER, and goes on where a run that was cut off stopped: what is up to
date is not run again. Writes ``benchmarks/results/transfer/<suite>.json``, from which ``docs/results/transfer.md`` is drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
from ruamel.yaml import YAML

from benchmarks.machine import RESULTS, save
from benchmarks.suites import arguments, run_suite
from stillhouse.envs import variants
from tasks.results import Results, Run
from tasks.stage import stage_name, transfer_runs

variants.register()


def run_of(found: Run) -> dict[str, Any]:
    """What the page needs of one stage, short."""
    kept: dict[str, Any] = {
        "env_steps": found["curve"]["env_steps"],
        "returns": [round(value, 4) for value in found["curve"]["mean_return"]],
        "test": round(found["test"]["mean"], 4),
        "parameters": found["parameters"],
    }
    for key in ("retention", "choice", "sensitivity"):
        if found.get(key):
            kept[key] = found[key]
    return kept


def collect(folder: Path, suite: str, results: Results) -> dict[str, Any]:
    """What the page needs of a suite's results in a workspace."""
    parameters = YAML(typ="safe").load((folder / "params/pipeline.yaml").read_text())
    targets = {}
    for target, ways in results.transfer.items():
        block = parameters["fine_tune"][target]
        names = {
            stage_name(mode, source=source): (mode, source)
            for mode, source in transfer_runs(block["modes"], block["sources"])
        }
        randoms = {seed: run["random_return"] for seed, run in ways["scratch"].items()}
        targets[target] = {
            "id": results.ids[target],
            "options": parameters["environments"][target]["options"],
            "algorithm": block["learner"]["algorithm"],
            "env_steps": block["learner"]["env_steps"],
            "sources": block["sources"],
            "threshold": gymnasium.spec(results.ids[target]).reward_threshold,
            "random": [round(randoms[seed], 4) for seed in results.seeds],
            "ways": {
                way: {
                    "mode": names[way][0],
                    "source": names[way][1],
                    "runs": [run_of(runs[seed]) for seed in results.seeds],
                }
                for way, runs in ways.items()
            },
        }
    teachers = {
        name: [round(run["teacher"]["greedy"]["mean"], 3) for run in found.values()]
        for name, found in results.evaluations.items()
    }
    return {"suite": suite, "seeds": results.seeds, "teachers": teachers, "targets": targets}


def main() -> None:
    """The command line."""
    given = arguments(__doc__)
    folder, results, about = run_suite(given.suite, given.work)
    (RESULTS / "transfer").mkdir(exist_ok=True)
    save(f"transfer/{given.suite}", collect(folder, given.suite, results) | {"provenance": about})


if __name__ == "__main__":
    main()
