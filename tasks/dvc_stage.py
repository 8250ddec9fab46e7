"""The only module that knows DVC: run one stage with DVC's own engine, ask what is stale, save an experiment, move data.

Each command is a process of its own in the workspace's root, because DVC's engine is neither thread-safe nor free of the
current folder. Answers are written as JSON to the file named by ``--answer``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import io
import json
import logging
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import dvc.output
import dvc.stage.cache
import dvc.utils.serialize._common
import dvc.utils.serialize._yaml
from dvc.config import NoRemoteError
from dvc.exceptions import CheckoutError, DvcException, FileTransferError, ReproductionError
from dvc.fs import generic
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.stage.exceptions import StageCmdFailedError
from dvc.stage.serialize import to_single_stage_lockfile

from stillhouse.errors import StillhouseError
from stillhouse.files import check_folder, write_json
from tasks.cache import cache_in_use
from tasks.digest_code import FOLDER as CODE
from tasks.digest_code import environment
from tasks.git import git
from tasks.machine import MACHINES, processor, record
from tasks.recorded import KEPT_LOCK, is_whole, read_recorded
from tasks.recorded import LOCK as LOCK_NAME
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

LOCK = Path(LOCK_NAME)


CREDENTIALS = (
    "; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or `dvc remote modify --local REMOTE access_key_id KEY` and the same with "
    "secret_access_key"
)


def keep_lock() -> None:
    """Copy a whole ``dvc.lock`` aside: a plain `dvc repro` truncates it in place, and a kill then would lose what it knows."""
    if LOCK.exists() and is_whole(text := LOCK.read_text()):
        _replace(KEPT_LOCK, text)


def restore_lock() -> None:
    """Put the copy back where ``dvc.lock`` was cut off. Call it with DVC's repository lock held."""
    for left in KEPT_LOCK.parent.glob(f"{LOCK}.*"):
        if left != KEPT_LOCK:
            left.unlink(missing_ok=True)  # of a write that was killed: nobody else writes now
    if LOCK.exists() and not is_whole(LOCK.read_text(errors="replace")):
        if KEPT_LOCK.exists():
            _replace(LOCK, KEPT_LOCK.read_text())
            print(
                "dvc.lock was cut off by an interruption; the copy made before was put back", file=sys.stderr
            )
        else:
            raise StillhouseError(
                "dvc.lock: cannot be read, and no copy is at hand; restore it with `git checkout dvc.lock`"
            )


def _replace(path: Path, text: str) -> None:
    """Write a lock file whole or not at all, by way of DVC's own temporary files: what a kill leaves there, git does not see."""
    temporary = KEPT_LOCK.with_name(f"{LOCK}.{os.getpid()}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, error.strerror, str(path)
        ) from error  # of a full disk Python names no file


_dump_in_place: Callable[..., None] = dvc.utils.serialize._common._dump_data


def _dump_lock_in_one_step(path: Any, data: Any, dumper: Any, fs: Any = None, **options: Any) -> None:
    if os.path.basename(path) != str(LOCK):
        return _dump_in_place(path, data, dumper, fs=fs, **options)
    keep_lock()
    text = io.StringIO()
    dumper(data, text, **options)
    _replace(Path(path), text.getvalue())


_transfer: Callable[..., Any] = dvc.output.otransfer


def _transfer_all(*arguments: Any, **options: Any) -> Any:
    last = _Last()
    logger = logging.getLogger("dvc_data")
    logger.addHandler(last)
    try:
        result = _transfer(*arguments, **options)
    finally:
        logger.removeHandler(last)
    if result.failed:
        raise DvcException(f"the outs cannot all be put into the cache, so nothing is recorded{last.text}")
    return result


def _mend_dvc() -> None:
    """Make DVC record a stage whole or not at all. It has no hooks for either."""
    # It truncates dvc.lock and then fills it. Both of its writers come through these, with its repository lock held, so that no
    # two processes write at a time.
    dvc.utils.serialize._common._dump_data = _dump_lock_in_one_step
    dvc.utils.serialize._yaml._dump_data = _dump_lock_in_one_step
    # What it cannot put into the cache, on a full disk for example, it logs, and records the out all the same.
    dvc.output.otransfer = _transfer_all


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


