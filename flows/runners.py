"""Where a run's stages go: threads of this process that supervise processes, or Dask or Ray workers, here or on other machines."""

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from typing import Annotated, Any
from urllib.parse import SplitResult, urlsplit

from prefect import Flow, Task
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.logging import get_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.task_runners import TaskRunner
from pydantic import Field

from stillhouse.errors import StillhouseError
from tasks.run_stage import stop_all, stop_run

ALLOWED = "STILLHOUSE_ADDRESSES"
CONNECT_SECONDS = 20
CONNECT_ATTEMPTS, CONNECT_PAUSE = 3, 5.0  # times, seconds between them

_HOST = r"([A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9a-fA-F:]+\]):[0-9]{1,5}"
_ADDRESSES = {"dask": rf"(tcp|tls)://{_HOST}", "ray": rf"(ray://)?{_HOST}"}
_EXAMPLES = {"dask": "tcp://HOST:8786", "ray": "ray://HOST:10001 or HOST:6379"}


class Runner(StrEnum):
    """What runs the stages."""

    threads = "threads"
    dask = "dask"
    ray = "ray"


class Exchange(StrEnum):
    """How stages and their data get to workers."""

    shared = "shared"
    remote = "remote"


Address = Annotated[str, Field(pattern=rf"^(|{_ADDRESSES['dask']}|{_ADDRESSES['ray']})$", max_length=200)]


@dataclass(frozen=True)
class Cluster:
    """What runs the stages.

    Attributes:
        runner: threads of this process, Dask or Ray.
        address: of a cluster that is there already; empty: one on this machine, for this run alone.
        exchange: ``shared``: workers see the run's folder under the same path; ``remote``: they share a git remote and a DVC
            remote, and have a clone each.
    """

    runner: Runner = Runner.threads
    address: str = ""
    exchange: Exchange = Exchange.shared

    def check(self) -> None:
        """Refuse what cannot be, before anything is done.

        Raises:
            StillhouseError: settings that do not go together, an address that this host does not allow or workers could not
                answer from, or an extra that is not installed.
        """
        if self.runner is Runner.threads:
            for name, given, default in (
                ("address", self.address, ""),
                ("exchange", self.exchange.value, Exchange.shared.value),
            ):
                if given != default:
                    raise StillhouseError(
                        f"{name}: {given!r} is for workers, and runner is 'threads'; use runner 'dask' or 'ray'"
                    )
            return
        if find_spec(f"prefect_{self.runner.value}") is None:
            raise StillhouseError(
                f"runner: {self.runner.value!r} needs an extra that is not installed: pip install 'stillhouse[{self.runner.value}]'"
            )
        if self.address:
            self._check_address()

    def _check_address(self) -> None:
        if not re.fullmatch(_ADDRESSES[self.runner.value], self.address):
            raise StillhouseError(
                f"address: {self.address!r} is no address for runner {self.runner.value!r}, but {_EXAMPLES[self.runner.value]} is"
            )
        # To connect is to trust: a scheduler can have any code run here. Whoever triggers a run must not choose it.
        allowed = os.environ.get(ALLOWED, "").split()
        if self.address not in allowed:
            raise StillhouseError(
                f"address: {self.address!r} is not among those that this host allows, {', '.join(allowed) or 'none'}: set {ALLOWED} "
                "where the flow runs"
            )
        api = urlsplit(PREFECT_API_URL.value() or "").hostname
        if _is_loopback(api) and not _is_loopback(_split(self.address).hostname):
            raise StillhouseError(
                f"address: workers at {self.address} cannot reach the Prefect API at {api}: start one that they can reach, "
                "`prefect server start --host ADDRESS`, and set PREFECT_API_URL"
            )


def _split(address: str) -> SplitResult:
    return urlsplit(address if "://" in address else f"//{address}")


def _is_loopback(host: str | None) -> bool:
    return host in (None, "localhost", "::1") or host.startswith("127.")


@dataclass(frozen=True)
class Pool:
    """Workers that are there.

    Attributes:
        slots: stages at a time.
        submit: run a task with these parameters on a worker.
        stop: end this run's stages in good order, wherever they run.
    """

    slots: int
    submit: Callable[[Task[..., Any], dict[str, Any]], PrefectFuture[Any]]
    stop: Callable[[list[PrefectFuture[Any]]], None]


