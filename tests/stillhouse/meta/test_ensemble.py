"""Ensembles: every combination by hand, evaluated and collected from like any agent, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.datasets.collect import CollectConfig, Teacher, collect
from stillhouse.datasets.reader import Dataset
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import evaluate, network_policy
from stillhouse.losses.distillation import action_gap_temperature
from stillhouse.meta.ensemble import Combination, Ensemble
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


def build(seed: int = 0, output: OutputKind = "logits", actions: int = 2, **size: str) -> MultiTaskNetwork:
    spec = NetworkSpec(
        size=NetworkSize.model_validate({"features": 6} | size),
        environments={
            "cartpole": EnvironmentSpec(
                observation=ObservationSpec(kind="vector", shape=(4,)), actions=actions
            )
        },
        output=output,
    )
    return build_network(spec, seed)


def ensemble(combine: Combination, output: OutputKind = "logits", members: int = 2) -> Ensemble:
    networks = {f"m{seed}": build(seed, output, actions=3) for seed in range(members)}
    return Ensemble(networks, "cartpole", combine, np.random.default_rng(0).normal(size=(50, 4)).astype("f4"))


def test_mean_policy_by_hand() -> None:
    outputs = torch.log(torch.tensor([[[0.5, 0.25, 0.25]], [[0.1, 0.8, 0.1]]])) + 3.0
    found = ensemble("probabilities").combined(outputs)
    torch.testing.assert_close(found.exp(), torch.tensor([[0.3, 0.525, 0.175]]))
    cold = ensemble("probabilities")
    cold.temperatures[:] = 0.5  # squares the odds: 4/6, 1/6, 1/6 and 1/66, 64/66, 1/66
    wanted = (torch.tensor([[4.0, 1, 1]]) / 6 + torch.tensor([[1.0, 64, 1]]) / 66) / 2
    torch.testing.assert_close(cold.combined(outputs).exp(), wanted)


def test_q_values_by_hand() -> None:
    outputs = torch.tensor([[[1.0, 2.0, 3.0]], [[40.0, 10.0, 10.0]]])
    found = ensemble("q_values", "q_values")
    found.scales[:] = 1.0
    torch.testing.assert_close(found.combined(outputs), torch.tensor([[20.5, 6.0, 6.5]]))  # the plain mean
    found.scales[:, 0, 0] = torch.tensor([1.0, 20.0])
    # Means 2 and 20; advantages (-1, 0, 1) and (1, -0.5, -0.5) of scale; mean (0, -0.25, 0.25) times the mean scale 10.5.
    torch.testing.assert_close(found.combined(outputs), torch.tensor([[11.0, 8.375, 13.625]]))


def test_votes_by_hand() -> None:
    outputs = torch.tensor([[[5.0, 0, 0]], [[0, 1.0, 0]], [[0, 1.0, 0]]])
    shares = ensemble("vote", members=3).combined(outputs).exp()
    torch.testing.assert_close(shares, torch.tensor([[1 / 3, 2 / 3, 0]]), rtol=0, atol=1e-3)
    tied = outputs[:2]  # one vote each: the mean policy decides, and the first member is surer
    assert ensemble("vote").combined(tied).argmax() == 0
    assert ensemble("vote").combined(tied.flip(2)).argmax() == 2


def test_calibration_measures_scales_and_temperatures() -> None:
    given = np.random.default_rng(1).normal(size=(200, 4)).astype("f4")
    network = build(0, "q_values", actions=3)
    found = Ensemble({"a": network, "b": build(1, actions=3)}, "cartpole", "probabilities", given)
    outputs = network_policy(network, "cartpole")(given)
    ordered = np.sort(outputs, axis=1)
    wanted = action_gap_temperature(float((ordered[:, 2] - ordered[:, 1]).mean()), 2.0)
    assert float(found.temperatures[0]) == pytest.approx(wanted, rel=1e-5)
    assert float(found.temperatures[1]) == 1.0  # logits are a policy already
    advantages = outputs - outputs.mean(axis=1, keepdims=True)
    assert float(found.scales[0]) == pytest.approx(np.sqrt(np.square(advantages).mean()), rel=1e-5)


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_an_ensemble_of_one_agent_acts_like_it(seed: int) -> None:
    observations = np.random.default_rng(seed).normal(size=(20, 4)).astype("f4")
    for output in ("logits", "q_values"):
        network = build(seed, output, actions=3)  # type: ignore[arg-type]
        alone = network_policy(network, "cartpole")(observations).argmax(axis=1)
        for combine in ("probabilities", "vote", "q_values"):
            if output == "logits" and combine == "q_values":
                continue
            several = Ensemble({"a": network, "b": network}, "cartpole", combine, observations)  # type: ignore[arg-type]
            assert np.array_equal(several(observations).argmax(axis=1), alone)
            assert several.output == ("q_values" if combine == "q_values" else "logits")
            assert several.parameters == 2 * parameter_count(network)


def test_it_is_a_policy_and_a_teacher(tmp_path: Path) -> None:
    found = Ensemble({f"m{seed}": build(seed) for seed in range(3)}, "cartpole")
    played = evaluate(found, CARTPOLE, episodes=4, seed=0)
    assert len(played.returns) == 4 and (played.returns > 0).all()
    teacher = Teacher(found, found.output, "0" * 64, found.parameters)
    for _ in collect(teacher, CARTPOLE, CollectConfig(transitions=200, num_envs=4), 0, tmp_path / "d"):
        pass
    dataset = Dataset.open(tmp_path / "d")
    rows = np.arange(50)
    labels = found(dataset.observations(rows))
    np.testing.assert_allclose(dataset.outputs(rows), labels, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.exp(labels).sum(axis=1), 1, rtol=1e-5)


def test_bad_members_are_named() -> None:
    observations = np.zeros((3, 4), np.float32)
    with pytest.raises(StillhouseError, match="needs one network or more"):
        Ensemble({}, "cartpole")
    with pytest.raises(StillhouseError, match="a: has no head for 'pole'; its environments are cartpole"):
        Ensemble({"a": build()}, "pole")
    with pytest.raises(StillhouseError, match="'a' and 'b' have other spaces for 'cartpole'"):
        Ensemble({"a": build(), "b": build(actions=3)}, "cartpole")
    with pytest.raises(StillhouseError, match="b: gives logits, and an ensemble of q_values"):
        Ensemble({"a": build(0, "q_values"), "b": build()}, "cartpole", "q_values", observations)
    with pytest.raises(StillhouseError, match="calibration: members that give q_values"):
        Ensemble({"a": build(0, "q_values")}, "cartpole")
    with pytest.raises(StillhouseError, match="recurrent is gru"):
        Ensemble({"a": build(recurrent="gru")}, "cartpole")
