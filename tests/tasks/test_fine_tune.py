"""The stage `fine_tune`, in this process and on tiny budgets: every way from its inputs to its outs."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from stillhouse.agents import OUTPUTS, make_learner
from stillhouse.checkpoint import load_checkpoint, load_state, save_checkpoint, save_state
from stillhouse.datasets.reader import Dataset
from stillhouse.envs.make import EnvironmentConfig, describe
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import evaluate, network_policy
from stillhouse.networks.multi_task import NetworkSize, NetworkSpec, build_network
from stillhouse.transfer.fine_tuning import Mode
from stillhouse.transfer.initialisation import Correspondence, TensorReport, target_network
from stillhouse.transfer.progressive_networks import ProgressiveNetwork
from stillhouse.types import environment_spec
from tasks.collect_dataset import collect_dataset
from tasks.fine_tune import Transfer, fine_tune
from tasks.params import TransferParams
from tasks.stage import Interrupted

SIZE: dict[str, Any] = {"features": 8, "torso": [6]}
ENVIRONMENTS: dict[str, Any] = {
    "cartpole": {"id": "CartPole-v1", "max_episode_steps": 50},
    "acrobot": {"id": "Acrobot-v1", "max_episode_steps": 20},
    "longer": {"id": "stillhouse/CartPole-v1", "options": {"pole_length": 1.0}, "max_episode_steps": 50},
    "car": {"id": "MountainCar-v0", "max_episode_steps": 20},
}
ROLLOUTS = {"env_steps": 512, "num_envs": 4, "rollout_length": 16, "minibatches": 4}
LEARNERS: dict[str, dict[str, Any]] = {
    "pqn": {"algorithm": "pqn", **ROLLOUTS},
    "ppo": {"algorithm": "ppo", **ROLLOUTS},
    "dqn": {
        "algorithm": "dqn",
        "env_steps": 512,
        "learning_starts": 64,
        "train_every": 64,
        "updates_per_train": 8,
    },
}


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


class Scratch:
    """A stage's saved state; asked to stop at a given chance."""

    def __init__(self, stop: int) -> None:
        self.stop, self.asked = stop, 0

    def load(self) -> dict[str, Any] | None:
        return load_state(Path("scratch")) if Path("scratch").exists() else None

    def due(self) -> bool:
        self.asked += 1
        return self.asked == self.stop

    def save(self, state: dict[str, Any]) -> None:
        save_state(Path("scratch"), state)
        raise Interrupted


def context(mode: str, source: str, block: dict[str, Any], target: str = "longer", stop: int = 0) -> Any:
    """What the stage is given: of the files, all that there are."""
    given = {"sources": ["small.cartpole"], "evaluations": 2, "evaluation_episodes": 3, **block}
    blocks = {
        "environments": ENVIRONMENTS,
        "fine_tune": {target: TransferParams(modes=[cast(Mode, mode)], **given).model_dump(mode="json")},
    }

    def find(key: str) -> Any:
        found: Any = blocks
        for part in key.split("."):
            found = found[part]
        return found

    return SimpleNamespace(
        name=target,
        mode=mode,
        source=source,
        sources=[entry for entry in given["sources"] if source in ("", entry.partition(".")[0])],
        seed=0,
        device="cpu",
        deps=[str(path) for path in Path("data").glob("*/*-s0")],
        block=find,
        progress=SimpleNamespace(update=lambda *_: None),
        scratch=Scratch(stop),
    )


def student(
    output: str, name: str = "small", environments: tuple[str, ...] = ("cartpole", "acrobot")
) -> None:
    specs = {
        each: environment_spec(*describe(EnvironmentConfig(**ENVIRONMENTS[each])), each)
        for each in environments
    }
    spec = NetworkSpec(size=NetworkSize(**SIZE), environments=specs, output=cast(Any, output))
    save_checkpoint(Path(f"data/students/{name}-s0"), build_network(spec, 5), {})


def teachers() -> None:
    """DQN teachers and their datasets."""
    for name in ("cartpole", "acrobot"):
        config = EnvironmentConfig(**ENVIRONMENTS[name])
        learner = make_learner({**LEARNERS["dqn"], "network": SIZE}, name, config, 0)
        list(learner.train())
        details = {"environments": {name: ENVIRONMENTS[name]}}
        save_checkpoint(Path(f"data/teachers/{name}-s0"), learner.network, details)
        block = {"transitions": 300, "from_replay": False}
        given = SimpleNamespace(
            name=name,
            stage=f"collect_dataset-{name}-s0",
            seed=0,
            random_seed=0,
            device="cpu",
            deps=[],
            block=lambda key, block=block, name=name: (
                block if key.startswith("collect") else ENVIRONMENTS[name]
            ),
            progress=SimpleNamespace(update=lambda *_: None),
            scratch=Scratch(0),
        )
        collect_dataset(cast(Any, given))


def result(stem: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"data/transfer/longer-{stem}-s0.json").read_text())
    return found


