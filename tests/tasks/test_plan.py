"""The plan: the same text for the same parameters, exact inputs, and hand edits noticed."""

from __future__ import annotations

import json
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
    assert stages["fine_tune-cartpole-long-full-small-s0"].deps == [
        "data/code/fine_tune-dqn.json",
        "data/students/small-s0",
        "data/datasets/cartpole-s0",
    ]
    assert "data/datasets/cartpole-s0" not in stages["fine_tune-cartpole-long-scratch-s0"].deps
    assert "data/datasets/breakout-s0" not in stages["fine_tune-space-invaders-full-small-s0"].deps
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
    block = "{environments: [cartpole, acrobot], learner: {algorithm: ppo}}"
    suite.write_text(suite.read_text() + f"train_multi_task:\n  all: {block}\n")
    stages = by_name(make_plan("quickstart", []))
    stage = stages["train_multi_task-all-s1"]
    assert stage.deps == ["data/code/train_multi_task-hard_sharing-ppo.json"]
    assert stage.params == ["train_multi_task.all", "environments.acrobot", "environments.cartpole"]
    for name, expected in (("acrobot", True), ("cartpole", True), ("breakout", False)):
        assert ("data/multi_task/all-s0" in stages[f"evaluate-{name}-s0"].deps) == expected
    assert "data/multi_task/all-s0.json" in stages["report"].deps
    with pytest.raises(StillhouseError, match="train_multi_task.all.reward_scales names 'breakout'"):
        load_suite("quickstart", ["train_multi_task.all.reward_scales={breakout: 2}"])
    options = ["train_multi_task.method=soft_sharing", "train_multi_task.strength=0.1"]
    found = load_suite("quickstart", [*options, "budget=0.5"]).train_multi_task["all"]
    assert (found.method, found.learner.algorithm, found.learner.env_steps) == (
        "soft_sharing",
        "ppo",
        500_000,
    )
    stages = by_name(make_plan("quickstart", options))
    assert stages["train_multi_task-all-s0"].deps == ["data/code/train_multi_task-soft_sharing-ppo.json"]
    for change, said in (
        (
            "train_multi_task.balancing=uncertainty",
            "train_multi_task.all.balancing: uncertainty needs losses",
        ),
        ("train_multi_task.learner.network={features: 8}", "a learner without 'network' is allowed"),
        ("train_multi_task.method=distil", "method"),
    ):
        with pytest.raises(StillhouseError, match=said) as caught:
            make_plan("quickstart", [change])
        assert "\n" not in str(caught.value)
    with pytest.raises(StillhouseError, match=r"one environment \(acrobot\) and nothing to balance"):
        make_plan(
            "quickstart", ["train_multi_task.environments=[acrobot]", "train_multi_task.balancing=pcgrad"]
        )


