"""Aggregation: averages by hand, end points bit by bit, the greedy soup on scores that are made up, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stillhouse.envs.make import EnvironmentConfig
from stillhouse.errors import StillhouseError
from stillhouse.meta.aggregation import (
    AggregationConfig,
    Validation,
    aggregate,
    average,
    check_same_structure,
)
from stillhouse.meta.weight_matching import permutation_spaces, permute
from stillhouse.networks.multi_task import (
    MultiTaskNetwork,
    NetworkSize,
    NetworkSpec,
    build_network,
    parameter_count,
)
from stillhouse.types import EnvironmentSpec, ObservationSpec, OutputKind

torch.set_num_threads(1)

CARTPOLE = EnvironmentConfig(id="CartPole-v1")


def build(
    seed: int = 0,
    name: str = "cartpole",
    inputs: int = 4,
    actions: int = 2,
    output: OutputKind = "logits",
    **size: Any,
) -> MultiTaskNetwork:
    observation = ObservationSpec(kind="vector", shape=(inputs,))
    spec = NetworkSpec(
        size=NetworkSize.model_validate({"features": 8, "torso": (6,)} | size),
        environments={name: EnvironmentSpec(observation=observation, actions=actions)},
        output=output,
    )
    return build_network(spec, seed)


def filled(value: float) -> MultiTaskNetwork:
    network = build()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(value)
    return network


def first_weight(network: MultiTaskNetwork) -> float:
    return float(next(network.parameters()).detach().flatten()[0])


def same(first: MultiTaskNetwork, second: MultiTaskNetwork) -> bool:
    bits = [
        torch.cat([p.detach().flatten() for p in network.parameters()]).view(torch.int32)
        for network in (first, second)
    ]
    return torch.equal(bits[0], bits[1])


def test_averages_by_hand() -> None:
    networks = {"a": filled(1.0), "b": filled(2.0), "c": filled(6.0)}
    uniform = aggregate(AggregationConfig(), networks, {}, seed=0)
    assert first_weight(uniform.network) == 3.0
    assert uniform.report["taken"] == ["a", "b", "c"] and uniform.report["scores"] == {}
    weighted = AggregationConfig(method="weighted", weights={"a": 3, "c": 1})
    found = aggregate(weighted, networks, {}, seed=0)
    assert first_weight(found.network) == 2.25  # (3 * 1 + 6) / 4
    assert found.report["weights"] == {"a": 0.75, "c": 0.25}
    quarter = AggregationConfig(method="interpolation", alpha=0.25)
    assert first_weight(aggregate(quarter, {"a": filled(1.0), "c": filled(6.0)}, {}, seed=0).network) == 4.75


@given(seed=st.integers(0, 1000), count=st.integers(2, 7))
@settings(max_examples=20, deadline=None)
def test_the_average_of_one_network_with_itself_is_itself(seed: int, count: int) -> None:
    network = build(seed)
    assert same(average([network] * count), network)


def test_the_ends_of_an_interpolation_are_the_sources() -> None:
    one, other = build(0), build(1)
    with torch.no_grad():
        one.heads["cartpole"].bias.fill_(-0.0)  # type: ignore[union-attr,operator]
    for alpha, wanted in ((1.0, one), (0.0, other)):
        config = AggregationConfig(method="interpolation", alpha=alpha)
        found = aggregate(config, {"one": one, "other": other}, {}, seed=0)
        assert same(found.network, wanted)
        assert found.network is not wanted and not found.network.training
    assert same(average([one, other], [2.0, 0.0]), one)
    middle = aggregate(AggregationConfig(method="interpolation"), {"one": one, "other": other}, {}, seed=0)
    assert not same(middle.network, one) and not same(middle.network, other)


def test_alignment_undoes_a_renumbering() -> None:
    network = build(0)
    orders = {name: list(range(space.size))[::-1] for name, space in permutation_spaces(network).items()}
    renumbered = permute(network, orders)  # type: ignore[arg-type]
    networks = {"one": network, "other": renumbered}
    found = aggregate(AggregationConfig(align=True), networks, {}, seed=0)
    assert same(found.network, network)
    assert found.report["matching"]["other"]["units_moved"] == 14
    assert not same(aggregate(AggregationConfig(), networks, {}, seed=0).network, network)


def test_the_sources_stay_as_they_are() -> None:
    one, other = build(0), build(1)
    before = [parameter.clone() for network in (one, other) for parameter in network.parameters()]
    found = aggregate(AggregationConfig(align=True), {"one": one, "other": other}, {}, seed=0).network
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
    after = [parameter for network in (one, other) for parameter in network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_greedy_soup_by_hand() -> None:
    # The score of a soup is minus its distance from 3. Alone: a -2, b -1, c 0.5 away...
    networks = {"a": filled(5.0), "b": filled(2.0), "c": filled(3.5), "d": filled(1.0)}
    config = AggregationConfig(method="greedy_soup")
    found = aggregate(config, networks, {}, seed=0, score=lambda network: -abs(first_weight(network) - 3))
    report = found.report
    assert report["scores"] == {"a": -2, "b": -1, "c": -0.5, "d": -2}
    # c; with b: 2.75, kept; with a: 3.5, worse; with d: 2.17, worse. Of equal scores, the one named first is tried first.
    assert [trial["candidate"] for trial in report["trials"]] == ["b", "a", "d"]
    assert [trial["kept"] for trial in report["trials"]] == [True, False, False]
    assert [trial["to_keep"] for trial in report["trials"]] == [-0.5, -0.25, -0.25]
    assert report["trials"][1]["score"] == pytest.approx(-0.5)
    assert report["taken"] == ["c", "b"] and first_weight(found.network) == 2.75


def test_a_candidate_that_changes_nothing_is_kept() -> None:
    networks = {"a": build(0), "b": build(1)}
    config = AggregationConfig(method="greedy_soup")
    assert aggregate(config, networks, {}, seed=0, score=lambda _: 1.0).report["taken"] == ["a", "b"]


def test_greedy_soup_plays_the_validation_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    import stillhouse.meta.aggregation as module

    played = []
    inner = module.evaluate

    def spy(*arguments: Any) -> Any:
        played.append(arguments)
        return inner(*arguments)

    monkeypatch.setattr(module, "evaluate", spy)
    networks = {"a": build(0), "b": build(1)}
    config = AggregationConfig(method="greedy_soup", episodes=4, num_envs=2)
    first, second = (aggregate(config, networks, {"cartpole": CARTPOLE}, seed=3) for _ in range(2))
    assert first.report == second.report and same(first.network, second.network)
    assert {call[-1] for call in played} == {"validation"} and {call[3] for call in played} == {3}
    best = max(first.report["scores"], key=lambda name: first.report["scores"][name])
    assert first.report["taken"][0] == best


class Scripted(Validation):
    """Returns that are made up, by the network's first weight."""

    def returns(self, network: MultiTaskNetwork, epsilon: float = 0.0) -> dict[str, float]:
        if epsilon:
            return {"x": 0.0, "y": -100.0, "z": 7.0}
        value = first_weight(network)
        return {"x": value, "y": -100 + 10 * (4 - value), "z": 0.0}


