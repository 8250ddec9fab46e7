"""RL^2: what its policy sees and remembers, its loss, its state, and that it learns."""

import numpy as np
import pytest
import torch

from stillhouse import seeding
from stillhouse.checkpoint import load_state, save_state
from stillhouse.config import parse
from stillhouse.envs.bandits import BanditConfig
from stillhouse.envs.tabular import TabularConfig
from stillhouse.errors import StillhouseError
from stillhouse.meta import bandit_baselines
from stillhouse.meta.rl2 import RL2, Batch, RecurrentPolicy, RL2Config, play

torch.set_num_threads(1)

BANDITS = BanditConfig(arms=3, episodes=4)
UNEQUAL = TabularConfig(states=4, actions=3, episode_length=4, episodes=3, stop_probability=0.4)


def small(family: BanditConfig | TabularConfig = BANDITS, **settings: object) -> RL2Config:
    return RL2Config(family=family, **{"width": 8, "updates": 4, "trials": 12, "minibatches": 3, **settings})


def played(learner: RL2) -> Batch:
    family = learner.config.family
    trials = family.play(family.draw(12, seeding.generator(0, "t")), seeding.generator(0, "n"))
    return play(learner.policy, trials, seeding.generator(0, "a"))


def test_the_policy_sees_what_was_done_and_what_it_paid() -> None:
    batch = played(RL2(small(TabularConfig(states=4, actions=3, episode_length=2, episodes=3)), 0))
    steps, count, _ = batch.inputs.shape
    assert (steps, count) == (6, 12)
    state, action, reward, ended = (part.numpy() for part in batch.inputs.split([4, 3, 1, 1], 2))
    assert (state.sum(2) == 1).all()
    assert not action[0].any() and not reward[0].any() and not ended[0].any()
    assert np.array_equal(action[1:].argmax(2), batch.actions[:-1].numpy())
    assert np.array_equal(reward[1:, :, 0], batch.rewards[:-1])
    assert ended[:, 0, 0].tolist() == [0, 0, 1, 0, 1, 0]
    assert (state[[0, 2, 4]].argmax(2) == 0).all()  # every episode begins in state 0
    assert played(RL2(small(), 0)).inputs.shape[2] == 3 + 2  # of a bandit there is no state


def test_the_hidden_state_lasts_over_episodes_and_not_over_trials() -> None:
    learner = RL2(small(), 0)
    batch = played(learner)
    with torch.no_grad():
        whole = learner.policy.gru(batch.inputs)
        logits, values = learner.policy.heads(whole.flatten(0, 1), batch.states.flatten())
    # As it was acted, step by step, is one sequence over all episodes from a state of zeros.
    torch.testing.assert_close(logits.view_as(batch.logits), batch.logits)
    torch.testing.assert_close(values.view_as(batch.values), batch.values)
    # What was seen in the first episode matters in the last one.
    changed = batch.inputs.clone()
    changed[1, :, -2] += 1
    with torch.no_grad():
        assert (learner.policy.gru(changed)[-1] != whole[-1]).any(1).all()
    # A second trial knows nothing of a first: the same tasks and noise give the same play.
    again = played(learner)
    assert torch.equal(again.logits, batch.logits) and torch.equal(again.actions, batch.actions)
    assert torch.equal(again.logits[0], again.logits[0, :1].expand_as(again.logits[0]))


def test_advantages_run_over_episodes_and_end_with_the_trial() -> None:
    learner = RL2(small(gamma=0.5, trace=0.5, reward_scale=2.0), 0)
    batch = Batch(3, 2, learner.policy)
    batch.rewards = np.array([[1, 1], [1, 1], [1, 9]], np.float32)
    batch.values = torch.tensor([[1.0, 1.0], [2.0, 2.0], [4.0, 9.0]])
    batch.counted = np.array([[True, True], [True, True], [True, False]])
    advantages, returns = learner.advantages(batch)
    # By hand, from the end: 2 - 4; 2 + 0.5 * 4 - 2 + 0.25 * -2; 2 + 0.5 * 2 - 1 + 0.25 * 1.5.
    assert advantages[:, 0].tolist() == pytest.approx([2.375, 1.5, -2.0])
    # The second trial is over after two steps, and nothing of the third row comes into it.
    assert advantages[:2, 1].tolist() == pytest.approx([2.0, 0.0])
    torch.testing.assert_close(returns, advantages + batch.values)