def test_distrals_distilled_policy_is_a_student(project):
    suite = Path("params/suites/quickstart.yaml")
    learner = "{algorithm: impala, env_steps: 1000}"
    block = f"{{method: distral, environments: [cartpole-long, cartpole], learner: {learner}}}"
    text = suite.read_text().replace("train_teacher:", "train_teacher:\n  cartpole-long: {algorithm: pqn}", 1)
    suite.write_text(text + f"train_multi_task:\n  drawn: {block}\n")
    options = ["fine_tune.cartpole-long.sources=[drawn.cartpole]", "fine_tune.cartpole-long.modes=[full]"]
    stages = by_name(make_plan("quickstart", options))
    stage = stages["train_multi_task-drawn-s0"]
    assert stage.deps == ["data/code/train_multi_task-distral-impala.json"]
    assert stage.outs == ["data/multi_task/drawn-s0", "data/students/drawn-s0"]
    for environment, known in (("cartpole", True), ("cartpole-long", True), ("acrobot", False)):
        found = set(stages[f"evaluate-{environment}-s0"].deps)
        assert ({"data/multi_task/drawn-s0", "data/students/drawn-s0"} <= found) == known
    # Its outputs are logits: a learner that bootstraps fits a head to the environment's dataset.
    assert stages["fine_tune-cartpole-long-full-drawn-s0"].deps == [
        "data/code/fine_tune-dqn.json",
        "data/students/drawn-s0",
        "data/datasets/cartpole-s0",
    ]
    order = list(stages)
    assert order.index("train_multi_task-drawn-s0") < order.index("fine_tune-cartpole-long-full-drawn-s0")
    found = load_suite("quickstart", []).train_multi_task["drawn"]
    assert found.learner.entropy_coefficient == 0 and found.learner.env_steps == 1000
    changed = load_suite("quickstart", ["train_multi_task.learner.entropy_coefficient=0.02", "budget=0.5"])
    learner = changed.train_multi_task["drawn"].learner
    assert (learner.entropy_coefficient, learner.env_steps) == (0.02, 500)
    text = suite.read_text()
    for change, said in (
        ("train_multi_task.alpha=2", "drawn.*alpha: Input should be less than or equal to 1"),
        ("train_multi_task.beta=0", "beta: Input should be greater than 0"),
        (
            "train_multi_task.learner.algorithm=pqn",
            "'pqn' was given, which learns Q-values.*allowed is impala",
        ),
        (
            "train_multi_task.environments=[cartpole, acrobot]",
            "acrobot has vector_6, cartpole vector_4; bring",
        ),
        ("train_multi_task.reward_scales={breakout: 2}", "reward_scales names 'breakout'"),
    ):
        with pytest.raises(StillhouseError, match=said) as caught:
            make_plan("quickstart", [change])
        assert "\n" not in str(caught.value)
    suite.write_text(text.replace("  drawn:", "  small:"))
    with pytest.raises(
        StillhouseError, match=r"train_multi_task\.small: its distilled policy is a student of"
    ):
        load_suite("quickstart", [])


def test_an_average_of_students_is_one_of_them(project):
    suite = Path("params/suites/quickstart.yaml")
    text = suite.read_text()
    other = "  other: {environments: [breakout, acrobot, cartpole], loss: nll, parameter_fraction: 0.1, size: SIZE}\n"
    other = other.replace("SIZE", "{conv_channels: 8, features: 32, torso: [32], layer_norm: true}")
    block = "aggregate:\n  soup: {members: [small, other], method: greedy_soup}\n"
    suite.write_text(text.replace("fine_tune:", f"{other}{block}fine_tune:", 1))
    options = ["fine_tune.cartpole-long.sources=[soup.cartpole]"]
    stages = by_name(make_plan("quickstart", options))
    stage = stages["aggregate-soup-s1"]
    assert stage.deps == ["data/code/aggregate.json", "data/students/small-s1", "data/students/other-s1"]
    assert stage.params == [
        "aggregate.soup",
        *(f"environments.{name}" for name in ("acrobot", "breakout", "cartpole")),
    ]
    assert stage.outs == ["data/students/soup-s1"] and stage.metrics == ["data/students/soup-s1.json"]
    assert "data/students/soup-s0" in stages["evaluate-breakout-s0"].deps
    assert "data/students/soup-s0.json" in stages["report"].deps
    order = list(stages)
    places = [
        order.index(name) for name in ("distill_student-small-s0", "aggregate-soup-s0", "evaluate-acrobot-s0")
    ]
    assert places == sorted(places)
    moved = "fine_tune-cartpole-long-full-soup-s0"
    assert "data/students/soup-s0" in stages[moved].deps and order.index("aggregate-soup-s0") < order.index(
        moved
    )
    # Logits, as its members give: a learner that bootstraps fits a head to the environment's dataset.
    assert "data/datasets/cartpole-s0" in stages[moved].deps
    found = load_suite("quickstart", ["aggregate.method=weighted", "aggregate.weights={small: 2}"])
    assert found.aggregate["soup"].members == ["small", "other"]
    with pytest.raises(StillhouseError, match="weights are for method weighted"):
        load_suite("quickstart", ["aggregate.method=weighted"])
    for change, said in (
        (
            "aggregate.members=[small, smal]",
            "aggregate.soup.members names 'smal', which is no student.*small",
        ),
        ("aggregate.members=[small]", "aggregate.soup.members: List should have at least 2 items"),
        ("aggregate.members=[small, small]", "aggregate.soup.members: each may stand once only"),
        ("aggregate.members=[small, soup]", "names 'soup', which is no student"),
        ("distill_student.other.loss=mse", r"'small' and 'other' differ in outputs \(logits, Q-values\)"),
        ("distill_student.other.parameter_fraction=0.2", r"differ in parameter_fraction \(0.1, 0.2\)"),
        ("distill_student.other.environments=[acrobot]", "differ in environments"),
        ("aggregate.soup.method=soup", "aggregate.soup.method: Input should be"),
        ("aggregate.soup.method=interpolation", ""),
    ):
        if not said:
            load_suite("quickstart", [change])
            continue
        with pytest.raises(StillhouseError, match=said) as caught:
            load_suite("quickstart", [change])
        assert "\n" not in str(caught.value)
    written = suite.read_text()
    for before, after, said in (
        ("soup: {", "cartpole: {", ""),  # environments and students may share a name
        ("soup: {", "small: {", "aggregate.small: there is another network 'small'"),
        (
            "method: greedy_soup",
            "method: weighted, weights: {none: 1}",
            "'none' is no member; there are small, other",
        ),
    ):
        suite.write_text(written.replace(before, after))
        if not said:
            load_suite("quickstart", [])
            continue
        with pytest.raises(StillhouseError, match=said):
            load_suite("quickstart", [])


