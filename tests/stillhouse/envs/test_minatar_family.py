"""MinAtar's views as a family: the split, and copies that play what the ordinary environment plays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stillhouse.config import parse
from stillhouse.envs.families import FamilyConfig, make_family
from stillhouse.envs.make import EnvironmentConfig, make_vector
from stillhouse.envs.minatar_family import MinAtarFamily
from stillhouse.errors import StillhouseError
from stillhouse.meta.maml_rl import MamlRl, MamlRlConfig


@pytest.mark.parametrize("game", ["breakout", "space_invaders"])
def test_every_member_is_in_one_split(game: str) -> None:
    family = MinAtarFamily(game)
    train, test = family.members("train"), family.members("test")
    orders = {4: 24, 6: 720}[family.channels]
    assert train is not None and test is not None
    by_hand = sum((order + flip) % 5 == 0 for order, flip in itertools.product(range(orders), range(4)))
    assert (train, test) == (4 * orders - by_hand, by_hand)


def test_asking_for_all_members_gives_each_once_and_more_repeats_them() -> None:
    family, random = MinAtarFamily(), np.random.default_rng(0)
    found = {}
    for split in ("train", "test"):
        members = family.members(split)
        assert members is not None
        tasks = family.sample(split, members, random)
        found[split] = {tuple(task) for task in tasks}
        assert tasks.shape == (members, 2) and len(found[split]) == members
        assert len({tuple(task) for task in family.sample(split, members + 3, random)}) == members
    assert len(found["train"] | found["test"]) == 96 and not found["train"] & found["test"]
    assert (0, 0) in found["test"]  # the game as it usually is
    assert len(np.unique(family.sample("train", 20, random), axis=0)) == 20


@pytest.mark.parametrize("game", ["breakout", "asterix"])
def test_copies_play_what_the_ordinary_environment_plays(game: str) -> None:
    family = MinAtarFamily(game)
    tasks = family.sample("train", 2, np.random.default_rng(1))
    state = family.reset(tasks, 3, np.random.default_rng(2))
    seeds = np.random.default_rng(2).integers(2**32, size=6).reshape(2, 3)
    actions = np.random.default_rng(3)
    played = actions.integers(6, size=(60, 2, 3))
    envs = [
        make_vector(EnvironmentConfig(id=f"MinAtar/{game.capitalize()}-v0", options=family.options(task)), 3)
        for task in tasks
    ]
    seen = [env.reset(seed=[int(each) for each in own])[0] for env, own in zip(envs, seeds, strict=True)]
    ended = np.zeros((2, 3), np.bool_)
    rewarded = 0.0
    for step in played:
        observed = family.observe(state)
        assert observed.shape == (2, 3, family.observations) and observed.dtype == np.float32
        assert (observed == np.stack(seen).reshape(observed.shape)).all()
        before = [part.copy() for part in (*state.games.values(), state.planes)]
        following, rewards, terminated = family.step(tasks, state, step)
        assert all((a == b).all() for a, b in zip(before, (*state.games.values(), state.planes), strict=True))
        again = family.step(tasks, state, step)
        assert (again[1] == rewards).all() and (family.observe(again[0]) == family.observe(following)).all()
        others = [env.step(own) for env, own in zip(envs, step, strict=True)]
        seen = [other[0] for other in others]
        assert (rewards == np.stack([other[1] for other in others])).all()
        assert (terminated == np.stack([other[2] for other in others])).all()
        ended |= terminated
        rewarded += float(rewards.sum())
        state = following
    assert ended.any() and rewarded > 0


def test_the_permutations_are_in_lexicographic_order() -> None:
    family = MinAtarFamily()
    found = [tuple(family.options(np.array([order, 0]))["permute_planes"]) for order in range(24)]
    assert found == list(itertools.permutations(range(4)))


def test_a_policy_is_meta_trained_on_it() -> None:
    config = parse(
        MamlRlConfig,
        {
            "family": {"name": "minatar", "horizon": 20},
            "tasks": 3,
            "rollouts": 4,
            "hidden": [8],
            "meta_updates": 1,
        },
    )
    learner = MamlRl(config, 0)
    before = learner.initial.data.clone()
    (report,) = learner.train()
    assert np.isfinite(list(report.metrics.values())).all() and not (learner.initial.data == before).all()
    found = learner.evaluate(5, 1, 0)
    assert found.values.shape == (5, 2)
    with pytest.raises(StillhouseError, match="19"):
        learner.evaluate(30, 1, 0)


def test_a_game_is_of_minatar_alone() -> None:
    assert isinstance(make_family(FamilyConfig(name="minatar", game="freeway")), MinAtarFamily)
    with pytest.raises(
        StillhouseError, match=r"family.game: 'freeway' was given, but cartpole is no game of MinAtar"
    ):
        make_family(FamilyConfig(name="cartpole", game="freeway"))
    with pytest.raises(StillhouseError, match="minatar has no physical constants"):
        make_family(FamilyConfig(name="minatar", ranges={"gravity": (1.0, 2.0)}))
    with pytest.raises(StillhouseError, match="game: Input should be"):
        parse(FamilyConfig, {"name": "minatar", "game": "pong"})
