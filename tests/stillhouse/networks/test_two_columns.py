"""Two columns as one network: what it gives, what is whose, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stillhouse.checkpoint import load_checkpoint, save_checkpoint
from stillhouse.errors import StillhouseError
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize, NetworkSpec, build_network
from stillhouse.networks.two_columns import TwoColumnNetwork, TwoColumnSpec, join_columns
from stillhouse.transfer.initialisation import Source
from stillhouse.types import EnvironmentSpec, ObservationSpec

SPEC = EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(3,)), actions=2)
WIDE = EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(3,)), actions=4)
SIZE = NetworkSize(features=8, torso=(6,), layer_norm=True)


def parts(second: EnvironmentSpec = SPEC) -> tuple[MultiTaskNetwork, MultiTaskNetwork]:
    environments = {"one": SPEC, "other": second}
    sizes = SIZE.model_copy(update={"separate": True}), SIZE.model_copy(update={"share_head": True})
    own, shared = (
        build_network(NetworkSpec(size=size, environments=environments, output="logits"), seed)
        for seed, size in enumerate(sizes)
    )
    return own, shared


OBSERVATIONS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_logits_are_the_sum_of_both_columns(alpha: float) -> None:
    own, shared = parts(WIDE)
    network = join_columns(own, shared, alpha)
    for name, actions in (("one", 2), ("other", 4)):
        wanted = alpha * shared(OBSERVATIONS, name) + own(OBSERVATIONS, name)
        assert wanted.shape == (5, actions)
        torch.testing.assert_close(network(OBSERVATIONS, name), wanted)
        features = network.features(OBSERVATIONS, name)
        assert features.shape == (5, network.feature_count) == (5, 12)
        assert network.encode(OBSERVATIONS, name).shape == (5, 16)
        starts = torch.zeros(1, 5, dtype=torch.bool)
        unrolled, states = network.unroll(OBSERVATIONS[None], name, network.initial_state(5), starts)
        assert torch.equal(unrolled[0], features) and states.shape == (1, 5, 0)


def test_the_columns_stay_the_same_tensors() -> None:
    own, shared = parts()
    network = join_columns(own, shared, 0.5)
    before = network(OBSERVATIONS, "one").clone(), network(OBSERVATIONS, "other").clone()
    with torch.no_grad():
        own.of("one").heads["one"].bias.add_(1.0)
    torch.testing.assert_close(network(OBSERVATIONS, "one"), before[0] + 1)
    torch.testing.assert_close(network(OBSERVATIONS, "other"), before[1])
    with torch.no_grad():
        shared.heads["shared_head"].bias.add_(1.0)
    torch.testing.assert_close(network(OBSERVATIONS, "other"), before[1] + 0.5)


def test_joining_draws_no_number_of_anybody_elses() -> None:
    before = torch.random.get_rng_state()
    join_columns(*parts(), 0.5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_is_saved_and_loaded_as_one_network(tmp_path: Path) -> None:
    network = join_columns(*parts(), 0.5)
    save_checkpoint(tmp_path / "network", network, {})
    loaded = load_checkpoint(tmp_path / "network").network
    assert isinstance(loaded, TwoColumnNetwork) and loaded.spec == network.spec
    assert torch.equal(loaded(OBSERVATIONS, "other"), network(OBSERVATIONS, "other"))


def test_no_column_is_taken_for_the_policy() -> None:
    network = join_columns(*parts(), 0.5)
    with pytest.raises(
        StillhouseError, match="one: its policy is the sum of two columns.*a student"
    ) as caught:
        Source("joint", network, "one")
    assert "\n" not in str(caught.value)


def test_columns_that_do_not_fit_are_refused() -> None:
    own, shared = parts()
    with pytest.raises(ValueError, match=r"size\.separate must be true"):
        TwoColumnSpec(**dict(shared.spec), shared_column=shared.spec, alpha=0.5)
    with pytest.raises(ValueError, match="for the same environments"):
        TwoColumnSpec(**dict(own.spec), shared_column=parts(WIDE)[1].spec, alpha=0.5)
    with pytest.raises(ValueError, match="alpha"):
        join_columns(own, shared, 1.5)