def run(name: str, force: bool, check: bool = False, exchange: bool = False) -> dict[str, Any]:
    """Bring one stage up to date.

    Args:
        name: of the stage.
        force: run it even where it is up to date.
        check: compare the versions installed here with those that the code was digested with.
        exchange: pull what the stage reads, and push what it makes.

    Returns:
        ``executed``: whether its command ran (or it was unchanged or restored). With ``exchange``, ``entry``: under which name
        the run-cache has it; ``processor``: that has just made it, or none.

    Raises:
        StillhouseError: the stage's command failed (it has said why), or DVC could not do its part.
    """
    repo = _open()
    if exchange:
        _ask_remote_for_runs()
        _pull_inputs(repo, name)
    if check:
        _check_versions(name)
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
            _bring_back(scratch)
            _reproduce(repo, name, marker, force=force, pull=exchange)
            for saved in (scratch, *scratch.parent.glob(f".{scratch.name}.*")):
                clear_scratch(saved)
        made_on = processor() if marker.exists() else ""
        _record(repo, name, made_on)
        pushed = {"entry": _push_outs(name), "processor": made_on} if exchange else {}
        return {"executed": marker.exists(), **pushed}


def _bring_back(scratch: Path) -> None:
    """Put a saved state in its place that a kill between two renames has left beside it."""
    if not scratch.exists():
        with contextlib.suppress(StillhouseError):  # mostly there is none
            check_folder(scratch)


def _record(repo: Repo, name: str, made_on: str) -> None:
    """Note which kind of processor has just made a stage's outs; empty: they are older."""
    if made_on:
        # Without this note the stage is done all the same.
        with repo.lock, contextlib.suppress(StillhouseError):
            record(read_recorded(Path())[name], set(read_yaml(DVC_YAML)["stages"]), made_on)


def _check_versions(name: str) -> None:
    """A stage must compute with what stands in its code digest, or equal inputs would not give equal bytes."""
    digest = next(
        (Path(dep) for dep in stage_entry(name).get("deps", []) if dep.startswith(f"{CODE}/")), None
    )
    if digest is None:
        return
    wanted = json.loads(digest.read_text())["environment"]
    found = environment(wanted["device"])
    for key in sorted({*wanted, *found}):
        if found.get(key) != wanted.get(key):
            raise StillhouseError(
                f"{key} is {found.get(key, 'absent')} on this worker, and {wanted.get(key, 'absent')} where the run was "
                "started: install requirements.lock on both"
            )


def begin(names: list[str], exchange: bool = False) -> dict[str, Any]:
    """Digest the code, then ask DVC about the stages: in one process for the whole plan.

    Args:
        names: of the stages.
        exchange: see first whether the remote can be used.

    Returns:
        ``stale``: those that are. ``device``: what they compute on.

    Raises:
        StillhouseError: the code cannot be digested, or the remote cannot be used.
    """
    repo = _open()
    if exchange:
        with _remote_errors():
            _reach(repo, None)
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as folder:
        _reproduce(repo, "digest_code", Path(folder, "never"))
    repo = Repo(".", _wait_for_lock=True)
    stale: set[str] = set()
    try:
        # Not `repo.status(names)`: for each of them that reads dvc.yaml and dvc.lock anew.
        with repo.lock:
            for stage in repo.index.stages:
                if getattr(stage, "name", "") in names and stage.status(check_updates=True):
                    stale.add(stage.name)
    except DvcException as error:
        raise StillhouseError(_one_line(error)) from error
    digest = next(iter(sorted(CODE.glob("*.json"))), None)
    device = json.loads(digest.read_text())["environment"]["device"] if digest else "cpu"
    return {"stale": sorted(stale), "device": device}