ADOPTED = """\
seeds: [0, 1]
environments:
  cartpole: {id: CartPole-v1}
  long: {id: stillhouse/CartPole-v1, options: {pole_length: 1.5}}
  heavy: {id: stillhouse/CartPole-v1, options: {pole_mass: 0.5}}
train_teacher:
  long: {algorithm: fine_tuned, source: start}
  heavy: {algorithm: fine_tuned, mode: scratch}
meta_train:
  start: {method: maml_rl, family: {name: cartpole}}
distill_student:
  both: {environments: [long, heavy]}
fine_tune:
  long: &moved {sources: [start.cartpole], modes: [full, scratch], learner: {algorithm: ppo, env_steps: 1000}}
  heavy: *moved
"""


def test_adapted_agents_are_teachers(project):
    suite = Path("params/suites/adopted.yaml")
    suite.write_text(ADOPTED)
    stages = by_name(make_plan("adopted", []))
    stage = stages["adopt_teacher-long-s1"]
    moved = "data/transfer/long-full-start-s1"
    assert stage.deps == ["data/code/adopt_teacher.json", moved, f"{moved}.json", f"{moved}.csv"]
    assert stage.params == ["train_teacher.long"]
    assert stage.outs == ["data/teachers/long-s1"]
    assert stages["adopt_teacher-heavy-s0"].deps[1] == "data/transfer/heavy-scratch-s0"
    assert stages["distill_student-both-s0"].deps[1:] == ["data/datasets/heavy-s0", "data/datasets/long-s0"]
    chain = [
        "meta_train-start-s0",
        "fine_tune-long-full-start-s0",
        "adopt_teacher-long-s0",
        "collect_dataset-long-s0",
    ]
    order = list(stages)
    places = [order.index(name) for name in [*chain, "distill_student-both-s0", "evaluate-long-s0", "report"]]
    assert places == sorted(places)
    makers = {path: name for name, stage in stages.items() for path in stage.writes}
    for name, stage in stages.items():
        assert all(order.index(makers[dep]) < order.index(name) for dep in stage.deps if dep in makers)

    def refused(said: str, *options: str, text: str = ADOPTED) -> None:
        suite.write_text(text)
        with pytest.raises(StillhouseError, match=said) as caught:
            make_plan("adopted", list(options))
        assert "\n" not in str(caught.value)

    refused(
        "train_teacher.long: full without a source was given, but fine_tune.long makes full from start, scratch;",
        "train_teacher.long.source=",
    )
    refused("train_teacher.long: l2_sp from start was given", "train_teacher.long.mode=l2_sp")
    refused(
        "train_teacher.long.*mode: Input should be .*progressive_2", "train_teacher.long.mode=progressive_2"
    )
    refused(
        "train_teacher.cartpole: .*is what fine_tune.cartpole leaves, which there is not",
        text=ADOPTED.replace("  long: {algo", "  cartpole: {algo"),
    )
    refused(
        "both.method: online trains its teachers itself, and that of long is adopted",
        "distill_student.method=online",
    )
    refused("long.from_replay: a dqn teacher is allowed", "collect_dataset.long.from_replay=true")
    refused(
        "learner.*fine_tuned",
        text=ADOPTED + "train_multi_task:\n  all: {environments: [long], learner: {algorithm: fine_tuned}}\n",
    )
    refused(
        r"these stages wait for each other: (\S+, then )*(adopt_teacher|fine_tune)-long-\S+, then .*; take another source or teacher",
        "fine_tune.long.sources=[long]",
        "train_teacher.long.source=long",
    )
    refused(
        "the teacher of long is adopted from fine_tune and is not trained on",
        "retraining.generation=1",
        "retraining.student=both",
    )


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


