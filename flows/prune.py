"""``stillhouse prune``: give back what runs have left behind, and nothing that anyone still needs.

Kept are: every run in progress; the newest worktrees and experiments; saved states of stages that were interrupted
lately; in the cache, whatever a commit of any branch or tag, a kept experiment or a kept worktree refers to. What is or was
in production is in commits.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.workspace import PROMOTED, remove_if_free, worktrees
from stillhouse.errors import StillhouseError
from tasks.cache import cache_in_use
from tasks.git import git
from tasks.recorded import KEPT_LOCK, LOCK, Out, all_objects, object_path, objects_named, recorded_files
from tasks.stage import cache_folder

DAY = 86_400.0
# What lies beside the cache: a stage's saved state, its lock, and what a kill has left of the writing of one.
_SAVED = re.compile(r"\.?([0-9a-f]{64})(?:\.lock|\.old|\.\d+\.tmp)?")


@dataclass(frozen=True)
class Kept:
    """What is kept.

    Attributes:
        runs: newest worktrees.
        experiments: newest DVC experiments.
        scratch_days: age of a saved state, in days.
    """

    runs: int = 5
    experiments: int = 50
    scratch_days: float = 7.0


def prune(checkout: Path, kept: Kept, dry_run: bool) -> Iterator[str]:
    """Remove what ``kept`` does not keep (with ``dry_run``: only say what); a line for each thing.

    Raises:
        StillhouseError: a negative number to keep.
    """
    if min(kept.runs, kept.experiments, kept.scratch_days) < 0:
        raise StillhouseError("prune: numbers of at least 0 are allowed")
    gone: list[Path] = []
    yield from _prune_worktrees(checkout, kept.runs, dry_run, gone)
    yield from _prune_experiments(checkout, kept.experiments, dry_run)
    yield from _prune_scratch(checkout, kept.scratch_days * DAY, dry_run)
    yield from _prune_cache(checkout, kept, dry_run, gone)


def _prune_worktrees(checkout: Path, keep: int, dry_run: bool, gone: list[Path]) -> Iterator[str]:
    for path in worktrees(checkout)[keep:]:
        name = path.relative_to(checkout)
        if remove_if_free(checkout, path, dry_run):
            gone.append(path)
            yield f"worktree {name}"
        else:
            yield f"kept     worktree {name}: its run is in progress"


def experiments(checkout: Path) -> list[tuple[str, str]]:
    """Reference and name of every saved experiment, the newest first."""
    form = "--format=%(refname)"
    found = git(checkout, "for-each-ref", "--sort=-committerdate", form, "refs/exps").split()
    # refs/exps/<first two>/<rest of the baseline's hash>/<name>; others are DVC's own.
    saved = [(ref, ref.split("/")) for ref in found]
    return [(ref, parts[4]) for ref, parts in saved if len(parts) == 5 and len(parts[2]) == 2]


def _prune_experiments(checkout: Path, keep: int, dry_run: bool) -> Iterator[str]:
    for reference, name in experiments(checkout)[keep:]:
        if not dry_run:
            git(checkout, "update-ref", "-d", reference)
        yield f"experiment {name}"


def _prune_scratch(checkout: Path, age: float, dry_run: bool) -> Iterator[str]:
    root = cache_folder(checkout).with_name("scratch")
    found: dict[str, list[Path]] = {}
    for path in sorted(root.glob("*")):
        if match := _SAVED.fullmatch(path.name):
            found.setdefault(str(match[1]), []).append(path)
    for key, paths in sorted(found.items()):
        lock_path = root / f"{key}.lock"
        if time.time() - max(map(_touched, paths)) < age:
            continue
        with contextlib.ExitStack() as block:
            if lock_path.exists() or not dry_run:  # who only looks leaves no new file
                lock = block.enter_context(open(lock_path, "a"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # a stage is at it
            folders = [path for path in paths if path != lock_path]
            if folders:
                size = _bytes(sum(map(_size, folders)))
                yield f"saved state {key[:12]} of an interrupted stage, {size}"
            if not dry_run:
                for folder in folders:
                    shutil.rmtree(folder, ignore_errors=True)
                lock_path.unlink(missing_ok=True)  # `hold_scratch` notices


def _touched(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0  # the stage that it belonged to has ended meanwhile


def _prune_cache(checkout: Path, kept: Kept, dry_run: bool, gone: list[Path]) -> Iterator[str]:
    cache = cache_folder(checkout)
    if not cache.is_relative_to(checkout / ".dvc"):
        yield f"kept     cache: {cache} lies outside this project, and others may need what is in it"
        return
    with cache_in_use(checkout, exclusive=True) as alone:
        if not alone:
            yield "kept     cache: a run is in progress; prune again when it is done"
            return
        needed = _needed(checkout, cache, kept, gone)
        count = size = 0
        for name, path in all_objects(cache):
            if name not in needed:
                count, size = count + 1, size + path.stat().st_size
                if not dry_run:
                    path.unlink()
    yield f"cache: {count:,} objects, {_bytes(size)}"


def _needed(checkout: Path, cache: Path, kept: Kept, gone: list[Path]) -> set[str]:
    """The cache objects that any lock file we keep refers to, directly or as part of a folder."""
    files = ["--", LOCK, ":(glob)**/*.dvc"]
    # The states that these files ever had; a commit that did not touch them has none of its own.
    commits = git(checkout, "rev-list", "--full-history", "--branches", "--tags", "--remotes", "HEAD", *files)
    promoted = git(checkout, "for-each-ref", "--format=%(refname)", PROMOTED).split()
    newest = [reference for reference, _ in experiments(checkout)[: kept.experiments]]
    found: set[str] = set()
    for revision in [*commits.split(), *promoted, *newest]:
        names = git(checkout, "ls-tree", "-r", "--name-only", "-z", revision).split("\0")
        for name in filter(_is_lock, names):
            found |= objects_named(git(checkout, "show", f"{revision}:{name}"))
    # Every worktree that is still there, whether it was to be kept or could not be removed.
    for folder in [checkout, *(path for path in worktrees(checkout) if path not in gone)]:
        found_here = git(folder, "ls-files", "--cached", "--others", "-z", "--", "*.dvc").split("\0")
        for path in [folder / name for name in (*filter(None, found_here), LOCK, str(KEPT_LOCK))]:
            if path.is_file():
                found |= objects_named(path.read_text())
    for name in [name for name in found if name.endswith(".dir")]:
        files_in = recorded_files(cache, Out("", name, 0))
        if files_in is not None:
            found |= set(files_in.values())
        elif (path := object_path(cache, name)).exists():
            raise StillhouseError(
                f"{path} is damaged, so that nobody knows what it needs; `stillhouse verify --repair` first"
            )
    return found


def _is_lock(name: str) -> bool:
    return name == LOCK or name.endswith(".dvc")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
