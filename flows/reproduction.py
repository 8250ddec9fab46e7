"""Run recorded stages once more, each in a worktree of its own, and say whether the same bytes came out.

``stillhouse reproduce STAGE`` starts it. No postponed annotations here: Prefect reads them to check parameters and to draw its form.
"""

import os
import queue
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field
from rich.markup import escape

from flows.display import Display, console
from flows.graph import POLL_SECONDS, descendants, edges, ended_in_order, matching
from flows.run import run_id
from flows.workspace import PRIVATE, find_checkout, own_worktree, remove_worktree
from stillhouse.errors import StillhouseError
from tasks.git import REVISION, resolve
from tasks.machine import processor
from tasks.plan import Stage
from tasks.recorded import read_recorded
from tasks.reproduce import IDENTICAL, reproduce
from tasks.run_stage import read_progress, stop_all

Verdict = dict[str, Any]  # what `tasks.reproduce` found of a stage


@flow(
    name="reproduction",
    task_runner=ThreadPoolTaskRunner(max_workers=256),  # type: ignore[arg-type] # the flow limits what runs at once
    persist_result=False,
)
def reproduction(
    stage: Annotated[str, Field(pattern=r"^[A-Za-z0-9_*-]+$", max_length=200)],
    revision: Annotated[str, Field(pattern=REVISION, max_length=200)] = "HEAD",
    downstream: bool = False,
    workers: Annotated[int, Field(ge=0, le=256)] = 0,
) -> Any:
    """Run stages again on their recorded inputs, with nothing restored, and compare every file with the recorded one.

    Each runs in a worktree of its own, which is kept where something came out different. Nothing else is changed.

    Args:
        stage: A stage (* allowed), or a family (train_teacher, ...).
        revision: Git revision, or DVC experiment, whose code, parameters and dvc.lock are taken.
        downstream: Also every stage that depends on it.
        workers: Stages at a time. With 0: as many as there are cores.
    """
    try:
        checkout = find_checkout(Path.cwd())
        commit = resolve(checkout, revision)
        names = _chosen(checkout, commit, stage, downstream)
    except StillhouseError as error:
        return Failed(name="Rejected", message=str(error))
    about = f"commit {commit[:12]}, on {processor()}"
    get_run_logger().info("%s: %d stages", about, len(names))
    console.print(about)
    found, refused = _run_all(checkout, commit, names, workers or len(os.sched_getaffinity(0)))
    if not found:
        reasons = "; ".join(dict.fromkeys(refused.values()))
        return Failed(
            name="Rejected", message=f"{', '.join(refused)}: {reasons}" if len(refused) < 4 else reasons
        )
    summary = _summary(found, refused)
    _publish(about, summary, found, refused)
    for verdict in found:
        for line in _details(verdict):
            console.print(escape(line))
    console.print(summary)
    if refused or not all(_same(verdict) for verdict in found):
        return Failed(name="Different", message=summary)
    return Completed(name="Identical", message=summary)


def _chosen(checkout: Path, commit: str, word: str, downstream: bool) -> list[str]:
    """The recorded stages that ``word`` means, without planning anew.

    Raises:
        StillhouseError: it means none.
    """
    entries = [entry for entry in read_recorded(checkout, commit).values() if entry.command]
    stages = [Stage(entry.name, [], deps=[*entry.deps], outs=[*entry.outs]) for entry in entries]
    chosen = matching(stages, [word], "stage")
    chosen |= descendants(chosen, edges(stages)) if downstream else set()
    return [stage.name for stage in stages if stage.name in chosen]


@task(name="reproduce_stage", task_run_name="{stage}", cache_policy=NO_CACHE, persist_result=False)
def reproduce_stage(stage: str, checkout: str, commit: str, worktree: str) -> State[Any]:
    """One stage again; Identical, Different (what came out stays in ``worktree``), or Refused with the reason."""
    root = Path(checkout)
    try:
        with own_worktree(root, worktree, commit, share_cache=False) as workspace:
            verdict = reproduce(root, workspace, commit, stage)
    except StillhouseError as error:
        return Failed(name="Refused", message=str(error))
    if _same(verdict):
        remove_worktree(root, workspace)
        return Completed(name="Identical", message=_count(len(verdict["outs"]), "out"), data=verdict)
    verdict["kept"] = str(workspace.relative_to(root))
    return Failed(name="Different", message=f"kept in {verdict['kept']}", data=verdict)


