"""``stillhouse prune``: give back what runs have left behind, and nothing that anyone still needs.

Kept are: every run in progress; the newest worktrees and experiments; saved states of stages that were interrupted
lately; in the cache, whatever a commit of any branch or tag, a kept experiment or a kept worktree refers to. What is or was
in production is in commits.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.workspace import PROMOTED, cache_in_use, git, run_in_progress, worktrees
from stillhouse.errors import StillhouseError
from tasks.stage import cache_folder

DAY = 86_400.0
# As lock files name a cache object; quoted where it looks like a number.
_OBJECT = re.compile(r"md5: '?([0-9a-f]{32}(?:\.dir)?)\b")
KEPT_LOCK = Path(".dvc/tmp/dvc.lock.kept")  # what a cut-off dvc.lock is restored from


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
    yield from _prune_worktrees(checkout, kept.runs, dry_run)
    yield from _prune_experiments(checkout, kept.experiments, dry_run)
    yield from _prune_scratch(checkout, kept.scratch_days * DAY, dry_run)
    yield from _prune_cache(checkout, kept, dry_run)


def _prune_worktrees(checkout: Path, keep: int, dry_run: bool) -> Iterator[str]:
    for path in worktrees(checkout)[keep:]:
        name = path.relative_to(checkout)
        if run_in_progress(path):
            yield f"kept     worktree {name}: its run is in progress"
            continue
        if not dry_run:
            with contextlib.suppress(StillhouseError):
                git(checkout, "worktree", "remove", "--force", str(path))
            shutil.rmtree(path, ignore_errors=True)  # where git does not know it any more
        yield f"worktree {name}"
    if not dry_run:
        git(checkout, "worktree", "prune")


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
    for lock_path in sorted(root.glob("*.lock")):
        folder = lock_path.with_suffix("")
        touched = max(path.stat().st_mtime for path in (folder, lock_path) if path.exists())
        if time.time() - touched < age:
            continue
        with open(lock_path, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # a stage is at it
            if folder.exists():
                yield f"saved state {folder.name[:12]} of an interrupted stage, {_bytes(_size(folder))}"
            if not dry_run:
                shutil.rmtree(folder, ignore_errors=True)
                lock_path.unlink()  # `hold_scratch` notices


def _prune_cache(checkout: Path, kept: Kept, dry_run: bool) -> Iterator[str]:
    if not cache_folder(checkout).is_relative_to(checkout / ".dvc"):
        yield f"kept     cache: {cache_folder(checkout)} lies outside this project, and others may need what is in it"
        return
    with cache_in_use(checkout, exclusive=True) as alone:
        if not alone:
            yield "kept     cache: a run is in progress; prune again when it is done"
            return
        needed = _needed(checkout, kept)
        objects = cache_folder(checkout) / "files" / "md5"
        count = size = 0
        for path in objects.glob("[0-9a-f][0-9a-f]/*"):
            if path.is_file() and f"{path.parent.name}{path.name}" not in needed:
                count, size = count + 1, size + path.stat().st_size
                if not dry_run:
                    path.unlink()
    yield f"cache: {count:,} objects, {_bytes(size)}"


def _needed(checkout: Path, kept: Kept) -> set[str]:
    """Names of the cache objects that any lock file we keep refers to, directly or as part of a folder."""
    files = ["--", "dvc.lock", ":(glob)**/*.dvc"]
    # The states that these files ever had; a commit that did not touch them has none of its own.
    commits = git(checkout, "rev-list", "--full-history", "--branches", "--tags", "--remotes", "HEAD", *files)
    promoted = git(checkout, "for-each-ref", "--format=%(refname)", PROMOTED).split()
    newest = [reference for reference, _ in experiments(checkout)[: kept.experiments]]
    revisions = [*commits.split(), *promoted, *newest]
    texts = []
    for revision in revisions:
        names = git(checkout, "ls-tree", "-r", "--name-only", "-z", revision).split("\0")
        texts += [git(checkout, "show", f"{revision}:{name}") for name in names if _is_lock(name)]
    for folder in [checkout, *worktrees(checkout)[: kept.runs]]:
        found_here = git(folder, "ls-files", "--cached", "--others", "-z", "--", "*.dvc").split("\0")
        paths = [folder / name for name in (*filter(None, found_here), "dvc.lock", str(KEPT_LOCK))]
        texts += [path.read_text() for path in paths if path.is_file()]
    found = {name for text in texts for name in _OBJECT.findall(text)}
    objects = cache_folder(checkout) / "files" / "md5"
    for name in [name for name in found if name.endswith(".dir")]:
        path = objects / name[:2] / name[2:]
        try:
            found |= {entry["md5"] for entry in json.loads(path.read_text())}
        except FileNotFoundError:
            continue
        except ValueError:
            raise StillhouseError(
                f"{path} is damaged, so that nobody knows what it needs; `stillhouse verify --repair` first"
            ) from None
    return found


def _is_lock(name: str) -> bool:
    return name == "dvc.lock" or name.endswith(".dvc")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
