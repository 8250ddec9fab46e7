"""Rollouts on environments whose returns are known."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from torch import nn

from stillhouse.config import parse
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.evaluation import rollouts
from stillhouse.evaluation.rollouts import EvaluationConfig, MemoryPolicy, evaluate, network_policy
from stillhouse.networks.multi_task import NetworkSize, NetworkSpec, build_network
from stillhouse.seeding import generator

CARTPOLE = EnvironmentConfig(id="CartPole-v1")


class LengthsEnv(gymnasium.Env[np.ndarray, int]):
    """An episode is long (30) or short (1) by its seed; action 0 earns 1, action 1 earns 0."""

    observation_space = gymnasium.spaces.Box(0, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 30 if self.np_random.random() < 0.5 else 1
        return np.zeros(2, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return np.zeros(2, np.float32), float(action == 0), self.left == 0, False, {}


class EndlessEnv(LengthsEnv):
    """Never ends by itself."""

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.zeros(2, np.float32), 1.0, False, False, {}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    gymnasium.register("tests/Lengths-v0", entry_point=LengthsEnv)
    gymnasium.register("tests/Endless-v0", entry_point=EndlessEnv)
    yield
    for name in ("tests/Lengths-v0", "tests/Endless-v0"):
        del gymnasium.registry[name]


LENGTHS = EnvironmentConfig(id="tests/Lengths-v0")


def always(action: int, actions: int = 2) -> Any:
    return lambda observations: np.eye(actions, dtype=np.float32)[[action] * len(observations)]


def balance(observations: np.ndarray) -> np.ndarray:
    """A good CartPole policy: push towards where the pole falls."""
    lean = observations[:, 2] + 0.3 * observations[:, 3]
    return np.stack([-lean, lean], axis=1)


def test_greedy_returns_are_the_episodes_rewards() -> None:
    episodes = evaluate(always(0), LENGTHS, 40, seed=0, num_envs=8)
    np.testing.assert_array_equal(episodes.returns, episodes.lengths)
    assert set(episodes.lengths) == {1, 30}
    assert evaluate(always(1), LENGTHS, 40, seed=0, num_envs=8).returns.sum() == 0


def test_short_episodes_are_not_counted_more_often() -> None:
    # Half the episodes are long. Taking the first 200 to finish would find about 5 % of them long at 100 copies.
    episodes = evaluate(always(0), LENGTHS, 200, seed=0, num_envs=100)
    assert 0.4 < (episodes.lengths == 30).mean() < 0.6


def test_quotas_where_the_episodes_do_not_divide() -> None:
    for count in (1, 3, 7):
        episodes = evaluate(always(0), LENGTHS, count, seed=0, num_envs=3)
        assert len(episodes.returns) == count
        assert (episodes.lengths > 0).all()


def test_the_same_seed_gives_the_same_episodes_and_streams_differ() -> None:
    first = evaluate(balance, CARTPOLE, 12, seed=3, epsilon=0.3, num_envs=4)
    again = evaluate(balance, CARTPOLE, 12, seed=3, epsilon=0.3, num_envs=4)
    np.testing.assert_array_equal(first.returns, again.returns)
    for other in (
        evaluate(balance, CARTPOLE, 12, seed=4, epsilon=0.3, num_envs=4),
        evaluate(balance, CARTPOLE, 12, seed=3, epsilon=0.3, num_envs=4, stream="validation"),
    ):
        assert (first.returns != other.returns).any()


def test_greedy_validation_plays_other_episodes() -> None:
    test = evaluate(always(0), CARTPOLE, 12, seed=3)
    validation = evaluate(always(0), CARTPOLE, 12, seed=3, stream="validation")
    assert (test.returns != validation.returns).any()


def test_test_and_validation_episodes_are_not_those_of_training() -> None:
    firsts = [
        VectorEnvironment(CARTPOLE, 16, 0, stream).reset() for stream in ("training", "validation", "test")
    ]
    assert len(np.unique(np.concatenate(firsts), axis=0)) == 48


def test_epsilon_is_the_share_of_random_actions() -> None:
    # Action 1 earns nothing and is never chosen greedily: it is half of the random actions.
    episodes = evaluate(always(0), LENGTHS, 300, seed=1, epsilon=0.2, num_envs=50)
    assert episodes.returns.sum() / episodes.lengths.sum() == pytest.approx(0.9, abs=0.015)


def test_random_play_does_not_ask_the_policy() -> None:
    def refuse(observations: np.ndarray) -> np.ndarray:
        raise AssertionError("asked")

    episodes = evaluate(refuse, CARTPOLE, 50, seed=0, epsilon=1.0)
    assert 15 < episodes.returns.mean() < 30  # random play of CartPole: about 22


def test_copies_that_met_their_quota_change_nothing() -> None:
    """The result is that of stepping by hand and keeping each copy's first episodes."""
    episodes = evaluate(balance, CARTPOLE, 5, seed=0, epsilon=0.5, num_envs=2)
    envs, random = VectorEnvironment(CARTPOLE, 2, 0, "test"), generator(0, "epsilon", "test")
    observations, kept = envs.reset(), ([], [])  # type: ignore[var-annotated]
    while len(kept[0]) < 3 or len(kept[1]) < 2:
        greedy = balance(observations).argmax(axis=1)
        explore = random.random(2) < 0.5
        step = envs.step(np.where(explore, random.integers(2, size=2), greedy))
        for row, value in zip(step.ended, step.episode_returns, strict=True):
            kept[row].append(value)
        observations = step.observations
    assert episodes.returns.tolist() == kept[0][:3] + kept[1][:2]


