"""The Prefect tasks: a stage in a supervised process, here or on a worker. They pass names, paths and short texts, and keep no result.

Dask and Ray send a task's own function as code, and all else by its module's name: so the tasks do nothing but call.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from stillhouse.errors import StillhouseError
from tasks.stage import PROGRESS_FILE, progress_line
from tasks.supervisor import Supervised
from tasks.worker import Parcel, host, unpacked

PRIVATE = Path(".stillhouse")
LOGS = Path("logs")
LONG_SECONDS = 10.0  # a stage that takes longer gets a progress artifact
ARTIFACT_SECONDS = 5.0
GPU_LIMIT = (
    "gpu"  # a global concurrency limit of the Prefect server: how many stages may compute on CUDA at a time
)
SLOT_SECONDS = 5.0  # how long a stage waits for a slot before it looks whether it is still wanted

stop_all = threading.Event()  # set when the flow ends early: every stage is then ended in good order
stopped_runs: set[str] = set()  # the same on a worker, which may serve several runs


def stop_run(run: str) -> None:
    """On a worker: end the stages of a flow run, by its id, in good order."""
    stopped_runs.add(run)


def stopping() -> Callable[[], bool]:
    """A question for this task to ask: is it to end early?"""
    run = str(flow_run.id)
    abandoned = [ask() for module, ask in _ABANDONED.items() if module in sys.modules]
    return lambda: stop_all.is_set() or run in stopped_runs or any(ask() for ask in abandoned)


def _abandoned_by_dask() -> Callable[[], bool]:
    """Dask does not tell a running task that its client is gone, or does not want it any more."""
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:  # not on a worker
        return lambda: False
    key = worker.get_current_task()

    def abandoned() -> bool:
        task = worker.state.tasks.get(key)
        return task is None or task.state != "executing"

    return abandoned


def _abandoned_by_ray() -> Callable[[], bool]:
    """A Ray worker lives on for a minute after its node manager, its parent, has died."""
    import ray

    parent = os.getppid()
    on_worker = ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE
    return lambda: on_worker and os.getppid() != parent


_ABANDONED = {"distributed.worker": _abandoned_by_dask, "ray": _abandoned_by_ray}


def progress_file(workspace: Path, stage: str) -> Path:
    """Where a running stage says how far it is."""
    return workspace / PRIVATE / "progress" / f"{stage}.json"


def read_progress(workspace: Path, stage: str) -> dict[str, Any] | None:
    """The running stage's latest word, or None."""
    try:
        return json.loads(progress_file(workspace, stage).read_text())
    except (OSError, ValueError):
        return None


def call_dvc(workspace: Path, log: str, *arguments: str) -> tuple[int, dict[str, Any], float]:
    """Run ``tasks.dvc_stage`` under a supervisor.

    Raises:
        StillhouseError: it failed; the text is its reason.
    """
    code, answer, seconds = _run_dvc(
        workspace, log, list(arguments), on_wait=lambda elapsed: None, stopped=stop_all.is_set
    )
    if code:
        raise StillhouseError(reason_of(workspace / LOGS / f"{log}.log", code))
    return code, answer, seconds


def _run_dvc(
    workspace: Path,
    name: str,
    arguments: list[str],
    on_wait: Callable[[float], None],
    stopped: Callable[[], bool],
) -> tuple[int, dict[str, Any], float]:
    answer = workspace / PRIVATE / "answers" / f"{name}.json"
    answer.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "tasks.dvc_stage", "--answer", str(answer), *arguments]
    code, seconds = supervise(workspace, name, argv, on_wait, stopped)
    return code, json.loads(answer.read_text()) if code == 0 else {}, seconds


