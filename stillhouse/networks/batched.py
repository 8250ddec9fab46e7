"""A multilayer perceptron whose weights have an axis of tasks: the networks of all tasks are evaluated in one product.

Its weights are a plain dictionary of tensors, ``weight_0``, ``bias_0``, ``weight_1``, ..., so that a gradient step on them, itself
differentiable, gives another such dictionary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.errors import StillhouseError

Weights = dict[str, Tensor]


class PerceptronSize(Config):
    """A multilayer perceptron's hidden layers."""

    hidden: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        default=(40, 40), max_length=8, description="their widths; none: linear"
    )
    activation: Literal["relu", "tanh"] = "relu"


def initial_weights(
    size: PerceptronSize, inputs: int, outputs: int, seed: int, device: str = "cpu"
) -> Weights:
    """Fresh weights with an axis of one task: ``weight_i`` [1, in, out] and ``bias_i`` [1, 1, out], float32.

    Weights are normal with a variance of 1 / in (2 / in before ReLU's kink: He et al. 2015), biases 0.
    """
    random = seeding.torch_generator(seed, "network")
    gain = math.sqrt(2) if size.activation == "relu" else 1.0
    widths = [inputs, *size.hidden, outputs]
    weights: Weights = {}
    for index, (before, after) in enumerate(pairwise(widths)):
        scale = (gain if index < len(size.hidden) else 1.0) / math.sqrt(before)
        weights[f"weight_{index}"] = torch.randn((1, before, after), generator=random) * scale
        weights[f"bias_{index}"] = torch.zeros((1, 1, after))
    return {name: tensor.to(device) for name, tensor in weights.items()}


def predict(size: PerceptronSize, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Outputs [T, N, out] of T networks at inputs [T, N, in].

    Args:
        size: the networks'.
        weights: of T tasks, ``weight_i`` [T, in, out] and ``bias_i`` [T, 1, out].
        inputs: [T, N, in].
    """
    activation = torch.relu if size.activation == "relu" else torch.tanh
    hidden = inputs
    for index in range(len(size.hidden)):
        hidden = activation(torch.baddbmm(weights[f"bias_{index}"], hidden, weights[f"weight_{index}"]))
    last = len(size.hidden)
    return torch.baddbmm(weights[f"bias_{last}"], hidden, weights[f"weight_{last}"])


def for_tasks(weights: Mapping[str, Tensor], tasks: int) -> Weights:
    """The same weights for every one of ``tasks`` tasks, not copied: [1, ...] to [tasks, ...]."""
    return {name: tensor.expand(tasks, *tensor.shape[1:]) for name, tensor in weights.items()}


def take_over(weights: Mapping[str, Tensor], learnt: Mapping[str, Any]) -> None:
    """Copy what was learnt into ``weights``.

    Raises:
        StillhouseError: names or shapes differ.
    """
    given = {name: torch.as_tensor(np.asarray(value)) for name, value in learnt.items()}
    here, there = ({name: list(tensor.shape) for name, tensor in each.items()} for each in (weights, given))
    if here != there:
        raise StillhouseError(
            f"what was learnt is of another network: {there} was given, {here} is needed; take the settings it was meta-trained with"
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(given[name])