def columns(learner: RL2, batch: Batch) -> list[torch.Tensor]:
    advantages, returns = learner.advantages(batch)
    log_mu = torch.log_softmax(batch.logits, 2).gather(2, batch.actions.unsqueeze(2)).squeeze(2)
    counted = torch.from_numpy(batch.counted)
    return [batch.inputs, batch.states, batch.actions, log_mu - 0.1, advantages, returns, counted]


def gradient(learner: RL2, given: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    learner.parameters.zero_gradient()
    loss = learner.backward(*given)
    config = learner.config
    return learner.parameters.gradient.clone(), float(
        loss.total(config.value_coefficient, config.entropy_coefficient)
    )


@pytest.mark.parametrize("state_action", ["separate", "joint"])
def test_padding_changes_nothing(state_action: str) -> None:
    learner = RL2(small(UNEQUAL, state_action=state_action), 0)
    batch = played(learner)
    assert not batch.counted.all()
    given = columns(learner, batch)
    expected, loss = gradient(learner, given)
    # Whatever stands in the padding, and however much of it there is.
    padding = ~given[-1]
    spoiled = [each.clone() for each in given]
    for each in (spoiled[0], *spoiled[3:6]):
        each[padding] = 7
    spoiled[1][padding] = spoiled[2][padding] = 1
    longer = [torch.cat([each, torch.zeros_like(each[:2])]) for each in spoiled]
    found, same = gradient(learner, longer)
    torch.testing.assert_close(found, expected)
    assert same == pytest.approx(loss)
    # Twice the batch is the same mean.
    doubled, twice = gradient(learner, [torch.cat([each, each], 1) for each in longer])
    torch.testing.assert_close(doubled, expected, rtol=1e-4, atol=1e-6)
    assert twice == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("state_action", ["separate", "joint"])
def test_gradients_are_those_of_the_loss(state_action: str) -> None:
    """Against automatic differentiation of the loss as the module's docstring has it, over counted rows only."""
    learner = RL2(small(UNEQUAL, entropy_coefficient=0.3, state_action=state_action), 0)
    given = columns(learner, played(learner))
    found, _ = gradient(learner, given)
    inputs, states, actions, log_mu, advantages, returns, counted = given
    learner.parameters.zero_gradient()
    hidden = learner.policy.gru(inputs)[counted]
    if state_action == "joint":  # every row by the layer of its own state
        rows = list(zip(hidden, states[counted], strict=True))
        weight, bias = learner.policy.policy.weight, learner.policy.policy.bias
        value_weight, value_bias = learner.policy.value.weight, learner.policy.value.bias
        wide = [
            weight[3 * state : 3 * state + 3] @ row + bias[3 * state : 3 * state + 3] for row, state in rows
        ]
        logits = torch.stack(wide)
        values = torch.stack([value_weight[state] @ row + value_bias[state] for row, state in rows])
    else:
        logits, values = learner.policy.policy(hidden), learner.policy.value(hidden).squeeze(1)
    log_policy = torch.log_softmax(logits, 1)
    ratio = (log_policy.gather(1, actions[counted].unsqueeze(1)).squeeze(1) - log_mu[counted]).exp()
    kept = advantages[counted]
    kept = (kept - kept.mean()) / (kept.std(correction=0) + 1e-8)
    objective = torch.minimum(ratio * kept, ratio.clamp(0.8, 1.2) * kept)
    entropy = -(log_policy.exp() * log_policy).sum(1)
    (0.5 * (values - returns[counted]).square() - objective - 0.3 * entropy).mean().backward()
    torch.testing.assert_close(found, learner.parameters.gradient, rtol=1e-4, atol=1e-6)


def test_returns_by_episode() -> None:
    batch = played(RL2(small(UNEQUAL), 0))
    returns = batch.returns(3)
    assert returns.shape == (12, 3)
    assert returns.sum(1) == pytest.approx((batch.rewards * batch.counted).sum(0), abs=1e-5)
    trial, episode = 3, 1
    rows = batch.counted[:, trial] & (batch.episodes[:, trial] == episode)
    assert returns[trial, episode] == pytest.approx(batch.rewards[rows, trial].sum(), abs=1e-5)


@pytest.mark.parametrize("family", [BANDITS, UNEQUAL])
def test_interrupted_is_uninterrupted(family: BanditConfig | TabularConfig, tmp_path) -> None:
    config = small(family, curriculum=0.5, curriculum_episodes=2)
    whole, first = RL2(config, 5), RL2(config, 5)
    reports = [report.metrics for report in whole.train()]
    training = first.train()
    started = [next(training).metrics, next(training).metrics]
    save_state(tmp_path / "state", first.get_state())
    second = RL2(config, 99)
    second.set_state(load_state(tmp_path / "state"))
    assert started + [report.metrics for report in second.train()] == reports
    assert torch.equal(whole.parameters.values, second.parameters.values)
    assert (whole.done, whole.env_steps) == (second.done, second.env_steps) == (4, second.env_steps)


def test_same_seed_same_bytes() -> None:
    one, same, other = (RL2(small(), seed) for seed in (1, 1, 2))
    for learner in (one, same, other):
        list(learner.train())
    assert torch.equal(one.parameters.values, same.parameters.values)
    assert not torch.equal(one.parameters.values, other.parameters.values)


def test_schedules() -> None:
    learner = RL2(
        small(
            BanditConfig(arms=3, episodes=20),
            updates=10,
            curriculum=0.5,
            curriculum_episodes=10,
            entropy_fraction=0.5,
            entropy_coefficient=0.1,
            learning_rate=0.01,
        ),
        0,
    )
    seen = []
    for learner.done in (0, 2, 5, 9):
        seen.append(
            (learner.episodes, round(learner.entropy_coefficient, 6), round(learner.learning_rate, 6))
        )
    assert seen == [(10, 0.1, 0.01), (14, 0.06, 0.008), (20, 0.0, 0.005), (20, 0.0, 0.001)]


@pytest.mark.parametrize("family", [BANDITS, UNEQUAL])
def test_evaluation_leaves_the_learner_as_it_was(family: BanditConfig | TabularConfig) -> None:
    learner, undisturbed = RL2(small(family), 0), RL2(small(family), 0)
    one, again = (learner.evaluate(20, 5, 3) for _ in range(2))
    assert (one.measure, one.unit, one.steps) == ("return", "episodes", [0, 1, 2, 3, 4])
    assert one.values.shape == (20, 5) and np.array_equal(one.values, again.values)
    assert all(values.shape == (20, 5) for values in one.baselines.values())
    assert "random" in one.baselines
    for each in (learner, undisturbed):
        list(each.train())
    assert torch.equal(learner.parameters.values, undisturbed.parameters.values)


def test_its_test_tasks_and_noise_are_the_baselines() -> None:
    """A policy that always pulls the first arm is paid what a baseline is that does."""
    learner = RL2(small(), 0)
    with torch.no_grad():
        learner.policy.policy.bias.copy_(torch.tensor([100.0, 0.0, 0.0]))

    def first(successes: np.ndarray, pulls: np.ndarray, *_: object) -> np.ndarray:
        return np.broadcast_to([1.0, 0.0, 0.0], pulls.shape)

    found = learner.test_returns(50, 4, 9)
    assert np.array_equal(found, bandit_baselines.play(first, BANDITS, 50, 4, 9, "first"))


def test_what_was_learnt_can_be_taken_over(tmp_path) -> None:
    learner, heir = RL2(small(), 0), RL2(small(), 1)
    save_state(tmp_path / "learnt", learner.learnt())
    heir.load(load_state(tmp_path / "learnt"))
    assert np.array_equal(heir.evaluate(20, 4, 0).values, learner.evaluate(20, 4, 0).values)
    with pytest.raises(StillhouseError, match=r"gru\.weight_ih.*\(24, 5\).*\(24, 6\)"):
        RL2(small(BanditConfig(arms=4)), 0).load(learner.learnt())


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    learner = RL2(small(), 0)
    with torch.no_grad():
        learner.policy.value.bias.fill_(float("nan"))
    with pytest.raises(StillhouseError, match="loss became nan after 1 updates.*learning_rate"):
        list(learner.train())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"trials": 6, "minibatches": 4}, "at most 3 minibatches"),
        ({"family": {"family": "mazes"}}, "'bandits', 'tabular'"),
        ({"family": {"family": "bandits", "arms": 1}}, "arms"),
        ({"trace": 1.5}, "trace"),
        ({"memory": 1}, "0 or at least 2"),
        ({"widht": 3}, "did you mean 'width'"),
    ],
)
def test_bad_settings(given: dict, words: str) -> None:
    with pytest.raises(StillhouseError, match=words):
        parse(RL2Config, given)


