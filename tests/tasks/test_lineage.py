"""From a file back to what made it, over real DVC and git."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.errors import StillhouseError
from tasks import machine
from tasks.git import resolve
from tasks.lineage import lines, trace
from tasks.recorded import object_path, owners, read_recorded

ROOT = Path(__file__).parents[2]

COMMANDS = {
    # Not the real stages, but their names, parameters and outs.
    "train_teacher-toy-s3": "mkdir -p data/teachers/toy-s3; cat source > data/teachers/toy-s3/weights; echo {} > data/teachers/toy-s3.json",
    "distill_student-small-s3": "cat data/teachers/toy-s3/weights data/teachers/toy-s3/weights > data/small",
    "evaluate-toy-s3": "cat data/small data/teachers/toy-s3/weights > data/evaluation",
}
DEPS = {
    "train_teacher-toy-s3": ["source"],
    "distill_student-small-s3": ["data/teachers/toy-s3"],
    "evaluate-toy-s3": ["data/small", "data/teachers/toy-s3"],
}
OUTS = {
    "train_teacher-toy-s3": ["data/teachers/toy-s3", "data/teachers/toy-s3.json"],
    "distill_student-small-s3": ["data/small"],
    "evaluate-toy-s3": ["data/evaluation"],
}


def dvc(*arguments: str) -> None:
    result = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def commit(message: str) -> str:
    git("add", "--all")
    git(
        "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "--quiet", "--message", message
    )
    return git("rev-parse", "HEAD")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHELL", "/bin/sh")
    git("init", "--quiet")
    for folder in (".dvc", "params", "data"):
        Path(folder).mkdir()
    Path(".dvc/config").write_text((ROOT / ".dvc/config").read_text())
    Path(".dvc/.gitignore").write_text((ROOT / ".dvc/.gitignore").read_text())
    Path("data/.gitignore").write_text("*\n!.gitignore\n!*.dvc\n")
    Path("source").write_text("text")
    Path("params/pipeline.yaml").write_text(
        "train_teacher: {toy: {env_steps: 1000, learner: {env_steps: 5}, gamma: 0.9}}\n"
    )
    rows = {
        name: {"cmd": f"{command} # --seed 3", "deps": DEPS[name], "outs": OUTS[name]}
        for name, command in COMMANDS.items()
    }
    rows["train_teacher-toy-s3"]["params"] = [{"params/pipeline.yaml": ["train_teacher.toy"]}]
    Path("dvc.yaml").write_text(json.dumps({"stages": rows}))
    dvc("repro")
    return tmp_path


def test_back_to_the_first_env_step(project):
    commit("first")
    first = git("rev-parse", "HEAD")
    Path("other").write_text("")
    commit("later")
    found = trace(project, "data/evaluation")
    assert found["on_disk"] == "as recorded"
    assert found["made_by"] == ["evaluate-toy-s3"]
    stages = found["stages"]
    assert set(stages) == set(COMMANDS)
    assert {row["commit"]["commit"] for row in stages.values()} == {first}
    teacher = stages["train_teacher-toy-s3"]
    assert (teacher["seed"], teacher["env_steps"]) == (
        3,
        {"train_teacher.toy": 1000, "train_teacher.toy.learner": 5},
    )
    assert teacher["parameters"]["train_teacher.toy"]["gamma"] == 0.9
    assert teacher["commit"]["subject"] == "first"
    (source,) = teacher["inputs"]
    assert (source["path"], source["stage"]) == ("source", None)
    assert [given["stage"] for given in stages["evaluate-toy-s3"]["inputs"]] == [
        "distill_student-small-s3",
        "train_teacher-toy-s3",
    ]
    json.dumps(found)
    shown = list(lines(found))
    assert sum(line.endswith("train_teacher-toy-s3, above") for line in shown) == 1
    assert sum("1,000 env steps (train_teacher.toy)" in line for line in shown) == 1
    assert shown[0] == f"data/evaluation  {found['md5'][:8]}  as recorded"


def test_files_folders_and_what_lies_on_the_disk(project):
    assert trace(project, "data/small")["stages"]["distill_student-small-s3"]["commit"] is None
    assert "not committed yet" in "\n".join(lines(trace(project, "data/small")))
    for path in ("data/teachers/toy-s3", "data/teachers/toy-s3/weights", "data/teachers/toy-s3.json"):
        found = trace(project, path)
        assert (found["made_by"], found["on_disk"]) == (["train_teacher-toy-s3"], "as recorded")
    Path("data/teachers/toy-s3/weights").unlink()
    Path("data/teachers/toy-s3/weights").write_text("mine")
    Path("data/teachers/toy-s3/more").write_text("")
    assert (
        trace(project, "data/teachers/toy-s3")["on_disk"] == "differs from what was recorded: more, weights"
    )
    assert trace(project, "data/teachers/toy-s3/weights")["on_disk"].startswith(
        "differs from what was recorded: its md5"
    )
    Path("data/small").unlink()
    assert trace(project, "data/small")["on_disk"] == "missing"


def test_names_that_nothing_has(project):
    for path, word in (
        ("data/smal", r"nothing of this name \(did you mean 'data/small'"),
        ("data/teachers/toy-s3/weight", "'data/teachers/toy-s3/weights'"),
        ("data/teachers", "name one of data/teachers/toy-s3, data/teachers/toy-s3.json"),
        ("source", "nothing of this name"),
    ):
        with pytest.raises(StillhouseError, match=word) as caught:
            trace(project, path)
        assert "\n" not in str(caught.value)
    cached = owners(read_recorded(project))["data/teachers/toy-s3"].outs["data/teachers/toy-s3"]
    object_path(project / ".dvc/cache", cached.md5).unlink()
    with pytest.raises(StillhouseError, match="lost the list of its files; `stillhouse verify --repair`"):
        trace(project, "data/teachers/toy-s3/weights")


def test_a_revision_is_a_name_and_nothing_else(project):
    first = commit("first")
    assert {resolve(project, name) for name in ("HEAD", first, first[:9], "HEAD~0", "HEAD@{0}")} == {first}
    for name in ("HEAD\n", "--help", "", "HEAD dvc.lock", ":/first", "HEAD:dvc.lock", "HEAD~1", "nowhere"):
        with pytest.raises(StillhouseError, match="neither a git revision nor a DVC experiment"):
            resolve(project, name)


def test_an_input_that_was_made_by_an_earlier_version_of_its_stage(project):
    first = commit("first")
    Path("source").write_text("other text")
    dvc("repro", "--single-item", "train_teacher-toy-s3")
    second = commit("the teacher alone")
    stages = trace(project, "data/small")["stages"]
    assert stages["train_teacher-toy-s3"]["commit"]["commit"] == first
    # Both teachers are behind it, once its stage has been judged with the new one.
    dvc("repro", "--single-item", "evaluate-toy-s3")
    stages = trace(project, "data/evaluation")["stages"]
    assert {key: (row["commit"] or {}).get("commit") for key, row in stages.items() if "teacher" in key} == {
        "train_teacher-toy-s3": first,
        f"train_teacher-toy-s3@{second[:8]}": second,
    }
    # At the first commit, nothing of this is known; but the file on the disk is another than then.
    found = trace(project, "data/evaluation", first)
    assert {row["commit"]["commit"] for row in found["stages"].values()} == {first}
    assert found["on_disk"].startswith("differs")


def test_the_commit_is_the_first_that_recorded_exactly_this(project):
    first = commit("first")
    Path("source").write_text("other text")
    dvc("repro")
    commit("second")
    Path("source").write_text("text")
    dvc("repro")
    commit("back again")
    assert {row["commit"]["commit"] for row in trace(project, "data/evaluation")["stages"].values()} == {
        first
    }


def test_a_bundle_under_a_dvc_file_is_known_by_its_content(project):
    first = commit("first")
    shutil.copytree("data/teachers/toy-s3", "data/production/teachers/toy")
    shutil.copy("data/small", "data/production/student")
    Path("data/production/note").write_text("by hand")
    dvc("add", "data/production")
    second = commit("promoted")
    Path("source").write_text("other text")
    dvc("repro")
    commit("trained anew")
    found = trace(project, "data/production")
    assert found["tracked_by"]["file"] == "data/production.dvc"
    assert found["tracked_by"]["commit"]["commit"] == second
    assert found["made_by"] == ["distill_student-small-s3", "train_teacher-toy-s3"]
    assert {row["commit"]["commit"] for row in found["stages"].values()} == {first}
    assert trace(project, "data/production/teachers/toy/weights")["made_by"] == ["train_teacher-toy-s3"]
    assert trace(project, "data/production/teachers")["made_by"] == ["train_teacher-toy-s3"]
    assert trace(project, "data/production/note")["made_by"] == []
    assert "no stage in the history" in "\n".join(lines(trace(project, "data/production/note")))


def test_the_processor_goes_with_the_bytes(project, monkeypatch):
    entries = read_recorded(project)
    monkeypatch.setattr(machine, "processor", lambda: "Abacus (wood)")
    machine.record(entries["evaluate-toy-s3"], set(entries))
    entry = entries["evaluate-toy-s3"]
    assert trace(project, "data/evaluation")["stages"]["evaluate-toy-s3"]["processor"] == "Abacus (wood)"
    first = commit("first")
    Path("source").write_text("other text")
    dvc(
        "repro"
    )  # a plain `dvc repro` notes nothing, and the note of the old bytes says nothing of the new ones
    commit("second")
    assert trace(project, "data/evaluation")["stages"]["evaluate-toy-s3"]["processor"] == ""
    assert (
        trace(project, "data/evaluation", first)["stages"]["evaluate-toy-s3"]["processor"] == "Abacus (wood)"
    )
    # The old bytes again, restored: history knows.
    Path("source").write_text("text")
    machine.MACHINES.write_text("not JSON")
    assert machine.recorded_processor(project, entry) == "Abacus (wood)"
    machine.record(entries["distill_student-small-s3"], {"distill_student-small-s3"})
    assert set(json.loads(machine.MACHINES.read_text())) == {"distill_student-small-s3"}


def test_the_hashes_are_dvcs_own(project):
    from tasks.recorded import content_hash

    for path, entry in owners(read_recorded(project)).items():
        assert content_hash(project / path) == entry.outs[path].md5
