"""Fifty kills at random moments of stages' lives, from the first import to the writing of `dvc.lock`: the same bytes in the end."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clones import environment, make_clone

from tasks.stage import read_yaml
from tasks.supervisor import Supervised

pytestmark = pytest.mark.services

KILLS = int(os.environ.get("STILLHOUSE_KILLS", "50"))
SUITE = """
seeds: [0]
environments: {cartpole: {id: CartPole-v1}}
train_teacher: {cartpole: {algorithm: dqn, env_steps: 12000, learning_starts: 500}}
collect_dataset: {cartpole: {transitions: 4000, minimum_return: 0}}
distill_student:
  small: {environments: [cartpole], updates: 1500, evaluation_interval: 100, batch_size: 64, size: {features: 16, torso: [16]}}
"""
STAGES = ("train_teacher-cartpole-s0", "collect_dataset-cartpole-s0", "distill_student-small-s0")
OUTS = ("teachers", "training_state", "datasets", "students")


class Family:
    """A stage under its supervisor, as a run starts it, and the processes that it consists of."""

    def __init__(self, clone: Path, stage: str) -> None:
        self.clone = clone
        variables = {"STILLHOUSE_SAVE_SECONDS": "0.3", "PYTHONSAFEPATH": "", "STILLHOUSE_TENSORBOARD": "0"}
        self.supervised = Supervised(
            [sys.executable, "-m", "tasks.dvc_stage", "--answer", str(clone / "answer.json"), "run", stage],
            cwd=clone,
            log=clone / "logs" / f"{stage}.log",
            environment={**environment(), **variables},
        )

    def members(self) -> dict[str, int]:
        """Process ids by what they are: supervisor, engine, stage."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "cwd").resolve() == self.clone:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    kind = next((kind for part, kind in KINDS.items() if part in command), "shell")
                    found[kind] = int(entry.name)
        return found

    def ended(self) -> bool:
        return self.supervised.wait(0) is not None


# In this order: the supervisor's command line names the engine too.
KINDS = {"tasks/supervisor.py": "supervisor", "tasks.dvc_stage": "engine", "python -m tasks.": "stage"}


def digests(clone: Path) -> dict[str, str]:
    """The recorded hash of everything that the stages wrote."""
    lock = read_yaml(clone / "dvc.lock")
    return {
        out["path"]: out["md5"] for stage in STAGES for out in lock["stages"].get(stage, {}).get("outs", [])
    }


def finish(clone: Path, stage: str) -> None:
    family = Family(clone, stage)
    code = family.supervised.wait(300)
    assert code == 0, (clone / "logs" / f"{stage}.log").read_text()


def done(clone: Path) -> int:
    """How many of the stages are recorded."""
    path = clone / "dvc.lock"
    if not path.exists():
        return 0
    with contextlib.suppress(Exception):  # cut off by a kill: the next run puts the copy back
        recorded = read_yaml(path)["stages"]
        return sum(stage in recorded for stage in STAGES)
    return -1


def forget(clone: Path) -> None:
    """Everything that the stages have left."""
    shutil.copy2(clone / "lock.begun", clone / "dvc.lock")
    for folder in (*(clone / "data" / name for name in OUTS), clone / ".dvc/cache", clone / ".dvc/scratch"):
        subprocess.run(["chmod", "-R", "u+w", str(folder)], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def clones(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two clones, planned, their code digested."""
    folder = tmp_path_factory.mktemp("kills")
    made = []
    for name in ("whole", "killed"):
        clone = make_clone(folder / name, "kills", kills=SUITE)
        argv = [sys.executable, "-m", "tasks.dvc_stage", "--answer", "answer.json", "begin", *STAGES]
        subprocess.run(
            argv, cwd=clone, env={**environment(), "PYTHONSAFEPATH": ""}, check=True, capture_output=True
        )
        shutil.copy2(clone / "dvc.lock", clone / "lock.begun")
        made.append(clone)
    return made[0], made[1]


def moments(clone: Path, luck: random.Random) -> dict[str, Callable[[Family], bool]]:
    """When to strike: each waits for its moment, and says whether it has come before the stage's end."""

    def after_a_while(family: Family) -> bool:
        time.sleep(luck.uniform(0.0, 8.0))
        return not family.ended()

    def when(condition: Callable[[Family], bool]) -> Callable[[Family], bool]:
        def wait(family: Family) -> bool:
            while not family.ended():
                for _ in range(200):
                    if condition(family):
                        return True
            return False

        return wait

    def saving(_: Family) -> bool:
        return any(".tmp" in name for name in _listed(clone / ".dvc/scratch"))

    def renaming(_: Family) -> bool:
        return any(".tmp" in name for folder in OUTS for name in _listed(clone / "data" / folder))

    def hashing(family: Family) -> bool:
        while not family.ended() and "stage" not in family.members():
            time.sleep(0.02)
        while not family.ended() and "stage" in family.members():
            time.sleep(0.005)
        time.sleep(luck.uniform(0, 0.3))
        return not family.ended()

    def recording(family: Family) -> bool:
        before = _seen(clone / "dvc.lock")
        while not family.ended():
            for _ in range(500):
                if _seen(clone / "dvc.lock") != before:
                    return True
        return False

    return {
        "at any time": after_a_while,
        "while a state is saved": when(saving),
        "while outs are put in place": when(renaming),
        "while outs are hashed": hashing,
        "while dvc.lock is written": recording,
    }


def _listed(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []


def _seen(path: Path) -> tuple[int, int, int]:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns
    return 0, 0, 0


def test_fifty_kills_change_nothing(clones: tuple[Path, Path]) -> None:
    whole, killed = clones
    for stage in STAGES:
        finish(whole, stage)
    wanted = digests(whole)
    assert len(wanted) >= 7

    luck = random.Random(0)
    struck: Counter[tuple[str, str]] = Counter()
    rounds = 0
    while struck.total() < KILLS:
        position = done(killed)
        if position == len(STAGES):
            assert digests(killed) == wanted
            rounds += 1
            forget(killed)
            position = 0
        stage = STAGES[max(position, 0)]
        kinds = moments(killed, luck)
        moment = list(kinds)[struck.total() % len(kinds)]
        family = Family(killed, stage)
        came = kinds[moment](family)
        members = family.members()
        if came and members:
            who = luck.choice(sorted(members))
            with contextlib.suppress(ProcessLookupError):
                os.kill(members[who], signal.SIGKILL)
                struck[moment, who] += 1
        family.supervised.wait(60)
        end = time.monotonic() + 20
        while family.members():
            assert time.monotonic() < end, f"left behind after {moment}: {family.members()}"
            time.sleep(0.05)

    for stage in STAGES:
        finish(killed, stage)
    assert digests(killed) == wanted
    print(f"{struck.total()} kills, {rounds + 1} times to the same bytes")
    for (moment, who), count in sorted(struck.items()):
        print(f"  {count:2} {moment}: the {who}")
    assert len({moment for moment, _ in struck}) == 5
