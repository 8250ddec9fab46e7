"""Few-shot regression of sinusoids: batches of tasks to meta-train on, how training goes on, and what is left of the error on tasks never seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stillhouse import seeding
from stillhouse.envs import sinusoid
from stillhouse.envs.sinusoid import SinusoidConfig
from stillhouse.errors import StillhouseError
from stillhouse.networks.batched import PerceptronSize, Weights, for_tasks, predict
from stillhouse.processor import exact_products

QUERIES = 100  # points of a test task at which its error is measured, evenly spaced
_BLOCK = 256  # batches drawn at once
_TASKS_AT_ONCE = 1000
_REPORT_EVERY = 100  # meta-updates

Adapter = Callable[[Callable[[Weights], Tensor], Weights, int], Iterator[Weights]]
"""Losses of the tasks' examples, weights [T, ...] and a number of steps to the weights after 0, 1, ... of them."""


class TaskBatch(NamedTuple):
    """Examples of T tasks, [T, N, 1] each: those to adapt to, and those that judge it."""

    support_inputs: Tensor
    support_targets: Tensor
    query_inputs: Tensor
    query_targets: Tensor


class TaskBatches:
    """Endless batches of training tasks; batch number i is the same whenever it is asked for.

    Args:
        config: the family.
        seed: the stage's.
        tasks: T of each batch.
        support, query: points of each task.
        device: of the tensors.
    """

    def __init__(
        self, config: SinusoidConfig, seed: int, tasks: int, support: int, query: int, device: str = "cpu"
    ) -> None:
        self._config = config
        self._seed = seed
        self._shape = tasks, support, query
        self._device = device
        self._block = -1
        self._inputs = self._targets = torch.empty(0)

    def batch(self, index: int) -> TaskBatch:
        """Batch number ``index``."""
        block, within = divmod(index, _BLOCK)
        if block != self._block:
            self._draw(block)
        support = self._shape[1]
        x, y = self._inputs[within], self._targets[within]
        return TaskBatch(x[:, :support], y[:, :support], x[:, support:], y[:, support:])

    def _draw(self, block: int) -> None:
        # A block at a time, on a stream of its own: one call of NumPy for many updates, and a counter is all there is to save.
        random = seeding.generator(self._seed, "meta-training", block)
        tasks, support, query = self._shape
        drawn = sinusoid.draw(self._config, "training", _BLOCK * tasks, random)
        inputs = sinusoid.draw_inputs(self._config, len(drawn), support + query, random)
        shape = (_BLOCK, tasks, support + query, 1)
        self._inputs, self._targets = (
            torch.from_numpy(array.astype(np.float32)).view(shape).to(self._device)
            for array in (inputs, sinusoid.values(drawn, inputs))
        )
        self._block = block


def meta_training(
    update: Callable[[int], Tensor], done: int, total: int, remedy: str
) -> Iterator[tuple[int, float]]:
    """Make the meta-updates from number ``done`` on; after every hundred, how many there are now and the mean of their losses.

    Args:
        update: makes the one with this number; its loss, a scalar.
        done: how many have been made.
        total: how many there are to be.
        remedy: what to lower where the loss blows up.

    Raises:
        StillhouseError: the loss is no longer finite.
    """
    while done < total:
        stop = min(total, (done // _REPORT_EVERY + 1) * _REPORT_EVERY)
        with exact_products():
            loss = float(torch.stack([update(index) for index in range(done, stop)]).mean())
        if not math.isfinite(loss):
            raise StillhouseError(f"the loss is not finite before meta-update {stop}; lower {remedy}")
        done = stop
        yield done, loss


def decayed(rate: float, decay: Literal["none", "cosine"], index: int, total: int) -> float:
    """The meta-learning rate of meta-update ``index`` of ``total``."""
    return rate * 0.5 * (1 + math.cos(math.pi * (index / total))) if decay == "cosine" else rate


def squared_errors(
    size: PerceptronSize, weights: Mapping[str, Tensor], inputs: Tensor, targets: Tensor
) -> Tensor:
    """Mean squared error of every task, [T], of networks with weights [T, ...] at inputs [T, N, 1]."""
    return (predict(size, weights, inputs) - targets).square().mean((1, 2))


@exact_products()
def adaptation_errors(
    size: PerceptronSize,
    weights: Mapping[str, Tensor],
    adapter: Adapter,
    config: SinusoidConfig,
    tasks: np.ndarray,
    shots: int,
    steps: int,
    seed: int,
) -> np.ndarray:
    """Mean squared errors after 0, 1, ... steps on the same few points of each task, float64 [N, steps + 1].

    The error is taken over the whole interval of inputs, at its ``QUERIES`` even points, not at those of the examples.

    Args:
        size: the network's.
        weights: to start from, [1, ...] each.
        adapter: how to learn a task.
        config: the family.
        tasks: [N, 2].
        shots: points of each task to learn from.
        steps: gradient steps on them.
        seed: of these points.
    """
    device = next(iter(weights.values())).device
    inputs = sinusoid.draw_inputs(config, len(tasks), shots, seeding.generator(seed, "adaptation", shots))
    queries = np.broadcast_to(sinusoid.even_inputs(config, QUERIES), (len(tasks), QUERIES))
    arrays = inputs, sinusoid.values(tasks, inputs), queries, sinusoid.values(tasks, queries)
    found = []
    for start in range(0, len(tasks), _TASKS_AT_ONCE):
        batch = TaskBatch(
            *(
                torch.from_numpy(array[start : start + _TASKS_AT_ONCE].astype(np.float32))
                .unsqueeze(2)
                .to(device)
                for array in arrays
            )
        )

        def losses(weights: Weights, batch: TaskBatch = batch) -> Tensor:
            return squared_errors(size, weights, batch.support_inputs, batch.support_targets)

        errors = []
        for adapted in adapter(losses, for_tasks(weights, len(batch.support_inputs)), steps):
            with torch.no_grad():
                errors.append(squared_errors(size, adapted, batch.query_inputs, batch.query_targets))
        found.append(torch.stack(errors, dim=1).double().cpu().numpy())
    return np.concatenate(found)