def put_into_production(**changes):
    """As `stillhouse promote` leaves it: the quickstart's student of seed 1."""
    params = load_suite("quickstart", []).model_dump(mode="json")
    about = {
        "schema_version": 2,
        "generation": 0,
        "suite": "quickstart",
        "student": "small",
        "seed": 1,
        "environments": sorted(params["distill_student"]["small"]["environments"]),
        "params": params | changes,
        "decision": {},
    }
    Path("data/production").mkdir(parents=True, exist_ok=True)
    Path("data/production/production.json").write_text(json.dumps(about))


RETRAIN = ["retraining.generation=3", "seeds=[1]", "retraining.student=small"]


def test_a_retraining_is_planned_from_what_made_production(project):
    put_into_production()
    suite = Path("params/suites/quickstart.yaml")
    before = load_suite("quickstart", [])
    suite.write_text("suite: quickstart\n")  # today's is no longer of use
    stages = by_name(make_plan("", [*RETRAIN, "train_teacher.replay_capacity=1234567"], production=True))
    student = stages["distill_student-small-s1"]
    assert "data/production" in student.deps and "retraining" in student.params
    assert stages["train_teacher-acrobot-s1"].deps[-1] == "data/production"
    assert "compare_production-small-s1" in stages and not any(name.endswith("-s0") for name in stages)
    planned = load_pipeline()
    assert planned.train_teacher["acrobot"] == before.train_teacher["acrobot"]
    assert planned.train_teacher["cartpole"].model_dump()["replay_capacity"] == 1234567
    assert planned.suite == "quickstart" and planned.retraining.generation == 3
    check_plan()


@pytest.mark.parametrize(
    ("override", "match"),
    [
        (
            "train_teacher.cartpole.algorithm=pqn",
            r"train_teacher.cartpole.algorithm: pqn was given, .* made with dqn",
        ),
        (
            "train_teacher.cartpole.gamma=0.5",
            r"train_teacher.cartpole.gamma: 0.5 was given, .* made with 0.99",
        ),
        ("train_teacher.cartpole.network.features=7", r"train_teacher.cartpole.network: .*7.* was given"),
        ("distill_student.small.loss=mse", r"distill_student.small.loss: mse was given, .* made with kl"),
        ("distill_student.small.method=on_policy", r"distill_student.small.method: on_policy was given"),
        (
            "distill_student.small.environments=[cartpole]",
            r"distill_student.small.environments: \['cartpole'\] was",
        ),
        ("distill_student.small.size.features=7", r"distill_student.small.size: .*7.* was given"),
        (
            "retraining.student=smal",
            r"retraining.student: 'smal' is not among the students .*did you mean 'small'",
        ),
    ],
)
def test_what_production_cannot_go_on_to_is_refused(project, override, match):
    put_into_production()
    with pytest.raises(StillhouseError, match=match) as caught:
        make_plan("", [*RETRAIN, override], production=True)
    assert "\n" not in str(caught.value)
    assert not DVC_YAML.exists()


