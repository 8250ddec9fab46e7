"""Meta-SGD: the gradient of the rates by hand and by finite differences; that it learns them; resume; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.checkpoint import load_state, save_state
from stillhouse.config import parse
from stillhouse.errors import StillhouseError
from stillhouse.meta.few_shot import TaskBatch
from stillhouse.meta.learned_update import MetaSGD, MetaSGDConfig
from stillhouse.meta.maml import meta_losses
from stillhouse.networks.batched import PerceptronSize, initial_weights

torch.set_num_threads(1)

SMALL: dict[str, Any] = {"meta_updates": 130, "network": PerceptronSize(hidden=(8,)), "largest_rate": 0.01}


def trained(config: MetaSGDConfig, seed: int = 0) -> MetaSGD:
    learner = MetaSGD(config, seed)
    for _ in learner.train():
        pass
    return learner


def test_the_gradient_of_the_rates_by_hand() -> None:
    # y = w x at support x = -1, 1 with y = 2 x: w' = w - a 2 (w - 2). Query x = 3, y = 3: L = (3 w' - 3)^2, dL/da = 2 (3 w' - 3) 3 (-2 (w - 2)).
    column = torch.tensor([[[-1.0], [1.0]]])
    batch = TaskBatch(column, 2 * column, torch.full((1, 1, 1), 3.0), torch.full((1, 1, 1), 3.0))
    weights = {
        "weight_0": torch.full((1, 1, 1), 0.5, requires_grad=True),
        "bias_0": torch.zeros((1, 1, 1), requires_grad=True),
    }
    rates = {
        "weight_0": torch.full((1, 1, 1), 0.1, requires_grad=True),
        "bias_0": torch.zeros((1, 1, 1), requires_grad=True),
    }
    meta_losses(PerceptronSize(hidden=()), weights, batch, rates, 1).sum().backward()
    adapted = 0.5 - 0.1 * 2 * (0.5 - 2)
    assert np.isclose(float(rates["weight_0"].grad), 2 * (3 * adapted - 3) * 3 * -2 * (0.5 - 2))
    assert np.isclose(float(weights["weight_0"].grad), 2 * (3 * adapted - 3) * 3 * (1 - 0.2))


def test_the_gradient_of_the_rates_is_that_of_finite_differences() -> None:
    size = PerceptronSize(hidden=(4, 3), activation="tanh")
    random = torch.Generator().manual_seed(2)
    batch = TaskBatch(*(torch.randn((3, 5, 1), generator=random).double() for _ in range(4)))
    weights = {name: each.double().requires_grad_() for name, each in initial_weights(size, 1, 1, 0).items()}
    rates = {
        name: (0.3 * torch.randn(each.shape, generator=random).double()).requires_grad_()
        for name, each in weights.items()
    }
    ours = torch.autograd.grad(meta_losses(size, weights, batch, rates, 2).mean(), rates["weight_1"])[0]
    for entry in ((0, 0, 0), (0, 2, 1), (0, 3, 2)):
        ends = []
        for width in (1e-5, -1e-5):
            moved = {name: each.detach().clone() for name, each in rates.items()}
            moved["weight_1"][entry] += width
            ends.append(float(meta_losses(size, weights, batch, moved, 2).mean().detach()))
        assert np.isclose((ends[0] - ends[1]) / 2e-5, float(ours[entry]), rtol=1e-6)


def test_rates_start_in_their_bounds_and_are_learnt() -> None:
    config = MetaSGDConfig(**SMALL)
    fresh = MetaSGD(config, 0)
    before = torch.cat([rate.detach().flatten().clone() for rate in fresh.rates.values()])
    assert before.min() >= 0.005 and before.max() <= 0.01 and before.std() > 0.001
    learner = trained(config)
    after = torch.cat([rate.detach().flatten() for rate in learner.rates.values()])
    assert not torch.allclose(before, after)
    *_, report = MetaSGD(config, 0).train()
    assert np.isclose(report.metrics["rate/mean"], float(after.mean()))
    assert np.isclose(report.metrics["rate/negative"], float((after < 0).float().mean()))


def test_evaluation_uses_the_learnt_rates() -> None:
    learner = trained(MetaSGDConfig(**SMALL))
    found = learner.evaluate(30, 2, seed=0)
    assert found.values.shape == (30, 3) and found.measure == "mse"
    assert np.array_equal(found.values[:, 0], found.baselines["one_rate"][:, 0])
    assert (found.values[:, 1] != found.baselines["one_rate"][:, 1]).all()
    for rate in learner.rates.values():
        rate.data.zero_()
    still = learner.evaluate(30, 2, seed=0).values
    assert np.array_equal(still[:, 0], still[:, 2])


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    config = MetaSGDConfig(**SMALL)
    whole = trained(config)
    broken = MetaSGD(config, 0)
    next(broken.train())
    save_state(tmp_path / "state", broken.get_state())
    resumed = MetaSGD(config, 0)
    resumed.set_state(load_state(tmp_path / "state"))
    assert [report.done for report in resumed.train()] == [130]
    assert len(whole.learnt()) == 8
    for name, tensor in whole.learnt().items():
        assert torch.equal(tensor, resumed.learnt()[name])


def test_what_was_learnt_is_taken_over_rates_and_all() -> None:
    source, target = trained(MetaSGDConfig(**SMALL)), MetaSGD(MetaSGDConfig(**SMALL), 9)
    target.load(source.learnt())
    assert np.array_equal(target.evaluate(10, 2, 0).values, source.evaluate(10, 2, 0).values)
    without = {name: each for name, each in source.learnt().items() if not name.startswith("rate_of_")}
    with pytest.raises(StillhouseError, match="of another network"):
        target.load(without)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"smallest_rate": 0.2}, "smallest_rate 0.2 is above largest_rate 0.1"),
        ({"inner_rate": 0.1}, "unknown parameter"),
        ({"inner_steps": 0}, "inner_steps"),
        ({"meta_rate": 0}, "meta_rate"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(StillhouseError, match=words) as error:
        parse(MetaSGDConfig, settings, "meta_train.learned_update")
    assert "\n" not in str(error.value)
