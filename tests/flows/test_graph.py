"""Stages as Prefect tasks over real DVC: order, caching, failure, selection."""

from __future__ import annotations

import itertools
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from toy_pipeline import dvc, runs, toy_plan, toy_stage

from flows.display import Display, console
from flows.graph import Outcome, edges, matching, priorities, run_graph, select
from flows.results import _print_table
from stillhouse.errors import StillhouseError
from tasks.plan import Stage


def stage(name: str, *parents: str, cost: float = 1.0, environments: tuple[str, ...] = ()) -> Stage:
    return Stage(name, ["x"], deps=list(parents), outs=[name], cost=cost, environments=list(environments))


DIAMOND = [
    stage("train_teacher-a", cost=1, environments=("a",)),
    stage("train_teacher-b", cost=5, environments=("b",)),
    stage("student", "train_teacher-a", "train_teacher-b", cost=2),
    stage("evaluate-a", "student", "train_teacher-a", environments=("a",)),
    stage("other", cost=4),
]


def names(stages: list[Stage]) -> list[str]:
    return [stage.name for stage in stages]


def test_edges_and_the_longest_chain_first():
    assert edges(DIAMOND)["evaluate-a"] == {"student", "train_teacher-a"}
    assert priorities(DIAMOND) == {
        "train_teacher-a": 4.0,
        "train_teacher-b": 8.0,
        "student": 3.0,
        "evaluate-a": 1.0,
        "other": 4.0,
    }


def test_selection():
    assert select(DIAMOND, [], [], []) == DIAMOND
    assert names(select(DIAMOND, ["student"], [], [])) == ["student"]
    assert names(select(DIAMOND, ["train_teacher"], [], [])) == ["train_teacher-a", "train_teacher-b"]
    assert names(select(DIAMOND, ["a"], [], [])) == ["train_teacher-a", "evaluate-a"]
    assert names(select(DIAMOND, ["*-b"], [], [])) == ["train_teacher-b"]
    assert names(select(DIAMOND, [], ["b"], [])) == ["train_teacher-b", "student", "evaluate-a"]
    assert names(select(DIAMOND, [], [], ["b"])) == ["student", "evaluate-a"]
    assert names(select(DIAMOND, ["other"], [], ["student"])) == ["evaluate-a", "other"]
    with pytest.raises(StillhouseError, match=r"only: 'train_teachr' .* \(did you mean 'train_teacher"):
        matching(DIAMOND, ["train_teachr"], "only")


def run(plan: list[Stage], **options: Any) -> Outcome:
    results: list[Outcome] = []
    selection: dict[str, Any] = {"only": [], "from_": [], "downstream": [], "force": [], **options}

    @flow(name="toy", persist_result=False)
    def toy_flow() -> None:
        results.append(run_graph(plan, Path.cwd(), **selection))

    toy_flow()
    return results[0]


@pytest.fixture
def chain(toy, prefect_harness):
    return toy_plan(toy_stage("a"), toy_stage("b"), toy_stage("c", "a", "b"), toy_stage("d", "c"))


def test_run_then_cached_then_like_dvc_repro(chain):
    outcome = run(chain)
    assert sorted(outcome.executed) == ["a", "b", "c", "d"]
    assert Path("data/d").read_text() == "d<c<a><b>>"
    outcome = run(chain)
    assert (sorted(outcome.cached), outcome.executed) == (["a", "b", "c", "d"], [])
    # A lost out comes back from the cache: shown as cached, and nothing runs.
    Path("data/c").unlink()
    outcome = run(chain)
    assert sorted(outcome.cached) == ["a", "b", "c", "d"]
    assert Path("data/c").exists()
    assert [runs(name) for name in "abcd"] == [1, 1, 1, 1]
    # DVC alone agrees, stage for stage, and from empty leaves the same entries (the order is that of completion).
    lock = Path("dvc.lock").read_text()
    dvc("repro")
    assert Path("dvc.lock").read_text() == lock
    Path("dvc.lock").unlink()
    shutil.rmtree(".dvc/cache")
    dvc("repro")
    assert sorted(Path("dvc.lock").read_text().splitlines()) == sorted(lock.splitlines())


