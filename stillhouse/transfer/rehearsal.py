"""Rehearsal: while a network learns a target, it is kept to what it did on states of its sources.

    loss = loss_learner + w mean_s KL( softmax(f_source(s) / tau) || softmax(f(s) / tau) ),   s of the sources' datasets

``f_source`` is the network as it was taken; ``tau`` is 1 for logits and follows the mean action gap for Q-values. This is
distillation from one's former self (Li & Hoiem 2016, arXiv:1606.09282) on kept data (Robins 1995, doi:10.1080/09540099550039318).

Deviations: 1. Both sides are divided by tau, for the network must keep its outputs, not become a sharper policy. 2. The data is of the
sources' own environments, where Li & Hoiem have the new task's only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse import seeding
from stillhouse.datasets.reader import Dataset
from stillhouse.networks.multi_task import MultiTaskNetwork
from stillhouse.transfer.initialisation import Correspondence, kept_observations
from stillhouse.transfer.kickstarting import policy_temperature
from stillhouse.types import OutputKind


class Rehearsal:
    """Adds the gradient of its loss at every step of the learner's optimiser.

    Args:
        network: that learns; its kept environments are still as they were taken.
        target: the target environment's name.
        datasets: kept environment (by its name in the network) to states of it.
        output: what the sources' heads give.
        correspondence: of the target with the source's environment, where an adapter is shared.
        rows: of all datasets together, at each step.
        weight: w.
        seed: the stage's seed.
    """

    def __init__(
        self,
        network: MultiTaskNetwork,
        target: str,
        datasets: Mapping[str, Dataset],
        output: OutputKind,
        correspondence: Correspondence | None,
        rows: int,
        weight: float,
        seed: int,
    ) -> None:
        self.network, self.target, self.weight = network, target, weight
        self.datasets = dict(datasets)
        self._correspondence = correspondence
        self._rows = max(1, rows // len(self.datasets))
        self._before = copy.deepcopy(network).requires_grad_(False)
        self._random = seeding.generator(seed, "rehearsal")
        self._device = next(network.parameters()).device
        self._temperatures = {
            name: policy_temperature(self._before, name, self._observations(name, _evenly(data)), output)
            for name, data in self.datasets.items()
        }

    def __call__(self) -> None:
        for name, data in self.datasets.items():
            rows = self._random.integers(len(data), size=self._rows)
            given, temperature = self._observations(name, rows), self._temperatures[name]
            with torch.no_grad():
                before = torch.softmax(self._before(given, name) / temperature, 1)
            outputs = self.network(given, name)
            # d KL(before || now) / d outputs, written out: exactly 0 as long as nothing has moved.
            apart = torch.softmax(outputs.detach() / temperature, 1).sub_(before)
            outputs.backward(apart * (self.weight / (len(self.datasets) * len(rows) * temperature)))

    def _observations(self, name: str, rows: np.ndarray) -> Tensor:
        found = torch.from_numpy(self.datasets[name].observations(rows)).to(self._device)
        return kept_observations(self.network, self.target, name, self._correspondence, found)

    def get_state(self) -> dict[str, Any]:
        """What sampling goes on from."""
        return {"random": self._random.bit_generator.state}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self._random.bit_generator.state = state["random"]


def _evenly(data: Dataset, rows: int = 4096) -> np.ndarray:
    return np.linspace(0, len(data) - 1, min(rows, len(data))).astype(np.int64)