def _same(verdict: Verdict) -> bool:
    return not verdict["failed"] and all(out["verdict"] == IDENTICAL for out in verdict["outs"])


def _run_all(
    checkout: Path, commit: str, names: list[str], workers: int
) -> tuple[list[Verdict], dict[str, str]]:
    """What came out of each stage, and why others could not be run. They take recorded inputs, so their order is free."""
    stop_all.clear()
    run = run_id(str(flow_run.name), str(flow_run.id))
    waiting, running = list(names), dict[str, PrefectFuture[Any]]()
    found: dict[str, Verdict] = {}
    refused: dict[str, str] = {}
    finished: queue.Queue[str] = queue.Queue()
    with Display(len(names)) as display, ended_in_order(running):

        def start(name: str) -> None:
            display.start(name, cached=False)
            running[name] = reproduce_stage.submit(name, str(checkout), commit, f"{run}-{name}")
            running[name].add_done_callback(lambda _: finished.put(name))

        while waiting or running:
            while waiting and len(running) < workers:
                start(waiting.pop(0))
            trees = {name: checkout / PRIVATE / "worktrees" / f"{run}-{name}" for name in running}
            display.update({name: read_progress(tree, name) for name, tree in trees.items()})
            try:
                name = finished.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            future = running.pop(name)
            future.wait()
            state = future.state
            display.finish(name, state.name or "", state.message or "")
            if state.name in ("Identical", "Different"):
                found[name] = future.result(raise_on_failure=False)
            else:
                refused[name] = state.message or state.name or "failed"
    return [found[name] for name in names if name in found], refused


def _summary(found: list[Verdict], refused: dict[str, str]) -> str:
    verdicts = [out["verdict"] for verdict in found for out in verdict["outs"]]
    kinds = sorted(set(verdicts), key=lambda text: text != IDENTICAL)
    parts = [f"{_count(verdicts.count(kind), 'out')} {kind}" for kind in kinds]
    failed = [verdict["stage"] for verdict in found if verdict["failed"]]
    parts += [f"{', '.join(failed)} failed"] if failed else []
    parts += [f"{', '.join(refused)} could not be run again"] if refused else []
    return f"{_count(len(found) + len(refused), 'stage')}: {'; '.join(parts)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _details(verdict: Verdict) -> list[str]:
    """What is to be said of a stage that did not come out identical."""
    if _same(verdict):
        return []
    recorded = verdict["recorded_processor"] or "a processor that was not recorded"
    lines = [f"{verdict['stage']}: recorded on {recorded}; kept in {verdict['kept']}"]
    lines += [f"  failed: {verdict['failed']}"] if verdict["failed"] else []
    for out in verdict["outs"]:
        lines.append(f"  {out['path']}: {out['verdict']}")
        for name, differences in out["files"].items():
            lines += [f"    {name}", *(f"      {line}" for line in differences)]
    return lines


def _publish(about: str, summary: str, found: list[Verdict], refused: dict[str, str]) -> None:
    """The verdicts as artifacts: a table of the outs, and the differences in words."""
    keys = ("path", "verdict", "recorded", "found")
    table = [
        {
            "stage": verdict["stage"],
            **{key: out[key] for key in keys},
            "recorded on": verdict["recorded_processor"],
        }
        for verdict in found
        for out in verdict["outs"]
    ]
    create_table_artifact(table, key="reproduction", description=f"{about}: {summary}")
    lines = [f"{about}: {summary}", ""]
    lines += [f"- {name}: {reason}" for name, reason in refused.items()]
    different = [line for verdict in found for line in _details(verdict)]
    lines += ["", "```", *different, "```"] if different else []
    create_markdown_artifact("\n".join(lines), key="reproduction-summary", description=about)
