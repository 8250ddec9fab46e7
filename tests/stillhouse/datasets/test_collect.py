"""Collecting on an environment whose observations say where they come from."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from stillhouse.config import parse
from stillhouse.datasets.collect import CollectConfig, Teacher, collect
from stillhouse.datasets.reader import Dataset
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import network_policy
from stillhouse.networks.multi_task import NetworkSize, NetworkSpec, build_network


class Counter(gymnasium.Env[np.ndarray, np.int64]):
    """Observes (a number drawn at the reset, steps so far); action 1 ends the episode, reward is the step's number."""

    observation_space = spaces.Box(0, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.steps = float(self.np_random.integers(10**6)), 0
        return self._observation(), {}

    def step(self, action):
        self.steps += 1
        return self._observation(), float(self.steps), bool(action == 1), False, {}

    def _observation(self) -> np.ndarray:
        return np.array([self.episode, self.steps], np.float32)


gymnasium.register("StillhouseTestCounter-v0", Counter, max_episode_steps=20)
COUNTER = EnvironmentConfig(id="StillhouseTestCounter-v0")


def counting(observations: np.ndarray) -> np.ndarray:
    """Prefers action 0; its outputs name the observation they belong to."""
    return np.stack([observations[:, 1] + 1, observations[:, 1]], 1).astype(np.float32)


def run(path: Path, policy=counting, environment=COUNTER, seed: int = 0, mean_return=None, **settings):
    config = CollectConfig(**{"transitions": 500, "num_envs": 7, **settings})
    return list(
        collect(Teacher(policy, "q_values", "d" * 64, 10, mean_return), environment, config, seed, path)
    )


def test_episodes_are_whole_and_in_order(tmp_path: Path) -> None:
    reports = run(tmp_path / "data", epsilon=0.2)
    dataset = Dataset.open(tmp_path / "data")
    schema = dataset.schema
    assert 500 <= len(dataset) < 507
    assert schema.mean_action_gap == pytest.approx(1)
    numbers = np.unique(dataset.episodes)
    assert schema.episodes == len(numbers)
    observations = dataset.observations(np.arange(len(dataset)))
    terminated, truncated = dataset.column("terminated"), dataset.column("truncated")
    actions, rewards = dataset.column("actions"), dataset.column("rewards")
    np.testing.assert_array_equal(dataset.column("outputs"), counting(observations))
    finals = dict(zip(*dataset.final_observations()))
    assert set(finals) == set(numbers)
    ended_by_limit, returns, cut = 0, [], 0
    for number in numbers:
        rows = dataset.episode_rows(number)
        length = len(rows)
        assert len(set(observations[rows, 0])) == 1
        np.testing.assert_array_equal(observations[rows, 1], np.arange(length))
        np.testing.assert_array_equal(finals[number], [observations[rows[0], 0], length])
        np.testing.assert_array_equal(rewards[rows], np.arange(1, length + 1))
        np.testing.assert_array_equal(terminated[rows], actions[rows] == 1)
        assert (terminated | truncated)[rows].tolist() == [False] * (length - 1) + [True]
        ended_by_limit += length == 20
        if terminated[rows[-1]] or length == 20:
            returns.append(rewards[rows].sum())
        else:
            cut += 1
    assert ended_by_limit
    assert 0 < cut <= 7
    assert schema.mean_return == pytest.approx(np.mean(returns))
    # Action 1 is only ever a random one: 0.2 / 2 of the steps.
    assert 0.05 < actions.mean() < 0.16
    assert reports[0].done == 0
    assert reports[0].metrics["dataset/bytes"] >= 500 * (8 + 8 + 1 + 4 + 2 + 4)
    assert reports[-1].done == reports[-1].total == len(dataset)


@pytest.mark.parametrize("name", ["CartPole-v1", "MinAtar/Breakout-v1", "FrozenLake-v1"])
def test_observations_are_what_the_teacher_saw(tmp_path: Path, name: str) -> None:
    # Every vectorised kind: CartPole's own spends rows on resets, which must not be kept.
    environment = EnvironmentConfig(id=name)
    seen = []

    def policy(observations: np.ndarray) -> np.ndarray:
        seen.append(observations.copy())
        actions = {"CartPole-v1": 2, "MinAtar/Breakout-v1": 3, "FrozenLake-v1": 4}[name]
        return np.random.default_rng(len(seen)).random((len(observations), actions)).astype(np.float32)

    run(tmp_path / "data", policy, environment, transitions=300)
    dataset = Dataset.open(tmp_path / "data")
    known = {row.tobytes() for batch in seen for row in batch}
    observations = dataset.observations(np.arange(len(dataset)))
    assert all(row.tobytes() in known for row in observations)
    rewards = dataset.column("rewards")
    if name == "CartPole-v1":
        assert (rewards == 1).all()
        assert len(seen) * 7 > len(dataset)


@pytest.mark.parametrize("name", ["CartPole-v1", "StillhouseTestCounter-v0"])
def test_a_teacher_with_a_memory_remembers_each_episode_alone(tmp_path: Path, name: str) -> None:
    environment = EnvironmentConfig(id=name)
    spec = VectorEnvironment(environment, 1, 0, "train").spec
    size = NetworkSize(features=4, recurrent="gru")
    network = build_network(NetworkSpec(size=size, environments={"it": spec}, output="logits"), 0)
    run(tmp_path / "data", network_policy(network, "it"), environment, epsilon=0.3)
    dataset = Dataset.open(tmp_path / "data")
    outputs = dataset.column("outputs")
    for number in np.unique(dataset.episodes):
        rows = dataset.episode_rows(number)
        alone = torch.from_numpy(dataset.observations(rows)).unsqueeze(1)
        nothing = torch.zeros(len(rows), 1, dtype=torch.bool)
        with torch.no_grad():
            features, _ = network.unroll(alone, "it", network.initial_state(1), nothing)
            np.testing.assert_allclose(outputs[rows], network.head(features[:, 0], "it"), atol=1e-6)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    run(tmp_path / "one", seed=3)
    run(tmp_path / "two", seed=3)
    run(tmp_path / "other", seed=4)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    same = [
        (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names
    ]
    assert all(same)
    shard = "shard-00000.safetensors"
    assert (tmp_path / "one" / shard).read_bytes() != (tmp_path / "other" / shard).read_bytes()


def test_a_weak_teacher_is_refused_unless_allowed(tmp_path: Path) -> None:
    with pytest.raises(StillhouseError, match=r"weak teacher.*below minimum_return 2000.*allow_weak_teacher"):
        run(tmp_path / "data", minimum_return=2000)
    assert list(tmp_path.iterdir()) == []
    run(tmp_path / "data", minimum_return=2000, allow_weak_teacher=True)
    assert len(Dataset.open(tmp_path / "data")) >= 500


def test_a_teacher_known_to_be_weak_does_not_play(tmp_path: Path) -> None:
    def policy(observations: np.ndarray) -> np.ndarray:
        raise AssertionError

    with pytest.raises(StillhouseError, match="weak teacher"):
        run(tmp_path / "data", policy, mean_return=9.0, minimum_return=10)
    run(tmp_path / "data", mean_return=11.0, minimum_return=10)


def test_a_minimum_that_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StillhouseError, match="no episode ended"):
        run(tmp_path / "data", transitions=50, epsilon=0, minimum_return=1)
    run(tmp_path / "data", transitions=50, epsilon=0)
    assert Dataset.open(tmp_path / "data").schema.mean_return is None


def test_outputs_that_are_not_finite_stop_it_and_keep_what_was_there(tmp_path: Path) -> None:
    run(tmp_path / "data")
    before = (tmp_path / "data" / "manifest.json").read_bytes()

    def policy(observations: np.ndarray) -> np.ndarray:
        return np.where(observations[:, 1:] > 3, np.nan, counting(observations))

    with pytest.raises(StillhouseError, match="not finite"):
        run(tmp_path / "data", policy)
    assert (tmp_path / "data" / "manifest.json").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


def test_more_than_the_disk_holds_is_refused_before_playing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000})())
    with pytest.raises(StillhouseError, match="free space"):
        run(tmp_path / "data")


