"""Fine-tuning: the fitted Q head, which layers move and when, the pull to the start, judging, exact resume."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.agents import make_learner
from stillhouse.checkpoint import load_state, save_state
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.networks.multi_task import (
    MultiTaskNetwork,
    NetworkSize,
    NetworkSpec,
    build_network,
    parameter_count,
)
from stillhouse.networks.parameters import FlatParameters
from stillhouse.transfer.fine_tuning import (
    FineTuneConfig,
    FineTuning,
    Mode,
    Origin,
    Schedule,
    StartingPoint,
    fit_head,
    layer_paces,
)
from stillhouse.transfer.initialisation import Source, correspond, target_network
from stillhouse.types import EnvironmentSpec, ObservationSpec, OutputKind

torch.set_num_threads(1)
VECTOR = ObservationSpec(kind="vector", shape=(4,))
CARTPOLE = EnvironmentSpec(observation=VECTOR, actions=2)
LONGER = EnvironmentConfig(id="stillhouse/CartPole-v1", options={"pole_length": 1.0})


def student(output: OutputKind) -> MultiTaskNetwork:
    size = NetworkSize(features=16, torso=(8,), layer_norm=True)
    return build_network(NetworkSpec(size=size, environments={"cartpole": CARTPOLE}, output=output), 5)


def taken(output: OutputKind, learner: OutputKind = "q_values") -> tuple[MultiTaskNetwork, Origin]:
    source = Source("student", student(output), "cartpole")
    correspondence = correspond(CARTPOLE, CARTPOLE, "same", "index")
    network, report = target_network(source, "longer", CARTPOLE, 0, learner, correspondence)
    return network, Origin(source, correspondence, report, None)


class LinearQ:
    """A dataset whose Q-values are a known linear function of the network's features."""

    def __init__(self, network: MultiTaskNetwork) -> None:
        self._observations = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
        self.weights = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)) * 10
        with torch.no_grad():
            features = network.features(torch.from_numpy(self._observations), "longer")
            self._outputs = (features @ self.weights + torch.tensor([100.0, -50.0])).numpy()

    def __len__(self) -> int:
        return 500

    def observations(self, rows: np.ndarray) -> np.ndarray:
        return self._observations[rows]

    def outputs(self, rows: np.ndarray) -> np.ndarray:
        return self._outputs[rows]


def test_the_head_is_fitted_to_q_values_and_nothing_else_moves() -> None:
    network, _ = taken("logits")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    dataset = LinearQ(network)
    assert fit_head(network, "longer", dataset, "q_values", ridge=1e-9) > 0.999
    rows = np.arange(50)
    predicted = network(torch.from_numpy(dataset.observations(rows)), "longer").detach().numpy()
    np.testing.assert_allclose(predicted, dataset.outputs(rows), atol=0.05)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"heads.longer.weight", "heads.longer.bias"}


def test_logits_are_never_taken_for_q_values() -> None:
    network, _ = taken("logits")
    with pytest.raises(ValueError, match="cannot be fitted to logits"):
        fit_head(network, "longer", LinearQ(network), "logits")


SETTINGS: dict[str, Any] = {
    "algorithm": "pqn",
    "env_steps": 2048,
    "num_envs": 8,
    "rollout_length": 16,
    "minibatches": 4,
    "epsilon_start": 0.2,
}


PPO_SETTINGS: dict[str, Any] = {
    "algorithm": "ppo",
    "env_steps": 2048,
    "num_envs": 8,
    "rollout_length": 16,
    "minibatches": 4,
    "critic_warmup": 0.25,
}


def fine_tuning(mode: Mode = "gradual", output: OutputKind = "q_values") -> FineTuning:
    network, origin = taken(output, output)
    settings = PPO_SETTINGS if output == "logits" else SETTINGS
    learner = make_learner(settings, "longer", LONGER, 0, network=network)
    config = FineTuneConfig(frozen_fraction=0.5, evaluations=4, evaluation_episodes=3)
    schedule = Schedule(
        mode, network.layer_names("longer"), origin.tensors.taken, frozen_fraction=config.frozen_fraction
    )
    return FineTuning(config, learner, LONGER, 2048, schedule, 0, origin)


def moved(run: FineTuning) -> dict[str, int]:
    """Each tensor's env steps at the first report after which it had moved; -1 where it never did."""
    parameters = run.learner.parameters
    start = parameters.values.detach().clone()
    found = dict.fromkeys(parameters.slices, -1)
    began = 0
    for report in run.train():
        for name, where in parameters.slices.items():
            if found[name] < 0 and not torch.equal(parameters.values[where], start[where]):
                found[name] = began
        began = report.done
    return found


