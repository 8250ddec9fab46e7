"""Problems for a learned optimiser: families of functions to minimise, many at once.

* ``quadratic``: ``f(theta) = ||W theta - y||^2`` with W [n, n] and y [n] standard normal, from ``theta`` near 0 (Andrychowicz et al. 2016,
  https://arxiv.org/abs/1606.04474, section 3.1).
* ``spirals``: the cross-entropy of a network 2-h-2 with sigmoids on two spirals, a minibatch of fresh points at every step. It stands in the place of the
  paper's network on MNIST: stochastic, not convex, with weights of several kinds. A problem has a rotation, a length and a first network of its
  own.

A problem is a number: problem i of a split is drawn from stream (split, i) of one seed. The tests prove that no problem is in two splits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.errors import StillhouseError

Split = Literal["training", "tuning", "test"]

_NOISE = 0.05  # standard deviation of the spirals' points, whose radius is at most 1
_START = 0.01  # standard deviation of a quadratic's first theta, as in the authors' code


class OptimiseeConfig(Config):
    """Which problems."""

    kind: Literal["quadratic", "spirals"] = "quadratic"
    dimensions: int = Field(default=10, ge=1, le=1000, description="n of a quadratic")
    hidden: int = Field(default=20, ge=1, le=1000, description="width of the spirals' network")
    minibatch: int = Field(default=128, ge=2, le=4096, description="points of a step on spirals")
    test_tasks: int = Field(default=1000, ge=1, le=10**6, description="how many problems are for tests")

    @property
    def size(self) -> int:
        """Numbers in one theta."""
        return self.dimensions if self.kind == "quadratic" else 5 * self.hidden + 2


@dataclass(frozen=True)
class Problems:
    """M problems.

    Attributes:
        start: where to begin, [M, n].
        losses: theta [M, n] and the step's number to every problem's loss, [M].
    """

    start: Tensor
    losses: Callable[[Tensor, int], Tensor]


def problems(
    config: OptimiseeConfig, split: Split, numbers: np.ndarray, steps: int, device: str = "cpu"
) -> Problems:
    """The problems of these numbers [M], with minibatches for so many steps and the one after."""
    random = [seeding.generator(0, "optimisees", config.kind, split, int(number)) for number in numbers]
    if config.kind == "quadratic":
        return _quadratics(config, random, device)
    return _spirals(config, random, steps + 1, device)


def held_out(config: OptimiseeConfig, count: int, seed: int) -> np.ndarray:
    """Numbers of different problems of the test split, drawn by ``seed``, int64 [count].

    Raises:
        StillhouseError: the split has fewer.
    """
    if not 1 <= count <= config.test_tasks:
        raise StillhouseError(
            f"{count} test tasks were asked for, but 1 to {config.test_tasks} are there; ask for fewer or raise test_tasks"
        )
    return seeding.generator(seed, "optimisees", "test").permutation(config.test_tasks)[:count]


def _quadratics(config: OptimiseeConfig, random: list[np.random.Generator], device: str) -> Problems:
    size = config.dimensions
    drawn = np.stack([each.standard_normal((size + 2, size)) for each in random]).astype(np.float32)
    numbers = torch.from_numpy(drawn).to(device)
    matrices, targets = numbers[:, :size].contiguous(), numbers[:, size].unsqueeze(2)

    def losses(theta: Tensor, step: int) -> Tensor:
        return torch.baddbmm(targets, matrices, theta.unsqueeze(2), beta=-1).square().sum((1, 2))

    return Problems(_START * numbers[:, size + 1], losses)


def _spirals(config: OptimiseeConfig, random: list[np.random.Generator], steps: int, device: str) -> Problems:
    count, hidden, half = len(random), config.hidden, config.minibatch // 2
    points = np.empty((count, steps, 2 * half, 2), np.float32)
    starts = np.zeros((count, config.size), np.float32)
    for index, each in enumerate(random):
        rotation, turns = each.uniform(0, 2 * math.pi), each.uniform(0.5, 1.0)
        starts[index, : 2 * hidden] = each.standard_normal(2 * hidden) / math.sqrt(2)
        starts[index, 3 * hidden : 5 * hidden] = each.standard_normal(2 * hidden) / math.sqrt(hidden)
        # Step after step, so that a longer run begins as a shorter one does.
        drawn = [(each.random(2 * half), each.standard_normal((2 * half, 2))) for _ in range(steps)]
        radius = np.sqrt(np.stack([one for one, _ in drawn]))
        angle = rotation + 2 * math.pi * turns * radius
        angle[:, half:] += math.pi  # the second spiral
        points[index] = radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        points[index] += _NOISE * np.stack([noise for _, noise in drawn])
    inputs = torch.from_numpy(points).transpose(0, 1).contiguous().to(device)  # [steps, M, minibatch, 2]
    sign = torch.ones(2 * half, device=device)
    sign[:half] = -1

    def losses(theta: Tensor, step: int) -> Tensor:
        first = theta[:, : 2 * hidden].view(count, 2, hidden)
        bias = theta[:, 2 * hidden : 3 * hidden].unsqueeze(1)
        second = theta[:, 3 * hidden : 5 * hidden].view(count, hidden, 2)
        features = torch.sigmoid(torch.baddbmm(bias, inputs[step], first))
        logits = torch.baddbmm(theta[:, 5 * hidden :].unsqueeze(1), features, second)
        # Of two classes: -log softmax of the right one is softplus of how far the wrong one is ahead.
        return torch.nn.functional.softplus(sign * (logits[..., 0] - logits[..., 1])).mean(1)

    return Problems(torch.from_numpy(starts).to(device), losses)
