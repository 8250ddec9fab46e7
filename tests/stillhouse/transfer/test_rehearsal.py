"""Rehearsal: nothing before anything moved, autograd's gradient afterwards, a pull back, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.agents import make_learner
from stillhouse.checkpoint import load_state, save_state
from stillhouse.datasets.reader import Dataset
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize, NetworkSpec, build_network
from stillhouse.networks.parameters import FlatParameters
from stillhouse.transfer.fine_tuning import FineTuneConfig, FineTuning, Origin, Schedule
from stillhouse.transfer.initialisation import Correspondence, Source, correspond, target_network
from stillhouse.transfer.kickstarting import policy_temperature
from stillhouse.transfer.rehearsal import Rehearsal
from stillhouse.types import EnvironmentSpec, ObservationSpec, OutputKind

torch.set_num_threads(1)
CARTPOLE = EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(4,)), actions=2)
OTHER = EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(6,)), actions=3)
LONGER = EnvironmentConfig(id="stillhouse/CartPole-v1", options={"pole_length": 1.0})


class Rows:
    """A dataset of observations."""

    def __init__(self, entries: int, rows: int) -> None:
        self.all = np.random.default_rng(entries).normal(size=(rows, entries)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.all)

    def observations(self, rows: np.ndarray) -> np.ndarray:
        return self.all[rows]


def prepared(
    output: OutputKind, turned: bool = False
) -> tuple[MultiTaskNetwork, MultiTaskNetwork, Correspondence, Origin]:
    size = NetworkSize(features=16, torso=(8,), layer_norm=True)
    spec = NetworkSpec(size=size, environments={"cartpole": CARTPOLE, "other": OTHER}, output=output)
    student = build_network(spec, 5)
    source = Source("student", student, "cartpole")
    components = {"0": "1", "1": "0", "2": "2", "3": "3"}
    correspondence = correspond(CARTPOLE, CARTPOLE, components if turned else "same", "index")
    network, report = target_network(source, "longer", CARTPOLE, 0, output, correspondence)
    return student, network, correspondence, Origin(source, correspondence, report, None)


def rehearse(
    network: MultiTaskNetwork, correspondence: Correspondence, rows: int = 64, weight: float = 2.0
) -> Rehearsal:
    datasets = cast(dict[str, Dataset], {"source-cartpole": Rows(4, 40), "source-other": Rows(6, 30)})
    output = network.spec.output
    return Rehearsal(network, "longer", datasets, output, correspondence, rows, weight, seed=3)


def divergences(student: MultiTaskNetwork, network: MultiTaskNetwork, turned: bool = False) -> Tensor:
    """KL of each environment's policy, on all rows, by hand."""
    found = []
    for name, entries, rows in (("cartpole", 4, 40), ("other", 6, 30)):
        seen = torch.from_numpy(Rows(entries, rows).all)
        temperature = policy_temperature(student, name, seen, student.spec.output)
        shown = seen[:, [1, 0, 2, 3]] if turned and entries == 4 else seen
        policy = torch.softmax(student(seen, name).detach() / temperature, 1)
        log_now = torch.log_softmax(network(shown, f"source-{name}") / temperature, 1)
        found.append((policy * (policy.log() - log_now)).sum(1).mean())
    return torch.stack(found)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("output", ["q_values", "logits"])
def test_nothing_is_pulled_before_anything_moved(output: OutputKind, turned: bool) -> None:
    student, network, correspondence, _ = prepared(output, turned)
    assert divergences(student, network, turned).abs().max() < 1e-6
    parameters = FlatParameters(network, 1e-3)
    rehearsal = rehearse(network, correspondence)
    for _ in range(3):
        rehearsal()
    assert not parameters.gradient.any()  # to the bit: Adam would make steps of what rounding leaves


def move(parameters: FlatParameters, scale: float = 0.1) -> None:
    noise = torch.randn(len(parameters.values), generator=torch.Generator().manual_seed(0))
    parameters.values.data.add_(noise, alpha=scale)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("output", ["q_values", "logits"])
def test_the_gradient_is_that_of_the_weighted_divergence(
    output: OutputKind, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, network, correspondence, _ = prepared(output, turned)
    parameters = FlatParameters(network, 1e-3)
    rehearsal = rehearse(network, correspondence, weight=2.0)
    move(parameters)
    parameters.zero_gradient()
    (2.0 * divergences(student, network, turned).mean()).backward()
    wanted = parameters.gradient.clone()
    parameters.zero_gradient()
    # Every row once, in place of as many drawn ones.
    monkeypatch.setattr(rehearsal, "_random", Everything())
    rehearsal()
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(parameters.gradient, wanted, rtol=1e-3, atol=1e-5)
    rehearsal()  # it adds to what is there
    torch.testing.assert_close(parameters.gradient, 2 * wanted, rtol=1e-3, atol=2e-5)


class Everything:
    """A generator whose draw is every row."""

    def integers(self, high: int, size: int) -> np.ndarray:
        return np.arange(high)


def test_what_was_pushed_away_comes_back() -> None:
    student, network, correspondence, _ = prepared("q_values")
    parameters = FlatParameters(network, 3e-3)
    parameters.penalties.append(rehearse(network, correspondence))
    move(parameters, 0.2)
    far = divergences(student, network)
    for _ in range(150):
        parameters.zero_gradient()
        parameters.step(3e-3)
    near = divergences(student, network)
    assert (far > 0.01).all() and (near < far / 10).all()


def fine_tuning(output: OutputKind) -> FineTuning:
    _, network, correspondence, origin = prepared(output)
    settings: dict[str, Any] = {
        "algorithm": "pqn" if output == "q_values" else "ppo",
        "env_steps": 1024,
        "num_envs": 8,
        "rollout_length": 16,
        "minibatches": 4,
    }
    if output == "logits":
        settings["critic_warmup"] = 0.25
    learner = make_learner(settings, "longer", LONGER, 0, network=network)
    rehearsal = rehearse(network, correspondence)
    learner.parameters.penalties.append(rehearsal)
    config = FineTuneConfig(evaluations=2, evaluation_episodes=2)
    schedule = Schedule("rehearsal", network.layer_names("longer"), origin.tensors.taken)
    return FineTuning(config, learner, LONGER, 1024, schedule, 0, origin, rehearsal)


@pytest.mark.parametrize("output", ["q_values", "logits"])
def test_resumes_to_the_same_bytes(tmp_path: Path, output: OutputKind) -> None:
    whole = fine_tuning(output)
    start = whole.learner.parameters.values.detach().clone()
    reports = list(whole.train())
    assert not torch.equal(whole.learner.parameters.values, start)
    for stop in (1, len(reports) - 3):
        interrupted = fine_tuning(output)
        for count, _ in enumerate(interrupted.train()):
            if count == stop:
                break
        save_state(tmp_path / "state", interrupted.get_state())
        resumed = fine_tuning(output)
        resumed.set_state(load_state(tmp_path / "state"))
        list(resumed.train())
        assert resumed.curve == whole.curve
        assert torch.equal(resumed.learner.parameters.values, whole.learner.parameters.values)


def test_a_policy_stands_still_while_the_critic_warms_up() -> None:
    run = fine_tuning("logits")
    start = {name: tensor.clone() for name, tensor in run.learner.network.state_dict().items()}
    next(run.train())
    assert all(torch.equal(tensor, start[name]) for name, tensor in run.learner.network.state_dict().items())
