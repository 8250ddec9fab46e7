"""IMPALA: what its targets are made of, the loss's gradient, the actor's lag, its corrections, PopArt on its value head."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

from stillhouse.agents import fresh_network, impala, make_learner
from stillhouse.agents.impala import IMPALA, IMPALAConfig, Sequences, build_value_head
from stillhouse.config import parse
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.losses.policy_gradient import actor_critic_loss
from stillhouse.networks.multi_task import NetworkSize
from stillhouse.networks.parameters import FlatParameters

torch.set_num_threads(1)
SIZE = NetworkSize(features=16, torso=(8,))


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


def counters(mode: AutoresetMode = AutoresetMode.DISABLED, copies: int = 5) -> VectorEnvironment:
    return VectorEnvironment.over(
        SyncVectorEnv([Counter] * copies, autoreset_mode=mode, copy=False), 0, "train"
    )


def on_counters(mode: AutoresetMode = AutoresetMode.DISABLED, **settings: Any) -> IMPALA:
    given = {"num_envs": 5, "rollout_length": 23, "minibatches": 3, "trace": 0.95, **settings}
    config = IMPALAConfig(network=SIZE, **given)
    envs = counters(mode)
    return IMPALA(config, fresh_network(SIZE, "counter", envs.spec, "logits", 0), "counter", envs, 0)


def update(agent: IMPALA) -> None:
    """Act once and learn from it."""
    agent.act()
    for batch in agent.batches():
        agent.parameters.zero_gradient()
        agent.backward(batch)
        agent.parameters.step(agent.learning_rate, agent.config.max_gradient_norm)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_every_transition_bootstraps_from_where_it_really_led(
    mode: AutoresetMode,
) -> None:
    agent = on_counters(mode, reward_scale=0.5)
    truncations = terminations = 0
    for _ in range(4):
        before = agent.env_steps
        agent.act()
        assert agent.rollout.valid.all() == (mode != AutoresetMode.NEXT_STEP)
        assert agent.env_steps - before == agent.rollout.valid.sum()
        sizes = []
        for batch in agent.batches():
            sizes.append(batch.actions.shape[1])
            shown = batch.observations[..., 0]  # the number of the step: a value to recognise a state by
            successors = torch.cat([shown[1:].flatten(), torch.full((sizes[-1],), torch.nan)])
            successors[batch.successor_rows] = batch.successors[:, 0]
            successors = successors.view_as(shown)
            bootstraps = batch.valid & (batch.discounts > 0)
            torch.testing.assert_close(successors[bootstraps], shown[bootstraps] + 1)
            torch.testing.assert_close(batch.rewards[batch.valid], 0.5 * (shown[batch.valid] + 1))
            torch.testing.assert_close(batch.discounts.unique(), torch.tensor([0.0, 0.99]))
            # Inside an episode, and only there, the next row is the successor.
            inside = batch.valid & (batch.traces > 0)
            torch.testing.assert_close(batch.traces.unique(), torch.tensor([0.0, 0.95]))
            torch.testing.assert_close(shown[1:][inside[:-1]], shown[:-1][inside[:-1]] + 1)
        assert sorted(sizes) == [1, 2, 2]
        truncations += agent.rollout.truncated.sum()
        terminations += agent.rollout.terminated.sum()
    assert truncations > 20 and terminations > 20


def test_a_pass_shows_every_copy_once_with_what_it_did() -> None:
    agent = on_counters(epochs=2)
    agent.act()
    batches = list(agent.batches())
    assert len(batches) == 6
    passes = [torch.cat([batch.actions for batch in epoch], 1) for epoch in (batches[:3], batches[3:])]
    for seen in passes:
        assert sorted(seen.T.tolist()) == sorted(agent.rollout.actions.T.tolist())
    assert not torch.equal(*passes)
    logits = torch.from_numpy(agent.rollout.logits)
    log_mu = torch.log_softmax(logits, 2).gather(2, torch.from_numpy(agent.rollout.actions)[..., None])
    columns = {tuple(column) for column in log_mu[..., 0].T.tolist()}
    assert {tuple(column) for column in batches[1].log_mu.T.tolist()} <= columns


def test_actor_critic_loss_by_hand_and_by_finite_differences() -> None:
    policy = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], dtype=torch.float64)
    values, targets = torch.tensor([2.0, 1.0]).double(), torch.tensor([1.0, 4.0]).double()
    actions, advantages = torch.tensor([0, 2]), torch.tensor([2.0, -1.0]).double()
    # The second row is half as heavy: 2/3 (2 log 2 + 0.5*0.5*1 - 0.1*1.0397) + 1/3 (log 0.7 + 0.5*0.5*9 - 0.1*0.8018).
    weights = torch.tensor([2 / 3, 1 / 3]).double()

    def loss(logits: Tensor, values: Tensor) -> Tensor:
        log_policy = torch.log_softmax(logits, 1)
        return actor_critic_loss(log_policy, values, actions, advantages, targets, weights, 0.5, 0.1).total

    logits = policy.log().requires_grad_()
    values.requires_grad_()
    assert loss(logits, values).item() == pytest.approx(
        2 / 3 * (2 * np.log(2) + 0.25 - 0.1 * 1.5 * np.log(2))
        + 1 / 3 * (np.log(0.7) + 2.25 - 0.1 * 0.8018185525433373)
    )
    assert torch.autograd.gradcheck(loss, (logits, values))


def naive_loss(agent: IMPALA, batch: Sequences) -> Tensor:
    """The module's equations, a transition at a time, with the graph through logits and values only."""
    config, popart = agent.config, agent.popart
    steps, copies = batch.actions.shape
    rows = batch.observations.flatten(0, 1)
    features = agent.network.features(rows, "counter")
    log_pi = torch.log_softmax(agent.network.head(features, "counter"), 1).view(steps, copies, -1)
    values = popart.unnormalise(agent.value_head(features)).view(steps, copies)
    led = agent.network.features(batch.successors, "counter")
    successors = dict(
        zip(
            batch.successor_rows.tolist(),
            popart.unnormalise(agent.value_head(led))[:, 0].tolist(),
            strict=True,
        )
    )
    total, count = torch.zeros(()), int(batch.valid.sum())
    normalised, targets_seen = [], []
    for row in range(copies):
        following: float | None = None
        for t in reversed(range(steps)):
            log_pi_a = log_pi[t, row, batch.actions[t, row]]
            ratio = float((log_pi_a.detach() - batch.log_mu[t, row]).exp())
            value, reward = values[t, row].item(), batch.rewards[t, row].item()
            discount, trace = batch.discounts[t, row].item(), batch.traces[t, row].item()
            next_value = successors.get(t * copies + row, values[t + 1, row].item() if t + 1 < steps else 0.0)
            following = next_value if following is None else following
            corrected = ratio if config.correction == "vtrace" else 1.0
            rho, c = min(config.rho_bar, corrected), trace * min(config.c_bar, corrected)
            mixed = (1 - trace) * next_value + trace * following
            target = value + rho * (reward + discount * next_value - value)
            target += discount * c * (following - next_value)
            weight = {"vtrace": rho, "one_step": min(config.rho_bar, ratio), "none": 1.0}[config.correction]
            following = target
            if not batch.valid[t, row]:
                continue
            advantage = weight * (reward + discount * mixed - value)
            entropy = -(log_pi[t, row].exp() * log_pi[t, row]).sum()
            total = total - (advantage * log_pi_a / popart.sigma + config.entropy_coefficient * entropy)
            normalised.append((values[t, row] - popart.mu) / popart.sigma)
            targets_seen.append((target - popart.mu) / popart.sigma)
    error = torch.stack(normalised) - torch.tensor(targets_seen)
    return (total + config.value_coefficient * error.square().sum() / 2) / count


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
@pytest.mark.parametrize("correction", ["vtrace", "one_step", "none"])
def test_the_gradient_is_that_of_the_equations(mode: AutoresetMode, correction: str) -> None:
    agent = on_counters(
        mode, correction=correction, policy_lag=4, learning_rate=0.01, entropy_coefficient=0.1, rho_bar=1.2
    )
    for _ in range(4):
        update(agent)
    agent.act()
    batch = next(agent.batches())
    agent.parameters.zero_gradient()
    expected = naive_loss(agent, batch)
    expected.backward()
    gradient = agent.parameters.gradient.clone()
    agent.parameters.zero_gradient()
    loss = agent.backward(batch)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(agent.parameters.gradient, gradient, rtol=1e-3, atol=1e-5)
    agent.backward(batch)  # adds
    torch.testing.assert_close(agent.parameters.gradient, 2 * gradient, rtol=1e-3, atol=1e-5)


