"""Worktrees of runs: what is brought over, what cannot be made, what is kept, and two at once."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest
from toy_pipeline import toy_plan, toy_stage

from flows.prune import Kept, prune
from flows.run import run_id
from flows.workspace import RunError, cache_in_use, hold, in_checkout, make_worktree, own_worktree, worktrees
from stillhouse.errors import StillhouseError
from tasks.recorded import KEPT_LOCK

WHOLE = "schema: '2.0'\nstages:\n  a:\n    cmd: {}\n"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(toy: Path) -> Path:
    git("config", "user.name", "test")
    git("config", "user.email", "test@example.org")
    (toy / ".gitignore").write_text(".stillhouse/\nlogs/\nignored\n")
    toy_plan(toy_stage("a"))
    for name in ("edited", "deleted", "becomes-a-folder", "becomes-a-link", "staged"):
        (toy / name).write_text("committed\n")
    (toy / "folder").mkdir()
    (toy / "folder/inside").write_text("committed\n")
    (toy / "dvc.lock").write_text(WHOLE.format("committed"))
    git("add", "--all")
    git("commit", "--quiet", "--message", "one")
    return toy


def made(checkout: Path) -> list[str]:
    """Worktrees, and what git knows of them."""
    known = [
        line for line in git("worktree", "list", "--porcelain").splitlines() if line.startswith("worktree ")
    ]
    assert len(known) == 1 + len(worktrees(checkout))
    return [path.name for path in worktrees(checkout)]


def test_a_worktree_has_what_the_checkout_has_and_git_does_not_ignore(checkout: Path) -> None:
    Path("edited").write_text("edited\n")
    Path("staged").write_text("staged\n")
    git("add", "staged")
    Path("deleted").unlink()
    Path("becomes-a-folder").unlink()
    Path("becomes-a-folder").mkdir()
    Path("becomes-a-folder/inside").write_text("new\n")
    Path("becomes-a-link").unlink()
    Path("becomes-a-link").symlink_to("edited")
    Path("folder/inside").unlink()
    Path("folder").rmdir()
    Path("folder").write_text("a file now\n")
    Path("new file").write_text("new\n")
    Path("ignored").write_text("ignored\n")
    path = make_worktree(checkout, "run", "")
    assert (path / "edited").read_text() == "edited\n"
    assert (path / "staged").read_text() == "staged\n"
    assert (path / "becomes-a-folder/inside").read_text() == "new\n"
    assert (path / "folder").read_text() == "a file now\n"
    assert os.readlink(path / "becomes-a-link") == "edited"
    assert (path / "new file").read_text() == "new\n"
    assert not (path / "deleted").exists() and not (path / "ignored").exists()
    # At a revision, none of it.
    path = make_worktree(checkout, "at-a-revision", "HEAD")
    assert (path / "edited").read_text() == "committed\n" and not (path / "new file").exists()


@pytest.mark.parametrize("cut", [30, -1])
def test_a_lock_that_is_being_written_is_not_brought_over(checkout: Path, cut: int) -> None:
    Path("dvc.lock").write_text(WHOLE.format("edited")[:cut])
    with pytest.raises(StillhouseError, match="dvc.lock: cannot be read, and no copy is at hand"):
        make_worktree(checkout, "run", "")
    assert made(checkout) == []
    KEPT_LOCK.parent.mkdir(exist_ok=True)
    KEPT_LOCK.write_text(WHOLE.format("kept"))
    assert (make_worktree(checkout, "run", "") / "dvc.lock").read_text() == WHOLE.format("kept")
    threading.Timer(0.3, lambda: Path("dvc.lock").write_text(WHOLE.format("edited"))).start()
    assert (make_worktree(checkout, "second", "") / "dvc.lock").read_text() == WHOLE.format("edited")


def test_an_unknown_revision_is_one_line(checkout: Path) -> None:
    refused = pytest.raises(StillhouseError, match="'no-such' is neither a git revision nor a DVC experiment")
    with refused, own_worktree(checkout, "run", "no-such"):
        pass
    assert made(checkout) == []


def test_nothing_committed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StillhouseError, match="not a git repository"), own_worktree(tmp_path, "run", ""):
        pass
    git("init", "--quiet")
    with pytest.raises(StillhouseError, match="nothing is committed yet"), own_worktree(tmp_path, "run", ""):
        pass


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("edited").write_text("edited\n")

    def full(source: Path, target: Path, **_: object) -> None:
        Path(target).write_text("ed")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("flows.workspace.shutil.copy2", full)
    with pytest.raises(StillhouseError, match="edited: the run's worktree cannot be written .No space left"):
        make_worktree(checkout, "run", "")
    assert made(checkout) == []


def test_a_run_that_was_refused_leaves_no_worktree_and_one_whose_stages_ran_does(checkout: Path) -> None:
    with pytest.raises(StillhouseError, match="^refused$"), own_worktree(checkout, "refused", ""):
        raise StillhouseError("refused")
    assert made(checkout) == []
    kept = pytest.raises(RunError, match="^broken .what ran is in .stillhouse/worktrees/broken until")
    with kept, own_worktree(checkout, "broken", "") as path:
        (path / "logs").mkdir()
        (path / "logs/digest_code.log").touch()
        (path / "logs/a.log").touch()
        raise StillhouseError("broken")
    assert made(checkout) == ["broken"]


def test_another_attempt_of_a_run_has_a_worktree_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    identifier = "0123456789"
    assert run_id("smoke Name", identifier) == "smoke-name-012345"
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__RUN_COUNT", "2")
    assert run_id("smoke Name", identifier) == "smoke-name-012345-2"


def test_the_name_of_another_run_is_refused_and_that_one_is_left_alone(checkout: Path) -> None:
    with own_worktree(checkout, "run", "") as path:
        refused = pytest.raises(StillhouseError, match="worktrees/run: exists already")
        with refused, own_worktree(checkout, "run", ""):
            pass
        assert (path / "edited").exists()
    assert made(checkout) == ["run"]


def test_two_runs_in_the_checkout_itself(checkout: Path) -> None:
    refused = pytest.raises(
        StillhouseError, match=f"another run is in progress.*process {os.getpid()}, since"
    )
    with in_checkout(checkout), refused, in_checkout(checkout):
        pass


def test_two_schedulers_and_pruning_at_once(checkout: Path) -> None:
    """Runs begin and end on all sides while everything that may go is pruned: none loses its worktree."""
    errors: list[BaseException] = []
    over = threading.Event()

    def scheduler(name: str) -> None:
        try:
            for number in range(6):
                with own_worktree(checkout, f"{name}-{number}", "") as path:
                    for _ in range(5):
                        assert (path / "edited").read_text() == "committed\n"
                        assert (path / ".dvc/config.local").exists()
        except BaseException as error:
            errors.append(error)

    def pruner() -> None:
        try:
            while not over.is_set():
                list(prune(checkout, Kept(runs=0, experiments=0, scratch_days=0), dry_run=False))
        except BaseException as error:
            errors.append(error)

    schedulers = [threading.Thread(target=scheduler, args=(name,)) for name in ("one", "two")]
    pruning = threading.Thread(target=pruner)
    for thread in (*schedulers, pruning):
        thread.start()
    for thread in schedulers:
        thread.join()
    over.set()
    pruning.join()
    assert errors == []
    list(prune(checkout, Kept(runs=0), dry_run=False))
    assert made(checkout) == []


def test_a_worktree_that_goes_meanwhile(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_worktree(checkout, "run", "")
    real = Path.is_dir

    def then_gone(self: Path) -> bool:
        found = real(self)
        if self == path and found:
            subprocess.run(["rm", "-rf", str(path)], check=True)
        return found

    monkeypatch.setattr(Path, "is_dir", then_gone)
    assert worktrees(checkout) == [path]
    monkeypatch.undo()
    git("worktree", "prune")
    with hold(make_worktree(checkout, "held", "")), cache_in_use(checkout):
        assert next(iter(prune(checkout, Kept(runs=0), dry_run=False))).endswith("its run is in progress")
