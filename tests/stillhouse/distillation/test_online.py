"""Online distillation: the student sees improved teachers only, and everything resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.checkpoint import load_state, save_state
from stillhouse.config import parse
from stillhouse.distillation.online import OnlineConfig, OnlineDistillation
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import evaluate, network_policy
from stillhouse.networks.multi_task import MultiTaskNetwork

torch.set_num_threads(1)
SIZE = {"features": 16, "torso": [16], "conv_channels": 4}
TEACHERS: dict[str, dict[str, Any]] = {
    "cartpole": {
        "algorithm": "pqn",
        "env_steps": 1500,
        "num_envs": 8,
        "rollout_length": 16,
        "minibatches": 4,
        "reward_scale": 0.1,
        "network": SIZE,
    },
    # A smaller budget: this teacher is done while the other still learns.
    "breakout": {
        "algorithm": "dqn",
        "env_steps": 800,
        "learning_starts": 100,
        "train_every": 64,
        "updates_per_train": 4,
        "batch_size": 16,
        "network": SIZE,
    },
}
ENVIRONMENTS = {
    "cartpole": EnvironmentConfig(id="CartPole-v1"),
    "breakout": EnvironmentConfig(id="MinAtar/Breakout-v0"),
}
SETTINGS: dict[str, Any] = {
    "method": "online",
    "validation_interval": 500,
    "validation_episodes": 4,
    "transitions": 200,
    "num_envs": 8,
    "updates": 60,
    "batch_size": 16,
    "size": SIZE,
}


def make(
    teachers: dict[str, dict[str, Any]] = TEACHERS, seed: int = 0, **settings: Any
) -> OnlineDistillation:
    return OnlineDistillation(parse(OnlineConfig, {**SETTINGS, **settings}), teachers, ENVIRONMENTS, seed)


def weights(network: MultiTaskNetwork) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])


def test_rounds_end_with_the_budgets() -> None:
    distillation = make()
    reports = list(distillation.train())
    assert len(distillation.curve) == len(reports) == 3
    assert [report.done for report in reports] == [row["env_steps"] for row in distillation.curve]
    assert reports[-1].done == reports[-1].total == 2300
    assert distillation.updates == 60
    # As much of the updates as of the env steps; learners report at 500 env steps or soon after.
    for row, least in zip(distillation.curve, [1000, 1800, 2300]):
        assert least <= row["env_steps"] < least + 2 * 128
        assert row["updates"] == round(60 * row["env_steps"] / 2300)
    for row in distillation.curve:
        for name in TEACHERS:
            assert row[f"best/{name}"] >= row[f"teacher/{name}"]
            assert {f"student/{name}", f"agreement/{name}"} <= set(row)
    assert distillation.best["update"] == 60
    student = distillation.student()
    for name in TEACHERS:
        again = evaluate(network_policy(student, name), ENVIRONMENTS[name], 4, 0, stream="validation")
        assert again.returns.mean() == distillation.curve[-1][f"student/{name}"]


def test_resumed_and_uninterrupted_end_in_the_same_bytes(tmp_path: Path) -> None:
    whole = make(seed=3, loss="mse")
    list(whole.train())
    current = make(seed=3, loss="mse")
    while current.updates < 60:  # interrupted after every round
        next(current.train())
        save_state(tmp_path / "state", current.get_state())
        current = make(seed=3, loss="mse")
        current.set_state(load_state(tmp_path / "state"))
    assert current.curve == whole.curve
    assert current.best == whole.best
    assert torch.equal(current.training.parameters.values, whole.training.parameters.values)
    assert torch.equal(weights(current.student()), weights(whole.student()))
    assert list(current.train()) == []


def test_only_an_improved_teacher_refreshes_its_data() -> None:
    distillation = make(teachers={"cartpole": {**TEACHERS["cartpole"], "env_steps": 2500}})
    teacher = distillation._teachers["cartpole"]
    returns = iter([10.0, 9.0, 10.0, 12.0, 11.0])
    students = distillation._students.values()
    distillation._judge = lambda policy, _: 0.0 if policy in students else next(returns)
    rows = np.arange(200)
    collected, labels = [], []
    for _ in distillation.train():
        collected.append(teacher.datasets)
        labels.append(teacher.buffer.outputs(rows))
        if len(collected) in (1, 4):
            # What the teacher says now, in the units of the environment's rewards.
            said = teacher.learner.outputs(teacher.buffer.observations(rows)) / 0.1
            np.testing.assert_allclose(labels[-1], said, rtol=1e-4)
    assert collected == [1, 1, 1, 2, 2]
    assert [row["best/cartpole"] for row in distillation.curve] == [10, 10, 10, 12, 12]
    for before, after, same in zip(labels, labels[1:], [True, True, False, True]):
        assert np.array_equal(before, after) == same


def test_the_copies_held_out_stay_the_same() -> None:
    distillation = make(holdout_fraction=0.25)
    next(distillation.train())
    buffer = distillation._teachers["breakout"].buffer
    assert len(buffer) == 200
    rows, held = buffer.split(0.25, np.random.default_rng(0))
    assert len(rows) == 150
    np.testing.assert_array_equal(held % 8, np.tile([0, 1], 25))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(StillhouseError, match=r"no environment.*pong; given are cartpole, breakout"):
        make(teachers={"pong": TEACHERS["cartpole"]})
    with pytest.raises(StillhouseError, match=r"algorithm: 'sarsa' was given; allowed are"):
        make(teachers={"cartpole": {"algorithm": "sarsa"}})
    for field in ("patience", "environment_patience", "feature_weight"):
        with pytest.raises(StillhouseError, match=f"^distill_student.x.{field}"):
            parse(OnlineConfig, {"method": "online", field: 1}, "distill_student.x")


@pytest.mark.learning
def test_the_student_follows_its_teacher() -> None:
    teacher = {
        "algorithm": "pqn",
        "env_steps": 100_000,
        "num_envs": 32,
        "rollout_length": 32,
        "minibatches": 16,
        "epochs": 2,
        "learning_rate": 1e-3,
        "reward_scale": 0.1,
        "network": {"features": 64, "torso": [64], "layer_norm": True},
    }
    last = []
    for seed in range(5):
        distillation = make(
            {"cartpole": teacher},
            seed,
            validation_interval=10_000,
            validation_episodes=32,
            transitions=10_000,
            num_envs=32,
            updates=6000,
            batch_size=128,
            size={"features": 32, "torso": [32]},
        )
        list(distillation.train())
        last.append(distillation.curve[-1])
    best = np.array([row["best/cartpole"] for row in last])
    student = np.array([row["student/cartpole"] for row in last])
    assert best.mean() > 200
    assert (student / best).mean() > 0.9
