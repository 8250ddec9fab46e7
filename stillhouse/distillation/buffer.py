"""Observations and a teacher's outputs in memory: data that grows, then runs round, while a student learns from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from stillhouse.datasets.schema import action_gaps, column_forms, pack, unpack
from stillhouse.types import EnvironmentSpec, OutputKind


@dataclass(frozen=True)
class BufferFacts:
    """What holds for all rows: see :class:`stillhouse.distillation.student.TeacherFacts`."""

    environment: EnvironmentSpec
    output: OutputKind
    teacher_parameters: int
    mean_action_gap: float


class LabelledBuffer:
    """At most ``capacity`` rows, packed as in a dataset; when full, new rows take the place of the oldest.

    Args:
        environment: observation and actions.
        output: what the teacher's outputs are.
        teacher_parameters: number of the teacher's weights.
        capacity: rows.
    """

    def __init__(
        self, environment: EnvironmentSpec, output: OutputKind, teacher_parameters: int, capacity: int
    ) -> None:
        self._environment = environment
        self._output: OutputKind = output
        self._teacher_parameters = teacher_parameters
        self.capacity = capacity
        forms = column_forms(environment)
        # Zeroed memory is the system's until it is written to: an unfilled buffer costs nothing.
        self._columns = {
            name: np.zeros((capacity, *shape), dtype)
            for name, (dtype, shape) in forms.items()
            if name in ("observations", "outputs")
        }
        self._columns["held_out"] = np.zeros(capacity, np.bool_)
        self._next = 0  # where the next row goes
        self._filled = 0

    def __len__(self) -> int:
        return self._filled

    @property
    def schema(self) -> BufferFacts:
        """Facts about the teacher; the mean action gap is that of the rows kept now, 0 without any."""
        gap = float(action_gaps(self._columns["outputs"][: self._filled]).mean()) if self._filled else 0.0
        return BufferFacts(self._environment, self._output, self._teacher_parameters, gap)

    def append(
        self, observations: np.ndarray, outputs: np.ndarray, held_out: np.ndarray | None = None
    ) -> None:
        """Add B rows, at most ``capacity``.

        Args:
            observations: ``[B, ...]`` in the environment's type.
            outputs: the teacher's, float32 ``[B, A]``.
            held_out: bool ``[B]``, rows to measure with and never to train on: always the same copies of the
                environment, so that no episode is in both; none by default.
        """
        count = len(observations)
        if count > self.capacity:
            raise ValueError(f"{count} rows at once do not fit a capacity of {self.capacity}")
        slots = (self._next + np.arange(count)) % self.capacity
        self._columns["observations"][slots] = pack(observations, self._environment.observation)
        self._columns["outputs"][slots] = outputs
        self._columns["held_out"][slots] = False if held_out is None else held_out
        self._next = (self._next + count) % self.capacity
        self._filled = min(self.capacity, self._filled + count)

    def observations(self, rows: np.ndarray) -> np.ndarray:
        """Observations ``[B, ...]`` of ``rows`` ``[B]``, in the environment's own type."""
        return unpack(self._columns["observations"].take(rows, axis=0), self._environment.observation)

    def outputs(self, rows: np.ndarray) -> np.ndarray:
        """The teacher's outputs of ``rows``, float32 ``[B, A]``."""
        return self._columns["outputs"].take(rows, axis=0)

    def split(self, holdout_fraction: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rows for training and rows held out, uint32, as they were appended; the arguments are a dataset's."""
        held = self._columns["held_out"][: self._filled]
        return np.flatnonzero(~held).astype(np.uint32), np.flatnonzero(held).astype(np.uint32)

    def get_state(self) -> dict[str, Any]:
        """The rows and where the next one goes."""
        columns = {name: column[: self._filled].copy() for name, column in self._columns.items()}
        return {"columns": columns, "next": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get_state` of a buffer with the same arguments."""
        for name, column in self._columns.items():
            saved = np.asarray(state["columns"][name])
            self._filled = len(saved)
            column[: self._filled] = saved
        self._next = state["next"]
