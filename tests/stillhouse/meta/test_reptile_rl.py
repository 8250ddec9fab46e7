"""Reptile with a policy gradient inside: its update by hand, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse import seeding
from stillhouse.checkpoint import load_state, save_state
from stillhouse.config import parse
from stillhouse.errors import StillhouseError
from stillhouse.meta.inner_update import inner_gradient
from stillhouse.meta.reptile_rl import ReptileRl, ReptileRlConfig
from stillhouse.meta.trajectories import Batch, make_batch, play

TINY: dict[str, Any] = {
    "family": {"name": "cartpole", "horizon": 8},
    "hidden": (3,),
    "tasks": 3,
    "rollouts": 4,
    "meta_updates": 4,
    "inner_steps": 2,
    "inner_rate": 0.4,
    "test_rollouts": 3,
}


def learner(seed: int = 0, **settings: Any) -> ReptileRl:
    return ReptileRl(parse(ReptileRlConfig, TINY | settings), seed)


def test_an_update_moves_a_share_of_the_way_to_the_mean_of_the_adapted() -> None:
    found = learner(outer_rate=0.5)
    start = found.initial.clone()
    # The same update, task by task and step by step.
    random = seeding.generator(0, "meta-train", 0)
    tasks = found.family.sample("train", 3, random)
    parameters = start.repeat(3, 1)
    for rate in (0.4, 0.2):
        played = play(found.policy, found.family, parameters, tasks, 4, random)
        batch = make_batch(found.policy, played, 0.99, 1.0)
        moved = []
        for n in range(3):
            one = Batch(*(part[n : n + 1] for part in batch))
            moved.append(
                parameters[n] + rate * inner_gradient(found.policy, "ratio", parameters[n : n + 1], one)[0]
            )
        parameters = torch.stack(moved)
    found.update()
    torch.testing.assert_close(found.initial, start + 0.5 * (parameters.mean(0) - start))


def test_the_outer_rate_falls_to_0() -> None:
    found = learner(meta_updates=2)
    found.updates = 2
    before = found.initial.clone()
    found.update()
    assert torch.equal(found.initial, before)


def test_interrupted_and_uninterrupted_training_end_in_the_same_bytes(tmp_path: Path) -> None:
    whole = learner(5)
    reports = list(whole.train())
    first = learner(5)
    for report in first.train():
        if report.done == 2:
            break
    save_state(tmp_path / "state", first.get_state())
    second = learner(5)
    second.set_state(load_state(tmp_path / "state"))
    assert [report.metrics for report in second.train()] == [report.metrics for report in reports[2:]]
    assert torch.equal(whole.learnt()["initial"], second.learnt()["initial"])
    assert set(whole.columns) <= set(reports[0].metrics)


def test_evaluation_and_export() -> None:
    found = learner(1)
    adaptation = found.evaluate(4, 2, 0)
    assert adaptation.values.shape == (4, 3)
    assert (adaptation.baselines["oracle"] == 8).all()
    other = learner(2)
    other.load({"initial": found.learnt()["initial"].numpy()})
    assert (other.evaluate(4, 2, 0).values == adaptation.values).all()
    observations = torch.zeros(1, 4)
    assert found.network()(observations, "cartpole").shape == (1, 2)


def test_a_mistake_is_one_line() -> None:
    with pytest.raises(StillhouseError, match="inner_steps: Input should be greater than or equal to 1"):
        learner(inner_steps=0)
    diverged = learner()
    diverged.initial = diverged.initial + float("inf")
    with pytest.raises(StillhouseError, match="reptile_rl: the policy is not finite after meta-update 1"):
        next(diverged.train())
