"""The plan: the same text for the same parameters, exact inputs, and hand edits noticed."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stillhouse.errors import StillhouseError
from tasks.params import load_pipeline, load_suite
from tasks.plan import (
    DVC_YAML,
    Stage,
    check_plan,
    edited_by_hand,
    make_plan,
    pruned_lock,
    render,
    stages_of,
    user_module_files,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "params", tmp_path / "params")
    (tmp_path / "params/pipeline.yaml").unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_name(stages: list[Stage]) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages}


def test_the_committed_plan_is_fresh(monkeypatch):
    monkeypatch.chdir(ROOT)
    check_plan()
    assert load_pipeline() == load_suite("quickstart", [])


@pytest.mark.parametrize("suite", sorted(path.stem for path in (ROOT / "params/suites").rglob("*.yaml")))
def test_every_suite_can_be_planned(project, suite):
    stages = make_plan(suite, [])
    text = DVC_YAML.read_text()
    assert text == render(stages_of(load_suite(suite, [])))
    rows = YAML(typ="safe").load(text)["stages"]
    assert list(rows) == [stage.name for stage in stages]
    writers = {out: stage.name for stage in stages for out in stage.writes}
    seen = set()
    for stage in stages:
        # Everything read below data/ is written by an earlier stage, and the commands name what they should.
        assert all(writers[dep] in seen for dep in stage.deps if dep.startswith("data/")), stage.name
        assert shlex.split(rows[stage.name]["cmd"]) == stage.argv
        seen.add(stage.name)
    check_plan()


def test_exact_inputs(project):
    stages = by_name(make_plan("quickstart", []))
    student = stages["distill_student-small-s1"]
    assert sorted(student.deps) == [
        "data/code/distill_student-offline.json",
        "data/datasets/acrobot-s1",
        "data/datasets/breakout-s1",
        "data/datasets/cartpole-s1",
    ]
    assert stages["fine_tune-cartpole-long-full-s0"].deps == [
        "data/code/fine_tune-dqn.json",
        "data/students/small-s0",
        "data/datasets/cartpole-s0",
    ]
    assert "data/datasets/cartpole-s0" not in stages["fine_tune-cartpole-long-scratch-s0"].deps
    assert "data/datasets/breakout-s0" not in stages["fine_tune-space-invaders-full-s0"].deps
    assert "data/students/small-s0" in stages["evaluate-acrobot-s0"].deps
    assert stages["train_teacher-cartpole-s0"].params == ["environments.cartpole", "train_teacher.cartpole"]


def test_inputs_follow_the_options(project):
    options = ["distill_student.small.feature_weight=0.01", "collect_dataset.cartpole.from_replay=true"]
    stages = by_name(make_plan("quickstart", options))
    student = stages["distill_student-small-s1"].deps
    assert {"data/teachers/cartpole-s1", "data/teachers/acrobot-s1", "data/teachers/breakout-s1"} < set(
        student
    )
    assert "data/training_state/cartpole-s0" in stages["collect_dataset-cartpole-s0"].deps
    assert "data/training_state/acrobot-s0" not in stages["collect_dataset-acrobot-s0"].deps


def test_an_on_policy_student_reads_teachers_and_no_dataset(project):
    options = ["distill_student.method=on_policy"]
    more = by_name(make_plan("quickstart", [*options, "distill_student.from_datasets=true"]))
    assert "data/datasets/acrobot-s0" in more["distill_student-small-s0"].deps
    stage = by_name(make_plan("quickstart", options))["distill_student-small-s0"]
    assert sorted(stage.deps) == [
        "data/code/distill_student-on_policy.json",
        "data/teachers/acrobot-s0",
        "data/teachers/breakout-s0",
        "data/teachers/cartpole-s0",
    ]


def test_an_online_student_reads_what_makes_its_teachers(project):
    stages = make_plan("quickstart", ["distill_student.method=online"])
    stage = by_name(stages)["distill_student-small-s0"]
    assert stage.deps == ["data/code/distill_student-online-dqn-pqn.json"]
    assert {"train_teacher.acrobot", "train_teacher.breakout", "train_teacher.cartpole"} < set(stage.params)
    plots = YAML(typ="safe").load(DVC_YAML.read_text())["plots"]
    assert {"Online students", "Teachers"} < {title for plot in plots for title in plot}


def test_a_joint_network_is_judged_beside_the_students(project):
    suite = Path("params/suites/quickstart.yaml")
    suite.write_text(suite.read_text() + "train_multi_task:\n  all: {environments: [cartpole, acrobot]}\n")
    stages = by_name(make_plan("quickstart", []))
    assert stages["train_multi_task-all-s1"].deps == ["data/code/train_multi_task.json"]
    for name, expected in (("acrobot", True), ("cartpole", True), ("breakout", False)):
        assert ("data/multi_task/all-s0" in stages[f"evaluate-{name}-s0"].deps) == expected
    assert "data/multi_task/all-s0.json" in stages["report"].deps
    with pytest.raises(StillhouseError, match="train_multi_task.all.reward_scales names 'breakout'"):
        load_suite("quickstart", ["train_multi_task.all.reward_scales={breakout: 2}"])


def test_committed_studies_are_inputs_of_the_published_page(project):
    assert "publish_results" not in by_name(make_plan("smoke", []))
    published = ["publish_results=true"]
    assert by_name(make_plan("smoke", published))["publish_results"].deps == [
        "data/code/publish_results.json"
    ]
    folder = Path("benchmarks/results/policy_distillation")
    folder.mkdir(parents=True)
    for name in ("online", "losses"):
        (folder / f"{name}.json").write_text("{}")
    with pytest.raises(StillhouseError, match="stale"):
        check_plan()
    stage = by_name(make_plan("smoke", published))["publish_results"]
    assert stage.deps[1:] == [f"{folder}/losses.json", f"{folder}/online.json"]
    assert stage.in_git == ["docs/results/policy-distillation.md", "docs/results/online-distillation.svg"]
    row = YAML(typ="safe").load(DVC_YAML.read_text())["stages"]["publish_results"]
    assert {"docs/results/policy-distillation.md": {"cache": False, "persist": True}} in row["outs"]


def test_a_smaller_list_leaves_nothing_behind(project):
    full = by_name(make_plan("quickstart", []))
    assert "train_teacher-acrobot-s1" in full
    fewer = by_name(make_plan("quickstart", ["seeds=[0]", "distill_student.small.environments=[cartpole]"]))
    assert fewer["distill_student-small-s0"].deps == [
        "data/code/distill_student-offline.json",
        "data/datasets/cartpole-s0",
    ]
    assert not any(name.endswith("-s1") for name in fewer)


def test_the_users_own_module_is_an_input(project):
    assert user_module_files("installed_elsewhere") == []
    Path("games").mkdir()
    for name in ("games/__init__.py", "games/maze.py", "mine.py"):
        Path(name).touch()
    assert user_module_files("mine") == ["mine.py"]
    assert user_module_files("games.maze") == ["games/__init__.py", "games/maze.py"]
    assert user_module_files("games") == ["games/__init__.py", "games/maze.py"]


def test_a_hand_edit_is_refused_and_a_stale_plan_told_apart(project):
    make_plan("smoke", [])
    text = Path("params/pipeline.yaml").read_text()
    Path("params/pipeline.yaml").write_text(text.replace("device: auto", "device: cpu"))
    with pytest.raises(StillhouseError, match=r"dvc\.yaml is stale: run `stillhouse plan`"):
        check_plan()
    make_plan("", [])  # an edit under params/ is what the user should do
    check_plan()
    assert "--device cpu" in DVC_YAML.read_text()
    DVC_YAML.write_text(DVC_YAML.read_text().replace("--seed 0", "--seed 7", 1))
    assert edited_by_hand(DVC_YAML)
    for attempt in (check_plan, lambda: make_plan("", []), lambda: make_plan("smoke", [])):
        with pytest.raises(StillhouseError, match=r"dvc\.yaml was edited by hand"):
            attempt()
    assert "--seed 7" in DVC_YAML.read_text()
    make_plan("smoke", [], overwrite=True)
    check_plan()


def test_a_run_in_place_does_not_replace_edited_parameters(project):
    make_plan("smoke", [], in_place_run=True)
    make_plan("quickstart", [], in_place_run=True)
    path = Path("params/pipeline.yaml")
    path.write_text(path.read_text() + "# mine\n")
    with pytest.raises(StillhouseError, match=r"params/pipeline\.yaml was edited by hand"):
        make_plan("quickstart", [], in_place_run=True)
    assert "# mine" in path.read_text()


def test_dead_entries_leave_the_lock():
    lock = "schema: '2.0'\nstages:\n  a-s0:\n    cmd: x\n    outs:\n    - path: data/a\n  b-s0:\n    cmd: y\n  c:\n    cmd: z\n"
    assert pruned_lock(lock, {"a-s0", "b-s0", "c"}) == lock
    assert pruned_lock(lock, {"a-s0", "c"}) == lock.replace("  b-s0:\n    cmd: y\n", "")
    assert pruned_lock(lock, {"b-s0"}) == "schema: '2.0'\nstages:\n  b-s0:\n    cmd: y\n"
