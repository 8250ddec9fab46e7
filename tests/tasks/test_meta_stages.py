"""The stages of meta-learning end to end with budgets of seconds: outs, resume, and what the report makes of them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.checkpoint import load_checkpoint, load_state
from stillhouse.errors import StillhouseError
from stillhouse.meta import METHODS, Adaptation
from stillhouse.types import Report
from tasks import meta_train as training
from tasks.meta_evaluate import meta_evaluate
from tasks.meta_train import meta_train
from tasks.params import check_environments, load_suite
from tasks.plan import stages_of
from tasks.report_page import render
from tasks.results import Results, metrics, summarise
from tasks.stage import Interrupted, lookup

SMALL: dict[str, dict[str, Any]] = {
    "maml": {"method": "maml", "meta_updates": 4, "meta_batch": 2},
    "navigation": {
        "method": "maml_rl",
        "meta_updates": 2,
        "tasks": 2,
        "rollouts": 2,
        "hidden": [4],
        "family": {"name": "navigation", "horizon": 5},
    },
    "initial": {
        "method": "maml_rl",
        "meta_updates": 1,
        "tasks": 2,
        "rollouts": 2,
        "hidden": [4],
        "family": {"name": "cartpole", "horizon": 5},
    },
    "bandits": {"method": "rl2", "updates": 2, "trials": 8, "minibatches": 2, "width": 4},
}


class Scratch:
    """Asks to be saved after the first report, and stops there if it is told to."""

    def __init__(self, interrupt: bool, kept: dict[str, Any]) -> None:
        self._interrupt, self._kept = interrupt, kept

    def load(self) -> dict[str, Any] | None:
        return self._kept or None

    def due(self) -> bool:
        return self._interrupt

    def save(self, state: dict[str, Any]) -> None:
        self._kept.update(state)
        raise Interrupted


class Context:
    """A stage's context without DVC."""

    def __init__(self, name: str, blocks: dict[str, Any], scratch: Scratch) -> None:
        self.name, self.seed, self.device, self.scratch = name, 0, "cpu", scratch
        self._blocks = blocks
        self.progress = self

    def block(self, key: str) -> Any:
        return lookup(self._blocks, key)

    def update(self, *_: object) -> None:
        pass


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, bytes]]:
    monkeypatch.chdir(tmp_path)

    def run(name: str, interrupt: bool = False) -> dict[str, bytes]:
        blocks = {"meta_train": {name: SMALL[name]}, "meta_evaluate": {"tasks": 3, "steps": 2}}
        kept: dict[str, Any] = {}
        if interrupt:
            with pytest.raises(Interrupted):
                meta_train(Context(name, blocks, Scratch(True, kept)))  # type: ignore[arg-type]
            assert kept
        meta_train(Context(name, blocks, Scratch(False, kept)))  # type: ignore[arg-type]
        meta_evaluate(Context(name, blocks, Scratch(False, {})))  # type: ignore[arg-type]
        paths = sorted(path for path in Path("data").rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in paths}

    return run


@pytest.mark.parametrize("name", ["navigation", "bandits"])
def test_an_interrupted_stage_ends_in_the_same_bytes(name: str, run: Callable[..., dict[str, bytes]]) -> None:
    whole = run(name)
    assert {Path(path).name for path in whole} >= {f"{name}-s0.json", f"{name}-s0.csv", "manifest.json"}
    assert run(name, interrupt=True) == whole


def test_a_method_and_its_baselines_are_judged_after_every_step(run: Callable[..., dict[str, bytes]]) -> None:
    run("maml")
    found = json.loads(Path("data/adaptation/maml-s0.json").read_text())
    assert found["steps"] == [0, 1, 2] and found["tasks"] == 3 and found["measure"] == "mse"
    assert found["unseen"]
    assert set(found["means"]) == {"maml", "untrained"}
    head, *rows = csv.reader(Path("data/adaptation/maml-s0.csv").read_text().splitlines())
    assert head == ["steps", "maml", "untrained"] and [row[0] for row in rows] == ["0", "1", "2"]
    assert float(rows[1][1]) == pytest.approx(found["means"]["maml"][1], rel=1e-5)
    assert load_state(Path("data/meta/maml-s0"))


