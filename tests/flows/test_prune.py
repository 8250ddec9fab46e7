"""Pruning: what goes, and what must stay."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from flows.prune import Kept, experiments, prune
from flows.workspace import cache_in_use, find_checkout, hold, make_worktree, worktrees
from stillhouse.errors import StillhouseError
from tasks.stage import hold_scratch

NOTHING = Kept(runs=0, experiments=0, scratch_days=0)


@pytest.fixture
def checkout(toy: Path) -> Path:
    for key, value in (("user.name", "test"), ("user.email", "test@example.org")):
        subprocess.run(["git", "config", key, value], check=True)
    (toy / ".gitignore").write_text(".stillhouse/\n")
    (toy / "dvc.yaml").write_text("stages: {}\n")
    commit("one")
    return toy


def commit(message: str) -> str:
    subprocess.run(["git", "add", "--all"], check=True)
    subprocess.run(["git", "commit", "--quiet", "--message", message], check=True)
    return git("rev-parse", "HEAD")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def cached(content: bytes, suffix: str = "") -> str:
    """An object in the cache; its name."""
    name = hashlib.md5(content).hexdigest() + suffix
    path = Path(".dvc/cache/files/md5", name[:2], name[2:])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return name


def there(name: str) -> bool:
    return Path(".dvc/cache/files/md5", name[:2], name[2:]).exists()


def lock(*names: str) -> str:
    outs = "".join(
        f"      - path: data/{name[:4]}\n        hash: md5\n        md5: {name}\n" for name in names
    )
    return f"schema: '2.0'\nstages:\n  make:\n    cmd: make\n    outs:\n{outs}"


def test_the_cache_keeps_what_a_commit_a_kept_experiment_or_a_kept_worktree_refers_to(checkout: Path) -> None:
    inside, promoted = cached(b"part of a folder"), cached(b"in production once")
    folder = cached(json.dumps([{"md5": inside, "relpath": "a"}]).encode(), ".dir")
    old, now, lost = cached(b"an older commit"), cached(b"now"), cached(b"nobody's")
    Path("dvc.lock").write_text(lock(old, folder))
    Path("data/production.dvc").write_text(f"outs:\n- md5: {promoted}\n  path: production\n")
    subprocess.run(["git", "add", "--force", "data/production.dvc"], check=True)
    commit("two")
    Path("data/production.dvc").unlink()
    Path("dvc.lock").write_text(lock(now))
    commit("three")
    tried, forgotten, worked = cached(b"experiment"), cached(b"old experiment"), cached(b"worktree")
    for name, objects, when in (("new", tried, "2026-01-02"), ("old", forgotten, "2026-01-01")):
        Path("dvc.lock").write_text(lock(objects))
        tree = git("stash", "create")
        environment = {**os.environ, "GIT_COMMITTER_DATE": f"{when} 00:00:00"}
        head = git("rev-parse", "HEAD")
        made = subprocess.run(
            ["git", "commit-tree", f"{tree}^{{tree}}", "-p", head, "-m", name],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", made)
        git("checkout", "--quiet", "dvc.lock")
    (make_worktree(checkout, "kept", "") / "dvc.lock").write_text(lock(worked))

    kept = Kept(runs=1, experiments=1, scratch_days=1)
    dry = list(prune(checkout, kept, dry_run=True))
    assert dry == [
        "experiment old",
        f"cache: 2 objects, {len(b'old experiment') + len(b'nobody' + b's') + 1} B",
    ]
    assert there(lost) and [name for _, name in experiments(checkout)] == ["new", "old"]
    assert list(prune(checkout, kept, dry_run=False)) == dry
    assert all(map(there, (inside, folder, promoted, old, now, tried, worked)))
    assert not there(lost) and not there(forgotten)
    assert [name for _, name in experiments(checkout)] == ["new"]


def test_the_newest_worktrees_stay_and_so_does_a_run_in_progress(checkout: Path) -> None:
    for name in ("first", "second", "third"):
        make_worktree(checkout, name, "")
        time.sleep(0.02)
    assert [path.name for path in worktrees(checkout)] == ["third", "second", "first"]
    with hold(worktrees(checkout)[2]):
        said = list(prune(checkout, Kept(runs=1), dry_run=False))
    assert said[:2] == [
        "worktree .stillhouse/worktrees/second",
        "kept     worktree .stillhouse/worktrees/first: its run is in progress",
    ]
    assert [path.name for path in worktrees(checkout)] == ["third", "first"]
    list(prune(checkout, NOTHING, dry_run=False))
    assert not worktrees(checkout) and git("worktree", "list").count("\n") == 0


def test_the_cache_is_left_alone_while_a_run_is_in_progress(checkout: Path) -> None:
    lost = cached(b"nobody's")
    with cache_in_use(checkout):
        (said,) = prune(checkout, NOTHING, dry_run=False)
    assert said.startswith("kept     cache: a run is in progress") and there(lost)
    list(prune(checkout, NOTHING, dry_run=False))
    assert not there(lost)


def test_old_saved_states_go_but_not_one_that_a_stage_holds(checkout: Path) -> None:
    with hold_scratch("a" * 64) as held:
        held.mkdir()
        for key in ("b" * 64, "c" * 64):
            with hold_scratch(key) as folder:
                folder.mkdir()
                (folder / "state").write_text("x" * 10)
        week_ago = time.time() - 8 * 86_400
        for path in (folder, folder.with_suffix(".lock"), held, held.with_suffix(".lock")):
            os.utime(path, (week_ago, week_ago))
        said = list(prune(checkout, Kept(), dry_run=False))
        assert said[0] == f"saved state {'c' * 12} of an interrupted stage, 10 B"
        assert held.exists() and folder.with_name("b" * 64).exists()
        assert not folder.exists() and not folder.with_suffix(".lock").exists()


def test_what_a_kill_left_of_the_saving_of_a_state_goes(checkout: Path) -> None:
    root = Path(".dvc/scratch")
    month_ago = time.time() - 30 * 86_400
    for key, names in (("a", ["", ".old"]), ("b", [".123.tmp"]), ("c", [".124.tmp", ".125.tmp"])):
        with hold_scratch(key * 64) as folder:
            for name in names:
                left = folder.with_name(f".{folder.name}{name}" if name else folder.name)
                left.mkdir()
                (left / "state").write_text("x" * 10)
                if key != "c":
                    os.utime(left, (month_ago, month_ago))
        if key == "b":
            folder.with_name(f"{folder.name}.lock").unlink()  # of a pruned lock
        else:
            os.utime(folder.with_name(f"{folder.name}.lock"), (month_ago, month_ago))
    (root / "saving").touch()
    dry = list(prune(checkout, Kept(), dry_run=True))
    assert dry[:2] == [
        f"saved state {'a' * 12} of an interrupted stage, 20 B",
        f"saved state {'b' * 12} of an interrupted stage, 10 B",
    ]
    assert list(prune(checkout, Kept(), dry_run=False)) == dry
    assert sorted(path.name for path in root.iterdir()) == [
        f".{'c' * 64}.124.tmp",
        f".{'c' * 64}.125.tmp",
        "cache-in-use",
        f"{'c' * 64}.lock",
        "saving",
    ]


def test_a_worktree_that_could_not_go_keeps_its_objects(checkout: Path) -> None:
    name = cached(b"of a run in progress")
    path = make_worktree(checkout, "old", "")
    (path / "dvc.lock").write_text(lock(name))
    with hold(path):  # as a run does, but the cache is not yet, or no longer, in use
        list(prune(checkout, NOTHING, dry_run=False))
    assert there(name) and path.exists()
    list(prune(checkout, NOTHING, dry_run=False))
    assert not there(name) and not path.exists()


def test_a_pruned_lock_is_no_lock(checkout: Path) -> None:
    key = "d" * 64
    with hold_scratch(key) as folder:
        path = folder.with_suffix(".lock")
    with open(path, "a") as before:
        path.unlink()
        fcntl.flock(before, fcntl.LOCK_EX)
        with hold_scratch(key):  # on a file of its own
            assert not os.path.samestat(os.fstat(before.fileno()), os.stat(path))


def test_a_quoted_hash_and_the_kept_lock_count_and_a_damaged_folder_stops_it(checkout: Path) -> None:
    number = "1234567890" * 3 + "12"  # YAML quotes what looks like a number
    path = Path(".dvc/cache/files/md5", number[:2], number[2:])
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    Path("dvc.lock").write_text(lock(number).replace(number, f"'{number}'"))
    kept = cached(b"in the kept lock")
    Path(".dvc/tmp").mkdir(exist_ok=True)
    Path(".dvc/tmp/dvc.lock.kept").write_text(lock(kept))
    list(prune(checkout, NOTHING, dry_run=False))
    assert path.exists() and there(kept)
    Path("dvc.lock").write_text(lock(cached(b"[{", ".dir")))
    with pytest.raises(StillhouseError, match="is damaged.*verify --repair"):
        list(prune(checkout, NOTHING, dry_run=False))


def test_a_cache_that_others_share_is_left_alone(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("shared") / "cache"
    Path(".dvc/config.local").write_text(f"[cache]\n    dir = {elsewhere}\n")
    (said,) = prune(checkout, NOTHING, dry_run=True)
    assert said == f"kept     cache: {elsewhere} lies outside this project, and others may need what is in it"


def test_a_runs_worktree_belongs_to_the_project_around_it(checkout: Path) -> None:
    (checkout / "params/suites").mkdir()
    (checkout / "params/suites/one.yaml").write_text("")
    commit("a suite")
    path = make_worktree(checkout, "run", "")
    assert find_checkout(path / "params") == find_checkout(checkout) == checkout


def test_what_made_production_is_kept_without_its_experiment(checkout: Path) -> None:
    made = cached(b"made production")
    Path("dvc.lock").write_text(lock(made))
    git("add", "dvc.lock")
    git("update-ref", "refs/stillhouse/production/3", git("stash", "create"))
    git("rm", "--quiet", "--force", "dvc.lock")
    list(prune(checkout, NOTHING, dry_run=False))
    assert there(made)


def test_negative_numbers_are_refused(checkout: Path) -> None:
    with pytest.raises(StillhouseError, match="at least 0"):
        list(prune(checkout, Kept(runs=-1), dry_run=True))
