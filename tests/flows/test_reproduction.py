"""A recorded stage again, over real DVC and Prefect: the same bytes, other bytes, or a reason why not."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prefect.exceptions import ParameterTypeError
from test_verification import CACHE, commit_all, damage, kept
from toy_pipeline import dvc, runs, toy_stage

from flows.reproduction import reproduction
from tasks.machine import MACHINES, processor
from tasks.plan import DVC_YAML, Stage, render
from tasks.stage import cache_folder

DIGEST = "data/code/toy.json"
# Versions come from outside, the code is what the stage's file has.
DIGESTING = (
    "import hashlib, json, os, pathlib\n"
    "pathlib.Path('data/code').mkdir(exist_ok=True)\n"
    "code = hashlib.md5(pathlib.Path('code.py').read_bytes()).hexdigest()\n"
    "environment = {'torch': os.environ.get('TOY_TORCH', '2.0'), 'device': 'cpu'}\n"
    f"pathlib.Path('{DIGEST}').write_text(json.dumps({{'environment': environment, 'modules': {{'toy.code': code}}}}))\n"
)


def reproduce(stage: str, **parameters: Any) -> tuple[str, str]:
    state: Any = reproduction(stage, **parameters, return_state=True)
    return state.name, state.message


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()


def worktrees() -> list[str]:
    return git("worktree", "list").splitlines()[1:]


def stages(*plan: Stage) -> None:
    """Write ``dvc.yaml``: the digest stage, and ``plan``."""
    Path("digest.py").write_text(DIGESTING)
    Path("params/suites").mkdir(exist_ok=True)
    digest = Stage("digest_code", ["python", "digest.py"], outs=[DIGEST], always_changed=True)
    DVC_YAML.write_text(render([digest, *plan]))


@pytest.fixture
def chain(toy: Path, prefect_harness: None) -> Path:
    """``b`` reads ``a``, ``c`` reads ``b``; ``a`` and its parameter depend on the code of ``code.py``."""
    Path("code.py").write_text("1")
    Path("params/pipeline.yaml").write_text("toy: {steps: 3}\n")
    first = toy_stage("a")
    first.deps.append(DIGEST)
    first.params.append("toy.steps")
    stages(first, toy_stage("b", "a"), toy_stage("c", "b"))
    dvc("repro")
    commit_all()
    return toy


def state_of(folder: Path) -> dict[str, bytes]:
    """Everything that a reproduction must leave alone."""
    places = ("data", "dvc.lock", ".dvc/cache", "params")
    files = [
        file for place in places for file in [folder / place, *(folder / place).rglob("*")] if file.is_file()
    ]
    return {str(file): file.read_bytes() for file in files}


def test_the_same_bytes_and_nothing_is_touched(chain):
    before = state_of(chain)
    assert reproduce("*") == ("Identical", "4 stages: 4 outs identical")
    assert state_of(chain) == before
    assert [runs(name) for name in "abc"] == [1, 1, 1]
    assert worktrees() == []
    assert git("status", "--porcelain") == ""


def test_parts(chain):
    assert reproduce("b") == ("Identical", "1 stage: 1 out identical")
    assert reproduce("b", downstream=True) == ("Identical", "2 stages: 2 outs identical")
    assert reproduce("digest_code", downstream=True, workers=1) == ("Identical", "4 stages: 4 outs identical")


NOISE = "pathlib.Path('data', name).write_text(os.urandom(12).hex()); sys.exit()"


def test_other_bytes_are_told_by_the_machine_that_made_the_recorded_ones(chain, capsys):
    # The input of `c` is the recorded one, whatever came out of `b` now.
    stages(toy_stage("a"), toy_stage("b", "a", script=NOISE), toy_stage("c", "b"))
    dvc("repro")
    commit_all("noise")
    lock = Path("dvc.lock").read_text()
    name, message = reproduce("b", downstream=True)
    assert name == "Different"
    assert (
        message == "2 stages: 1 out identical; 1 out different, and the recorded machine class is not known"
    )
    (kept_tree,) = worktrees()
    tree = Path(kept_tree.split()[0])
    assert (tree / "data/b").read_text() != Path("data/b").read_text()
    assert cache_folder(tree).is_relative_to(tree)  # and with it the saved states of interrupted stages
    printed = capsys.readouterr().out
    assert f"kept in {tree.relative_to(chain)}" in printed
    assert re.search(r"from byte \d+ on; 24 bytes were recorded, here are 24", printed)
    assert Path("dvc.lock").read_text() == lock

    from tasks.run_stage import call_dvc

    call_dvc(chain, "b", "run", "b", "--force")
    commit_all("with the machine")
    assert json.loads(MACHINES.read_text())["b"]["processor"] == processor()
    assert reproduce("b")[1] == "1 stage: 1 out different on the same machine class"
    rows = json.loads(MACHINES.read_text())
    rows["b"]["processor"] = "Abacus (wood)"
    MACHINES.write_text(json.dumps(rows))
    commit_all("elsewhere")
    # The newest commit that says something of these bytes is the one asked for.
    assert reproduce("b")[1] == "1 stage: 1 out different, other machine class"
    assert "recorded on Abacus (wood)" in capsys.readouterr().out


def test_the_files_that_differ_are_named_with_what_differs(chain, capsys):
    script = (
        "import json, os, pathlib, random\n"
        "import numpy as np\n"
        "from safetensors.numpy import save_file\n"
        "noise, folder = random.SystemRandom().random(), pathlib.Path('data/noise')\n"
        "folder.mkdir()\n"
        "save_file({'same': np.zeros(2), 'bias': np.array([1, noise])}, folder / 'weights.safetensors')\n"
        "(folder / 'scores.json').write_text(json.dumps({'same': 1, 'score': noise}))\n"
        "(folder / 'curve.csv').write_text(f'step,score\\n1,{noise}\\n')\n"
        "(folder / 'same.json').write_text('{}')\n"
    )
    Path("noise.py").write_text(script)
    stages(Stage("noise", ["python", "noise.py"], deps=["noise.py"], outs=["data/noise"]))
    dvc("repro")
    commit_all("noise")
    assert reproduce("noise")[0] == "Different"
    printed = capsys.readouterr().out
    assert re.search(
        r"tensor bias: 1 of 2 values differ, by at most 0\.\d+, 0\.\d+ of the largest value", printed
    )
    assert re.search(r"key score: 0\.\d+ was recorded, here is 0\.\d+", printed)
    assert re.search(r"column score: 1 rows differ, by at most 0\.\d+", printed)
    assert "tensor same" not in printed
    assert "same.json" not in printed


def test_a_stage_that_fails_or_writes_nothing_is_different(chain):
    fail = "os.path.exists('fail') and sys.exit('error: no luck')"
    # Git has the page, so that the worktree has it before the stage is run.
    page = Stage("page", ["sh", "-c", "test -e fail || echo page > page"], in_git=["page"])
    stages(toy_stage("a", script=fail), page)
    dvc("repro")
    commit_all()
    assert reproduce("page")[0] == "Identical"
    Path("fail").write_text("")
    commit_all()
    assert reproduce("a") == ("Different", "1 stage: a failed")
    name, message = reproduce("page")
    assert name == "Different"
    assert message.startswith("1 stage: 1 out different")
    assert len(worktrees()) == 2


def test_other_versions_are_refused_with_what_to_build(chain, monkeypatch):
    monkeypatch.setenv("TOY_TORCH", "3.0")
    name, message = reproduce("a")
    assert name == "Rejected"
    commit = git("rev-parse", "--short=12", "HEAD")
    assert message.startswith(
        "a: recorded with torch 2.0, but here are torch 3.0; build that revision's environment"
    )
    assert f"git worktree add ../at-{commit} {commit} && make -C ../at-{commit} VENV=.venv" in message
    assert worktrees() == []


def test_what_the_record_was_not_made_from_is_refused(chain):
    # Each edit is committed without running: dvc.lock is older than what lies beside it.
    Path("code.py").write_text("2")
    commit_all("code")
    name, message = reproduce("a")
    assert name == "Rejected"
    assert "is not the code that made it (toy.code changed)" in message
    assert "git log -- dvc.lock" in message
    assert reproduce("b")[0] == "Identical"
    assert reproduce("a", revision="HEAD^")[0] == "Identical"
    git("checkout", "--quiet", "HEAD^", "--", "code.py")
    Path("params/pipeline.yaml").write_text("toy: {steps: 4}\n")
    commit_all("parameters")
    assert "parameter toy.steps: not as recorded" in reproduce("a")[1]
    Path("stage_b.py").write_text("")
    DVC_YAML.write_text(DVC_YAML.read_text().replace("python stage_c.py", "python -B stage_c.py"))
    commit_all("more")
    assert "stage_b.py: not as recorded" in reproduce("b")[1]
    assert "the command: not as recorded" in reproduce("c")[1]
    assert reproduce("*")[0] == "Different"  # digest_code comes out as it was, all else is refused
    assert worktrees() == []


def test_inputs_come_from_the_cache_or_a_remote_and_are_hashed(chain, tmp_path_factory):
    Path("data/a").unlink()
    assert reproduce("b")[0] == "Identical"  # the checkout need not have it
    place, content = kept("data/a"), kept("data/a").read_bytes()
    damage(place)
    assert "data/a: not as recorded" in reproduce("b")[1]
    place.unlink()
    name, message = reproduce("b")
    assert name == "Rejected"
    assert (
        "data/a: not in the cache, and no default remote is configured; `stillhouse verify --repair`"
        in message
    )
    remote = tmp_path_factory.mktemp("remote")
    dvc("remote", "add", "--local", "--default", "there", str(remote))
    stored = remote / place.relative_to(CACHE)
    stored.parent.mkdir(parents=True)
    stored.write_bytes(content)
    assert reproduce("b", revision="HEAD")[0] == "Identical"
    assert place.read_bytes() == content


def test_an_experiment_is_a_revision(chain):
    Path("params/pipeline.yaml").write_text("toy: {steps: 5}\n")
    dvc("repro")
    dvc("exp", "save", "--name", "five")
    git("checkout", "--quiet", "--", ".")
    dvc("checkout")
    assert reproduce("a", revision="five")[0] == "Identical"


def test_mistakes_are_one_line(chain):
    for parameters, word in (
        ({"stage": "aa"}, "stage: 'aa' is no stage"),
        ({"stage": "digest"}, "did you mean 'digest_code'"),
        (
            {"stage": "a", "revision": "nowhere"},
            "revision: 'nowhere' is neither a git revision nor a DVC experiment",
        ),
        ({"stage": "a", "revision": "HEAD~9"}, "revision: 'HEAD~9'"),
    ):
        name, message = reproduce(**parameters)
        assert name == "Rejected"
        assert word in message
        assert "\n" not in message
    git("rm", "--quiet", "--cached", "dvc.lock")
    git(
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@example.org",
        "commit",
        "--quiet",
        "--message",
        "no lock",
    )
    assert "dvc.lock: there is none at" in reproduce("a")[1]


@pytest.mark.parametrize(
    "parameters",
    [
        {"stage": "../a"},
        {"stage": "a; touch x"},
        {"stage": ""},
        {"stage": "a" * 201},
        {"stage": "a", "revision": "--upload-pack=x"},
        {"stage": "a", "revision": "HEAD; touch x"},
        {"stage": "a", "revision": "$(touch x)"},
        {"stage": "a", "revision": "a\nb"},
        {"stage": "a", "revision": ""},
        {"stage": "a", "revision": "a" * 201},
        {"stage": "a", "workers": -1},
        {"stage": "a", "workers": 1000},
        {"stage": "a", "downstream": "maybe"},
    ],
)
def test_hostile_parameters_are_refused(parameters):
    with pytest.raises(ParameterTypeError):
        reproduction.validate_parameters(parameters)


def test_a_stop_leaves_no_worktree_and_no_process(chain):
    import threading
    import time

    from tasks.run_stage import stop_all

    stages(toy_stage("a", script="os.path.exists('slow') and time.sleep(60)"))
    dvc("repro")
    Path("slow").write_text("")
    commit_all()

    def stop_soon() -> None:
        while not list(Path(".stillhouse/worktrees").glob("*/count-a")):
            time.sleep(0.05)
        stop_all.set()

    thread = threading.Thread(target=stop_soon)
    thread.start()
    started = time.monotonic()
    assert reproduce("a") == ("Rejected", "a: stopped")
    thread.join()
    assert time.monotonic() - started < 40
    assert worktrees() == []
    assert not [
        entry
        for entry in Path("/proc").glob("[0-9]*/cwd")
        if os.path.lexists(entry) and _inside(entry, chain)
    ]


def _inside(link: Path, folder: Path) -> bool:
    try:
        return int(link.parent.name) != os.getpid() and Path(os.readlink(link)).is_relative_to(
            folder / ".stillhouse/worktrees"
        )
    except OSError:
        return False
