"""Retraining: what is in production is trained on, judged, replaced or kept, and put back."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from clones import make_clone, stillhouse

from flows.production import next_generation
from flows.retraining import _capped, _check_override
from stillhouse.errors import StillhouseError

EASY = """
import gymnasium, numpy as np

class Easy(gymnasium.Env):
    # Ten steps, each worth its action.
    observation_space = gymnasium.spaces.Box(0, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return self.np_random.random(2, np.float32), {}

    def step(self, action):
        self.at += 1
        return self.np_random.random(2, np.float32), float(action), self.at == 10, False, {}

gymnasium.register("Easy-v0", entry_point=Easy, max_episode_steps=20)
"""
# Acrobot cut at 60 steps gives -60 to everyone: there is no score, and no student could ever be better.
TINY = """
seeds: [0]
environments: {easy: {id: Easy-v0, module: easy}, acrobot: {id: Acrobot-v1, max_episode_steps: 60}}
train_teacher:
  easy: {algorithm: dqn, env_steps: 1000, learning_starts: 200}
  acrobot: {algorithm: pqn, env_steps: 1024, num_envs: 8, rollout_length: 32, minibatches: 4}
collect_dataset: {easy: {transitions: 500}, acrobot: {transitions: 500}}
distill_student:
  small: {environments: [easy, acrobot], updates: 40, evaluation_interval: 20, batch_size: 64, size: {features: 16, torso: [16]}}
retraining: {env_steps: 256, updates: 20, episodes: 8}
"""
STAGES = ("--only", "train_teacher", "--only", "collect_dataset", "--only", "distill_student")
ANYTHING = ("--probability", "0", "--floor", "0")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("retraining") / "clone"
    path.mkdir()
    (path / "easy.py").write_text(EASY)
    clone = make_clone(path, "tiny", tiny=TINY)
    stillhouse(clone, "run", "tiny", "--in-place", *STAGES)
    git(clone, "add", "--all")
    git(clone, "commit", "--quiet", "--message", "trained")
    git(clone, "branch", "--move", "main")
    return clone


def git(clone: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=clone, check=True, capture_output=True, text=True
    ).stdout.strip()


def about(clone: Path) -> dict:
    return json.loads((clone / "data/production/production.json").read_text())


def test_nothing_can_be_retrained_or_rolled_back_before_something_is_in_production(clone: Path) -> None:
    for command in ("retrain", "rollback"):
        assert "nothing is in production yet" in stillhouse(clone, command, code=2)
    said = stillhouse(clone, "promote", "smal-s0", code=2)
    assert "'smal-s0' is no student here (did you mean 'small-s0'?)" in said


def test_production_is_promoted_trained_on_replaced_and_put_back(clone: Path) -> None:
    (clone / "README.md").write_text("an edit that is nobody's business\n")
    said = stillhouse(clone, "promote", "small-s0")
    assert said == f"small-s0 is in production: commit {git(clone, 'rev-parse', '--short=12', 'HEAD')}\n"
    assert git(clone, "show", "--format=%s", "--name-only").splitlines() == [
        "Promote small of generation 0",
        "",
        "data/production.dvc",
    ]
    assert git(clone, "status", "--porcelain") == "M README.md"
    first = about(clone)
    assert first["generation"] == 0 and first["environments"] == ["acrobot", "easy"]

    # Acrobot gives no score, so production stays, and the run says why.
    said = stillhouse(clone, "retrain", *ANYTHING)
    assert "generation 0 stays in production: promotion: acrobot at none of production" in said
    assert about(clone) == first
    head = git(clone, "rev-parse", "HEAD")
    worktrees = clone / ".stillhouse/worktrees"
    (kept,) = worktrees.iterdir()
    decision = json.loads((kept / "data/evaluation/promotion.json").read_text())
    assert decision["generation"] == 1 and decision["against"] == 0 and not decision["promote"]
    again = json.loads((kept / "data/teachers/easy-s0.json").read_text())
    assert again["env_steps"] == 1000 + 256, "the teacher went on"
    hashes = [(folder / "data/datasets/easy-s0/manifest.json").read_text() for folder in (clone, kept)]
    assert hashes[0] != hashes[1], "the dataset is fresh"

    # The next attempt is another one, with seeds of its own, though nothing else has changed.
    said = stillhouse(clone, "retrain", *ANYTHING)
    decisions = [
        json.loads((path / "data/evaluation/promotion.json").read_text()) for path in worktrees.iterdir()
    ]
    assert sorted(decision["generation"] for decision in decisions) == [1, 2]
    datasets = [(path / "data/datasets/easy-s0/manifest.json").read_text() for path in worktrees.iterdir()]
    assert datasets[0] != datasets[1], "each attempt has random numbers of its own"
    assert git(clone, "rev-parse", "HEAD") == head


def test_a_better_one_is_promoted_by_a_commit_and_rolled_back_by_another(clone: Path) -> None:
    suite = clone / "params/suites/tiny.yaml"
    suite.write_text(TINY.replace("environments: [easy, acrobot]", "environments: [easy]"))
    stillhouse(clone, "run", "tiny", "--in-place", *STAGES)
    git(clone, "add", "--all")
    git(clone, "commit", "--quiet", "--message", "one environment")
    stillhouse(clone, "promote", "small-s0")
    by_hand = about(clone)["generation"]

    # Today's suite is another one, and the files of production were never brought here: neither matters.
    suite.write_text(TINY.replace("algorithm: dqn, ", "algorithm: dqn, gamma: 0.5, "))
    git(clone, "commit", "--quiet", "--all", "--message", "another suite")
    shutil.rmtree(clone / "data/production")
    said = stillhouse(clone, "retrain", *ANYTHING, "--set", "retraining.learning_rate_factor=0.4")
    assert f"generation {by_hand + 1} is in production (commit " in said
    assert about(clone)["generation"] == by_hand + 1 and about(clone)["decision"]["promote"]
    params = about(clone)["params"]
    assert params["train_teacher"]["easy"]["gamma"] == 0.99
    assert params["distill_student"]["small"]["environments"] == ["easy"]
    # What was said for this one attempt is not said for the next.
    assert params["retraining"]["generation"] == 0 and params["retraining"]["learning_rate_factor"] == 0.5
    assert about(clone)["decision"]["promotion"]["capped_share"]["candidate"] == {"easy": 0.0}
    assert "better with probability" in git(clone, "show", "--format=%b", "--no-patch")
    assert git(clone, "status", "--porcelain") == ""
    teacher = json.loads((clone / "data/production/teachers/easy/spec.json").read_text())
    assert teacher["details"]["env_steps"] == 1000 + 256

    said = stillhouse(clone, "retrain", "--probability", "1", "--floor", "50")
    assert "the floor is 50" in said and about(clone)["generation"] == by_hand + 1

    # Better, but nobody can move the branch: what took so long to make is kept.
    worktrees = {*(clone / ".stillhouse/worktrees").iterdir()}
    head, pointer = git(clone, "rev-parse", "HEAD"), (clone / "data/production.dvc").read_text()
    hook = clone / ".git/hooks/reference-transaction"
    hook.write_text('#!/bin/sh\nif [ "$1" = prepared ] && grep -q refs/heads/main; then exit 1; fi\n')
    hook.chmod(0o755)
    said = " ".join(stillhouse(clone, "retrain", *ANYTHING, code=1).split())
    hook.unlink()
    assert "is better, but was not promoted: main could not be moved to the new commit" in said
    assert "production stays as it is" in said
    (kept,) = {*(clone / ".stillhouse/worktrees").iterdir()} - worktrees
    assert str(kept.relative_to(clone)) in said and (kept / "data/students/small-s0/spec.json").exists()
    assert kept.name in git(clone, "for-each-ref", "refs/exps"), "and saved"
    assert git(clone, "rev-parse", "HEAD") == head and git(clone, "status", "--porcelain") == ""
    assert (clone / "data/production.dvc").read_text() == pointer
    assert about(clone)["generation"] == by_hand + 1

    said = stillhouse(clone, "rollback")
    assert said.startswith(f"generation {by_hand} is in production: commit ")
    assert about(clone)["generation"] == by_hand
    assert git(clone, "log", "-1", "--format=%s") == (
        f"Roll production back from generation {by_hand + 1} to {by_hand}"
    )
    assert stillhouse(clone, "rollback").startswith("generation 0 is in production")
    assert "the first that was in production" in stillhouse(clone, "rollback", code=2)
    assert "cannot be put back; there are" in stillhouse(clone, "rollback", "--generation", "99", code=2)
    assert f"generation {by_hand + 1} is" in stillhouse(clone, "rollback", "--generation", str(by_hand + 1))


def test_only_one_at_a_time_changes_what_is_in_production(clone: Path) -> None:
    with open(clone / ".stillhouse/retraining.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (("retrain",), ("promote", "small-s0"), ("rollback",)):
            said = stillhouse(clone, *command, code=2)
            assert "another retraining, promotion or rollback is in progress here" in said


def test_a_checkout_that_is_not_ready_is_refused_before_any_work(clone: Path) -> None:
    pointer = clone / "data/production.dvc"
    text = pointer.read_text()
    pointer.write_text(text + "# edited\n")
    commands = (("promote", "small-s0"), ("rollback",), ("retrain",))
    try:
        for command in commands:
            assert "data/production.dvc has changes that are not committed" in stillhouse(
                clone, *command, code=2
            )
    finally:
        pointer.write_text(text)
    git(clone, "checkout", "--quiet", "--detach")
    try:
        for command in commands:
            assert "no branch is checked out" in stillhouse(clone, *command, code=2)
    finally:
        git(clone, "switch", "--quiet", "main")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("budget=2", "env_steps and updates say"),
        ("seeds=[3]", "the seed is production's"),
        ("suite=smoke", "with the parameters that made it"),
        (" retraining.student =other", "the student is production's"),
        ("retraining.generation=1", "a number of its own"),
        ("retraining={student: other}", "one by one"),
    ],
)
def test_what_production_decides_cannot_be_set(override: str, reason: str) -> None:
    with pytest.raises(StillhouseError, match=f"cannot be set in a retraining: .*{reason}"):
        _check_override(override)
    _check_override("retraining.learning_rate_factor=0.2")
    _check_override("train_teacher.easy.gamma=0.2")


def test_episodes_that_were_ended_are_said() -> None:
    shares = {"candidate": {"easy": 0.25, "acrobot": 0.0}, "production": {"easy": 0.5}, "random": {"easy": 0}}
    assert _capped({"capped_share": shares}) == (
        "; episodes ended after 10,000 steps: 25% of candidate in easy, 50% of production in easy"
    )
    assert _capped({"capped_share": {who: {"easy": 0.0} for who in shares}}) == ""


def test_a_generation_is_never_used_twice(clone: Path) -> None:
    numbers = [next_generation(clone) for _ in range(3)]
    assert numbers == [numbers[0], numbers[0] + 1, numbers[0] + 2]