class _Runs(dvc.stage.cache.StageCache):  # type: ignore[misc] # DVC says nothing of types
    """DVC's run-cache, with what the remote has of one stage. DVC itself copies all runs of all stages."""

    def pull(self, remote: str | None, odb: Any = None) -> list[Any]:
        return []  # `_load` asks for what it needs

    def _load(self, stage: Any) -> Any:
        self.fetch(stage)
        return super()._load(stage)

    def _folders(self, stage: Any) -> tuple[Path, Any, str]:
        key = dvc.stage.cache._get_stage_hash(stage)
        remote = self.repo.cloud.get_remote_odb(None, "pull", hash_name="md5-dos2unix")
        return Path(self._get_cache_dir(key)), remote.fs, remote.fs.join(remote.path, "runs", key[:2], key)

    def fetch(self, stage: Any) -> Path:
        """Copy the remote's runs of the stage with its present inputs; the folder that they are in then."""
        folder, remote, there = self._folders(stage)
        if remote.exists(there):
            folder.mkdir(parents=True, exist_ok=True)
            for path in remote.find(there):
                if not (target := folder / remote.name(path)).exists():
                    temporary = folder.parent / f"{target.name}.{os.getpid()}"
                    generic.copy(remote, path, self.repo.cache.legacy.fs, str(temporary))
                    os.replace(temporary, target)
        return folder

    def push_one(self, stage: Any) -> str:
        """Copy the stage's last run to the remote; the name of its entry."""
        self.save(stage)
        name: str = dvc.stage.cache._get_cache_hash(to_single_stage_lockfile(stage))
        folder, remote, there = self._folders(stage)
        generic.copy(self.repo.cache.legacy.fs, str(folder / name), remote, remote.join(there, name))
        return name


def _ask_remote_for_runs() -> None:
    """From now on in this process, DVC looks a stage's run up in the remote too."""
    dvc.stage.cache.StageCache = _Runs


class _Last(logging.Handler):
    """The last error that DVC has logged. It raises no more than how many files failed."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            cause = record.exc_info[1] if record.exc_info else None
            self.text = f": {record.getMessage()}" + (f": {_one_line(cause)}" if cause else "")


@contextlib.contextmanager
def _remote_errors() -> Iterator[None]:
    """Whatever goes wrong with a remote, as one line: each kind of storage has errors of its own."""
    last = _Last()
    loggers = [logging.getLogger(name) for name in ("dvc", "dvc_data", "dvc_objects")]
    handlers = [logger.handlers for logger in loggers]
    for logger in loggers:
        logger.handlers = [last]
    try:
        yield
    except NoRemoteError:
        raise StillhouseError(
            "no DVC remote is configured: `dvc remote add --default NAME URL`, with a folder, s3://BUCKET/PATH, ssh://HOST/PATH or "
            "another address as URL"
        ) from None
    except ImportError as error:
        extra = "; pip install 'stillhouse[s3]'" if "dvc-s3" in str(error) else ""
        raise StillhouseError(f"the DVC remote cannot be used: {_one_line(error)}{extra}") from error
    except CheckoutError as error:
        lacking = sorted(error.target_infos)
        raise StillhouseError(
            f"the DVC remote lacks {lacking[0]}{f' and {len(lacking) - 1} more' if lacking[1:] else ''}: `stillhouse push` where it "
            "was made"
        ) from error
    except FileTransferError as error:
        raise StillhouseError(f"the DVC remote cannot be used: {_one_line(error)}{last.text}") from error
    except StillhouseError:
        raise
    except Exception as error:
        warnings.simplefilter("ignore", RuntimeWarning)  # of s3fs, about requests it has not come to
        said = _with_causes(error)
        raise StillhouseError(
            f"the DVC remote cannot be used: {said}{CREDENTIALS if 'credentials' in said else ''}"
        ) from error
    finally:
        for logger, before in zip(loggers, handlers, strict=True):
            logger.handlers = before


def _reach(repo: Repo, name: str | None) -> None:
    """Ask a remote (None: the default one) something, before anything is begun.

    DVC itself may take one that is not there for one that has nothing.
    """
    known = sorted(repo.config["remote"])
    if name and name not in known:
        raise StillhouseError(
            f"--remote: {name!r} is not configured ({', '.join(known) or 'none'} is); `dvc remote add {shlex.quote(name)} URL`"
        )
    remote = repo.cloud.get_remote_odb(name, "pull")
    remote.fs.exists(remote.path)


def _with_causes(error: BaseException) -> str:
    said = [_one_line(error)]
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
        said.append(_one_line(error))
    return ": ".join(dict.fromkeys(said))


def _inputs(repo: Repo, name: str) -> list[str]:
    """What the stage reads of other stages' outs."""
    outs = {out.fs_path for out in repo.index.outs}
    return [dep.def_path for dep in _stage(repo, name).deps if dep.fs_path in outs]