def test_parameters_of_another_release_are_refused_in_one_line(project):
    put_into_production(seeds="all")
    with pytest.raises(
        StillhouseError, match=r"data/production/production.json: params.seeds: .* 'all' was given"
    ):
        make_plan("", RETRAIN, production=True)
    put_into_production(no_longer_known=1)
    with pytest.raises(StillhouseError, match=r"params.no_longer_known: unknown parameter"):
        make_plan("", RETRAIN, production=True)
    shutil.rmtree("data/production")
    with pytest.raises(StillhouseError, match="nothing is in production yet"):
        make_plan("", RETRAIN, production=True)


# Stage's name without `fine_tune-cartpole-long-` -> inputs below data/, and environments, besides its own.
TRANSFERS = {
    # A KL student's outputs are logits: a Q head is fitted to its environment's dataset.
    "full-small": (["students/small", "datasets/cartpole"], ["breakout", "cartpole"]),
    "gradual-small": (["students/small", "datasets/cartpole"], ["breakout", "cartpole"]),
    "head_only-small": (["students/small", "datasets/cartpole"], ["breakout", "cartpole"]),
    "discriminative-small": (["students/small", "datasets/cartpole"], ["breakout", "cartpole"]),
    "l2_sp-small": (["students/small", "datasets/cartpole"], ["breakout", "cartpole"]),
    "rehearsal-small": (
        ["students/small", "datasets/breakout", "datasets/cartpole"],
        ["breakout", "cartpole"],
    ),
    "features-small": (["students/small"], ["cartpole"]),
    "progressive_2-small": (["students/small"], ["cartpole"]),
    # A DQN teacher's are Q-values.
    "full-cartpole": (["teachers/cartpole"], ["cartpole"]),
    "gradual-cartpole": (["teachers/cartpole"], ["cartpole"]),
    "head_only-cartpole": (["teachers/cartpole"], ["cartpole"]),
    "discriminative-cartpole": (["teachers/cartpole"], ["cartpole"]),
    "l2_sp-cartpole": (["teachers/cartpole"], ["cartpole"]),
    "rehearsal-cartpole": (["teachers/cartpole", "datasets/cartpole"], ["cartpole"]),
    "features-cartpole": (["teachers/cartpole"], ["cartpole"]),
    "progressive_2-cartpole": (["teachers/cartpole"], ["cartpole"]),
    # One stage for all sources.
    "progressive_3": (["students/small", "teachers/cartpole"], ["cartpole"]),
    "progressive_random": (["students/small"], ["cartpole"]),
    "auto": (["students/small", "teachers/cartpole", "datasets/cartpole"], ["breakout", "cartpole"]),
    "scratch": (["students/small"], []),
}


def transfers(overrides: list[str]) -> dict[str, Stage]:
    stages = stages_of(load_suite("smoke", overrides))
    return {
        stage.name.removeprefix("fine_tune-cartpole-long-").removesuffix("-s0"): stage
        for stage in stages
        if stage.verb == "fine_tune"
    }


def inputs(stage: Stage) -> list[str]:
    return sorted(
        dep.removeprefix("data/").removesuffix("-s0")
        for dep in stage.deps
        if not dep.startswith("data/code/")
    )


