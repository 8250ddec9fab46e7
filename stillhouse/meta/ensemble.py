"""Ensembles of policies: several agents of one environment that answer together.

With member i's outputs ``o_i(s)``, [A]:

    probabilities   log( 1/n sum_i softmax(o_i / tau_i) )        logits, whose softmax is the mean policy
    q_values        mean_i mean_a o_i + s 1/n sum_i (o_i - mean_a o_i) / s_i,    s = mean_i s_i
    vote            log of the share of members whose best action it is

``q_values`` weighs all members' preferences the same: ``s_i`` is the standard deviation of member i's advantages (its Q-values
less their mean over the actions) on calibration observations. Where all ``s_i`` are equal it is the plain mean of the Q-values, and
it always is in their unit.

An ensemble is a :data:`stillhouse.types.Policy`: it is evaluated like any agent, and it is a teacher for ``collect``, whose dataset is
distilled into one network. That is how several teachers of one environment become one student:

    teacher = Teacher(ensemble, ensemble.output, digest, ensemble.parameters)

Choices:

1. A member's temperature is 1 for logits; for Q-values it follows from their mean action gap on the calibration observations, as in
   distillation (:func:`stillhouse.losses.distillation.action_gap_temperature`).
2. Votes that are equal are decided by the mean policy, a thousandth of which is added to the shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stillhouse.errors import StillhouseError
from stillhouse.losses.distillation import action_gap_temperature
from stillhouse.networks.multi_task import MultiTaskNetwork, parameter_count
from stillhouse.types import EnvironmentSpec, OutputKind

Combination = Literal["probabilities", "q_values", "vote"]

GREEDY_ODDS = 2.0  # of a Q-member's best action over its second best, where they are a mean action gap apart
_TIE_BREAK = 1e-3  # smaller than one vote among 1,000 members


class Ensemble:
    """Several networks' answer for one environment; call it with observations.

    Args:
        networks: in evaluation mode, by names of the caller's.
        environment: the environment's name in all of them.
        combine: how.
        calibration: raw observations [N, ...] of play; needed where a member gives Q-values.
        device: where the networks are.

    Attributes:
        output: what the ensemble gives.
        parameters: of all members together.

    Raises:
        StillhouseError: no member, other spaces, a member with a memory, Q-values asked of members that give logits, or no
            calibration.
    """

    def __init__(
        self,
        networks: Mapping[str, MultiTaskNetwork],
        environment: str,
        combine: Combination = "probabilities",
        calibration: np.ndarray | None = None,
        device: str = "cpu",
    ) -> None:
        _check(networks, environment, combine, calibration)
        self._networks = [network.eval() for network in networks.values()]
        self._environment, self._device = environment, device
        self.combine: Combination = combine
        self.output: OutputKind = "q_values" if combine == "q_values" else "logits"
        self.parameters = sum(parameter_count(network) for network in self._networks)
        self.temperatures = torch.ones(len(self._networks), 1, 1, device=device)
        self.scales = torch.ones(len(self._networks), 1, 1, device=device)
        if calibration is not None:
            self._calibrate(calibration)

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """Outputs float32 [B, A] for raw observations [B, ...]."""
        with torch.inference_mode():
            return self.combined(self._members(observations)).to("cpu", torch.float32).numpy()

    def combined(self, outputs: Tensor) -> Tensor:
        """The ensemble's outputs [B, A] for its members' [M, B, A]."""
        if self.combine == "q_values":
            means = outputs.mean(2, keepdim=True)
            preferences = ((outputs - means) / self.scales).mean(0)
            return means.mean(0) + self.scales.mean() * preferences
        policies = torch.log_softmax(outputs / self.temperatures, 2).logsumexp(0) - np.log(len(outputs))
        if self.combine == "probabilities":
            return policies
        votes = torch.nn.functional.one_hot(outputs.argmax(2), outputs.shape[2]).float().mean(0)
        # In logarithms: a probability that is too small for a float32 has a finite one.
        return torch.logaddexp(votes.log(), policies + np.log(_TIE_BREAK)) - np.log1p(_TIE_BREAK)

    def _members(self, observations: np.ndarray) -> Tensor:
        given = torch.from_numpy(observations).to(self._device)
        return torch.stack([network(given, self._environment) for network in self._networks])

    def _calibrate(self, observations: np.ndarray) -> None:
        with torch.inference_mode():
            outputs = self._members(observations)
        for index, network in enumerate(self._networks):
            if network.spec.output == "q_values" and outputs.shape[2] > 1:
                best = outputs[index].topk(2, 1).values
                gap = max(1e-6, float((best[:, 0] - best[:, 1]).mean()))
                self.temperatures[index] = action_gap_temperature(gap, GREEDY_ODDS)
        advantages = outputs - outputs.mean(2, keepdim=True)
        self.scales = advantages.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-6)


def _check(
    networks: Mapping[str, MultiTaskNetwork],
    environment: str,
    combine: Combination,
    calibration: np.ndarray | None,
) -> None:
    if not networks:
        raise StillhouseError("an ensemble needs one network or more, and none was given; name checkpoints")
    spaces: dict[str, EnvironmentSpec] = {}
    for name, network in networks.items():
        if environment not in network.spec.environments:
            raise StillhouseError(
                f"{name}: has no head for {environment!r}; its environments are {', '.join(network.spec.environments)}"
            )
        network.check_memoryless(environment)
        spaces[name] = network.spec.environments[environment]
        if combine == "q_values" and network.spec.output != "q_values":
            raise StillhouseError(
                f"{name}: gives {network.spec.output}, and an ensemble of q_values needs members that give q_values; take probabilities or vote"
            )
    first = next(iter(spaces))
    for name, spec in spaces.items():
        if spec != spaces[first]:
            raise StillhouseError(
                f"{first!r} and {name!r} have other spaces for {environment!r}: {spaces[first]!r} and {spec!r}; members must agree"
            )
    if calibration is None and any(network.spec.output == "q_values" for network in networks.values()):
        raise StillhouseError(
            "calibration: members that give q_values need some observations of play, from which their scale is taken; give some hundreds"
        )
