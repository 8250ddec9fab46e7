"""The inner loop: its steps by hand, what the gradient flows through, any module under vmap, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stillhouse.errors import StillhouseError
from stillhouse.meta.inner_loop import adapt, adapt_for_evaluation, predictor
from stillhouse.networks.batched import PerceptronSize, Weights, initial_weights, predict

torch.set_num_threads(1)

X = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
Y = torch.tensor([[2.0, 1.0], [0.5, 4.0]], dtype=torch.float64)


def squared(weights: Weights) -> Tensor:
    """Of y = w x, [T]."""
    return (weights["w"] * X - Y).square().mean(1)


def test_two_steps_by_hand() -> None:
    start = {"w": torch.zeros((2, 1), dtype=torch.float64, requires_grad=True)}
    first, second = adapt(squared, start, 0.1, 2, second_order=True)
    # d/dw mean (w x - y)^2 = 2 mean(x (w x - y)); at 0 it is -2 mean(x y): -(2 + 2), -(1.5 - 4)
    assert torch.allclose(first["w"].flatten(), torch.tensor([0.4, -0.25], dtype=torch.float64))
    # task 0: mean x^2 = 2.5, mean xy = 2: 0.4 - 0.2 (2.5 * 0.4 - 2) = 0.6; task 1: 5, -1.25: -0.25 - 0.2 (-1.25 + 1.25)
    assert torch.allclose(second["w"].flatten(), torch.tensor([0.6, -0.25], dtype=torch.float64))


def test_a_rate_for_each_weight_scales_its_own_step() -> None:
    start = {"w": torch.zeros((2, 1), dtype=torch.float64, requires_grad=True)}
    rates = {"w": torch.tensor([[-0.1]], dtype=torch.float64)}
    (after,) = adapt(squared, start, rates, 1, second_order=True)
    assert torch.allclose(after["w"].flatten(), torch.tensor([-0.4, 0.25], dtype=torch.float64))


@pytest.mark.parametrize("second_order", [True, False])
def test_the_gradient_through_a_step_by_hand(second_order: bool) -> None:
    # w' = w - 0.2 (mean(x^2) w - mean(x y)): dw'/dw = 1 - 0.2 mean(x^2) = (0.5, 0), or 1 to first order
    start = {"w": torch.zeros((2, 1), dtype=torch.float64, requires_grad=True)}
    (after,) = adapt(squared, start, 0.1, 1, second_order=second_order)
    after["w"].sum().backward()
    expected = [0.5, 0.0] if second_order else [1.0, 1.0]
    assert torch.allclose(start["w"].grad.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_evaluation_takes_the_same_steps_and_keeps_no_graph() -> None:
    start = {"w": torch.zeros((2, 1), dtype=torch.float64, requires_grad=True)}
    reference = list(adapt(squared, start, 0.1, 3, second_order=True))
    path = list(adapt_for_evaluation(squared, start, 0.1, 3))
    assert len(path) == 4 and torch.equal(path[0]["w"], start["w"])
    for mine, theirs in zip(path[1:], reference, strict=True):
        assert torch.equal(mine["w"], theirs["w"]) and not mine["w"].requires_grad


def test_tasks_do_not_touch_each_other() -> None:
    start = {"w": torch.ones((2, 1), dtype=torch.float64, requires_grad=True)}
    together = list(adapt(squared, start, 0.1, 2, second_order=False))[-1]["w"]
    for task in range(2):

        def alone(weights: Weights, task: int = task) -> Tensor:
            return (weights["w"] * X[[task]] - Y[[task]]).square().mean(1)

        one = {"w": torch.ones((1, 1), dtype=torch.float64, requires_grad=True)}
        assert torch.equal(list(adapt(alone, one, 0.1, 2, second_order=False))[-1]["w"][0], together[task])


def test_any_module_can_be_adapted_and_equals_the_perceptron_of_products() -> None:
    size = PerceptronSize(hidden=(5, 4), activation="tanh")
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    ours = {name: tensor.repeat(6, 1, 1) for name, tensor in initial_weights(size, 3, 2, 0).items()}
    ours = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in ours.items()}
    theirs = {}
    for index in range(3):
        theirs[f"{2 * index}.weight"] = ours[f"weight_{index}"].transpose(1, 2)
        theirs[f"{2 * index}.bias"] = ours[f"bias_{index}"].squeeze(1)
    inputs = torch.randn(6, 7, 3)
    outputs = predictor(module)
    assert torch.allclose(outputs(theirs, inputs), predict(size, ours, inputs), atol=1e-6)

    def losses(predicted: Callable[[Weights], Tensor]) -> Callable[[Weights], Tensor]:
        return lambda weights: predicted(weights).square().mean((1, 2))

    stepped = []
    for weights, predicted in (
        (ours, lambda weights: predict(size, weights, inputs)),
        (theirs, lambda weights: outputs(weights, inputs)),
    ):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
        after = list(adapt(losses(predicted), leaves, 0.1, 2, second_order=True))[-1]
        stepped.append(predicted(after).detach())
    assert torch.allclose(*stepped, atol=1e-6)


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "losses",
    [
        lambda weights: (weights["w"].detach() * X - Y).square().mean(1),
        lambda weights: torch.from_numpy(weights["w"].detach().numpy()).mean(1),
        lambda weights: (weights["w"] * X).argmax(1).double(),
        lambda weights: (weights["w"] > 0).double().mean(1),
    ],
)
def test_a_step_that_cannot_be_differentiated_is_refused(losses: Callable[[Weights], Tensor]) -> None:
    start = {"w": torch.zeros((2, 1), dtype=torch.float64, requires_grad=True)}
    with pytest.raises(StillhouseError, match="inner step 1: the loss cannot be differentiated") as error:
        list(adapt(losses, start, 0.1, 1, second_order=True))
    assert "\n" not in str(error.value)


def test_weights_that_the_loss_does_not_use_are_named() -> None:
    start = {name: torch.zeros((2, 1), dtype=torch.float64, requires_grad=True) for name in ("w", "idle")}
    with pytest.raises(StillhouseError, match="does not depend, differentiably, on idle"):
        list(adapt(squared, start, 0.1, 1, second_order=True))


def test_one_loss_for_all_tasks_is_refused() -> None:
    start = {"w": torch.zeros((2, 1), dtype=torch.float64, requires_grad=True)}
    with pytest.raises(StillhouseError, match=r"shape \[\]; give one number for each task"):
        list(adapt(lambda weights: squared(weights).mean(), start, 0.1, 1, second_order=True))
