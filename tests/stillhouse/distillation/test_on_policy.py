"""On-policy distillation: who acts, what is learnt, exact continuation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stillhouse.distillation.on_policy import OnPolicyConfig, OnPolicyDistillation
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize, NetworkSpec, build_network
from stillhouse.types import EnvironmentSpec, ObservationSpec

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


def distillation(**changes: Any) -> OnPolicyDistillation:
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
    return OnPolicyDistillation(config, teachers, dict.fromkeys(names, CARTPOLE), seed=3)


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


def test_interrupted_and_whole_training_end_in_the_same_weights() -> None:
    whole = distillation(teacher_share=0.5, epsilon=0.1)
    list(whole.train())
    first = distillation(teacher_share=0.5, epsilon=0.1)
    next(first.train())
    second = distillation(teacher_share=0.5, epsilon=0.1)
    second.set_state(first.get_state())
    list(second.train())
    assert torch.equal(whole.training.parameters.values, second.training.parameters.values)
    assert whole.env_steps == second.env_steps
    assert whole.best == second.best


def test_no_early_stopping() -> None:
    with pytest.raises(ValidationError, match="patience"):
        OnPolicyConfig(method="on_policy", patience=3)
