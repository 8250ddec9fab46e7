"""Sensitivity: Fisher information and noise worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.envs.make import EnvironmentConfig
from stillhouse.networks.multi_task import NetworkSize, NetworkSpec, build_network
from stillhouse.transfer.feature_transfer import feature_network
from stillhouse.transfer.progressive_networks import Column, ProgressiveNetwork, progressive_network
from stillhouse.transfer.sensitivity import _fisher, half_life, sensitivities, shares
from stillhouse.types import EnvironmentSpec, ObservationSpec

torch.set_num_threads(1)
CARTPOLE = EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(4,)), actions=2)


def column(seed: int = 7, torso: tuple[int, ...] = (6,)) -> Column:
    size = NetworkSize(features=8, torso=torso)
    spec = NetworkSpec(size=size, environments={"source": CARTPOLE}, output="logits")
    return Column(build_network(spec, seed), "source", None)


def two_columns() -> ProgressiveNetwork:
    network = progressive_network("target", CARTPOLE, "logits", [column(7), column(8)], 3, adapter_scale=1.0)
    with torch.no_grad():  # a policy that prefers something
        network.get_parameter("heads.target.weight").mul_(100)
    return network


def observe(count: int = 200) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32))


def test_fisher_information_of_a_linear_policy_by_hand() -> None:
    # Features are the observations' first layer; the head is linear in them and in the source's.
    network = feature_network("target", CARTPOLE, "logits", column(torso=()), seed=3)
    with torch.no_grad():
        network.get_parameter("heads.target.weight").mul_(100)
    seen = observe()
    _, found = _fisher(network, "target", seen)
    features = (
        network.features(seen, "target").detach().double().numpy()
    )  # [B, 8 + 8], the new column's first
    weight = network.get_parameter("heads.target.weight").detach().double().numpy()
    logits = features @ weight.T + network.get_parameter("heads.target.bias").detach().double().numpy()
    policy = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    # d log pi(a) / d h = W_a - sum_b pi(b) W_b; squared, times the variance of h, under the policy.
    wanted = np.zeros(16)
    for action in range(2):
        gradient = weight[action] - policy @ weight
        wanted += (policy[:, [action]] * gradient**2).mean(0)
    wanted *= features.var(0)
    np.testing.assert_allclose(found, [[wanted[8:].sum(), wanted[:8].sum()]], rtol=1e-4)


def test_a_column_that_is_not_read_has_no_share() -> None:
    network = two_columns()
    with torch.no_grad():
        for part in network.laterals:
            part.scales[1] = 0  # type: ignore[operator]
    _, found = _fisher(network, "target", observe())
    assert found.shape == (2, 3)
    assert (found[:, 1] == 0).all() and (found[:, [0, 2]] > 0).all()
    assert (shares(found)[:, 1] == 0).all()


def test_spreads_are_the_activations_standard_deviations() -> None:
    network, seen = two_columns(), observe()
    spreads, _ = _fisher(network, "target", seen)
    assert set(spreads) == {(column, layer) for column in range(3) for layer in range(2)}
    wanted = network.features(seen, "target").detach()[:, :6].numpy().std(0)
    np.testing.assert_allclose(spreads[2, 1].numpy(), wanted, rtol=1e-4)


def test_shares() -> None:
    found = shares(np.array([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(found, [[0.25, 0.75, 0], [1 / 3, 1 / 3, 1 / 3]])


@pytest.mark.parametrize("sigma", [0.05, 0.7, 3.0, 20.0])
def test_half_life_of_a_known_function(sigma: float) -> None:
    # From 100 down to 20 at random: half way, 60, is where the noise is sigma.
    found = half_life(lambda noise: 20 + 80 * 2 ** -(noise / sigma), 20.0)
    assert abs(np.log2(found / sigma)) <= 12 / 2**7 + 1e-9  # half of what six halvings leave


def test_half_life_at_the_limits() -> None:
    assert half_life(lambda noise: 100.0, 0.0) == 64  # it never costs half
    assert half_life(lambda noise: 0.0 if noise else 100.0, 0.0) < 2**-5.8  # it does at once


def test_both_analyses_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    network = two_columns()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    environment = EnvironmentConfig(id="CartPole-v1", max_episode_steps=30)
    found = sensitivities(network, "target", environment, 4, seed=0)
    assert found == sensitivities(network, "target", environment, 4, seed=0)
    for key in ("fisher", "perturbation"):
        table = np.array(found[key])
        assert table.shape == (2, 3) and (table >= 0).all()
        np.testing.assert_allclose(table.sum(1), 1)
    noise = np.array(found["noise"])
    precision = 1 / noise**2
    np.testing.assert_allclose(found["perturbation"], precision / precision.sum(1, keepdims=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_noise_says_nothing_of_a_policy_no_better_than_random() -> None:
    network = two_columns()
    with torch.no_grad():
        network.get_parameter("heads.target.weight").zero_()  # always the first action
    environment = EnvironmentConfig(id="CartPole-v1")
    found = sensitivities(network, "target", environment, 8, seed=0)
    assert (found["perturbation"], found["noise"]) == ([], [])
    np.testing.assert_allclose(np.array(found["fisher"]).sum(1), 1)
