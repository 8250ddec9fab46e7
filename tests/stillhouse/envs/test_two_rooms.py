"""The two rooms of the tabular study of Distral: the map, the rewards, the ends, the states."""

from __future__ import annotations

import numpy as np

from stillhouse.envs.two_rooms import NO_ACTION, TwoRooms, state

ROOMS = TwoRooms(side=3, corridor=2)
UP, DOWN, LEFT, RIGHT = range(4)
#  0  1  2        9 10 11
#  3  4  5 18 19 12 13 14
#  6  7  8       15 16 17


def test_the_corridor_is_the_only_way_between_the_rooms() -> None:
    successors = ROOMS.successors()
    assert successors.shape == (20, 4)
    assert successors[5].tolist() == [2, 8, 4, 18]
    assert successors[18].tolist() == [18, 18, 5, 19]
    assert successors[19].tolist() == [19, 19, 18, 12]
    assert successors[12].tolist() == [9, 15, 19, 13]
    assert successors[2].tolist() == [2, 5, 1, 2]
    assert successors[17].tolist() == [14, 17, 16, 17]


def test_a_step_pays_for_the_goal_and_for_walls_and_remembers_what_was_done() -> None:
    cells = np.array([5, 2, 12, 12])
    actions = np.array([RIGHT, RIGHT, LEFT, UP])
    goals = np.array([0, 0, 9, 9])
    reached, rewards, terminated = ROOMS.step(
        ROOMS.successors(), goals, ROOMS.start(np.full(4, 19), np.zeros(4)) * 0 + cells * 10, actions
    )
    assert rewards.tolist() == [0, -0.1, 0, 1]
    assert terminated.tolist() == [False, False, False, True]
    expected = [state(18, RIGHT, False), state(2, RIGHT, True), state(19, LEFT, False), state(9, UP, False)]
    assert reached.tolist() == [int(each) for each in expected]


def test_states_have_different_numbers() -> None:
    cells, actions, bumped = np.indices((20, NO_ACTION + 1, 2))
    assert sorted(state(cells, actions, bumped).reshape(-1)) == list(range(ROOMS.states))


def test_episodes_start_in_every_cell_of_the_rooms_but_the_goal() -> None:
    chances = np.arange(17) / 17
    starts = ROOMS.start(np.full(17, 4), chances)
    cells = [cell for cell in range(18) if cell != 4]
    assert starts.tolist() == [int(state(cell, NO_ACTION, False)) for cell in cells]
    assert ROOMS.start(np.array(17), np.array(0.999999)) == state(16, NO_ACTION, False)


def test_best_rates_are_those_of_the_shortest_ways() -> None:
    # To cell 5: 2 1.. in its own room, and 3 steps more than to cell 12 from the other.
    own = [3, 2, 1, 2, 1, 3, 2, 1]
    other = [4, 5, 6, 3, 4, 5, 4, 5, 6]
    found = ROOMS.best_rates(np.array([5, 14]))
    assert np.isclose(found[0], 17 / (sum(own) + sum(other)))
    assert found[1] < found[0]