def test_the_corrections_agree_on_policy_and_differ_off_policy() -> None:
    gradients: dict[tuple[int, str], Tensor] = {}
    for lag in (0, 4):
        for correction in ("vtrace", "one_step", "none"):
            agent = on_counters(minibatches=1, policy_lag=lag, trace=1.0, learning_rate=0.01)
            for _ in range(6):  # alike for all
                update(agent)
            agent.act()
            agent.config = agent.config.model_copy(update={"correction": correction})
            agent.parameters.zero_gradient()
            agent.backward(next(agent.batches()))
            gradients[lag, correction] = agent.parameters.gradient.clone()
    for correction in ("one_step", "none"):
        torch.testing.assert_close(gradients[0, correction], gradients[0, "vtrace"], rtol=1e-3, atol=1e-5)
        assert not torch.allclose(gradients[4, correction], gradients[4, "vtrace"], rtol=0.05, atol=1e-3)
    critic = agent.parameters.slices["critic.weight"]
    torch.testing.assert_close(gradients[4, "one_step"][critic], gradients[4, "none"][critic])


@pytest.mark.parametrize("lag", [0, 1, 4, 7])
def test_the_actor_is_so_many_updates_behind(lag: int) -> None:
    agent = on_counters(policy_lag=lag, learning_rate=0.05)
    history = []  # parameters before each update
    for _ in range(5):
        agent.act()
        present = agent.parameters.values.data.clone()
        acting = [*history, present][max(0, len(history) - lag)]
        shown = torch.from_numpy(agent.rollout.observations).flatten(0, 1)
        agent.parameters.values.data.copy_(acting)
        with torch.no_grad():
            expected = agent.network(shown, "counter").view(*agent.rollout.logits.shape)
        agent.parameters.values.data.copy_(present)
        np.testing.assert_allclose(agent.rollout.logits, expected, atol=1e-6)
        if lag and history:
            now = agent.network(shown, "counter").view(*agent.rollout.logits.shape)
            assert not np.allclose(agent.rollout.logits, now.detach(), atol=1e-6)
        for batch in agent.batches():
            history.append(agent.parameters.values.data.clone())
            agent.parameters.zero_gradient()
            agent.backward(batch)
            agent.parameters.step(agent.learning_rate)


