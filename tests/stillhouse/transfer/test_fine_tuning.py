"""Fine-tuning: what is taken from a student, the fitted Q head, freezing, judging, exact resume."""

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
from stillhouse.transfer.fine_tuning import FineTuneConfig, FineTuning, Mode, fit_head, target_network
from stillhouse.types import EnvironmentSpec, ObservationSpec, OutputKind

torch.set_num_threads(1)
VECTOR = ObservationSpec(kind="vector", shape=(4,))
CARTPOLE = EnvironmentSpec(observation=VECTOR, actions=2)
OTHER = EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(6,)), actions=3)
THREE_ACTIONS = EnvironmentSpec(observation=VECTOR, actions=3)
LONGER = EnvironmentConfig(id="stillhouse/CartPole-v1", options={"pole_length": 1.0})


def student(output: OutputKind) -> MultiTaskNetwork:
    size = NetworkSize(features=16, torso=(8,), layer_norm=True)
    return build_network(NetworkSpec(size=size, environments={"cartpole": CARTPOLE}, output=output), 5)


def same(left: torch.nn.Module, right: torch.nn.Module, key: str, theirs: str = "") -> bool:
    return torch.equal(left.state_dict()[key], right.state_dict()[theirs or key])


def test_same_spaces_keep_everything_of_a_q_student() -> None:
    source = student("q_values")
    network, report = target_network(source, "longer", CARTPOLE, "cartpole", 0, "full")
    assert not report.new and not report.sliced
    observations = torch.randn(7, 4)
    torch.testing.assert_close(network(observations, "longer"), source(observations, "cartpole"))
    assert network.spec.output == "q_values"


def test_a_logits_student_gives_no_head() -> None:
    source = student("logits")
    network, report = target_network(source, "longer", CARTPOLE, "cartpole", 0, "full")
    assert report.new == ["heads.longer.weight", "heads.longer.bias"]
    assert same(network, source, "torso.dense.0.weight") and same(
        network, source, "adapters.vector_4.dense.weight"
    )
    assert not network.heads["longer"].weight.any()  # starts at 0, not from noise


def test_a_policy_gradient_learner_takes_a_logits_students_policy_as_it_is() -> None:
    source = student("logits")
    network, report = target_network(source, "longer", CARTPOLE, "cartpole", 0, "full", "logits")
    assert not report.new and not report.sliced and network.spec.output == "logits"
    observations = torch.randn(7, 4)
    torch.testing.assert_close(network(observations, "longer"), source(observations, "cartpole"))


def test_q_values_are_never_taken_for_a_policy() -> None:
    source = student("q_values")
    network, report = target_network(source, "longer", CARTPOLE, "cartpole", 0, "full", "logits")
    assert report.new == ["heads.longer.weight", "heads.longer.bias"]
    assert same(network, source, "torso.dense.0.weight")
    assert not network.heads["longer"].weight.any()  # the uniform policy


def test_an_adapter_of_the_environments_own_is_taken_from_the_source() -> None:
    planes = EnvironmentSpec(observation=ObservationSpec(kind="planes", shape=(10, 10, 4)), actions=6)
    size = NetworkSize(conv_channels=4, features=16, share_planes=True)
    source = build_network(NetworkSpec(size=size, environments={"breakout": planes}, output="logits"), 5)
    network, report = target_network(source, "flipped", planes, "breakout", 0, "full", "logits")
    assert not report.new and not report.sliced
    observations = torch.rand(3, 10, 10, 4) < 0.5
    torch.testing.assert_close(network(observations, "flipped"), source(observations, "breakout"))


def test_a_shared_head_is_taken_from_whatever_environment_shares_it() -> None:
    size = NetworkSize(features=16, share_head=True)
    spec = NetworkSpec(
        size=size, environments={"cartpole": CARTPOLE, "three": THREE_ACTIONS}, output="logits"
    )
    source = build_network(spec, 5)
    network, report = target_network(source, "longer", CARTPOLE, "cartpole", 0, "full", "logits")
    assert not report.new and report.sliced == ["heads.longer.weight", "heads.longer.bias"]
    observations = torch.randn(7, 4)
    torch.testing.assert_close(network(observations, "longer"), source(observations, "cartpole"))


def test_other_spaces_keep_the_torso_only() -> None:
    source = student("q_values")
    network, report = target_network(source, "other", OTHER, "", 0, "frozen")
    assert report.kept and all(key.startswith("torso.") for key in report.kept)
    assert {key.partition(".")[0] for key in report.new} == {"adapters", "heads"}
    assert same(network, source, "torso.dense.0.weight")


def test_a_head_with_other_actions_is_sliced() -> None:
    source = student("q_values")
    network, report = target_network(source, "three", THREE_ACTIONS, "cartpole", 0, "full")
    assert report.sliced == ["heads.three.weight", "heads.three.bias"]
    torch.testing.assert_close(network.heads["three"].weight[:2], source.heads["cartpole"].weight)


def test_scratch_takes_nothing_and_has_the_same_shape() -> None:
    source = student("q_values")
    scratch, report = target_network(source, "longer", CARTPOLE, "cartpole", 0, "scratch")
    full, _ = target_network(source, "longer", CARTPOLE, "cartpole", 0, "full")
    assert not report.kept and not report.sliced
    assert {k: v.shape for k, v in scratch.state_dict().items()} == {
        k: v.shape for k, v in full.state_dict().items()
    }
    assert not same(scratch, source, "torso.dense.0.weight")
    assert scratch.heads["longer"].weight.any()


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
    network, _ = target_network(student("logits"), "longer", CARTPOLE, "cartpole", 0, "full")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    dataset = LinearQ(network)
    assert fit_head(network, "longer", dataset, "q_values", ridge=1e-9) > 0.999
    rows = np.arange(50)
    predicted = network(torch.from_numpy(dataset.observations(rows)), "longer").detach().numpy()
    np.testing.assert_allclose(predicted, dataset.outputs(rows), atol=0.05)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"heads.longer.weight", "heads.longer.bias"}


def test_logits_are_never_taken_for_q_values() -> None:
    network, _ = target_network(student("logits"), "longer", CARTPOLE, "cartpole", 0, "full")
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


def fine_tuning(mode: Mode = "frozen", output: OutputKind = "q_values") -> FineTuning:
    network, report = target_network(student(output), "longer", CARTPOLE, "cartpole", 0, mode, output)
    settings = PPO_SETTINGS if output == "logits" else SETTINGS
    learner = make_learner(settings, "longer", LONGER, 0, network=network)
    config = FineTuneConfig(frozen_fraction=0.5, evaluations=4, evaluation_episodes=3)
    frozen = [name for name in report.kept if not name.startswith("heads.")] if mode == "frozen" else []
    return FineTuning(config, learner, LONGER, 2048, frozen, 0)


def test_frozen_tensors_stay_for_their_part_of_the_budget_and_move_after() -> None:
    run = fine_tuning()
    start = run.learner.parameters.values.detach().clone()
    where = run.learner.parameters.slices["torso.dense.0.weight"]
    head = run.learner.parameters.slices["heads.longer.weight"]
    for report in run.train():
        values = run.learner.parameters.values.detach()
        assert not torch.equal(values[head], start[head])
        if report.done <= 1024:
            assert torch.equal(values[where], start[where])
    assert not torch.equal(run.learner.parameters.values.detach()[where], start[where])


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
    assert drops == [0]


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
