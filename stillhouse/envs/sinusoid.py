"""Sinusoids to regress, a family of tasks (Finn et al. 2017, https://arxiv.org/abs/1703.03400, section 5.1).

A task is ``y = amplitude sin(x - phase)`` on inputs x, with its own amplitude and phase: an array of both, float64 [N, 2]. The paper draws
the amplitude from U[0.1, 5], the phase from U[0, pi] and x from U[-5, 5]; Reptile's demonstration (Nichol et al. 2018,
https://arxiv.org/abs/1803.02999) has phases to 2 pi.

The paper trains and tests on independent draws from one continuous distribution: two of them are never equal, but may lie as near as you
like. **Here the family is cut up.** Its parameters lie in a grid of 20 x 20 equal cells; the cell in row i and column j is a test cell where
``(i + 2 j) mod 5`` is 0, a validation cell where it is 1, else a training cell. A task's parameters alone say which split it belongs to
(:func:`split_of`), so that no task can be in two. Every row and every column of the grid holds as many cells of a split as any other, so the
amplitudes of each split, and its phases, are distributed as the whole family's.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.errors import StillhouseError

Split = Literal["training", "validation", "test"]

CELLS = 20  # along an axis of the grid
_PERIOD = 5  # of the splits' pattern: a fifth of the cells is for tests, another for validation
_MARGIN = 1e-6  # of a cell, so that no rounding carries a task over its border;
_NARROWEST = 1e-6  # and of an interval's larger end, below which it might


class SinusoidConfig(Config):
    """Which sinusoids; the defaults are MAML's."""

    smallest_amplitude: float = Field(default=0.1, ge=0, le=1e6)
    largest_amplitude: float = Field(default=5.0, ge=0, le=1e6)
    smallest_phase: float = Field(default=0.0, ge=0, le=2 * math.pi, description="radians")
    largest_phase: float = Field(
        default=math.pi, ge=0, le=2 * math.pi, description="radians; Reptile's demonstration has 2 pi"
    )
    smallest_input: float = Field(default=-5.0, ge=-1e6, le=1e6)
    largest_input: float = Field(default=5.0, ge=-1e6, le=1e6)
    test_tasks: int = Field(
        default=1000,
        ge=1,
        le=10**6,
        description="how many tasks the test split has, and the validation split",
    )

    @model_validator(mode="after")
    def _a_family(self) -> SinusoidConfig:
        for name in ("amplitude", "phase", "input"):
            low, high = getattr(self, f"smallest_{name}"), getattr(self, f"largest_{name}")
            if low > high:
                raise ValueError(
                    f"smallest_{name} {low:g} is above largest_{name} {high:g}; give them in this order"
                )
            if name != "input" and low < high < low + _NARROWEST * high:
                raise ValueError(
                    f"the interval from smallest_{name} {low!r} to largest_{name} {high!r} is too narrow to be cut into cells; give equal ends or a "
                    "wider one"
                )
        if self.smallest_input == self.largest_input:
            raise ValueError(
                f"smallest_input and largest_input are both {self.smallest_input:g}, so there is nothing to regress; widen the interval"
            )
        if self.smallest_amplitude == self.largest_amplitude and self.smallest_phase == self.largest_phase:
            raise ValueError(
                f"a family with one member (amplitude {self.smallest_amplitude:g}, phase {self.smallest_phase:g}) has nothing to "
                "transfer to; widen the interval of the amplitude or of the phase"
            )
        return self

    @property
    def bounds(self) -> np.ndarray:
        """[[smallest amplitude, smallest phase], [largest amplitude, largest phase]], float64 [2, 2]."""
        return np.array(
            [[self.smallest_amplitude, self.smallest_phase], [self.largest_amplitude, self.largest_phase]]
        )

    @property
    def grid(self) -> np.ndarray:
        """Cells along the amplitude and along the phase, int64 [2]; 1 where all tasks have the same."""
        low, high = self.bounds
        return np.where(low == high, 1, CELLS)


def split_of(config: SinusoidConfig, tasks: np.ndarray) -> np.ndarray:
    """0 for a training task, 1 for one of validation, 2 for one of the test split: int64 [N], for tasks [N, 2]."""
    low, high = config.bounds
    width = np.where(high > low, (high - low) / config.grid, 1.0)
    cells = np.clip(((tasks - low) / width).astype(np.int64), 0, config.grid - 1)
    residues = (cells[:, 0] + 2 * cells[:, 1]) % _PERIOD
    return np.where(residues == 0, 2, np.where(residues == 1, 1, 0))


def draw(config: SinusoidConfig, split: Split, count: int, random: np.random.Generator) -> np.ndarray:
    """So many tasks, uniform over the cells of a split: float64 [N, 2] of amplitude and phase."""
    rows, columns = np.indices(tuple(config.grid.tolist()))
    residues = (rows + 2 * columns) % _PERIOD
    wanted = {"test": residues == 0, "validation": residues == 1, "training": residues > 1}[split]
    cells = np.argwhere(wanted)[random.integers(int(wanted.sum()), size=count)]
    within = _MARGIN + (1 - 2 * _MARGIN) * random.random((count, 2))
    low, high = config.bounds
    return low + (cells + within) / config.grid * (high - low)


def held_out(
    config: SinusoidConfig, count: int, seed: int, split: Literal["validation", "test"] = "test"
) -> np.ndarray:
    """Different tasks of a split that is not trained on, drawn by ``seed`` from its ``config.test_tasks``: float64 [N, 2].

    Raises:
        StillhouseError: the split has fewer tasks than asked for.
    """
    if not 1 <= count <= config.test_tasks:
        raise StillhouseError(
            f"{count} {split} tasks were asked for, but 1 to {config.test_tasks} are there; ask for fewer or raise test_tasks"
        )
    everything = draw(config, split, config.test_tasks, seeding.generator(0, "sinusoids", split))
    chosen = seeding.generator(seed, "sinusoids", split).permutation(config.test_tasks)[:count]
    return everything[chosen]


def values(tasks: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """``amplitude sin(x - phase)`` of tasks [N, 2] at inputs [N, K], float64 [N, K]."""
    return tasks[:, :1] * np.sin(inputs - tasks[:, 1:])


def draw_inputs(config: SinusoidConfig, tasks: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Where a task's points lie, uniform, float64 [tasks, count]."""
    return random.uniform(config.smallest_input, config.largest_input, size=(tasks, count))


def even_inputs(config: SinusoidConfig, count: int) -> np.ndarray:
    """The middles of ``count`` equal parts of the inputs' interval, float64 [count]."""
    width = (config.largest_input - config.smallest_input) / count
    return config.smallest_input + width * (np.arange(count) + 0.5)
