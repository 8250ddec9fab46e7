"""PPO: what its advantages are made of, its policy's samples, actor and critic, and the critic's warm-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from stillhouse.agents import fresh_network, make_learner, ppo
from stillhouse.agents.ppo import PPO, PPOConfig
from stillhouse.checkpoint import load_checkpoint, save_checkpoint
from stillhouse.config import parse
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.networks.multi_task import NetworkSize, parameter_count

torch.set_num_threads(1)
CARTPOLE = EnvironmentConfig(id="CartPole-v1")
SIZE = NetworkSize(features=16, torso=(8,))
SETTINGS: dict[str, Any] = {
    "algorithm": "ppo",
    "env_steps": 2048,
    "num_envs": 8,
    "rollout_length": 32,
    "epochs": 2,
    "minibatches": 4,
    "network": SIZE.model_dump(),
}


class Counter(gymnasium.Env[np.ndarray, int]):
    """Shows how many steps were made and pays that; episodes of 1 to 5 steps, terminated or truncated by chance."""

    observation_space = gymnasium.spaces.Box(0, 100, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)
    metadata = {"render_modes": []}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.count, self.length = 0, int(self.np_random.integers(1, 6))
        self.terminates = bool(self.np_random.integers(2))
        return np.array([0], np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        over = self.count == self.length
        observation = np.array([self.count], np.float32)
        return observation, float(self.count), over and self.terminates, over and not self.terminates, {}


def on_counters(mode: AutoresetMode, rollout_length: int = 23) -> PPO:
    config = PPOConfig(
        num_envs=5,
        rollout_length=rollout_length,
        minibatches=3,
        epochs=1,
        reward_scale=0.5,
        trace=0.95,
        network=SIZE,
    )
    vector = SyncVectorEnv([Counter] * 5, autoreset_mode=mode, copy=False)
    envs = VectorEnvironment.over(vector, 0, "train")
    return PPO(config, fresh_network(SIZE, "counter", envs.spec, "logits", 0), "counter", envs, 0)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_every_transition_bootstraps_from_where_it_really_led(
    mode: AutoresetMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = on_counters(mode)
    seen: list[tuple[torch.Tensor, ...]] = []
    learned: list[torch.Tensor] = []

    def record(*arguments: torch.Tensor) -> torch.Tensor:
        seen.append(arguments)
        return original(*arguments)

    def backward(batch: ppo.Batch) -> torch.Tensor:
        learned.append(batch[0])
        return original_backward(batch)

    original, original_backward = ppo.generalized_advantages, agent.backward
    monkeypatch.setattr(ppo, "generalized_advantages", record)
    monkeypatch.setattr(agent, "backward", backward)
    monkeypatch.setattr(agent, "_values", lambda observations: 10 * observations[:, 0])
    truncations = terminations = 0
    reports = agent.train()
    for _ in range(4):
        before = agent.env_steps
        next(reports)
        rewards, discounts, traces, values, successors = (array.numpy() for array in seen[-1])
        valid = agent._rollout_valid
        assert valid.all() == (mode != AutoresetMode.NEXT_STEP)
        assert agent.env_steps - before == valid.sum()
        terminated, truncated = agent._rollout_terminated, agent._rollout_truncated
        np.testing.assert_array_equal(rewards[valid], 0.5 * (values[valid] / 10 + 1))
        np.testing.assert_array_equal(discounts, np.where(terminated, 0, np.float32(0.99)))
        np.testing.assert_array_equal(traces, np.where(terminated | truncated, 0, np.float32(0.95)))
        bootstraps = valid & ~terminated
        np.testing.assert_array_equal(successors[bootstraps], values[bootstraps] + 10)
        # No row that is no transition is learnt from: those show the last state of an episode.
        assert sum(len(part) for part in learned) == valid.sum() // 3 * 3
        learned.clear()
        truncations, terminations = truncations + truncated.sum(), terminations + terminated.sum()
    assert truncations > 20 and terminations > 20


def test_actions_are_samples_of_the_policy() -> None:
    agent = on_counters(AutoresetMode.DISABLED, rollout_length=2000)
    policy = torch.tensor([0.1, 0.3, 0.6])
    with torch.no_grad():
        agent.network.heads["counter"].weight.zero_()
        agent.network.heads["counter"].bias.copy_(policy.log())
    agent.act()
    frequencies = np.bincount(agent._rollout_actions.flatten(), minlength=3) / 10_000
    # Five standard deviations of 10,000 draws at the most.
    np.testing.assert_allclose(frequencies, policy, atol=0.025)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_checkpoint_is_the_actor_and_the_critic_stays_in_the_training_state(
    critic: str, tmp_path: Path
) -> None:
    agent = make_learner(SETTINGS | {"critic": critic}, "cartpole", CARTPOLE, 0)
    names = list(agent.parameters.slices)
    own = [name for name in names if not name.startswith("critic.")]
    assert own == [name for name, _ in agent.network.named_parameters()]
    assert names[: len(own)] == own and len(names) > len(own)
    assert len(agent.get_state()["parameters"]["values"]) > parameter_count(agent.network)
    list(agent.train())
    save_checkpoint(tmp_path / "actor", agent.network, {})
    loaded = load_checkpoint(tmp_path / "actor").network
    assert loaded.spec.output == "logits"
    observations = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    np.testing.assert_array_equal(
        loaded(torch.from_numpy(observations), "cartpole").detach().numpy(), agent.outputs(observations)
    )


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_actor_and_critic_both_learn(critic: str) -> None:
    agent = make_learner(SETTINGS | {"critic": critic}, "cartpole", CARTPOLE, 0)
    start = agent.parameters.values.clone()
    list(agent.train())
    for name, where in agent.parameters.slices.items():
        assert not torch.equal(agent.parameters.values[where], start[where]), name


def test_learning_starts_from_a_nearly_uniform_policy() -> None:
    agent = make_learner(SETTINGS, "cartpole", CARTPOLE, 0)
    observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    assert np.abs(agent.outputs(observations)).max() < 0.05


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_policy_does_not_move_during_the_warm_up(critic: str) -> None:
    agent = make_learner(SETTINGS | {"critic": critic, "critic_warmup": 0.5}, "cartpole", CARTPOLE, 0)
    start = agent.parameters.values.clone()
    count = parameter_count(agent.network)
    began = 0
    warm_rollouts = cold_rollouts = 0
    for report in agent.train():
        values = agent.parameters.values
        if began < 1024:
            warm_rollouts += 1
            assert torch.equal(values[:count], start[:count])
            assert not torch.equal(values[count:], start[count:])
            assert report.metrics["policy/kl"] == pytest.approx(0, abs=1e-6)
        else:
            cold_rollouts += 1
            assert not torch.equal(values[:count], start[:count])
            # The optimiser started afresh, or the policy's first steps would be several times the learning rate.
            assert agent.parameters.get_state()["step"] == 8 * cold_rollouts
        began = report.done
    assert warm_rollouts >= 4 and cold_rollouts >= 3


def test_refused_in_one_line() -> None:
    with pytest.raises(StillhouseError, match=r"critic: Input should be 'shared' or 'separate'.*'none'"):
        parse(PPOConfig, {"critic": "none"}, "train_teacher.cartpole")
    with pytest.raises(StillhouseError, match="at most num_envs \\* rollout_length minibatches"):
        parse(PPOConfig, {"num_envs": 1, "rollout_length": 4, "minibatches": 5}, "")
