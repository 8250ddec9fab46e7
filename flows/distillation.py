"""The main job: teachers -> datasets -> student -> transfer -> evaluation -> report.

``python -m flows.distillation`` runs the quickstart; ``stillhouse run`` takes every parameter. No postponed annotations here:
Prefect reads them to check parameters and to draw its form.
"""

from enum import StrEnum
from typing import Annotated, Any

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.form import flat_overrides
from flows.run import (
    Budget,
    Device,
    Overrides,
    Revision,
    Seeds,
    Suite,
    Words,
    Workers,
    name_of_run,
    run_suite,
)
from flows.runners import Address, Cluster, Exchange, Runner


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


def run_name() -> str:
    """``smoke-nll-5-seeds crimson-owl``."""
    return name_of_run("loss", "transfer")


@flow(
    name="distillation",
    flow_run_name=run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=256),  # type: ignore[arg-type] # run_graph limits what runs at once
    persist_result=False,
)
def distillation(
    suite: Suite = "quickstart",
    seeds: Seeds = 0,
    budget: Budget = 1.0,
    loss: Loss = Loss.suite,
    temperature: Annotated[float, Field(ge=0, le=1000)] = 0.0,
    student_share: Annotated[float, Field(ge=0, le=1)] = 0.0,
    transfer: Transfer = Transfer.suite,
    device: Device = Device.suite,
    set: Overrides = [],  # noqa: B006 - Prefect's form wants a plain default; it is not changed
    only: Words = [],  # noqa: B006
    from_: Words = [],  # noqa: B006
    downstream: Words = [],  # noqa: B006
    force: Words = [],  # noqa: B006
    workers: Workers = 0,
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
        seeds,
        budget,
        loss=loss.value,
        temperature=temperature,
        student_share=student_share,
        transfer=transfer.value,
        device=device.value,
    )
    selection = {"only": only, "from_": from_, "downstream": downstream, "force": force}
    return run_suite(suite, [*asked, *set], selection, workers, Cluster(runner, address, exchange), revision)


if __name__ == "__main__":
    from flows.cli import main

    main(["run"])
