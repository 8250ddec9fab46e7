"""Studies: what was compared, with which scores, over which seeds, as it is committed under ``benchmarks/results/``.

A benchmark writes one file for each study, :mod:`tasks.publish_results` draws them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from stillhouse.config import Config, parse
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.statistics import normalised_score

FOLDER = Path("benchmarks/results/policy_distillation")
Matrix = list[list[float | None]]


class Arm(Config):
    """One of the things a study compares: a row of its table.

    A score or return is null where there is none: the teacher is no better than random play.
    """

    scores: Matrix = Field(default_factory=list, description="normalised, [seeds][environments]")
    returns: Matrix = Field(default_factory=list, description="mean returns, [seeds][environments]")
    parameters: int | None = Field(
        default=None, ge=0, description="of the network, or of the networks together"
    )
    environments: list[str] = Field(
        default_factory=list, description="the columns, where they are not the study's"
    )
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="numbers and texts become columns; lists are for the study's own section",
    )


class Study(Config):
    """A file below ``benchmarks/results/policy_distillation/``."""

    study: str = Field(min_length=1)
    question: str
    provenance: dict[str, Any] = Field(description="as benchmarks.machine.provenance makes it")
    environments: list[str] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    arms: dict[str, Arm] = Field(min_length=1)
    order: list[str] = Field(default_factory=list, description="arms in the table's order; else by name")
    reference: dict[str, Matrix] = Field(
        default_factory=dict, description="returns of 'random' and 'teacher', [seeds][environments]"
    )
    notes: list[str] = Field(default_factory=list, description="sentences that stand under the table")

    @model_validator(mode="after")
    def _whole(self) -> Study:
        if unknown := sorted(set(self.order) ^ set(self.arms)) if self.order else []:
            raise ValueError(f"order must name every arm once; {', '.join(unknown)} does not agree")
        given = [(f"arms.{name}", arm.environments, arm.scores) for name, arm in self.arms.items()]
        given += [(f"arms.{name}", arm.environments, arm.returns) for name, arm in self.arms.items()]
        given += [(f"reference.{name}", [], matrix) for name, matrix in self.reference.items()]
        for where, environments, matrix in given:
            shape = (len(self.seeds), len(environments or self.environments))
            if matrix and (len(matrix) != shape[0] or any(len(row) != shape[1] for row in matrix)):
                raise ValueError(f"{where}: a matrix of {shape[0]} seeds x {shape[1]} environments is needed")
        if {"random", "teacher"} <= set(self.reference):
            for name, arm in self.arms.items():
                self._check_scores(name, arm)
        return self

    def _check_scores(self, name: str, arm: Arm) -> None:
        if not (arm.scores and arm.returns) or arm.environments:
            return
        random, teacher = (array(self.reference[key]) for key in ("random", "teacher"))
        expected = normalised_score(array(arm.returns), random, teacher)
        if not np.allclose(array(arm.scores), expected, rtol=0, atol=2e-3, equal_nan=True):
            raise ValueError(f"arms.{name}: the scores are not (return - random) / (teacher - random)")

    def names(self) -> list[str]:
        """The arms in the table's order."""
        return self.order or sorted(self.arms)

    def columns(self, arm: Arm) -> list[str]:
        """The environments of an arm's matrices."""
        return arm.environments or self.environments


def array(matrix: Matrix) -> np.ndarray:
    """float64 [S, E], NaN where there is no number."""
    return np.array([[np.nan if value is None else value for value in row] for row in matrix], np.float64)


def read_study(path: Path) -> Study:
    """The study in a file.

    Raises:
        StillhouseError: it is no JSON, or not in the form of :class:`Study`: file and field.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StillhouseError(f"{path}: cannot be read ({error}); run its benchmark again") from None
    study = parse(Study, data, str(path))
    if study.study != path.stem:
        raise StillhouseError(f"{path}: holds the study {study.study!r}; a file is named after its study")
    return study
