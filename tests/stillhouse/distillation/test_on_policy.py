"""On-policy distillation: who acts, what is learnt, exact continuation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stillhouse.checkpoint import load_state, save_state
from stillhouse.distillation import on_policy
from stillhouse.distillation.buffer import LabelledBuffer
from stillhouse.distillation.on_policy import OnPolicyConfig, OnPolicyDistillation
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import Episodes
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize, NetworkSpec, build_network
from stillhouse.types import EnvironmentSpec, ObservationSpec

torch.set_num_threads(1)

SIZE = NetworkSize(features=16, torso=(16,))
CARTPOLE = EnvironmentConfig(id="CartPole-v1")


def teacher(name: str, seed: int = 0) -> MultiTaskNetwork:
    spec = NetworkSpec(
        size=NetworkSize(features=8, torso=()),
        environments={
            name: EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(4,)), actions=2)
        },
        output="q_values",
    )
    return build_network(spec, seed)


def distillation(datasets: dict[str, LabelledBuffer] | None = None, **changes: Any) -> OnPolicyDistillation:
    settings: dict[str, Any] = {
        "num_envs": 8,
        "updates": 60,
        "evaluation_interval": 20,
        "batch_size": 32,
        "warmup_steps": 10,
        "size": SIZE,
        "temperature": 0.1,
    }
    config = OnPolicyConfig(method="on_policy", **{**settings, **changes})
    names = ("a", "b")
    teachers = {name: teacher(name, seed) for seed, name in enumerate(names)}
    environments = dict.fromkeys(names, CARTPOLE)
    return OnPolicyDistillation(config, teachers, environments, seed=3, datasets=datasets or {})


def test_the_student_learns_to_agree_with_each_teacher() -> None:
    training = distillation(updates=400, evaluation_interval=100)
    reports = list(training.train())
    assert [report.done for report in reports] == [100, 200, 300, 400]
    assert reports[-1].metrics["loss/distill"] < 0.5 * reports[0].metrics["loss/distill"]
    observations = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32) * 0.1
    student = training.student()
    for seed, name in enumerate(("a", "b")):
        wanted = teacher(name, seed)(torch.from_numpy(observations), name).argmax(1)
        found = student(torch.from_numpy(observations), name).argmax(1)
        assert (wanted == found).float().mean() > 0.9
    assert training.env_steps == (10 + 200) * 8 * 2


@pytest.mark.parametrize(("share", "who"), [(1.0, "teacher"), (0.0, "student")])
def test_who_acts(share: float, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training = distillation(teacher_share=share, teacher_share_fraction=1.0, updates=2, updates_per_step=1)
    for actor in training._actors.values():
        actor.teacher = lambda observations: np.tile([1.0, 0.0], (len(observations), 1)).astype(np.float32)
    for name in training._students:
        training._students[name] = lambda observations: np.tile([0.0, 1.0], (len(observations), 1))
    training._act(1.0)  # the teacher alone, whatever the share is
    taken: list[np.ndarray] = []
    for actor in training._actors.values():
        step = actor.envs.step
        monkeypatch.setattr(
            actor.envs, "step", lambda actions, step=step: (taken.append(actions), step(actions))[1]
        )
    training._act(training.teacher_share())
    assert {int(action) for action in np.concatenate(taken)} == {0 if who == "teacher" else 1}


def test_the_teachers_share_falls_linearly() -> None:
    training = distillation(teacher_share=0.8, teacher_share_fraction=0.5, updates=100)
    shares = []
    for updates in (0, 25, 50, 99):
        training.training.updates = updates
        shares.append(training.teacher_share())
    assert shares == pytest.approx([0.8, 0.4, 0.0, 0.0])


def test_the_teacher_may_act_alone() -> None:
    training = distillation(teacher_share=1.0, teacher_share_end=1.0, updates=100)
    for updates in (0, 50, 99):
        training.training.updates = updates
        assert training.teacher_share() == 1.0


CHANGES: dict[str, dict[str, Any]] = {
    "distill": {"teacher_share": 0.5, "epsilon": 0.1},
    "validation": {"validation_episodes": 4},
    "expected_entropy": {"objective": "expected_entropy", "expected_entropy": {"rollout_length": 8}},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_interrupted_and_whole_training_end_in_the_same_weights(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Episodes(np.zeros(4), np.ones(4, np.int64), np.zeros(4, np.bool_))
    really = on_policy.evaluate
    # The test's teachers are random networks, no better than random play: let that have a return of 0.
    monkeypatch.setattr(
        on_policy,
        "evaluate",
        lambda policy, environment, episodes, seed, epsilon, stream: (
            nothing if epsilon else really(policy, environment, episodes, seed, stream=stream)
        ),
    )
    whole = distillation(**changes)
    reports = list(whole.train())
    first = distillation(**changes)
    training = first.train()
    next(training)
    save_state(tmp_path / "state", first.get_state())
    next(training)  # what comes after the save is lost
    second = distillation(**changes)
    second.set_state(load_state(tmp_path / "state"))
    assert [report.metrics for report in second.train()] == [report.metrics for report in reports[1:]]
    assert torch.equal(whole.training.parameters.values, second.training.parameters.values)
    assert torch.equal(weights(whole.student()), weights(second.student()))
    assert whole.env_steps == second.env_steps
    assert whole.best == second.best


def weights(network: MultiTaskNetwork) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach()


def test_the_last_weights_are_the_result() -> None:
    training = distillation()
    reports = list(training.train())
    assert training.best["update"] == 60
    assert training.best["eval/agreement"] == reports[-1].metrics["eval/agreement"]
    assert torch.equal(weights(training.student()), training.training.parameters.values)


def test_validation_returns_choose_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teachers have 100, random play 20, and the student 60, 90 and 70 one after the other: the second is the best."""
    measured: list[float] = []

    def played(policy, environment, episodes, seed, epsilon=0.0, **rest) -> Episodes:
        assert episodes == 7
        assert rest == {"stream": "validation"}
        if epsilon:
            value = 20.0
        elif policy in training._students.values():
            value = [60.0, 90.0, 70.0][len(measured) // 2]
            measured.append(value)
        else:
            value = 100.0
        return Episodes(np.full(episodes, value), np.ones(episodes, np.int64), np.zeros(episodes, np.bool_))

    monkeypatch.setattr(on_policy, "evaluate", played)
    training = distillation(validation_episodes=7)
    students = []
    scores = []
    for report in training.train():
        students.append(training.training.parameters.values.detach().clone())
        scores.append(report.metrics["eval/score"])
    assert scores == pytest.approx([0.5, 0.875, 0.625])
    assert training.best["update"] == 40
    assert torch.equal(weights(training.student()), students[1])


def test_a_teacher_no_better_than_random_cannot_normalise(monkeypatch: pytest.MonkeyPatch) -> None:
    same = Episodes(np.full(5, 3.0), np.ones(5, np.int64), np.zeros(5, np.bool_))
    monkeypatch.setattr(on_policy, "evaluate", lambda *_, **__: same)
    with pytest.raises(StillhouseError, match=r"a: over 5 validation episodes.*3, not above random.*3"):
        list(distillation(validation_episodes=5).train())


def dataset(
    name: str, rows: int, seed: int = 0, output: str = "q_values", actions: int = 2
) -> LabelledBuffer:
    """Random observations that the test's teacher labelled; every tenth is held out."""
    spec = EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(4,)), actions=actions)
    buffer = LabelledBuffer(spec, output, 10, rows)  # type: ignore[arg-type]
    observations = np.random.default_rng(1).normal(size=(rows, 4)).astype(np.float32)
    with torch.no_grad():
        labels = teacher(name, seed)(torch.from_numpy(observations), name).numpy()
    labels = np.resize(labels, (rows, actions))
    buffer.append(observations, labels, np.arange(rows) % 10 == 0)
    return buffer


