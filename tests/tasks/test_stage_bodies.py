"""Stage bodies on a small scale, in this process: what they read, what they refuse, what they leave."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from stillhouse.agents import make_learner
from stillhouse.checkpoint import load_checkpoint, load_state, save_checkpoint, save_state
from stillhouse.datasets.reader import Dataset
from stillhouse.envs.make import EnvironmentConfig, describe
from stillhouse.errors import StillhouseError
from stillhouse.evaluation import rollouts
from stillhouse.networks.multi_task import NetworkSize, NetworkSpec, build_network
from stillhouse.types import environment_spec
from tasks.adopt_teacher import adopt_teacher
from tasks.aggregate import aggregate_students
from tasks.collect_dataset import collect_dataset
from tasks.compare_production import compare_production
from tasks.distill_student import distill_student
from tasks.evaluate import evaluate_environment
from tasks.stage import Interrupted
from tasks.train_multi_task import train_multi_task

SIZE = {"features": 8, "torso": [8]}
CARTPOLE: dict[str, Any] = {"id": "CartPole-v1"}
DQN = {"algorithm": "dqn", "env_steps": 400, "learning_starts": 50, "n_step": 3, "network": SIZE}


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


class Scratch:
    """A stage's saved state: on the disk, as the real one's; asked to stop at the second chance."""

    path = Path("scratch")

    def __init__(self, interrupt: bool) -> None:
        self.interrupt, self.asked = interrupt, 0

    def load(self) -> dict[str, Any] | None:
        return load_state(self.path) if self.path.exists() else None

    def due(self) -> bool:
        self.asked += 1
        return self.interrupt and self.asked == 2

    def save(self, state: dict[str, Any]) -> None:
        save_state(self.path, state)
        raise Interrupted


def context(name: str, deps: list[str], interrupt: bool = False, **blocks: Any) -> Any:
    """What a stage body is given."""

    def block(key: str) -> Any:
        found: Any = {"environments": {"cartpole": CARTPOLE}, **blocks}
        for part in key.split("."):
            found = found[part]
        return found

    return SimpleNamespace(
        name=name,
        stage=f"stage-{name}-s0",
        mode="",
        seed=0,
        random_seed=0,
        device="cpu",
        deps=deps,
        block=block,
        progress=SimpleNamespace(update=lambda *_: None),
        scratch=Scratch(interrupt),
    )


def train(seed: int = 0) -> str:
    """A DQN teacher as `train_teacher` leaves it; its digest."""
    learner = make_learner(DQN, "cartpole", EnvironmentConfig(**CARTPOLE), seed)
    for _ in learner.train():
        pass
    save_state(Path("data/training_state/cartpole-s0"), learner.get_state())
    save_checkpoint(
        Path("data/teachers/cartpole-s0"), learner.network, {"environments": {"cartpole": CARTPOLE}}
    )
    return load_checkpoint(Path("data/teachers/cartpole-s0")).digest


def collect(**settings: Any) -> Dataset:
    block = {"transitions": 600, "from_replay": False, **settings}
    collect_dataset(context("cartpole", [], collect_dataset={"cartpole": block}))
    return Dataset.open(Path("data/datasets/cartpole-s0"))


def distill(interrupt: bool = False, **settings: Any) -> None:
    block = {"method": "offline", "environments": ["cartpole"], "updates": 4, "evaluation_interval": 2}
    block |= {"batch_size": 16, "size": SIZE, **settings}
    from_datasets = block["method"] == "offline" or block.get("from_datasets")
    deps = ["data/datasets/cartpole-s0"] if from_datasets else []
    if block["method"] == "on_policy" or settings.get("feature_weight"):
        deps.append("data/teachers/cartpole-s0")
    blocks = {"distill_student": {"small": block}, "train_teacher": {"cartpole": DQN}}
    distill_student(context("small", deps, interrupt, **blocks))


def join(interrupt: bool = False, algorithm: str = "pqn", **changes: Any) -> None:
    learner = {
        "algorithm": algorithm,
        "env_steps": 384,
        "num_envs": 8,
        "rollout_length": 16,
        "minibatches": 2,
    }
    environments = {"cartpole": CARTPOLE, "acrobot": {"id": "Acrobot-v1", "max_episode_steps": 10}}
    settings = {"environments": ["cartpole", "acrobot"], "reward_scales": {"acrobot": 0.1}, "network": SIZE}
    if changes.get("method") == "distral":  # of one observation space
        environments = {"cartpole": CARTPOLE, "long": {"id": "CartPole-v1", "max_episode_steps": 20}}
        settings |= {"environments": ["cartpole", "long"], "reward_scales": {"long": 0.1}}
    settings |= {"method": "hard_sharing", "learner": learner, **changes}
    blocks = {"train_multi_task": {"all": settings}, "environments": environments}
    train_multi_task(context("all", [], interrupt, **blocks))


ONLINE = {"validation_interval": 100, "validation_episodes": 2, "transitions": 100, "num_envs": 4}
LONG: dict[str, Callable[[bool], None]] = {
    "offline": lambda interrupt: distill(interrupt, updates=8),
    "on_policy": lambda interrupt: distill(
        interrupt, method="on_policy", updates=8, num_envs=10, warmup_steps=4, capacity=1000
    ),
    "online": lambda interrupt: distill(interrupt, method="online", updates=8, **ONLINE),
    "hard_sharing": lambda interrupt: join(interrupt, balancing="pcgrad"),
    "distral": lambda interrupt: join(interrupt, algorithm="impala", method="distral"),
    "soft_sharing": lambda interrupt: join(
        interrupt, method="soft_sharing", network={**SIZE, "separate": True}
    ),
}


@pytest.mark.parametrize("kind", LONG)
def test_an_interrupted_stage_ends_in_the_same_bytes(kind: str) -> None:
    train()
    if kind == "offline":
        collect()
    LONG[kind](False)
    folders = [Path("data/students"), Path("data/multi_task")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    whole = {path: path.read_bytes() for path in files}
    assert len(whole) == (8 if kind == "distral" else 5)
    for path in files:
        path.unlink()
    with pytest.raises(Interrupted):
        LONG[kind](True)
    assert not any(path.exists() for path in files)
    LONG[kind](False)
    assert {path: path.read_bytes() for path in files} == whole


def test_a_joint_network_is_trained_saved_and_judged() -> None:
    names = ["cartpole", "acrobot"]
    join(balancing="fixed", weights={"acrobot": 3.0})
    checkpoint = load_checkpoint(Path("data/multi_task/all-s0"))
    assert set(checkpoint.details["environments"]) == set(names)
    found = json.loads(Path("data/multi_task/all-s0.json").read_text())
    assert min(found["env_steps_each"].values()) >= 384
    assert found["env_steps"] == sum(found["env_steps_each"].values())
    assert set(found["mean_returns"]) == set(names)
    assert found["weights"] == {"acrobot": 0.75, "cartpole": 0.25}
    assert (found["method"], found["algorithm"], found["diverged"]) == ("hard_sharing", "pqn", {})
    head = Path("data/multi_task/all-s0.csv").read_text().splitlines()[0]
    assert head == "env_steps,return_acrobot,return_cartpole,loss,epsilon"
    train()
    judged = judge("data/multi_task/all-s0")
    assert (set(judged["joint"]), judged["students"]) == ({"all"}, {})
    join(algorithm="ppo", method="soft_sharing", network={**SIZE, "separate": True})
    head = Path("data/multi_task/all-s0.csv").read_text().splitlines()[0]
    assert head == "env_steps,return_acrobot,return_cartpole,policy_loss,value_loss,entropy,kl"
    assert set(judge("data/multi_task/all-s0")["joint"]) == {"all"}


@pytest.mark.parametrize("columns", [1, 2])
def test_distrals_task_policies_are_judged_and_its_distilled_one_is_a_student(columns: int) -> None:
    join(algorithm="impala", method="distral", columns=columns, beta=10.0)
    found = json.loads(Path("data/multi_task/all-s0.json").read_text())
    assert (found["method"], found["weights"]) == ("distral", {})
    policies, student = (load_checkpoint(Path(f"data/{kind}/all-s0")) for kind in ("multi_task", "students"))
    assert policies.details == student.details and set(student.details["environments"]) == {
        "cartpole",
        "long",
    }
    assert student.network.spec.size.share_head and not student.network.spec.size.separate
    train()
    deps = ["data/students/all-s0", "data/multi_task/all-s0", "data/teachers/cartpole-s0"]
    evaluate_environment(context("cartpole", deps, evaluate={"episodes": 2}))
    judged = json.loads(Path("data/evaluation/cartpole-s0.json").read_text())
    assert (set(judged["joint"]), set(judged["students"])) == ({"all"}, {"all"})
    assert judged["joint"]["all"]["parameters"] == found["parameters"]


def student(name: str, seed: int, **details: Any) -> None:
    """A student of CartPole as `distill_student` leaves it."""
    network = build_network(
        NetworkSpec(
            size=NetworkSize(features=8, torso=(8,)),
            environments={"cartpole": environment_spec(*describe(EnvironmentConfig(**CARTPOLE)), "cartpole")},
            output="logits",
        ),
        seed,
    )
    save_checkpoint(Path(f"data/students/{name}-s0"), network, {"teachers": {"cartpole": "abc"}, **details})


def average_of(*members: str, **settings: Any) -> dict[str, Any]:
    block = {"members": list(members), **settings}
    aggregate_students(context("soup", [], aggregate={"soup": block}))
    found: dict[str, Any] = json.loads(Path("data/students/soup-s0.json").read_text())
    return found


def test_an_adapted_agent_becomes_the_teacher_that_it_is() -> None:
    student("moved", 3, teachers={})
    Path("data/transfer").mkdir()
    Path("data/students/moved-s0").rename("data/transfer/cartpole-full-start-s0")
    Path("data/transfer/cartpole-full-start-s0.json").write_text(
        json.dumps({"env_steps": 777, "parameters": 1})
    )
    curve = "env_steps,mean_return\n0,20\n777,123.5\n"
    Path("data/transfer/cartpole-full-start-s0.csv").write_text(curve)
    settings = {"algorithm": "fine_tuned", "mode": "full", "source": "start"}
    adopt_teacher(context("cartpole", [], train_teacher={"cartpole": settings}))
    teacher = load_checkpoint(Path("data/teachers/cartpole-s0"))
    moved = load_checkpoint(Path("data/transfer/cartpole-full-start-s0"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(teacher.network.parameters(), moved.network.parameters(), strict=True)
    )
    assert teacher.details["adopted"] == moved.digest
    assert Path("data/teachers/cartpole-s0.csv").read_text() == curve
    found = json.loads(Path("data/teachers/cartpole-s0.json").read_text())
    size = sum(tensor.numel() for tensor in moved.network.parameters())
    assert found == {"env_steps": 777, "mean_return": 123.5, "parameters": size, "algorithm": "fine_tuned"}
    assert collect(allow_weak_teacher=True).schema.teacher == teacher.digest
    distill()
    assert set(judge()["students"]) == {"small"}


def test_students_are_averaged_to_one_that_is_judged_like_any_other() -> None:
    student("a", 1)
    student("b", 2)
    found = average_of("a", "b", method="weighted", weights={"a": 3.0, "b": 1.0})
    assert found["weights"] == {"a": 0.75, "b": 0.25} and found["output"] == "logits"
    soup, first, second = (load_checkpoint(Path(f"data/students/{name}-s0")) for name in ("soup", "a", "b"))
    for name, tensor in soup.network.state_dict().items():
        mean = 0.75 * first.network.state_dict()[name] + 0.25 * second.network.state_dict()[name]
        torch.testing.assert_close(tensor, mean)
    assert soup.details["members"] == {"a": first.digest, "b": second.digest}
    assert soup.details["teachers"] == {"cartpole": "abc"}
    assert soup.details["environments"]["cartpole"]["id"] == "CartPole-v1"
    found = average_of("a", "b", method="greedy_soup", align=True, episodes=2)
    assert set(found["scores"]) == {"a", "b"} and found["taken"]
    train()
    with pytest.raises(StillhouseError, match=r"soup-s0: learnt cartpole from the teacher abc"):
        judge("data/students/soup-s0")
    for name, seed in (("a", 1), ("b", 2)):
        student(name, seed, teachers={})
    average_of("a", "b")
    assert set(judge("data/students/soup-s0")["students"]) == {"soup"}


def test_students_of_different_teachers_are_not_averaged() -> None:
    student("a", 1)
    student("b", 2, teachers={"cartpole": "xyz"})
    with pytest.raises(
        StillhouseError, match=r"^b: learnt cartpole from the teacher xyz, but another member"
    ):
        average_of("a", "b")
    assert not Path("data/students/soup-s0").exists() and not Path("data/students/soup-s0.json").exists()


def judge(network: str = "data/students/small-s0") -> dict[str, Any]:
    deps = [network, "data/teachers/cartpole-s0"]
    evaluate_environment(context("cartpole", deps, evaluate={"episodes": 2}))
    found: dict[str, Any] = json.loads(Path("data/evaluation/cartpole-s0.json").read_text())
    return found


def test_the_size_is_said_before_anything_is_done_and_refused_beyond_the_limit(capsys, monkeypatch) -> None:
    train()
    monkeypatch.setattr(sys.modules["tasks.collect_dataset"], "evaluate", None)  # no episode may be played
    with pytest.raises(StillhouseError, match=r"600 transitions of \d+ bytes.*maximum_bytes"):
        collect(maximum_bytes=1000)
    assert "stage-cartpole-s0: will take 0.0 MiB" in capsys.readouterr().err
    assert not Path("data/datasets/cartpole-s0").exists()


def test_a_dataset_of_the_replay_is_labelled_by_the_final_teacher() -> None:
    digest = train()
    dataset = collect(from_replay=True)
    assert dataset.schema.teacher == digest
    assert dataset.schema.epsilon is None
    assert 300 <= len(dataset) <= 408
    network = load_checkpoint(Path("data/teachers/cartpole-s0")).network
    rows = torch.arange(len(dataset)).numpy()
    with torch.inference_mode():
        outputs = network(torch.from_numpy(dataset.observations(rows)), "cartpole").numpy()
    assert dataset.outputs(rows) == pytest.approx(outputs, abs=1e-5)
    assert json.loads(Path("data/datasets/cartpole-s0.json").read_text())["transitions"] == len(dataset)
    distill()  # it can be learnt from


def test_an_on_policy_student_needs_no_dataset() -> None:
    digest = train()
    distill(method="on_policy", num_envs=10, warmup_steps=4, capacity=1000, updates_per_step=2)
    found = json.loads(Path("data/students/small-s0.json").read_text())
    assert found["env_steps"] == 10 * (4 + 2)
    assert set(found["agreements"]) == {"cartpole"}
    assert load_checkpoint(Path("data/students/small-s0")).details["teachers"] == {"cartpole": digest}
    assert (
        Path("data/students/small-s0.csv").read_text().splitlines()[0]
        == "updates,agreement,loss,agreement_cartpole"
    )
    assert set(judge()["students"]) == {"small"}
    collect()
    distill(method="on_policy", from_datasets=True, num_envs=10, capacity=1000, updates_per_step=2)
    assert json.loads(Path("data/students/small-s0.json").read_text())["env_steps"] == 10 * 2
    distill(method="on_policy", num_envs=2, warmup_steps=4, capacity=1000)  # too few copies to hold one out
    found = json.loads(Path("data/students/small-s0.json").read_text())
    assert (found["agreement"], found["agreements"]) == (None, {})


def test_an_online_student_trains_its_teachers_itself() -> None:
    distill(method="online", validation_interval=200, validation_episodes=2, transitions=100, num_envs=4)
    found = json.loads(Path("data/students/small-s0.json").read_text())
    assert 400 <= found["env_steps"] <= 408
    head, *rows = Path("data/students/small-s0.csv").read_text().splitlines()
    assert head == "env_steps,agreement,loss,agreement_cartpole,teacher_cartpole,student_cartpole"
    assert [int(row.partition(",")[0]) for row in rows][-1] == 400
    assert len(rows) == 2
    train()
    assert set(judge()["students"]) == {"small"}  # it has learnt from other teachers than that one


def test_a_student_is_judged_against_the_teacher_it_learnt_from() -> None:
    train()
    collect()
    distill(feature_weight=0.01)
    found = judge()
    assert set(found["students"]) == {"small"}
    assert found["joint"] == {}
    assert train(seed=1) != Dataset.open(Path("data/datasets/cartpole-s0")).schema.teacher
    with pytest.raises(
        StillhouseError, match=r"small-s0: learnt cartpole from the teacher \w+, but data/teachers/ holds"
    ) as caught:
        judge()
    assert "\n" not in str(caught.value)
    with pytest.raises(
        StillhouseError, match=r"cartpole-s0: played by the teacher \w+, but the checkpoint named is"
    ):
        distill(feature_weight=0.01)


class Endless(gymnasium.Env):
    """Never ends, and pays for action 1."""

    observation_space = gymnasium.spaces.Box(0, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.random(2, np.float32), {}

    def step(self, action):
        return self.np_random.random(2, np.float32), float(action), False, False, {}


def test_a_candidate_is_compared_greedily_and_ended_episodes_are_counted(monkeypatch) -> None:
    gymnasium.register("tests/EndlessProduction-v0", entry_point=Endless)
    monkeypatch.setattr(rollouts, "STEP_CAP", 20)
    environments = {"endless": {"id": "tests/EndlessProduction-v0"}, "cartpole": CARTPOLE}
    for path, favoured in (("data/students/small-s0", 1), ("data/production/students/small", 0)):
        specs = {
            name: environment_spec(*describe(EnvironmentConfig(**config)), name)
            for name, config in environments.items()
        }
        spec = NetworkSpec(size=NetworkSize(**SIZE), environments=specs, output="logits")
        network = build_network(spec, 0)
        with torch.no_grad():
            network.heads["endless"].weight.zero_()
            network.heads["endless"].bias.copy_(torch.eye(2)[favoured])
        save_checkpoint(Path(path), network, {})
    about = {
        "schema_version": 2,
        "generation": 4,
        "suite": "toy",
        "student": "small",
        "seed": 0,
        "params": {},
    }
    about |= {"environments": sorted(environments), "decision": {}}
    Path("data/production/production.json").write_text(json.dumps(about))
    block = {"generation": 5, "episodes": 4, "probability": 0.5, "floor": 0.5}
    compare_production(context("small", [], retraining=block, environments=environments))
    found = json.loads(Path("data/evaluation/promotion.json").read_text())
    assert (found["generation"], found["against"]) == (5, 4)
    for stream in ("promotion", "confirmation"):
        returns, capped = found[stream]["returns"], found[stream]["capped_share"]
        assert returns["candidate"]["endless"] == 20 and returns["production"]["endless"] == 0, "greedily"
        assert all(share == {"cartpole": 0.0, "endless": 1.0} for share in capped.values())
    # Production is worse than random play there, so there is no score.
    assert not found["promote"]
    assert "promotion: endless at none of production, the floor is 0.5" in found["reasons"]