def test_inputs_are_written_by_hand() -> None:
    policy = RecurrentPolicy(3, 2, 4, seeding.torch_generator(0, "x"))
    row = np.zeros((2, policy.inputs), np.float32)
    policy.write_inputs(
        row,
        np.array([2, 0]),
        (np.array([1, 2]), np.array([0, 1]), np.array([0.5, -1.0]), np.array([False, True])),
    )
    assert row.tolist() == [[0, 0, 1, 1, 0, 0.5, 0], [1, 0, 0, 0, 1, -1, 1]]


def test_joint_inputs_have_the_pair_of_state_and_action_before_and_its_reward_besides() -> None:
    policy = RecurrentPolicy(3, 2, 4, seeding.torch_generator(0, "x"), "joint")
    row = np.zeros((1, policy.inputs), np.float32)
    policy.write_inputs(
        row, np.array([2]), (np.array([1]), np.array([0]), np.array([0.5]), np.array([False]))
    )
    pair, paid = [0, 0, 1, 0, 0, 0], [0, 0, 0.5, 0, 0, 0]  # state 1 with action 0
    assert row.tolist() == [[0, 0, 1, 1, 0, *pair, *paid, 0.5, 0]]


def test_playing_gives_the_state_before_an_action_to_the_joint_embedding() -> None:
    family = TabularConfig(states=3, actions=2, episodes=3, episode_length=4)
    policy = RecurrentPolicy(3, 2, 4, seeding.torch_generator(0, "x"), "joint")
    trials = family.play(family.draw(5, family.random("train", 0, "t")), family.random("train", 0, "n"), 3)
    batch = play(policy, trials, seeding.generator(0, "play"))
    states = batch.inputs[:, :, :3].argmax(2)
    pairs = batch.inputs[1:, :, 5:11]
    assert torch.equal(pairs.sum(2), torch.ones(11, 5))
    assert torch.equal(pairs.argmax(2), states[:-1] * 2 + batch.actions[:-1])
    assert np.array_equal(batch.inputs[1:, :, 11:17].sum(2).numpy(), batch.rewards[:-1])


@pytest.mark.learning
def test_it_learns_to_explore_and_to_use_what_it_found() -> None:
    """Two arms, five pulls, five seeds: far above random play in the same test tasks, and no better than the best policy can be."""
    from scipy.stats import permutation_test

    family = BanditConfig(arms=2, episodes=5)
    config = RL2Config(family=family, width=24, updates=40, trials=400, minibatches=8, learning_rate=0.01)
    gains = []
    for seed in range(5):
        learner = RL2(config, seed)
        list(learner.train())
        found = learner.evaluate(2000, 5, 0)
        gains.append(found.values.sum(1).mean() - found.baselines["random"].sum(1).mean())
        assert found.values[:, 0].mean() == pytest.approx(
            0.5, abs=0.04
        )  # of the first pull nothing can be known
        assert found.values[:, -1].mean() > 0.56
        assert found.values.sum(1).mean() < found.baselines["gittins"].sum(1).mean() + 0.05
    test = permutation_test(
        (gains,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    assert test.pvalue <= 1 / 32
    assert min(gains) > 0.2
