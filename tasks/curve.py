"""A long stage's training: followed, saved and gone on with; its learning curve, sampled evenly, shown, written as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from stillhouse.files import write_atomic
from stillhouse.types import OutputKind, Report
from tasks.stage import StageContext

# Metrics of a learner in its curve, and their columns.
LEARNER_COLUMNS: dict[OutputKind, dict[str, str]] = {
    "q_values": {"loss/td": "loss", "rollout/epsilon": "epsilon"},
    "logits": {
        "loss/policy": "policy_loss",
        "loss/value": "value_loss",
        "policy/entropy": "entropy",
        "policy/kl": "kl",
    },
}


class Trainable(Protocol):
    """What trains in a stage, and can be saved whenever it has reported."""

    def train(self) -> Iterator[Report]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


class Curve:
    """Keeps at most ``points`` evenly spaced reports, and passes each on to the stage's progress.

    Args:
        context: the stage's.
        unit: what ``Report.done`` counts, ``env_steps`` or ``updates``: the first column.
        columns: metric names and the columns they are written to.
        points: rows at most.
    """

    def __init__(self, context: StageContext, unit: str, columns: dict[str, str], points: int = 100) -> None:
        self._context = context
        self._unit = unit
        self._columns = columns
        self._points = points
        self.rows: list[list[float]] = []

    def record(self, report: Report) -> None:
        """Show a report; keep it when the next sampling point is reached."""
        # The curve's own columns first: a line of progress has room for a few.
        metrics = {
            name: report.metrics[name] for name in self._columns if name in report.metrics
        } | report.metrics
        self._context.progress.update(report.done, report.total, self._unit.replace("_", " "), metrics)
        due = len(self.rows) + 1
        if report.done >= due * report.total / self._points and set(self._columns) <= set(report.metrics):
            self.rows.append([report.done, *(report.metrics[name] for name in self._columns)])

    def follow(self, learner: Trainable) -> None:
        """Train to the end, from the state that an interrupted run of this stage has saved, saving it now and then."""
        scratch = self._context.scratch
        if saved := scratch.load():
            learner.set_state(saved["learner"])
            self.set_state(saved["curve"])
        for report in learner.train():
            self.record(report)
            if scratch.due():
                scratch.save({"learner": learner.get_state(), "curve": self.get_state()})

    def write(self, path: Path) -> None:
        """Write the kept rows as CSV; numbers with 6 significant digits."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([self._unit, *self._columns.values()])
        writer.writerows([int(row[0]), *(f"{value:.6g}" for value in row[1:])] for row in self.rows)
        write_atomic(path, text.getvalue())

    def get_state(self) -> list[Any]:
        """The rows kept so far."""
        return [list(row) for row in self.rows]

    def set_state(self, state: list[Any]) -> None:
        """Continue from ``get_state``."""
        self.rows = [list(row) for row in state]