def _stage(repo: Repo, name: str) -> Any:
    (stage,) = repo.stage.collect(name)
    return stage


def _pull_inputs(repo: Repo, name: str) -> None:
    with _remote_errors():
        if inputs := _inputs(repo, name):
            repo.pull(targets=inputs, force=True)


def _push_outs(name: str) -> str:
    repo = _open()
    with _remote_errors():
        repo.push(targets=[name])
        with repo.lock:
            entry: str = repo.stage_cache.push_one(_stage(repo, name))
    return entry


def _restored(repo: Repo, name: str) -> bool:
    """Restore a stage from its last run with its present inputs, where this host or the remote knows one."""
    stage = _stage(repo, name)
    with _remote_errors(), repo.lock:
        try:
            repo.stage_cache.restore(stage, pull=True)
        except dvc.stage.cache.RunCacheNotFoundError:
            return False
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as folder:
        _reproduce(_open(), name, Path(folder, "never"))  # finds everything here now
    return True


def send(name: str, force: bool) -> dict[str, Any]:
    """Restore the stage, or push what it reads so that a worker can run it.

    Returns:
        ``restored``: whether it was. If not, ``lock``: the text of ``dvc.lock``.

    Raises:
        StillhouseError: the remote cannot be used.
    """
    _ask_remote_for_runs()
    repo = _open()
    if not force and _restored(repo, name):
        return {"restored": True}
    with _remote_errors():
        if inputs := _inputs(repo, name):
            repo.push(targets=inputs)
    with repo.lock:
        return {"restored": False, "lock": LOCK.read_text()}


def receive(name: str, force: bool, entry: str, made_on: str) -> dict[str, Any]:
    """Restore what a worker has pushed, under the name ``entry`` in the run-cache, and which kind of processor made it.

    Raises:
        StillhouseError: it is not on the remote.
    """
    _ask_remote_for_runs()
    repo = _open()
    stage = _stage(repo, name)
    with _remote_errors(), repo.lock:
        stage.save_deps()
        run = repo.stage_cache.fetch(stage) / entry
        if run.exists():
            os.utime(run)  # DVC takes the newest
            if force:
                stage.dvcfile._lockfile.remove_stage(stage)
    if not run.exists() or not _restored(_open(), name):
        raise StillhouseError(
            f"{name}: what the worker has made is not on the remote: is it the same one there and here (`dvc remote list`)?"
        )
    _record(repo, name, made_on)
    return {"restored": True}


def push(remote: str) -> dict[str, Any]:
    """Copy the outs of all stages, and the run-cache, to a remote (empty: the default one).

    Raises:
        StillhouseError: the remote cannot be used.
    """
    repo, name = _open(), remote or None
    with _remote_errors():
        _reach(repo, name)
        # The run-cache second, and not by `run_cache=True`: there DVC names every file that it cannot copy, and goes on.
        return {"files": repo.push(remote=name) + len(repo.stage_cache.push(name))}


def pull(remote: str) -> dict[str, Any]:
    """Copy the outs that are recorded, and the run-cache, from a remote (empty: the default one).

    Raises:
        StillhouseError: the remote cannot be used, or lacks something, or nothing is recorded.
    """
    repo, name = _open(), remote or None
    # Without targets DVC misses the outs of stages that have never run.
    recorded = [str(out) for out in repo.index.outs if out.use_cache and out.hash_info]
    if not recorded:
        raise StillhouseError("there is nothing to pull: dvc.lock records no results")
    with _remote_errors():
        _reach(repo, name)
        fetched = repo.pull(targets=recorded, remote=name)["stats"]["fetched"]
        return {"files": fetched + len(repo.stage_cache.pull(name))}


