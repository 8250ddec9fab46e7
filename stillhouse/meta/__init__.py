"""Meta-learning: what is learnt on a distribution of tasks makes a new task of it quick to learn.

One file per method, loaded by name so that a stage depends on the code of its own method only. A task of a family (a sinusoid, a goal,
a bandit) is an array of its parameters. Tasks for training and for testing come from disjoint parts of the family, or, where it is a
distribution that nothing is cut from (bandits, random MDPs), from streams that share no draw; a family of two members has no split, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from stillhouse.types import Report

METHODS: dict[str, tuple[str, str]] = {
    "maml": ("MAML", "MAMLConfig"),
    "reptile": ("Reptile", "ReptileConfig"),
    "learned_update": ("MetaSGD", "MetaSGDConfig"),
    "lstm_optimiser": ("LSTMOptimiser", "LSTMOptimiserConfig"),
    "maml_rl": ("MamlRl", "MamlRlConfig"),
    "reptile_rl": ("ReptileRl", "ReptileRlConfig"),
    "rl2": ("RL2", "RL2Config"),
    "hypernetwork": ("Hypernetwork", "HypernetworkConfig"),
}
"""Module's name to its :class:`MetaLearner`, which is made of settings, seed and device, and the class of the settings."""


@dataclass(frozen=True)
class Adaptation:
    """How unseen tasks are learnt.

    Attributes:
        measure: of ``values``: ``mse`` and ``loss`` are better when smaller, ``return`` when larger.
        unit: what ``steps`` counts: gradient ``updates``, or ``episodes`` of a trial.
        steps: numbers of these, [n], ascending, usually from 0.
        values: of every task after so many steps, float64 [tasks, n].
        baselines: the same of what it is compared with on the same tasks, [tasks, n] or [tasks, 1] each.
    """

    measure: Literal["mse", "loss", "return"]
    unit: Literal["updates", "episodes"]
    steps: list[int]
    values: np.ndarray
    baselines: dict[str, np.ndarray] = field(default_factory=dict)


class MetaLearner(Protocol):
    """What the pipeline needs of a method; follows :class:`tasks.curve.Trainable`."""

    columns: dict[str, str]  # of its learning curve: metric names (docs/glossary.md) to columns

    def train(self) -> Iterator[Report]:
        """Meta-train until the budget is spent; ``done`` and ``total`` count meta-updates."""
        ...

    def evaluate(self, tasks: int, steps: int, seed: int) -> Adaptation:
        """Adapt to so many tasks of the test split, drawn by ``seed``, by up to so many steps; the learner is left as it was.

        Raises:
            StillhouseError: the test split has fewer tasks than that.
        """
        ...

    def get_state(self) -> dict[str, Any]:
        """The whole training state, between two reports."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        ...

    def learnt(self) -> dict[str, Any]:
        """What training found, as tensors and plain data: what a checkpoint keeps, without optimiser and counters."""
        ...

    def load(self, learnt: dict[str, Any]) -> None:
        """Take over what :meth:`learnt` gave, for :meth:`evaluate`."""
        ...
