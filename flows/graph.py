"""Run a plan's stages as Prefect tasks, each as soon as its inputs are final, what takes longest first."""

from __future__ import annotations

import contextlib
import fnmatch
import queue
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Crashed

from flows.display import Display
from flows.runners import Cluster, Exchange, Pool, Runner, pool_of
from stillhouse.config import near
from stillhouse.errors import StillhouseError
from stillhouse.files import write_atomic
from tasks.plan import DVC_LOCK, Stage
from tasks.run_stage import (
    LOGS,
    begin,
    read_progress,
    receive_stage,
    run_stage,
    send_stage,
    stop_all,
    work_stage,
)
from tasks.worker import Parcel, pack

POLL_SECONDS = 0.5

# A stage's tasks, one after another: each is yielded, and its final state sent back; the last word is the stage's state.
Steps = Generator[PrefectFuture[Any], State[Any], State[Any]]


@dataclass
class Outcome:
    """What became of the stages, by name."""

    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # with the reason
    not_run: dict[str, str] = field(default_factory=dict)  # with the failed stage it depends on

    def text(self) -> str:
        """One line."""
        parts = [f"{len(self.executed)} ran", f"{len(self.cached)} cached"]
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += [f"{len(self.not_run)} not run"] if self.not_run else []
        return ", ".join(parts)

    def lacks(self, name: str) -> str:
        """Why the stage's outs are not this run's; empty where they are."""
        if name in self.executed or name in self.cached:
            return ""
        if name in self.failed:
            return f"{name} failed"
        return f"{self.not_run[name]} failed" if name in self.not_run else f"{name} was not asked for"


def edges(stages: Iterable[Stage]) -> dict[str, set[str]]:
    """Each stage's name to the names of the stages whose outs it reads."""
    stages = list(stages)
    writer = {out: stage.name for stage in stages for out in stage.writes}
    return {stage.name: {writer[dep] for dep in stage.deps if dep in writer} for stage in stages}


def priorities(stages: list[Stage]) -> dict[str, float]:
    """Expected seconds from the start of a stage to the end of the longest chain that waits for it."""
    parents = edges(stages)
    longest: dict[str, float] = {}
    for stage in reversed(stages):  # the plan lists parents first
        after = [
            longest[child] for child, needed in parents.items() if stage.name in needed and child in longest
        ]
        longest[stage.name] = stage.cost + max(after, default=0.0)
    return longest


def descendants(names: set[str], parents: dict[str, set[str]]) -> set[str]:
    """Every stage that reads, directly or not, what ``names`` write; without ``names`` themselves."""
    found: set[str] = set()
    todo = set(names)
    while todo:
        todo = {child for child, needed in parents.items() if needed & todo} - found
        found |= todo
    return found - names


def matching(stages: list[Stage], words: list[str], what: str) -> set[str]:
    """Names of the stages that ``words`` mean: stage names (``*`` allowed), families or environments.

    Raises:
        StillhouseError: a word means none.
    """
    found: set[str] = set()
    for word in words:
        hits = {
            stage.name
            for stage in stages
            if word in (stage.verb, *stage.environments) or fnmatch.fnmatchcase(stage.name, word)
        }
        if not hits:
            known = sorted(
                {name for stage in stages for name in (stage.name, stage.verb, *stage.environments)}
            )
            raise StillhouseError(
                f"{what}: {word!r} is no stage, family or environment of this plan{near(word, known)}"
            )
        found |= hits
    return found


def select(stages: list[Stage], only: list[str], from_: list[str], downstream: list[str]) -> list[Stage]:
    """The stages to run: ``only`` these; ``from_`` these on, with all that depends on them; ``downstream`` of these, without them.

    Raises:
        StillhouseError: a word that means no stage.
    """
    if not (only or from_ or downstream):
        return stages
    parents = edges(stages)
    chosen = matching(stages, only, "only")
    first = matching(stages, from_, "from")
    chosen |= first | descendants(first, parents)
    chosen |= descendants(matching(stages, downstream, "downstream"), parents)
    return [stage for stage in stages if stage.name in chosen]


