"""Kickstarting: the guide's policy and weight, and what PPO makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stillhouse.agents import fresh_network, make_learner
from stillhouse.agents.ppo import PPO
from stillhouse.checkpoint import load_state, save_state
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.networks.multi_task import (
    MultiTaskNetwork,
    NetworkSize,
    NetworkSpec,
    build_network,
    parameter_count,
    scale_head,
)
from stillhouse.transfer.initialisation import Correspondence, Source
from stillhouse.transfer.kickstarting import Guide, inverse, policy_temperature
from stillhouse.types import EnvironmentSpec, ObservationSpec, OutputKind

torch.set_num_threads(1)
SIZE = NetworkSize(features=8, torso=(6,))
CARTPOLE = EnvironmentConfig(id="CartPole-v1")
SETTINGS: dict[str, Any] = {
    "algorithm": "ppo",
    "env_steps": 1024,
    "num_envs": 8,
    "rollout_length": 16,
    "epochs": 2,
    "minibatches": 4,
    "network": SIZE.model_dump(),
}


def vector(entries: int, actions: int) -> EnvironmentSpec:
    return EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(entries,)), actions=actions)


def teacher(entries: int = 4, actions: int = 2, output: OutputKind = "logits") -> Source:
    spec = NetworkSpec(size=SIZE, environments={"source": vector(entries, actions)}, output=output)
    network = build_network(spec, 11)
    scale_head(network, "source", 5.0)  # it prefers something
    return Source("teacher", network, "source")


def guide(
    source: Source,
    target: EnvironmentSpec,
    correspondence: Correspondence,
    temperature: float = 1.0,
    weight: float = 1.0,
    duration: float = 1000.0,
) -> Guide:
    return Guide(source, target, correspondence, temperature, weight, duration)


SAME = Correspondence((0, 1, 2, 3), (0, 1))


def observe(entries: int = 4, count: int = 9) -> Tensor:
    values = np.random.default_rng(0).normal(size=(count, entries))
    return torch.from_numpy(values.astype(np.float32))


def test_logits_are_the_policys() -> None:
    source = teacher()
    found = guide(source, vector(4, 2), SAME).policy(observe())
    torch.testing.assert_close(found, torch.softmax(source.network(observe(), "source"), 1))
    assert not found.requires_grad


def test_q_values_are_divided_by_a_temperature_that_follows_the_action_gap() -> None:
    source = teacher(actions=3, output="q_values")
    seen = observe(count=50)
    values = source.network(seen, "source").detach()
    best = values.sort(1, descending=True).values
    gap = float((best[:, 0] - best[:, 1]).mean())
    temperature = policy_temperature(source.network, "source", seen, source.network.spec.output)
    assert temperature == pytest.approx(gap / math.log(2))  # the best twice as likely, a mean gap apart
    found = guide(source, vector(4, 3), Correspondence((0, 1, 2, 3), (0, 1, 2)), temperature).policy(seen)
    torch.testing.assert_close(found, torch.softmax(values / temperature, 1))
    # Whatever the rewards' scale.
    scale_head(source.network, "source", 100.0)
    again = policy_temperature(source.network, "source", seen, source.network.spec.output)
    assert again == pytest.approx(100 * temperature)
    assert policy_temperature(teacher().network, "source", seen, "logits") == 1


def test_equal_q_values_are_a_uniform_policy() -> None:
    source = teacher(output="q_values")
    scale_head(source.network, "source", 0.0)
    temperature = policy_temperature(source.network, "source", observe(), source.network.spec.output)
    found = guide(source, vector(4, 2), SAME, temperature).policy(observe())
    torch.testing.assert_close(found, torch.full((9, 2), 0.5))


def test_actions_are_mapped_and_renormalised() -> None:
    source = teacher(actions=3)
    policy = torch.softmax(source.network(observe(), "source").detach(), 1)
    # The target's: the source's 2, one that it has not, the source's 0.
    found = guide(source, vector(4, 3), Correspondence((0, 1, 2, 3), (2, -1, 0))).policy(observe())
    wanted = torch.stack([policy[:, 2], torch.zeros(9), policy[:, 0]], 1)
    torch.testing.assert_close(found, wanted / (policy[:, [2]] + policy[:, [0]]))
    torch.testing.assert_close(found.sum(1), torch.ones(9))


def test_it_is_shown_what_the_source_would_have_seen() -> None:
    source = teacher()
    # Of the target's three entries: the source's 3, none, its 0.
    found = guide(source, vector(3, 2), Correspondence((3, -1, 0), (0, 1))).policy(observe(3))
    shown = torch.zeros(9, 4)
    shown[:, 3], shown[:, 0] = observe(3)[:, 0], observe(3)[:, 2]
    torch.testing.assert_close(found, torch.softmax(source.network(shown, "source"), 1))
    assert inverse((3, -1, 0), 4) == (2, -1, -1, 0)


@pytest.mark.parametrize("first", [False, True])
def test_planes_are_turned_the_way_the_source_takes_them(first: bool) -> None:
    shapes = [(6, 6, 3), (3, 6, 6)]
    specs = [
        EnvironmentSpec(
            observation=ObservationSpec(kind="planes", shape=shape, channels_first=shape[0] == 3), actions=2
        )
        for shape in (reversed(shapes) if first else shapes)
    ]
    size = NetworkSize(conv_channels=3, features=8)
    network = build_network(NetworkSpec(size=size, environments={"source": specs[0]}, output="logits"), 11)
    source = Source("teacher", network, "source")
    seen = torch.from_numpy(np.random.default_rng(0).random((9, *specs[0].observation.shape)) < 0.5)
    shown = seen.permute(0, 2, 3, 1) if first else seen.permute(0, 3, 1, 2)
    found = guide(source, specs[1], Correspondence((0, 1, 2), (0, 1))).policy(shown)
    torch.testing.assert_close(found, torch.softmax(network(seen, "source"), 1))


def test_discrete_observations_are_shown_as_they_are() -> None:
    spec = EnvironmentSpec(observation=ObservationSpec(kind="discrete", shape=(5,)), actions=2)
    network = build_network(NetworkSpec(size=SIZE, environments={"source": spec}, output="logits"), 11)
    by = guide(Source("teacher", network, "source"), spec, Correspondence(tuple(range(5)), (0, 1)))
    for values in ([4, 1, 0], [2, 2, 2, 1, 0, 4, 3]):
        seen = torch.tensor(values)
        torch.testing.assert_close(by.policy(seen), torch.softmax(network(seen, "source"), 1))


def test_the_weight_falls_linearly_to_0() -> None:
    by = guide(teacher(), vector(4, 2), SAME, weight=2.0, duration=400.0)
    assert [by.weight(steps) for steps in (0, 100, 200, 400, 5000)] == [2, 1.5, 1, 0, 0]
    assert guide(teacher(), vector(4, 2), SAME, duration=0.0).weight(0) == 0


def agent(**settings: Any) -> PPO:
    found = make_learner(SETTINGS | settings, "target", CARTPOLE, 0)
    assert isinstance(found, PPO)
    return found


def test_the_gradient_is_that_of_the_loss_and_the_weighted_divergence() -> None:
    """The written-out gradient of a whole update against autograd's."""
    learner, weight = agent(max_gradient_norm=0.0), 0.7
    learner.guide = guide(teacher(), vector(4, 2), SAME)
    random = torch.Generator().manual_seed(0)
    observations, count = observe(count=32), 32
    actions = torch.randint(2, (count,), generator=random)
    log_mu = torch.full((count,), math.log(0.5)) + 0.3 * torch.randn(count, generator=random)
    returns, advantages = torch.randn(2, count, generator=random)
    target = learner.guide.policy(observations)

    policy = torch.log_softmax(learner.network(observations, "target"), 1)
    values = learner.critic(learner.network.features(observations, "target")).squeeze(1)
    ratio = (policy.gather(1, actions[:, None]).squeeze(1) - log_mu).exp()
    clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    entropy = -(policy.exp() * policy).sum(1)
    divergence = (target * (target.log() - policy)).sum(1)
    loss = -clipped + 0.5 * (values - returns).square() - 0.01 * entropy + weight * divergence
    learner.parameters.zero_gradient()
    loss.mean().backward()
    wanted = learner.parameters.gradient.clone()

    learner.parameters.zero_gradient()
    learner._guided = weight
    learner.backward((observations, actions, log_mu, returns, target, advantages))
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(learner.parameters.gradient, wanted, rtol=1e-3, atol=1e-6)


