"""DVC's lock file survives a kill in the middle of a write, and busy files are waited for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import dvc.dvcfile
import pytest

from stillhouse.errors import StillhouseError
from stillhouse.files import replace_folder
from tasks.cache import cache_in_use
from tasks.dvc_stage import KEPT_LOCK, LOCK, begin, keep_lock, restore_lock
from tasks.recorded import read_recorded
from tasks.stage import inputs_key, stage_entry
from tasks.verify import Checker

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


def test_what_is_stale_is_asked_without_reading_the_plan_once_for_each_stage(project, monkeypatch):
    with open("dvc.yaml", "a") as file:
        file.write("  digest_code:\n    cmd: 'true'\n    always_changed: true\n")
    run("run", "slow")
    read: list[str] = []
    original = dvc.dvcfile.ProjectFile._load
    monkeypatch.setattr(
        dvc.dvcfile.ProjectFile, "_load", lambda self: read.append(self.path) or original(self)
    )
    assert begin(["slow", "quick"])["stale"] == ["quick"]
    several = len(read)
    begin(["slow"])
    assert several == len(read) - several
    Path("source").write_text("other text")
    assert begin(["slow", "quick", "reader"])["stale"] == ["quick", "reader", "slow"]


def test_a_failure_is_one_line(project):
    Path("source").unlink()
    process = start("run", "quick")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "source" in said[0]
    assert "Traceback" not in errors


@pytest.mark.parametrize("folder", [False, True])
def test_a_full_disk_in_the_cache_is_one_line_and_nothing_is_recorded(project, folder):
    """The stage has room for its out, DVC has none for a copy of it in the cache."""
    Path(".dvc/config.local").write_text("[cache]\n    type = copy\n")
    fill = "mkdir -p data/quick; cat source > data/quick/small; head -c 2000000 /dev/zero > data/quick/large"
    command = f"ulimit -S -f unlimited; {fill if folder else 'head -c 2000000 /dev/zero > data/quick'}"
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace("cat source > data/quick", command))
    run("run", "slow")
    before = LOCK.read_text()
    argv = f"ulimit -S -f 1000; exec {sys.executable} -m tasks.dvc_stage --answer answer.json run quick"
    result = subprocess.run(
        ["bash", "-c", argv],
        env={**os.environ, "SHELL": "/bin/sh"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "nothing is recorded" in said and said.endswith("File too large")
    assert "Traceback" not in result.stderr
    assert LOCK.read_text() == before
    run("run", "quick")
    assert "quick:" in LOCK.read_text()
    entries = read_recorded(Path())
    assert [
        str(file) for file in Checker().check(Path(), Path(".dvc/cache"), entries.values()) if not file.sound
    ] == []


def test_a_full_disk_under_dvc_lock_leaves_it_as_it_is(project):
    run("run", "slow")
    gone = "".join(f"  other{number}:\n    cmd: {'x' * 3000}\n" for number in range(100))
    LOCK.write_text(LOCK.read_text() + gone)
    before = LOCK.read_text()
    argv = f"ulimit -S -f 200; exec {sys.executable} -m tasks.dvc_stage --answer answer.json run quick"
    result = subprocess.run(["bash", "-c", argv], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "dvc.lock" in result.stderr and "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert LOCK.read_text() == before
    run("run", "quick")
    assert "quick:" in LOCK.read_text()


def test_no_room_for_dvcs_own_files_is_one_line(project):
    argv = f"ulimit -S -f 4; exec {sys.executable} -m tasks.dvc_stage --answer answer.json run quick"
    result = subprocess.run(["bash", "-c", argv], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and "free space" in result.stderr


def test_a_saved_state_that_was_put_aside_is_brought_back_and_leftovers_go(project):
    """A kill between the two renames of a save."""
    rows = Path("dvc.yaml").read_text().replace("cat source > data/quick", "ls -A .dvc/scratch > data/quick")
    Path("dvc.yaml").write_text(rows)
    key = inputs_key(stage_entry("quick"))
    with replace_folder(Path(".dvc/scratch", key)) as folder:
        (folder / "state").write_text("saved")
    os.rename(f".dvc/scratch/{key}", f".dvc/scratch/.{key}.old")
    Path(f".dvc/scratch/.{key}.12345.tmp").mkdir()
    run("run", "quick")
    assert key in Path("data/quick").read_text().split()
    assert [path.name for path in Path(".dvc/scratch").iterdir() if path.is_dir()] == []


def test_dvc_lock_is_replaced_and_never_written_into(project):
    run("run", "slow")
    inode, before = LOCK.stat().st_ino, LOCK.read_text()
    os.link(LOCK, "as-it-was")
    run("run", "quick")
    assert LOCK.stat().st_ino != inode and Path("as-it-was").read_text() == before
    assert [path.name for path in Path(".dvc/tmp").glob("dvc.lock.*")] == ["dvc.lock.kept"]
    Path(".dvc/tmp/dvc.lock.99").write_text("left by a kill")
    run("run", "quick")
    assert not Path(".dvc/tmp/dvc.lock.99").exists()


def test_a_lock_cut_off_within_a_line_is_not_whole(project):
    run("run", "quick")
    run("run", "slow")
    LOCK.write_text(LOCK.read_text()[:-3])  # still YAML, with another size or hash
    run("run", "quick")
    assert LOCK.read_text().endswith("\n") and "quick:" in LOCK.read_text()


def test_what_a_run_has_read_goes_into_its_experiment(project):
    Path("dvc.yaml").write_text(
        Path("dvc.yaml").read_text().replace("[source]", "[source, world/rules.py]", 1)
    )
    Path(".gitignore").write_text("answer*\n")
    somebody = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "add", "--all"], check=True)
    subprocess.run(["git", *somebody, "commit", "--quiet", "--message", "start"], check=True)
    for name in ("params/suites/mine.yaml", "world/rules.py", "notes.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("x\n")
    for name in ("slow", "quick", "reader"):
        run("run", name)
    commit = run("save", "an-experiment")["commit"]
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", str(commit)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"params/suites/mine.yaml", "world/rules.py"} <= set(listed)
    assert "notes.txt" not in listed


def test_an_experiment_brought_home_leaves_the_cache_as_it_was(project):
    Path("dvc.yaml").write_text(f"{Path('dvc.yaml').read_text()}plots:\n- data/quick\n")
    Path(".gitignore").write_text("answer*\n")
    somebody = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "add", "--all"], check=True)
    subprocess.run(["git", *somebody, "commit", "--quiet", "--message", "start"], check=True)
    for text in ("one", "another"):
        Path("source").write_text(text)
        for name in ("slow", "quick", "reader"):
            run("run", name)
        run("save", text)
    subprocess.run([sys.executable, "-m", "dvc", "exp", "apply", "one"], check=True)
    assert Path("data/quick").read_text() == "one"
    for path in Path(".dvc/cache/files/md5").glob("*/*"):
        found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        assert f"{path.parent.name}{path.name}" == found


def test_who_takes_things_out_of_the_cache_is_waited_for(project):
    with cache_in_use(Path(), exclusive=True) as alone:
        assert alone
        process = start("run", "quick")
        wanted = str(Path(".dvc/scratch/cache-in-use").resolve())
        end = time.monotonic() + 60
        while wanted not in opened(process.pid):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.2)
        assert process.poll() is None and not Path("data/quick").exists()
    assert process.wait(60) == 0
    assert Path("data/quick").exists()


def opened(process: int) -> list[str]:
    """The files that a process has open."""
    found = []
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(os.readlink(path))
    return found
