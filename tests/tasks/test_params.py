"""What users may type, and the one line they get for what they may not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from stillhouse.errors import StillhouseError
from tasks.params import check_environments, load_pipeline, load_suite, parse_override
from tasks.plan import make_plan

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "params", tmp_path / "params")
    (tmp_path / "params/pipeline.yaml").unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("a.b=0.5", "a.b", 0.5),
        ("a.b=1", "a.b", 1),
        ("a.b=kl", "a.b", "kl"),
        ("a-b.c=[1, 2]", "a-b.c", [1, 2]),
        ("a.b=true", "a.b", True),
        ("a.b=null", "a.b", None),
        ("a.b=", "a.b", ""),
        ("a.b=x=y", "a.b", "x=y"),
    ],
)
def test_overrides_are_read_as_yaml(override, key, value):
    parsed = parse_override(override)
    assert parsed == (key, value)
    assert type(parsed[1]) is type(value)


def test_an_override_with_a_name_and_one_for_every_name():
    params = load_suite(
        "quickstart", ["train_teacher.cartpole.gamma=0.9", "distill_student.loss=mse", "seeds=[5]"]
    )
    assert params.train_teacher["cartpole"].gamma == 0.9
    assert params.train_teacher["acrobot"].gamma == 0.99
    assert params.distill_student["small"].loss == "mse"
    assert params.seeds == [5]
    # A field that only some algorithms have is set where it exists.
    params = load_suite("quickstart", ["train_teacher.replay_capacity=1234567"])
    assert params.train_teacher["cartpole"].model_dump()["replay_capacity"] == 1234567
    assert params.train_teacher["breakout"].algorithm == "pqn"


def test_the_budget_scales_every_budget():
    plain, half = load_suite("quickstart", []), load_suite("quickstart", ["budget=0.5"])
    for name, teacher in plain.train_teacher.items():
        assert half.train_teacher[name].env_steps == teacher.env_steps // 2
    for name, student in plain.distill_student.items():
        assert half.distill_student[name].updates == student.updates // 2
    for name, transfer in plain.fine_tune.items():
        assert half.fine_tune[name].learner.env_steps == transfer.learner.env_steps // 2


@pytest.mark.parametrize("algorithm", ["pqn", "ppo", "impala", "unreal"])
def test_another_algorithm_brings_its_own_defaults(algorithm):
    params = load_suite("quickstart", [f"train_teacher.cartpole.algorithm={algorithm}"])
    assert params.train_teacher["cartpole"].algorithm == algorithm
    assert (
        params.train_teacher["cartpole"].env_steps
        == load_suite("quickstart", []).train_teacher["cartpole"].env_steps
    )


def test_another_method_keeps_what_the_student_is():
    params = load_suite("quickstart", ["distill_student.method=on_policy", "distill_student.num_envs=16"])
    before, student = load_suite("quickstart", []).distill_student["small"], params.distill_student["small"]
    assert (before.method, student.method) == ("offline", "on_policy")
    for field in ("environments", "loss", "updates", "size", "parameter_fraction"):
        assert getattr(student, field) == getattr(before, field)
    assert student.model_dump()["num_envs"] == 16
    assert student.patience == 0


def test_the_written_parameters_are_complete_and_the_same():
    make_plan("quickstart", [])
    assert load_pipeline() == load_suite("quickstart", [])
    assert "batch_size" in Path("params/pipeline.yaml").read_text()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["train_teacher.cartpole.gamma=1.5"],
            ["train_teacher.cartpole", "gamma", "1.5", "less than or equal to 1"],
        ),
        (["train_teacher.cartpole.gama=0.5"], ["gama", "did you mean", "gamma"]),
        (["train_teacher.cartpol.gamma=0.5"], ["cartpol", "did you mean", "cartpole"]),
        (["distill_student.los=mse"], ["distill_student.los", "loss"]),
        (["distill_student.loss=huber"], ["loss", "'huber'", "'kl'"]),
        (["trainteacher.gamma=0.5"], ["trainteacher", "train_teacher"]),
        (["train_teacher.cartpole.network.torso.x=1"], ["network.torso.x"]),
        (["seeds=[]"], ["seeds"]),
        (["seeds=[1, 1]"], ["seeds"]),
        (["budget=0"], ["budget", "0"]),
        (["distill_student.environments=[pong]"], ["pong", "environment with a teacher"]),
        (["fine_tune.cartpole-long.sources=[smal]"], ["smal", "did you mean", "small"]),
        (
            ["collect_dataset.breakout.from_replay=true"],
            ["collect_dataset.breakout.from_replay", "dqn", "pqn"],
        ),
        (["distill_student.method=onpolicy"], ["method", "'onpolicy'", "'offline'"]),
        (["nonsense"], ["nonsense", "key=value"]),
        (["a b=1"], ["a b=1", "key=value"]),
        (["seeds=[1"], ["seeds=[1", "cannot be read"]),
        (["train_teacher.cartpole.env_steps=.inf"], ["env_steps"]),
    ],
)
def test_a_mistake_is_one_line(overrides, words):
    with pytest.raises(StillhouseError) as caught:
        load_suite("quickstart", overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


def test_unknown_suite_names_near_ones():
    with pytest.raises(StillhouseError, match=r"unknown suite 'quikstart' \(did you mean 'quickstart'"):
        load_suite("quikstart", [])
    with pytest.raises(StillhouseError, match="unknown suite"):
        load_suite("../../etc/passwd", [])


@pytest.mark.parametrize("name", ["CartPole", "a_b", "a--b", "-a", "a.b", "", "a/b", "x" * 65])
def test_names_are_slugs(name):
    text = Path("params/suites/smoke.yaml").read_text()
    Path("params/suites/bad.yaml").write_text(text.replace("cartpole-long", f'"{name}"'))
    with pytest.raises(StillhouseError) as caught:
        load_suite("bad", [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("environments.cartpole.id=CartPol-v1", ["CartPol-v1", "did you mean", "CartPole-v1"]),
        ("environments.cartpole.id=Pendulum-v1", ["cartpole", "Box", "Discrete"]),
        ("environments.cartpole.id=Blackjack-v1", ["cartpole", "Tuple"]),
        ("environments.cartpole.module=broken_module", ["broken_module", "ZeroDivisionError"]),
        ("environments.cartpole.module=no_such_module", ["no_such_module"]),
        ("environments.cartpole.module=os", ["environments.cartpole.module", "params/modules.txt"]),
        ("environments.cartpole.options={gravity: 3}", ["CartPole-v1", "gravity"]),
        (
            "fine_tune.cartpole-long.sources=[breakout]",
            ["cartpole-long", "planes", "vector", "different kinds"],
        ),
    ],
)
def test_environments_are_checked_before_any_work(override, words):
    Path("broken_module.py").write_text("1 / 0\n")
    params = load_suite("smoke", [override])
    with pytest.raises(StillhouseError) as caught:
        check_environments(params)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


TRANSFER = "fine_tune.cartpole-long"
PPO = f"{TRANSFER}.learner.algorithm=ppo"


def refusal(overrides: list[str]) -> str:
    """What a user is told before any work."""
    with pytest.raises(StillhouseError) as caught:
        check_environments(load_suite("smoke", overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["train_teacher.cartpole.network.recurrent=gru"],
            ["cartpole.network.recurrent", "dqn takes none", "gru", "impala"],
        ),
        (["distill_student.small.size.recurrent=lstm"], ["small.size.recurrent", "distillation takes none"]),
        (
            ["train_teacher.cartpole.algorithm=impala", "train_teacher.cartpole.network.recurrent=gru"],
            ["distill_student.acting.method", "teacher of cartpole has a memory", "offline is allowed"],
        ),
        (
            [
                "distill_student.acting.method=offline",
                "distill_student.following.method=offline",
                f"{TRANSFER}.sources=[cartpole]",
                "train_teacher.cartpole.algorithm=impala",
                "train_teacher.cartpole.network.recurrent=gru",
            ],
            [f"{TRANSFER}.sources", "teacher of cartpole has a memory", "sources without one"],
        ),
        ([f"{TRANSFER}.learner.algorithm=impala"], ["learner", "'impala'", "'dqn', 'pqn', 'ppo'"]),
        ([f"{TRANSFER}.modes=[kickstart]"], [f"{TRANSFER}.modes: kickstart", "ppo", "pqn was given"]),
        (
            [f"{TRANSFER}.modes=[progressive_3]"],
            [f"{TRANSFER}.modes: progressive_3", "two sources", "small.cartpole", "progressive_2"],
        ),
        ([f"{TRANSFER}.sources=[actng]"], [f"{TRANSFER}.sources", "'actng'", "did you mean 'acting'"]),
        ([f"{TRANSFER}.sources=[cartpol]"], ["'cartpol'", "did you mean 'cartpole'"]),
        ([f"{TRANSFER}.sources=[cartpole-long]"], ["'cartpole-long'", "no environment with a teacher"]),
        ([f"{TRANSFER}.sources=[cartpole.cartpole]"], ["a teacher has one environment", "'cartpole'"]),
        (
            [f"{TRANSFER}.sources=[small.cartpol]"],
            ["'cartpol'", "environment of that student", "did you mean 'cartpole'", "breakout"],
        ),
        (
            [f"{TRANSFER}.sources=[acting.breakout]"],
            ["'breakout'", "environment of that student", "cartpole"],
        ),
        ([f"{TRANSFER}.sources=[Small]"], [f"{TRANSFER}.sources", "lower-case"]),
        ([f"{TRANSFER}.sources=[small.Cart]"], [f"{TRANSFER}.sources", "lower-case"]),
        ([f"{TRANSFER}.sources=[]"], [f"{TRANSFER}.sources"]),
        ([f"{TRANSFER}.modes=[]"], [f"{TRANSFER}.modes"]),
        ([f"{TRANSFER}.modes=[frozen]"], [f"{TRANSFER}.modes", "'frozen'", "'gradual'"]),
        ([f"{TRANSFER}.sources=[cartpole, cartpole]"], [f"{TRANSFER}.sources", "once only"]),
        # They would be one stage.
        ([f"{TRANSFER}.sources=[small.cartpole, small]"], [f"{TRANSFER}.sources", "once only"]),
        ([f"{TRANSFER}.modes=[full, full]"], [f"{TRANSFER}.modes", "once only"]),
        (
            [
                f"{TRANSFER}.modes=[auto]",
                f"{TRANSFER}.sources=[cartpole, acting.cartpole, small.cartpole]",
                f"{TRANSFER}.probe_fraction=0.25",
            ],
            [f"{TRANSFER}.probe_fraction", "0.25", "3 sources", "nothing to train with"],
        ),
        # What is known once the environments are made.
        ([f"{TRANSFER}.sources=[breakout]"], [TRANSFER, "planes_10x10x4", "vector_4", "different kinds"]),
        ([f"{TRANSFER}.components={{angel: angle}}"], ["components", "'angel'", "did you mean 'angle'"]),
        ([f"{TRANSFER}.components={{angle: angel}}"], ["components: the source", "did you mean 'angle'"]),
        ([f"{TRANSFER}.actions={{lft: left}}"], ["actions: the target", "'lft'", "did you mean 'left'"]),
        (
            ["environments.cartpole-long={id: MountainCar-v0}", f"{TRANSFER}.modes=[full, progressive_2]"],
            [f"{TRANSFER}.modes: progressive_2", "vector_4", "vector_2", "'cartpole'"],
        ),
        (
            ["environments.cartpole-long={id: MountainCar-v0}", PPO, f"{TRANSFER}.modes=[kickstart]"],
            [f"{TRANSFER}.modes: kickstart", "vector_4", "vector_2"],
        ),
        (
            [
                "environments.cartpole-long={id: MountainCar-v0}",
                PPO,
                f"{TRANSFER}.modes=[kickstart]",
                f"{TRANSFER}.components=index",
                f"{TRANSFER}.actions=same",
            ],
            [f"{TRANSFER}.actions: kickstart", "3 actions", "'cartpole'", "2"],
        ),
        (
            [f"{TRANSFER}.modes=[features]", f"{TRANSFER}.sources=[small]"],
            [f"{TRANSFER}.sources: features", "'small'", "small.cartpole"],
        ),
        (
            [f"{TRANSFER}.modes=[progressive_3]", f"{TRANSFER}.sources=[cartpole, small]"],
            [f"{TRANSFER}.sources: progressive_3", "'small'"],
        ),
    ],
)
def test_a_transfer_that_cannot_be_made_is_refused_before_any_work(overrides, words):
    text = refusal(overrides)
    assert all(word in text for word in words), text


def test_names_that_could_be_two_things_are_refused():
    text = Path("params/suites/smoke.yaml").read_text()
    Path("params/suites/two.yaml").write_text(
        text.replace("  acting:", "  cartpole:").replace("[small.cartpole]", "[cartpole]")
    )
    with pytest.raises(StillhouseError, match="'cartpole' is a student and a teacher's environment"):
        load_suite("two", [])
    Path("params/suites/two.yaml").write_text(
        text.replace("  acting:", "  scratch:").replace("[small.cartpole]", "[scratch.cartpole]")
    )
    assert load_suite("two", [])
    with pytest.raises(StillhouseError, match="rename the source 'scratch'"):
        load_suite("two", [f"{TRANSFER}.modes=[auto]"])


@pytest.mark.parametrize(
    "overrides",
    [
        [
            f"{TRANSFER}.sources=[cartpole, acting.cartpole, small]",
            f"{TRANSFER}.modes=[progressive_3, full, auto]",
        ],
        [f"{TRANSFER}.sources=[cartpole, small]", f"{TRANSFER}.modes=[progressive_random]"],
        [PPO, f"{TRANSFER}.modes=[kickstart, rehearsal, scratch]"],
        ["environments.cartpole-long={id: MountainCar-v0}", f"{TRANSFER}.modes=[full, head_only, rehearsal]"],
        [
            "environments.cartpole-long={id: MountainCar-v0}",
            f"{TRANSFER}.modes=[features, progressive_2]",
            f"{TRANSFER}.components={{position: position, velocity: angular_velocity}}",
        ],
        [
            f"{TRANSFER}.modes=[auto]",
            f"{TRANSFER}.sources=[cartpole, acting.cartpole]",
            f"{TRANSFER}.probe_fraction=0.25",
        ],
    ],
)
def test_a_transfer_that_can_be_made_is_accepted(overrides):
    check_environments(load_suite("smoke", overrides))


def test_the_learners_network_is_the_sources():
    with pytest.raises(StillhouseError, match="learner without 'network' is allowed"):
        load_suite("smoke", [f"{TRANSFER}.learner={{algorithm: pqn, network: {{}}}}"])
    assert (
        "network"
        not in load_suite("smoke", []).model_dump(mode="json")["fine_tune"]["cartpole-long"]["learner"]
    )


def test_distral_takes_impala_whatever_was_said_first():
    method, algorithm = "train_multi_task.method=distral", "train_multi_task.learner.algorithm=impala"
    with pytest.raises(StillhouseError, match="'pqn' was given, which learns Q-values; .* allowed is impala"):
        load_suite("multi-task-classic", [method])
    pair = "acrobot-with-acrobot-heavy"
    for order in ([method, algorithm], [algorithm, method]):
        found = load_suite("multi-task-classic", [*order, "train_multi_task.beta=50"]).train_multi_task[pair]
        assert (found.method, found.beta, found.learner.algorithm) == ("distral", 50, "impala")
        assert (found.learner.entropy_coefficient, found.learner.env_steps) == (0, 300_000)
    other = load_suite("multi-task-classic", [algorithm]).train_multi_task[pair]
    assert other.learner.entropy_coefficient == 0.01
