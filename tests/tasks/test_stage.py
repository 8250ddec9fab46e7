"""How a stage begins, saves, and ends: real stage processes in a workspace of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stillhouse.errors import StillhouseError
from tasks.stage import cache_folder, hold_scratch, inputs_key, progress_line, stage_entry, stage_name

ROOT = Path(__file__).parents[2]

BODY = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
sys.modules["__main__"].__spec__ = None
from stillhouse.errors import StillhouseError
from tasks.stage import main

def body(context):
    {body}

main(body, ["cartpole", "--seed", "0"])
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with one planned stage, ``train_teacher-cartpole-s0``."""
    for folder in (".dvc", "params", "data/code"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "params/pipeline.yaml").write_text("train_teacher:\n  cartpole: {gamma: 0.9}\n")
    modules = [
        "stillhouse",
        "tasks",
        *(f"stillhouse.{name}" for name in ("errors", "files", "checkpoint", "config", "types")),
    ]
    modules += ["tasks.stage", "tasks.supervisor", "stillhouse.networks"]
    modules += [f"stillhouse.networks.{path.stem}" for path in (ROOT / "stillhouse/networks").glob("*.py")]
    digest = {
        "environment": {"device": "cpu"},
        "modules": dict.fromkeys([*modules, "stillhouse.seeding"], ""),
    }
    (tmp_path / "data/code/train_teacher-dqn.json").write_text(json.dumps(digest))
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  train_teacher-cartpole-s0:\n    cmd: python -m tasks.train_teacher cartpole --seed 0\n"
        "    deps:\n    - data/code/train_teacher-dqn.json\n"
        "    params:\n    - params/pipeline.yaml:\n      - train_teacher.cartpole\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(workspace: Path, body: str, **environment: str) -> subprocess.Popen[str]:
    script = workspace / "train_teacher.py"
    script.write_text(BODY.format(root=str(ROOT), body=body.replace("\n", "\n    ")))
    return subprocess.Popen(
        [sys.executable, str(script)],
        cwd=workspace,
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def run(workspace: Path, body: str, **environment: str) -> tuple[int, str]:
    process = start(workspace, body, **environment)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_stage_names_never_collide():
    names = ["a", "a-full", "a-s0", "s0", "full", "a-full-s0"]
    seen = [
        stage_name("fine_tune", name, mode, seed=seed)
        for name in names
        for mode in ("full", "scratch")
        for seed in (0, 10)
    ]
    seen += [stage_name("train_teacher", name, seed=seed) for name in names for seed in (0, 10)]
    seen += [stage_name("report"), stage_name("digest_code")]
    assert len(set(seen)) == len(seen)
    assert (
        stage_name("fine_tune", "cartpole-long", "full", "small", 0)
        == "fine_tune-cartpole-long-full-small-s0"
    )
    assert stage_name("train_teacher", "minatar-breakout", seed=0) == "train_teacher-minatar-breakout-s0"


def test_a_stage_sees_its_block_and_ends_well(workspace):
    body = (
        "assert context.block('train_teacher.cartpole') == {'gamma': 0.9}\n"
        "assert (context.verb, context.name, context.seed, context.device) == ('train_teacher', 'cartpole', 0, 'cpu')\n"
        "context.progress.update(1, 4, 'env steps', {'mean_return': 3.0, 'broken': float('nan')})"
    )
    code, errors = run(workspace, body, STILLHOUSE_MARKER=str(workspace / "marker"))
    assert (code, (workspace / "marker").exists()) == (0, True), errors
    assert "1 of 4 env steps (25 %)" in errors
    assert "mean return 3" in errors
    assert "broken" not in errors


def test_a_users_mistake_is_one_line_and_code_2(workspace):
    code, errors = run(workspace, "raise StillhouseError('too weak')")
    assert (code, errors) == (2, "error: too weak\n")
    code, errors = run(workspace, "context.block('train_teacher.acrobot')")
    assert code == 2
    assert errors.startswith("error: train_teacher.acrobot: not in params/pipeline.yaml")
    (workspace / "data/code/train_teacher-dqn.json").unlink()
    code, errors = run(workspace, "pass")
    assert (code, errors.count("\n")) == (2, 1)


def test_an_import_outside_the_closure_fails_the_stage(workspace):
    code, errors = run(workspace, "import stillhouse.losses.td")
    assert code == 2
    assert "stillhouse.losses.td" in errors


COUNT = """
state = context.scratch.load() or {"count": 0}
count = state["count"]
while count < 60:
    count += 1
    time.sleep(0.05)
    if context.scratch.due():
        context.scratch.save({"count": count})
    Path("ready").touch()
Path("result").write_text(f"{state['count']} {count}")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_stage_saves_and_goes_on(workspace, number):
    process = start(workspace, COUNT)
    while not (workspace / "ready").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(number)
    assert process.wait(20) == 143
    assert not (workspace / "result").exists()
    code, errors = run(workspace, COUNT)
    assert code == 0, errors
    first, last = map(int, (workspace / "result").read_text().split())
    assert 0 < first < 60
    assert last == 60
    code, _ = run(workspace, COUNT)  # the saved state is gone once the stage is done
    assert (code, (workspace / "result").read_text()) == (0, "0 60")


def test_a_damaged_saved_state_is_not_used(workspace):
    process = start(workspace, COUNT)
    while not (workspace / "ready").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    process.terminate()
    process.wait(20)
    (state,) = (workspace / ".dvc/scratch").glob("*/state.json")
    state.write_text("{}")
    code, errors = run(workspace, COUNT)
    assert code == 0
    assert "starting afresh" in errors
    assert (workspace / "result").read_text() == "0 60"


def test_a_stage_that_never_saves_ends_at_once(workspace):
    process = start(workspace, "Path('ready').touch()\ntime.sleep(60)")
    while not (workspace / "ready").exists():
        time.sleep(0.02)
    process.terminate()
    assert process.wait(5) == 143


def test_the_inputs_key_follows_every_input(workspace):
    entry = stage_entry("train_teacher-cartpole-s0")
    first = inputs_key(entry)
    assert first == inputs_key(entry)
    assert first != inputs_key({**entry, "cmd": "other"})
    (workspace / "params/pipeline.yaml").write_text("train_teacher:\n  cartpole: {gamma: 0.8}\n")
    second = inputs_key(entry)
    assert second != first
    (workspace / "params/pipeline.yaml").write_text(
        "train_teacher:\n  cartpole: {gamma: 0.9}\n  acrobot: {gamma: 1}\n"
    )
    assert inputs_key(entry) == first  # another stage's block
    (workspace / "data/code/train_teacher-dqn.json").write_text("{}")
    assert inputs_key(entry) != first
    (workspace / "data/code/train_teacher-dqn.json").unlink()
    with pytest.raises(StillhouseError, match=r"data/code/train_teacher-dqn\.json: missing"):
        inputs_key(entry)


def test_scratch_is_shared_by_worktrees_and_locked(workspace, tmp_path_factory):
    assert cache_folder() == workspace / ".dvc" / "cache"
    other = tmp_path_factory.mktemp("worktree")
    (other / ".dvc").mkdir()
    (other / ".dvc/config.local").write_text(f"[cache]\n    dir = {workspace / '.dvc' / 'cache'}\n")
    assert cache_folder(other) == workspace / ".dvc" / "cache"
    waiter = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom tasks.stage import hold_scratch\n"
        "with hold_scratch('key') as folder: print(folder)"
    )
    with hold_scratch("key") as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", waiter], cwd=other, stdout=subprocess.PIPE, text=True
        )
        time.sleep(1.0)
        assert process.poll() is None
    assert process.communicate(timeout=20)[0].strip() == str(folder)


def test_progress_line():
    line = progress_line(12_000, 50_000, "env steps", 3_800, {"mean_return": 103.25})
    assert line == "12,000 of 50,000 env steps (24 %), 3,800/s, 10 s left, mean return 103.2"