def test_layers_are_freed_from_the_head_down() -> None:
    found = moved(fine_tuning())
    # Two layers below the head: the upper one after a quarter of the budget, the lower after a half.
    assert found["heads.longer.weight"] == 0
    assert 512 <= found["torso.dense.0.weight"] < 512 + 128
    assert 1024 <= found["adapters.vector_4.dense.weight"] < 1024 + 128
    assert found["heads.source-cartpole.weight"] == -1  # the source's own head is nobody's to train here


def test_head_only_trains_the_head() -> None:
    found = moved(fine_tuning("head_only"))
    assert {name for name, when in found.items() if when >= 0} == {"heads.longer.weight", "heads.longer.bias"}


def test_head_only_trains_what_is_new_too() -> None:
    layers = [["adapters.new.weight"], ["torso.dense.0.weight"], ["heads.longer.weight"]]
    assert Schedule("head_only", layers, taken=["torso.dense.0.weight"]).frozen(0.9) == [
        "torso.dense.0.weight"
    ]


def test_a_layers_pace_falls_with_its_depth() -> None:
    layers = [["a.weight", "a.bias"], ["b.weight"], ["c.weight"]]
    paces = layer_paces(layers, ["a.weight", "b.weight", "c.weight"], 0.5)
    assert paces == {"c.weight": 1.0, "b.weight": 0.5, "a.weight": 0.25}


def test_l2_sp_adds_the_gradient_of_its_penalty() -> None:
    network, _ = taken("q_values")
    parameters = FlatParameters(network, 1e-3)
    start = {name: tensor.detach().clone() for name, tensor in network.named_parameters()}
    penalty = StartingPoint(parameters, ["torso.dense.0.weight"], alpha=0.3)
    with torch.no_grad():
        parameters.values.add_(torch.randn(len(parameters.values)))
    parameters.zero_gradient()
    now = dict(network.named_parameters())["torso.dense.0.weight"].detach().clone().requires_grad_()
    (0.15 * (now - start["torso.dense.0.weight"]).square().sum()).backward()  # alpha / 2 ||w - w_source||^2
    penalty()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    torch.testing.assert_close(gradients["torso.dense.0.weight"], now.grad)
    assert not any(gradients[name].any() for name in gradients if name != "torso.dense.0.weight")  # type: ignore[union-attr]


def test_a_taken_policy_stands_still_while_its_critic_warms_up() -> None:
    run = fine_tuning("full", "logits")
    start = run.learner.parameters.values.detach().clone()
    count = parameter_count(run.learner.network)
    began = 0
    for report in run.train():
        values = run.learner.parameters.values
        assert torch.equal(values[:count], start[:count]) == (began < 512)
        began = report.done
    assert run.curve[1][1] == run.curve[0][1]  # judged at a quarter of the budget: still the student


def test_what_was_frozen_starts_with_a_fresh_optimiser() -> None:
    run = fine_tuning()
    frozen_steps = [0]
    for report in run.train():
        step = run.learner.parameters.get_state()["step"]
        frozen_steps.append(step)
        if report.done > 1024 + 128:
            break
    # The count grows while something is frozen, starts again from 0 once it is not, and goes on.
    drops = [now for last, now in itertools.pairwise(frozen_steps) if now < last]
    assert drops == [0, 0]  # when the first layer was freed, and when the second was


def test_judged_at_the_start_and_at_even_points_to_the_end() -> None:
    run = fine_tuning("full")
    list(run.train())
    points = [env_steps for env_steps, _ in run.curve]
    assert points[0] == 0 and points[-1] == 2048
    # The first report at or after each even point; a rollout is 128 env steps.
    assert all(
        0 <= point - wanted < 128 for point, wanted in zip(points, (0, 512, 1024, 1536, 2048), strict=True)
    )


@pytest.mark.parametrize("output", ["q_values", "logits"])
def test_resumes_to_the_same_bytes(tmp_path: Path, output: OutputKind) -> None:
    whole = fine_tuning(output=output)
    reports = list(whole.train())
    for stop in (2, len(reports) // 2 - 1, len(reports) // 2, len(reports) - 3):
        interrupted = fine_tuning(output=output)
        for count, _ in enumerate(interrupted.train()):
            if count == stop:
                break
        save_state(tmp_path / "state", interrupted.get_state())
        resumed = fine_tuning(output=output)
        resumed.set_state(load_state(tmp_path / "state"))
        list(resumed.train())
        assert resumed.curve == whole.curve
        assert torch.equal(resumed.learner.parameters.values, whole.learner.parameters.values)
