"""Sinusoids: no task in two splits, each split distributed as the family, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.config import parse
from stillhouse.envs.sinusoid import (
    CELLS,
    SinusoidConfig,
    draw,
    draw_inputs,
    even_inputs,
    held_out,
    split_of,
    values,
)
from stillhouse.errors import StillhouseError

SPLITS = {"training": 0, "validation": 1, "test": 2}


def test_values_by_hand() -> None:
    tasks = np.array([[2.0, 0.0], [3.0, math.pi / 2]])
    found = values(tasks, np.array([[0.0, math.pi / 2], [math.pi / 2, math.pi]]))
    assert np.allclose(found, [[0, 2], [0, 3]])


@given(
    low=st.floats(0, 3),
    width=st.just(0.0) | st.floats(1e-5, 3),
    phases=st.floats(0.01, 2 * math.pi),
    seed=st.integers(0, 99),
)
def test_no_task_is_in_two_splits(low: float, width: float, phases: float, seed: int) -> None:
    config = SinusoidConfig(smallest_amplitude=low, largest_amplitude=low + width, largest_phase=phases)
    for split, number in SPLITS.items():
        tasks = draw(config, split, 500, np.random.default_rng(seed))
        assert (split_of(config, tasks) == number).all()
        assert (tasks >= config.bounds[0]).all() and (tasks <= config.bounds[1]).all()


def test_a_family_of_one_amplitude_is_split_by_its_phases_alone() -> None:
    config = SinusoidConfig(smallest_amplitude=1, largest_amplitude=1)
    cells = {
        split: set(
            (draw(config, split, 2000, np.random.default_rng(0))[:, 1] / math.pi * CELLS).astype(int).tolist()
        )
        for split in SPLITS
    }
    assert len(cells["test"]) == 4 and len(cells["validation"]) == 4 and len(cells["training"]) == 12
    assert not cells["training"] & cells["test"] and not cells["validation"] & cells["test"]


@pytest.mark.parametrize("split", list(SPLITS))
def test_amplitudes_and_phases_of_a_split_are_distributed_as_the_familys(split: str) -> None:
    config = SinusoidConfig()
    tasks = draw(config, split, 40_000, np.random.default_rng(1))  # type: ignore[arg-type]
    shares = (tasks - config.bounds[0]) / (config.bounds[1] - config.bounds[0])
    for column in shares.T:
        counts = np.histogram(column, bins=CELLS, range=(0, 1))[0]
        assert np.abs(counts / 40_000 * CELLS - 1).max() < 0.12  # 2000 in a bin: 5 standard deviations
    # Neither do they depend on each other, as they would with a diagonal pattern.
    assert abs(np.corrcoef(shares.T)[0, 1]) < 0.05


def test_held_out_tasks_differ_and_are_the_seeds_own() -> None:
    config = SinusoidConfig(test_tasks=50)
    first, again, other = held_out(config, 50, 3), held_out(config, 50, 3), held_out(config, 50, 4)
    assert len({tuple(task) for task in first.tolist()}) == 50
    assert (first == again).all() and (first != other).any()
    assert {tuple(task) for task in first.tolist()} == {tuple(task) for task in other.tolist()}
    assert (split_of(config, held_out(config, 50, 3, "validation")) == 1).all()


def test_inputs_lie_in_their_interval() -> None:
    config = SinusoidConfig(smallest_input=1, largest_input=3)
    assert np.allclose(even_inputs(config, 4), [1.25, 1.75, 2.25, 2.75])
    drawn = draw_inputs(config, 7, 30, np.random.default_rng(0))
    assert drawn.shape == (7, 30) and drawn.min() >= 1 and drawn.max() <= 3


def test_more_test_tasks_than_there_are_is_refused() -> None:
    with pytest.raises(StillhouseError, match="601 test tasks were asked for, but 1 to 600 are there"):
        held_out(SinusoidConfig(test_tasks=600), 601, 0)
    with pytest.raises(StillhouseError, match="0 validation tasks"):
        held_out(SinusoidConfig(), 0, 0, "validation")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {
                "smallest_amplitude": 1,
                "largest_amplitude": 1,
                "smallest_phase": 2,
                "largest_phase": 2,
            },
            "a family with one member",
        ),
        ({"smallest_amplitude": 1, "largest_amplitude": 1 + 1e-9}, "too narrow to be cut into cells"),
        ({"smallest_amplitude": 6}, "smallest_amplitude 6 is above largest_amplitude 5"),
        ({"smallest_input": 5}, "nothing to regress"),
        ({"largest_phase": 7}, "largest_phase"),
        ({"test_tasks": 0}, "test_tasks"),
        ({"amplitude": 1}, "unknown parameter"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, float], words: str) -> None:
    with pytest.raises(StillhouseError, match=words) as error:
        parse(SinusoidConfig, settings, "meta_train.sines.family")
    assert "\n" not in str(error.value)
