"""Kills at random moments of every phase of a stage's life: no process is left, nothing is half-recorded, and the next run goes on
from the saved state to the same bytes.

``STILLHOUSE_KILLS`` says how many, ``STILLHOUSE_KILLS_SEED`` which moments, ``STILLHOUSE_KILLS_RESULT`` where to write what happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from clones import environment, make_clone

from flows.verification import verify
from stillhouse.files import MANIFEST
from tasks.recorded import read_recorded
from tasks.stage import read_yaml
from tasks.supervisor import Supervised

KILLS = int(os.environ.get("STILLHOUSE_KILLS", "10"))
SEED = int(os.environ.get("STILLHOUSE_KILLS_SEED", "0"))
# Six seconds of work at most for a kill and the run after it, on an idle core; five times that on a busy machine.
pytestmark = [pytest.mark.services, pytest.mark.timeout(300 + 30 * KILLS)]

# In the order of a stage's life, in which they are struck.
PHASES = ("training", "saving a segment", "renaming", "hashing", "writing dvc.lock")
SAVE_SECONDS = 0.2
SUITE = """
seeds: [0]
environments: {cartpole: {id: CartPole-v1}}
train_teacher: {cartpole: {algorithm: dqn, env_steps: 4000, learning_starts: 500}}
collect_dataset: {cartpole: {transitions: 4000, minimum_return: 0}}
distill_student:
  small: {environments: [cartpole], updates: 1500, evaluation_interval: 100, batch_size: 64, size: {features: 16, torso: [16]}}
"""
TEACHER, DATASET, STUDENT = STAGES = (
    "train_teacher-cartpole-s0",
    "collect_dataset-cartpole-s0",
    "distill_student-small-s0",
)
HELD = Path(__file__).with_name("held")
# In this order: the supervisor's command line names the engine too.
KINDS = {"tasks/supervisor.py": "supervisor", "tasks.dvc_stage": "engine", "python -m tasks.": "stage"}


class Family:
    """A stage under its supervisor, as a run starts it, and the processes that it consists of."""

    def __init__(self, clone: Path, stage: str, hold: str = "") -> None:
        self.clone = clone
        self.log = clone / "logs" / f"{time.monotonic_ns()}.log"
        variables = {
            "STILLHOUSE_SAVE_SECONDS": str(SAVE_SECONDS),
            "STILLHOUSE_TENSORBOARD": "0",
            "PYTHONSAFEPATH": "",
            "PYTHONPATH": str(HELD),
            "STILLHOUSE_HOLD": hold,
        }
        self.supervised = Supervised(
            [sys.executable, "-m", "tasks.dvc_stage", "--answer", str(clone / "answer.json"), "run", stage],
            cwd=clone,
            log=self.log,
            environment={**environment(), **variables},
        )

    def members(self) -> dict[str, int]:
        """Process ids by what they are: supervisor, engine, stage, and a shell that may stand before it."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "cwd").resolve() == self.clone:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    kind = next((kind for part, kind in KINDS.items() if part in command), "shell")
                    found[kind] = int(entry.name)
        return found

    def kill(self, who: str, members: dict[str, int]) -> None:
        """Kill one of the family, or all. Of a flow, however it died, the supervisor sees the other end of a pipe closed."""
        if who in ("flow", "all"):
            assert self.supervised._process.stdin
            self.supervised._process.stdin.close()
        for name, process in members.items():
            if who in (name, "all"):
                os.kill(process, signal.SIGKILL)

    def end(self) -> None:
        """Wait until nothing of it is left."""
        assert self.supervised.wait(60) is not None, "the supervisor does not end"
        end = time.monotonic() + 20
        while left := self.members():
            assert time.monotonic() < end, f"left behind: {left}"
            time.sleep(0.02)


@dataclass(frozen=True)
class Kill:
    """One kill, as it was drawn.

    Attributes:
        phase: of the stage's life.
        number: which moment of the phase: a file about to be opened, renamed, linked or deleted.
        after: seconds between that moment and the kill; 0: the process is held there.
        who: is killed.
    """

    phase: str
    number: int
    after: float
    who: str


def hashes(clone: Path, stage: str) -> dict[str, str]:
    """What is recorded of a stage's outs, and is what lies there: every file is hashed again, in the workspace and in the cache."""
    checked = [file for file in verify(clone, "")[0] if file.entry == stage]
    assert checked and all(file.sound for file in checked), list(map(str, checked))
    return {path: out.md5 for path, out in read_recorded(clone)[stage].outs.items()}


def finish(clone: Path, stage: str, hold: str = "") -> str:
    """Run a stage to its end; what it said."""
    family = Family(clone, stage, hold)
    code = family.supervised.wait(300)
    family.end()
    assert code == 0, family.log.read_text()
    return family.log.read_text()


def recorded(clone: Path, stage: str) -> bool:
    """Whether the stage is in ``dvc.lock``, which must be whole: never may one be seen that is not."""
    return stage in read_yaml(clone / "dvc.lock")["stages"]


def has_saved_state(clone: Path) -> bool:
    """Whether the stage has a whole saved state, be it put aside."""
    folders = [path for path in (clone / ".dvc/scratch").glob("*") if path.is_dir()]
    return any(
        (path / MANIFEST).is_file() for path in folders if path.suffix == ".old" or path.name[0] != "."
    )


