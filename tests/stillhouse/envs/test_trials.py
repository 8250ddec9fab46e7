"""Bandits and random tabular MDPs as batches of trials."""

import numpy as np
import pytest

from stillhouse.config import parse
from stillhouse.envs.bandits import BanditConfig
from stillhouse.envs.tabular import TabularConfig
from stillhouse.errors import StillhouseError

FAMILIES = [
    BanditConfig(arms=3, episodes=7),
    TabularConfig(states=4, actions=3, episode_length=5, episodes=3),
]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_arms_pay_with_their_probabilities() -> None:
    family = BanditConfig(arms=3, episodes=1)
    tasks = np.tile([0.0, 0.3, 1.0], (40_000, 1))
    for arm, expected in enumerate(tasks[0]):
        trials = family.play(tasks, rng())
        step = trials.step(np.full(40_000, arm))
        assert step.rewards.mean() == pytest.approx(expected, abs=0.01)
        assert set(np.unique(step.rewards)) <= {0.0, 1.0}
        assert step.ended.all() and step.counted.all() and not trials.running.any()


def test_probabilities_are_uniform() -> None:
    tasks = BanditConfig(arms=4).draw(20_000, rng())
    assert tasks.shape == (20_000, 4)
    assert np.quantile(tasks, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.01)


def test_moments_of_mdps() -> None:
    tasks = TabularConfig().draw(2000, rng())
    successors, rewards = tasks[..., :-1], tasks[..., -1]
    assert tasks.shape == (2000, 10, 5, 11)
    np.testing.assert_allclose(successors.sum(-1), 1, rtol=1e-5)
    # A part of Dirichlet(1, ..., 1) over 10 has mean 1/10 and variance 9 / (100 * 11).
    assert successors.mean() == pytest.approx(0.1)
    assert successors.var() == pytest.approx(9 / 1100, rel=0.02)
    assert rewards.mean() == pytest.approx(1, abs=0.01)
    assert rewards.std() == pytest.approx(1, abs=0.01)


def test_steps_of_an_mdp_by_hand() -> None:
    family = TabularConfig(states=3, actions=2, episode_length=3, episodes=2, noise=0.0)
    task = np.zeros((1, 3, 2, 4), np.float32)
    task[0, :, 0, 1] = 1  # action 0 leads to state 1, action 1 to state 2
    task[0, :, 1, 2] = 1
    task[0, :, :, 3] = [[0, 1], [2, 3], [4, 5]]
    trials = family.play(task, rng())
    seen = []
    for action in [0, 1, 0, 1, 1, 1]:
        state, episode = int(trials.state[0]), int(trials.episode[0])
        step = trials.step(np.array([action]))
        seen.append((episode, state, float(step.rewards[0]), bool(step.ended[0])))
    assert seen == [
        (0, 0, 0.0, False),
        (0, 1, 3.0, False),
        (0, 2, 4.0, True),
        (1, 0, 1.0, False),
        (1, 2, 5.0, False),
        (1, 2, 5.0, True),
    ]
    assert not trials.running.any()
    after = trials.step(np.array([0]))
    assert not after.counted.any() and not after.ended.any() and after.rewards.tolist() == [0.0]


def test_successors_follow_their_probabilities() -> None:
    family = TabularConfig(states=3, actions=2, episode_length=2, episodes=1)
    task = np.zeros((1, 3, 2, 4), np.float32)
    task[..., :3] = [0.2, 0.5, 0.3]
    trials = family.play(np.repeat(task, 50_000, 0), rng())
    step = trials.step(np.zeros(50_000, np.int64))
    assert np.bincount(trials.state) / 50_000 == pytest.approx([0.2, 0.5, 0.3], abs=0.01)
    assert step.rewards.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_no_task(family: BanditConfig | TabularConfig) -> None:
    train, test = (family.draw(50, family.random(split, 0, "tasks")) for split in ("train", "test"))
    assert not np.isin(train, test).any()
    again = family.draw(50, family.random("test", 0, "tasks"))
    assert np.array_equal(test, again)


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_is_common(family: BanditConfig | TabularConfig) -> None:
    """Where two methods do the same they see the same, whatever they did elsewhere and before."""
    tasks = family.draw(200, rng(1))
    one, other = (family.play(tasks, rng(2)) for _ in range(2))
    actions = rng(3)
    same_rewards = 0
    while one.running.any():
        mine = actions.integers(family.actions, size=200)
        theirs = np.where(actions.random(200) < 0.5, mine, actions.integers(family.actions, size=200))
        alike = (mine == theirs) & (one.state == other.state)
        first, second = one.step(mine), other.step(theirs)
        assert np.array_equal(first.rewards[alike], second.rewards[alike])
        assert not np.array_equal(first.rewards, second.rewards)
        same_rewards += int(alike.sum())
    assert same_rewards > 200


def test_trials_of_unequal_length() -> None:
    family = TabularConfig(states=3, actions=2, episode_length=6, episodes=4, stop_probability=0.4)
    trials = family.play(family.draw(500, rng(1)), rng(2))
    steps, ends = np.zeros(500, int), np.zeros(500, int)
    lengths = []
    since = np.zeros(500, int)
    while trials.running.any():
        step = trials.step(np.zeros(500, np.int64))
        steps += step.counted
        since += step.counted
        lengths.extend(since[step.ended])
        since[step.ended] = 0
        ends += step.ended
        assert (trials.state[step.ended] == 0).all()
        assert (step.rewards[~step.counted] == 0).all()
    assert (ends == 4).all() and (trials.episode == 4).all()
    assert steps.min() < steps.max() <= 24
    # Lengths are geometric, cut at 6: the mean is (1 - 0.6**6) / 0.4.
    assert np.mean(lengths) == pytest.approx((1 - 0.6**6) / 0.4, abs=0.1)


@pytest.mark.parametrize(
    ("cls", "given", "name"),
    [
        (BanditConfig, {"arms": 1}, "arms"),
        (BanditConfig, {"episodes": 0}, "episodes"),
        (TabularConfig, {"stop_probability": 1.0}, "stop_probability"),
        (TabularConfig, {"noise": -1}, "noise"),
        (TabularConfig, {"state": 3}, "state"),
    ],
)
def test_bad_settings(cls: type, given: dict, name: str) -> None:
    with pytest.raises(StillhouseError, match=name):
        parse(cls, given)
