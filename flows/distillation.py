"""The main job: teachers -> datasets -> student -> transfer -> evaluation -> report.

``python -m flows.distillation`` runs the quickstart; ``stillhouse run`` takes every parameter. No postponed annotations here:
Prefect reads them to check parameters and to draw its form.
"""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field
from rich.markup import escape

from flows.display import console
from flows.graph import Outcome, run_graph
from flows.results import publish, run_facts, show
from flows.workspace import find_checkout, hold, make_worktree, plan, remove_worktree
from stillhouse.errors import StillhouseError
from tasks.run_stage import call_dvc

Words = Annotated[
    list[Annotated[str, Field(max_length=200)]],
    Field(max_length=100, description="stages (* allowed), families (train_teacher, ...) or environments"),
]


class Loss(StrEnum):
    """The student's loss."""

    suite = "suite"
    kl = "kl"
    nll = "nll"
    mse = "mse"


class Device(StrEnum):
    """What computes."""

    suite = "suite"
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@flow(
    name="distillation",
    task_runner=ThreadPoolTaskRunner(max_workers=256),  # type: ignore[arg-type] # run_graph limits what runs at once
    persist_result=False,
)
def distillation(
    suite: Annotated[
        str,
        Field(
            pattern=r"^[a-z0-9][a-z0-9-]*$",
            max_length=64,
            description="a file of params/suites/, without .yaml",
        ),
    ] = "quickstart",
    seeds: Annotated[
        int, Field(ge=0, le=100, description="number of seeds, counted from 0; 0: the suite's own")
    ] = 0,
    budget: Annotated[
        float, Field(gt=0, le=1000, description="factor on every env-step and update budget")
    ] = 1.0,
    loss: Annotated[Loss, Field(description="the students' loss")] = Loss.suite,
    temperature: Annotated[
        float,
        Field(ge=0, le=1000, description="divides the teacher's outputs in the kl loss; 0: the suite's own"),
    ] = 0.0,
    student_share: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="student's parameters at most this share of its teachers'; 0: the suite's own",
        ),
    ] = 0.0,
    device: Annotated[Device, Field(description="what computes")] = Device.suite,
    set: Annotated[
        list[Annotated[str, Field(max_length=1000)]],
        Field(max_length=200, description="anything else, as key=value: train_teacher.cartpole.gamma=0.98"),
    ] = [],  # noqa: B006 - Prefect's form wants a plain default; it is not changed
    only: Words = [],  # noqa: B006
    from_: Words = [],  # noqa: B006
    downstream: Words = [],  # noqa: B006
    force: Words = [],  # noqa: B006
    workers: Annotated[int, Field(ge=0, le=256, description="stages at a time; 0: as many as cores")] = 0,
    in_place: Annotated[
        bool, Field(description="run in the checkout itself, not in a worktree of its own")
    ] = False,
    revision: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9_./~^-]*$",
            max_length=200,
            description="git revision; empty: the checkout as it is",
        ),
    ] = "",
) -> Any:
    """Train teachers, distil them into students, move those to new environments, judge and report.

    The committed quickstart runs in place; everything else in a git worktree under ``.stillhouse/worktrees/``, and is
    saved as a DVC experiment named after the run.
    """
    overrides = [*flat_overrides(seeds, budget, loss.value, temperature, student_share, device.value), *set]
    try:
        if revision.startswith("-"):
            raise StillhouseError(f"revision: {revision!r} is not a git revision")
        checkout = find_checkout(Path.cwd())
        here = runs_in_place(suite, overrides, revision, in_place)
        selection = {"only": only, "from_": from_, "downstream": downstream, "force": force}
        if here:
            with hold(checkout):
                outcome = _run(checkout, checkout, suite, overrides, selection, workers)
            experiment = ""
        else:
            name = re.sub(r"[^a-z0-9-]", "-", f"{flow_run.name}-{str(flow_run.id)[:6]}".lower())
            workspace = make_worktree(checkout, name, revision)
            console.print(f"workspace {workspace.relative_to(checkout)}")
            try:
                outcome = _run(workspace, checkout, suite, overrides, selection, workers)
            except StillhouseError:
                # Refused before any stage ran: nothing in it is worth keeping.
                remove_worktree(checkout, workspace)
                raise
            experiment = _save(workspace, name) if not outcome.failed else ""
        console.print(outcome.text() + (f"; saved as experiment {experiment}" if experiment else ""))
    except StillhouseError as error:
        return Failed(name="Rejected", message=str(error))  # nothing ran: what was asked for cannot be done
    if outcome.failed:
        return Failed(message="; ".join(f"{name}: {reason}" for name, reason in outcome.failed.items()))
    return Completed(message=outcome.text())


def runs_in_place(suite: str, overrides: list[str], revision: str, in_place: bool) -> bool:
    """Whether a run happens in the checkout itself: where it is asked to, and the committed quickstart as it is.

    Raises:
        StillhouseError: in place, but at another revision.
    """
    if in_place and revision:
        raise StillhouseError(
            "in_place: a revision is checked out in a worktree of its own; leave in_place out"
        )
    return in_place or (suite == "quickstart" and not overrides and not revision)


def flat_overrides(
    seeds: int, budget: float, loss: str, temperature: float, student_share: float, device: str
) -> list[str]:
    """The form's fields as ``key=value``, where they differ from "the suite's own"."""
    return (
        ([f"seeds={list(range(seeds))}"] if seeds else [])
        + ([f"budget={budget}"] if budget != 1.0 else [])
        + ([f"distill_student.loss={loss}"] if loss != "suite" else [])
        + ([f"distill_student.temperature={temperature}"] if temperature else [])
        + ([f"distill_student.parameter_fraction={student_share}"] if student_share else [])
        + ([f"device={device}"] if device != "suite" else [])
    )


def _run(
    workspace: Path,
    checkout: Path,
    suite: str,
    overrides: list[str],
    selection: dict[str, list[str]],
    workers: int,
) -> Outcome:
    stages = plan(workspace, suite, overrides, *(["--in-place-run"] if workspace == checkout else []))
    get_run_logger().info("%s in %s", run_facts(workspace), workspace)
    outcome = run_graph(stages, workspace, workers=workers, **selection)
    # What an earlier run has left there must not pass for this one's.
    if reason := outcome.lacks("report"):
        console.print(f"no new report: {escape(reason)}")
    else:
        publish(workspace)
        show(workspace, checkout)
    return outcome


def _save(workspace: Path, name: str) -> str:
    try:
        call_dvc(workspace, "save_experiment", "save", name)
    except StillhouseError as error:
        console.print(f"[yellow]the run is not saved as an experiment: {escape(str(error))}[/]")
        return ""
    return name


if __name__ == "__main__":
    from flows.cli import main

    main(["run"])