def run_graph(
    plan: list[Stage],
    workspace: Path,
    *,
    only: list[str],
    from_: list[str],
    downstream: list[str],
    force: list[str],
    workers: int = 0,
    cluster: Cluster = Cluster(),  # noqa: B008 - frozen
) -> Outcome:
    """Bring the chosen stages up to date, ``workers`` at a time (0: as many as there are cores, or as ``cluster`` has).

    A stage is submitted when what it reads is final, so that none occupies a worker while it waits. What depends on
    a failed stage is not run; all else is.

    Raises:
        StillhouseError: a word that means no stage, the code cannot be digested, or the workers cannot be used.
    """
    stages = {stage.name: stage for stage in plan if not stage.always_changed}
    chosen = select(list(stages.values()), only, from_, downstream)
    forced = matching(list(stages.values()), force, "force")
    in_git = [path for stage in plan for path in stage.in_git]
    parcel = pack(workspace, in_git) if cluster.exchange is Exchange.remote else None
    stop_all.clear()
    asked = begin(str(workspace), [stage.name for stage in chosen], parcel is not None)
    stale = set(asked["stale"])
    if not stale and not forced:
        cluster = Cluster()  # nothing to do elsewhere
    parents = edges(chosen)
    rank = priorities(chosen)
    waiting = {stage.name: set(parents[stage.name]) for stage in chosen}
    going: dict[str, Steps] = {}
    running: dict[str, PrefectFuture[Any]] = {}
    renewed: set[str] = set()  # went through DVC: what reads from them must be asked again
    finished: queue.Queue[str] = queue.Queue()
    outcome = Outcome()

    with (
        pool_of(cluster, workers) as pool,
        Display(len(chosen)) as display,
        ended_in_order(running, pool.stop),
    ):
        free = pool.slots

        def steps(name: str, fresh: bool) -> Steps:
            one = _One(name, str(workspace), name in forced, asked["device"])
            # What is up to date is nothing to send away; what git keeps, DVC cannot bring back.
            if fresh or cluster.runner is Runner.threads or (parcel and stages[name].in_git):
                return one.here(fresh)
            return one.with_remote(pool, parcel) if parcel else one.with_workspace(pool)

        def go_on(name: str, state: State[Any] | None) -> State[Any] | None:
            """Submit the stage's next task; its state, where none is left."""
            try:
                running[name] = next(going[name]) if state is None else going[name].send(state)
            except StopIteration as end:
                return end.value
            running[name].add_done_callback(lambda _: finished.put(name))
            return None

        def is_fresh(name: str) -> bool:
            return name not in stale and name not in forced and not parents[name] & renewed

        while waiting or running:
            ready = sorted(
                (name for name, needed in waiting.items() if not needed), key=lambda name: -rank[name]
            )
            for name in ready:
                fresh = is_fresh(name)
                if fresh or free > 0:
                    free -= not fresh
                    renewed |= set() if fresh else {name}
                    del waiting[name]
                    display.start(name, fresh)
                    going[name] = steps(name, fresh)
                    go_on(name, None)
            display.update({name: read_progress(workspace, name) for name in running if name in renewed})
            try:
                name = finished.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            future = running.pop(name)
            future.wait()  # before this, `state` asks the server, which learns of it a little later
            state = go_on(name, _final(future))
            if state is None:
                continue
            free += name in renewed
            display.finish(name, state.name or "", state.message or "")
            if state.is_completed():
                (outcome.cached if state.name == "Cached" else outcome.executed).append(name)
                for needed in waiting.values():
                    needed.discard(name)
            else:
                outcome.failed[name] = state.message or state.name or "failed"
                for lost in descendants({name}, parents) & set(waiting):
                    outcome.not_run[lost] = name
                    del waiting[lost]
    return outcome


@dataclass(frozen=True)
class _One:
    """One stage of a run, and the ways to bring it up to date."""

    name: str
    workspace: str
    force: bool
    device: str

    def here(self, fresh: bool) -> Steps:
        """In a thread of this process."""
        return (yield run_stage.submit(self.name, self.workspace, fresh, self.force, self.device))

    def with_workspace(self, pool: Pool) -> Steps:
        """On a worker that has the run's folder under the same path."""
        parameters = {"stage": self.name, "workspace": self.workspace, "fresh": False, "force": self.force}
        return (yield pool.submit(run_stage, parameters | {"device": self.device, "elsewhere": True}))

    def with_remote(self, pool: Pool, parcel: Parcel) -> Steps:
        """On a worker that gets its inputs from the DVC remote, and leaves its outs there; DVC restores them here."""
        sent = yield send_stage.submit(self.name, self.workspace, self.force)
        if not sent.is_completed():
            return sent
        if sent.name == "Cached":
            return (yield from self.here(fresh=True))  # for the record, under the stage's own name
        parameters: dict[str, Any] = {"stage": self.name, "force": self.force, "device": self.device}
        parameters["parcel"] = parcel | {str(DVC_LOCK): _data(sent)["lock"]}
        done = yield pool.submit(work_stage, parameters)
        made = _data(done)
        if "log" in made:  # there is none where the worker could not begin, or was lost
            write_atomic(Path(self.workspace) / LOGS / f"{self.name}.log", made["log"])
        if not done.is_completed():
            return done
        received = yield receive_stage.submit(
            self.name, self.workspace, self.force, made["entry"], made["processor"]
        )
        return done if received.is_completed() else received


def _data(state: State[Any]) -> dict[str, str]:
    """What a task has returned beside its state."""
    return getattr(state.data, "result", None) or {}


def _final(future: PrefectFuture[Any]) -> State[Any]:
    state = future.state
    return state if state.is_final() else Crashed(message="its worker was lost, or could not take the stage")


@contextlib.contextmanager
def ended_in_order(
    running: dict[str, PrefectFuture[Any]],
    stop: Callable[[list[PrefectFuture[Any]]], None] = lambda _: stop_all.set(),
) -> Iterator[None]:
    """When the block ends early (Ctrl-C, a cancelled run), stop every stage and wait until it is gone."""
    try:
        yield
    except BaseException:
        futures = list(running.values())
        stop(futures)
        for future in futures:
            with contextlib.suppress(Exception):
                future.wait(30)
        raise