def test_an_edit_reruns_what_depends_on_it_only_as_far_as_it_changes(chain):
    run(chain)
    Path("stage_b.py").write_text(Path("stage_b.py").read_text() + "# another script, the same output\n")
    outcome = run(chain)
    assert (outcome.executed, sorted(outcome.cached)) == (["b"], ["a", "c", "d"])
    outcome = run(chain, force=["c"])
    assert (outcome.executed, sorted(outcome.cached)) == (["c"], ["a", "b", "d"])
    assert run(chain, only=["d"]).cached == ["d"]


def test_a_failure_stops_what_depends_on_it_and_nothing_else(toy, prefect_harness):
    fail = "print('error: the teacher is too weak', file=sys.stderr); sys.exit(2)"
    plan = toy_plan(
        toy_stage("a", script=fail),
        toy_stage("b"),
        toy_stage("c", "a", "b"),
        toy_stage("d", "c"),
        toy_stage("e", "b"),
    )
    outcome = run(plan)
    assert outcome.failed == {"a": "the teacher is too weak"}
    assert outcome.not_run == {"c": "a", "d": "a"}
    assert sorted(outcome.executed) == ["b", "e"]
    # An exception nobody foresaw: its last line and the log, not a traceback.
    toy_stage("a", script="raise ValueError('odd')")
    (reason,) = run(plan).failed.values()
    assert reason.startswith("ValueError: odd; its log is ")
    assert "\n" not in reason
    # Once mended, only what was lost runs.
    toy_stage("a")
    outcome = run(plan)
    assert sorted(outcome.executed) == ["a", "c", "d"]
    assert sorted(outcome.cached) == ["b", "e"]


def test_what_a_failed_or_partial_run_lacks():
    outcome = Outcome(["a"], ["b"], {"c": "reason"}, {"d": "c"})
    assert [outcome.lacks(name) for name in "abcde"] == [
        "",
        "",
        "c failed",
        "c failed",
        "e was not asked for",
    ]


def test_messages_are_shown_as_they_are():
    with console.capture() as captured, Display(2) as display:
        for name in ("a", "b"):
            display.start(name, cached=False)
        display.finish("a", "Failed", "no such file [/tmp/x]; allowed: [a, list]")
    assert "no such file [/tmp/x]; allowed: [a, list]" in captured.get()
    with console.capture() as captured:
        _print_table("title", ("a",), [["1 [nan, nan]"]])
    assert "[nan, nan]" in captured.get()


def test_the_users_settings_do_not_reach_a_stage(toy, prefect_harness, monkeypatch):
    (toy / "neighbour.py").touch()
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    assert run(toy_plan(toy_stage("a", script="import neighbour"))).executed == ["a"]


def test_as_many_at_a_time_as_asked_and_the_longest_first(toy, prefect_harness):
    # Each stage records when it began and ended; the short one comes last, though it is first in the plan.
    record = "pathlib.Path(f'time-{name}').write_text(f'{time.time()} '); time.sleep(0.7)\nopen(f'time-{name}', 'a').write(str(time.time()))"
    plan = toy_plan(
        toy_stage("short", script=record, cost=1),
        toy_stage("long", script=record, cost=10),
        toy_stage("middle", script=record, cost=5),
    )
    run(plan, workers=2)
    times = {
        name: tuple(map(float, Path(f"time-{name}").read_text().split()))
        for name in ("short", "middle", "long")
    }
    assert times["short"][0] >= min(times["long"][1], times["middle"][1])
    for name in ("short", "middle", "long"):
        Path(f"data/{name}").unlink()
    shutil.rmtree(".dvc/cache")
    run(plan, workers=1)
    spans = sorted(
        tuple(map(float, Path(f"time-{name}").read_text().split())) for name in ("short", "middle", "long")
    )
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))


def test_a_stop_ends_the_stages_and_the_next_run_goes_on(toy, prefect_harness):
    import threading

    from tasks.run_stage import stop_all

    plan = toy_plan(toy_stage("a", script="time.sleep(60)"), toy_stage("b", "a"))

    def stop_soon() -> None:
        while not runs("a"):
            time.sleep(0.05)
        stop_all.set()

    thread = threading.Thread(target=stop_soon)
    thread.start()
    started = time.monotonic()
    outcome = run(plan)
    thread.join()
    assert time.monotonic() - started < 40
    assert list(outcome.failed) == ["a"]
    assert outcome.not_run == {"b": "a"}
    toy_stage("a")
    assert sorted(run(plan).executed) == ["a", "b"]
