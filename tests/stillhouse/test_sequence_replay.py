"""The replay of sequences: pieces never cross an episode's end, skewed sampling, saving."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.envs.vector import Step, VectorEnvironment
from stillhouse.replay.sequences import SequenceReplay
from stillhouse.types import ObservationSpec


class Numbered(gymnasium.Env[np.ndarray, int]):
    """Shows its number, its episode and how many steps were made; pays 1 or -1 on every fourth step. Episodes of 1 to 9 steps."""

    observation_space = gymnasium.spaces.Box(0, 1000, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(100)
    metadata = {"render_modes": []}

    def __init__(self, number: int) -> None:
        self.number, self.episode = number, -1

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.count = self.episode + 1, 0
        self.length = int(self.np_random.integers(1, 10))
        self.terminates = bool(self.np_random.integers(2))
        return self._shown(), {}

    def _shown(self) -> np.ndarray:
        return np.array([self.number, self.episode, self.count], np.float32)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = pay(self.count)
        self.count += 1
        over = self.count == self.length
        return self._shown(), reward, over and self.terminates, over and not self.terminates, {}


def pay(count: int) -> float:
    return 0.0 if count % 4 != 3 else (1.0 if count % 8 == 3 else -1.0)


class Played:
    """A replay filled by so many steps of three copies, and what really happened."""

    def __init__(self, mode: AutoresetMode, capacity: int, steps: int, seed: int = 0) -> None:
        vector = SyncVectorEnv(
            [lambda number=number: Numbered(number) for number in range(3)], autoreset_mode=mode, copy=False
        )
        self.envs = VectorEnvironment.over(vector, seed, "train")
        self.replay = SequenceReplay(self.envs.spec.observation, capacity, 3)
        self.happened: dict[tuple[int, int, int], tuple[int, bool, bool]] = {}
        self.random = np.random.default_rng(seed)
        self.observations = self.envs.reset()
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        actions = self.random.integers(100, size=3)
        step = self.envs.step(actions)
        for row in np.flatnonzero(step.valid):
            key = tuple(self.observations[row].astype(int).tolist())
            self.happened[key] = (int(actions[row]), bool(step.terminated[row]), bool(step.truncated[row]))
        self.replay.add(self.observations, actions, step)
        self.observations = step.observations


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(list(AutoresetMode)),
    capacity=st.integers(8, 40),
    steps=st.integers(3, 90),
    length=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_a_sequence_is_a_piece_of_one_episode_as_it_happened(
    mode: AutoresetMode, capacity: int, steps: int, length: int, seed: int
) -> None:
    played = Played(mode, capacity, steps, seed)
    sequences = played.replay.sample_sequences(20, length, np.random.default_rng(seed))
    observations, actions, rewards, terminated, valid = sequences
    assert observations.shape == (length + 1, 20, 3) and valid.shape == (length, 20) and valid[0].all()
    for piece in range(20):
        steps_of_it = int(valid[:, piece].sum())
        assert valid[:steps_of_it, piece].all()
        copy, episode, first = observations[0, piece].astype(int)
        for t in range(length + 1):
            count = first + min(t, steps_of_it)  # after its end the last frame, again and again
            assert observations[t, piece].tolist() == [copy, episode, count]
        for t in range(steps_of_it):
            action, ended, cut = played.happened[copy, episode, first + t]
            assert actions[t, piece] == action and rewards[t, piece] == pay(first + t)
            assert terminated[t, piece] == ended
            assert not (ended or cut) or t == steps_of_it - 1
        assert not terminated[steps_of_it:, piece].any()
        if 0 < steps_of_it < length:  # it was cut short for a reason
            _, ended, cut = played.happened[copy, episode, first + steps_of_it - 1]
            newest = max(key for key in played.happened if key[0] == copy)  # it is not known where it led to
            assert ended or cut or (copy, episode, first + steps_of_it) == newest


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_what_was_overwritten_is_not_sampled(mode: AutoresetMode) -> None:
    played = Played(mode, 12, 400)
    newest = {copy: max(key for key in played.happened if key[0] == copy) for copy in range(3)}
    rows = {copy: [] for copy in range(3)}  # type: dict[int, list[tuple[int, int, int]]]
    for key in sorted(played.happened):
        rows[key[0]].append(key)
        if any(played.happened[key][1:]):
            rows[key[0]].append((*key[:2], key[2] + 1))  # the last frame
    kept = {key for copy in range(3) for key in rows[copy][-12:] if key in played.happened}
    generator = np.random.default_rng(0)
    firsts = played.replay.sample_sequences(5000, 3, generator).observations[0].astype(int)
    # Of the newest step it is not known where it led to, unless its episode ended.
    going_on = {key for key in newest.values() if not any(played.happened[key][1:])}
    assert {tuple(first.tolist()) for first in firsts} == kept - going_on
    frames, _ = played.replay.sample_rewards(5000, 3, generator)
    assert {tuple(frame.astype(int).tolist()) for frame in frames.reshape(-1, 3)} <= kept


def test_starts_are_uniform() -> None:
    played = Played(AutoresetMode.DISABLED, 50, 200)
    firsts = played.replay.sample_sequences(60_000, 5, np.random.default_rng(0)).observations[0]
    _, counts = np.unique(firsts, axis=0, return_counts=True)
    expected = 60_000 / len(counts)
    assert len(counts) > 100 and np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_half_of_the_sampled_rewards_are_not_zero() -> None:
    played = Played(AutoresetMode.DISABLED, 200, 300)
    frames, rewards = played.replay.sample_rewards(40_000, 3, np.random.default_rng(0))
    assert frames.shape == (40_000, 3, 3)
    # Of all steps a sixth at the most pays: a share of one half is the skewed sampling's. Five standard deviations.
    paying = np.array([pay(count) != 0 for _, _, count in played.happened])
    assert paying.mean() < 0.2
    assert abs((rewards != 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(40_000)
    assert {-1.0, 0.0, 1.0} == set(rewards.tolist())
    # Three frames of one episode in a row; the reward is of the step taken on the last.
    np.testing.assert_array_equal(frames[:, :, :2], frames[:, :1, :2].repeat(3, axis=1))
    np.testing.assert_array_equal(np.diff(frames[:, :, 2], axis=1), 1)
    np.testing.assert_array_equal(rewards, [pay(int(count)) for count in frames[:, 2, 2]])
    # Within a kind, every step alike.
    _, counts = np.unique(frames[rewards == 0, 2], axis=0, return_counts=True)
    assert np.abs(counts - counts.mean()).max() < 5 * np.sqrt(counts.mean())


def test_without_a_reward_all_are_zero_and_with_too_short_episodes_there_is_none() -> None:
    observation = ObservationSpec(kind="vector", shape=(1,))
    replay = SequenceReplay(observation, 10, 1)
    generator = np.random.default_rng(0)

    def add(count: float, reward: float, terminated: bool) -> None:
        ended = np.flatnonzero([terminated])
        frame = np.array([[count]], np.float32)
        step = Step(
            frame, np.array([reward], np.float32), np.array([terminated]), np.zeros(1, np.bool_), np.ones(1, np.bool_),
            ended, frame[ended] + 1, np.zeros(len(ended)), np.zeros(len(ended), np.int64),
        )  # fmt: skip
        replay.add(frame, np.zeros(1, np.int64), step)

    for _ in range(2):
        add(0, 0, False)
        add(1, 5, True)
    frames, rewards = replay.sample_rewards(7, 3, generator)
    assert frames.shape == (0, 3, 1) and rewards.shape == (0,)
    for count in range(3):
        add(count, 0, False)
    assert (replay.sample_rewards(50, 3, generator)[1] == 0).all()
    add(3, -2, False)
    assert set(replay.sample_rewards(50, 3, generator)[1].tolist()) == {0.0, -2.0}
    assert (replay.sample_rewards(50, 4, generator)[1] == -2).all()


def test_planes_come_back_from_their_bits() -> None:
    shape = (5, 3, 7)
    replay = SequenceReplay(ObservationSpec(kind="planes", shape=shape), 9, 2)
    random = np.random.default_rng(0)
    shown = random.random((6, 2, *shape)) < 0.5
    nobody = np.zeros(2, np.bool_)
    for t in range(6):
        step = Step(
            shown[t], np.full(2, t, np.float32), nobody, nobody, ~nobody, np.zeros(0, np.int64),
            shown[:0, 0], np.zeros(0), np.zeros(0, np.int64),
        )  # fmt: skip
        replay.add(shown[t], np.full(2, t), step)
    sequences = replay.sample_sequences(40, 4, random)
    assert sequences.observations.dtype == np.bool_
    first = sequences.rewards[0].astype(int)
    for piece in range(40):
        steps = int(sequences.valid[:, piece].sum())
        frames = sequences.observations[: steps + 1, piece]
        assert any(
            np.array_equal(frames, shown[first[piece] : first[piece] + steps + 1, copy]) for copy in range(2)
        )
    frames, rewards = replay.sample_rewards(10, 3, random)
    for shown_last, reward in zip(frames[:, 2], rewards, strict=True):
        assert any(np.array_equal(shown_last, shown[int(reward), copy]) for copy in range(2))


def test_a_saved_replay_samples_the_same() -> None:
    played = Played(AutoresetMode.DISABLED, 30, 77)
    other = SequenceReplay(played.envs.spec.observation, 30, 3)
    other.set_state(played.replay.get_state())
    for sample in (
        lambda replay: replay.sample_sequences(50, 5, np.random.default_rng(1)),
        lambda replay: replay.sample_rewards(50, 3, np.random.default_rng(1)),
    ):
        for one, two in zip(sample(played.replay), sample(other), strict=True):
            np.testing.assert_array_equal(one, two)
    state = played.replay.get_state()
    played.step()
    other.set_state(state)  # a copy, which the step above did not touch
    assert (other._kinds == state["kinds"]).all() and not (other._ages == played.replay._ages).all()


def test_cut_episodes_end_where_they_were_cut() -> None:
    played = Played(AutoresetMode.DISABLED, 60, 0)
    for _ in range(6):
        played.step()
    open_frames = {
        tuple(key)
        for copy in range(3)
        for key in [max(key for key in played.happened if key[0] == copy)]
        if not any(played.happened[key][1:])
    }
    assert open_frames
    played.replay.cut()
    played.observations = played.envs._reset_rows(np.ones(3, np.bool_))
    for _ in range(10):
        played.step()
    sequences = played.replay.sample_sequences(3000, 8, np.random.default_rng(0))
    shown = sequences.observations.astype(int)
    assert (shown[:, :, :2] == shown[:1, :, :2]).all()  # of one episode each
    firsts = {tuple(first) for first in shown[0].tolist()}
    assert not firsts & open_frames
    before = {(copy, episode, count - 1) for copy, episode, count in open_frames if count}
    assert before <= firsts
    assert not sequences.terminated[:, [tuple(f) in before for f in shown[0].tolist()]].any()
    frames, _ = played.replay.sample_rewards(3000, 3, np.random.default_rng(0))
    assert (frames[:, :, :2] == frames[:, :1, :2]).all()
