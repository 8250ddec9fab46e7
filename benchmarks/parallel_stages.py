"""The flow against `dvc repro` alone, on the same stages in the same run: what orchestration costs, and what it gives.

    python -m benchmarks.parallel_stages            # both, about 40 minutes on two cores that do nothing else
    python -m benchmarks.parallel_stages --part nothing_to_do

Works in a clone of HEAD in a temporary folder (or --work), with the Python that runs this, against a Prefect server that is up
before anything is measured. The 200 stages that a run which was cut off has made there are gone on with. Times are those of whole
processes, from the command to its end; flow and `dvc repro` take turns.

nothing_to_do   a plan of 200 stages, all up to date: `stillhouse run`, and `dvc repro`
equal_stages    8 teachers with the same budget, from nothing: `stillhouse run`, which starts as many as there are cores, and
                `dvc repro`, which runs one after another. The ceiling is what the machine gives: the bare command of one such
                stage, as often as there are cores, one after another and then all at once
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.machine import RESULTS, load, provenance, save
from benchmarks.quickstart import STILLHOUSE, clone
from flows.server import PrivateServer

DVC = [sys.executable, "-m", "dvc"]
SEEDS = 50  # of four stages each
MANY = f"""
seeds: {list(range(SEEDS))}
environments: {{cartpole: {{id: CartPole-v1}}}}
train_teacher: {{cartpole: {{algorithm: dqn, env_steps: 500, learning_starts: 200}}}}
collect_dataset: {{cartpole: {{transitions: 500}}}}
distill_student:
  small: {{environments: [cartpole], updates: 20, evaluation_interval: 10, batch_size: 64, size: {{features: 16, torso: [16]}}}}
fine_tune: {{}}
evaluate: {{episodes: 8, num_envs: 8}}
"""
EQUAL = """
seeds: [0, 1, 2, 3, 4, 5, 6, 7]
environments: {cartpole: {id: CartPole-v1}}
train_teacher: {cartpole: {algorithm: dqn, env_steps: 60000, network: {features: 128, torso: [128]}}}
collect_dataset: {cartpole: {transitions: 500}}
distill_student: {small: {environments: [cartpole], parameter_fraction: 0.1}}
fine_tune: {}
"""


def timed(argv: list[str], folder: Path, url: str) -> tuple[float, str]:
    """Run to the end: seconds and output.

    Raises:
        SystemExit: it failed.
    """
    # The stages' `python` is this one, for a plain `dvc repro` too, and the code is the clone's.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PREFECT_API_URL": url, "PYTHONPATH": str(folder)}
    started = time.perf_counter()
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(
            f"{' '.join(argv)} failed with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
        )
    return seconds, done.stdout


def planned(folder: Path, suite: str, text: str, url: str) -> list[str]:
    """Plan a suite of these stages and nothing else; their names, but ``digest_code``."""
    (folder / f"params/suites/{suite}.yaml").write_text(text)
    timed([*STILLHOUSE, "plan", suite, "--overwrite"], folder, url)
    (folder / "dvc.lock").unlink(missing_ok=True)
    return [name for name in YAML(typ="safe").load(folder / "dvc.yaml")["stages"] if name != "digest_code"]


def nothing_to_do(work: Path, url: str, repetitions: int) -> dict[str, Any]:
    """A plan of 200 stages that is up to date."""
    folder = work / "many"
    # To make 200 stages takes longer than to ask about them: what a run that was cut off has made is gone on with.
    if not (folder / "params/suites/many.yaml").is_file():
        planned(clone(folder), "many", MANY, url)
    stages = [name for name in YAML(typ="safe").load(folder / "dvc.yaml")["stages"] if name != "digest_code"]
    flow, repro = [*STILLHOUSE, "run", "many", "--in-place"], [*DVC, "repro"]
    timed(flow, folder, url)
    seconds: dict[str, list[float]] = {"flow": [], "dvc_repro": []}
    for _ in range(repetitions):
        for name, argv in (("flow", flow), ("dvc_repro", repro)):
            taken, said = timed(argv, folder, url)
            if name == "flow" and f"0 ran, {len(stages)} cached" not in said:
                raise SystemExit(f"there was something to do:\n{said[-2000:]}")
            seconds[name].append(round(taken, 2))
    measured = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
    )
    return {"stages": len(stages), "clone": measured.stdout.strip()} | _compared(seconds)


def equal_stages(work: Path, url: str, repetitions: int) -> dict[str, Any]:
    """Eight equal teachers, from nothing."""
    folder = clone(work / "equal")
    stages = [name for name in planned(folder, "equal", EQUAL, url) if name.startswith("train_teacher-")]
    cores = len(os.sched_getaffinity(0))
    seconds: dict[str, list[float]] = {"flow": [], "dvc_repro": [], "in_turn": [], "at_once": []}
    for _ in range(repetitions):
        locks = []
        for name, argv in (
            ("flow", [*STILLHOUSE, "run", "equal", "--in-place", "--only", "train_teacher"]),
            ("dvc_repro", [*DVC, "repro", "digest_code", *stages]),
        ):
            _forget(folder)
            seconds[name].append(round(timed(argv, folder, url)[0], 2))
            locks.append(YAML(typ="safe").load(folder / "dvc.lock")["stages"])
        if locks[0] != locks[1]:
            raise SystemExit("the flow and `dvc repro` left other entries in dvc.lock")
        _forget(folder)
        seconds["in_turn"].append(round(sum(_bare(folder, url, [seed]) for seed in range(cores)), 2))
        _forget(folder)
        seconds["at_once"].append(round(_bare(folder, url, list(range(cores))), 2))
    compared = _compared({name: seconds[name] for name in ("flow", "dvc_repro")})
    ceiling = statistics.median(seconds["in_turn"]) / statistics.median(seconds["at_once"])
    bare = {name: seconds[name] for name in ("in_turn", "at_once")}
    return {
        "stages": len(stages),
        "cores": cores,
        "ceiling": round(ceiling, 3),
        "bare_seconds": bare,
    } | compared


def _forget(folder: Path) -> None:
    """Every result, and what is saved of an interrupted one."""
    (folder / "dvc.lock").unlink(missing_ok=True)
    for left in (
        ".dvc/cache",
        ".dvc/scratch",
        ".dvc/tmp",
        "data/teachers",
        "data/training_state",
        "data/code",
    ):
        subprocess.run(["chmod", "-R", "u+w", left], cwd=folder, check=False, capture_output=True)
        shutil.rmtree(folder / left, ignore_errors=True)


def _bare(folder: Path, url: str, seeds: list[int]) -> float:
    """Seconds for the stages' own commands, at once, without DVC and Prefect."""
    if not (folder / "data/code").exists():
        timed([*DVC, "repro", "digest_code"], folder, url)
    commands = [f"{sys.executable} -m tasks.train_teacher cartpole --seed {seed}" for seed in seeds]
    return timed(["bash", "-c", " & ".join(commands) + " & wait -f $(jobs -p)"], folder, url)[0]