def test_inputs_of_every_way_of_transfer(project):
    ways = sorted({name.partition("-")[0] for name in TRANSFERS})
    block = "fine_tune.cartpole-long"
    found = transfers([f"{block}.modes=[{', '.join(ways)}]", f"{block}.sources=[small.cartpole, cartpole]"])
    assert set(found) == set(TRANSFERS)
    for name, (read, environments) in TRANSFERS.items():
        stage = found[name]
        assert inputs(stage) == sorted(read), name
        assert "data/code/fine_tune-pqn.json" in stage.deps
        own = [f"{block}.{field}" for field in ("evaluation_episodes", "evaluations", "learner")]
        assert set(own) <= set(stage.params)
        known = [f"environments.{each}" for each in sorted(["cartpole-long", *environments])]
        assert [key for key in stage.params if not key.startswith(block)] == known
        way, _, source = name.partition("-")
        entries = {"small": ["small.cartpole"], "cartpole": ["cartpole"]}.get(source, ["small.cartpole"])
        given = ["small.cartpole", "cartpole"] if way in ("progressive_3", "auto") else entries
        command = ["python", "-m", "tasks.fine_tune", "cartpole-long", "--mode", way, "--seed", "0"]
        assert stage.argv == [*command, "--sources", *given]
        assert stage.outs == [f"data/transfer/cartpole-long-{name}-s0"]
        assert stage.metrics == [f"data/transfer/cartpole-long-{name}-s0.json"]
        assert list(stage.plots) == [f"data/transfer/cartpole-long-{name}-s0.csv"]


def test_a_way_reads_its_own_settings_and_no_others(project):
    block = "fine_tune.cartpole-long"
    read = {
        way: {key.removeprefix(f"{block}.") for key in stage.params if key.startswith(block)}
        for way, stage in transfers([f"{block}.modes=[scratch, full, l2_sp, progressive_2]"]).items()
    }
    assert read["scratch"] == {"evaluations", "evaluation_episodes", "learner"}
    taken = {*read["scratch"], "components", "actions", "take", "freeze", "epsilon_start"}
    assert read["full-small"] == taken
    assert read["l2_sp-small"] == {*taken, "l2_sp"}
    shown = {*read["scratch"], "components", "actions", "adapter_scale", "sensitivity_episodes"}
    assert read["progressive_2-small"] == shown
    # Another way, or another source, beside them runs nothing again.
    more = [
        f"{block}.modes=[scratch, full, l2_sp, progressive_2, features]",
        f"{block}.sources=[small.cartpole, cartpole]",
    ]
    again = transfers(more)
    before = transfers([f"{block}.modes=[scratch, full, l2_sp, progressive_2]"])
    assert all(again[way].row() == stage.row() for way, stage in before.items())


def test_inputs_of_a_policys_transfer(project):
    block = "fine_tune.cartpole-long"
    ppo = [f"{block}.learner.algorithm=ppo", f"{block}.modes=[full, kickstart]"]
    found = transfers([*ppo, f"{block}.sources=[small.cartpole, cartpole]"])
    # Logits are taken as they are; a guide of Q-values needs states for its temperature.
    assert inputs(found["full-small"]) == inputs(found["kickstart-small"]) == ["students/small"]
    assert inputs(found["full-cartpole"]) == ["teachers/cartpole"]
    assert inputs(found["kickstart-cartpole"]) == ["datasets/cartpole", "teachers/cartpole"]
    guided = {f"{block}.guide_weight", f"{block}.guide_fraction"}
    assert guided <= set(found["kickstart-small"].params) and guided <= set(found["full-small"].params)
    assert f"{block}.critic_warmup" in found["full-small"].params
    assert f"{block}.critic_warmup" not in found["kickstart-small"].params
    found = transfers([*ppo, f"{block}.sources=[small.cartpole]", "distill_student.small.loss=mse"])
    assert inputs(found["kickstart-small"]) == ["datasets/cartpole", "students/small"]


def test_inputs_where_the_torso_alone_is_taken(project):
    block = "fine_tune.cartpole-long"
    found = transfers([f"{block}.modes=[full, rehearsal]", f"{block}.sources=[small]"])
    assert inputs(found["full-small"]) == ["students/small"]  # no head, so no dataset to fit one to
    assert inputs(found["rehearsal-small"]) == ["datasets/breakout", "datasets/cartpole", "students/small"]


def test_a_sources_own_module_is_an_input_of_what_is_judged_there(project):
    Path("mine.py").touch()
    block = "fine_tune.cartpole-long"
    own = ["environments.breakout.module=mine", f"{block}.modes=[full, features, scratch]"]
    found = transfers(own)
    assert "mine.py" in found["full-small"].deps
    assert "mine.py" not in found["features-small"].deps
    assert "mine.py" not in found["scratch"].deps
