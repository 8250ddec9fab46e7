"""The whole pipeline end to end on the smoke suite, in a clone, through the command line that users type."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clones import environment, make_clone, stillhouse

from flows.results import processor
from flows.workspace import hold
from tasks.plan import Stage, read_plan
from tasks.recorded import md5_of, object_path


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout, planned for the smoke suite."""
    return make_clone(tmp_path_factory.mktemp("smoke") / "clone", "smoke")


@pytest.fixture
def made(clone: Path) -> Path:
    """The clone with the outs of a whole run."""
    if not (clone / "data/evaluation/report.html").exists():
        stillhouse(clone, "run", "smoke", "--in-place")
    return clone


def dvc(clone: Path, *arguments: str) -> str:
    """DVC's own command line, in the clone."""
    argv = [sys.executable, "-m", "dvc", *arguments]
    result = subprocess.run(argv, cwd=clone, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def planned(clone: Path) -> list[Stage]:
    """The clone's stages, but the one that always runs."""
    argv = [sys.executable, "-m", "tasks.plan", "smoke", "--dry-run", "--json"]
    printed = subprocess.run(argv, cwd=clone, env=environment(), capture_output=True, text=True, check=True)
    return [stage for stage in read_plan(printed.stdout) if not stage.always_changed]


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
    stages = planned(clone)
    printed = stillhouse(clone, "run", "smoke", "--in-place")
    assert f"{len(stages)} ran, 0 cached" in printed
    assert "report data/evaluation/report.html" in printed
    assert "cartpole" in printed
    assert not survivors(clone)
    results = json.loads((clone / "data/evaluation/results.json").read_text())
    assert set(results["students"]) == {"small", "acting", "following"}
    assert set(results["students"]["small"]["environments"]) == {"cartpole", "breakout"}
    assert set(results["joint"]["joint"]["environments"]) == {"cartpole", "breakout"}
    report = (clone / "data/evaluation/report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert str(clone) not in report
    first, lock = tree(clone), (clone / "dvc.lock").read_text()

    # What Prefect keeps of it, for its UI.
    with contextlib.closing(sqlite3.connect(clone / ".stillhouse/prefect/prefect.db")) as database:
        artifacts = {
            key: (data, about)
            for key, data, about in database.execute("select key, data, description from artifact")
        }
        logged = [message for (message,) in database.execute("select message from log")]
    assert {"results", "learning-curves", "report", "report-summary"} <= set(artifacts)
    assert {row["environment"] for row in json.loads(json.loads(artifacts["results"][0]))} == {
        "cartpole",
        "breakout",
        "geometric mean",
    }
    assert "data:image/png;base64," in artifacts["learning-curves"][0]
    assert "report.html" in artifacts["report"][0]
    for facts in (artifacts["results"][1], next(line for line in logged if line.startswith("commit "))):
        assert processor() in facts

    # Again: nothing runs.
    assert f"0 ran, {len(stages)} cached" in stillhouse(clone, "run", "smoke", "--in-place")
    assert (clone / "dvc.lock").read_text() == lock

    # DVC alone agrees.
    assert "Running stage 'train_teacher" not in dvc(clone, "repro")
    assert (clone / "dvc.lock").read_text() == lock
    metrics = dvc(clone, "metrics", "show")
    for environment_name in ("cartpole", "breakout"):
        assert f"students.small.environments.{environment_name}.student.value" in metrics
    dvc(clone, "plots", "show", "--out", str(clone / "plots"))
    plots = (clone / "plots/index.html").read_text()
    for shown in ("mean_return", "agreement", "normalised_score", "data/evaluation/comparison.csv"):
        assert shown in plots

    # Every stage forced, from the same inputs: the same bytes.
    forced = [argument for name in sorted({stage.verb for stage in stages}) for argument in ("--force", name)]
    assert f"{len(stages)} ran, 0 cached" in stillhouse(clone, "run", "smoke", "--in-place", *forced)
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
        "--only",
        "train_multi_task",
    )
    (line,) = [line for line in printed.splitlines() if "saved as experiment" in line]
    name = line.rpartition(" ")[2]
    assert name in dvc(clone, "exp", "list", "--name-only")
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
        "train_teacher.cartpole.env_steps=60000",
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
    printed = stillhouse(clone, "run", "smoke", *settings)
    assert "no new report: report was not asked for" in printed
    assert "report data/" not in printed
    # The same bytes could also come from the beginning.
    log = (clone / "logs/train_teacher-cartpole-s0.log").read_text()
    assert "resumed from the saved state" in log
    assert not list(scratch.glob("*/manifest.json"))
    resumed = {
        name: digest
        for name, digest in tree(clone).items()
        if "cartpole-s0" in name and "datasets" not in name and "evaluation" not in name
    }
    stillhouse(clone, "run", "smoke", *settings, "--force", "train_teacher-cartpole-s0")
    whole = tree(clone)
    assert resumed == {name: whole[name] for name in resumed}


def test_a_weak_teacher_is_kept_and_stops_what_would_learn_from_it(made):
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "add", "dvc.lock"], cwd=made, check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "run"], cwd=made, check=True)
    settings = ["--in-place", "--set", "collect_dataset.breakout.transitions=1000"]
    settings += ["--set", "collect_dataset.cartpole.minimum_return=1e6"]
    printed = stillhouse(made, "run", "smoke", *settings, code=1)
    (failed,) = [line for line in printed.splitlines() if line.startswith("  failed ")]
    assert "collect_dataset-cartpole-s0" in failed
    assert "weak teacher" in failed
    assert "error: collect_dataset-cartpole-s0: weak teacher" in printed
    assert (made / "data/teachers/cartpole-s0/manifest.json").exists()
    assert "done      collect_dataset-breakout-s0" in printed
    assert "1 failed, 6 not run" in printed
    # The report of an earlier run still lies there, and is not shown as this one's.
    assert (made / "data/evaluation/report.html").exists()
    assert "no new report: collect_dataset-cartpole-s0 failed" in printed
    assert "report data/" not in printed

    settings += ["--set", "collect_dataset.cartpole.allow_weak_teacher=true", "--only", "collect_dataset"]
    assert "done      collect_dataset-cartpole-s0" in stillhouse(made, "run", "smoke", *settings)
    changed = json.loads(dvc(made, "params", "diff", "--json"))["params/pipeline.yaml"]
    assert changed["collect_dataset.breakout.transitions"] == {"old": 2000, "new": 1000, "diff": -1000}
    changed = json.loads(dvc(made, "metrics", "diff", "--json"))["data/datasets/breakout-s0.json"]
    assert changed["transitions"]["new"] < changed["transitions"]["old"]


