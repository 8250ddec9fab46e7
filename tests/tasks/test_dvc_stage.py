"""DVC's lock file survives a kill in the middle of a write, and busy files are waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stillhouse.errors import StillhouseError
from tasks.dvc_stage import KEPT_LOCK, LOCK, keep_lock, restore_lock

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Two stages that read the same file; ``slow`` takes a while."""
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    for folder in (".dvc", "params", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / ".dvc/config").write_text((ROOT / ".dvc/config").read_text())
    (tmp_path / "data/.gitignore").write_text("*\n!.gitignore\n")
    (tmp_path / "params/pipeline.yaml").write_text("{}\n")
    (tmp_path / "source").write_text("text")
    touch = 'test -z "$STILLHOUSE_MARKER" || touch "$STILLHOUSE_MARKER"'
    rows = "stages:\n"
    for name, command in (
        ("slow", "echo half > data/slow; sleep 2; cat source > data/slow"),
        ("quick", "cat source > data/quick"),
    ):
        rows += f"  {name}:\n    cmd: '{touch}; {command}'\n    deps: [source]\n    outs: [data/{name}]\n"
    rows += (
        "  reader:\n    cmd: '"
        + touch
        + "; cat data/slow > data/reader'\n    deps: [data/slow]\n    outs: [data/reader]\n"
    )
    (tmp_path / "dvc.yaml").write_text(rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*arguments: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "tasks.dvc_stage", "--answer", f"answer-{arguments[-1]}.json", *arguments]
    return subprocess.Popen(argv, env={**os.environ, "SHELL": "/bin/sh"}, stderr=subprocess.PIPE, text=True)


def run(*arguments: str) -> dict[str, object]:
    process = start(*arguments)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(Path(f"answer-{arguments[-1]}.json").read_text())


def test_executed_restored_and_unchanged_are_told_apart(project):
    assert run("run", "quick") == {"executed": True}
    assert run("run", "quick") == {"executed": False}
    Path("data/quick").unlink()
    assert run("run", "quick") == {"executed": False}
    assert Path("data/quick").read_text() == "text"
    assert run("run", "--force", "quick") == {"executed": True}


def test_stages_at_the_same_time_are_all_recorded(project):
    processes = [start("run", name) for name in ("slow", "quick")]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert {"slow:", "quick:"} <= {line.strip() for line in LOCK.read_text().splitlines()}


def test_a_busy_file_is_waited_for(project):
    run("run", "slow")
    Path("data/slow").unlink()
    writer = start("run", "--force", "slow")  # DVC holds data/slow for writing for two seconds
    while not Path("data/slow").exists() or Path("data/slow").read_text() != "half\n":
        time.sleep(0.02)
    assert run("run", "reader") == {"executed": True}
    assert writer.wait(60) == 0
    assert Path("data/reader").read_text() == "text"


def test_a_lock_file_cut_off_in_the_middle_is_restored(project):
    run("run", "quick")
    run("run", "slow")  # before its write, the lock with `quick` was copied aside
    whole = LOCK.read_text()
    for cut in ("", whole[:60]):
        LOCK.write_text(cut)
        assert run("run", "quick") == {"executed": False}
        assert "quick:" in LOCK.read_text()
    assert run("run", "slow") == {"executed": False}  # from the run-cache
    assert sorted(LOCK.read_text().splitlines()) == sorted(whole.splitlines())


def test_a_broken_lock_without_a_copy_is_said(project):
    LOCK.write_text("schema: '2.0'\nstages:\n  a: {")
    with pytest.raises(StillhouseError, match=r"dvc\.lock: cannot be read.*git checkout dvc\.lock"):
        restore_lock()
    keep_lock()
    assert not KEPT_LOCK.exists()  # nothing broken is ever kept


def test_an_experiment_is_saved_without_a_git_identity(project, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.delenv("EMAIL", raising=False)
    # Nothing is committed yet: said in one line, as the git libraries' own errors are.
    process = start("save", "too-early")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("error: the run could not be saved as an experiment: ")
    assert errors.count("\n") == 1
    Path("dvc.yaml").write_text("stages: {}\n")
    somebody = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "add", "--all"], check=True)
    subprocess.run(["git", *somebody, "commit", "--quiet", "--message", "start"], check=True)
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", "tree"], check=True)
    monkeypatch.chdir("tree")
    Path("source").write_text("other text")
    assert run("save", "an-experiment")["experiment"] == "an-experiment"


def test_a_failure_is_one_line(project):
    Path("source").unlink()
    process = start("run", "quick")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "source" in said[0]
    assert "Traceback" not in errors
