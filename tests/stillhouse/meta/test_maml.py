"""MAML: its gradient by hand, by finite differences, by torch.func and task by task; the wrong forms; resume; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from stillhouse.checkpoint import load_state, save_state
from stillhouse.config import parse
from stillhouse.envs.sinusoid import SinusoidConfig, split_of
from stillhouse.errors import StillhouseError
from stillhouse.meta.few_shot import TaskBatch, TaskBatches
from stillhouse.meta.maml import MAML, MAMLConfig, meta_losses
from stillhouse.networks.batched import PerceptronSize, Weights, initial_weights

torch.set_num_threads(1)

SIZE = PerceptronSize(hidden=(6, 5), activation="tanh")
SMALL: dict[str, Any] = {"meta_updates": 230, "meta_batch": 4, "network": PerceptronSize(hidden=(8,))}


def a_batch(tasks: int = 3, points: int = 4) -> TaskBatch:
    random = torch.Generator().manual_seed(5)
    return TaskBatch(
        *(torch.randn((tasks, points, 1), generator=random, dtype=torch.float64) for _ in range(4))
    )


def doubles(size: PerceptronSize = SIZE) -> Weights:
    return {name: tensor.double().requires_grad_() for name, tensor in initial_weights(size, 1, 1, 3).items()}


def gradient_of(weights: Weights, **settings: Any) -> Tensor:
    """Flat."""
    loss = meta_losses(SIZE, weights, a_batch(), 0.3, 2, **settings).mean()
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(weights.values()))])


# --- the gradient ---------------------------------------------------------------------------------------------


def test_the_meta_gradient_of_linear_regression_by_hand() -> None:
    # y = w x + b of one task, with the bias's part of the support loss kept out by inputs and targets of mean 0. Support x = -1, 1, y = -2, 2:
    # L = (w - 2)^2 + b^2; w' = w - 2 alpha (w - 2), b' = b - 2 alpha b. Query x = 3, y = 3: L' = (3 w' + b' - 3)^2.
    column = torch.tensor([[[-1.0], [1.0]]], dtype=torch.float64)
    batch = TaskBatch(
        column, 2 * column, torch.full((1, 1, 1), 3.0).double(), torch.full((1, 1, 1), 3.0).double()
    )
    weights = {
        "weight_0": torch.full((1, 1, 1), 0.5, dtype=torch.float64, requires_grad=True),
        "bias_0": torch.full((1, 1, 1), 0.1, dtype=torch.float64, requires_grad=True),
    }
    alpha = 0.1
    w, b = 0.5 - 2 * alpha * (0.5 - 2), 0.1 - 2 * alpha * 0.1
    error = 3 * w + b - 3
    linear = PerceptronSize(hidden=())
    for second_order, factor in ((True, 1 - 2 * alpha), (False, 1.0)):
        loss = meta_losses(linear, weights, batch, alpha, 1, second_order).sum()
        assert np.isclose(float(loss.detach()), error**2)
        by_weight, by_bias = torch.autograd.grad(loss, list(weights.values()))
        assert np.isclose(float(by_weight), 2 * error * 3 * factor)
        assert np.isclose(float(by_bias), 2 * error * factor)


@pytest.mark.parametrize("every_step", [False, True])
def test_the_meta_gradient_is_that_of_finite_differences(every_step: bool) -> None:
    weights = doubles()
    ours = gradient_of(weights, every_step=every_step)
    flat = nn.utils.parameters_to_vector(weights.values()).detach()

    def at(vector: Tensor) -> float:
        parts = vector.split([tensor.numel() for tensor in weights.values()])
        moved = {
            name: part.view_as(tensor).requires_grad_()
            for part, (name, tensor) in zip(parts, weights.items(), strict=True)
        }
        return float(meta_losses(SIZE, moved, a_batch(), 0.3, 2, every_step=every_step).mean().detach())

    width = 1e-5
    steps = width * torch.eye(len(flat), dtype=torch.float64)
    numeric = torch.tensor([(at(flat + step) - at(flat - step)) / (2 * width) for step in steps])
    assert float((numeric - ours).norm() / ours.norm()) < 1e-6


def test_first_order_is_the_gradient_where_the_inner_steps_end_and_not_the_second_order_one() -> None:
    weights = doubles()
    first, second = gradient_of(weights, second_order=False), gradient_of(weights)
    assert float((first - second).norm() / second.norm()) > 0.05
    batch = a_batch()
    expected = torch.zeros_like(first)
    for task in range(3):
        one = TaskBatch(*(each[[task]] for each in batch))
        current = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
        for _ in range(2):
            support = meta_losses_at(current, one.support_inputs, one.support_targets)
            found = torch.autograd.grad(support, list(current.values()))
            current = {
                name: (tensor - 0.3 * each).detach().requires_grad_()
                for (name, tensor), each in zip(current.items(), found, strict=True)
            }
        query = meta_losses_at(current, one.query_inputs, one.query_targets)
        expected += (
            torch.cat([each.flatten() for each in torch.autograd.grad(query, list(current.values()))]) / 3
        )
    assert torch.allclose(first, expected, rtol=1e-12)


def meta_losses_at(weights: Weights, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of one task, written out anew."""
    hidden = inputs[0]
    for index in range(3):
        hidden = hidden @ weights[f"weight_{index}"][0] + weights[f"bias_{index}"][0]
        hidden = torch.tanh(hidden) if index < 2 else hidden
    return (hidden - targets[0]).square().mean()