@pytest.mark.parametrize("kilobytes", [4, 16])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(made, kilobytes):
    stillhouse(made, "plan", "smoke")
    folder = made / "data/datasets"
    shutil.rmtree(folder / "cartpole-s0", ignore_errors=True)
    before = sorted(path.name for path in folder.iterdir())
    command = f"ulimit -f {kilobytes}; exec {sys.executable} -m tasks.collect_dataset cartpole --seed 0"
    result = subprocess.run(
        ["bash", "-c", command], cwd=made, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2, result.stderr
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "File too large" in said
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == before


def test_commands_on_what_a_run_has_made(made):
    printed = stillhouse(
        made, "play", "data/students/small-s0", "--environment", "cartpole", "--output", "x.gif"
    )
    assert "x.gif: cartpole, return " in printed
    assert (made / "x.gif").read_bytes().startswith(b"GIF8")
    printed = stillhouse(made, "evaluate", "data/teachers/cartpole-s0", "--episodes", "3")
    assert [line.split()[:2] for line in printed.splitlines() if line.endswith("3 episodes")] == [
        ["cartpole", "greedy"],
        ["cartpole", "epsilon"],
        ["cartpole", "random"],
    ]
    assert stillhouse(made, "report").strip().endswith("data/evaluation/report.html")
    printed = stillhouse(made, "--help")
    for command in ("run", "plan", "play", "evaluate", "report"):
        assert f"  stillhouse {command}" in printed


def test_planning_finds_the_users_module_and_keeps_out_of_a_run(clone):
    # As the console script does, whose folder is not the checkout: `-P` keeps the current folder off the path.
    argv = [sys.executable, "-P", "-m", "flows.cli", "plan", "smoke"]
    argv += ["--set", "environments.cartpole.module=my_world"]
    (clone / "my_world.py").write_text("import gymnasium\n")
    try:
        result = subprocess.run(
            argv, cwd=clone, env={**environment(), "PYTHONSAFEPATH": "1"}, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert "stages in dvc.yaml" in result.stdout
        assert "- my_world.py" in (clone / "dvc.yaml").read_text()
    finally:
        (clone / "my_world.py").unlink()
        stillhouse(clone, "plan", "smoke")
    with hold(clone):
        assert "another run is in progress" in stillhouse(clone, "plan", "smoke", code=2)
        stillhouse(clone, "plan", "--check")


def test_a_prefect_server_that_is_not_there_is_one_line(clone):
    url = "http://127.0.0.1:9/api"
    printed = stillhouse(clone, "run", "smoke", "--in-place", code=2, PREFECT_API_URL=url).strip()
    assert printed.startswith(f"error: PREFECT_API_URL is {url}")
    assert "unset PREFECT_API_URL" in printed
    assert "\n" not in printed


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


def test_where_it_comes_from_whether_it_is_sound_and_whether_it_comes_out_again(clone):
    stillhouse(clone, "run", "smoke", "--in-place")
    subprocess.run(["git", "add", "dvc.lock", "machines.json"], cwd=clone, check=True)
    subprocess.run(
        ["git", "commit", "--quiet", "--allow-empty", "--message", "results"], cwd=clone, check=True
    )
    weights = "data/students/small-s0/weights.safetensors"
    printed = stillhouse(clone, "lineage", weights)
    assert "train_teacher-breakout-s0: commit " in printed
    assert "4,096 env steps (train_teacher.breakout), seed 0" in printed
    assert f"on {processor()}" in printed
    found = json.loads(stillhouse(clone, "lineage", "--json", "--rev", "HEAD", str(clone / weights)))
    assert found["on_disk"] == "as recorded"
    assert found["stages"]["distill_student-small-s0"]["code"]["modules"]["stillhouse.losses.distillation"]

    # The student's weights are lost everywhere: its stage alone runs again.
    before = tree(clone)
    lost = object_path(clone / ".dvc/cache", md5_of(clone / weights))
    lost.unlink()
    (clone / weights).unlink()
    printed = stillhouse(clone, "verify", code=1)
    assert f"{weights}: missing in workspace and cache (distill_student-small-s0)" in printed
    assert "1 damaged or missing" in printed
    printed = stillhouse(clone, "verify", "--repair")
    assert [line for line in printed.splitlines() if "run again" in line] == [
        "distill_student-small-s0: run again"
    ]
    assert printed.rstrip().endswith(": sound")
    assert tree(clone) == before

    printed = stillhouse(clone, "reproduce", "distill_student", "--workers", "1")
    assert "3 stages: 9 outs identical" in printed
    with contextlib.closing(sqlite3.connect(clone / ".stillhouse/prefect/prefect.db")) as database:
        kept = dict(database.execute("select key, description from artifact"))
    assert {"reproduction", "reproduction-summary"} <= set(kept)
    assert processor() in kept["reproduction"]
    assert tree(clone) == before

    for arguments, word in (
        (["lineage", "data/students/smal-s0"], "did you mean 'data/students/small-s0'"),
        (["lineage", "/tmp/nowhere"], "no stillhouse project"),
        (["lineage", weights, "--rev", "nowhere"], "revision: 'nowhere'"),
        (["verify", "--rev", "--help-me"], "expected one argument"),
        (["verify", "--rev=-x"], "revision: '-x'"),
        (["reproduce", "nothing"], "stage: 'nothing'"),
        (["reproduce", "../x"], "stage"),
        (["reproduce", "report", "--workers", "-3"], "workers"),
        (["reproduce", "report", "--rev", "nowhere"], "revision: 'nowhere'"),
    ):
        said = stillhouse(clone, *arguments, code=2).strip().splitlines()[-1]
        assert word in said, said