def trained(weight: float | None, duration: float = 1e9, **settings: Any) -> PPO:
    learner = agent(**settings)
    if weight is not None:
        learner.guide = guide(teacher(), vector(4, 2), SAME, weight=weight, duration=duration)
    list(learner.train())
    return learner


def test_a_guide_without_weight_changes_no_byte() -> None:
    plain, unweighted, over = trained(None), trained(0.0), trained(1.0, duration=0.0)
    assert torch.equal(plain.parameters.values, unweighted.parameters.values)
    assert torch.equal(plain.parameters.values, over.parameters.values)
    assert not torch.equal(plain.parameters.values, trained(1.0).parameters.values)


@torch.no_grad()
def divergence(network: MultiTaskNetwork, source: Source) -> float:
    seen = observe(count=200) * 0.1
    target = torch.softmax(source.network(seen, "source"), 1)
    return float(
        functional.kl_div(torch.log_softmax(network(seen, "target"), 1), target, reduction="batchmean")
    )


def test_with_a_huge_weight_the_policy_becomes_the_guides() -> None:
    settings = {"env_steps": 8192, "learning_rate": 5e-3}
    start = divergence(agent().network, teacher())
    free, drawn = (divergence(trained(weight, **settings).network, teacher()) for weight in (None, 100.0))
    assert drawn < start / 20 and drawn < free / 20