def test_rows_that_are_no_transitions_are_not_counted() -> None:
    # CartPole's own vectorised version spends a row on each reset (autoreset NEXT_STEP).
    assert issubclass(CartPoleVectorEnv, gymnasium.vector.VectorEnv)
    episodes = evaluate(balance, CARTPOLE, 30, seed=0, epsilon=1.0, num_envs=3)
    np.testing.assert_array_equal(episodes.returns, episodes.lengths)
    assert episodes.lengths.min() >= 8  # the pole cannot fall sooner


def test_an_environment_without_a_limit_is_capped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "STEP_CAP", 25)
    endless = EnvironmentConfig(id="tests/Endless-v0")
    episodes = evaluate(always(0), endless, 5, seed=0, num_envs=2)
    assert episodes.lengths.tolist() == [25] * 5
    assert episodes.capped.all()
    assert episodes.summary()["capped_share"] == 1.0
    mixed = evaluate(always(0), LENGTHS, 40, seed=0, num_envs=4)
    np.testing.assert_array_equal(mixed.capped, mixed.lengths == 25)


def test_an_own_time_limit_is_no_cap() -> None:
    limited = EnvironmentConfig(id="tests/Endless-v0", max_episode_steps=10)
    episodes = evaluate(always(0), limited, 3, seed=0)
    assert episodes.lengths.tolist() == [10] * 3
    assert not episodes.capped.any()


def test_the_cap_is_ten_thousand_steps() -> None:
    assert rollouts.STEP_CAP == 10_000


def test_a_diverged_policy_is_refused() -> None:
    with pytest.raises(StillhouseError, match=r"CartPole-v1: the policy's outputs are not finite"):
        evaluate(lambda observations: np.full((len(observations), 2), np.nan), CARTPOLE, 1, seed=0)


def test_summary() -> None:
    episodes = rollouts.Episodes(np.array([1.0, 3.0]), np.array([5, 6]), np.array([False, True]))
    assert episodes.summary() == {"mean": 2.0, "returns": [1.0, 3.0], "capped_share": 0.5}


def test_network_policy_asks_the_environments_head_without_gradients() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3)})

        def forward(self, observations: torch.Tensor, environment: str) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            outputs: torch.Tensor = self.heads[environment](observations)
            return outputs

    network = TwoHeads()
    observations = np.ones((5, 4), np.float32)
    assert network_policy(network, "a")(observations).shape == (5, 2)
    outputs = network_policy(network, "b")(observations)
    assert outputs.shape == (5, 3)
    assert outputs.dtype == np.float32
    expected = network.heads["b"](torch.ones(5, 4)).detach().numpy()
    np.testing.assert_allclose(outputs, expected, rtol=1e-6)


@pytest.mark.parametrize("environment", ["CartPole-v1", "MinAtar/Breakout-v0", "tests/Lengths-v0"])
def test_a_policy_with_a_memory_remembers_each_episode_alone(environment: str) -> None:
    """CartPole's own vector environment spends rows on resets, MinAtar's does not, the last is reset by us."""
    seen: list[tuple[np.ndarray, ...]] = []

    class Spy(MemoryPolicy):
        def step(self, observations: np.ndarray, starts: np.ndarray) -> np.ndarray:
            outputs = super().step(observations, starts)
            seen.append((observations.copy(), starts.copy(), outputs))
            return outputs

    config = EnvironmentConfig(id=environment)
    spec = VectorEnvironment(config, 1, 0, "train").spec
    size = NetworkSize(conv_channels=2, features=4, recurrent="lstm")
    network = build_network(NetworkSpec(size=size, environments={"it": spec}, output="logits"), 0)
    policy = Spy(network, "it")
    episodes = evaluate(policy, config, 9, 0, num_envs=3, epsilon=0.1)
    observations, starts, outputs = (np.stack(part) for part in zip(*seen, strict=True))
    assert starts[0].all() and starts.sum() >= 9
    for copy in range(3):
        begins = [*np.flatnonzero(starts[:, copy]), len(starts)]
        if environment != "CartPole-v1":
            first = np.diff(begins[:-1])[: 9 // 3 - 1]
            np.testing.assert_array_equal(first, episodes.lengths[3 * copy : 3 * copy + len(first)])
        for begin, end in itertools.pairwise(begins):
            alone = torch.from_numpy(observations[begin:end, copy : copy + 1])
            nothing = torch.zeros(len(alone), 1, dtype=torch.bool)
            with torch.no_grad():
                features, _ = network.unroll(alone, "it", network.initial_state(1), nothing)
                expected = network.head(features[:, 0], "it").numpy()
            np.testing.assert_allclose(outputs[begin:end, copy], expected, atol=1e-6)
    again = evaluate(policy, config, 9, 0, num_envs=3, epsilon=0.1)
    np.testing.assert_array_equal(again.returns, episodes.returns)
    assert evaluate(network_policy(network, "it"), config, 2, 0).returns.shape == (
        2,
    )  # another number of copies


@pytest.mark.parametrize(
    ("block", "field"),
    [
        ({"episodes": 0}, "episodes"),
        ({"epsilon": 1.5}, "epsilon"),
        ({"num_envs": 0}, "num_envs"),
        ({"episode": 3}, "episode"),
    ],
)
def test_bad_parameters_are_named(block: dict[str, Any], field: str) -> None:
    with pytest.raises(StillhouseError, match=f"evaluate.{field}"):
        parse(EvaluationConfig, block, "evaluate")
