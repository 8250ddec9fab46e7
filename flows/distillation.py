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
from flows.form import flat_overrides
from flows.graph import Outcome, run_graph
from flows.results import publish, run_facts, show
from flows.runners import Address, Cluster, Exchange, Runner
from flows.workspace import RunError, find_checkout, in_checkout, in_place, own_worktree, plan
from stillhouse.errors import StillhouseError
from tasks.run_stage import call_dvc

Words = Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=100)]
Revision = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./~^-]*$", max_length=200)]


class Loss(StrEnum):
    """The students' loss."""

    suite = "suite"
    kl = "kl"
    nll = "nll"
    mse = "mse"


class Transfer(StrEnum):
    """Ways of transfer."""

    suite = "suite"
    auto = "auto"
    discriminative = "discriminative"
    features = "features"
    full = "full"
    gradual = "gradual"
    head_only = "head_only"
    kickstart = "kickstart"
    l2_sp = "l2_sp"
    progressive_2 = "progressive_2"
    progressive_3 = "progressive_3"
    progressive_random = "progressive_random"
    rehearsal = "rehearsal"


class Device(StrEnum):
    """What computes."""

    suite = "suite"
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def run_name() -> str:
    """What was asked for, before the name that the user gave or Prefect made up: ``smoke-nll-5-seeds crimson-owl``."""
    given = str(flow_run.name or "")
    asked: dict[str, Any] = flow_run.parameters
    parts = [str(asked.get("suite", ""))]
    parts += [str(asked["loss"])] if asked.get("loss", "suite") != "suite" else []
    parts += [str(asked["transfer"])] if asked.get("transfer", "suite") != "suite" else []
    parts += [f"{asked['seeds']}-seeds"] if asked.get("seeds") else []
    parts += [f"budget-{asked['budget']:g}"] if asked.get("budget", 1.0) != 1.0 else []
    parts += ["set"] if asked.get("set") else []
    text = "-".join(parts)
    return given if given.startswith(text) else f"{text} {given}"


@flow(
    name="distillation",
    flow_run_name=run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=256),  # type: ignore[arg-type] # run_graph limits what runs at once
    persist_result=False,
)
def distillation(
    suite: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64)] = "quickstart",
    seeds: Annotated[int, Field(ge=0, le=100)] = 0,
    budget: Annotated[float, Field(gt=0, le=1000)] = 1.0,
    loss: Loss = Loss.suite,
    temperature: Annotated[float, Field(ge=0, le=1000)] = 0.0,
    student_share: Annotated[float, Field(ge=0, le=1)] = 0.0,
    transfer: Transfer = Transfer.suite,
    device: Device = Device.suite,
    set: Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=200)] = [],  # noqa: B006 - Prefect's form wants a plain default; it is not changed
    only: Words = [],  # noqa: B006
    from_: Words = [],  # noqa: B006
    downstream: Words = [],  # noqa: B006
    force: Words = [],  # noqa: B006
    workers: Annotated[int, Field(ge=0, le=256)] = 0,
    runner: Runner = Runner.threads,
    address: Address = "",
    exchange: Exchange = Exchange.shared,
    revision: Revision = "",
) -> Any:
    """Train teachers, distil them into students, move those to new environments, judge and report.

    A run has a git worktree of its own under ``.stillhouse/worktrees/``, and is saved as a DVC experiment named after it. Only
    the command line runs in the checkout itself (``flows.workspace.in_place``): the committed quickstart, or what it is told to.

    Args:
        suite: A file of params/suites/, without .yaml.
        seeds: Number of seeds, counted from 0. With 0: the suite's own.
        budget: Factor on every budget of env steps and updates.
        loss: The students' loss.
        temperature: Divides the teachers' outputs in the KL loss. With 0: the suite's own.
        student_share: A student's parameters, at most so large a share of its teachers' together. With 0: the suite's own.
        transfer: One way of transfer, beside training from scratch, in place of the suite's own.
        device: What computes.
        set: Any other parameter, as key=value, for example train_teacher.cartpole.gamma=0.98
        only: Run only these: stages (* allowed), families (train_teacher, ...) or environments.
        from_: Run these and all that depends on them.
        downstream: Run all that depends on these, without them.
        force: Run these even where they are up to date.
        workers: Stages at a time. With 0: as many as there are cores, or as the cluster at the address has.
        runner: What runs the stages.
        address: Of a Dask scheduler or Ray cluster that this host allows. Empty: one on this machine, for this run alone.
        exchange: Workers share this host's folders, or only a git remote and a DVC remote.
        revision: Git revision to run. Empty: the checkout as it is, edits included.
    """
    asked = flat_overrides(
        seeds, budget, loss.value, temperature, student_share, transfer.value, device.value
    )
    overrides = [*asked, *set]
    try:
        if revision.startswith("-"):
            raise StillhouseError(f"revision: {revision!r} is not a git revision")
        cluster = Cluster(runner, address, exchange)
        cluster.check()
        checkout = find_checkout(Path.cwd())
        here = in_place.get()
        if here and revision:
            raise StillhouseError(
                "in place: a revision is run in a worktree of its own; leave one of the two out"
            )
        selection = {"only": only, "from_": from_, "downstream": downstream, "force": force}
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


def run_id(name: str, identifier: str) -> str:
    """What a flow run's worktree and experiment are called: its name, made safe, the start of its id, and which attempt it is."""
    # "Retry" in the UI starts the same run again; what the earlier attempt has left keeps its own name.
    attempt = f"-{flow_run.run_count}" if (flow_run.run_count or 1) > 1 else ""
    return re.sub(r"[^a-z0-9-]", "-", f"{name}-{identifier[:6]}{attempt}".lower())


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


if __name__ == "__main__":
    from flows.cli import main

    main(["run"])
