"""A replay as a dataset: what was played comes out of it, in order, whatever the replay has summed and forgotten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stillhouse.datasets.collect import CollectConfig, Teacher
from stillhouse.datasets.from_replay import write_replay
from stillhouse.datasets.reader import Dataset
from stillhouse.errors import StillhouseError
from stillhouse.replay.uniform import UniformReplay
from stillhouse.types import EnvironmentSpec, ObservationSpec

SPEC = EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(1,)), actions=2)
COPIES = 3


def teacher(mean_return: float = 0.0) -> Teacher:
    return Teacher(
        policy=lambda observations: np.concatenate([observations, observations + 2], axis=1),
        output="q_values",
        digest="d" * 64,
        parameters=7,
        mean_return=mean_return,
    )


def play(
    steps: int, capacity: int, n_step: int, seed: int = 0
) -> tuple[UniformReplay, dict[float, tuple[float, bool, bool]]]:
    """A replay of episodes whose observations are 1000 * episode + step; observation to reward, terminated, truncated."""
    random = np.random.default_rng(seed)
    replay = UniformReplay(SPEC.observation, capacity, COPIES, n_step, 0.9)
    now, next_episode = 1000.0 * np.arange(COPIES), COPIES
    played = {}
    valid = np.ones(COPIES, np.bool_)
    for _ in range(steps):
        terminated = random.random(COPIES) < 0.1
        truncated = ~terminated & (random.random(COPIES) < 0.1)
        rewards = random.integers(1, 9, COPIES).astype(np.float32)
        before = now.astype(np.float32)[:, None]
        replay.add(before, now.astype(np.int64) % 2, rewards, terminated, truncated, before + 1, valid)
        for copy in np.flatnonzero(valid):
            played[now[copy]] = (float(rewards[copy]), bool(terminated[copy]), bool(truncated[copy]))
            now[copy] += 1
            if terminated[copy] or truncated[copy]:
                now[copy], next_episode = 1000.0 * next_episode, next_episode + 1
        valid = ~(valid & (terminated | truncated))  # after an end comes a row that is no transition
    return replay, played


def write(path: Path, replay: UniformReplay, **settings: object) -> Dataset:
    config = CollectConfig.model_validate({"transitions": 10_000, **settings})
    reports = list(write_replay(replay.get_state(), teacher(), "Line-v0", SPEC, config, path))
    dataset = Dataset.open(path, "d" * 64)
    assert reports[0].metrics["dataset/bytes"] > 0
    assert reports[-1].done == reports[-1].total == len(dataset)
    return dataset


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("capacity", [10_000, 150])
def test_what_was_played_comes_out_in_order(tmp_path: Path, n_step: int, capacity: int) -> None:
    replay, played = play(200, capacity, n_step)
    dataset = write(tmp_path / "data", replay)
    observations = dataset.observations(np.arange(len(dataset)))[:, 0]
    assert len(set(observations)) == len(observations)
    columns = {name: dataset.column(name) for name in ("rewards", "terminated", "truncated", "actions")}
    np.testing.assert_array_equal(dataset.outputs(np.arange(len(dataset)))[:, 0], observations)
    finals = dict(zip(*(array.ravel().tolist() for array in dataset.final_observations()), strict=True))
    assert len(finals) == dataset.schema.episodes == len(set(dataset.episodes.tolist()))
    for episode in range(dataset.schema.episodes):
        rows = dataset.episode_rows(episode)
        line = observations[rows]
        np.testing.assert_array_equal(np.diff(line), 1)  # one episode, no step left out
        assert finals[episode] == line[-1] + 1
        np.testing.assert_array_equal(columns["rewards"][rows], [played[o][0] for o in line])
        np.testing.assert_array_equal(columns["actions"][rows], line.astype(int) % 2)
        assert not (columns["terminated"] | columns["truncated"])[rows[:-1]].any()
        # What is cut here, and not by the environment, is a truncation too.
        assert columns["terminated"][rows[-1]] == played[line[-1]][1]
        assert columns["truncated"][rows[-1]] == (not played[line[-1]][1])
    # All but what a cut takes: the open sums, and the last row of each open episode.
    lost = min(capacity, len(played)) - len(dataset)
    assert 0 <= lost <= COPIES * (n_step + 1)


def test_the_mean_return_is_that_of_whole_episodes(tmp_path: Path) -> None:
    replay, played = play(200, 10_000, 3)
    returns: dict[int, float] = {}
    ended = set()
    for observation, (reward, terminated, truncated) in played.items():
        episode = int(observation // 1000)
        returns[episode] = returns.get(episode, 0.0) + reward
        if terminated or truncated:
            ended.add(episode)
    schema = write(tmp_path / "data", replay).schema
    assert schema.mean_return == pytest.approx(np.mean([returns[episode] for episode in sorted(ended)]))
    assert schema.mean_action_gap == 2
    assert schema.epsilon is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    replay, played = play(200, 10_000, 1)
    newest = write(tmp_path / "data", replay, transitions=50).observations(np.arange(40))[:, 0]
    assert len(newest) == 40
    assert set(newest.tolist()) <= set(list(played)[-50:])


def test_episodes_cut_by_an_interruption_do_not_run_on(tmp_path: Path) -> None:
    replay, _ = play(20, 10_000, 3)
    before = int(replay.get_state()["place"][:, 0].max())
    replay.drop_open()
    places = replay.get_state()["place"]
    assert (places[:, 0] > before).all()
    assert (places[:, 1] == 0).all()


def test_refusals(tmp_path: Path) -> None:
    replay, _ = play(50, 100, 1)
    state, config = replay.get_state(), CollectConfig(transitions=100, minimum_return=5)
    for given, who, settings, words in (
        (state, teacher(), {"minimum_return": 5.0}, "weak teacher"),
        (state, teacher(), {"maximum_bytes": 100}, "maximum_bytes"),
        (UniformReplay(SPEC.observation, 9, 1, 1, 1.0).get_state(), teacher(), {}, "no whole transition"),
    ):
        limits = config.model_copy(update={"minimum_return": -1e9, **settings})
        with pytest.raises(StillhouseError, match=words):
            list(write_replay(given, who, "Line-v0", SPEC, limits, tmp_path / "data"))
        assert not (tmp_path / "data").exists()