def test_more_than_the_limit_is_announced_and_refused_before_playing(tmp_path: Path) -> None:
    def policy(observations: np.ndarray) -> np.ndarray:
        raise AssertionError

    teacher = Teacher(policy, "q_values", "d" * 64, 10)
    reports = collect(
        teacher, COUNTER, CollectConfig(transitions=500, maximum_bytes=5000), 0, tmp_path / "data"
    )
    assert next(reports).metrics["dataset/bytes"] == 500 * 27
    # A row: two float32, two outputs, action, reward, two flags, episode: 8 + 8 + 1 + 4 + 2 + 4 bytes.
    with pytest.raises(StillhouseError, match=r"500 transitions of 27 bytes.*maximum_bytes.*lower.*to 185$"):
        next(reports)
    assert list(tmp_path.iterdir()) == []
    run(tmp_path / "data", transitions=185, num_envs=1, maximum_bytes=5000)
    run(tmp_path / "data", maximum_bytes=500 * 27)


@pytest.mark.parametrize("field", ["maximum_bytes", "epsilon", "transitions", "num_envs"])
def test_numbers_out_of_bounds_are_named(field: str) -> None:
    with pytest.raises(StillhouseError, match=f"collect_dataset.x.{field}.*-1"):
        parse(CollectConfig, {field: -1}, "collect_dataset.x")
