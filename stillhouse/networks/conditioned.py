"""A policy that depends on a set of transitions: an encoder of the set, and dense layers whose weights it changes.

    c_k = rho( mean_n phi(x_kn) )              over the set's members n       Zaheer et al. 2017, https://arxiv.org/abs/1703.06114
    none       W,  b
    context    W,  b + U c                     in the first layer: c as further inputs
    film       (1 + g(c)) W,  (1 + g(c)) b + h(c)   in the hidden layers      Perez et al. 2018, https://arxiv.org/abs/1709.07871
    weights    W + V c,  b + v c               all of them                    Ha et al. 2016, https://arxiv.org/abs/1609.09106

In all four the result is an ordinary network of dense layers for each set, which :func:`as_network` takes out.

Fresh changes are small beside the common weights, so that learning starts from one policy for all sets: the "bias" initialisation of
Beck et al. 2022 (https://arxiv.org/abs/2210.11348), whom an ordinary one did not let learn.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize, NetworkSpec
from stillhouse.types import EnvironmentSpec, ObservationSpec

Conditioning = Literal["none", "context", "film", "weights"]
Layers = list[tuple[Tensor, Tensor]]
"""Weights [K, outputs, inputs] and biases [K, outputs] of each layer, for K sets."""

_FRESH = 0.1  # factor on the initial weights of what changes the layers


class SetEncoder(nn.Module):
    """Sets of rows [K, N, D] -> what they have in common [K, C], whatever their order.

    Args:
        inputs: D.
        width: of the hidden layers.
        outputs: C.
    """

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.together = nn.Linear(width + 1, outputs)

    def forward(self, rows: Tensor, present: Tensor) -> Tensor:
        """Encode.

        Args:
            rows: [K, N, D].
            present: bool [K, N], rows that are members; a set may be empty.
        """
        weight = present.unsqueeze(2).float()
        count = weight.sum(1)
        mean = (self.each(rows) * weight).sum(1) / count.clamp(min=1)
        # How much is known, between 0 and 1; the mean does not tell.
        known = count / (1 + count)
        context: Tensor = torch.tanh(self.together(torch.cat([mean, known], 1)))
        return context


class ConditionedPolicy(nn.Module):
    """Dense layers with ReLU between them, changed by each set.

    Args:
        observations: width of an observation.
        actions: number of outputs.
        widths: of the hidden layers.
        conditioning: how a set changes them.
        transitions: width of a set's rows.
        encoder_width: hidden width of the set encoder.
        context: width of what is kept of a set.
    """

    def __init__(
        self,
        observations: int,
        actions: int,
        widths: tuple[int, ...],
        conditioning: Conditioning,
        transitions: int,
        encoder_width: int,
        context: int,
    ) -> None:
        super().__init__()
        self.conditioning = conditioning
        self.dense = nn.ModuleList(
            nn.Linear(inputs, outputs)
            for inputs, outputs in itertools.pairwise((observations, *widths, actions))
        )
        if conditioning == "none":
            return
        self.encoder = SetEncoder(transitions, encoder_width, context)
        changes = {
            "context": widths[0],
            "film": 2 * sum(widths),
            "weights": sum(parameter.numel() for parameter in self.dense.parameters()),
        }
        self.change = nn.Linear(context, changes[conditioning])
        with torch.no_grad():
            self.change.weight.mul_(_FRESH)
            self.change.bias.zero_()

    def layers(self, rows: Tensor, present: Tensor) -> Layers:
        """The layers of each set.

        Args:
            rows: sets of transitions, [K, N, D].
            present: bool [K, N], which are there.
        """
        count = len(rows)
        dense: Any = self.dense
        common = [(layer.weight.expand(count, -1, -1), layer.bias.expand(count, -1)) for layer in dense]
        if self.conditioning == "none":
            return common
        change = self.change(self.encoder(rows, present))
        if self.conditioning == "context":
            weight, bias = common[0]
            return [(weight, bias + change), *common[1:]]
        if self.conditioning == "film":
            return [*_modulated(common[:-1], change), common[-1]]
        sizes = [parameter.numel() for weight, bias in common for parameter in (weight[0], bias[0])]
        parts = iter(change.split(sizes, 1))
        return [(weight + next(parts).view_as(weight), bias + next(parts)) for weight, bias in common]


def outputs(layers: Layers, observations: Tensor) -> Tensor:
    """Each set's outputs [K, T, A] for observations [K, T, n]."""
    hidden = observations
    for index, (weight, bias) in enumerate(layers):
        hidden = torch.baddbmm(bias.unsqueeze(1), hidden, weight.transpose(1, 2))
        if index < len(layers) - 1:
            hidden = functional.relu(hidden)
    return hidden


def as_network(layers: Layers, index: int, environment: str) -> MultiTaskNetwork:
    """One set's layers as an ordinary network of logits, in evaluation mode.

    Args:
        layers: of K sets.
        index: which of them.
        environment: the name that its head shall have.
    """
    (first, _), *_ = layers
    *widths, actions = (weight.shape[1] for weight, _ in layers)
    observation = ObservationSpec(kind="vector", shape=(first.shape[2],))
    spec = NetworkSpec(
        size=NetworkSize(features=widths[0], torso=tuple(widths[1:])),
        environments={environment: EnvironmentSpec(observation=observation, actions=actions)},
        output="logits",
    )
    with torch.random.fork_rng(devices=[]):  # the weights it draws are overwritten
        network = MultiTaskNetwork(spec)
    tensors = [tensor[index].detach().clone() for layer in layers for tensor in layer]
    # The network's own order too: the adapter, the torso's layers, the head; each weight before its bias.
    names = [name for layer in network.layer_names(environment) for name in layer]
    network.load_state_dict(dict(zip(names, tensors, strict=True)))
    return network.eval()


def _modulated(layers: Layers, change: Tensor) -> Layers:
    """Hidden layers scaled and shifted, unit by unit."""
    widths = [weight.shape[1] for weight, _ in layers]
    scales, shifts = (part.split(widths, 1) for part in change.chunk(2, 1))
    return [
        (weight * (1 + scale).unsqueeze(2), bias * (1 + scale) + shift)
        for (weight, bias), scale, shift in zip(layers, scales, shifts, strict=True)
    ]
