"""Memories: their equations, where episodes begin, one step at a time, and what cannot do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.agents import make_learner
from stillhouse.checkpoint import load_checkpoint, save_checkpoint
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import network_policy
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize, NetworkSpec, build_network
from stillhouse.networks.recurrent import Memory
from stillhouse.types import EnvironmentSpec, ObservationSpec

torch.set_num_threads(1)
VECTOR = ObservationSpec(kind="vector", shape=(3,))
KINDS = ["gru", "lstm"]


def make_network(recurrent: Any, **size: Any) -> MultiTaskNetwork:
    environments = {name: EnvironmentSpec(observation=VECTOR, actions=2) for name in ("a", "b")}
    given = NetworkSize(features=6, torso=(5,), recurrent=recurrent, **size)
    return build_network(NetworkSpec(size=given, environments=environments, output="logits"), 0)


def sequences(steps: int = 12, copies: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    starts = torch.rand(steps, copies, generator=generator) < 0.2
    starts[0] = torch.tensor([True, False, False])
    return torch.randn(steps, copies, 3, generator=generator), starts


def one_step(memory: Memory, features: np.ndarray, state: np.ndarray) -> np.ndarray:
    """A copy's next state [S] by the papers' equations."""
    w, u, b, c = (parameter.detach().numpy() for parameter in memory.cell.parameters())
    hidden, *cell = np.split(state, len(state) // len(features))

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    if cell:
        i, f, g, o = np.split(w @ features + b + u @ hidden + c, 4)
        after = sigmoid(f) * cell[0] + sigmoid(i) * np.tanh(g)
        return np.concatenate([sigmoid(o) * np.tanh(after), after])
    (wr, wz, wn), (ur, uz, un) = np.split(w @ features + b, 3), np.split(u @ hidden + c, 3)
    z = sigmoid(wz + uz)
    return (1 - z) * np.tanh(wn + sigmoid(wr + ur) * un) + z * hidden


@pytest.mark.parametrize("kind", KINDS)
def test_unrolled_by_the_equations_from_each_episodes_start(kind: Any) -> None:
    memory = Memory(kind, 3).double()
    features, starts = (given for given in sequences())
    features = features.double()
    first = torch.randn(3, memory.state_width, generator=torch.Generator().manual_seed(2)).double()
    outputs, states = memory(features, first, starts)
    ends = np.append(starts[1:].any(1).numpy(), True)
    assert 1 < ends.sum() < len(ends)
    for copy in range(3):
        state = first[copy].numpy()
        for t in range(12):
            if starts[t, copy]:
                state = np.zeros(memory.state_width)
            state = one_step(memory, features[t, copy].numpy(), state)
            np.testing.assert_allclose(outputs[t, copy].detach(), state[:3], atol=1e-12)
            if ends[t]:
                np.testing.assert_allclose(states[t, copy].detach(), state, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_and_together_are_the_same(kind: str) -> None:
    network = make_network(kind)
    observations, starts = sequences()
    together, states = network.unroll(observations, "a", network.initial_state(3), starts)
    state = network.initial_state(3)
    for t in range(12):
        features, after = network.unroll(observations[t : t + 1], "a", state, starts[t : t + 1])
        state = after[0]
        torch.testing.assert_close(features[0], together[t])
    torch.testing.assert_close(state, states[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_an_episode_reaches_the_next(kind: str) -> None:
    network = make_network(kind)
    observations, starts = sequences()
    observations.requires_grad_()
    features, _ = network.unroll(observations, "a", network.initial_state(3), starts)
    features[-1].square().sum().backward()
    assert observations.grad is not None
    reached = observations.grad.abs().sum(2) > 0
    for copy in range(3):
        begun = int(starts[:, copy].nonzero()[-1]) if starts[:, copy].any() else 0
        assert not reached[:begun, copy].any() and reached[begun:, copy].all()


def test_without_a_memory_everything_is_as_before() -> None:
    network = make_network("none")
    observations, starts = sequences()
    assert network.initial_state(3).shape == (3, 0)
    features, states = network.unroll(observations, "a", network.initial_state(3), starts)
    assert torch.equal(features.flatten(0, 1), network.features(observations.flatten(0, 1), "a"))
    assert states.shape == (12, 3, 0)
    assert not any("memory" in name for name in network.state_dict())
    with_one = make_network("gru")
    for name, parameter in network.named_parameters():  # what is drawn before the memory
        assert name.startswith("heads") or torch.equal(parameter, with_one.get_parameter(name))


@pytest.mark.parametrize("kind", KINDS)
def test_environments_share_the_memory(kind: str) -> None:
    network = make_network(kind)
    for name in ("a", "b"):
        *_, memory, head = network.layer_names(name)
        assert len(memory) == 4 and all(each.startswith("memory.cell.") for each in memory)
        assert all(each.startswith(f"heads.{name}.") for each in head)
    alone = make_network(kind, separate=True)
    assert alone.of("a").memory is not alone.of("b").memory
    assert alone.initial_state(2).shape == network.initial_state(2).shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_brings_the_memory_back(kind: str, tmp_path: Path) -> None:
    network = make_network(kind)
    save_checkpoint(tmp_path / "it", network, {})
    loaded = load_checkpoint(tmp_path / "it").network
    observations, starts = sequences()
    found, expected = (
        each.unroll(observations, "b", each.initial_state(3), starts) for each in (loaded, network)
    )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_what_needs_single_observations_refuses_in_one_line(kind: str) -> None:
    network = make_network(kind)
    observations, _ = sequences()
    message = f"a: network.recurrent is {kind}, .* set recurrent to none"
    for ask in (
        lambda: network(observations[0], "a"),
        lambda: network.layers("a"),
        lambda: network_policy(network, "a")(observations[0].numpy()),
    ):
        with pytest.raises(StillhouseError, match=message) as refusal:
            ask()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("algorithm", ["dqn", "pqn", "ppo"])
def test_other_algorithms_refuse_before_any_env_step(algorithm: str) -> None:
    settings = {"algorithm": algorithm, "network": {"recurrent": "gru"}}
    agent = make_learner(settings, "cartpole", EnvironmentConfig(id="CartPole-v1"), 0)
    with pytest.raises(StillhouseError, match="network.recurrent is gru, .* set recurrent to none"):
        next(agent.train())
    assert agent.env_steps == 0