def test_all_tasks_at_once_are_a_loop_over_tasks_and_what_torch_func_finds() -> None:
    weights, batch = doubles(), a_batch()
    together = meta_losses(SIZE, weights, batch, 0.3, 2)
    loop = [
        meta_losses(SIZE, weights, TaskBatch(*(each[[task]] for each in batch)), 0.3, 2)[0]
        for task in range(3)
    ]
    assert torch.allclose(together, torch.stack(loop), rtol=1e-12)
    ours = torch.autograd.grad(together.mean(), list(weights.values()))
    theirs = torch.autograd.grad(torch.stack(loop).mean(), list(weights.values()))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-14)

    def one(weights: Weights, *task: Tensor) -> Tensor:
        support_inputs, support_targets, query_inputs, query_targets = (each.unsqueeze(0) for each in task)
        for _ in range(2):
            found = grad(meta_losses_at)(weights, support_inputs, support_targets)
            weights = {name: tensor - 0.3 * found[name] for name, tensor in weights.items()}
        return meta_losses_at(weights, query_inputs, query_targets)

    by_func = grad(lambda weights: vmap(one, (None, 0, 0, 0, 0))(weights, *batch).mean())(
        {name: tensor.detach() for name, tensor in weights.items()}
    )
    for mine, name in zip(ours, weights, strict=True):
        assert torch.allclose(mine, by_func[name], rtol=1e-10, atol=1e-14)


def test_weights_copied_into_a_fresh_network_give_the_initialisation_no_gradient_but_ours_do() -> None:
    # The form that is often copied: a step on a deep copy, its result loaded into another network, backward there.
    weights, batch = doubles(), a_batch(tasks=1)
    found = torch.autograd.grad(
        meta_losses_at(weights, batch.support_inputs, batch.support_targets), list(weights.values())
    )
    fresh = doubles()
    for (name, tensor), each in zip(weights.items(), found, strict=True):
        fresh[name].data.copy_(tensor - 0.3 * each)
    meta_losses_at(fresh, batch.query_inputs, batch.query_targets).backward()
    assert all(tensor.grad is None for tensor in weights.values())
    assert all(tensor.grad is not None for tensor in fresh.values())
    meta_losses(SIZE, weights, batch, 0.3, 1).mean().backward()
    assert all(float(tensor.grad.abs().sum()) > 0 for tensor in weights.values())


# --- training -------------------------------------------------------------------------------------------------


def trained(config: MAMLConfig, seed: int = 0) -> MAML:
    learner = MAML(config, seed)
    for _ in learner.train():
        pass
    return learner


def test_batches_are_of_training_tasks_and_can_be_asked_for_in_any_order() -> None:
    family = SinusoidConfig()
    batches = TaskBatches(family, 7, tasks=3, support=2, query=4)
    first = batches.batch(2)
    batches.batch(700)
    assert all(torch.equal(a, b) for a, b in zip(first, batches.batch(2), strict=True))
    assert first.support_inputs.shape == (3, 2, 1) and first.query_targets.shape == (3, 4, 1)
    other = TaskBatches(family, 8, tasks=3, support=2, query=4).batch(2)
    assert not torch.equal(first.support_inputs, other.support_inputs)
    # From many points of one task its amplitude and phase can be told: y = p sin x - q cos x.
    many = TaskBatches(family, 7, tasks=40, support=50, query=1).batch(0)
    for x, y in zip(many.support_inputs.double(), many.support_targets.double(), strict=True):
        (p, q), *_ = np.linalg.lstsq(np.column_stack([np.sin(x), -np.cos(x)]), y[:, 0].numpy(), rcond=None)
        assert split_of(family, np.array([[np.hypot(p, q), np.arctan2(q, p)]]))[0] == 0