def test_the_divergence_is_reported() -> None:
    learner = agent()
    learner.guide = guide(teacher(), vector(4, 2), SAME)
    first = next(learner.train()).metrics["policy/guide_kl"]
    observations = torch.from_numpy(learner._rollout_observations).flatten(0, 1)
    target = learner.guide.policy(observations)
    fresh = fresh_network(SIZE, "target", vector(4, 2), "logits", 0)
    log_policy = torch.log_softmax(fresh(observations, "target"), 1)
    assert first == pytest.approx(
        float((target * (target.log() - log_policy)).sum(1).mean().detach()), rel=1e-3
    )
    assert "policy/guide_kl" not in next(agent().train()).metrics


def test_a_guide_waits_for_the_critics_warm_up() -> None:
    learner = agent(critic_warmup=0.5)
    learner.guide = guide(teacher(), vector(4, 2), SAME, weight=100.0, duration=1e9)
    count, start = parameter_count(learner.network), learner.parameters.values.clone()
    began, seen = 0, set()
    for report in learner.train():
        moved = not torch.equal(learner.parameters.values[:count], start[:count])
        assert moved == ("policy/guide_kl" in report.metrics) == (began >= 512)
        seen.add(moved)
        began = report.done
    assert seen == {False, True}
    assert divergence(learner.network, teacher()) < divergence(agent().network, teacher())


def test_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    def learner() -> PPO:
        found = agent(critic_warmup=0.2)
        found.guide = guide(teacher(), vector(4, 2), SAME, duration=700.0)
        return found

    whole = learner()
    reports = list(whole.train())
    for stop in (0, len(reports) // 2, len(reports) - 2):
        interrupted = learner()
        for count, _ in enumerate(interrupted.train()):
            if count == stop:
                break
        save_state(tmp_path / "state", interrupted.get_state())
        resumed = learner()
        resumed.set_state(load_state(tmp_path / "state"))
        list(resumed.train())
        assert torch.equal(resumed.parameters.values, whole.parameters.values)
