"""The inner loop of gradient-based meta-learning: gradient steps on all tasks at once, through which one can differentiate.

    theta_i <- theta_i - rate * grad L_i(theta_i)                              for every task i of a batch

Weights have an axis of tasks in front, and a loss gives a number for each task. Task i's loss depends on task i's weights alone, so the
gradient of the sum of the losses is every task's own gradient, and one backward pass serves all tasks. That is what
``torch.func.vmap(torch.func.grad(loss))`` computes too, without its cost for every operation; ``benchmarks/meta_sinusoid.py`` measures both.
The meta-gradient goes through the update because the new weights are computed from the old ones. Weights that are copied into a fresh network
(``load_state_dict``, ``.data``) break that chain: the initialisation then gets no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from stillhouse.errors import StillhouseError
from stillhouse.networks.batched import Weights

TaskLosses = Callable[[Weights], Tensor]
"""Weights [T, ...] to the loss of every task, [T]."""


def adapt(
    losses: TaskLosses,
    weights: Mapping[str, Tensor],
    rates: float | Mapping[str, Tensor],
    steps: int,
    second_order: bool,
) -> Iterator[Weights]:
    """Take gradient steps on every task; yield the weights after each.

    Args:
        losses: of the tasks' training examples.
        weights: before the first step, by name, [T, ...] each.
        rates: one for all, or a tensor for each of ``weights``, which broadcasts to it (Meta-SGD's).
        steps: how many.
        second_order: keep the graph of the gradients, so that a derivative of what is yielded is the exact one. Otherwise gradients count as
            constants (first-order MAML); what is yielded still depends on ``weights``.

    Raises:
        StillhouseError: the step cannot be taken, because the losses do not depend, differentiably, on each of the weights.
    """
    current = dict(weights)
    for step in range(steps):
        gradients = _gradients(losses, current, second_order, step)
        if isinstance(rates, Mapping):
            current = {
                name: torch.addcmul(current[name], rates[name], gradient, value=-1)
                for name, gradient in gradients.items()
            }
        else:
            current = {
                name: torch.add(current[name], gradient, alpha=-rates) for name, gradient in gradients.items()
            }
        yield current


def _gradients(losses: TaskLosses, weights: Weights, second_order: bool, step: int) -> Weights:
    values = losses(weights)
    if not values.requires_grad:
        raise StillhouseError(
            f"inner step {step + 1}: the loss cannot be differentiated with respect to the weights (a detached tensor, no_grad, argmax, rounding "
            "or NumPy on the way, or weights without requires_grad); a gradient step needs a loss that is computed from them by differentiable "
            "operations"
        )
    if values.dim() != 1:
        raise StillhouseError(
            f"inner step {step + 1}: the losses have the shape {list(values.shape)}; give one number for each task, [T]"
        )
    found = torch.autograd.grad(
        values.sum(), list(weights.values()), create_graph=second_order, allow_unused=True
    )
    unused = [name for name, gradient in zip(weights, found, strict=True) if gradient is None]
    if unused:
        raise StillhouseError(
            f"inner step {step + 1}: the loss does not depend, differentiably, on {', '.join(unused)}; leave these out of the weights that are "
            "adapted, or use them in the loss"
        )
    return dict(zip(weights, found, strict=True))


def adapt_for_evaluation(
    losses: TaskLosses, weights: Mapping[str, Tensor], rates: float | Mapping[str, Tensor], steps: int
) -> Iterator[Weights]:
    """The weights after 0, 1, ..., ``steps`` steps, as :func:`adapt` has them, without any graph between them."""
    current = {name: tensor.detach() for name, tensor in weights.items()}
    yield current
    for _ in range(steps):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in current.items()}
        (following,) = adapt(losses, leaves, rates, 1, second_order=False)
        current = {name: tensor.detach() for name, tensor in following.items()}
        yield current


def predictor(module: nn.Module) -> Callable[[Weights, Tensor], Tensor]:
    """Any network's outputs with weights of each task's own: ``predict(weights, inputs)``, weights [T, ...], inputs [T, N, ...].

    By ``torch.func.functional_call`` under ``vmap``; :mod:`stillhouse.networks.batched` is faster for a perceptron.
    """

    def one(weights: Weights, inputs: Tensor) -> Tensor:
        outputs: Tensor = functional_call(module, weights, (inputs,))
        return outputs

    together: Callable[[Weights, Tensor], Tensor] = vmap(one)
    return together
