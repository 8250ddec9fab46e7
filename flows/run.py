"""One run of a suite, whichever flow asked for it: in a worktree of its own, saved as an experiment, with its report."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from prefect import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field
from rich.markup import escape

from flows.display import console
from flows.graph import Outcome, run_graph
from flows.results import publish, run_facts, show
from flows.runners import Cluster
from flows.workspace import RunError, find_checkout, in_checkout, in_place, own_worktree, plan
from stillhouse.errors import StillhouseError
from tasks.run_stage import call_dvc

# What the forms' fields are made of.
Suite = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64)]
Seeds = Annotated[int, Field(ge=0, le=100)]
Budget = Annotated[float, Field(gt=0, le=1000)]
Overrides = Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=200)]
Words = Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=100)]
Workers = Annotated[int, Field(ge=0, le=256)]
Revision = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./~^-]*$", max_length=200)]


class Device(StrEnum):
    """What computes."""

    suite = "suite"
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def name_of_run(*fields: str) -> str:
    """What was asked for, before the name that the user gave or Prefect made up: ``smoke-nll-5-seeds crimson-owl``.

    Args:
        fields: of the form, whose values are named where they are not the suite's own.
    """
    given = str(flow_run.name or "")
    asked: dict[str, Any] = flow_run.parameters
    parts = [str(asked.get("suite", ""))]
    parts += [str(asked[field]) for field in fields if asked.get(field, "suite") != "suite"]
    parts += [f"{asked['seeds']}-seeds"] if asked.get("seeds") else []
    parts += [f"budget-{asked['budget']:g}"] if asked.get("budget", 1.0) != 1.0 else []
    parts += ["set"] if asked.get("set") else []
    text = "-".join(parts)
    return given if given.startswith(text) else f"{text} {given}"


def run_id(name: str, identifier: str) -> str:
    """What a flow run's worktree and experiment are called: its name, made safe, the start of its id, and which attempt it is."""
    # "Retry" in the UI starts the same run again; what the earlier attempt has left keeps its own name.
    attempt = f"-{flow_run.run_count}" if (flow_run.run_count or 1) > 1 else ""
    return re.sub(r"[^a-z0-9-]", "-", f"{name}-{identifier[:6]}{attempt}".lower())


def run_suite(
    suite: str,
    overrides: list[str],
    selection: dict[str, list[str]],
    workers: int,
    cluster: Cluster,
    revision: str,
) -> Any:
    """Plan, run every stage that is out of date, save the experiment, publish the report.

    Args:
        suite: a file of params/suites/.
        overrides: ``key=value`` each.
        selection: ``only``, ``from_``, ``downstream`` and ``force``.
        workers: stages at a time; 0: as many as there are cores.
        cluster: what runs them.
        revision: of git; "": the checkout as it is.

    Returns:
        The flow's final state; ``Rejected`` where nothing ran.
    """
    try:
        if revision.startswith("-"):
            raise StillhouseError(f"revision: {revision!r} is not a git revision")
        cluster.check()
        checkout = find_checkout(Path.cwd())
        here = in_place.get()
        if here and revision:
            raise StillhouseError(
                "in place: a revision is run in a worktree of its own; leave one of the two out"
            )
        experiment = run_id(str(flow_run.name), str(flow_run.id))
        with in_checkout(checkout) if here else own_worktree(checkout, experiment, revision) as workspace:
            name = workspace.relative_to(checkout)
            if not here:
                console.print(f"workspace {name}")
            outcome = _run(workspace, checkout, suite, overrides, selection, workers, cluster)
            saved = not here and not outcome.failed and save_experiment(workspace, experiment)
    except RunError as error:
        return Failed(message=str(error))
    except StillhouseError as error:
        return Failed(name="Rejected", message=str(error))  # nothing ran: what was asked for cannot be done
    text = outcome.text() + (f"; saved as experiment {experiment}" if saved else "")
    console.print(text)
    if outcome.failed:
        reasons = "; ".join(f"{stage}: {reason}" for stage, reason in outcome.failed.items())
        kept = "" if here else f" (what it left is in {name} until `stillhouse prune`)"
        return Failed(message=reasons + kept)
    return Completed(message=text)


def _run(
    workspace: Path,
    checkout: Path,
    suite: str,
    overrides: list[str],
    selection: dict[str, list[str]],
    workers: int,
    cluster: Cluster,
) -> Outcome:
    stages = plan(workspace, suite, overrides, *(["--in-place-run"] if workspace == checkout else []))
    get_run_logger().info("%s in %s", run_facts(workspace), workspace)
    outcome = run_graph(stages, workspace, workers=workers, cluster=cluster, **selection)
    # What an earlier run has left there must not pass for this one's.
    if reason := outcome.lacks("report"):
        console.print(f"no new report: {escape(reason)}")
    else:
        publish(workspace)
        show(workspace, checkout)
    return outcome


def save_experiment(workspace: Path, name: str) -> bool:
    """Save a run as a DVC experiment; where it cannot be, that is said, and the run is none the worse."""
    try:
        call_dvc(workspace, "save_experiment", "save", name)
    except StillhouseError as error:
        console.print(f"[yellow]the run is not saved as an experiment: {escape(str(error))}[/]")
        return False
    return True
