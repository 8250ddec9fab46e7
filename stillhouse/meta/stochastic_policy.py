"""Policies of many tasks at once: one network, and a row of parameters for each task.

The network is an ordinary :class:`~stillhouse.networks.multi_task.MultiTaskNetwork` with one head, run through ``torch.func.functional_call`` and
``vmap`` over the rows; gradients and directional derivatives come from ``torch.func``. Discrete actions are drawn from the softmax of its
outputs. Action vectors are drawn from a Gaussian whose means are its outputs and whose standard deviations are parameters of
their own, the same in every state.

A distribution is one tensor [..., k]: log-probabilities of the actions (k = A), or means and logarithms of standard deviations (k = 2 a).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, vmap

from stillhouse import seeding
from stillhouse.envs.families import Family
from stillhouse.errors import StillhouseError
from stillhouse.networks.multi_task import (
    MultiTaskNetwork,
    NetworkSize,
    NetworkSpec,
    build_network,
    scale_head,
)
from stillhouse.types import EnvironmentSpec, ObservationSpec

_FRESH_HEAD = (
    0.01  # factor on the fresh head's weights: learning starts from nearly uniform play, or means near 0
)


class StochasticPolicy:
    """The form of a family's policies; parameters are given with every call, as one flat row [P] for each task.

    Args:
        family: whose observations and actions.
        hidden: widths of the hidden layers, ReLU.

    Attributes:
        size: P, the network's numbers and, for action vectors, a logarithm of a standard deviation for each component.
    """

    def __init__(self, family: Family, hidden: tuple[int, ...]) -> None:
        self.family = family
        self._network = self._build(hidden, 0)
        self._shapes = {name: parameter.shape for name, parameter in self._network.named_parameters()}
        self._network_size = sum(shape.numel() for shape in self._shapes.values())
        self.size = self._network_size + (0 if family.discrete else family.actions)
        self._hidden = hidden
        self._forward = vmap(self._forward_one)

    def _build(self, hidden: tuple[int, ...], seed: int) -> MultiTaskNetwork:
        observation = ObservationSpec(kind="vector", shape=(self.family.observations,))
        environment = EnvironmentSpec(observation=observation, actions=self.family.actions)
        spec = NetworkSpec(
            size=NetworkSize(features=hidden[0], torso=hidden[1:]),
            environments={self.family.name: environment},
            output="logits",
        )
        return build_network(spec, seed)

    def initial(self, seed: int, initial_std: float) -> Tensor:
        """Fresh parameters [P], from the stream ``network`` of ``seed``."""
        network = self._build(self._hidden, seeding.derive(seed, "network"))
        scale_head(network, self.family.name, _FRESH_HEAD)
        parts = [parameter.detach().reshape(-1) for parameter in network.parameters()]
        if not self.family.discrete:
            parts.append(torch.full((self.family.actions,), math.log(initial_std)))
        return torch.cat(parts)

    def network(self, parameters: Tensor) -> MultiTaskNetwork:
        """One row's parameters [P] as an ordinary network, with a head named after the family: a source for a transfer.

        Raises:
            StillhouseError: the family's actions are vectors.
        """
        if not self.family.discrete:
            raise StillhouseError(
                f"{self.family.name}: its actions are vectors, and networks choose among a finite set of actions, so this policy cannot be "
                "exported; policies of cartpole and acrobot can"
            )
        network = self._build(self._hidden, 0)
        network.load_state_dict(
            {name: part.detach().cpu().clone() for name, part in self._unflatten(parameters).items()}
        )
        return network

    def check(self, parameters: np.ndarray) -> Tensor:
        """Parameters [P] that were kept elsewhere, as a tensor of their own.

        Raises:
            StillhouseError: they are not of this form.
        """
        if parameters.shape != (self.size,):
            raise StillhouseError(
                f"initial: {parameters.size} parameters were given, but this policy has {self.size}; they were learnt with another family or "
                "other hidden widths"
            )
        return torch.from_numpy(parameters.copy())

    def _unflatten(self, parameters: Tensor) -> dict[str, Tensor]:
        parts, start = {}, 0
        for name, shape in self._shapes.items():
            parts[name] = parameters[start : start + shape.numel()].view(shape)
            start += shape.numel()
        return parts

    def _forward_one(self, parameters: Tensor, observations: Tensor) -> Tensor:
        outputs: Tensor = functional_call(
            self._network, self._unflatten(parameters), (observations, self.family.name)
        )
        if self.family.discrete:
            return outputs.log_softmax(-1)
        log_std = parameters[self._network_size :].expand_as(outputs)
        return torch.cat([outputs, log_std], dim=-1)

    def distribution(self, parameters: Tensor, observations: Tensor) -> Tensor:
        """Distributions [N, B, k] for parameters [N, P] and observations [N, B, o]."""
        found: Tensor = self._forward(parameters, observations)
        return found

    def sample(self, distribution: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Actions int64 [N, K], or float32 [N, K, a], of distributions [N, K, k]."""
        if self.family.discrete:
            chances = random.random((*distribution.shape[:-1], 1))
            below = np.exp(distribution).cumsum(axis=-1) < chances
            return np.minimum(below.sum(axis=-1), self.family.actions - 1)
        mean, log_std = np.split(distribution, 2, axis=-1)
        drawn: np.ndarray = mean + np.exp(log_std) * random.standard_normal(mean.shape, dtype=np.float32)
        return drawn

    def log_probability(self, distribution: Tensor, actions: Tensor) -> Tensor:
        """Of actions [N, B] or [N, B, a], [N, B]; a density for action vectors."""
        if self.family.discrete:
            return distribution.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        mean, log_std = distribution.chunk(2, dim=-1)
        scaled = (actions - mean) * torch.exp(-log_std)
        return (-scaled.square() / 2 - log_std - math.log(2 * math.pi) / 2).sum(-1)

    def divergence(self, first: Tensor, second: Tensor) -> Tensor:
        """KL(first || second) in nats, [N, B], of distributions [N, B, k]."""
        if self.family.discrete:
            return (first.exp() * (first - second)).sum(-1)
        mean, log_std = first.chunk(2, dim=-1)
        other_mean, other_log_std = second.chunk(2, dim=-1)
        squares = (2 * log_std).exp() + (mean - other_mean).square()
        return (other_log_std - log_std + squares / (2 * (2 * other_log_std).exp()) - 0.5).sum(-1)

    def entropy(self, distribution: Tensor) -> Tensor:
        """In nats, [N, B]; differential for action vectors."""
        if self.family.discrete:
            return -(distribution.exp() * distribution).sum(-1)
        log_std = distribution.chunk(2, dim=-1)[1]
        return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def fisher(self, distribution: Tensor, tangent: Tensor) -> Tensor:
        """Fisher information of the distributions, in their own numbers, times a tangent, all [N, B, k]; it is diagonal in both cases.

        Of log-probabilities it is diag(p): tangents of normalised log-probabilities stay normalised.
        """
        if self.family.discrete:
            return distribution.exp() * tangent
        mean, log_std = tangent.chunk(2, dim=-1)
        return torch.cat([torch.exp(-2 * distribution.chunk(2, dim=-1)[1]) * mean, 2 * log_std], dim=-1)
