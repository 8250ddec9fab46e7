"""Hard sharing: one network on several environments; weights, reward scales, exact continuation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.checkpoint import load_state, save_state
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.multi_task.hard_sharing import HardSharing, HardSharingConfig
from stillhouse.networks.multi_task import NetworkSize, NetworkSpec, build_network

IDS = {"cartpole": "CartPole-v1", "frozen": "FrozenLake-v1"}
SIZE = NetworkSize(features=16, torso=(16,), layer_norm=True)


def learner(seed: int = 0, size: NetworkSize = SIZE, **changes: Any) -> HardSharing:
    settings: dict[str, Any] = {
        "env_steps": 1024,
        "num_envs": 8,
        "rollout_length": 16,
        "minibatches": 4,
        "network": size,
    }
    config = HardSharingConfig(**{**settings, **changes})
    envs = {
        name: VectorEnvironment(EnvironmentConfig(id=identifier), config.num_envs, seed, "train")
        for name, identifier in IDS.items()
    }
    spec = NetworkSpec(
        size=size, environments={name: env.spec for name, env in envs.items()}, output="q_values"
    )
    return HardSharing(config, build_network(spec, seed), envs, seed)


def test_every_environment_gets_its_budget_and_its_metrics() -> None:
    training = learner()
    reports = list(training.train())
    assert all(rollout.env_steps >= 1024 for rollout in training.rollouts.values())
    assert reports[-1].done == reports[-1].total == 2 * 1024
    assert {"loss/td", "loss/cartpole", "loss/frozen", "return/cartpole"} <= set(reports[-1].metrics)


def test_the_update_descends_the_weighted_mean_of_the_environments_losses() -> None:
    shares = {"cartpole": 3.0, "frozen": 1.0}
    gradients = {}
    for name, weights in {"both": shares, "cartpole": {"frozen": 1e-9}, "frozen": {"cartpole": 1e-9}}.items():
        training = learner(
            weights=weights, epochs=1, minibatches=1, max_gradient_norm=0.0, learning_rate_decay=False
        )
        next(training.train())
        gradients[name] = training.parameters.gradient.clone()
    wanted = 0.75 * gradients["cartpole"] + 0.25 * gradients["frozen"]
    torch.testing.assert_close(gradients["both"], wanted, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(gradients["cartpole"], gradients["frozen"], atol=1e-3)


def test_rewards_are_scaled_by_environment_and_the_heads_scaled_back() -> None:
    training = learner(reward_scales={"cartpole": 0.1})
    for rollout in training.rollouts.values():
        rollout.act(1.0)
    assert float(training.rollouts["cartpole"]._rewards.max()) == pytest.approx(0.1)
    before = (
        training.network.heads["cartpole"].weight.clone(),
        training.network.heads["frozen"].weight.clone(),
    )
    training.rescale_heads()
    torch.testing.assert_close(training.network.heads["cartpole"].weight, before[0] * 10)
    torch.testing.assert_close(training.network.heads["frozen"].weight, before[1])


def test_a_shared_head_has_one_reward_scale() -> None:
    shared = SIZE.model_copy(update={"share_head": True})
    training = learner(size=shared, reward_scale=0.1)
    before = training.network.heads["shared_head"].weight.clone()
    training.rescale_heads()
    torch.testing.assert_close(training.network.heads["shared_head"].weight, before * 10)
    with pytest.raises(
        StillhouseError, match=r"share_head.*set share_head to false, or the same reward scale"
    ):
        learner(size=shared, reward_scales={"cartpole": 0.1})


def test_interrupted_and_whole_training_end_in_the_same_bytes(tmp_path: Path) -> None:
    whole = learner()
    reports = list(whole.train())
    first = learner()
    begun = first.train()
    next(begun), next(begun)
    save_state(tmp_path / "state", first.get_state())
    second = learner()
    second.set_state(load_state(tmp_path / "state"))
    assert list(second.train())[-1] == reports[-1]
    save_state(tmp_path / "a", whole.get_state())
    save_state(tmp_path / "b", second.get_state())
    for name in ("state.safetensors", "state.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_seed_decides_everything() -> None:
    first, again, other = learner(0), learner(0), learner(1)
    for training in (first, again, other):
        list(training.train())
    assert torch.equal(first.parameters.values, again.parameters.values)
    assert not torch.equal(first.parameters.values, other.parameters.values)


def test_an_environment_with_few_transitions_holds_the_others_back_only() -> None:
    """CartPole spends rows on resets; there are then fewer transitions than minibatches."""
    training = learner(num_envs=2, rollout_length=8, minibatches=16, env_steps=200)
    reports = list(training.train())
    assert reports[-1].done == reports[-1].total
    assert all(math.isfinite(report.metrics["loss/td"]) for report in reports)


def test_a_loss_that_is_not_finite_stops_with_a_reason() -> None:
    training = learner()
    training.parameters.values.data.fill_(float("nan"))
    with pytest.raises(StillhouseError, match=r"loss became .*nan.* no result is written") as caught:
        list(training.train())
    assert "\n" not in str(caught.value)


def test_weights_of_unknown_environments_are_refused() -> None:
    with pytest.raises(StillhouseError, match=r"weights: pong is not among .* allowed are cartpole, frozen"):
        learner(weights={"pong": 2.0})


@pytest.mark.learning
def test_one_network_learns_two_environments() -> None:
    training = learner(
        env_steps=60_000, num_envs=32, rollout_length=32, learning_rate=1e-3, reward_scales={"cartpole": 0.1}
    )
    reports = list(training.train())
    metrics = reports[-1].metrics
    assert metrics["return/cartpole"] > 60  # random play: about 22
    assert metrics["return/frozen"] > 0.2  # random play: about 0.015
