"""The main job as a newcomer runs it, installation apart: time, memory, parallel speed-up, repeatability.

    python -m benchmarks.quickstart            # all five, about half an hour
    python -m benchmarks.quickstart --part run

Works in fresh clones of HEAD in a temporary folder, with the Python that runs this.

run         `stillhouse run quickstart` from nothing, then again with nothing changed; peak memory is the proportional set
            size (PSS) summed over all processes of the run, sampled every half second
parallel    the quickstart's teachers by the flow and by `dvc repro`, both from empty
repeat      the quickstart in two clones: every file of every stage's outs compared
student     the quickstart over five seeds: the student's normalised scores, and the transfer's
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

from benchmarks.machine import RESULTS, load, provenance, save

ROOT = Path(__file__).parent.parent
STILLHOUSE = [sys.executable, "-m", "flows.cli"]


def clone(folder: Path) -> Path:
    """A fresh clone of HEAD, with nothing cached."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


def pss(process: psutil.Process) -> int:
    """Proportional set size of a process and all below it, in bytes."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            rollup = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
        except OSError:
            continue  # it ended meanwhile
        total += int(re.search(r"^Pss:\s+(\d+) kB", rollup, re.M)[1]) * 1024  # type: ignore[index]
    return total


def timed(command: list[str], folder: Path) -> dict[str, Any]:
    """Run to the end: seconds, peak PSS in MB, output.

    Raises:
        SystemExit: it failed.
    """
    started = time.perf_counter()
    # The stages' `python` is this one, for a plain `dvc repro` too.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak = 0
    over = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not over.wait(0.5):
            try:
                peak = max(peak, pss(psutil.Process(process.pid)))
            except psutil.NoSuchProcess:
                return

    sampler = threading.Thread(target=sample)
    sampler.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - started
    over.set()
    sampler.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}:\n{output[-4000:]}")
    return {"seconds": round(seconds, 1), "peak_pss_mb": round(peak / 2**20), "output": output}


def run(work: Path) -> dict[str, Any]:
    """First and second `stillhouse run quickstart`."""
    folder = clone(work / "run")
    first = timed([*STILLHOUSE, "run", "quickstart"], folder)
    second = timed([*STILLHOUSE, "run", "quickstart"], folder)
    print(second["output"][-3000:])
    return {
        "first_seconds": first["seconds"],
        "first_peak_pss_mb": first["peak_pss_mb"],
        "second_seconds": second["seconds"],
        "second_ran_no_stage": "\n0 ran, " in second["output"],
    }


def parallel(work: Path) -> dict[str, Any]:
    """The quickstart's teachers by the flow (two at a time) and by `dvc repro` (one by one)."""
    folder = clone(work / "flow")
    (folder / "dvc.lock").unlink()
    flow = timed([*STILLHOUSE, "run", "quickstart", "--only", "train_teacher"], folder)
    folder = clone(work / "repro")
    (folder / "dvc.lock").unlink()
    stages = re.findall(r"^  (train_teacher-[a-z0-9-]+):$", (folder / "dvc.yaml").read_text(), re.M)
    repro = timed([sys.executable, "-m", "dvc", "repro", "digest_code", *stages], folder)
    locks = [
        YAML(typ="safe").load(Path(work, name, "dvc.lock").read_text())["stages"]
        for name in ("flow", "repro")
    ]
    return {
        "same_lock_entries": all(locks[0][stage] == locks[1][stage] for stage in ["digest_code", *stages]),
        "flow_seconds": flow["seconds"],
        "dvc_repro_seconds": repro["seconds"],
        "ratio": round(repro["seconds"] / flow["seconds"], 2),
        "stages": len(stages),
    }


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every out of every stage."""
    files = (
        path for path in sorted((folder / "data").rglob("*")) if path.is_file() and path.name != ".gitignore"
    )
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def repeat(work: Path) -> dict[str, Any]:
    """The quickstart from nothing in two clones: which files differ."""
    found = []
    for name in ("first", "second"):
        folder = (
            work / "run"
            if name == "first" and (work / "run/data/evaluation").is_dir()
            else clone(work / name)
        )
        if not (folder / "data/evaluation/report.html").is_file():
            timed([*STILLHOUSE, "run", "quickstart"], folder)
        found.append(hashes(folder))
    different = sorted(path for path in {*found[0], *found[1]} if found[0].get(path) != found[1].get(path))
    return {"files": len(found[0]), "different": different}


def student(work: Path) -> dict[str, Any]:
    """The quickstart's results over five seeds."""
    folder = work / "run" if (work / "run").is_dir() else clone(work / "run")
    timed([*STILLHOUSE, "run", "quickstart", "--seeds", "5"], folder)
    found = max(
        folder.glob(".stillhouse/worktrees/*/data/evaluation/results.json"),
        key=lambda path: path.stat().st_mtime,
    )
    return json.loads(found.read_text())


