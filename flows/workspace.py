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
from tasks.cache import cache_in_use
from tasks.git import git, resolve
from tasks.plan import Stage, read_plan
from tasks.recorded import KEPT_LOCK, LOCK, is_whole
from tasks.stage import DVC_YAML, PIPELINE, cache_folder, read_yaml
from tasks.worker import write_local_config

PRIVATE = Path(".stillhouse")
PROMOTED = (
    "refs/stillhouse/production"  # git references to the experiments that made it, which keep its lineage
)

# Whether a run happens in the checkout itself. It is for whoever calls a flow here, and no parameter of the flow: whoever
# triggers one from elsewhere has no business in the checkout.
in_place: ContextVar[bool] = ContextVar("in_place", default=False)


class RunError(StillhouseError):
    """An error after stages have run: what they have left is kept."""


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


@contextlib.contextmanager
def own_worktree(checkout: Path, name: str, revision: str, *, share_cache: bool = True) -> Iterator[Path]:
    """A worktree for the block, held. It is given up where the block ends with a StillhouseError before a stage has run.

    Raises:
        StillhouseError: no worktree could be made.
        RunError: the block ended with a StillhouseError when stages had run.
    """
    with cache_in_use(checkout), contextlib.ExitStack() as block:
        with _worktrees_locked(checkout):
            path = _make(checkout, name, revision, share_cache)
            block.enter_context(hold(path))  # before pruning, which waits for the lock, can see it
        try:
            yield path
        except StillhouseError as error:
            # With a cache of its own, it has nothing that another run could go on from.
            if share_cache and _has_run(path):
                kept = path.relative_to(checkout)
                raise RunError(f"{error} (what ran is in {kept} until `stillhouse prune`)") from error
            remove_worktree(checkout, path)
            raise


def _has_run(worktree: Path) -> bool:
    """Whether a stage was begun there, other than the one that comes before all."""
    from tasks.run_stage import LOGS  # with Prefect, which who only looks at worktrees does not need

    with contextlib.suppress(StillhouseError):
        stages = (read_yaml(worktree / DVC_YAML) or {}).get("stages", {})
        return any((worktree / LOGS / f"{name}.log").exists() for name in stages if name != "digest_code")
    return False  # there is no plan


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
        for mark in (path / ".git", path):  # written when the worktree was made, and never again
            with contextlib.suppress(FileNotFoundError):
                return mark.stat().st_mtime, path.name
        return 0.0, path.name  # it was removed meanwhile

    found = [path for path in (checkout / PRIVATE / "worktrees").glob("*") if path.is_dir()]
    return sorted(found, key=made, reverse=True)


@contextlib.contextmanager
def _worktrees_locked(checkout: Path) -> Iterator[None]:
    """Only one process at a time makes or removes a worktree: two at once read each other's half-written entries."""
    (checkout / PRIVATE).mkdir(exist_ok=True)
    with open(checkout / PRIVATE / "worktrees.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_worktree(checkout: Path, name: str, revision: str, *, share_cache: bool = True) -> Path:
    """A worktree at ``revision`` (empty: HEAD plus what is not committed yet).

    It has the checkout's DVC cache, and with it the saved states of stages, or an empty one of its own.

    Raises:
        StillhouseError: not a git repository, no such revision, or it cannot be written.
    """
    with _worktrees_locked(checkout):
        return _make(checkout, name, revision, share_cache)


def _make(checkout: Path, name: str, revision: str, share_cache: bool) -> Path:
    path = checkout / PRIVATE / "worktrees" / name
    if path.exists():
        raise StillhouseError(
            f"{path.relative_to(checkout)}: exists already; `stillhouse prune` removes old ones"
        )
    git(checkout, "worktree", "prune")
    commit = resolve(checkout, revision) if revision else _head(checkout)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        git(checkout, "worktree", "add", "--quiet", "--detach", str(path), commit)
        if not revision:
            _copy_uncommitted(checkout, path)
        cache = cache_folder(checkout) if share_cache else path / ".dvc" / "cache"
        write_local_config(checkout, path, cache)
    except BaseException as error:
        _remove(checkout, path)
        if isinstance(error, OSError):
            raise StillhouseError(
                f"{error.filename or path}: the run's worktree cannot be written ({error.strerror or error}); free space or "
                "check permissions"
            ) from error
        raise
    return path


def _head(checkout: Path) -> str:
    try:
        return git(checkout, "rev-parse", "--verify", "--quiet", "HEAD^{commit}").strip()
    except StillhouseError:
        raise StillhouseError(
            f"{checkout}: nothing is committed yet, and a run's worktree begins at a commit: `git add --all && git commit`"
        ) from None


def remove_worktree(checkout: Path, path: Path) -> None:
    """Give a run's worktree up, with all that is in it; the shared cache keeps what stages have finished."""
    with _worktrees_locked(checkout):
        _remove(checkout, path)


def remove_if_free(checkout: Path, path: Path, dry_run: bool = False) -> bool:
    """Give a worktree up whose run has ended (with ``dry_run``: only look); whether it has."""
    with _worktrees_locked(checkout), contextlib.suppress(StillhouseError, FileNotFoundError):
        with hold(path):
            if not dry_run:
                _remove(checkout, path)
        return True
    return not path.exists()


def _remove(checkout: Path, path: Path) -> None:
    with contextlib.suppress(StillhouseError):
        git(checkout, "worktree", "remove", "--force", str(path))
    shutil.rmtree(path, ignore_errors=True)  # where git does not know it any more
    git(checkout, "worktree", "prune")


def _copy_uncommitted(checkout: Path, worktree: Path) -> None:
    """Bring over what the checkout has and HEAD has not: edits, deletions, and new files that git does not ignore."""
    changed = git(checkout, "diff", "--name-only", "--no-renames", "-z", "HEAD").split("\0")
    new = git(checkout, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    for name in filter(None, [*changed, *new]):
        source, target = checkout / name, worktree / name
        if name == LOCK and source.is_file():
            target.write_text(_whole_lock(checkout))
            continue
        # What is there may be of another kind: a file where a link is to be, a folder where a file is.
        if target.is_symlink() or target.is_file():
            target.unlink()
        if source.is_symlink() or source.is_file():
            if target.is_dir():
                shutil.rmtree(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # it was deleted meanwhile
                shutil.copy2(source, target, follow_symlinks=False)


def _whole_lock(checkout: Path) -> str:
    """The checkout's ``dvc.lock``, or the copy made before it was cut off.

    Raises:
        StillhouseError: it is cut off, and there is no copy.
    """
    for _ in range(10):
        text = (checkout / LOCK).read_text(errors="replace")
        if is_whole(text):
            return text
        time.sleep(0.2)  # a plain `dvc repro` may be writing it
    with contextlib.suppress(OSError):
        if is_whole(text := (checkout / KEPT_LOCK).read_text(errors="replace")):
            return text
    raise StillhouseError(
        f"{LOCK}: cannot be read, and no copy is at hand; restore it with `git checkout {LOCK}`"
    )


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
