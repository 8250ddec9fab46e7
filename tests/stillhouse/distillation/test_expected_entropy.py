"""Expected entropy-regularised distillation: its advantages and its gradient are what they are said to be; it learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.distillation.on_policy import OnPolicyConfig, OnPolicyDistillation
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.vector import Step
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize, NetworkSpec, build_network
from stillhouse.types import EnvironmentSpec, ObservationSpec

torch.set_num_threads(1)

SPEC = EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(4,)), actions=2)


def teacher(seed: int = 0) -> MultiTaskNetwork:
    size = NetworkSize(features=8, torso=())
    return build_network(NetworkSpec(size=size, environments={"cart": SPEC}, output="q_values"), seed)


def training(max_episode_steps: int = 0, **changes: Any) -> OnPolicyDistillation:
    settings: dict[str, Any] = {
        "objective": "expected_entropy",
        "num_envs": 8,
        "updates": 60,
        "evaluation_interval": 20,
        "batch_size": 32,
        "warmup_steps": 2,
        "size": NetworkSize(features=16, torso=(16,)),
        "temperature": 0.1,
    }
    config = OnPolicyConfig(method="on_policy", **{**settings, **changes})
    environment = EnvironmentConfig(id="CartPole-v1", max_episode_steps=max_episode_steps)
    return OnPolicyDistillation(config, {"cart": teacher()}, {"cart": environment}, seed=1)


def divergence_at(student: OnPolicyDistillation, observations: np.ndarray) -> np.ndarray:
    """KL(S || T), by its definition, [N]."""
    with torch.no_grad():
        seen = torch.from_numpy(observations)
        log_student = student.training.network(seen, "cart").double().log_softmax(1)
        policy = (teacher()(seen, "cart").double() / 0.1).softmax(1)
    log_teacher = torch.log(0.99 * policy + 0.01 / 2)
    return (log_student.exp() * (log_student - log_teacher)).sum(1).numpy()


@pytest.mark.parametrize("limit", [6, 0])
@pytest.mark.parametrize("zero_critic", [True, False])
def test_advantages_step_by_step(limit: int, zero_critic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gamma, trace, length = 0.8, 0.9, 40
    student = training(
        limit, expected_entropy={"gamma": gamma, "trace": trace, "rollout_length": length, "floor": 0.01}
    )
    student._act(1.0)
    student._refresh()
    method, actor = student._expected_entropy, student._actors["cart"]
    assert method is not None
    critic: Any = method._critics["cart"]
    with torch.no_grad():
        critic.weight.normal_()
        if zero_critic:
            critic.weight.zero_()
            critic.bias.zero_()

    def value_at(observations: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            features = student.training.network.features(torch.from_numpy(observations), "cart")
            return (critic(features)[:, 0] / (1 - gamma)).double().numpy()

    steps: list[Step] = []
    taken: list[np.ndarray] = []
    step = actor.envs.step

    def recorded(actions: np.ndarray) -> Step:
        taken.append(actions)
        steps.append(step(actions))
        return steps[-1]

    monkeypatch.setattr(actor.envs, "step", recorded)
    first = actor.observations
    rollout = method.play(
        "cart",
        actor.envs,
        first,
        student._students["cart"],
        actor.teacher,
        np.ones(8, np.bool_),
        np.random.default_rng(0),
    )
    seen = [first, *(each.observations for each in steps)]
    wanted = np.zeros((length, 8))
    following = np.zeros(8)
    for t in reversed(range(length)):
        successors = steps[t].next_observations()
        alive, ended = ~steps[t].terminated, steps[t].terminated | steps[t].truncated
        reward = -divergence_at(student, successors) * alive
        delta = reward + gamma * alive * value_at(successors) - value_at(seen[t])
        following = delta + gamma * trace * ~ended * following
        wanted[t] = following
    assert any(each.truncated.any() if limit else each.terminated.any() for each in steps)
    valid = np.concatenate([each.valid for each in steps])
    assert not valid.all() or limit  # CartPole's own vector spends a row on a reset
    batch = rollout.batch
    assert np.allclose(batch.advantages.numpy(), wanted.reshape(-1)[valid], atol=1e-4)
    values = np.concatenate([value_at(each) for each in seen[:-1]])
    assert np.allclose(batch.values.numpy(), (wanted.reshape(-1) + values)[valid], atol=1e-4)
    assert np.array_equal(batch.actions.numpy(), np.concatenate(taken)[valid])
    assert np.array_equal(rollout.following, seen[-1])


def test_the_update_follows_the_gradient_by_hand() -> None:
    student = training(expected_entropy={"correction": 0.7, "rollout_length": 16})
    student._act(1.0)
    student._refresh()
    method, actor = student._expected_entropy, student._actors["cart"]
    assert method is not None
    random = np.random.default_rng(0)
    rollout = method.play(
        "cart",
        actor.envs,
        actor.observations,
        student._students["cart"],
        actor.teacher,
        np.ones(8, np.bool_),
        random,
    )
    batch = rollout.batch
    network = student.training.network
    logits = network(batch.observations, "cart").detach()
    policy = logits.softmax(1)
    surprise = logits.log_softmax(1) - batch.log_teacher
    divergence = (policy * surprise).sum(1, keepdim=True)
    taken = torch.nn.functional.one_hot(batch.actions, 2)
    by_hand = policy * (surprise - divergence) - 0.7 * batch.advantages[:, None] * (taken - policy)
    student.training.parameters.zero_gradient()
    network(batch.observations, "cart").backward(by_hand / len(logits))
    expected = student.training.parameters.gradient.clone()
    losses = method.update({"cart": batch})
    assert torch.allclose(student.training.parameters.gradient, expected, atol=1e-5)
    assert float(losses["cart"]) == pytest.approx(float(divergence.mean()), rel=1e-4)


def test_minibatches_are_every_transition_once() -> None:
    student = training()
    student._act(1.0)
    student._refresh()
    method, actor = student._expected_entropy, student._actors["cart"]
    assert method is not None
    learning = np.arange(8) >= 3
    rollout = method.play(
        "cart",
        actor.envs,
        actor.observations,
        student._students["cart"],
        actor.teacher,
        learning,
        np.random.default_rng(0),
    )
    parts = method.split(rollout.batch, 4, np.random.default_rng(0))
    together = np.concatenate([part.observations.numpy() for part in parts])
    assert {len(part.actions) for part in parts} <= {len(together) // 4, len(together) // 4 + 1}
    shown = {tuple(row) for row in together}
    assert len(together) == len(rollout.batch.actions)
    assert shown == {tuple(row) for row in rollout.batch.observations.numpy()}
    held = {tuple(row) for row in rollout.observations[:, ~learning].reshape(-1, 4)}
    assert not shown & held


def test_the_critic_is_no_part_of_the_student() -> None:
    student = training()
    before = student.training.parameters.values.numel()
    list(student.train())
    assert student.training.parameters.values.numel() == before
    assert sum(parameter.numel() for parameter in student.student().parameters()) == before
    assert student.updates == 60


@pytest.mark.parametrize("correction", [0.0, 0.1])
def test_the_student_learns_its_teachers_policy(correction: float) -> None:
    student = training(
        updates=600,
        evaluation_interval=100,
        learning_rate=5e-3,
        num_envs=16,
        expected_entropy={"correction": correction},
    )
    reports = list(student.train())
    assert [report.done for report in reports] == [100, 200, 300, 400, 500, 600]
    assert reports[-1].metrics["loss/distill"] < 0.3 * reports[0].metrics["loss/distill"]
    assert reports[-1].metrics["eval/agreement"] > 0.9
    assert reports[-1].metrics["return/cart"] > 0