def test_an_initial_policy_is_a_student_and_a_source_of_transfer(
    run: Callable[..., dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("initial")
    network = load_checkpoint(Path("data/students/initial-s0")).network
    assert list(network.spec.environments) == ["cartpole"] and network.spec.output == "logits"
    monkeypatch.chdir(Path(__file__).parents[2])
    suite = (
        "seeds: [0]\nenvironments:\n  cartpole: {id: CartPole-v1}\n  long: {id: stillhouse/CartPole-v1, options: {pole_length: 1.5}}\n"
        "meta_train:\n  initial: {method: maml_rl, family: {name: cartpole}}\n"
        "fine_tune:\n  long: {sources: [SOURCE], modes: [full, scratch], learner: {algorithm: ppo, env_steps: 1000}}\n"
    )
    monkeypatch.setattr("tasks.params.SUITES", tmp_path)
    path = tmp_path / "start.yaml"
    path.write_text(suite.replace("SOURCE", "initial.cartpole"))
    params = load_suite("start", [])
    check_environments(params)
    stages = {stage.name: stage for stage in stages_of(params)}
    assert stages["meta_train-initial-s0"].outs == ["data/meta/initial-s0", "data/students/initial-s0"]
    moved = stages["fine_tune-long-full-initial-s0"]
    assert "data/students/initial-s0" in moved.deps and "environments.cartpole" in moved.params
    path.write_text(
        suite.replace("SOURCE", "initial.cartpole").replace("  cartpole: {id: CartPole-v1}\n", "")
    )
    with pytest.raises(
        StillhouseError, match="fine_tune.long.sources names 'cartpole', which is no environment"
    ):
        load_suite("start", [])
    path.write_text(suite.replace("SOURCE", "initial").replace("name: cartpole", "name: navigation"))
    with pytest.raises(StillhouseError, match="fine_tune.long.sources names 'initial', which is no student"):
        load_suite("start", [])


META = (
    "seeds: [0]\nenvironments:\n  cartpole: {id: CartPole-v1}\n  long: {id: stillhouse/CartPole-v1, options: {pole_length: 1.5}}\n"
    "meta_train:\n  m: {method: maml_rl, meta_updates: 77, family: {name: cartpole}}\n"
)
MOVED = "fine_tune:\n  long: {sources: [m.cartpole], modes: [WAY], learner: {algorithm: LEARNER, env_steps: 1000}}\n"


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (META + MOVED.replace("WAY", "full").replace("LEARNER", "pqn"), [], "full reads a dataset of 'cartpole'"),
        (META + MOVED.replace("WAY", "rehearsal").replace("LEARNER", "ppo"), [], "rehearsal reads a dataset of"),
        (META.replace("name: cartpole", "name: cartpole, ranges: {mass: [1, 2]}"), [], "meta_train.m.family.ranges: cartpole has no 'mass'"),
        (
            "seeds: [0]\nmeta_train:\n  m: {method: hypernetwork, family: {ranges: {mass: [1, 2]}}}\n",
            [],
            "meta_train.m.family.ranges: cartpole has no 'mass'",
        ),
        (META, ["meta_train.m.method=distral"], "meta_train.m: Input tag 'distral'"),
        (META, ["meta_train.m.method=[maml]"], "meta_train.m: Input tag"),
        (
            META.replace("CartPole-v1}", "MinAtar/Breakout-v0}", 1) + MOVED.replace("WAY", "full").replace("LEARNER", "ppo"),
            [],
            "MinAtar/Breakout-v0 was given, but meta_train.m learns a policy of that name",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_any_work(
    text: str, overrides: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.params.SUITES", tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(StillhouseError, match=re.escape(said)):
        check_environments(load_suite("mine", overrides))


def test_another_method_keeps_the_budget_and_a_family_that_both_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.params.SUITES", tmp_path)
    (tmp_path / "mine.yaml").write_text(
        META + "  b: {method: rl2, gamma: 0.9, family: {family: bandits, arms: 3}}\n"
    )
    found: Any = load_suite("mine", ["meta_train.m.method=reptile_rl"]).meta_train["m"]
    assert (found.method, found.meta_updates, found.family.name) == ("reptile_rl", 77, "cartpole")
    found = load_suite("mine", ["meta_train.b.method=maml"]).meta_train["b"]
    assert found.method == "maml"
    found = load_suite("mine", ["meta_train.b.family.family=tabular"]).meta_train["b"]
    assert found.family.family == "tabular" and found.gamma == 0.9
    monkeypatch.undo()
    with pytest.raises(StillhouseError, match="distill_student.small"):
        load_suite("quickstart", ["distill_student.method=distral"])


@pytest.mark.parametrize("split", [False, True])
def test_a_family_of_two_is_judged_on_both_and_says_whether_they_are_unseen(
    split: bool, run: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Family:
        name = "two"
        splits = split

        def members(self, split: str) -> int:
            return 2

    class Two:
        columns = {"loss/query": "loss"}
        family = Family()

        def train(self) -> Iterator[Report]:
            yield Report(1, 1, {"loss/query": 1.0})

        def learnt(self) -> dict[str, Any]:
            return {"weight": 1.0}

        def load(self, learnt: dict[str, Any]) -> None:
            pass

        def evaluate(self, tasks: int, steps: int, seed: int) -> Adaptation:
            return Adaptation("return", "updates", [0], np.zeros((tasks, 1)))

    for module in ("tasks.meta_train", "tasks.meta_evaluate"):
        monkeypatch.setattr(f"{module}.make_meta_learner", lambda *_: Two())
    run("maml")
    found = json.loads(Path("data/adaptation/maml-s0.json").read_text())
    assert found["tasks"] == 2 and found["unseen"] == split


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_its_meta_learner_from_a_block(method: str) -> None:
    learner = training.make_meta_learner({"method": method}, "meta_train.m", 0, "cpu")
    assert type(learner).__name__ == METHODS[method][0] and learner.columns


def test_what_is_not_finite_is_not_kept(
    run: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Blown:
        columns = {"loss/query": "loss"}

        def train(self) -> Iterator[Report]:
            yield Report(1, 1, {"loss/query": 1.0})

        def learnt(self) -> dict[str, Any]:
            return {"weights": {"dense": np.array([1.0, np.inf])}}

    monkeypatch.setattr("tasks.meta_train.make_meta_learner", lambda *_: Blown())
    with pytest.raises(StillhouseError, match=r"^meta_train.maml: what was learnt is no longer finite"):
        run("maml")
    assert not Path("data/meta").exists()


def test_what_diverges_has_no_number(
    run: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Diverging:
        columns = {"loss/query": "loss"}

        def train(self) -> Iterator[Report]:
            yield Report(1, 1, {"loss/query": 1.0})

        def learnt(self) -> dict[str, Any]:
            return {"weight": 1.0}

        def load(self, learnt: dict[str, Any]) -> None:
            assert learnt == {"weight": 1.0}

        def evaluate(self, tasks: int, steps: int, seed: int) -> Adaptation:
            return Adaptation("mse", "updates", [0, 1], np.array([[1.0, np.inf], [3.0, 2.0]]))

    for module in ("tasks.meta_train", "tasks.meta_evaluate"):
        monkeypatch.setattr(f"{module}.make_meta_learner", lambda *_: Diverging())
    run("maml")
    found = json.loads(Path("data/adaptation/maml-s0.json").read_text())
    assert found["means"] == {"maml": [2.0, None]}
    assert Path("data/adaptation/maml-s0.csv").read_text() == "steps,maml\n0,2\n1,\n"


def test_a_bad_setting_is_one_line() -> None:
    with pytest.raises(StillhouseError, match=r"meta_train.maml.inner_rate: .* but -1 was given"):
        training.make_meta_learner({"method": "maml", "inner_rate": -1}, "meta_train.maml", 0, "cpu")


def test_the_plan_has_both_stages_and_reads_the_family_of_environments() -> None:
    stages = {stage.name: stage for stage in stages_of(load_suite("meta-learning", []))}
    train, judge = stages["meta_train-navigation-s0"], stages["meta_evaluate-navigation-s1"]
    assert train.deps == ["data/code/meta_train-maml_rl-navigation.json"]
    assert train.outs == ["data/meta/navigation-s0"] and train.params == ["meta_train.navigation"]
    assert "data/meta/navigation-s1" in judge.deps and "meta_evaluate" in judge.params
    assert "data/adaptation/navigation-s1.json" in stages["report"].deps
    assert stages["meta_train-bandits-s0"].deps == ["data/code/meta_train-rl2.json"]
    halved = load_suite("meta-learning", ["budget=0.5"])
    assert halved.meta_train["sinusoid"].meta_updates == 5000  # type: ignore[union-attr]
    assert halved.meta_train["bandits"].updates == 50  # type: ignore[union-attr]
    with pytest.raises(StillhouseError, match="at least one teacher"):
        load_suite("meta-learning", ["meta_train={}"])


def test_the_report_shows_the_method_first_and_the_mean_over_seeds() -> None:
    run = {
        "curve": {},
        "adaptation": {
            "measure": "mse",
            "unit": "updates",
            "tasks": 3,
            "unseen": True,
            "steps": [0, 1],
            "means": {"a_baseline": [5.0], "maml": [4.0, 1.0]},
        },
    }
    other = {**run, "adaptation": {**run["adaptation"], "means": {"a_baseline": [7.0], "maml": [4.0, None]}}}
    results = Results(
        title="t", suite="s", seeds=[0, 1], ids={}, teachers={}, datasets={}, students={}, joint={}, evaluations={},
        transfer={}, meta={"sinusoid": {0: run, 1: other}}, settings={"meta_train": {"sinusoid": {"method": "maml"}}},
        environment={}, inputs={},
    )  # fmt: skip
    summary = summarise(results)
    assert list(summary.meta["sinusoid"].arms) == ["maml", "a_baseline"]
    found = metrics(results, summary)["meta"]["sinusoid"]["arms"]
    assert found["maml"]["after_0"]["value"] == 4.0 and found["maml"]["after_1"] is None
    assert found["a_baseline"]["after_1"] == {"value": 6.0, "s0": 5.0, "s1": 7.0}
    page = render(results, summary)
    assert "Learning to learn" in page and "3 unseen tasks for each seed" in page and "6.00" in page
    assert "0 updates" in page and "1 update<" in page
    for each in (run, other):
        each["adaptation"]["unseen"] = False  # type: ignore[index]
    page = render(results, summarise(results))
    assert "training saw them too, for each seed" in page and "unseen" not in page
