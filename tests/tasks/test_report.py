"""The report: its numbers, and the page as a reader's browser gets it."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import report_fixture
from ruamel.yaml import YAML

from stillhouse.errors import StillhouseError
from tasks.charts import apart, chart, number, short, ticks
from tasks.report import comparison, gather, learning_curves
from tasks.report_page import render
from tasks.results import Results, experience, interference, metrics, summarise

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return gather(report_fixture.write(tmp_path, seeds=2), tmp_path)


def edit(root: Path, name: str, **changes: Any) -> None:
    content = json.loads((root / name).read_text())
    (root / name).write_text(json.dumps({**content, **changes}))


def table_text(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


class Checker(HTMLParser):
    """Collects what does not close, and every address."""

    void = frozenset({"meta", "br", "path", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.errors: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"{tag} at {self.getpos()}")


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_the_page_is_well_formed_and_needs_no_network(tmp_path: Path, seeds: int) -> None:
    results = gather(report_fixture.write(tmp_path, seeds), tmp_path)
    page = render(results, summarise(results))
    checker = Checker()
    checker.feed(page)
    assert checker.errors == []
    assert checker.open == []
    assert not re.search(r"https?:|<script|<link|src=|url\(|@import|nan|NaN|inf\b", page)
    assert "Infinity" not in page


def test_the_same_results_give_the_same_bytes_and_show_no_folder(tmp_path: Path) -> None:
    found = []
    for folder in ("one", "two"):
        root = tmp_path / folder
        results = gather(report_fixture.write(root, 2), root)
        summary = summarise(results)
        found.append((render(results, summary), learning_curves(results), comparison(summary)))
    assert found[0] == found[1]
    assert str(tmp_path) not in found[0][0]
    assert found[0][1].startswith(b"\x89PNG")
    assert b"Software" not in found[0][1]


def test_the_users_settings_do_not_change_the_picture(results: Results) -> None:
    plain = learning_curves(results)
    with matplotlib.rc_context({"savefig.dpi": 30, "lines.linewidth": 9, "font.size": 20}):
        assert learning_curves(results) == plain


def test_every_file_the_stages_wrote_is_read_and_hashed(tmp_path: Path, results: Results) -> None:
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert set(results.inputs) == written
    page = render(results, summarise(results))
    for path, digest in results.inputs.items():
        assert path in page
        assert digest[:16] in page


def test_scores_are_normalised(tmp_path: Path) -> None:
    blocks = report_fixture.write(tmp_path, 2)
    for seed, student in ((0, -101.0), (1, -80.0)):
        name = f"data/evaluation/acrobot-s{seed}.json"
        content = json.loads((tmp_path / name).read_text())
        content["random"]["mean"], content["teacher"]["greedy"]["mean"] = -500.0, -80.0
        content["students"]["small"]["greedy"]["mean"] = student
        (tmp_path / name).write_text(json.dumps(content))
    results = gather(blocks, tmp_path)
    summary = summarise(results)
    row = summary.students["small"].rows[0]
    assert row.score is not None
    assert row.score.points == (pytest.approx(0.95), pytest.approx(1.0))
    numbers = metrics(results, summary)["students"]["small"]
    assert numbers["environments"]["acrobot"]["normalised_score"] == {"value": 0.975, "s0": 0.95, "s1": 1.0}
    assert "0.95 · 1.00" in render(results, summary)
    (shown,) = [
        row for row in csv.DictReader(io.StringIO(comparison(summary))) if row["environment"] == "acrobot"
    ]
    assert float(shown["normalised_score"]) == 0.975


def test_sizes(results: Results) -> None:
    student = summarise(results).students["small"]
    assert student.teacher_parameters == 18_435 + 131_843 + 17_666
    assert student.compression == pytest.approx(167_944 / 11_198)


def test_points_below_five_seeds_and_intervals_from_five(tmp_path: Path) -> None:
    shown = {}
    for seeds in (4, 5):
        root = tmp_path / str(seeds)
        results = gather(report_fixture.write(root, seeds), root)
        shown[seeds] = (
            summarise(results),
            render(results, summarise(results)),
            metrics(results, summarise(results)),
        )
    for seeds, (summary, page, numbers) in shown.items():
        overall = summary.students["small"].overall.geometric_mean
        assert overall is not None
        assert (overall.interval is None) == (seeds < 5)
        assert ("95 % interval" in page) == (seeds == 5)
        assert ("interquartile mean" in page) == (seeds == 5)
        keys = {"value", "s0", "s1", "s2", "s3"} if seeds < 5 else {"value", "low", "high"}
        assert set(numbers["students"]["small"]["geometric_mean"]) == keys


def test_the_worst_environment_is_named(results: Results) -> None:
    summary = summarise(results)
    worst = summary.students["small"].overall.worst
    assert worst == "breakout"
    assert metrics(results, summary)["students"]["small"]["worst_environment"] == worst
    assert re.search(r"worst environment</p><p class=\"note\">breakout", render(results, summary))


def test_a_teacher_no_better_than_random_is_said_and_not_averaged(tmp_path: Path) -> None:
    blocks = report_fixture.write(tmp_path, 2)
    content = json.loads((tmp_path / "data/evaluation/breakout-s1.json").read_text())
    content["teacher"]["greedy"]["mean"] = content["random"]["mean"]
    (tmp_path / "data/evaluation/breakout-s1.json").write_text(json.dumps(content))
    results = gather(blocks, tmp_path)
    summary = summarise(results)
    assert summary.students["small"].overall.undefined == ("breakout",)
    page = render(results, summary)
    assert "no better than random play" in page
    assert "on the 2 of 3 environments where they gained" in page
    assert "cartpole; breakout has no score" in page
    assert "undefined" in page
    assert (
        metrics(results, summary)["students"]["small"]["environments"]["breakout"]["normalised_score"] is None
    )
    assert comparison(summary).splitlines()[2].endswith(",")


def test_capped_episodes_are_said(tmp_path: Path) -> None:
    blocks = report_fixture.write(tmp_path, 1)
    content = json.loads((tmp_path / "data/evaluation/breakout-s0.json").read_text())
    content["students"]["small"]["greedy"]["capped_share"] = 0.25
    (tmp_path / "data/evaluation/breakout-s0.json").write_text(json.dumps(content))
    results = gather(blocks, tmp_path)
    assert "25.0 % of the student’s episodes were ended by the cap" in table_text(
        render(results, summarise(results))
    )


def test_transfer_numbers(tmp_path: Path) -> None:
    blocks = report_fixture.write(tmp_path, 1)
    heights = {"full-small": (10.0, 30.0), "gradual-small": (10.0, 10.0), "scratch": (0.0, 20.0)}
    for way, (start, end) in heights.items():
        stem = f"data/transfer/cartpole-long-{way}-s0"
        (tmp_path / f"{stem}.csv").write_text(f"env_steps,mean_return\n0,{start}\n100,{end}\n")
        edit(tmp_path, f"{stem}.json", initial_return=start, final_return=end, random_return=0.0)
    results = gather(blocks, tmp_path)
    summary = summarise(results)
    full, gradual, scratch = summary.transfer["cartpole-long"]
    assert (full.mode, gradual.mode, scratch.mode) == tuple(heights)
    assert full.jumpstart is not None
    assert full.score is not None
    assert (full.jumpstart.value, full.area.value, full.score.value, full.score_kind) == (10, 20, 2, "ratio")
    assert full.steps_to_scratch == [50]
    assert gradual.steps_to_scratch == [math.inf]
    numbers = metrics(results, summary)["transfer"]["cartpole-long"]
    assert full.retention is not None and scratch.retention is None
    assert full.retention.value == pytest.approx(
        0.75
    )  # half in one of the source's environments, all in the other
    assert numbers["full-small"]["env_steps_to_scratch"] == {"s0": 50}
    assert numbers["gradual-small"]["env_steps_to_scratch"] == {"s0": None}
    assert "never" in render(results, summary)


def test_retention_is_told_where_every_seed_has_it(tmp_path: Path) -> None:
    blocks = report_fixture.write(tmp_path, 2)
    # `auto` may choose a source with one seed and scratch, which has nothing to forget, with another.
    edit(tmp_path, "data/transfer/cartpole-long-full-small-s1.json", retention=None)
    results = gather(blocks, tmp_path)
    full, gradual, _ = summarise(results).transfer["cartpole-long"]
    assert full.retention is None
    assert gradual.retention is not None and gradual.retention.points == (0.75, 0.75)
    json.dumps(metrics(results, summarise(results)), allow_nan=False)


def test_areas_are_subtracted_for_all_seeds_where_one_scratch_stays_at_random(tmp_path: Path) -> None:
    blocks = report_fixture.write(tmp_path, 2)
    for seed, scratch in ((0, 0.0), (1, 10.0)):
        for way, height in (("full-small", 20.0), ("scratch", scratch)):
            stem = f"data/transfer/cartpole-long-{way}-s{seed}"
            (tmp_path / f"{stem}.csv").write_text(f"env_steps,mean_return\n0,{height}\n100,{height}\n")
            edit(tmp_path, f"{stem}.json", random_return=0.0)
    results = gather(blocks, tmp_path)
    summary = summarise(results)
    full = summary.transfer["cartpole-long"][0]
    assert full.score is not None
    assert (full.score_kind, full.score.points) == ("difference", (20, 10))
    assert "Area difference" in render(results, summary)


def test_the_tensor_report_stands_in_the_page(results: Results) -> None:
    text = table_text(render(results, summarise(results)))
    assert "Tensors, full-small: 2 copied · 3 new" in text
    assert "adapters.planes_10x10x6.first.convolution.weight" in text


def test_metrics_are_finite_json(results: Results) -> None:
    json.dumps(metrics(results, summarise(results)), allow_nan=False)


def test_names_from_the_parameters_are_escaped(results: Results) -> None:
    hostile = replace(
        results, title="<script>alert(1)</script>", ids={k: f"{v}<b>" for k, v in results.ids.items()}
    )
    page = render(hostile, summarise(hostile))
    assert "<script" not in page
    assert "CartPole-v1<b>" not in page


def test_a_suite_without_students_or_without_scratch(tmp_path: Path) -> None:
    blocks = report_fixture.write(tmp_path, 2)
    blocks["fine_tune"]["cartpole-long"]["modes"] = ["full"]
    results = gather(blocks, tmp_path)
    summary = summarise(results)
    assert summary.transfer["cartpole-long"][0].jumpstart is None
    assert render(results, summary)
    json.dumps(metrics(results, summary), allow_nan=False)

    blocks["distill_student"], blocks["fine_tune"] = {}, {}
    results = gather(blocks, tmp_path)
    page = render(results, summarise(results))
    assert "Teachers, before any student" in page
    assert 'id="transfer"' not in page


def test_of_several_students_the_headline_says_that_it_shows_the_best(tmp_path: Path) -> None:
    blocks = report_fixture.write(tmp_path, 2)
    blocks["distill_student"]["tiny"] = {"method": "offline", "environments": ["cartpole"], "loss": "mse"}
    for seed in (0, 1):
        for suffix in (".json", ".csv"):
            text = (tmp_path / f"data/students/small-s{seed}{suffix}").read_text()
            (tmp_path / f"data/students/tiny-s{seed}{suffix}").write_text(text)
        content = json.loads((tmp_path / f"data/evaluation/cartpole-s{seed}.json").read_text())
        content["students"]["tiny"] = {**content["students"]["small"], "greedy": {"mean": 300.0}}
        (tmp_path / f"data/evaluation/cartpole-s{seed}.json").write_text(json.dumps(content))
    results = gather(blocks, tmp_path)
    summary = summarise(results)
    page = render(results, summary)
    assert "The best of two students, small, keeps 98 %" in table_text(page)
    assert 'id="student-tiny"' in page
    assert "cartpole (tiny),tiny," in comparison(summary)


def test_an_aggregate_and_distrals_distilled_policy_are_students(tmp_path: Path) -> None:
    blocks = report_fixture.write(tmp_path, 2)
    names = ["acrobot", "breakout", "cartpole"]
    blocks["distill_student"]["other"] = {**blocks["distill_student"]["small"], "loss": "nll"}
    blocks["aggregate"] = {"soup": {"members": ["small", "other"], "method": "greedy_soup", "align": True}}
    blocks["train_multi_task"] = {"pi": {"environments": names, "method": "distral"}}
    write_joint(tmp_path, blocks, {("pi", name): 0.5 for name in names})
    for seed in (0, 1):
        for suffix in (".json", ".csv"):
            text = (tmp_path / f"data/students/small-s{seed}{suffix}").read_text()
            (tmp_path / f"data/students/other-s{seed}{suffix}").write_text(text)
        taken = ["other", "small"] if seed else ["small"]
        (tmp_path / f"data/students/soup-s{seed}.json").write_text(json.dumps({"taken": taken}))
        for name in names:
            path = f"data/evaluation/{name}-s{seed}.json"
            small = json.loads((tmp_path / path).read_text())["students"]["small"]
            edit(tmp_path, path, students=dict.fromkeys(("small", "other", "soup", "pi"), small))
    results = gather(blocks, tmp_path)
    summary = summarise(results)
    text = table_text(render(results, summary))
    assert (
        "an average (greedy soup, units aligned) of small, other, of which it took, seed 0: small; seed 1: other, small."
        in text
    )
    assert "pi , the policy that Distral distilled from its own of acrobot, breakout, cartpole." in text
    # The members have their teachers in common, which count once.
    assert experience(results, "soup") == experience(results, "small") == 2_150_000
    assert experience(results, "pi") == 2_150_000 == experience(results, "pi", joint=True)
    assert set(summary.students) == {"small", "other", "soup", "pi"}
    assert summary.students["soup"].parameters == 11_198
    assert "breakout (pi),pi," in comparison(summary) and "breakout (joint pi),joint pi," in comparison(
        summary
    )
    for run in results.students["soup"].values():
        run["taken"] = ["small", "other"]
    assert "soup , the average (greedy soup, units aligned) of other, small." in table_text(
        render(results, summary)
    )


def test_an_adopted_teachers_source_counts_in_the_experience(tmp_path: Path) -> None:
    blocks = report_fixture.write(tmp_path, 2)
    blocks["train_teacher"]["cartpole"] = {"algorithm": "fine_tuned", "mode": "full", "source": "acrobot"}
    for seed in (0, 1):
        edit(tmp_path, f"data/teachers/cartpole-s{seed}.json", env_steps=1000, episodes=0)
    blocks["distill_student"]["small"]["environments"] = ["cartpole"]
    results = gather(blocks, tmp_path)
    # Acrobot's teacher's 500k, what was taken to move it, and the play collected.
    assert experience(results, "small") == 500_000 + 1000 + 50_000
    text = table_text(render(results, summarise(results)))
    assert "CartPole-v1 fine-tuned, full, from acrobot 1,000 – 50,000" in text


def write_joint(root: Path, blocks: dict[str, Any], scores: dict[tuple[str, str], float]) -> None:
    """What joint networks leave, by their normalised scores: (network, environment) -> score."""
    for seed in blocks["seeds"]:
        for network in blocks["train_multi_task"]:
            stem = f"data/multi_task/{network}-s{seed}"
            (root / stem).parent.mkdir(exist_ok=True)
            (root / f"{stem}.csv").write_text("env_steps,mean_return\n100,1\n")
            run = {
                "env_steps": 2_150_000,
                "parameters": 11_198,
                "diverged": {"acrobot": 4096} if seed else {},
            }
            (root / f"{stem}.json").write_text(json.dumps(run))
        for name in {environment for _, environment in scores}:
            path = f"data/evaluation/{name}-s{seed}.json"
            found = json.loads((root / path).read_text())
            random, teacher = found["random"]["mean"], found["teacher"]["greedy"]["mean"]
            judged = {
                network: {"mean": random + score * (teacher - random)}
                for (network, environment), score in scores.items()
                if environment == name
            }
            both = {
                network: {"greedy": mean, "epsilon": mean, "parameters": 11_198}
                for network, mean in judged.items()
            }
            edit(root, path, joint=both)


def test_what_one_environment_does_to_another_is_a_table(tmp_path: Path) -> None:
    blocks = report_fixture.write(tmp_path, 2)
    alike = {"balancing": "uniform"}
    blocks["train_multi_task"] = {
        "a": {"environments": ["acrobot", "breakout"], "weights": {"acrobot": 2.0}, **alike},
        "b": {"environments": ["breakout", "cartpole"], "weights": {}, **alike},
        "alone": {"environments": ["acrobot", "cartpole"], "weights": {}, "balancing": "pcgrad"},
    }
    write_joint(
        tmp_path,
        blocks,
        {
            ("a", "acrobot"): 0.75,
            ("a", "breakout"): 0.25,
            ("b", "breakout"): 0.5,
            ("b", "cartpole"): 1.0,
            ("alone", "acrobot"): 0.1,
            ("alone", "cartpole"): 0.1,
        },
    )
    results = gather(blocks, tmp_path)
    summary = summarise(results)
    first, second = interference(results, summary)
    assert (first.networks, second.networks) == (["a", "b"], ["alone"])  # alike in all but the environments
    found = {pair: score.value for pair, score in first.scores.items() if score}
    assert found == {
        ("acrobot", "breakout"): pytest.approx(0.75),
        ("breakout", "acrobot"): pytest.approx(0.25),
        ("breakout", "cartpole"): pytest.approx(0.5),
        ("cartpole", "breakout"): pytest.approx(1.0),
    }
    page = render(results, summary)
    text = table_text(page)
    assert "Score of with acrobot with breakout with cartpole" in text
    assert "breakout 0.25 – 0.50" in text
    assert text.count("Score of with") == 1  # one network of two alone is in the tables above
    checker = Checker()
    checker.feed(page)
    assert checker.errors == []


def test_a_joint_network_stands_beside_the_student(tmp_path: Path) -> None:
    blocks = report_fixture.write(tmp_path, 2)
    blocks["train_multi_task"] = {"all": {"environments": ["acrobot", "breakout", "cartpole"]}}
    write_joint(tmp_path, blocks, {("all", name): 0.5 for name in ("acrobot", "breakout", "cartpole")})
    results = gather(blocks, tmp_path)
    summary = summarise(results)
    overall = summary.joint["all"].overall.geometric_mean
    assert overall is not None
    assert overall.points == (pytest.approx(0.5), pytest.approx(0.5))
    page = render(results, summary)
    text = table_text(page)
    assert "joint all, without teachers 0.50 0.50 · 0.50" in text
    assert "Left out, for its loss was not finite: acrobot after 4,096 env steps of its own (seed 1)." in text
    assert page.index('id="joint"') > page.index('id="student-small"')
    # 500k + 1M + 500k of training and 50k of play on each; the joint network's are its own.
    assert "Experience behind it: 2.15M env steps, the teachers’ training" in text
    assert "Experience behind it: 2.15M env steps." in text
    numbers = metrics(results, summary)["joint"]["all"]
    assert numbers["geometric_mean"]["value"] == 0.5
    assert numbers["environments"]["acrobot"]["agreement"] is None
    assert "acrobot (joint all),joint all," in comparison(summary)
    checker = Checker()
    checker.feed(page)
    assert checker.errors == []


def test_an_online_student_is_shown_beside_its_teachers(tmp_path: Path) -> None:
    blocks = report_fixture.write(tmp_path, 2)
    blocks["distill_student"]["small"]["method"] = "online"
    names = blocks["distill_student"]["small"]["environments"]
    for seed in (0, 1):
        columns = [f"{kind}_{name}" for name in names for kind in ("agreement", "teacher", "student")]
        rows = [f"{step},{','.join(['0.5'] * len(columns))}" for step in (1000, 2000)]
        text = "\n".join([f"env_steps,{','.join(columns)}", *rows])
        (tmp_path / f"data/students/small-s{seed}.csv").write_text(text + "\n")
        edit(tmp_path, f"data/students/small-s{seed}.json", env_steps=3000)
    results = gather(blocks, tmp_path)
    text = table_text(page := render(results, summarise(results)))
    assert "Teachers and student while both learn" in text
    assert "distilled online by KL" in text
    assert "Experience behind it: 3k env steps of its teachers’ training" in text
    assert page.count(">student</text>") == 3
    assert "Agreement while distilling" in text


def test_a_missing_or_broken_result_is_named(tmp_path: Path) -> None:
    blocks = report_fixture.write(tmp_path, 1)
    (tmp_path / "data/students/small-s0.json").write_text("{")
    with pytest.raises(StillhouseError, match=r"small-s0\.json: cannot be read"):
        gather(blocks, tmp_path)
    (tmp_path / "data/students/small-s0.json").unlink()
    with pytest.raises(StillhouseError, match=r"small-s0\.json: missing"):
        gather(blocks, tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-498.21, "−498"),
        (12.94, "12.9"),
        (0.512, "0.51"),
        (0.0, "0"),
        (1_234_567.0, "1,234,567"),
        (math.nan, "–"),
        (-0.001, "0.00"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_short_numbers() -> None:
    assert [short(v) for v in (0, 50, 1500, 200_000, 1.5e6, -500)] == [
        "0",
        "50",
        "1.5k",
        "200k",
        "1.5M",
        "−500",
    ]


def test_ticks_are_round_and_few() -> None:
    assert ticks(0, 500_000, 6) == [0, 100_000, 200_000, 300_000, 400_000, 500_000]
    assert ticks(-512, -60, 5) == [-500, -400, -300, -200, -100]
    assert ticks(0.42, 1.0, 5) == [0.6, 0.8, 1.0]
    assert len(ticks(3.0, 3.0, 5)) <= 5


def test_labels_are_moved_apart() -> None:
    placed = apart([(50.0, "a", ""), (52.0, "b", ""), (99.0, "c", ""), (99.0, "d", "")], 13, 0, 100)
    heights = [y for y, _, _ in placed]
    assert [label for _, label, _ in placed] == ["a", "b", "c", "d"]
    assert all(after - before >= 13 for before, after in itertools.pairwise(heights))
    assert heights[-1] <= 100


def test_a_curve_without_points_is_said() -> None:
    assert "no curve" in chart([], "title", "env steps")


def test_the_stage_writes_all_its_outs(tmp_path: Path) -> None:
    blocks = report_fixture.write(tmp_path, 1)
    edit(tmp_path, "data/code/report.json", modules=dict.fromkeys(report_fixture.modules(), ""))
    (tmp_path / "params").mkdir()
    YAML().dump(blocks, tmp_path / "params/pipeline.yaml")
    entry = {
        "cmd": "python -m tasks.report",
        "deps": ["data/code/report.json"],
        "params": [{"params/pipeline.yaml": ["suite"]}],
    }
    YAML().dump({"stages": {"report": entry}}, tmp_path / "dvc.yaml")
    outs = [
        tmp_path / "data/evaluation" / name
        for name in ("report.html", "results.json", "comparison.csv", "learning_curves.png")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tasks.report"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    results = gather(blocks, tmp_path)
    expected = render(results, summarise(results)), json.dumps(metrics(results, summarise(results)))
    assert outs[0].read_text() == expected[0]
    assert json.loads(outs[1].read_text()) == json.loads(expected[1])
    assert outs[2].read_text() == comparison(summarise(results))
    assert outs[3].read_bytes() == learning_curves(results)
