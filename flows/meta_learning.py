"""Learning to learn: meta-training on families of tasks -> adaptation to unseen tasks -> report.

A suite of params/suites/ holds the meta-learners (``meta_train``), each a method on a family. No postponed annotations here: Prefect
reads them.
"""

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


def run_name() -> str:
    """``meta-learning-5-seeds crimson-owl``."""
    return name_of_run()


@flow(
    name="meta_learning",
    flow_run_name=run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=256),  # type: ignore[arg-type] # run_graph limits what runs at once
    persist_result=False,
)
def meta_learning(
    suite: Suite = "meta-learning",
    seeds: Seeds = 0,
    budget: Budget = 1.0,
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
    """Meta-train on families of tasks, adapt to unseen ones; judge after every step of adaptation and report.

    Runs as the flow `distillation` does: in a git worktree of its own, saved as a DVC experiment.

    Args:
        suite: A file of params/suites/, without .yaml.
        seeds: Number of seeds, counted from 0. With 0: the suite's own.
        budget: Factor on every budget of meta-updates, env steps and updates.
        device: What computes.
        set: Any other parameter, as key=value, for example meta_train.sinusoid.inner_rate=0.02
        only: Run only these: stages (* allowed), families (meta_train, ...) or meta-learners.
        from_: Run these and all that depends on them.
        downstream: Run all that depends on these, without them.
        force: Run these even where they are up to date.
        workers: Stages at a time. With 0: as many as there are cores, or as the cluster at the address has.
        runner: What runs the stages.
        address: Of a Dask scheduler or Ray cluster that this host allows. Empty: one on this machine, for this run alone.
        exchange: Workers share this host's folders, or only a git remote and a DVC remote.
        revision: Git revision to run. Empty: the checkout as it is, edits included.
    """
    asked = flat_overrides(seeds, budget, device=device.value)
    selection = {"only": only, "from_": from_, "downstream": downstream, "force": force}
    return run_suite(suite, [*asked, *set], selection, workers, Cluster(runner, address, exchange), revision)


if __name__ == "__main__":
    from flows.cli import main

    main(["meta-learning"])
