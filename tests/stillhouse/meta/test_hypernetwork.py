"""The hypernetwork: sets of its own task only, deterministic, exactly resumed, evaluated without change; it learns."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stillhouse.checkpoint import load_state, save_checkpoint, save_state
from stillhouse.envs.cartpole_family import TRANSITION_WIDTH, environment
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import evaluate, network_policy
from stillhouse.meta import METHODS
from stillhouse.meta.hypernetwork import HEAD, Hypernetwork, HypernetworkConfig, play

torch.set_num_threads(1)


def learner(seed: int = 0, **settings: Any) -> Hypernetwork:
    small = {
        "tasks": 4,
        "copies": 2,
        "updates": 4,
        "rollout_length": 8,
        "transitions": 6,
        "widths": (8, 8),
        "encoder_width": 8,
        "context": 4,
        "epochs": 2,
        "minibatches": 2,
        "evaluation_episodes": 2,
        "family": {"swapped": True},
    }
    return Hypernetwork(HypernetworkConfig.model_validate(small | settings), seed)


def train(learner: Hypernetwork) -> list[dict[str, float]]:
    return [report.metrics for report in learner.train()]


def values(learner: Hypernetwork) -> torch.Tensor:
    return learner.parameters.values.detach().clone()


def test_it_is_registered() -> None:
    assert METHODS["hypernetwork"] == ("Hypernetwork", "HypernetworkConfig")


@pytest.mark.parametrize("conditioning", ["none", "context", "film", "weights"])
def test_the_same_seed_gives_the_same_bytes(conditioning: str) -> None:
    first, second = (learner(conditioning=conditioning) for _ in range(2))
    assert train(first) == train(second)
    assert torch.equal(values(first), values(second))
    assert not torch.equal(values(first), values(learner(1, conditioning=conditioning)))
    assert set(learner.columns if False else first.columns) <= set(
        train(learner(updates=8, rollout_length=32))[-1]
    )


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole = learner(conditioning="film")
    reports = train(whole)
    begun = learner(conditioning="film")
    training = begun.train()
    seen = [next(training).metrics, next(training).metrics]
    save_state(tmp_path / "state", begun.get_state())
    resumed = learner(conditioning="film")
    resumed.set_state(load_state(tmp_path / "state"))
    seen += train(resumed)
    assert seen == reports
    assert torch.equal(values(resumed), values(whole))
    one, other = (each.evaluate(3, 1, seed=7) for each in (resumed, whole))
    assert np.array_equal(one.values, other.values)


def test_reports_hold_what_the_curve_shows() -> None:
    found = learner(updates=2, rollout_length=32)
    assert set(found.columns) <= set(train(found)[-1])
    assert found.updates == 2 and 0 < found.env_steps <= 2 * 32 * 8 and found.episodes > 0


def test_sets_hold_transitions_of_their_own_task_only() -> None:
    found = learner(tasks=3, copies=2, updates=1, transitions=5, rollout_length=4)
    rows, present = found._sets()
    assert not present.any()  # nothing was seen yet
    rollout = found._rollout
    rollout["valid"][:] = True
    rollout["valid"][2, 1] = False  # a row of the first task that is no transition
    rollout["successors"][:] = 0
    rollout["actions"][:] = 0
    for copy_number in range(6):  # the observation says whose it is, and when
        rollout["observations"][:, copy_number, 1] = 2.0 * copy_number
        rollout["observations"][:, copy_number, 3] = 2.0 * np.arange(4)
    sizes = []
    for _ in range(50):
        rows, present = found._sets()
        sizes += present.sum(1).tolist()
        for index in range(6):
            members = rows[index][present[index]]
            owners, times = members[:, 1].round().int(), members[:, 3].round().int()
            assert set(owners.tolist()) <= {2 * (index // 2), 2 * (index // 2) + 1}
            pairs = list(zip(owners.tolist(), times.tolist()))
            assert len(set(pairs)) == len(pairs) and (1, 2) not in pairs
            assert not rows[index][~present[index]].any()
    assert set(sizes) == {0, 1, 2, 3, 4, 5}


def test_invalid_rows_change_no_gradient() -> None:
    found = learner(conditioning="film", tasks=2, minibatches=1)
    found._rollout["valid"][:] = True
    rows, present = found._sets()
    found._play(rows, present)
    found._rollout["valid"][3, 1] = False
    gradients = []
    for junk in (0.0, 50.0):
        columns = found._columns()
        columns["observations"][1, 3] = junk
        columns["advantages"][1, 3] = junk
        columns["returns"][1, 3] = junk
        found.parameters.zero_gradient()
        found._backward(rows, present, columns, torch.arange(4))
        gradients.append(found.parameters.gradient.clone())
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_the_policy_does_not_see_the_task_and_the_critic_does() -> None:
    found = learner(conditioning="film")
    observations = torch.zeros(2, 1, 4)
    a, b = found._values(observations, torch.tensor([[-1.0, 0, 0, 0, 1], [1.0, 0, 0, 0, 1]])).squeeze(1)
    assert a != b
    assert set(found.learnt()) == set(found.policy.state_dict())
    assert not any("critic" in name for name in found.learnt())


def test_evaluation_leaves_the_learner_as_it_was() -> None:
    found = learner()
    training = found.train()
    next(training)
    before = copy.deepcopy(found.get_state())
    first, second = (found.evaluate(3, 2, seed=1) for _ in range(2))
    assert np.array_equal(first.values, second.values)
    assert first.steps == [0, 1, 2] and first.values.shape == (3, 3)
    assert first.measure == "return" and first.unit == "episodes"
    assert first.baselines["random"].shape == (3, 1) and (first.baselines["random"] > 5).all()
    after = found.get_state()
    assert str(before) == str(after)


def test_what_was_learnt_is_taken_over(tmp_path: Path) -> None:
    found = learner(conditioning="weights")
    train(found)
    save_state(tmp_path / "learnt", found.learnt())
    other = learner(5, conditioning="weights")
    other.load(load_state(tmp_path / "learnt"))
    one, two = (each.evaluate(2, 1, seed=3).values for each in (found, other))
    assert np.array_equal(one, two)


def test_data_change_the_network_that_is_made(tmp_path: Path) -> None:
    found = learner(conditioning="film")
    train(found)
    random = np.random.default_rng(0)
    data = random.normal(size=(2, 30, TRANSITION_WIDTH)).astype(np.float32)
    observations = random.normal(size=(50, 4)).astype(np.float32)
    empty, one, other = (
        network_policy(found.network(each), HEAD)(observations) for each in (data[0, :0], *data)
    )
    assert not np.array_equal(one, other) and not np.array_equal(one, empty)
    shuffled = network_policy(found.network(data[0, ::-1]), HEAD)(observations)
    np.testing.assert_allclose(shuffled, one, atol=1e-5)
    network = found.network(data[0])
    save_checkpoint(tmp_path / "made", network, {})  # as ordinary as any
    task = found.tasks[0]
    assert len(evaluate(network_policy(network, HEAD), environment(task), 3, 0).returns) == 3


def test_playing_one_episode_a_copy() -> None:
    """Pushing to one side always: every episode is short, and as long as its transitions are many."""
    tasks = np.array([[0.5, 9.8, 10.0, 0.1, 0], [0.5, 9.8, 10.0, 0.1, 1], [2.0, 9.8, 5.0, 0.1, 0]])
    layers = [(torch.zeros(3, 2, 4), torch.tensor([[0.0, 1.0]]).expand(3, 2))]
    found = play(layers, tasks, 500, 5, 0, "test", None)
    assert found.returns.shape == (3, 5)
    assert [len(rows) for rows in found.transitions] == found.returns.sum(axis=1).tolist()
    assert ((found.returns >= 7) & (found.returns <= 30)).all() and (found.returns[0] <= 11).all()
    pushes = [rows[:, 6].mean() for rows in found.transitions]  # change of velocity
    assert pushes[0] > 0 > pushes[1]
    again = play(layers, tasks, 500, 5, 0, "test", None)
    assert np.array_equal(found.returns, again.returns)


def test_a_loss_that_is_not_finite_stops_it() -> None:
    found = learner(updates=2)
    with torch.no_grad():
        found.parameters.values[-1] = torch.nan
    with pytest.raises(StillhouseError, match="loss became nan after 1 updates; no result is written; lower"):
        train(found)


def test_bad_settings_are_refused() -> None:
    for bad in (
        {"tasks": 1, "copies": 1, "minibatches": 2},
        {"widths": (0,)},
        {"conditioning": "magic"},
        {"family": {"name": "navigation"}},
    ):
        with pytest.raises(ValidationError):
            HypernetworkConfig.model_validate(bad)


@pytest.mark.learning
def test_an_episode_of_data_tells_which_side_is_which() -> None:
    """Over 5 seeds the worst unseen task is played better after an episode than before it: a sign test, p = 1/32."""
    settings: dict[str, Any] = {
        "family": {
            "ranges": {
                "pole_length": (0.4, 1),
                "force": (8, 12),
                "gravity": (9.8, 9.8),
                "pole_mass": (0.1, 0.1),
            },
            "swapped": True,
        },
        "tasks": 8,
        "updates": 80,
        "rollout_length": 32,
        "transitions": 16,
        "widths": (32, 32),
        "encoder_width": 32,
        "context": 8,
        "epochs": 4,
        "minibatches": 4,
        "learning_rate": 3e-3,
        "evaluation_episodes": 4,
    }
    gains = []
    for seed in range(5):
        found = learner(seed, **settings)
        train(found)
        before, after = found.evaluate(8, 1, seed).values.T
        # Without data the tasks of one side, at least, are played badly.
        gains.append(float(after.min() - before.min()))
    assert min(gains) > 0, gains