def supervise(
    workspace: Path,
    name: str,
    argv: list[str],
    on_wait: Callable[[float], None],
    stopped: Callable[[], bool] = stop_all.is_set,
) -> tuple[int, float]:
    """Run a program as stages are run, with ``logs/<name>.log``; its exit code, and the seconds it took."""
    log = workspace / LOGS / f"{name}.log"
    for path in (log, progress_file(workspace, name)):
        path.unlink(missing_ok=True)
    progress_file(workspace, name).parent.mkdir(parents=True, exist_ok=True)
    environment = {
        # The stage's `python` is this one, and in a worktree the code is the worktree's own.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        PROGRESS_FILE: str(progress_file(workspace, name)),
        "SHELL": "/bin/sh",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "",  # none: the stage's modules are those of the current folder
    }
    started = time.monotonic()
    with Supervised(argv, cwd=workspace, log=log, environment=environment) as process:
        while (code := process.wait(0.5)) is None:
            if stopped():
                code = process.stop()
                break
            on_wait(time.monotonic() - started)
    progress_file(workspace, name).unlink(missing_ok=True)
    return code, time.monotonic() - started


def reason_of(log: Path, code: int) -> str:
    """Why a stage failed, in one line: what it said itself, else the last thing in its log."""
    generic = re.compile(r"error: \S+: failed")  # DVC's part of it: the command failed
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line and not generic.fullmatch(line)]
    if said := [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]:
        return said[0]
    if any("SIGKILL" in line or "Killed" in line for line in lines[-2:]) or code == 137:
        return f"killed by the system (out of memory?); its log is {log}"
    return f"{lines[-1] if lines else f'exit code {code}'}; its log is {log}"


@task(name="digest_code", task_run_name="digest_code", cache_policy=NO_CACHE, persist_result=False)
def begin(workspace: str, names: list[str], exchange: bool = False) -> dict[str, Any]:
    """Digest the code and ask DVC, once for the whole plan, which stages are ``stale``, and on which ``device`` they compute."""
    arguments = ["begin", *(["--exchange"] if exchange else []), *names]
    _, answer, seconds = call_dvc(Path(workspace), "digest_code", *arguments)
    get_run_logger().info(
        "%d of %d stages are stale (asked in %.1f s)", len(answer["stale"]), len(names), seconds
    )
    return answer


@task(name="run_stage", task_run_name="{stage}", cache_policy=NO_CACHE, persist_result=False)
def run_stage(
    stage: str, workspace: str, fresh: bool, force: bool, device: str = "cpu", elsewhere: bool = False
) -> State[Any]:
    """Bring one stage up to date.

    Args:
        stage: its name in ``dvc.yaml``.
        workspace: the folder of the run.
        fresh: DVC has said that it is up to date and nothing before it ran since: nothing to do.
        force: run it even so.
        device: what it computes on, ``cpu`` or ``cuda``.
        elsewhere: this may be another machine, whose versions are to be checked.

    Returns:
        Completed when its command ran, Cached when it was up to date or restored, Failed with the reason.
    """
    return _run_stage(stage, workspace, fresh, force, device, elsewhere)


@task(name="send_stage", task_run_name="{stage} (send)", cache_policy=NO_CACHE, persist_result=False)
def send_stage(stage: str, workspace: str, force: bool) -> State[Any]:
    """Restore a stage from a run-cache, this host's or the remote's (Cached), or push what it reads for a worker (Completed)."""
    return _exchange(stage, workspace, "send", stage, *_forced(force))


@task(name="work_stage", task_run_name="{stage}", cache_policy=NO_CACHE, persist_result=False)
def work_stage(stage: str, parcel: Parcel, force: bool, device: str) -> State[Any]:
    """Run a stage in this worker's own checkout, and push what it made.

    Returns:
        Completed, Cached or Failed. Its data are the stage's ``log``, the ``entry`` of the run-cache to restore it from, and the
        ``processor`` that made it.
    """
    return _work_stage(stage, parcel, force, device)


@task(name="receive_stage", task_run_name="{stage} (receive)", cache_policy=NO_CACHE, persist_result=False)
def receive_stage(stage: str, workspace: str, force: bool, entry: str, processor: str) -> State[Any]:
    """Restore what a worker has made of a stage, on which kind of processor."""
    return _exchange(stage, workspace, "receive", stage, entry, processor, *_forced(force))