def test_actions_are_samples_of_the_policy() -> None:
    agent = on_counters(rollout_length=2000)
    policy = torch.tensor([0.1, 0.3, 0.6])
    with torch.no_grad():
        agent.network.heads["counter"].weight.zero_()
        agent.network.heads["counter"].bias.copy_(policy.log())
    agent.act()
    frequencies = np.bincount(agent.rollout.actions.flatten(), minlength=3) / 10_000
    # Five standard deviations of 10,000 draws at the most.
    np.testing.assert_allclose(frequencies, policy, atol=0.025)


def test_popart_makes_the_scale_of_rewards_no_matter() -> None:
    """From the same normalised values, rewards of another size give the same gradient; without PopArt another."""
    gradients = {}
    for popart in (True, False):
        for scale in (0.01, 1.0, 100.0):
            agent = on_counters(popart=popart, reward_scale=scale, minibatches=1)
            # As if it had learnt: values of the rewards' size.
            agent.popart.set_state({"mu": 3.0 * scale, "variance": 4 * scale**2, "weight": 1.0})
            if not popart:
                agent.popart.set_state({"mu": 0.0, "variance": 1.0, "weight": 0.0})
                with torch.no_grad():
                    agent.value_head.weight.mul_(2 * scale)
                    agent.value_head.bias.mul_(2 * scale).add_(3 * scale)
            agent.act()
            agent.backward(next(agent.batches()))
            gradients[popart, scale] = agent.parameters.gradient.clone()
    for scale in (0.01, 100.0):
        torch.testing.assert_close(gradients[True, scale], gradients[True, 1.0], rtol=1e-3, atol=1e-5)
        assert not torch.allclose(gradients[False, scale], gradients[False, 1.0], rtol=0.5)