def test_buffers_may_start_from_datasets() -> None:
    given = {name: dataset(name, 3000, seed) for seed, name in enumerate(("a", "b"))}
    training = distillation(given, capacity=1000, updates=2, updates_per_step=1)
    buffer = training._actors["a"].buffer
    assert len(buffer) == 1000
    assert np.array_equal(
        buffer.observations(np.array([0, 999])), given["a"].observations(np.array([0, 2999]))
    )
    _, held = buffer.split(0.1, np.random.default_rng(0))
    assert 80 < len(held) < 120
    list(training.train())
    assert training.env_steps == 2 * 8 * 2  # no warm-up
    later = distillation({"a": given["a"]}, updates=2, updates_per_step=1)
    list(later.train())
    assert later.env_steps == (10 + 2) * 8 * 2  # b has none


def test_unsuitable_datasets_are_refused() -> None:
    with pytest.raises(StillhouseError, match=r"for c was given.*allowed are a, b"):
        distillation({"c": dataset("c", 100)})
    with pytest.raises(
        StillhouseError, match=r"a: the dataset must have.*with logits was given.*with q_values is"
    ):
        distillation({"a": dataset("a", 100, output="logits")})
    with pytest.raises(StillhouseError, match=r"a: the dataset must have.*actions=3.*actions=2"):
        distillation({"a": dataset("a", 100, actions=3)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "nll"}, "a loss of its own: loss kl"),
        ({"feature_weight": 0.1}, "no feature_weight"),
        ({"epsilon": 0.1}, "own sampled actions: epsilon"),
        ({"teacher_share": 0.5}, "teacher_share"),
        ({"teacher_share_end": 0.5}, "teacher_share_end"),
    ],
)
def test_what_expected_entropy_cannot_do_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OnPolicyConfig(method="on_policy", objective="expected_entropy", **settings)


def test_no_early_stopping() -> None:
    with pytest.raises(ValidationError, match="patience"):
        OnPolicyConfig(method="on_policy", patience=3)
