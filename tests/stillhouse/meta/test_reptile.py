"""Reptile: its formula by hand, serial and batched, its inner Adam against torch's; resume; refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.checkpoint import load_state, save_state
from stillhouse.config import parse
from stillhouse.envs.sinusoid import SinusoidConfig
from stillhouse.errors import StillhouseError
from stillhouse.meta.few_shot import TaskBatches, squared_errors
from stillhouse.meta.reptile import Reptile, ReptileConfig, inner_path
from stillhouse.networks.batched import PerceptronSize, Weights

torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "meta_updates": 130,
    "points": 6,
    "minibatch": 3,
    "inner_steps": 4,
    "network": PerceptronSize(hidden=(8,), activation="tanh"),
}


def trained(config: ReptileConfig, seed: int = 0) -> Reptile:
    learner = Reptile(config, seed)
    for _ in learner.train():
        pass
    return learner


def test_the_inner_path_of_gradient_descent_by_hand() -> None:
    # Step 0 halves the distance to 1, step 1 that to 3: f = (w - c)^2 at a rate of 1/4.
    def losses(weights: Weights, step: int) -> Tensor:
        return (weights["w"] - (1.0, 3.0)[step]).square().sum(1)

    path = inner_path(losses, {"w": torch.tensor([[0.0], [4.0]])}, "sgd", 0.25, 2)
    found = torch.stack([each["w"].flatten() for each in path])
    assert torch.allclose(found, torch.tensor([[0.0, 4.0], [0.5, 2.5], [1.75, 2.75]]))


def test_the_inner_adam_is_torchs_without_momentum() -> None:
    target = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))

    def losses(weights: Weights, step: int) -> Tensor:
        return ((weights["w"] - target) * (step + 1)).pow(4).sum(1)

    *_, ours = inner_path(losses, {"w": torch.zeros(3, 5)}, "adam", 0.05, 4)
    weight = torch.zeros(3, 5, requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=0.05, betas=(0.0, 0.999))
    for step in range(4):
        optimiser.zero_grad()
        losses({"w": weight}, step).sum().backward()
        optimiser.step()
    assert torch.allclose(ours["w"], weight.detach(), atol=1e-6)


def test_a_tasks_long_gradients_are_cut_and_short_ones_are_not() -> None:
    # Gradients over both weights: (3, 4), of length 5, is cut to 2; (0.3, 0.4) and 0 stay.
    slopes = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])

    def losses(weights: Weights, step: int) -> Tensor:
        return weights["a"][:, 0] * slopes[:, 0] + weights["b"] * slopes[:, 1]

    start = {"a": torch.zeros(3, 1), "b": torch.zeros(3)}
    for rate, expected in (
        (1.0, [[1.2, 1.6], [0.3, 0.4], [0.0, 0.0]]),
        (0.5, [[0.6, 0.8], [0.15, 0.2], [0.0, 0.0]]),
    ):
        *_, found = inner_path(losses, start, "sgd", rate, 1, 2.0)
        assert torch.allclose(-torch.stack([found["a"][:, 0], found["b"]], 1), torch.tensor(expected))
    *_, unclipped = inner_path(losses, start, "sgd", 1.0, 1)
    assert torch.equal(unclipped["b"], -slopes[:, 1])


def test_clipping_keeps_a_rate_from_diverging() -> None:
    settings: dict[str, Any] = {**SMALL, "network": PerceptronSize(hidden=(8, 8)), "inner_rate": 0.3}
    with pytest.raises(StillhouseError, match="not finite"):
        trained(ReptileConfig(**settings))
    learner = Reptile(ReptileConfig(**settings, max_gradient_norm=1.0), 0)
    assert all(report.metrics["loss/inner"] < 100 for report in learner.train())


@pytest.mark.parametrize("tasks", [1, 3])
def test_an_outer_step_is_the_formula(tasks: int) -> None:
    config = ReptileConfig(**{**SMALL, "meta_updates": 1}, meta_batch=tasks, outer_rate=0.3)
    learner = Reptile(config, 4)
    before = learner.learnt()
    batch = TaskBatches(config.family, 4, tasks, config.points, 0).batch(0)
    ends: list[Weights] = []
    for task in range(tasks):
        weights = {name: tensor.clone().requires_grad_() for name, tensor in before.items()}
        for step in range(4):
            part = slice(0, 3) if step % 2 == 0 else slice(3, 6)
            loss = squared_errors(
                config.network,
                weights,
                batch.support_inputs[[task], part],
                batch.support_targets[[task], part],
            ).sum()
            gradients = torch.autograd.grad(loss, list(weights.values()))
            weights = {
                name: (tensor - 0.02 * gradient).detach().requires_grad_()
                for (name, tensor), gradient in zip(weights.items(), gradients, strict=True)
            }
        ends.append(weights)
    list(learner.train())
    for name, start in before.items():
        mean = torch.stack([each[name].detach() for each in ends]).mean(0)
        assert torch.allclose(learner.learnt()[name], start + 0.3 * (mean - start), atol=1e-6)
        assert not torch.equal(learner.learnt()[name], start)


def test_epsilon_falls_linearly_or_stays() -> None:
    falling, constant = (
        Reptile(ReptileConfig(**{**SMALL, "meta_updates": 4}, outer_rate=0.2, outer_rate_decay=decay), 0)
        for decay in ("linear", "none")
    )
    assert np.allclose([falling.outer_rate(index) for index in range(4)], [0.2, 0.15, 0.1, 0.05])
    assert [constant.outer_rate(index) for index in range(4)] == [0.2] * 4
    (report,) = falling.train()
    assert np.isclose(report.metrics["rate/outer"], 0.05)


@pytest.mark.parametrize("settings", [{}, {"inner_optimiser": "adam", "meta_batch": 3}])
def test_an_interrupted_run_ends_in_the_same_bytes(settings: dict[str, Any], tmp_path: Path) -> None:
    config = ReptileConfig(**SMALL, **settings)
    whole = trained(config)
    broken = Reptile(config, 0)
    next(broken.train())
    save_state(tmp_path / "state", broken.get_state())
    resumed = Reptile(config, 0)
    resumed.set_state(load_state(tmp_path / "state"))
    assert [report.done for report in resumed.train()] == [130]
    for name, tensor in whole.learnt().items():
        assert torch.equal(tensor, resumed.learnt()[name])
    assert not torch.equal(trained(config, 1).learnt()["weight_0"], whole.learnt()["weight_0"])


def test_it_adapts_better_than_fresh_weights() -> None:
    config = ReptileConfig(
        meta_updates=500,
        meta_batch=10,
        outer_rate=1.0,
        family=SinusoidConfig(),
        network=PerceptronSize(hidden=(20, 20), activation="tanh"),
    )
    found = trained(config).evaluate(100, 16, seed=0)
    assert found.values.shape == (100, 17) and found.steps[-1] == 16
    means, untrained = found.values.mean(0), found.baselines["untrained"].mean(0)
    assert means[-1] < 0.8 * means[0] and means[-1] < 0.8 * untrained[-1]


def test_the_defaults_are_the_demonstrations() -> None:
    config = ReptileConfig()
    assert config.family.largest_phase == 2 * math.pi and config.network.hidden == (64, 64)
    assert (config.points, config.minibatch, config.inner_steps, config.inner_rate) == (50, 10, 5, 0.02)
    assert (config.meta_updates, config.meta_batch, config.outer_rate) == (30_000, 1, 0.1)


def test_a_loss_that_is_no_number_stops_the_training() -> None:
    with pytest.raises(
        StillhouseError,
        match="not finite before meta-update 100; lower inner_rate .10., or clip with max_gradient_norm",
    ):
        trained(ReptileConfig(**{**SMALL, "network": PerceptronSize(hidden=(8, 8))}, inner_rate=10.0))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"points": 7}, "points 7 are no whole number of minibatches of 10"),
        ({"inner_steps": 0}, "inner_steps"),
        ({"inner_rate": 0}, "inner_rate"),
        ({"outer_rate": 1.5}, "outer_rate"),
        ({"inner_optimiser": "lion"}, "inner_optimiser"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(StillhouseError, match=words) as error:
        parse(ReptileConfig, settings, "meta_train.reptile")
    assert "\n" not in str(error.value)