def test_scores_of_several_environments_are_shares_of_the_best() -> None:
    networks = {"a": filled(1.0), "b": filled(2.0)}
    score = Scripted(dict.fromkeys("xyz", CARTPOLE), networks, 1, 0)
    # x: 1 of 2, y: 30 of 30; z is left out, where none is better than random play.
    assert score(networks["a"]) == pytest.approx((0.5 + 1) / 2)
    assert score(networks["b"]) == pytest.approx((1 + 20 / 30) / 2)
    hopeless = {"a": filled(-50.0)}
    with pytest.raises(StillhouseError, match="no network is better than random play in x, z"):
        Scripted(dict.fromkeys("xz", CARTPOLE), hopeless, 1, 0)


@pytest.mark.parametrize(
    ("other", "field", "values"),
    [
        ({"output": "q_values", "features": 9}, "output", "logits and q_values"),
        ({"actions": 3, "features": 9}, "environments.cartpole.actions", "2 and 3"),
        ({"inputs": 5}, "environments.cartpole.observation.shape", r"\[4\] and \[5\]"),
        ({"name": "pole"}, "environments.cartpole.actions", "2 and none"),
        ({"features": 9, "torso": (7,)}, "size.features", "8 and 9"),
        ({"torso": (6, 6)}, "size.torso", r"\[6\] and \[6, 6\]"),
        ({"layer_norm": True}, "size.layer_norm", "False and True"),
        ({"recurrent": "gru"}, "size.recurrent", "none and gru"),
    ],
)
def test_networks_of_other_structures_are_refused(other: dict[str, Any], field: str, values: str) -> None:
    networks = {"one": build(), "two": build(), "three": build(**other)}
    with pytest.raises(StillhouseError, match=f"^'one' and 'three' differ in {field}: {values};"):
        aggregate(AggregationConfig(), networks, {}, seed=0)


def test_bad_input_is_named() -> None:
    networks = {"one": build(0), "two": build(1), "three": build(2)}
    with pytest.raises(StillhouseError, match="needs two networks or more, and 1 was given"):
        check_same_structure({"one": networks["one"]})
    with pytest.raises(StillhouseError, match="interpolation is for 2 networks, and 3 were given"):
        aggregate(AggregationConfig(method="interpolation"), networks, {}, seed=0)
    unknown = AggregationConfig(method="weighted", weights={"four": 1})
    with pytest.raises(StillhouseError, match="weights: four is no network; allowed are one, two, three"):
        aggregate(unknown, networks, {}, seed=0)
    with pytest.raises(StillhouseError, match="validation episodes in all of cartpole, and .* for none"):
        aggregate(AggregationConfig(method="greedy_soup"), networks, {}, seed=0)
    for bad in (
        {"method": "weighted"},
        {"weights": {"a": 1}},
        {"method": "weighted", "weights": {"a": -1, "b": 2}},
        {"alpha": 1.5},
    ):
        with pytest.raises(ValidationError):
            AggregationConfig.model_validate(bad)


def test_a_recurrent_network_is_averaged_and_aligned() -> None:
    networks = {"a": build(0, recurrent="gru"), "b": build(1, recurrent="gru")}
    found = aggregate(AggregationConfig(align=True), networks, {}, seed=0)
    assert parameter_count(found.network) == parameter_count(networks["a"])
    matching = found.report["matching"]["b"]
    assert matching["distance_after"] < matching["distance_before"]
