"""The Prefect task: one stage in one supervised process. It passes names and paths only, and keeps no result."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed

from stillhouse.errors import StillhouseError
from tasks.stage import PROGRESS_FILE, progress_line
from tasks.supervisor import Supervised

PRIVATE = Path(".stillhouse")
LOGS = Path("logs")
LONG_SECONDS = 10.0  # a stage that takes longer gets a progress artifact
ARTIFACT_SECONDS = 5.0

stop_all = threading.Event()  # set when the flow ends early: every stage is then ended in good order


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
    """Run ``tasks.dvc_stage`` under a supervisor, as ``wait_for_dvc`` does, without following its progress.

    Raises:
        StillhouseError: it failed; the text is its reason.
    """
    code, answer, seconds = _run_dvc(workspace, log, list(arguments), on_wait=lambda elapsed: None)
    if code:
        raise StillhouseError(reason_of(workspace / LOGS / f"{log}.log", code))
    return code, answer, seconds


def _run_dvc(
    workspace: Path, name: str, arguments: list[str], on_wait: Callable[[float], None]
) -> tuple[int, dict[str, Any], float]:
    answer = workspace / PRIVATE / "answers" / f"{name}.json"
    answer.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "tasks.dvc_stage", "--answer", str(answer), *arguments]
    code, seconds = supervise(workspace, name, argv, on_wait)
    return code, json.loads(answer.read_text()) if code == 0 else {}, seconds


def supervise(
    workspace: Path, name: str, argv: list[str], on_wait: Callable[[float], None]
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
            if stop_all.is_set():
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
def begin(workspace: str, names: list[str]) -> list[str]:
    """Digest the code and ask DVC, once for the whole plan, which stages are stale."""
    _, answer, seconds = call_dvc(Path(workspace), "digest_code", "begin", *names)
    get_run_logger().info(
        "%d of %d stages are stale (asked in %.1f s)", len(answer["stale"]), len(names), seconds
    )
    return answer["stale"]


@task(name="run_stage", task_run_name="{stage}", cache_policy=NO_CACHE, persist_result=False)
def run_stage(stage: str, workspace: str, fresh: bool, force: bool) -> State[Any]:
    """Bring one stage up to date.

    Args:
        stage: its name in ``dvc.yaml``.
        workspace: the folder of the run.
        fresh: DVC has said that it is up to date and nothing before it ran since: nothing to do.
        force: run it even so.

    Returns:
        Completed when its command ran, Cached when it was up to date or restored, Failed with the reason.
    """
    if fresh and not force:
        return Completed(name="Cached", message="up to date")
    root, logger = Path(workspace), get_run_logger()
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

    arguments = ["run", stage, *(["--force"] if force else [])]
    code, answer, seconds = _run_dvc(root, stage, arguments, show)
    if artifact is not None and code == 0:
        update_progress_artifact(artifact, 100.0, description=f"done in {seconds:.0f} s")
    if stop_all.is_set() and code:
        return Cancelled(message="stopped; a long stage goes on from its saved state")
    if code:
        return Failed(message=reason_of(root / LOGS / f"{stage}.log", code))
    if not answer["executed"]:
        return Completed(
            name="Cached", message=f"unchanged, or restored from the run-cache, in {seconds:.1f} s"
        )
    return Completed(message=f"ran in {seconds:.1f} s")


def _key(stage: str) -> str:
    """An artifact key: lower-case letters, digits and dashes are allowed."""
    return stage.replace("_", "-")
