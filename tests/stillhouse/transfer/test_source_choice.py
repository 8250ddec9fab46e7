"""Choosing a source: the best after a probe, every probe's env steps counted, exact resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from stillhouse.checkpoint import load_state, save_state
from stillhouse.transfer.fine_tuning import FineTuning
from stillhouse.transfer.source_choice import SourceChoice
from stillhouse.types import Report

BUDGET, PROBE, ROLLOUT = 100, 15, 10  # a probe ends with the report at 20


class StandIn:
    """A run whose return is its height times the env steps; reports every rollout, judged at every second."""

    def __init__(self, name: str, height: float, budget: int, log: list[str]) -> None:
        self.name, self.height, self.budget, self.log = name, height, budget, log
        self.done = 0
        self.curve: list[tuple[int, float]] = []

    def train(self) -> Iterator[Report]:
        if not self.curve:
            self.curve.append((0, self.height))
        while self.done < self.budget:
            self.done += ROLLOUT
            self.log.append(f"{self.name} {self.done}")
            if self.done % (2 * ROLLOUT) == 0:
                self.curve.append((self.done, self.judge()))
            yield Report(self.done, self.budget, {"steps": float(self.done)})

    def judge(self) -> float:
        return self.height * (1 + self.done)

    def get_state(self) -> dict[str, Any]:
        return {"done": self.done, "curve": [list(point) for point in self.curve]}

    def set_state(self, state: dict[str, Any]) -> None:
        self.done, self.curve = state["done"], [(int(x), float(y)) for x, y in state["curve"]]


def choice(heights: Mapping[str, float]) -> tuple[SourceChoice, list[str]]:
    log: list[str] = []
    budget = BUDGET - PROBE * (len(heights) - 1)

    def maker(name: str) -> Callable[[], FineTuning]:
        return lambda: cast(FineTuning, StandIn(name, heights[name], budget, log))

    return SourceChoice({name: maker(name) for name in heights}, BUDGET, PROBE), log


@pytest.mark.parametrize("best", ["a", "b", "c"])
def test_the_best_after_its_probe_goes_on_where_it_stood(best: str) -> None:
    run, log = choice({"a": 1.0, "b": 1.0, "c": 1.0} | {best: 2.0})
    reports = list(run.train())
    assert run.chosen == best
    assert run.scores == {name: (42.0 if name == best else 21.0) for name in "abc"}
    probes = [f"{name} {done}" for name in "abc" for done in (10, 20)]
    assert log == [*probes, *(f"{best} {done}" for done in range(30, 80, 10))]  # none of it is trained twice
    done = [report.done for report in reports]
    assert done == list(range(10, 120, 10))
    assert all(report.done <= report.total for report in reports)


def test_equal_ones_go_to_the_first() -> None:
    for heights, wanted in (({"a": 1.0, "b": 1.0}, "a"), ({"c": 0.5, "b": 1.0, "a": 1.0}, "b")):
        run, _ = choice(heights)
        list(run.train())
        assert run.chosen == wanted


def test_the_probes_steps_are_counted() -> None:
    run, log = choice({"a": 1.0, "b": 3.0, "c": 2.0})
    list(run.train())
    assert run.probed == dict.fromkeys("abc", 20)  # until the report after it, not 15
    assert run.spent == 40
    # Of the chosen run, moved by what the others took; it starts before any training.
    assert run.curve == [(0, 3.0), (60, 63.0), (80, 123.0), (100, 183.0)]
    assert run.curve[-1][0] <= ROLLOUT * len(log)


def test_a_single_candidate_spends_nothing() -> None:
    run, _ = choice({"a": 1.0})
    list(run.train())
    assert (run.spent, run.chosen) == (0, "a")
    assert run.curve == run.run.curve


@pytest.mark.parametrize("stop", range(10))
def test_resumes_to_the_same(tmp_path: Path, stop: int) -> None:
    heights = {"a": 1.0, "b": 3.0, "c": 2.0}
    whole, log = choice(heights)
    reports = list(whole.train())
    interrupted, _ = choice(heights)
    for count, _ in enumerate(interrupted.train()):
        if count == stop:
            break
    save_state(tmp_path / "state", interrupted.get_state())
    resumed, again = choice(heights)
    resumed.set_state(load_state(tmp_path / "state"))
    rest = list(resumed.train())
    assert (resumed.curve, resumed.scores, resumed.chosen) == (whole.curve, whole.scores, whole.chosen)
    assert (resumed.spent, resumed.probed) == (whole.spent, whole.probed)
    assert rest[-1] == reports[-1]
    # Probes are begun again, what was chosen goes on.
    assert again == (log if stop < 6 else log[stop + 1 :])
