"""A stage on a worker that shares no files with the run's host: only the git remote, the DVC remote and what stands in a parcel.

The worker has a clone of its own, which ``STILLHOUSE_CHECKOUT`` names, and in it worktrees that stages use one after another.
"""

from __future__ import annotations

import configparser
import contextlib
import fcntl
import itertools
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

from stillhouse.errors import StillhouseError
from stillhouse.files import write_atomic
from tasks.git import git
from tasks.machine import MACHINES
from tasks.plan import DVC_LOCK
from tasks.stage import DVC_YAML, PIPELINE, cache_folder

CHECKOUT = "STILLHOUSE_CHECKOUT"
WORKTREES = Path(".stillhouse/workers")
GENERATED = (str(DVC_YAML), str(PIPELINE), str(DVC_LOCK))  # what a run has beyond its commit

Parcel = dict[str, str]  # "revision", and the text of each generated file


def pack(workspace: Path, written: Iterable[str]) -> Parcel:
    """What a worker needs to know of the run in ``workspace``; ``dvc.lock`` is added for each stage.

    Args:
        workspace: the run's folder, at its commit.
        written: what stages write there though git keeps it.

    Raises:
        StillhouseError: not all of the workspace is committed.
    """
    listed = git(workspace, "status", "--porcelain", "-z", "--no-renames").split("\0")
    if changed := [row[3:] for row in listed if row and row[3:] not in {*GENERATED, str(MACHINES), *written}]:
        raise StillhouseError(
            f"exchange: 'remote' sends workers a commit, and {changed[0]}"
            f"{f' and {len(changed) - 1} more' if len(changed) > 1 else ''} is not committed; commit it (and push it to where "
            "the workers fetch from), or name a --revision"
        )
    revision = git(workspace, "rev-parse", "HEAD").strip()
    return {"revision": revision} | {name: (workspace / name).read_text() for name in GENERATED[:2]}


@contextlib.contextmanager
def unpacked(parcel: Parcel) -> Iterator[Path]:
    """A worktree of this worker's checkout with what the parcel says, for the block alone.

    Raises:
        StillhouseError: the worker has no checkout, or the commit is not to be had.
    """
    checkout = Path(os.environ.get(CHECKOUT, ""))
    if not (checkout.is_absolute() and (checkout / ".dvc").is_dir()):
        raise StillhouseError(
            f"{CHECKOUT} is {os.environ.get(CHECKOUT, 'not set')}: it must name this worker's own clone of the project, by its "
            "whole path"
        )
    folder = checkout / WORKTREES
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        with open(folder / f"{number}.lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another stage's
            path = folder / str(number)
            with open(folder / "git.lock", "a") as git_lock:
                fcntl.flock(git_lock, fcntl.LOCK_EX)
                _check_out(checkout, path, parcel["revision"])
            for name in GENERATED:
                write_atomic(path / name, parcel[name])
            write_local_config(checkout, path, cache_folder(checkout))
            yield path
            return


def _check_out(checkout: Path, path: Path, revision: str) -> None:
    def known() -> bool:
        with contextlib.suppress(StillhouseError):
            git(checkout, "cat-file", "-e", f"{revision}^{{commit}}")
            return True
        return False

    if not known():
        with contextlib.suppress(StillhouseError):
            git(checkout, "fetch", "--quiet", "--all")
        if not known():
            raise StillhouseError(
                f"commit {revision[:12]} is neither in {checkout} nor on its git remotes: push it to where the workers fetch from"
            )
    if not (path / ".git").exists():
        git(checkout, "worktree", "prune")
        git(checkout, "worktree", "add", "--quiet", "--force", "--detach", str(path), revision)
    git(path, "checkout", "--quiet", "--force", "--detach", revision)
    git(path, "clean", "--quiet", "-ffdx")  # whatever an earlier stage left


def write_local_config(checkout: Path, worktree: Path, cache: Path) -> None:
    """Give a worktree a DVC cache, and the checkout's remotes with their credentials."""
    config = configparser.ConfigParser(interpolation=None)
    config.read([checkout / ".dvc" / "config", checkout / ".dvc" / "config.local"])
    if not config.has_section("cache"):
        config.add_section("cache")
    config["cache"]["dir"] = str(cache)
    for section in config.values():
        url = section.get("url", "")
        if section.name.startswith("'remote ") and "://" not in url:
            section["url"] = str((checkout / ".dvc" / url).resolve())  # relative to the file it stands in
    path = worktree / ".dvc" / "config.local"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        config.write(file)


def host() -> str:
    """This machine's name, for messages that are read on another one."""
    return platform.node()