def _compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    ratios = [repro / flow for flow, repro in zip(seconds["flow"], seconds["dvc_repro"], strict=True)]
    return {
        "seconds": seconds,
        "ratio": round(statistics.median(ratios), 3),  # of each repetition's two times
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


PARTS = {"nothing_to_do": nothing_to_do, "equal_stages": equal_stages}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Stages in parallel, and with nothing to do",
        "",
        "Made by `python -m benchmarks.parallel_stages`; `parallel_stages.json` has commit and machine. Medians, with the lowest and",
        "highest of the repetitions, flow and `dvc repro` in turn, with a Prefect server that is up.",
        "",
    ]
    lines += ["| what | flow | `dvc repro` alone | ratio | to reach |", "|---|---|---|---|---|"]
    for part, what, goal in (
        ("nothing_to_do", "stages, all up to date", "at most 12 s"),
        ("equal_stages", "equal teachers from nothing", "at least 1.8x"),
    ):
        if found := results.get(part):
            ratio = f"{found['ratio']:.2f}x [{min(found['ratios']):.2f}, {max(found['ratios']):.2f}]"
            row = [
                f"{found['stages']} {what}",
                *(_range(found["seconds"][name]) for name in ("flow", "dvc_repro")),
            ]
            lines.append(f"| {' | '.join(row)} | {ratio} | {goal} |")
    if found := results.get("equal_stages"):
        lines += [
            "",
            f"The machine's own ceiling on {found['cores']} cores: {found['ceiling']:.2f}x, from the bare command of such a stage, "
            f"{found['cores']} of them in turn ({_range(found['bare_seconds']['in_turn'])}) and at once "
            f"({_range(found['bare_seconds']['at_once'])}).",
        ]
    return "\n".join(lines) + "\n"


def _range(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} s [{min(seconds):.1f}, {max(seconds):.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=list(PARTS), action="append")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "stillhouse-benchmark"))
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    with PrivateServer(arguments.work) as server:
        url = server.url()
        for part in arguments.part or PARTS:
            result = PARTS[part](arguments.work, url, arguments.repetitions) | {"provenance": provenance()}
            save("parallel_stages", load("parallel_stages") | {part: result})
            (RESULTS / "parallel_stages.md").write_text(table(load("parallel_stages")))
            print(
                part,
                json.dumps({key: value for key, value in result.items() if key != "provenance"}),
                flush=True,
            )


if __name__ == "__main__":
    main()