@contextlib.contextmanager
def pool_of(cluster: Cluster, count: int) -> Iterator[Pool]:
    """The cluster's workers for the block's duration; those that were started for it are ended with it.

    Args:
        cluster: whose they are.
        count: stages at a time; 0: as many as there are cores, or as the cluster at the address has.

    Raises:
        StillhouseError: nobody answers at the address.
    """
    start = {Runner.threads: _threads, Runner.dask: _dask, Runner.ray: _ray}[cluster.runner]
    with start(cluster.address, count) as pool:
        yield pool


def _cores() -> int:
    return len(os.sched_getaffinity(0))  # that this process may use


@contextlib.contextmanager
def _threads(address: str, count: int) -> Iterator[Pool]:
    yield Pool(
        slots=count or _cores(),
        submit=lambda task, parameters: task.submit(**parameters),
        stop=lambda _: stop_all.set(),
    )


@contextlib.contextmanager
def _dask(address: str, count: int) -> Iterator[Pool]:
    from prefect_dask import DaskTaskRunner

    if address:
        runner = DaskTaskRunner(address=address, client_kwargs={"timeout": CONNECT_SECONDS})
    else:
        local = {"n_workers": count or _cores(), "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
        runner = DaskTaskRunner(cluster_kwargs=local)
    with runner:
        try:
            client = runner.client
        except OSError:
            raise StillhouseError(
                f"address: no Dask scheduler answers at {address} within {CONNECT_SECONDS} s"
            ) from None
        found = sum(client.nthreads().values())
        if not found:
            raise StillhouseError(
                f"address: the Dask scheduler at {address} has no workers; start `dask worker {address}`"
            )

        def stop(_: list[PrefectFuture[Any]]) -> None:
            stop_all.set()
            client.run(stop_run, str(flow_run.id))

        yield Pool(count or found, lambda task, parameters: _submit(runner, task, parameters), stop)


@contextlib.contextmanager
def _ray(address: str, count: int) -> Iterator[Pool]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported: it tells nobody anything
    import ray
    from prefect_ray import RayTaskRunner
    from prefect_ray.task_runners import PrefectRayFuture

    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        # Ray itself would try for minutes.
        try:
            socket.create_connection(
                (_split(address).hostname, _split(address).port), CONNECT_SECONDS
            ).close()
        except OSError as error:
            raise StillhouseError(f"address: no Ray cluster answers at {address} ({error})") from None
        where = f"address: no Ray cluster at {address}"
    else:
        # "local" is always a new one: without it Ray takes a cluster that happens to run on this machine.
        quiet |= {"num_cpus": count or _cores(), "include_dashboard": False}
        where = "runner: Ray does not start here"
    with contextlib.ExitStack() as stack:
        ended_by = signal.getsignal(signal.SIGTERM)
        for attempt in range(1, CONNECT_ATTEMPTS + 1):
            runner = RayTaskRunner(address=address or "local", init_kwargs=quiet)
            try:
                stack.enter_context(runner)
                break
            except Exception as error:  # Ray has all kinds, plain ones too
                # Ray's head starts a process for every client, which at times dies as it starts; the next one has another port.
                if "Starting Ray client server failed" in str(error) and attempt < CONNECT_ATTEMPTS:
                    get_logger("runners").warning(
                        "Ray's client server did not start; asking again (%d of %d)",
                        attempt + 1,
                        CONNECT_ATTEMPTS,
                    )
                    time.sleep(CONNECT_PAUSE)
                    continue
                raise StillhouseError(f"{where}: {' '.join(str(error).split())}") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(
                signal.SIGTERM, ended_by
            )  # Ray has put its own in place, which ends a process at once

        def stop(futures: list[PrefectFuture[Any]]) -> None:
            stop_all.set()
            for future in futures:
                if isinstance(future, PrefectRayFuture):
                    ray.cancel(future.wrapped_future)

        found = int(ray.cluster_resources().get("CPU", 0))
        yield Pool(count or found, lambda task, parameters: _submit(runner, task, parameters), stop)


def _submit(runner: TaskRunner[Any], task: Task[..., Any], parameters: dict[str, Any]) -> PrefectFuture[Any]:
    # Workers are sent the flow too, as code; they need no more of it than its name.
    context = FlowRunContext.get()
    assert context is not None
    stand_in = Flow(_nothing, name=context.flow.name if context.flow else "flow")
    with context.model_copy(update={"flow": stand_in, "parameters": {}}):
        return runner.submit(task, parameters)


def _nothing() -> None:
    return None
