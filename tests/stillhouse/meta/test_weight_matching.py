"""Weight matching: renumbering units changes no output; a renumbered copy is recovered; by hand on two units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.errors import StillhouseError
from stillhouse.meta.weight_matching import match_weights, permutation_spaces, permute
from stillhouse.networks.multi_task import (
    MultiTaskNetwork,
    NetworkSize,
    NetworkSpec,
    build_network,
)
from stillhouse.transfer.progressive_networks import Column, progressive_network
from stillhouse.types import EnvironmentSpec, ObservationSpec

torch.set_num_threads(1)

OBSERVATIONS = {
    "vector": ObservationSpec(kind="vector", shape=(4,)),
    "twin": ObservationSpec(kind="vector", shape=(4,)),
    "discrete": ObservationSpec(kind="discrete", shape=(7,)),
    "planes": ObservationSpec(kind="planes", shape=(10, 10, 4)),
    "more-planes": ObservationSpec(kind="planes", shape=(10, 10, 6)),
    "image": ObservationSpec(kind="image", shape=(84, 84, 4)),
}
ALL = tuple(OBSERVATIONS)
STRUCTURES: list[tuple[tuple[str, ...], dict[str, Any], int]] = [
    # Environments, size, number of spaces.
    (("vector",), {}, 3),
    (("vector",), {"layer_norm": True}, 3),
    (("discrete",), {}, 3),
    (("planes",), {"layer_norm": True}, 4),
    (("planes",), {"torso": ()}, 2),
    (("image",), {}, 6),
    (ALL, {}, 8),  # maps of two planes' and three image layers; what the torso reads; two torso layers
    (
        ALL,
        {"torso": ()},
        10,
    ),  # the torso's three are one for each adapter: every head reads one (the twins' two one)
    (ALL, {"torso": (), "share_head": True}, 6),  # one head reads all adapters
    (ALL, {"share_planes": True}, 7),  # one body reads the maps of both planes
    (ALL, {"separate": True}, 3 * 3 + 2 * 4 + 6),
    (("vector", "planes"), {"recurrent": "gru"}, 5),
    (("vector", "planes"), {"recurrent": "lstm", "torso": ()}, 3),
]


def build(environments: tuple[str, ...], seed: int = 0, **size: Any) -> MultiTaskNetwork:
    given = NetworkSize.model_validate({"conv_channels": 4, "features": 12, "torso": (10, 8)} | size)
    spec = NetworkSpec(
        size=given,
        environments={
            name: EnvironmentSpec(observation=OBSERVATIONS[name], actions=2 + index)
            for index, name in enumerate(environments)
        },
        output="logits",
    )
    network = build_network(spec, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # scales and shifts of norms are 1 and 0 at first, and show no mistake
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


def outputs(network: MultiTaskNetwork, environment: str) -> Tensor:
    spec = OBSERVATIONS[environment]
    high = {"vector": 3, "discrete": 7, "planes": 2, "image": 256}[spec.kind]
    drawn = np.random.default_rng(0).integers(high, size=(6, *spec.stored_shape)).astype(spec.dtype)
    given = torch.from_numpy(drawn)
    if network.spec.size.recurrent == "none":
        return network(given, environment)
    starts = torch.tensor([True, False, False, True, False, False]).unsqueeze(1)
    features, _ = network.unroll(given.unsqueeze(1), environment, network.initial_state(1), starts)
    return network.head(features.flatten(0, 1), environment)


def shuffled(network: MultiTaskNetwork, seed: int) -> MultiTaskNetwork:
    random = np.random.default_rng(seed)
    orders = {name: random.permutation(space.size) for name, space in permutation_spaces(network).items()}
    return permute(network, orders)


def same_weights(first: MultiTaskNetwork, second: MultiTaskNetwork) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(("environments", "size", "spaces"), STRUCTURES)
def test_renumbered_units_compute_the_same_and_are_recovered(
    environments: tuple[str, ...], size: dict[str, Any], spaces: int
) -> None:
    network = build(environments, **size)
    assert len(permutation_spaces(network)) == spaces
    other = shuffled(network, 1)
    assert not same_weights(network, other)
    with torch.no_grad():
        for environment in environments:
            torch.testing.assert_close(
                outputs(other, environment), outputs(network, environment), rtol=1e-5, atol=1e-5
            )
    matching = match_weights(network, other, seed=0)
    assert same_weights(matching.network, network)
    assert matching.distance_before > 1 and matching.distance_after == 0
    assert matching.report()["units"] == sum(len(order) for order in matching.permutations.values())


@given(seed=st.integers(0, 10**6), layer_norm=st.booleans())
@settings(max_examples=15, deadline=None)
def test_every_permutation_keeps_the_function_and_matching_never_goes_away(
    seed: int, layer_norm: bool
) -> None:
    network, other = (build(("planes",), seed + i, layer_norm=layer_norm) for i in range(2))
    renumbered = shuffled(other, seed)
    matching = match_weights(network, renumbered, seed)
    with torch.no_grad():
        wanted = outputs(other, "planes")
        torch.testing.assert_close(outputs(renumbered, "planes"), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outputs(matching.network, "planes"), wanted, rtol=1e-5, atol=1e-5)
    assert matching.distance_after <= matching.distance_before


def test_two_units_by_hand() -> None:
    """The second unit of one is the first of the other, but for noise that does not matter."""
    one, other = (build(("vector",), features=2, torso=()) for _ in range(2))
    with torch.no_grad():
        for network, rows in (
            (one, [[1.0, 0, 0, 0], [0, 1.0, 0, 0]]),
            (other, [[0.1, 0.9, 0, 0], [0.8, 0, 0, 0.1]]),
        ):
            for parameter in network.parameters():
                parameter.zero_()
            network.adapters["vector_4"].dense.weight.copy_(torch.tensor(rows))  # type: ignore[union-attr]
    matching = match_weights(one, other, seed=0)
    assert matching.permutations["adapters.vector_4.dense"].tolist() == [1, 0]
    # (0.1² + 0.1² + 1 + 0.9²...) by hand: before and after.
    assert matching.distance_before**2 == pytest.approx(0.9**2 + 0.9**2 + 0.8**2 + 1 + 0.1**2)
    assert matching.distance_after**2 == pytest.approx(0.2**2 + 0.1**2 + 0.1**2 + 0.1**2)


def test_the_same_seed_finds_the_same() -> None:
    network, other = build(ALL), build(ALL, 5)
    first, second = (match_weights(network, other, seed=3) for _ in range(2))
    assert same_weights(first.network, second.network)


def test_bad_input_is_named() -> None:
    network = build(("vector",))
    with pytest.raises(StillhouseError, match="space 'body': unknown; this network's are adapters"):
        permute(network, {"body": np.arange(3)})
    with pytest.raises(StillhouseError, match=r"a permutation of its units 0..11 is needed"):
        permute(network, {"adapters.vector_4.dense": np.zeros(12, np.int64)})
    spec = EnvironmentSpec(observation=OBSERVATIONS["vector"], actions=2)
    progressive = progressive_network("new", spec, "logits", [Column(network, "vector", None)], 0)
    with pytest.raises(StillhouseError, match="ProgressiveNetwork: its units cannot be renumbered"):
        permutation_spaces(progressive)