def test_the_statistics_follow_the_targets_and_values_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = on_counters(AutoresetMode.NEXT_STEP, popart=True)
    seen: list[Any] = []

    def record(*arguments: Any) -> Any:
        seen.append(original(*arguments))
        return seen[-1]

    original = impala.vtrace
    monkeypatch.setattr(impala, "vtrace", record)
    for _ in range(3):
        update(agent)
    agent.act()
    batch = next(agent.batches())
    with torch.no_grad():
        before = agent._values(agent.network.features(batch.observations.flatten(0, 1), "counter"))
    state = agent.popart.get_state()
    agent.backward(batch)
    with torch.no_grad():
        after = agent._values(agent.network.features(batch.observations.flatten(0, 1), "counter"))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert agent.popart.get_state() != state
    agent.popart.set_state(state)
    agent.popart.update(seen[-1].targets[batch.valid])
    moved = agent.popart.get_state()
    agent.popart.set_state(state)
    agent.popart.update(
        seen[-1].targets.flatten()
    )  # rows that are no transitions would have moved them elsewhere
    assert agent.popart.get_state() != moved


def test_given_parameters_are_the_ones_that_learn() -> None:
    """A joint trainer makes the parameters; a step that the learner did not make moves it all the same."""
    config = IMPALAConfig(network=SIZE, num_envs=5, rollout_length=10, minibatches=1)
    own, envs = on_counters(rollout_length=10, minibatches=1, trace=1.0), counters()
    network = fresh_network(SIZE, "counter", envs.spec, "logits", 0)
    head = build_value_head(network, 0)
    parameters = FlatParameters(network, 1e-3, epsilon=1e-5, beside={"critic": head})
    agent = IMPALA(config, network, "counter", envs, 0, parameters, head)
    assert agent.parameters is parameters and agent.value_head is head
    for _ in range(3):
        update(agent)
        update(own)
    assert torch.equal(parameters.values, own.parameters.values)


def test_learning_starts_from_a_nearly_uniform_policy() -> None:
    settings = {"algorithm": "impala", "num_envs": 16, "network": SIZE.model_dump()}
    agent = make_learner(settings, "cartpole", EnvironmentConfig(id="CartPole-v1"), 0)
    observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    assert np.abs(agent.outputs(observations)).max() < 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy_lag": -1}, r"cartpole\.policy_lag: .*greater than or equal to 0, but -1 was given"),
        ({"correction": "retrace"}, r"correction: .*'vtrace', 'one_step' or 'none', but 'retrace' was given"),
        ({"rho_bar": 1.0, "c_bar": 2.0}, r"c_bar must be at most rho_bar \(1\), but it is 2"),
        (
            {"popart_sigma_min": 10.0, "popart_sigma_max": 1.0},
            r"popart_sigma_min must be below popart_sigma_max \(1\), but it is 10",
        ),
        ({"popart_beta": 0.0}, r"popart_beta: .*greater than 0, but 0.0 was given"),
        ({"num_envs": 4, "minibatches": 5}, r"at most num_envs \(4\) are allowed, but minibatches is 5"),
    ],
)
def test_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StillhouseError, match=message) as refusal:
        parse(IMPALAConfig, settings, "train_teacher.cartpole")
    assert "\n" not in str(refusal.value)
