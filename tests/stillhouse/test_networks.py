"""Networks: every observation kind, sharing, and the flat parameters' step against torch's own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from stillhouse.networks.adapters import PlanesAdapter
from stillhouse.networks.multi_task import (
    NetworkSize,
    NetworkSpec,
    build_network,
    parameter_count,
    scale_head,
)
from stillhouse.networks.parameters import FlatParameters
from stillhouse.types import EnvironmentSpec, ObservationSpec

OBSERVATIONS = [
    ObservationSpec(kind="vector", shape=(4,)),
    ObservationSpec(kind="discrete", shape=(7,)),
    ObservationSpec(kind="planes", shape=(10, 10, 4)),
    ObservationSpec(kind="planes", shape=(4, 10, 10), channels_first=True),
    ObservationSpec(kind="image", shape=(12, 12, 3)),
    ObservationSpec(kind="image", shape=(84, 84, 4)),
    ObservationSpec(kind="image", shape=(4, 84, 84), channels_first=True),
]


def observe(spec: ObservationSpec, count: int = 5, seed: int = 0) -> torch.Tensor:
    high = {"vector": 3, "discrete": spec.shape[0], "planes": 2, "image": 256}[spec.kind]
    values = np.random.default_rng(seed).integers(high, size=(count, *spec.stored_shape))
    return torch.from_numpy(values.astype(spec.dtype))


@pytest.mark.parametrize("observation", OBSERVATIONS, ids=lambda spec: spec.key)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_every_observation_kind(observation: ObservationSpec, layer_norm: bool) -> None:
    spec = NetworkSpec(
        size=NetworkSize(conv_channels=4, features=8, torso=(6,), layer_norm=layer_norm),
        environments={"a": EnvironmentSpec(observation=observation, actions=3)},
        output="q_values",
    )
    network = build_network(spec, 0)
    outputs = network(observe(observation), "a")
    assert outputs.shape == (5, 3) and outputs.dtype == torch.float32
    one_by_one = torch.cat([network(row.unsqueeze(0), "a") for row in observe(observation)])
    torch.testing.assert_close(outputs, one_by_one, rtol=1e-4, atol=1e-5)
    outputs.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_convolution_sees_planes_the_same_whichever_way_they_lie() -> None:
    last = PlanesAdapter(ObservationSpec(kind="planes", shape=(10, 10, 4)), 6, 8, layer_norm=True)
    first = PlanesAdapter(
        ObservationSpec(kind="planes", shape=(4, 10, 10), channels_first=True), 6, 8, layer_norm=True
    )
    first.load_state_dict(last.state_dict())
    planes = observe(ObservationSpec(kind="planes", shape=(10, 10, 4)), 3)
    torch.testing.assert_close(last(planes), first(planes.permute(0, 3, 1, 2)))
    # By hand: the kernel over the 3x3 corner; then each sample's maps normalised together.
    convolution = last.first.convolution
    maps = convolution(planes.permute(0, 3, 1, 2).float())
    assert convolution.bias is not None
    corner = torch.einsum("hwc,kchw->k", planes[0, :3, :3].float(), convolution.weight) + convolution.bias
    torch.testing.assert_close(maps[0, :, 0, 0], corner)
    mean = maps.mean((1, 2, 3), keepdim=True)
    variance = maps.var((1, 2, 3), correction=0, keepdim=True)
    wanted = torch.relu((maps - mean) / torch.sqrt(variance + 1e-5))
    torch.testing.assert_close(last.first(planes), wanted.flatten(1))


def test_the_convolutions_gradient_is_autograds() -> None:
    adapter = PlanesAdapter(ObservationSpec(kind="planes", shape=(6, 5, 3)), 4, 8, layer_norm=False)
    planes = observe(ObservationSpec(kind="planes", shape=(6, 5, 3)), 7)
    convolution = adapter.first.convolution
    assert convolution.bias is not None
    adapter.first(planes).square().sum().backward()
    found = [parameter.grad.clone() for parameter in (convolution.weight, convolution.bias)]  # type: ignore[union-attr]
    adapter.zero_grad()
    torch.relu(convolution(planes.permute(0, 3, 1, 2).float())).square().sum().backward()
    torch.testing.assert_close(found, [convolution.weight.grad, convolution.bias.grad])


def test_planes_share_all_but_the_first_convolution() -> None:
    spec = NetworkSpec(
        size=NetworkSize(conv_channels=4, features=8, share_planes=True),
        environments={
            name: EnvironmentSpec(
                observation=ObservationSpec(kind="planes", shape=(10, 10, channels)), actions=3
            )
            for name, channels in (("a", 4), ("b", 4), ("c", 7))
        },
        output="logits",
    )
    network = build_network(spec, 0)
    assert sorted(network.adapters) == ["a", "b", "c"]
    assert list(network.bodies) == ["planes_10x10"]
    convolutions = 3 * 4 + 9 * 4 * (4 + 4 + 7)
    body = (8 * 8 * 4) * 8 + 8
    assert parameter_count(network) == convolutions + body + 3 * (8 * 3 + 3)
    assert network(torch.zeros(5, 10, 10, 7, dtype=torch.bool), "c").shape == (5, 3)


def test_equal_shapes_share_an_adapter_and_every_environment_has_its_head() -> None:
    vector, planes = OBSERVATIONS[0], OBSERVATIONS[2]
    spec = NetworkSpec(
        size=NetworkSize(features=8),
        environments={
            "a": EnvironmentSpec(observation=vector, actions=2),
            "b": EnvironmentSpec(observation=vector, actions=3),
            "c": EnvironmentSpec(observation=planes, actions=6),
        },
        output="logits",
    )
    network = build_network(spec, 0)
    assert set(network.adapters) == {"vector_4", "planes_10x10x4"} and set(network.heads) == {"a", "b", "c"}
    network(observe(vector), "a").sum().backward()
    assert network.heads["b"].weight.grad is None
    assert parameter_count(network) == sum(p.numel() for p in network.parameters())


def test_the_seed_decides_the_weights_and_nothing_else_moves() -> None:
    spec = NetworkSpec(
        size=NetworkSize(),
        environments={"a": EnvironmentSpec(observation=OBSERVATIONS[0], actions=2)},
        output="logits",
    )
    before = torch.random.get_rng_state()
    first, again, other = (build_network(spec, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))


def test_flat_step_equals_torchs_adam_with_clipping() -> None:
    flat_network, plain_network = small(), small()
    flat = FlatParameters(flat_network, 0.01)
    optimizer = torch.optim.Adam(plain_network.parameters(), 0.01)
    inputs = torch.randn(20, 5, 3, generator=torch.Generator().manual_seed(1)) * 10
    for batch in inputs:
        flat.zero_gradient()
        flat_network(batch).square().sum().backward()
        flat.step(0.01, max_gradient_norm=1.0)
        optimizer.zero_grad()
        plain_network(batch).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(plain_network.parameters(), 1.0)
        optimizer.step()
    for left, right in zip(flat_network.parameters(), plain_network.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_do_not_move_until_unfrozen() -> None:
    network = small()
    flat = FlatParameters(network, 0.01)
    before = copy.deepcopy(network.state_dict())
    assert flat.freeze(["0."]) == ["0.weight", "0.bias"]

    def step() -> None:
        flat.zero_gradient()
        network(torch.ones(2, 3)).sum().backward()
        flat.step(0.01)

    step()
    assert torch.equal(network.state_dict()["0.weight"], before["0.weight"])
    assert not torch.equal(network.state_dict()["2.weight"], before["2.weight"])
    flat.unfreeze()
    step()
    assert not torch.equal(network.state_dict()["0.weight"], before["0.weight"])


def test_a_shared_head_masks_the_actions_that_an_environment_lacks() -> None:
    observation = OBSERVATIONS[0]
    environments = {
        name: EnvironmentSpec(observation=observation, actions=actions)
        for name, actions in (("two", 2), ("five", 5))
    }
    size = NetworkSize(features=8, share_head=True)
    network = build_network(NetworkSpec(size=size, environments=environments, output="logits"), 0)
    observations = observe(observation)
    two, five = network(observations, "two"), network(observations, "five")
    assert two.shape == (len(observations), 2) and five.shape == (len(observations), 5)
    torch.testing.assert_close(two, five[:, :2])  # action i is the same action everywhere
    two.sum().backward()
    gradient = network.heads["shared_head"].weight.grad
    assert gradient[:2].any() and not gradient[2:].any()


def test_scaling_a_head_scales_its_outputs_and_no_others() -> None:
    vector = EnvironmentSpec(observation=OBSERVATIONS[0], actions=2)
    spec = NetworkSpec(
        size=NetworkSize(features=8), environments={"a": vector, "b": vector}, output="q_values"
    )
    network = build_network(spec, 0)
    observations = observe(OBSERVATIONS[0])
    before = {name: network(observations, name) for name in ("a", "b")}
    scale_head(network, "a", 10.0)
    torch.testing.assert_close(network(observations, "a"), before["a"] * 10)
    torch.testing.assert_close(network(observations, "b"), before["b"])
