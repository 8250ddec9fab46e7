"""Initialisation: what is taken of a source, under which mapping, and that it then does what the source did."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.agents import fresh_network
from stillhouse.errors import StillhouseError
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize, NetworkSpec, build_network
from stillhouse.transfer.initialisation import (
    Correspondence,
    Declared,
    Labels,
    Source,
    TensorReport,
    correspond,
    kept_name,
    kept_observations,
    show,
    target_network,
)
from stillhouse.types import EnvironmentSpec, ObservationSpec, OutputKind

torch.set_num_threads(1)
SIZE = NetworkSize(conv_channels=3, features=8, torso=(6,), layer_norm=True)
NAMES = ("x", "y", "angle", "speed")


def vector(entries: int, actions: int = 2) -> EnvironmentSpec:
    return EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(entries,)), actions=actions)


def planes(channels: int, side: int = 6, actions: int = 2, first: bool = False) -> EnvironmentSpec:
    shape = (channels, side, side) if first else (side, side, channels)
    observation = ObservationSpec(kind="planes", shape=shape, channels_first=first)
    return EnvironmentSpec(observation=observation, actions=actions)


def discrete(values: int, actions: int = 2) -> EnvironmentSpec:
    return EnvironmentSpec(observation=ObservationSpec(kind="discrete", shape=(values,)), actions=actions)


def observe(spec: EnvironmentSpec, count: int = 7, seed: int = 0) -> Tensor:
    random, observation = np.random.default_rng(seed), spec.observation
    if observation.kind == "vector":
        return torch.from_numpy(random.normal(size=(count, *observation.shape)).astype(np.float32))
    high = observation.shape[0] if observation.kind == "discrete" else 2
    values = random.integers(high, size=(count, *observation.stored_shape))
    return torch.from_numpy(values.astype(observation.dtype))


def trained(
    output: OutputKind = "q_values", size: NetworkSize = SIZE, **environments: EnvironmentSpec
) -> MultiTaskNetwork:
    return build_network(NetworkSpec(size=size, environments=environments, output=output), 7)


def taken(
    source: MultiTaskNetwork,
    environment: str,
    target: EnvironmentSpec,
    components: Declared = "same",
    actions: Declared = "index",
    output: OutputKind | None = None,
    take: Sequence[str] = ("*",),
    labels: tuple[Labels, Labels] = (Labels(), Labels()),
) -> tuple[MultiTaskNetwork, TensorReport, Correspondence | None]:
    given = Source("student", source, environment)
    found = correspond(target, given.spec, components, actions, labels) if environment else None
    network, report = target_network(given, "target", target, 3, output or source.spec.output, found, take)
    return network, report, found


def same(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


SPACES = {
    "vector": vector(4, 3),
    "discrete": discrete(5, 3),
    "planes": planes(4, actions=3),
    "planes-first": planes(4, actions=3, first=True),
}


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("output", ["q_values", "logits"])
@pytest.mark.parametrize("share_planes", [False, True])
def test_the_same_spaces_copy_everything(kind: str, output: OutputKind, share_planes: bool) -> None:
    spec = SPACES[kind]
    source = trained(
        output, SIZE.model_copy(update={"share_planes": share_planes}), one=spec, other=vector(9)
    )
    network, report, _ = taken(source, "one", spec)
    assert torch.equal(network(observe(spec), "target"), source(observe(spec), "one"))
    assert torch.equal(network(observe(vector(9)), "source-other"), source(observe(vector(9)), "other"))
    assert set(report.copied) == {key for layer in network.layer_names("target") for key in layer}
    assert report.taken == report.copied
    assert report.new == []


@pytest.mark.parametrize(("source_output", "output"), [("logits", "q_values"), ("q_values", "logits")])
def test_outputs_of_another_kind_give_no_head(source_output: OutputKind, output: OutputKind) -> None:
    source = trained(source_output, one=vector(4))
    network, report, _ = taken(source, "one", vector(4), output=output)
    assert report.new == ["heads.target.weight", "heads.target.bias"]
    assert not network(observe(vector(4)), "target").any()  # it bootstraps from 0; as a policy it is uniform
    same(network.features(observe(vector(4)), "target"), source.features(observe(vector(4)), "one"))


def test_of_a_shared_head_the_environments_own_actions_are_taken() -> None:
    size = SIZE.model_copy(update={"share_head": True})
    source = trained("logits", size, two=vector(4, 2), five=vector(4, 5))
    seen = observe(vector(4))
    network, report, _ = taken(source, "two", vector(4, 3), actions={"2": "0", "0": "1"})
    found = network(seen, "target")
    same(found[:, [2, 0]], source(seen, "two"))
    assert "heads.target.weight" in report.padded
    for name in ("two", "five"):  # each has a head of its own now
        same(network(seen, kept_name(name)), source(seen, name))
    more, report, _ = taken(source, "five", vector(4, 8))  # more actions than any of the source's
    same(more(seen, "target")[:, :5], source(seen, "five"))
    less, report, _ = taken(source, "five", vector(4, 3))
    same(less(seen, "target"), source(seen, "five")[:, :3])
    assert "heads.target.weight" in report.sliced


def test_of_separate_networks_the_named_environments_is_taken() -> None:
    size = SIZE.model_copy(update={"separate": True})
    source = trained("logits", size, one=vector(4, 2), two=vector(4, 2))
    network, report, _ = taken(source, "two", vector(4, 2))
    seen = observe(vector(4))
    assert torch.equal(network(seen, "target"), source(seen, "two")) and report.new == []
    assert not network.spec.size.separate and list(network.spec.environments) == ["target", "source-two"]
    with pytest.raises(
        StillhouseError, match=r"no common torso, so one of them is needed: student.one"
    ) as caught:
        Source("student", source, "")
    assert "\n" not in str(caught.value)


def test_without_an_environment_the_torso_and_an_adapter_of_the_same_shape_are_taken() -> None:
    source = trained(one=vector(4), grid=planes(4))
    for target, fits in ((vector(4), True), (vector(5), False), (planes(4), True), (planes(4, 7), False)):
        network, report, _ = taken(source, "", target)
        head = ["heads.target.weight", "heads.target.bias"]
        assert {"torso.dense.0.weight", "torso.norm.0.bias"} <= set(report.copied)
        assert (report.new == head) == fits
        if not fits:
            assert all(key.startswith(("heads.", "adapters.")) for key in report.new)
        assert not network(observe(target), "target").any()
        for name in ("one", "grid"):
            seen = observe(source.spec.environments[name])
            assert torch.equal(network(seen, kept_name(name)), source(seen, name))


@pytest.mark.parametrize("target", [planes(4, 8), vector(4), planes(4)])
def test_planes_of_other_sides_have_a_fresh_body(target: EnvironmentSpec) -> None:
    source = trained(size=SIZE.model_copy(update={"share_planes": True}), grid=planes(3))
    network, report, _ = taken(source, "", target)
    assert "torso.dense.0.weight" in report.copied
    body = [key for key in report.taken if key.startswith("bodies.")]
    assert bool(body) == (target.observation.shape == (6, 6, 4))  # the sides decide, not the channels
    assert network(observe(target), "target").shape == (7, 2)


def test_components_of_another_number_give_the_torso_alone() -> None:
    source = trained("logits", one=vector(4, 2))
    _, report, found = taken(source, "one", vector(2, 3))  # as CartPole's to MountainCar's
    assert found == Correspondence(None, (0, 1, -1))
    assert report.taken == [
        "torso.dense.0.weight",
        "torso.dense.0.bias",
        "torso.norm.0.weight",
        "torso.norm.0.bias",
    ]
    assert "heads.target.weight" in report.new  # what it saw is not seen here


# Of the target's component i, or action i, the source's number.
ORDER, TURNED = (2, 0, 3, 1), (2, 0, 1)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("share_planes", [False, True])
@pytest.mark.parametrize("kind", ["vector", "planes"])
def test_a_permutation_gives_the_sources_outputs_on_permuted_observations(
    kind: str, share_planes: bool, first: bool
) -> None:
    spec = vector(4, 3) if kind == "vector" else planes(4, actions=3, first=first)
    source = trained(size=SIZE.model_copy(update={"share_planes": share_planes}), one=spec)
    declared = {str(i): str(number) for i, number in enumerate(ORDER)}
    turned = {str(i): str(number) for i, number in enumerate(TURNED)}
    network, report, found = taken(source, "one", spec, declared, turned)
    assert found == Correspondence(ORDER, TURNED) and found.one_to_one
    seen = observe(spec)
    wanted = source(seen, "one")
    axis = -3 if spec.observation.channels_first else -1
    permuted = seen.index_select(axis, torch.tensor(ORDER))
    same(network(permuted, "target"), wanted[:, list(TURNED)])
    assert not torch.allclose(network(seen, "target"), wanted[:, list(TURNED)])
    assert len(report.permuted) == 3  # the first layer's weights, the head's weights and biases
    # The kept head still gives the source's outputs: of what the target's way sees where the adapter is shared.
    same(network(kept_observations(network, "target", "source-one", found, seen), "source-one"), wanted)


def test_a_kept_environment_of_the_same_shape_sees_permuted_observations_too() -> None:
    source = trained(one=vector(4), second=vector(4), third=vector(6))
    network, _, found = taken(source, "one", vector(4), {str(i): str(n) for i, n in enumerate(ORDER)})
    for name, spec in source.spec.environments.items():
        seen = kept_observations(network, "target", kept_name(name), found, observe(spec))
        same(network(seen, kept_name(name)), source(observe(spec), name))


def test_what_is_no_longer_the_sources_way_is_not_kept() -> None:
    source = trained(one=vector(4), wide=vector(6), wider=vector(6))
    # The adapter for six entries becomes the one for four, padded: the others' way is gone.
    network, _, _ = taken(source, "one", vector(6), "index")
    assert set(network.spec.environments) == {"target", "source-one"}
    assert torch.equal(network(observe(vector(4)), "source-one"), source(observe(vector(4)), "one"))
    # An entry of its own is not seen any more.
    network, _, _ = taken(source, "wide", vector(6), {"0": "0", "1": "1"})
    assert set(network.spec.environments) == {"target", "source-one"}
    # Nothing is known of six entries that correspond to nothing: another's adapter of that shape is as good as any.
    network, _, _ = taken(source, "one", vector(6))
    assert len(network.spec.environments) == 4
    assert torch.equal(network(observe(vector(6)), "source-wide"), source(observe(vector(6)), "wide"))


@pytest.mark.parametrize("make", [vector, planes])
def test_a_component_of_noise_changes_nothing(make: Callable[[int], EnvironmentSpec]) -> None:
    source = trained(one=make(4))
    declared = {"0": "0", "2": "1", "3": "2", "4": "3"}
    network, report, found = taken(source, "one", make(5), declared)
    assert found is not None and not found.one_to_one
    assert len(report.padded) == 1 and report.padded[0].startswith("adapters.")
    seen, noisy = observe(make(4)), observe(make(5), seed=1)
    noisy[..., [0, 2, 3, 4]] = seen
    wanted = source(seen, "one")
    same(network(noisy, "target"), wanted)
    noisy[..., 1] = ~noisy[..., 1] if noisy.dtype == torch.bool else 1e4 * noisy[..., 1]
    same(network(noisy, "target"), wanted)
    # But it can be learnt to be used.
    network(noisy, "target").sum().backward()
    weight = dict(network.named_parameters())[report.padded[0]]
    assert weight.grad is not None and weight.grad[:, 1].any()


@pytest.mark.parametrize("make", [vector, planes])
def test_fewer_components_are_a_slice(make: Callable[[int], EnvironmentSpec]) -> None:
    source = trained(one=make(4))
    network, report, _ = taken(source, "one", make(3), "index")
    assert len(report.sliced) == 1
    seen = observe(make(4))
    seen[..., 3] = 0
    same(network(seen[..., :3], "target"), source(seen, "one"))


def test_planes_may_lie_the_other_way() -> None:
    source = trained(one=planes(4))
    network, _, _ = taken(source, "one", planes(4, first=True))
    seen = observe(planes(4))
    same(network(seen.permute(0, 3, 1, 2), "target"), source(seen, "one"))


def test_more_actions_are_fresh_and_the_rest_the_sources() -> None:
    source = trained("logits", one=vector(4, 2))
    network, report, _ = taken(source, "one", vector(4, 3))
    seen = observe(vector(4))
    found = network(seen, "target")
    same(found[:, :2], source(seen, "one"))
    fresh = fresh_network(SIZE, "target", vector(4, 3), "logits", 3).heads["target"]
    assert torch.equal(network.heads["target"].weight[2], fresh.weight[2])  # type: ignore[index]
    assert report.padded == ["heads.target.weight", "heads.target.bias"]


def test_by_name() -> None:
    ours = Labels(("speed", "wind", "x"), ("jump", "left"))
    theirs = Labels(NAMES, ("left", "right"))
    found = correspond(vector(3, 2), vector(4, 2), "name", "name", (ours, theirs))
    assert found == Correspondence((3, -1, 0), (-1, 0))
    found = correspond(
        vector(3, 2), vector(4, 2), {"wind": "angle", "2": "0", "speed": "3"}, {"1": "left"}, (ours, theirs)
    )
    assert found == Correspondence((3, 2, 0), (-1, 0))


def test_by_index_and_only_the_same() -> None:
    assert correspond(vector(3, 5), vector(4, 2), "index", "index") == Correspondence(
        (0, 1, 2), (0, 1, -1, -1, -1)
    )
    assert correspond(vector(3, 5), vector(4, 2), "same", "same") == Correspondence(None, None)
    assert correspond(vector(4, 2), vector(4, 2), "same", "same") == Correspondence((0, 1, 2, 3), (0, 1))


def test_names_of_which_none_is_shared_correspond_to_nothing() -> None:
    labels = Labels(("a", "b", "c", "d"), ("up", "down")), Labels(NAMES, ("left", "right"))
    source = trained(one=vector(4), other=vector(5))
    network, report, found = taken(source, "one", vector(4), "name", "name", labels=labels)
    assert found == Correspondence(None, None)
    assert {key.partition(".")[0] for key in report.new} == {"adapters", "heads"}
    fresh = fresh_network(SIZE, "target", vector(4), "q_values", 3)
    for key in report.new:
        if key.startswith("adapters."):
            assert torch.equal(network.get_parameter(key), fresh.get_parameter(key))
    assert set(network.spec.environments) == {"target", "source-other"}


@pytest.mark.parametrize(
    ("components", "actions", "labels", "words"),
    [
        ({"spede": "x"}, "index", True, ["here.components: the target", "'spede'", "did you mean 'speed'"]),
        ({"x": "spede"}, "index", True, ["here.components: the source", "'spede'", "did you mean 'speed'"]),
        ({"x": "4"}, "index", True, ["here.components: the source has no '4'", "0 to 3"]),
        ({"x": "-1"}, "index", True, ["here.components: the source has no '-1'"]),
        ({"x": "0"}, "index", False, ["here.components: the target has no 'x'", "no names"]),
        ("same", {"0": "rigth"}, True, ["here.actions: the source", "did you mean 'right'"]),
        ("same", {"2": "0"}, True, ["here.actions: the target has no '2'", "0 to 1"]),
        ("name", "index", False, ["here.components", "the target's have no names", "index"]),
        ("same", "name", False, ["here.actions", "the target's have no names"]),
    ],
)
def test_what_does_not_exist_is_refused(
    components: Declared, actions: Declared, labels: bool, words: list[str]
) -> None:
    both = Labels(NAMES, ("left", "right")) if labels else Labels()
    with pytest.raises(StillhouseError) as caught:
        correspond(vector(4), vector(4), components, actions, (both, both), "here")
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_side_without_names_is_told() -> None:
    with pytest.raises(StillhouseError, match="the source's have no names"):
        correspond(vector(4), vector(4), "name", "index", (Labels(NAMES), Labels()))


@pytest.mark.parametrize("source", [vector(4), discrete(4), planes(4, 5)])
def test_other_kinds_and_sides_are_refused(source: EnvironmentSpec) -> None:
    with pytest.raises(StillhouseError, match="here: planes_6x6x4 and .* different kinds or sides") as caught:
        correspond(planes(4), source, "index", "index", where="here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("declared", ["index", "name", {"0": "1"}])
def test_discrete_observations_have_no_components(declared: Declared) -> None:
    labels = Labels(NAMES), Labels(NAMES)
    with pytest.raises(StillhouseError, match="components: same is allowed for discrete"):
        correspond(discrete(4), discrete(4), declared, "index", labels, "here")


def test_patterns_choose_what_is_taken() -> None:
    source = trained(one=vector(4))
    network, report, _ = taken(source, "one", vector(4), take=["torso.*", "heads.target.bias"])
    assert set(report.copied) == {
        "torso.dense.0.weight",
        "torso.dense.0.bias",
        "torso.norm.0.weight",
        "torso.norm.0.bias",
        "heads.target.bias",
    }
    fresh = fresh_network(SIZE, "target", vector(4), "q_values", 3)
    key = "adapters.vector_4.dense.weight"
    assert torch.equal(network.get_parameter(key), fresh.get_parameter(key))
    assert not network.get_parameter("heads.target.weight").any()
    with pytest.raises(StillhouseError, match=r"take: 'adapter\.\*' matches no tensor; there are adapters"):
        taken(source, "one", vector(4), take=["torso.*", "adapter.*"])
    with pytest.raises(StillhouseError, match="'heads.target.weight' matches no tensor"):  # it would be new
        taken(source, "one", vector(4), output="logits", take=["torso.*", "heads.target.weight"])


def test_what_is_fresh_is_what_scratch_begins_with_and_nothing_else_moves() -> None:
    source = trained(one=vector(4), grid=planes(4))
    before = torch.random.get_rng_state()
    network, report, _ = taken(source, "", vector(9, 3))
    assert torch.equal(before, torch.random.get_rng_state())
    fresh = fresh_network(SIZE, "target", vector(9, 3), "q_values", 3)
    adapters = [key for key in report.new if not key.startswith("heads.")]
    assert adapters == [key for key in fresh.state_dict() if key.startswith("adapters.")]
    for key in adapters:
        assert torch.equal(network.get_parameter(key), fresh.get_parameter(key))


def test_the_source_is_not_changed() -> None:
    source = trained(one=vector(4))
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    network, _, _ = taken(source, "one", vector(4))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())


def test_observations_are_shown_by_hand() -> None:
    given, wanted = vector(3).observation, vector(4).observation
    seen = torch.tensor([[1.0, 2.0, 3.0]])
    assert show(seen, (2, -1, 0, 0), given, wanted).tolist() == [[3.0, 0.0, 1.0, 1.0]]
    assert seen.tolist() == [[1.0, 2.0, 3.0]]
    values = torch.tensor([4, 0])  # as many as there are components, or not: they are one value each
    for count in (2, 5):
        spec = discrete(count).observation
        assert torch.equal(show(values, range(count), spec, spec), values)
    grid = observe(planes(3))
    turned = show(grid, (1, -1), planes(3).observation, planes(2, first=True).observation)
    assert turned.shape == (7, 2, 6, 6)
    assert torch.equal(turned[:, 0], grid[..., 1]) and not turned[:, 1].any()
    back = show(turned, (0,), planes(2, first=True).observation, planes(1).observation)
    assert torch.equal(back[..., 0], grid[..., 1])


def test_a_source_of_which_nothing_fits_is_refused() -> None:
    bare = NetworkSize(features=16)  # no torso
    network = build_network(NetworkSpec(size=bare, environments={"one": vector(4)}, output="q_values"), 0)
    with pytest.raises(StillhouseError, match="nothing of 'small' fits the target"):
        target_network(Source("small", network, ""), "target", vector(6), 0)
