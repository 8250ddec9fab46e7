"""Networks: every observation kind, sharing, and the flat parameters' step against torch's own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from stillhouse.networks.adapters import ConvolutionalAdapter, PlanesConvolution
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
    last = ConvolutionalAdapter(ObservationSpec(kind="planes", shape=(10, 10, 4)), 6, 8, layer_norm=True)
    first = ConvolutionalAdapter(
        ObservationSpec(kind="planes", shape=(4, 10, 10), channels_first=True), 6, 8, layer_norm=True
    )
    first.load_state_dict(last.state_dict())
    planes = observe(ObservationSpec(kind="planes", shape=(10, 10, 4)), 3)
    torch.testing.assert_close(last(planes), first(planes.permute(0, 3, 1, 2)))
    # By hand: the kernel over the 3x3 corner; then each sample's maps normalised together.
    assert isinstance(last.first, PlanesConvolution)
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
    adapter = ConvolutionalAdapter(ObservationSpec(kind="planes", shape=(6, 5, 3)), 4, 8, layer_norm=False)
    planes = observe(ObservationSpec(kind="planes", shape=(6, 5, 3)), 7)
    assert isinstance(adapter.first, PlanesConvolution)
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


def step(flat: FlatParameters, network: torch.nn.Module) -> None:
    flat.zero_gradient()
    network(torch.ones(2, 3)).square().sum().backward()
    flat.step(0.01)


def test_frozen_parameters_do_not_move_until_unfrozen() -> None:
    network = small()
    flat = FlatParameters(network, 0.01)
    before = copy.deepcopy(network.state_dict())
    flat.freeze(["0.weight", "0.bias"])
    for _ in range(3):
        step(flat, network)
    for name in ("0.weight", "0.bias"):
        assert torch.equal(network.state_dict()[name], before[name])
    assert not torch.equal(network.state_dict()["2.weight"], before["2.weight"])
    flat.freeze([])
    step(flat, network)
    assert not torch.equal(network.state_dict()["0.weight"], before["0.weight"])


def test_the_optimiser_starts_afresh_only_where_something_is_freed() -> None:
    network = small()
    flat = FlatParameters(network, 0.01)
    for names, steps in (
        (["0.weight"], 1),
        (["0.weight"], 2),  # the same once more
        (["0.weight", "0.bias"], 3),  # more is frozen, nothing freed
        (["0.weight", "2.bias"], 1),  # 0.bias is freed
        ([], 1),
        ([], 2),
    ):
        flat.freeze(names)
        step(flat, network)
        assert flat.get_state()["step"] == steps, names
    with pytest.raises(KeyError):
        flat.freeze(["0."])


def test_a_frozen_gradient_takes_no_part_in_the_clipping() -> None:
    network = small()
    flat = FlatParameters(network, 0.01)
    flat.freeze(["0.weight"])
    flat.gradient.fill_(1e-6)
    flat.gradient[flat.slices["0.weight"]] = 1e9
    flat.step(0.01, max_gradient_norm=1.0)
    assert not flat.gradient[flat.slices["0.weight"]].any()
    assert (flat.gradient[flat.slices["2.bias"]] == 1e-6).all()


def test_a_pace_scales_each_step_of_its_parameters_and_no_others() -> None:
    networks = small(), small()
    plain, paced = (FlatParameters(network, 0.01) for network in networks)
    paced.set_pace({"0.weight": 0.25, "0.bias": 0.0})
    start = plain.values.data.clone()
    step(plain, networks[0])
    step(paced, networks[1])
    whole, part = plain.values.data - start, paced.values.data - start
    factors = {"0.weight": 0.25, "0.bias": 0.0, "2.weight": 1.0, "2.bias": 1.0}
    for name, factor in factors.items():
        where = plain.slices[name]
        torch.testing.assert_close(part[where], factor * whole[where], rtol=1e-4, atol=1e-7)
    where = plain.slices["2.weight"]
    assert torch.equal(paced.values.data[where], plain.values.data[where])  # to the bit
    assert whole.any()


def test_penalties_are_added_before_the_gradient_is_clipped() -> None:
    network = small()
    flat = FlatParameters(network, 0.01)
    flat.zero_gradient()

    def penalty() -> None:
        flat.gradient.add_(2.0)

    flat.penalties += [penalty, penalty]
    flat.step(0.01, max_gradient_norm=0.5)
    wanted = torch.full_like(flat.gradient, 0.5 / len(flat.gradient) ** 0.5)
    torch.testing.assert_close(flat.gradient, wanted, rtol=1e-4, atol=0)


def test_what_wants_no_gradient_is_no_part_of_the_flat_parameters() -> None:
    network = small()
    network[0].requires_grad_(False)  # type: ignore[index]
    flat = FlatParameters(network, 0.01)
    assert set(flat.slices) == {"2.weight", "2.bias"}
    before = network.state_dict()["0.weight"].clone()
    step(flat, network)
    assert torch.equal(network.state_dict()["0.weight"], before)


def test_an_environments_way_layer_by_layer() -> None:
    environments = {
        name: EnvironmentSpec(observation=OBSERVATIONS[index], actions=3)
        for name, index in (("vector", 0), ("planes", 2), ("image", 5))
    }
    for shared in (False, True):
        size = NetworkSize(conv_channels=4, features=8, torso=(6, 5), layer_norm=True, share_planes=shared)
        network = build_network(NetworkSpec(size=size, environments=environments, output="q_values"), 0)
        forms: dict[str, list[tuple[int, int]]] = {
            "vector": [],
            "planes": [(4, 8 * 8)],  # 3x3 over 10x10
            "image": [(8, 7 * 7)],  # the three convolutions over 84x84
        }
        for name, first in forms.items():
            assert network.layer_forms(name) == [*first, (8, 1), (6, 1), (5, 1)]
            hidden = observe(environments[name].observation)
            widths = []
            for layer in network.layers(name):
                hidden = layer(hidden)
                widths.append(hidden.shape[1])
            assert widths == [maps * positions for maps, positions in network.layer_forms(name)]
            torch.testing.assert_close(
                hidden, network.features(observe(environments[name].observation), name)
            )
            # By the names: exactly what is on the way has a gradient, each tensor in one layer.
            network.zero_grad()
            network(observe(environments[name].observation), name).square().sum().backward()
            way = {key for key, parameter in network.named_parameters() if parameter.grad is not None}
            names = network.layer_names(name)
            assert len(names) == len(widths) + 1
            assert sorted(way) == sorted(key for layer_names in names for key in layer_names)
            assert names[-1] == [f"heads.{name}.weight", f"heads.{name}.bias"]
            assert names[-2] == [
                "torso.dense.1.weight",
                "torso.dense.1.bias",
                "torso.norm.1.weight",
                "torso.norm.1.bias",
            ]


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
    assert gradient[:2].any() and not gradient[2:].any()  # type: ignore[index]


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


def test_separate_networks_share_nothing_and_are_one_by_one_the_single_ones() -> None:
    size = NetworkSize(conv_channels=4, features=8, torso=(6,), separate=True)
    environments = {
        name: EnvironmentSpec(observation=observation, actions=3)
        for name, observation in (("a", OBSERVATIONS[0]), ("b", OBSERVATIONS[0]), ("c", OBSERVATIONS[2]))
    }
    network = build_network(NetworkSpec(size=size, environments=environments, output="q_values"), 0)
    ways = [{key for layer in network.layer_names(name) for key in layer} for name in environments]
    assert set.union(*ways) == {name for name, _ in network.named_parameters()}
    assert sum(map(len, ways)) == len(set.union(*ways))  # no parameter on two ways
    for name, spec in environments.items():
        alone = network.of(name)
        assert alone.spec.environments == {name: spec} and not alone.spec.size.separate
        assert alone.of(name) is alone
        seen = observe(spec.observation)
        assert torch.equal(network(seen, name), alone(seen, name))
        assert torch.equal(network.features(seen, name), alone.features(seen, name))
        assert network.feature_count == alone.feature_count == 6
        assert network.layer_forms(name) == alone.layer_forms(name)
        found = seen
        for layer in network.layers(name):
            found = layer(found)
        assert torch.equal(found, network.features(seen, name))
    before = network(observe(OBSERVATIONS[0]), "a"), network(observe(OBSERVATIONS[0]), "b")
    scale_head(network, "b", 2.0)
    assert torch.equal(network(observe(OBSERVATIONS[0]), "a"), before[0])
    assert torch.equal(network(observe(OBSERVATIONS[0]), "b"), 2 * before[1])