class Rounds:
    """Lets a stage begin anew, as often as wanted, from what lay there before it first ran."""

    def __init__(self, clone: Path, stage: str) -> None:
        self.clone, self.stage = clone, stage
        self.before = clone.parent / f"before-{stage}"
        shutil.copytree(clone / ".dvc/cache", self.before)
        shutil.copy2(clone / "dvc.lock", self.before / "dvc.lock")

    def begin_anew(self) -> None:
        for out in read_recorded(self.clone)[self.stage].outs:
            path = self.clone / out
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for folder in (self.clone / ".dvc/cache", self.clone / ".dvc/scratch"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.before, self.clone / ".dvc/cache", ignore=shutil.ignore_patterns("dvc.lock"))
        shutil.copy2(self.before / "dvc.lock", self.clone / "dvc.lock")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of this checkout, planned, its code digested."""
    made = make_clone(tmp_path / "clone", "kills", kills=SUITE)
    argv = [sys.executable, "-m", "tasks.dvc_stage", "--answer", "answer.json", "begin", *STAGES]
    variables = {**environment(), "PYTHONSAFEPATH": ""}
    subprocess.run(argv, cwd=made, env=variables, check=True, capture_output=True)
    return made


def draw(number: int, moments: Counter[str]) -> Kill:
    """The kill with this number: the same whenever the seed and the phase's number of moments are."""
    phase = PHASES[number % len(PHASES)]
    luck = random.Random(f"{SEED} {number}")
    alive = ["flow", "supervisor", "engine", "all"]
    alive += ["stage", "all"] if phase in ("training", "saving a segment", "renaming") else []
    if phase == "training":  # after the first state is saved, until the next would be
        return Kill(phase, 1, luck.uniform(0, SAVE_SECONDS), luck.choice(alive))
    # In random order, each once before any comes again.
    order = random.Random(f"{SEED} {phase}").sample(range(1, moments[phase] + 1), moments[phase])
    after = luck.choice([0.0, 0.0, luck.uniform(0, 0.005)])
    return Kill(phase, order[number // len(PHASES) % len(order)], after, luck.choice(alive))


def strike(clone: Path, stage: str, kill: Kill) -> tuple[bool, str]:
    """Run the stage and kill one of its processes; whether its moment came, and what the run said."""
    sign = clone / "held"
    sign.unlink(missing_ok=True)
    family = Family(clone, stage, f"{kill.phase}|{kill.number}|{sign}")
    while not (came := sign.exists()) and family.supervised.wait(0) is None:
        time.sleep(0.002)
    if came:
        members = family.members()
        if kill.after:
            sign.unlink()
            time.sleep(kill.after)
        family.kill(kill.who, members)
        sign.unlink(missing_ok=True)
    family.end()
    return came, family.log.read_text()


def test_kills_in_every_phase_change_nothing(clone: Path) -> None:
    started = time.monotonic()
    struck: list[tuple[str, Kill]] = []
    wanted: dict[str, str] = {}
    resumed = compared = missed = 0
    print(f"\nseed {SEED}")
    for stage, kills in ((TEACHER, (KILLS + 1) // 2), (DATASET, 0), (STUDENT, KILLS)):
        rounds = Rounds(clone, stage)
        finish(clone, stage, f"|0|{clone / stage}")
        if not kills:
            continue
        wanted[stage] = hashes(clone, stage)
        moments = Counter((clone / stage).read_text().splitlines())
        # Those of one save; how many saves there are, the machine's speed decides.
        moments["saving a segment"] //= max(1, moments["training"])
        print(f"{stage}: moments {dict(moments)}")
        assert set(moments) == set(PHASES) and all(moments.values())
        rounds.begin_anew()
        while len(struck) < kills:
            kill = draw(len(struck), moments)
            saved = has_saved_state(clone)
            came, said = strike(clone, stage, kill)
            # Killed after its last hash, it was done: DVC's run-cache has it, and nothing is left to go on with.
            going_on = saved and "is cached - skipping run" not in said
            assert ("resumed from the saved state" in said) == going_on, (kill, said)
            resumed += going_on
            missed += not came
            assert missed <= 3 + KILLS // 5, f"{kill} of {stage} does not come: {said}"
            if came:
                print(f"{time.monotonic() - started:4.0f} s: {len(struck):3} {stage} {kill}", flush=True)
                struck.append((stage, kill))
            if recorded(clone, stage):  # half of it would be found now, and not only after the next run
                assert hashes(clone, stage) == wanted[stage]
            if recorded(clone, stage) or kill.phase == PHASES[-1] or len(struck) == kills:
                finish(clone, stage)
                assert hashes(clone, stage) == wanted[stage]
                compared += 1
                if len(struck) < kills:
                    rounds.begin_anew()

    result = {
        "kills": len(struck),
        "phases": dict(Counter(kill.phase for _, kill in struck)),
        "killed": dict(Counter(kill.who for _, kill in struck)),
        "stages": dict(Counter(stage for stage, _ in struck)),
        "held": sum(not kill.after for _, kill in struck),
        "resumed": resumed,
        "compared": compared,
        "outs": sum(map(len, wanted.values())),
        "seconds": round(time.monotonic() - started),
        "seed": SEED,
    }
    print(result)
    if path := os.environ.get("STILLHOUSE_KILLS_RESULT"):
        Path(path).write_text(json.dumps(result))
    assert set(result["phases"]) == set(PHASES)
