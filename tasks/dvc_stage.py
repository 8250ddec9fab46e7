"""The only module that knows DVC: run one stage with DVC's own engine, ask what is stale, save an experiment, move data.

Each command is a process of its own in the workspace's root, because DVC's engine is neither thread-safe nor free of the
current folder. Answers are written as JSON to the file named by ``--answer``.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dvc.dvcfile
from dvc.exceptions import DvcException, ReproductionError
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.stage.exceptions import StageCmdFailedError

from stillhouse.errors import StillhouseError
from stillhouse.files import write_json
from tasks.machine import MACHINES, record
from tasks.recorded import read_recorded
from tasks.stage import (
    DVC_YAML,
    MARKER_FILE,
    SCRATCH_HELD,
    cache_folder,
    clear_scratch,
    hold_scratch,
    inputs_key,
    read_yaml,
    scratch_root,
    stage_entry,
    write_yaml,
)

LOCK = Path("dvc.lock")
KEPT_LOCK = Path(".dvc/tmp/dvc.lock.kept")


def keep_lock() -> None:
    """Copy a sound ``dvc.lock`` aside: DVC truncates it in place, and a kill then would lose what it knows."""
    if LOCK.exists() and _parses(LOCK):
        KEPT_LOCK.parent.mkdir(parents=True, exist_ok=True)
        temporary = KEPT_LOCK.with_name(f"{KEPT_LOCK.name}.{os.getpid()}")
        shutil.copy2(LOCK, temporary)
        os.replace(temporary, KEPT_LOCK)


def restore_lock() -> None:
    """Put the copy back where ``dvc.lock`` was cut off. Call it with DVC's repository lock held."""
    if LOCK.exists() and not _parses(LOCK):
        if KEPT_LOCK.exists():
            shutil.copy2(KEPT_LOCK, LOCK)
            print(
                "dvc.lock was cut off by an interruption; the copy made before was put back", file=sys.stderr
            )
        else:
            raise StillhouseError(
                "dvc.lock: cannot be read, and no copy is at hand; restore it with `git checkout dvc.lock`"
            )


def _parses(path: Path) -> bool:
    try:
        content = read_yaml(path)
    except StillhouseError:
        return False
    return isinstance(content, dict) and "schema" in content


def _keep_before_each_write() -> None:
    # DVC has no hook here. Both writers hold its repository lock, so no two processes copy or write at a time.
    for method in ("dump_stages", "remove_stage"):
        original: Callable[..., Any] = getattr(dvc.dvcfile.Lockfile, method)

        def guarded(self: Any, *args: Any, _original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            keep_lock()
            return _original(self, *args, **kwargs)

        setattr(dvc.dvcfile.Lockfile, method, guarded)


def _open() -> Repo:
    repo = Repo(".", _wait_for_lock=True)
    with repo.lock:
        restore_lock()
    return repo


def _reproduce(repo: Repo, name: str, marker: Path, **options: Any) -> None:
    """DVC's own engine for one stage; waits while another stage holds one of its files.

    Raises:
        StillhouseError: the stage's command failed (it has said why), or DVC could not do its part.
    """
    while True:
        try:
            repo.reproduce([name], single_item=True, **options)
            return
        except ReproductionError as error:
            cause = error.__cause__
            if isinstance(cause, LockError) and not marker.exists():
                time.sleep(0.3)
                repo = Repo(".", _wait_for_lock=True)
                continue
            if isinstance(cause, StageCmdFailedError):
                raise StillhouseError(f"{name}: failed") from error
            raise StillhouseError(f"{name}: {_one_line(cause or error)}") from error


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or ''}: {error.strerror}".removeprefix(": ")
    return " ".join(str(error).split()) or type(error).__name__


def run(name: str, force: bool) -> dict[str, Any]:
    """Bring one stage up to date; ``executed`` says whether its command ran (or it was unchanged or restored)."""
    repo = _open()
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as folder:
        marker = Path(folder, "executed")
        os.environ[MARKER_FILE] = str(marker)
        os.environ[SCRATCH_HELD] = "1"

        def stop(*_: object) -> None:
            # While the command runs it gets the signal itself; after it, recording its outs is worth the grace.
            if not marker.exists():
                sys.exit(128 + signal.SIGTERM)

        signal.signal(signal.SIGTERM, stop)
        # Held from before DVC looks: whoever waits here finds the other run's result in the run-cache.
        with hold_scratch(inputs_key(stage_entry(name))) as scratch:
            _reproduce(repo, name, marker, force=force)
            clear_scratch(scratch)
        if marker.exists():
            # Without this note the stage is done all the same.
            with repo.lock, contextlib.suppress(StillhouseError):
                record(read_recorded(Path())[name], set(read_yaml(DVC_YAML)["stages"]))
        return {"executed": marker.exists()}