PARTS = {"run": run, "parallel": parallel, "repeat": repeat, "student": student}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Quickstart",
        "",
        "Made by `python -m benchmarks.quickstart`; `quickstart.json` has commit and machine.",
        "",
    ]
    lines += ["| what | measured | to reach |", "|---|---|---|"]
    if part := results.get("run"):
        lines += [
            f"| first run, installation apart | {part['first_seconds']:.0f} s | at most 360 s |",
            f"| peak memory, PSS over all processes | {part['first_peak_pss_mb']} MB | at most 1,800 MB |",
            f"| second run, nothing changed | {part['second_seconds']:.1f} s, "
            f"{'no stage run' if part['second_ran_no_stage'] else 'STAGES RAN'} | at most 25 s, no stage run |",
        ]
    if part := results.get("parallel"):
        lines.append(
            f"| {part['stages']} teachers: flow / `dvc repro` | {part['flow_seconds']:.0f} s / "
            f"{part['dvc_repro_seconds']:.0f} s: {part['ratio']:.2f}x faster, {'the same' if part['same_lock_entries'] else 'OTHER'} `dvc.lock` entries | "
            "at least 1.6x, the same entries |"
        )
    if part := results.get("repeat"):
        lines.append(
            f"| files that differ between two runs from nothing | {len(part['different'])} of {part['files']} | none |"
        )
    if part := results.get("student"):
        small = part["students"]["small"]
        mean = small["geometric_mean"]
        lines.append(
            f"| student of {small['parameters']:,} parameters, 1/{small['compression']:.1f} of its teachers', 5 seeds: geometric mean "
            f"of the normalised scores | {mean['value']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]; worst environment "
            f"{small['worst_environment']} {small['worst_score']['value']:.3f} | at least 0.95 |"
        )
        lines += [
            "",
            "## Scores and transfer, 5 seeds",
            "",
            "Mean with its 95 % stratified bootstrap interval.",
            "",
        ]
        lines += ["| environment | random | teacher | student | normalised score |", "|---|---|---|---|---|"]
        lines += [
            f"| {name} | "
            + " | ".join(_interval(row[key]) for key in ("random", "teacher", "student", "normalised_score"))
            + " |"
            for name, row in small["environments"].items()
        ]
        lines += ["", "| target | mode | final return | area against scratch |", "|---|---|---|---|"]
        for target, modes in part["transfer"].items():
            for mode, row in modes.items():
                score = row.get("transfer_ratio") or row.get("transfer_difference")
                against = "" if mode == "scratch" else _interval(score)
                lines.append(f"| {target} | {mode} | {_interval(row['final_return'])} | {against} |")
    return "\n".join(lines) + "\n"


def _interval(value: dict[str, float]) -> str:
    return f"{value['value']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=list(PARTS), action="append")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "stillhouse-benchmark"))
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    for part in arguments.part or PARTS:
        result = PARTS[part](arguments.work) | {"provenance": provenance()}
        save("quickstart", load("quickstart") | {part: result})
        (RESULTS / "quickstart.md").write_text(table(load("quickstart")))
        print(part, {key: value for key, value in result.items() if key != "provenance"}, flush=True)


if __name__ == "__main__":
    main()
