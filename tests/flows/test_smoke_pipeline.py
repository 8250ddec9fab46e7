"""The whole pipeline end to end on the smoke suite, in a clone, through the command line that users type."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_pipeline import with_path

ROOT = Path(__file__).parents[2]


def stillhouse(clone: Path, *arguments: str, code: int = 0) -> str:
    """Run the clone's own `stillhouse` and return what it printed."""
    argv = [sys.executable, "-m", "flows.cli", *arguments]
    result = subprocess.run(argv, cwd=clone, env=environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    return result.stdout + result.stderr


def environment() -> dict[str, str]:
    names = {"PREFECT_API_URL", "PREFECT_TEST_MODE"}
    return {name: value for name, value in with_path().items() if name not in names}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout as it stands, edits included, in a repository of its own, planned for the smoke suite."""
    path = tmp_path_factory.mktemp("smoke") / "clone"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path / name)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "init", "--quiet"], cwd=path, check=True)
    subprocess.run(["git", "config", "user.name", "test"], cwd=path, check=True)
    subprocess.run(["git", "config", "user.email", "test@example.org"], cwd=path, check=True)
    stillhouse(path, "plan", "smoke", "--overwrite")
    (path / "dvc.lock").unlink(missing_ok=True)
    subprocess.run(["git", "add", "--all"], cwd=path, check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "clone"], cwd=path, check=True)
    return path


def tree(folder: Path) -> dict[str, str]:
    """Every file below ``data/`` with its hash."""
    files = sorted(path for path in (folder / "data").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def survivors(folder: Path) -> list[str]:
    """Command lines of the processes whose current folder is in ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if Path(os.readlink(entry / "cwd")).is_relative_to(folder):
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return found


def test_the_pipeline_end_to_end(clone):
    printed = stillhouse(clone, "run", "smoke", "--in-place")
    assert "10 ran, 0 cached" in printed
    assert "report data/evaluation/report.html" in printed
    assert "cartpole" in printed
    assert not survivors(clone)
    results = json.loads((clone / "data/evaluation/results.json").read_text())
    assert set(results["students"]["small"]["environments"]) == {"cartpole", "breakout"}
    report = (clone / "data/evaluation/report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert str(clone) not in report
    first, lock = tree(clone), (clone / "dvc.lock").read_text()

    # Again: nothing runs.
    assert "0 ran, 10 cached" in stillhouse(clone, "run", "smoke", "--in-place")
    assert (clone / "dvc.lock").read_text() == lock

    # DVC alone agrees.
    repro = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=clone,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert repro.returncode == 0, repro.stderr
    assert "Running stage 'train_teacher" not in repro.stdout
    assert (clone / "dvc.lock").read_text() == lock
    for command in (
        ["metrics", "show"],
        ["params", "diff"],
        ["plots", "show", "--out", str(clone / "plots")],
    ):
        shown = subprocess.run(
            [sys.executable, "-m", "dvc", *command],
            cwd=clone,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert shown.returncode == 0, (command, shown.stderr)

    # Every stage forced, from the same inputs: the same bytes.
    forced = [
        argument
        for name in ("train_teacher", "collect_dataset", "distill_student", "fine_tune", "evaluate", "report")
        for argument in ("--force", name)
    ]
    assert "10 ran, 0 cached" in stillhouse(clone, "run", "smoke", "--in-place", *forced)
    assert tree(clone) == first
    assert sorted((clone / "dvc.lock").read_text().splitlines()) == sorted(lock.splitlines())


def test_a_run_of_its_own_is_saved_as_an_experiment_and_touches_nothing_here(clone):
    before = subprocess.run(
        ["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True
    ).stdout
    printed = stillhouse(
        clone,
        "run",
        "smoke",
        "--set",
        "distill_student.updates=40",
        "--from",
        "distill_student",
        "--only",
        "train_teacher",
        "--only",
        "collect_dataset",
    )
    (line,) = [line for line in printed.splitlines() if "saved as experiment" in line]
    name = line.rpartition(" ")[2]
    shown = subprocess.run(
        [sys.executable, "-m", "dvc", "exp", "list", "--name-only"],
        cwd=clone,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert name in shown.stdout
    assert f".stillhouse/worktrees/{name}/data/evaluation/report.html" in printed
    assert (
        subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True).stdout
        == before
    )
    # What the run in place has made is not made again: the cache is shared.
    assert "done      distill_student-small-s0" in printed
    assert "done      train_teacher" not in printed


def test_ctrl_c_leaves_no_process_and_the_stage_goes_on_to_the_same_bytes(clone):
    settings = [
        "--set",
        "train_teacher.cartpole.env_steps=40000",
        "--only",
        "train_teacher-cartpole-s0",
        "--in-place",
        "--set",
        "device=cpu",
    ]
    argv = [sys.executable, "-m", "flows.cli", "run", "smoke", *settings]
    process = subprocess.Popen(
        argv,
        cwd=clone,
        env={**environment(), "STILLHOUSE_SAVE_SECONDS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    scratch = clone / ".dvc" / "scratch"
    end = time.monotonic() + 120
    while not list(scratch.glob("*/manifest.json")) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    # While it runs, another run in this checkout is told who holds it.
    busy = stillhouse(clone, "run", "smoke", "--in-place", code=2)
    assert f"process {process.pid}" in busy
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    assert not survivors(clone)
    assert list(scratch.glob("*/manifest.json")), "the interrupted stage saved nothing"
    stillhouse(clone, "run", "smoke", *settings)
    assert not list(scratch.glob("*/manifest.json"))
    resumed = {
        name: digest
        for name, digest in tree(clone).items()
        if "cartpole-s0" in name and "datasets" not in name and "evaluation" not in name
    }
    stillhouse(clone, "run", "smoke", *settings, "--force", "train_teacher-cartpole-s0")
    whole = tree(clone)
    assert resumed == {name: whole[name] for name in resumed}


def test_mistakes_are_one_line(clone):
    for arguments, word in (
        (["run", "smok"], "did you mean 'smoke'"),
        (["run", "smoke", "--set", "distill_student.los=kl"], "'loss'"),
        (["run", "smoke", "--set", "train_teacher.cartpole.gamma=2"], "gamma"),
        (["run", "smoke", "--seeds", "1000"], "100"),
        (["run", "smoke", "--in-place", "--only", "train_teachr"], "train_teacher"),
        (["run", "smoke", "--in-place", "--revision", "HEAD"], "revision"),
        (["run", "../smoke"], "suite"),
        (["evaluate", "data/teachers/nobody"], "nobody"),
        (["plan", "smok"], "smoke"),
    ):
        printed = stillhouse(clone, *arguments, code=2).strip()
        assert printed.startswith("error: "), printed
        assert "\n" not in printed, printed
        assert word in printed, printed
    # A run that is refused only inside its worktree leaves none behind.
    printed = stillhouse(clone, "run", "smoke", "--only", "train_teachr", code=2)
    assert "did you mean 'train_teacher" in printed
    trees = subprocess.run(["git", "worktree", "list"], cwd=clone, capture_output=True, text=True).stdout
    assert printed.split()[1].rpartition("/")[2] not in trees