def curve(stem: str) -> list[tuple[int, float]]:
    rows = csv.DictReader(Path(f"data/transfer/longer-{stem}-s0.csv").read_text().splitlines())
    return [(int(row["env_steps"]), float(row["mean_return"])) for row in rows]


WAYS = [
    ("pqn", "discriminative"),
    ("pqn", "features"),
    ("pqn", "full"),
    ("pqn", "gradual"),
    ("pqn", "head_only"),
    ("pqn", "l2_sp"),
    ("pqn", "progressive_2"),
    ("pqn", "rehearsal"),
    ("dqn", "full"),
    ("dqn", "rehearsal"),
    ("dqn", "progressive_2"),
    ("ppo", "full"),
    ("ppo", "kickstart"),
    ("ppo", "progressive_2"),
    ("ppo", "rehearsal"),
]
ALONE = [
    ("pqn", "auto"),
    ("pqn", "progressive_3"),
    ("pqn", "progressive_random"),
    ("pqn", "scratch"),
    ("ppo", "auto"),
]


@pytest.mark.parametrize(
    ("algorithm", "mode", "logits"),
    [
        (algorithm, mode, logits)
        for algorithm, mode in WAYS + ALONE
        for logits in (False, True)
        if not (logits and algorithm == "dqn")  # as with pqn
    ],
)
def test_every_way_leaves_its_outs_and_an_interrupted_one_the_same(
    algorithm: str, mode: str, logits: bool
) -> None:
    teachers()
    student("logits" if logits else "q_values")
    block = {"sources": ["small.cartpole", "cartpole"], "learner": LEARNERS[algorithm], "probe_fraction": 0.2}
    if mode.startswith("progressive"):
        block["sensitivity_episodes"] = 2
    source = "small" if (algorithm, mode) in WAYS else ""
    stem = f"{mode}-{source}" if source else mode
    fine_tune(context(mode, source, block))
    found, points = result(stem), curve(stem)
    assert points[0][0] == 0 and points[-1][0] >= 512
    assert all(after > before for (before, _), (after, _) in itertools.pairwise(points))
    assert points[0][1] == pytest.approx(found["initial_return"], rel=1e-5)
    assert ("choice" in found) == (mode == "auto")
    assert ("sensitivity" in found) == mode.startswith("progressive")
    moving = (algorithm, mode) in WAYS and mode not in ("features", "kickstart", "progressive_2")
    if mode != "auto":
        assert (found["retention"] is not None) == moving
    head = "heads.longer.weight"
    if moving:
        assert set(found["retention"]) == {"cartpole", "acrobot"}
        taken = OUTPUTS[algorithm] == ("logits" if logits else "q_values")
        assert (head in found["tensors"]["copied"]) == taken
        # A value-based learner fits its head to Q-values where the student's outputs are logits.
        assert (found["head_variance_explained"] is not None) == (logits and algorithm != "ppo")
    network = load_checkpoint(Path(f"data/transfer/longer-{stem}-s0")).network
    assert isinstance(network, ProgressiveNetwork) == (mode.startswith("progressive") or mode == "features")
    config = EnvironmentConfig(**ENVIRONMENTS["longer"])
    returns = evaluate(network_policy(network, "longer"), config, 3, 0).returns
    assert returns.tolist() == found["test"]["returns"]

    written = {path: path.read_bytes() for path in Path("data/transfer").rglob("*") if path.is_file()}
    assert len(written) == 5
    for path in written:
        path.unlink()
    with pytest.raises(Interrupted):
        fine_tune(context(mode, source, block, stop=4))
    fine_tune(context(mode, source, block))
    assert {path: path.read_bytes() for path in written} == written


@pytest.mark.parametrize("algorithm", ["ppo", "pqn"])
def test_of_other_observations_the_torso_alone_is_taken(algorithm: str) -> None:
    """CartPole's four entries and two actions to MountainCar's two and three."""
    student("logits" if algorithm == "ppo" else "q_values")
    fine_tune(context("full", "small", {"learner": LEARNERS[algorithm]}, "car"))
    found = json.loads(Path("data/transfer/car-full-small-s0.json").read_text())
    assert {key.partition(".")[0] for key in found["tensors"]["copied"]} == {"torso"}
    assert {key.partition(".")[0] for key in found["tensors"]["new"]} == {"adapters", "heads"}
    run = Transfer(context("full", "small", {"learner": LEARNERS[algorithm]}, "car")).run(
        "full", "small.cartpole"
    )
    settings: Any = run.learner.config  # type: ignore[attr-defined]
    if algorithm == "ppo":  # nothing is known: no critic to wait for, no policy to keep
        assert settings.critic_warmup == 0 and run.learner.guide is None  # type: ignore[attr-defined]
    else:
        assert settings.epsilon_start == 1


def prepared(mode: str, block: dict[str, Any], output: str = "logits", budget: int = 0) -> Any:
    student(output)
    return Transfer(context(mode, "small", block)).run(cast(Mode, mode), "small.cartpole", budget)


