"""DQN, PQN, PPO, IMPALA and UNREAL: exact resume, determinism, refusals; and that they learn (marker ``learning``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from stillhouse import seeding
from stillhouse.agents import continue_training, continued_settings, make_learner
from stillhouse.checkpoint import load_state, save_state
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.errors import StillhouseError
from stillhouse.networks.multi_task import NetworkSize
from stillhouse.types import Learner

torch.set_num_threads(1)
SIZE = {"features": 16, "torso": [8], "layer_norm": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "dqn": {
        "algorithm": "dqn",
        "env_steps": 2000,
        "learning_starts": 100,
        "train_every": 64,
        "updates_per_train": 4,
        "batch_size": 16,
        "n_step": 2,
        "double_q": True,
        "target_update_interval": 5,
        "network": SIZE,
    },
    "pqn": {
        "algorithm": "pqn",
        "env_steps": 2000,
        "num_envs": 8,
        "rollout_length": 16,
        "minibatches": 4,
        "network": SIZE,
    },
    "ppo": {
        "algorithm": "ppo",
        "env_steps": 2000,
        "num_envs": 8,
        "rollout_length": 16,
        "minibatches": 4,
        "critic": "separate",
        "critic_warmup": 0.3,
        "network": SIZE,
    },
    "impala": {
        "algorithm": "impala",
        "env_steps": 2000,
        "num_envs": 8,
        "rollout_length": 16,
        "epochs": 2,
        "minibatches": 4,
        "policy_lag": 3,
        "popart": True,
        "network": SIZE,
    },
    "unreal": {
        "algorithm": "unreal",
        "env_steps": 2000,
        "num_envs": 8,
        "rollout_length": 16,
        "minibatches": 4,
        "pixel_control_weight": 0.0,  # vectors have no pixels
        "replay_steps": 50,
        "network": SIZE,
    },
}
ENVIRONMENTS = {
    "cartpole": EnvironmentConfig(id="CartPole-v1"),
    "acrobot": EnvironmentConfig(id="Acrobot-v1", max_episode_steps=60),
    "breakout": EnvironmentConfig(id="MinAtar/Breakout-v0"),
}


def learner(algorithm: str, environment: str, seed: int = 0) -> Learner:
    return make_learner(SETTINGS[algorithm], environment, ENVIRONMENTS[environment], seed)


def weights(agent: Learner) -> bytes:
    return agent.parameters.values.detach().numpy().tobytes()


@pytest.mark.parametrize("algorithm", SETTINGS)
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_interrupted_and_uninterrupted_end_in_the_same_bytes(
    algorithm: str, environment: str, tmp_path: Path
) -> None:
    whole = learner(algorithm, environment)
    reports = list(whole.train())
    assert reports[-1].done == reports[-1].total == 2000
    interrupted = learner(algorithm, environment)
    for count, _ in enumerate(interrupted.train()):
        if count == len(reports) // 2:
            break
    save_state(tmp_path / "state", interrupted.get_state())
    resumed = learner(algorithm, environment)
    resumed.set_state(load_state(tmp_path / "state"))
    assert list(resumed.train())[-1] == reports[-1]
    assert weights(resumed) == weights(whole)
    save_state(tmp_path / "a", whole.get_state())
    save_state(tmp_path / "b", resumed.get_state())
    for name in ("state.safetensors", "state.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_driven_from_outside_it_learns_the_same(algorithm: str) -> None:
    alone, driven = learner(algorithm, "acrobot"), learner(algorithm, "acrobot")
    reports = list(alone.train())
    while driven.env_steps < 2000:
        driven.act()
        for batch in driven.batches():
            driven.parameters.zero_gradient()
            driven.backward(batch)
            driven.parameters.step(driven.learning_rate, driven.config.max_gradient_norm)  # type: ignore[attr-defined]
    assert weights(driven) == weights(alone)
    assert driven.metrics() == reports[-1].metrics


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_backward_adds_to_the_gradient_and_gives_the_loss(algorithm: str) -> None:
    agent = learner(algorithm, "acrobot")
    while agent.env_steps < 1000:  # beyond the critic's warm-up, whose loss is its alone
        agent.act()
    batches = list(agent.batches())
    agent.parameters.zero_gradient()
    replaying = getattr(agent, "_replaying", seeding.generator(0))  # UNREAL draws from its replay
    state = replaying.bit_generator.state
    losses = [agent.backward(batches[0])]
    once = agent.parameters.gradient.clone()
    replaying.bit_generator.state = state
    losses.append(agent.backward(batches[0]))
    assert once.abs().max() > 0
    torch.testing.assert_close(agent.parameters.gradient, 2 * once)
    # Not the same bit for bit: PopArt's statistics move with the first, and the value head is rescaled.
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-6)
    assert losses[0].shape == () and not losses[0].requires_grad
    found = agent.metrics()
    whole = found.get("loss/td")
    if algorithm in ("impala", "ppo", "unreal"):
        whole = found["loss/policy"] + 0.5 * found["loss/value"] - 0.01 * found["policy/entropy"]
        whole += sum(found.get(f"loss/{task}", 0.0) for task in ("reward_prediction", "value_replay"))
    assert whole == pytest.approx(float(losses[0]), abs=1e-6)


def test_dqn_scales_rewards_in_learning_alone() -> None:
    plain = learner("dqn", "acrobot")
    scaled = make_learner({**SETTINGS["dqn"], "reward_scale": 0.1}, "acrobot", ENVIRONMENTS["acrobot"], 0)
    batches = []
    for agent in (plain, scaled):
        while agent.env_steps < 200:
            agent.act()
        batches.append(next(agent.batches()))
    assert scaled.reward_scale == 0.1 and batches[0].returns.abs().max() > 0.9
    torch.testing.assert_close(batches[1].returns, 0.1 * batches[0].returns)
    assert np.array_equal(plain.replay.get_state()["rewards"], scaled.replay.get_state()["rewards"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_a_training_is_gone_on_with_by_another(algorithm: str, tmp_path: Path) -> None:
    first = learner(algorithm, "cartpole")
    list(first.train())
    save_state(tmp_path / "state", first.get_state())
    settings = continued_settings(SETTINGS[algorithm], 256, 0.5)
    assert settings["env_steps"] == 256 and settings["network"] == NetworkSize(**SIZE).model_dump(mode="json")
    assert settings["learning_rate"] == first.config.learning_rate / 2  # type: ignore[attr-defined]
    ends = []
    for seed in (1, 1, 2):
        second = make_learner(settings, "cartpole", ENVIRONMENTS["cartpole"], seed)
        continue_training(second, load_state(tmp_path / "state"), algorithm, first.network.spec)
        assert weights(second) == weights(first) and second.env_steps == 0
        moments = second.parameters.get_state()
        assert all(np.array_equal(moments[key], first.parameters.get_state()[key]) for key in moments)
        if algorithm == "dqn":
            assert second.replay.size == first.replay.size  # type: ignore[attr-defined]
            assert second.epsilon() == second.config.epsilon_end  # type: ignore[attr-defined]
        reports = list(second.train())
        assert reports[-1].done == 256
        ends.append(weights(second))
    assert ends[0] == ends[1] != ends[2] and ends[0] != weights(first)


def test_another_capacity_and_number_of_copies_take_the_same_experience_over(tmp_path: Path) -> None:
    first = learner("dqn", "cartpole")
    list(first.train())
    save_state(tmp_path / "state", first.get_state())
    settings = continued_settings(SETTINGS["dqn"], 256, 0.5)
    for capacity, kept in ((10**6, first.replay.size), (300, 300)):  # type: ignore[attr-defined]
        given = {**settings, "replay_capacity": capacity, "num_envs": 3}
        second = make_learner(given, "cartpole", ENVIRONMENTS["cartpole"], 1)
        continue_training(second, load_state(tmp_path / "state"), "dqn", first.network.spec)
        assert second.replay.size == kept  # type: ignore[attr-defined]
        assert list(second.train())[-1].done == 256


def test_a_training_is_not_gone_on_with_by_another_algorithm_or_network(tmp_path: Path) -> None:
    first = learner("dqn", "cartpole")
    state = first.get_state()
    with pytest.raises(
        StillhouseError, match="cartpole: a teacher trained by dqn cannot be gone on with by pqn"
    ):
        continue_training(learner("pqn", "cartpole"), state, "dqn", first.network.spec)
    wider = {**SETTINGS["dqn"], "network": {**SIZE, "features": 17}}
    second = make_learner(wider, "cartpole", ENVIRONMENTS["cartpole"], 0)
    with pytest.raises(StillhouseError, match=r"another network \(features: 17 given, 16 there\)"):
        continue_training(second, state, "dqn", first.network.spec)
    with pytest.raises(StillhouseError, match=r"another network \(environments: .*acrobot.* given"):
        continue_training(learner("dqn", "acrobot"), state, "dqn", first.network.spec)


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_the_seed_decides_everything(algorithm: str) -> None:
    first, again, other = (learner(algorithm, "cartpole", seed) for seed in (0, 0, 1))
    for agent in (first, again, other):
        list(agent.train())
    assert weights(first) == weights(again) != weights(other)


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_a_loss_that_is_not_finite_stops_with_a_reason(algorithm: str) -> None:
    agent = learner(algorithm, "cartpole")
    agent.parameters.values.data.fill_(float("nan"))
    with pytest.raises(StillhouseError, match="loss became nan after .* no result is written"):
        list(agent.train())


def test_bad_settings_are_refused_before_any_work() -> None:
    with pytest.raises(StillhouseError, match="allowed are dqn, pqn, ppo, impala, unreal"):
        make_learner({"algorithm": "sac"}, "cartpole", ENVIRONMENTS["cartpole"], 0)
    with pytest.raises(StillhouseError, match=r"cartpole.gamma.*less than or equal to 1.*1.5"):
        make_learner({"algorithm": "dqn", "gamma": 1.5}, "cartpole", ENVIRONMENTS["cartpole"], 0)
    with pytest.raises(StillhouseError, match="must be Discrete"):
        make_learner({"algorithm": "pqn"}, "pendulum", EnvironmentConfig(id="Pendulum-v1"), 0)


class Signal(gymnasium.Env[int, int]):
    """Shows a number, pays 1 for naming it; 10 steps an episode. The best return is 10, a random one 10/4."""

    observation_space = gymnasium.spaces.Discrete(4)
    action_space = gymnasium.spaces.Discrete(4)
    metadata = {"render_modes": []}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.count, self.shown = 0, int(self.np_random.integers(4))
        return self.shown, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        reward = float(action == self.shown)
        self.count, self.shown = self.count + 1, int(self.np_random.integers(4))
        return self.shown, reward, self.count == 10, False, {}


if "stillhouse-tests/Signal-v0" not in gymnasium.registry:
    gymnasium.register("stillhouse-tests/Signal-v0", entry_point=Signal)


@pytest.mark.learning
@pytest.mark.parametrize("algorithm", SETTINGS)
def test_learns_to_name_what_is_shown(algorithm: str) -> None:
    """Five seeds against five untrained networks: a permutation test on greedy returns."""
    from scipy.stats import permutation_test

    from stillhouse.evaluation.rollouts import evaluate

    environment = EnvironmentConfig(id="stillhouse-tests/Signal-v0")
    trained, untrained = [], []
    settings = {**SETTINGS[algorithm], "learning_rate": 5e-3, "env_steps": 6000, "gamma": 0.0}
    for seed in range(5):
        agent = make_learner(settings, "signal", environment, seed)
        untrained.append(evaluate(agent.outputs, environment, 50, seed).returns.mean())
        list(agent.train())
        trained.append(evaluate(agent.outputs, environment, 50, seed).returns.mean())
    result = permutation_test(
        (trained, untrained), lambda a, b: np.mean(a) - np.mean(b), alternative="greater", n_resamples=np.inf
    )
    assert result.pvalue < 0.05
    assert np.mean(trained) > 9.5