def fetch(targets: list[str], revision: str) -> dict[str, Any]:
    """Bring outs from a remote into the cache: those of a revision, or of the checkout; ``reason`` says why not all came."""
    repo = _open()
    if not repo.config["core"].get("remote"):
        return {"reason": "no default remote is configured"}
    # The remote is today's: a revision's own configuration may name none yet, or one that is gone.
    today = {name: copy.deepcopy(dict(repo.config[name])) for name in ("core", "remote")}
    revisions: dict[str, Any] = {"revs": [revision], "workspace": False, "config": today} if revision else {}
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
    from dvc.repo.experiments.executor.base import BaseExecutor  # slow to import, and only for this

    # The experiment is a commit; git need not know the user's name for it.
    for key, value in (("name", "stillhouse"), ("email", "stillhouse@localhost")):
        if subprocess.run(["git", "config", f"user.{key}"], capture_output=True, check=False).returncode:
            for role in ("AUTHOR", "COMMITTER"):
                os.environ.setdefault(f"GIT_{role}_{key.upper()}", value)
    try:
        # Whether git has them yet or not, the experiment is nothing without what the run has read, and who made what.
        new = sorted({*_untracked_inputs(), *([str(MACHINES)] if MACHINES.exists() else [])})
        # DVC would put the files of top-level plots, too, which are outs, into the experiment's commit; `dvc exp apply` would then
        # write them in place, through the links into the cache, whose objects would be of other bytes than their names say.
        BaseExecutor._get_top_level_paths = classmethod(lambda cls, repo: [])
        # On its way DVC keeps references in git that all worktrees share: one at a time.
        scratch_root().mkdir(parents=True, exist_ok=True)
        with open(scratch_root() / "saving", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            commit = _open().experiments.save(name=name, force=True, include_untracked=new)
        return {"experiment": name, "commit": commit}
    except Exception as error:  # the git libraries under DVC have errors of their own
        raise StillhouseError(f"the run could not be saved as an experiment: {_one_line(error)}") from error


def _untracked_inputs() -> list[str]:
    """What git does not have of what the stages read and DVC does not keep: suites, the user's modules."""
    entries = (read_yaml(DVC_YAML) or {}).get("stages", {}).values()
    read = {Path(dep) for entry in entries for dep in entry.get("deps", [])}
    listed = git(Path(), "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    return [
        name
        for name in filter(None, listed)
        if name.startswith("params/") or read & {Path(name), *Path(name).parents}
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tasks.dvc_stage", allow_abbrev=False)
    parser.add_argument("--answer", type=Path, required=True)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("name")
    one.add_argument("--force", action="store_true")
    one.add_argument("--check", action="store_true")
    one.add_argument("--exchange", action="store_true")
    for command in ("send", "receive"):
        other = commands.add_parser(command)
        other.add_argument("name")
        if command == "receive":
            other.add_argument("entry")
            other.add_argument("processor")
        other.add_argument("--force", action="store_true")
    start = commands.add_parser("begin")
    start.add_argument("--exchange", action="store_true")
    start.add_argument("names", nargs="+")
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
    for command in ("push", "pull"):
        commands.add_parser(command).add_argument("--remote", default="")
    arguments = parser.parse_args()
    _mend_dvc()
    try:
        with cache_in_use(Path()):
            write_json(arguments.answer, _answer(arguments))
    except (StillhouseError, DvcException, OSError) as error:
        _fail(_one_line(error))
    except sqlite3.Error as error:
        _fail(f"DVC's own records of files cannot be written ({error}): free space or check permissions")


def _fail(text: str) -> NoReturn:
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.exit(2)


def _answer(arguments: argparse.Namespace) -> dict[str, Any]:
    match arguments.command:
        case "run":
            return run(arguments.name, arguments.force, arguments.check, arguments.exchange)
        case "begin":
            return begin(arguments.names, arguments.exchange)
        case "fetch":
            return fetch(arguments.targets, arguments.revision)
        case "checkout":
            return check_out(arguments.targets, arguments.into)
        case "add":
            return add(arguments.target, arguments.about)
        case "put":
            return put(arguments.source)
        case "send":
            return send(arguments.name, arguments.force)
        case "receive":
            return receive(arguments.name, arguments.force, arguments.entry, arguments.processor)
        case "push":
            return push(arguments.remote)
        case "pull":
            return pull(arguments.remote)
        case _:
            return save(arguments.name)


if __name__ == "__main__":
    main()