def begin(names: list[str]) -> dict[str, Any]:
    """Digest the code, then say which of the stages are stale: in one process for the whole plan."""
    repo = _open()
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as folder:
        _reproduce(repo, "digest_code", Path(folder, "never"))
    try:
        stale = Repo(".", _wait_for_lock=True).status(targets=names)
    except DvcException as error:
        raise StillhouseError(_one_line(error)) from error
    return {"stale": sorted(set(names) & {str(stage) for stage in stale})}


def fetch(targets: list[str], revision: str) -> dict[str, Any]:
    """Bring outs from a remote into the cache: those of a revision, or of the checkout; ``reason`` says why not all came."""
    repo = _open()
    if not repo.config["core"].get("remote"):
        return {"reason": "no default remote is configured"}
    revisions: dict[str, Any] = {"revs": [revision], "workspace": False} if revision else {}
    try:
        repo.fetch(targets=targets, **revisions)
        return {"reason": ""}
    except (DvcException, OSError) as error:
        return {"reason": _one_line(error)}


def check_out(targets: list[str], into: Path | None) -> dict[str, Any]:
    """Put outs from the cache into the checkout, or into a worktree that has a cache of its own.

    Where a file is not in the cache DVC removes the whole out that it belongs to: make sure before.
    """
    shared = {"cache": {"dir": str(cache_folder())}}
    if into:
        os.chdir(into)
    repo = Repo(".", _wait_for_lock=True, config=shared)
    # Not forced in the checkout: a file that nobody has recorded stays, and is named.
    return {"checked_out": repo.checkout(targets, force=into is not None)["stats"]}


def add(target: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Let DVC track a file or folder by ``<target>.dvc``, with ``about`` in it."""
    _open().add([str(target)], force=True)
    pointer = target.with_name(f"{target.name}.dvc")
    write_yaml(pointer, {**read_yaml(pointer), "meta": about})
    return {"added": str(pointer)}


def put(source: Path) -> dict[str, Any]:
    """Add files to the cache: ``source`` lists each one's path and its hash, which must be right.

    `dvc commit` would also write ``dvc.lock``, with inputs as they are now, which are not always those of then.
    """
    files: list[tuple[str, str]] = json.loads(source.read_text())
    cache = _open().cache.local
    cache.add([path for path, _ in files], cache.fs, [md5 for _, md5 in files])
    return {"put": len(files)}


def save(name: str) -> dict[str, Any]:
    """Save the workspace as a DVC experiment.

    Raises:
        StillhouseError: it cannot be.
    """
    # The experiment is a commit; git need not know the user's name for it.
    for key, value in (("name", "stillhouse"), ("email", "stillhouse@localhost")):
        if subprocess.run(["git", "config", f"user.{key}"], capture_output=True, check=False).returncode:
            for role in ("AUTHOR", "COMMITTER"):
                os.environ.setdefault(f"GIT_{role}_{key.upper()}", value)
    try:
        # Whether git has it yet or not, who made what goes with the experiment.
        new = [str(MACHINES)] if MACHINES.exists() else []
        # On its way DVC keeps references in git that all worktrees share: one at a time.
        scratch_root().mkdir(parents=True, exist_ok=True)
        with open(scratch_root() / "saving", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            commit = _open().experiments.save(name=name, force=True, include_untracked=new)
        return {"experiment": name, "commit": commit}
    except Exception as error:  # the git libraries under DVC have errors of their own
        raise StillhouseError(f"the run could not be saved as an experiment: {_one_line(error)}") from error


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tasks.dvc_stage", allow_abbrev=False)
    parser.add_argument("--answer", type=Path, required=True)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("name")
    one.add_argument("--force", action="store_true")
    commands.add_parser("begin").add_argument("names", nargs="+")
    commands.add_parser("save").add_argument("name")
    bring = commands.add_parser("fetch")
    bring.add_argument("--revision", default="")
    bring.add_argument("targets", nargs="+")
    place = commands.add_parser("checkout")
    place.add_argument("--into", type=Path)
    place.add_argument("targets", nargs="+")
    commands.add_parser("put").add_argument("source", type=Path)
    track = commands.add_parser("add")
    track.add_argument("target", type=Path)
    track.add_argument("about", type=json.loads)
    arguments = parser.parse_args()
    _keep_before_each_write()
    try:
        if arguments.command == "run":
            answer = run(arguments.name, arguments.force)
        elif arguments.command == "begin":
            answer = begin(arguments.names)
        elif arguments.command == "fetch":
            answer = fetch(arguments.targets, arguments.revision)
        elif arguments.command == "checkout":
            answer = check_out(arguments.targets, arguments.into)
        elif arguments.command == "add":
            answer = add(arguments.target, arguments.about)
        elif arguments.command == "put":
            answer = put(arguments.source)
        else:
            answer = save(arguments.name)
        write_json(arguments.answer, answer)
    except (StillhouseError, DvcException, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
