"""One network learns many environments at once: experts -> students -> joint networks -> evaluation -> report.

A suite of params/suites/ holds what is compared: the experts (``train_teacher``), what is distilled from them, and the networks
that learn without them (``train_multi_task``), on the same environments. No postponed annotations here: Prefect reads them.
"""

from enum import StrEnum
from typing import Any

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

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


class Method(StrEnum):
    """How the environments share a network."""

    suite = "suite"
    hard_sharing = "hard_sharing"
    soft_sharing = "soft_sharing"
    distral = "distral"


class Balancing(StrEnum):
    """How the environments' gradients become one."""

    suite = "suite"
    uniform = "uniform"
    fixed = "fixed"
    uncertainty = "uncertainty"
    gradnorm = "gradnorm"
    pcgrad = "pcgrad"
    by_return = "by_return"


def run_name() -> str:
    """``multi-task-classic-pcgrad-5-seeds crimson-owl``."""
    return name_of_run("method", "balancing")


@flow(
    name="multi_task",
    flow_run_name=run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=256),  # type: ignore[arg-type] # run_graph limits what runs at once
    persist_result=False,
)
def multi_task(
    suite: Suite = "multi-task-classic",
    seeds: Seeds = 0,
    budget: Budget = 1.0,
    method: Method = Method.suite,
    balancing: Balancing = Balancing.suite,
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
    """Train networks that learn many environments at once, beside experts and what is distilled from them; judge and report.

    Runs as the flow `distillation` does: in a git worktree of its own, saved as a DVC experiment.

    Args:
        suite: A file of params/suites/, without .yaml.
        seeds: Number of seeds, counted from 0. With 0: the suite's own.
        budget: Factor on every budget of env steps and updates.
        method: How the environments share a network, in all joint networks of the suite.
        balancing: How the environments' gradients become one, in all joint networks of the suite.
        device: What computes.
        set: Any other parameter, as key=value, for example train_multi_task.joint.learner.gamma=0.98
        only: Run only these: stages (* allowed), families (train_multi_task, ...) or environments.
        from_: Run these and all that depends on them.
        downstream: Run all that depends on these, without them.
        force: Run these even where they are up to date.
        workers: Stages at a time. With 0: as many as there are cores, or as the cluster at the address has.
        runner: What runs the stages.
        address: Of a Dask scheduler or Ray cluster that this host allows. Empty: one on this machine, for this run alone.
        exchange: Workers share this host's folders, or only a git remote and a DVC remote.
        revision: Git revision to run. Empty: the checkout as it is, edits included.
    """
    asked = flat_overrides(seeds, budget, method=method.value, balancing=balancing.value, device=device.value)
    selection = {"only": only, "from_": from_, "downstream": downstream, "force": force}
    return run_suite(suite, [*asked, *set], selection, workers, Cluster(runner, address, exchange), revision)


if __name__ == "__main__":
    from flows.cli import main

    main(["multi-task"])