def test_what_is_frozen_by_name_is_what_was_taken() -> None:
    block = {"learner": LEARNERS["ppo"], "freeze": ["heads.source-*", "torso.*"]}
    run = prepared("full", block)
    held = run.schedule.frozen(0.9)
    assert "torso.dense.0.weight" in held and "heads.source-acrobot.bias" in held
    # A network from scratch learns whole, and has no such heads.
    assert prepared("scratch", block).schedule.frozen(0.0) == []
    with pytest.raises(StillhouseError, match=r"freeze: 'torsi\.\*' matches no tensor"):
        prepared("full", {**block, "freeze": ["torsi.*"]})


def test_a_guide_decays_over_a_share_of_the_runs_own_budget() -> None:
    block = {"learner": LEARNERS["ppo"], "guide_fraction": 0.5, "guide_weight": 2.0}
    for budget, half in ((0, 128), (256, 64)):
        guide = prepared("full", block, budget=budget).learner.guide
        assert (guide.weight(0), guide.weight(half), guide.weight(2 * half)) == (2, 1, 0)


class Shuffled:
    """A dataset of CartPole's spaces."""

    def __init__(self, weights: np.ndarray) -> None:
        self.all = np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32)
        self.q_values = (self.all @ weights).astype(np.float32)
        spec = environment_spec(*describe(EnvironmentConfig(**ENVIRONMENTS["cartpole"])), "")
        self.schema = SimpleNamespace(environment=spec, output="q_values")

    def __len__(self) -> int:
        return 400

    def observations(self, rows: np.ndarray) -> np.ndarray:
        return self.all[rows]

    def outputs(self, rows: np.ndarray) -> np.ndarray:
        return self.q_values[rows]


def test_a_q_head_is_fitted_in_the_targets_order(monkeypatch: pytest.MonkeyPatch) -> None:
    student("logits")
    Path("data/datasets/cartpole-s0").mkdir(parents=True)
    dataset = Shuffled(np.random.default_rng(1).normal(size=(4, 2)))
    monkeypatch.setattr(Transfer, "dataset", lambda *_: cast(Dataset, dataset))

    def outputs(order: str, turned: str) -> tuple[np.ndarray, float]:
        block = {
            "learner": LEARNERS["pqn"],
            "components": {str(i): each for i, each in enumerate(order)},
            "actions": {str(i): each for i, each in enumerate(turned)},
        }
        transfer = Transfer(context("full", "small", block))
        source = transfer.source("small.cartpole")
        correspondence = transfer.corresponding(source)
        network, tensors = target_network(source, "longer", transfer.spec, 0, "q_values", correspondence)
        explained = transfer._fit_head(network, source, correspondence, tensors)
        assert explained is not None
        seen = torch.from_numpy(dataset.all[:, [int(each) for each in order]])
        return network(seen, "longer").detach().numpy(), explained

    plain, explained = outputs("0123", "01")
    assert explained > 0.3
    turned, same = outputs("2031", "10")
    assert same == pytest.approx(explained, abs=1e-4)
    np.testing.assert_allclose(turned[:, [1, 0]], plain, atol=1e-3)


def test_a_q_head_is_not_fitted_where_something_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    student("logits")
    Path("data/datasets/cartpole-s0").mkdir(parents=True)
    monkeypatch.setattr(Transfer, "dataset", lambda *_: Shuffled(np.ones((4, 2))))
    transfer = Transfer(context("full", "small", {"learner": LEARNERS["pqn"]}))
    source = transfer.source("small.cartpole")
    report = TensorReport(new=["heads.longer.weight"])
    partly = Correspondence((0, 1, 2, -1), (0, 1))
    network, _ = target_network(source, "longer", transfer.spec, 0, "q_values", partly)
    assert transfer._fit_head(network, source, partly, report) is None
    assert transfer._fit_head(network, source, Correspondence((0, 1, 2, 3), (0, 1)), report) is not None


@pytest.mark.parametrize(("algorithm", "logits"), [("pqn", True), ("pqn", False), ("ppo", False)])
def test_what_is_rehearsed_is_what_the_source_gives(algorithm: str, logits: bool) -> None:
    teachers()
    block = {"learner": LEARNERS[algorithm]}
    rehearsal = prepared("rehearsal", block, "logits" if logits else "q_values").rehearsal
    # The learner's own outputs may be of the other kind.
    assert all((tau == 1) == logits for tau in rehearsal._temperatures.values())


def test_rehearsal_needs_what_the_source_acts_with() -> None:
    teachers()
    with pytest.raises(
        StillhouseError, match=r"fine_tune.longer.take: leaves out torso.dense.0.bias, without"
    ):
        prepared("rehearsal", {"learner": LEARNERS["pqn"], "take": ["adapters.*", "heads.*"]}, "q_values")


def test_rehearsal_needs_a_way_that_is_left() -> None:
    student("logits", environments=("cartpole",))
    block = {"learner": LEARNERS["ppo"], "components": {"0": "0"}}
    with pytest.raises(
        StillhouseError, match="fine_tune.longer.components: the source's adapter is taken in part"
    ):
        Transfer(context("rehearsal", "small", block)).run("rehearsal", "small.cartpole")