def test_meta_training_helps_and_an_adapted_network_beats_one_from_fresh_weights() -> None:
    config = MAMLConfig(
        meta_updates=600,
        meta_batch=10,
        meta_rate=5e-3,
        inner_rate=5e-3,
        network=PerceptronSize(hidden=(20, 20)),
    )
    learner = trained(config)
    found = learner.evaluate(100, 3, seed=0)
    assert found.steps == [0, 1, 2, 3] and found.values.shape == (100, 4)
    means, untrained = found.values.mean(0), found.baselines["untrained"].mean(0)
    assert means[1] < means[0] and means[1] < 0.75 * untrained[1]


@pytest.mark.parametrize("settings", [{}, {"first_order": True}, {"every_step": True, "inner_steps": 2}])
def test_an_interrupted_run_ends_in_the_same_bytes(settings: dict[str, Any], tmp_path: Path) -> None:
    config = MAMLConfig(**SMALL, **settings, meta_rate_decay="cosine")
    whole = trained(config)
    broken = MAML(config, 0)
    next(broken.train())
    save_state(tmp_path / "state", broken.get_state())
    resumed = MAML(config, 0)
    resumed.set_state(load_state(tmp_path / "state"))
    reports = list(resumed.train())
    assert [report.done for report in reports] == [200, 230] and reports[0].total == 230
    for name, tensor in whole.learnt().items():
        assert torch.equal(tensor, resumed.learnt()[name])
    again = trained(config, seed=1)
    assert not torch.equal(whole.learnt()["weight_0"], again.learnt()["weight_0"])


def test_evaluation_leaves_the_learner_as_it_was_and_depends_on_its_seed() -> None:
    learner = MAML(MAMLConfig(**SMALL), 0)
    before = learner.learnt()
    first, again, other = (learner.evaluate(20, 2, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.values, again.values) and not np.array_equal(first.values, other.values)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.learnt().items())
    assert (learner.evaluate(20, 2, 1, shots=5).values != first.values).any()
    # Without a step there is nothing yet to depend on the points.
    assert np.array_equal(learner.evaluate(20, 2, 1, shots=5).values[:, 0], first.values[:, 0])


def test_what_was_learnt_is_taken_over_and_of_another_network_refused() -> None:
    source, target = trained(MAMLConfig(**SMALL)), MAML(MAMLConfig(**SMALL), 9)
    target.load({name: tensor.numpy() for name, tensor in source.learnt().items()})
    assert np.array_equal(target.evaluate(10, 2, 0).values, source.evaluate(10, 2, 0).values)
    with pytest.raises(StillhouseError, match="of another network") as error:
        MAML(MAMLConfig(), 0).load(source.learnt())
    assert "\n" not in str(error.value)


def test_a_loss_that_is_no_number_stops_the_training() -> None:
    with pytest.raises(StillhouseError, match="not finite before meta-update 100; lower inner_rate"):
        trained(MAMLConfig(**{**SMALL, "inner_rate": 10.0, "inner_steps": 30, "first_order": True}))


def test_too_few_test_tasks_are_refused() -> None:
    learner = MAML(MAMLConfig(family=SinusoidConfig(test_tasks=5), **SMALL), 0)
    with pytest.raises(StillhouseError, match="6 test tasks were asked for"):
        learner.evaluate(6, 1, 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"inner_rate": 0}, "inner_rate: Input should be greater than 0"),
        ({"inner_rate": 11}, "inner_rate: Input should be less than or equal to 10"),
        ({"inner_steps": 0}, "inner_steps: Input should be greater than or equal to 1"),
        ({"inner_steps": 101}, "inner_steps"),
        ({"meta_batch": 0}, "meta_batch"),
        ({"shots": 0}, "shots"),
        ({"network": {"hidden": [0]}}, "hidden"),
        ({"inner_optimiser": "adam"}, "unknown parameter"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(StillhouseError, match=words) as error:
        parse(MAMLConfig, settings, "meta_train.maml")
    assert "\n" not in str(error.value)


def test_the_callers_precision_of_products_changes_nothing_and_is_left_as_it_was() -> None:
    config = MAMLConfig(**{**SMALL, "meta_updates": 20})
    expected = trained(config).learnt()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = trained(config).learnt()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())


def test_training_may_begin_with_a_single_step() -> None:
    settings = {**SMALL, "meta_updates": 200}
    staged, single = (
        MAML(MAMLConfig(**settings, **more), 0)
        for more in ({"inner_steps": 3, "one_step_share": 0.5}, {"inner_steps": 1})
    )
    runs = staged.train(), single.train()
    assert next(runs[0]).metrics == next(runs[1]).metrics
    assert next(runs[0]).metrics != next(runs[1]).metrics