def _forced(force: bool) -> list[str]:
    return ["--force"] if force else []


def _run_stage(
    stage: str, workspace: str, fresh: bool, force: bool, device: str, elsewhere: bool
) -> State[Any]:
    if fresh and not force:
        return Completed(name="Cached", message="up to date")
    arguments = ["run", stage, *_forced(force), *(["--check"] if elsewhere else [])]
    return _supervise(Path(workspace), stage, arguments, device)[0]


def _work_stage(stage: str, parcel: Parcel, force: bool, device: str) -> State[Any]:
    try:
        with unpacked(parcel) as root:
            arguments = ["run", stage, *_forced(force), "--check", "--exchange"]
            state, answer = _supervise(root, stage, arguments, device)
            log = root / LOGS / f"{stage}.log"
            state.data = answer | ({"log": log.read_text(errors="replace")} if log.exists() else {})
    except StillhouseError as error:
        state = Failed(message=str(error))
    state.message = f"{state.message} (on {host()})"
    return state


def _exchange(stage: str, workspace: str, *arguments: str) -> State[Any]:
    try:
        _, answer, seconds = call_dvc(Path(workspace), f"{stage}.{arguments[0]}", *arguments)
    except StillhouseError as error:
        return Failed(message=str(error))
    if answer["restored"] and arguments[0] == "send":
        return Completed(name="Cached", message=f"restored in {seconds:.1f} s")
    return Completed(message=f"in {seconds:.1f} s", data=answer)


def _supervise(
    root: Path, stage: str, arguments: list[str], device: str
) -> tuple[State[Any], dict[str, Any]]:
    """Run a stage's process: the state that it ended in, and its answer."""
    logger, stopped = get_run_logger(), stopping()
    artifact: UUID | None = None
    updated = 0.0

    def show(elapsed: float) -> None:
        nonlocal artifact, updated
        if elapsed < LONG_SECONDS or elapsed - updated < ARTIFACT_SECONDS:
            return
        if progress := read_progress(root, stage):
            updated = elapsed
            percent = 100.0 * progress["done"] / max(progress["total"], 1)
            text = progress_line(
                progress["done"], progress["total"], progress["unit"], progress["rate"], progress["latest"]
            )
            if artifact is None:
                artifact = create_progress_artifact(percent, key=_key(stage), description=text)  # type: ignore[assignment]
            else:
                update_progress_artifact(artifact, percent, description=text)
            logger.info(text)

    with _gpu_slot(device, stopped):
        if stopped():
            return Cancelled(message="stopped before it began"), {}
        code, answer, seconds = _run_dvc(root, stage, arguments, show, stopped)
    if artifact is not None and code == 0:
        update_progress_artifact(artifact, 100.0, description=f"done in {seconds:.0f} s")
    if code and stopped():
        return Cancelled(message="stopped; a long stage goes on from its saved state"), answer
    if code:
        return Failed(message=reason_of(root / LOGS / f"{stage}.log", code)), answer
    if not answer["executed"]:
        text = f"unchanged, or restored from the run-cache, in {seconds:.1f} s"
        return Completed(name="Cached", message=text), answer
    return Completed(message=f"ran in {seconds:.1f} s"), answer


@contextlib.contextmanager
def _gpu_slot(device: str, stopped: Callable[[], bool]) -> Iterator[None]:
    """Hold a slot of the limit ``gpu`` where the stage computes on CUDA and the Prefect server has that limit; wait for it."""
    with contextlib.ExitStack() as slot:
        while device == "cuda" and _has_gpu_limit() and not stopped():
            try:
                slot.enter_context(concurrency(GPU_LIMIT, timeout_seconds=SLOT_SECONDS))
                break
            except TimeoutError:
                continue
        yield


def _has_gpu_limit() -> bool:
    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(GPU_LIMIT).active
        except ObjectNotFound:
            return False


def _key(stage: str) -> str:
    """An artifact key: lower-case letters, digits and dashes are allowed."""
    return stage.replace("_", "-")
