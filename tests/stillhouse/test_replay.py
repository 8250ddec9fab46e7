"""Replay: n-step sums across ends of both kinds, and the round trip of its state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.replay.uniform import UniformReplay
from stillhouse.types import ObservationSpec

VECTOR = ObservationSpec(kind="vector", shape=(1,))


def transitions(replay: UniformReplay) -> list[tuple[float, ...]]:
    state = replay.get_state()
    names = ("observations", "actions", "returns", "discounts", "successors")
    return sorted(
        tuple(float(np.ravel(state[name][row])[0]) for name in names) for row in range(state["size"])
    )


def feed(replay: UniformReplay, steps: list[tuple[float, float, bool, bool]]) -> None:
    """One copy: (observation, reward, terminated, truncated); the successor is observation + 1."""
    for observation, reward, terminated, truncated in steps:
        replay.add(
            np.array([[observation]], np.float32),
            np.array([int(observation) % 2]),
            np.array([reward], np.float32),
            np.array([terminated]),
            np.array([truncated]),
            np.array([[observation + 1]], np.float32),
            np.array([True]),
        )


def test_three_step_sums_by_hand() -> None:
    replay = UniformReplay(VECTOR, 100, 1, 3, 0.5)
    feed(replay, [(0, 1, False, False), (1, 2, False, False), (2, 4, False, False), (3, 8, False, True)])
    feed(replay, [(10, 1, False, False), (11, 2, True, False)])
    assert transitions(replay) == [
        (0, 0, 1 + 1 + 1, 0.125, 3),  # three rewards
        (1, 1, 2 + 2 + 2, 0.125, 4),
        (2, 0, 4 + 4, 0.25, 4),  # cut by the truncation, which is bootstrapped from
        (3, 1, 8, 0.5, 4),
        (10, 0, 1 + 1, 0.0, 12),  # terminated: nothing to bootstrap from
        (11, 1, 2, 0.0, 12),
    ]


def test_rows_that_are_no_transitions_are_passed_over() -> None:
    replay = UniformReplay(VECTOR, 10, 2, 1, 0.9)
    ones = np.ones((2, 1), np.float32)
    flags = np.zeros(2, np.bool_)
    replay.add(
        ones, np.zeros(2, np.int64), np.ones(2, np.float32), flags, flags, ones, np.array([True, False])
    )
    assert replay.size == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_n_step_against_a_plain_loop(seed: int, n_step: int) -> None:
    generator = np.random.default_rng(seed)
    length, gamma = 40, 0.9
    rewards = generator.normal(size=length).astype(np.float32)
    terminated = generator.random(length) < 0.15
    truncated = ~terminated & (generator.random(length) < 0.15)
    replay = UniformReplay(VECTOR, 100, 1, n_step, gamma)
    feed(replay, [(float(t), rewards[t], terminated[t], truncated[t]) for t in range(length)])
    expected = []
    for start in range(length):
        total, t = 0.0, start
        while True:
            total += gamma ** (t - start) * rewards[t]
            if terminated[t] or truncated[t] or t - start + 1 == n_step:
                discount = 0.0 if terminated[t] else gamma ** (t - start + 1)
                expected.append((float(start), float(start % 2), total, discount, float(t + 1)))
                break
            t += 1
            if t == length:
                break  # the sum still grows: not stored yet
    np.testing.assert_allclose(transitions(replay), sorted(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "observation",
    [VECTOR, ObservationSpec(kind="planes", shape=(3, 3, 2)), ObservationSpec(kind="discrete", shape=(5,))],
)
def test_what_is_sampled_was_added_also_after_a_round_trip(observation: ObservationSpec) -> None:
    generator = np.random.default_rng(0)
    replay = UniformReplay(observation, 16, 3, 2, 0.99)

    def random_observations() -> np.ndarray:
        return generator.integers(2, size=(3, *observation.stored_shape)).astype(observation.dtype)

    seen = set()
    for _ in range(20):
        now, successors = random_observations(), random_observations()
        seen |= {row.tobytes() for row in now}
        flags = np.zeros(3, np.bool_)
        replay.add(now, np.arange(3), np.ones(3, np.float32), flags, flags, successors, ~flags)
    assert replay.size == replay.capacity == 16
    sampled = replay.sample(50, np.random.default_rng(1))
    assert sampled[0].dtype == observation.dtype and sampled[0].shape == (50, *observation.stored_shape)
    assert {row.tobytes() for row in sampled[0]} <= seen
    copy = UniformReplay(observation, 16, 3, 2, 0.99)
    copy.set_state(replay.get_state())
    for left, right in zip(sampled, copy.sample(50, np.random.default_rng(1)), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("count", [0, 5, 8, 13])
@pytest.mark.parametrize("capacity", [3, 8, 20])
def test_a_replay_taken_over_by_one_of_another_capacity_holds_the_newest_rows(
    count: int, capacity: int
) -> None:
    first = UniformReplay(VECTOR, 8, 1, 1, 0.5)
    feed(first, [(float(t), 1, False, t % 4 == 3) for t in range(1, count + 1)])
    second = UniformReplay(VECTOR, capacity, 3, 1, 0.5)
    second.take_over(first.get_state())
    kept = min(count, 8, capacity)
    assert [row[0] for row in transitions(second)] == list(range(count - kept + 1, count + 1))
    # What comes next overwrites the oldest, and no row is sampled that nobody has written.
    ones, flags = np.full((3, 1), 100, np.float32), np.zeros(3, np.bool_)
    second.add(ones, np.zeros(3, np.int64), np.ones(3, np.float32), flags, flags, ones, ~flags)
    expected = [*range(count - kept + 1, count + 1), 100, 100, 100][-capacity:]
    assert [row[0] for row in transitions(second)] == expected
    state = second.get_state()
    new = state["observations"][:, 0] == 100
    episodes = state["places_in_episodes"][:, 0]
    assert len(set(episodes[new])) == 3 and not set(episodes[new]) & set(episodes[~new])
