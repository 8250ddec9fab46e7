"""Run a plan's stages as Prefect tasks, each as soon as its inputs are final, what takes longest first."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import queue
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect.futures import PrefectFuture

from flows.display import Display
from stillhouse.config import near
from stillhouse.errors import StillhouseError
from tasks.plan import Stage
from tasks.run_stage import begin, read_progress, run_stage, stop_all

POLL_SECONDS = 0.5


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
) -> Outcome:
    """Bring the chosen stages up to date, ``workers`` at a time (0: as many as there are cores).

    A stage is submitted when what it reads is final, so that none occupies a thread while it waits. What depends on
    a failed stage is not run; all else is.

    Raises:
        StillhouseError: a word that means no stage, or the code cannot be digested.
    """
    stages = [stage for stage in plan if not stage.always_changed]
    chosen = select(stages, only, from_, downstream)
    forced = matching(stages, force, "force")
    stop_all.clear()
    stale = set(begin(str(workspace), [stage.name for stage in chosen]))
    parents = edges(chosen)
    rank = priorities(chosen)
    # `sched_getaffinity` counts the cores that this process may use.
    free = workers or len(os.sched_getaffinity(0))
    waiting = {stage.name: set(parents[stage.name]) for stage in chosen}
    running: dict[str, PrefectFuture[Any]] = {}
    renewed: set[str] = set()  # went through DVC: what reads from them must be asked again
    finished: queue.Queue[str] = queue.Queue()
    outcome = Outcome()

    with Display(len(chosen)) as display, ended_in_order(running):

        def submit(name: str, fresh: bool) -> None:
            display.start(name, fresh)
            future = run_stage.submit(name, str(workspace), fresh, name in forced)
            running[name] = future
            future.add_done_callback(lambda _: finished.put(name))

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
                    submit(name, fresh)
            display.update({name: read_progress(workspace, name) for name in running if name in renewed})
            try:
                name = finished.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            future = running.pop(name)
            future.wait()  # before this, `state` asks the server, which learns of it a little later
            state = future.state
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


@contextlib.contextmanager
def ended_in_order(running: dict[str, PrefectFuture[Any]]) -> Any:
    """When the block ends early (Ctrl-C, a cancelled run), stop every stage and wait until it is gone."""
    try:
        yield
    except BaseException:
        stop_all.set()
        for future in list(running.values()):
            with contextlib.suppress(Exception):
                future.wait(30)
        raise
