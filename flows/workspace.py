"""Where a run happens: in the checkout itself, or in a git worktree of its own that shares the checkout's DVC cache."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from stillhouse.errors import StillhouseError
from tasks.git import git
from tasks.plan import Stage, read_plan
from tasks.stage import DVC_YAML, PIPELINE, cache_folder
from tasks.worker import write_local_config

PRIVATE = Path(".stillhouse")
PROMOTED = (
    "refs/stillhouse/production"  # git references to the experiments that made it, which keep its lineage
)

# Whether a run happens in the checkout itself. It is for whoever calls a flow here, and no parameter of the flow: whoever
# triggers one from elsewhere has no business in the checkout.
in_place: ContextVar[bool] = ContextVar("in_place", default=False)


def find_checkout(start: Path) -> Path:
    """The stillhouse project that ``start`` lies in.

    Raises:
        StillhouseError: there is none.
    """
    for folder in [start.resolve(), *start.resolve().parents]:
        if folder.parent.parts[-2:] == (str(PRIVATE), "worktrees"):
            continue  # a run's worktree belongs to the project around it
        if (folder / "params" / "suites").is_dir() and (folder / ".dvc").is_dir():
            return folder
    raise StillhouseError(
        f"{start}: no stillhouse project here or above (a folder with params/suites/ and .dvc/)"
    )


@contextlib.contextmanager
def hold(checkout: Path) -> Iterator[None]:
    """Keep every other run out of ``checkout`` for the block's duration.

    Raises:
        StillhouseError: another run is in progress there: its process and since when.
    """
    path = checkout / PRIVATE / "run.lock"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "an unknown process"
            raise StillhouseError(
                f"another run is in progress in {checkout} ({holder}); wait for it, or stop it with Ctrl-C where it runs"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        lock.flush()
        yield


def run_in_progress(workspace: Path) -> bool:
    """Whether somebody holds ``workspace``."""
    with contextlib.suppress(FileNotFoundError), open(workspace / PRIVATE / "run.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def cache_in_use(checkout: Path, exclusive: bool = False) -> Iterator[bool]:
    """Say that a run needs what lies in the cache, or, exclusively, that things are taken out of it.

    Yields:
        Whether the lock was had: a run waits for it, who wants the cache alone does not.
    """
    path = (
        cache_folder(checkout).with_name("scratch") / "cache-in-use"
    )  # beside the cache: whoever shares that shares this
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        except BlockingIOError:
            yield False
            return
        yield True


@contextlib.contextmanager
def own_worktree(checkout: Path, name: str, revision: str, *, share_cache: bool = True) -> Iterator[Path]:
    """A worktree for the block, held; what ends the block with a StillhouseError has left nothing worth keeping in it.

    Raises:
        StillhouseError: no worktree could be made.
    """
    with cache_in_use(checkout):
        path = make_worktree(checkout, name, revision, share_cache=share_cache)
        with hold(path):
            try:
                yield path
            except StillhouseError:
                remove_worktree(checkout, path)
                raise


@contextlib.contextmanager
def in_checkout(checkout: Path) -> Iterator[Path]:
    """The checkout itself for the block, held.

    Raises:
        StillhouseError: another run is in progress there.
    """
    with hold(checkout), cache_in_use(checkout):
        yield checkout


def worktrees(checkout: Path) -> list[Path]:
    """The worktrees of runs, the newest first."""

    def made(path: Path) -> tuple[float, str]:
        mark = path / ".git"  # written when the worktree was made, and never again
        return (mark if mark.exists() else path).stat().st_mtime, path.name

    found = [path for path in (checkout / PRIVATE / "worktrees").glob("*") if path.is_dir()]
    return sorted(found, key=made, reverse=True)


def make_worktree(checkout: Path, name: str, revision: str, *, share_cache: bool = True) -> Path:
    """A worktree at ``revision`` (empty: HEAD plus what is not committed yet).

    It has the checkout's DVC cache, and with it the saved states of stages, or an empty one of its own.

    Raises:
        StillhouseError: not a git repository, or no such revision.
    """
    path = checkout / PRIVATE / "worktrees" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two at once read each other's half-written entries.
    with open(checkout / PRIVATE / "worktrees.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        git(checkout, "worktree", "prune")
        git(checkout, "worktree", "add", "--quiet", "--detach", str(path), revision or "HEAD")
    if not revision:
        _copy_uncommitted(checkout, path)
    cache = cache_folder(checkout) if share_cache else path / ".dvc" / "cache"
    write_local_config(checkout, path, cache)
    return path


def remove_worktree(checkout: Path, path: Path) -> None:
    """Give a run's worktree up, with all that is in it; the shared cache keeps what stages have finished."""
    git(checkout, "worktree", "remove", "--force", str(path))


def _copy_uncommitted(checkout: Path, worktree: Path) -> None:
    """Bring over what the checkout has and HEAD has not: edits, deletions, and new files that git does not ignore."""
    changed = git(checkout, "diff", "--name-only", "--no-renames", "-z", "HEAD").split("\0")
    new = git(checkout, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    for name in filter(None, [*changed, *new]):
        source, target = checkout / name, worktree / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
        elif not source.exists():
            target.unlink(missing_ok=True)


# Plans made while the private server started, by their arguments, with the files that they left.
_ahead: dict[tuple[str, ...], tuple[list[bytes], list[Stage]]] = {}


def plan(workspace: Path, suite: str, overrides: list[str], *options: str) -> list[Stage]:
    """The plan, made inside the workspace as ``call_planner`` does, unless :func:`plan_ahead` has just made it."""
    arguments = (suite, "--json", *options, *(f"--set={override}" for override in overrides))
    files, stages = _ahead.pop((str(workspace), *arguments), ([], []))
    if stages and files == _plan_files(workspace):
        return stages
    return read_plan(call_planner(workspace, *arguments))


def plan_ahead(workspace: Path, suite: str, overrides: list[str], *options: str) -> None:
    """Make a plan that :func:`plan` will take over if its files are still the same then."""
    stages = plan(workspace, suite, overrides, *options)
    key = (str(workspace), suite, "--json", *options, *(f"--set={override}" for override in overrides))
    _ahead[key] = (_plan_files(workspace), stages)


def _plan_files(workspace: Path) -> list[bytes]:
    files = (
        workspace / DVC_YAML,
        workspace / PIPELINE,
        *sorted((workspace / "params/suites").glob("*.yaml")),
    )
    return [file.read_bytes() for file in files if file.exists()]


def call_planner(workspace: Path, *arguments: str) -> str:
    """What ``tasks.plan`` prints, run in a process inside the workspace: with the code and the modules that lie there.

    Raises:
        StillhouseError: what the planner said.
    """
    argv = [sys.executable, "-m", "tasks.plan", *arguments]
    # An empty PYTHONSAFEPATH is none: modules must be found in the current folder.
    environment = {**os.environ, "PYTHONSAFEPATH": ""}
    result = subprocess.run(argv, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raise StillhouseError((said or lines or [f"planning failed with exit code {result.returncode}"])[-1])
    return result.stdout
