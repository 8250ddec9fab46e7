"""The page of published results: its numbers worked by hand, what a file may hold, and the same bytes twice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from report_fixture import modules
from ruamel.yaml import YAML

from stillhouse.errors import StillhouseError
from tasks import results_page
from tasks.results_page import ONLINE_CURVE, POLICY_DISTILLATION, SECTIONS, online_curve
from tasks.stage import stage_entry
from tasks.studies import FOLDER, Study, read_study

REPOSITORY = Path(__file__).parents[2]
PROVENANCE = {
    "command": "python -m benchmarks.policy_distillation --study losses",
    "commit": "0123456789ab",
    "machine": {"processor": "A Processor", "cores": 2},
    "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
}

render = partial(results_page.render, POLICY_DISTILLATION)


def study(name: str, seeds: int, arms: dict[str, Any], **more: Any) -> Study:
    content = {
        "study": name,
        "question": "Which is best?",
        "provenance": PROVENANCE,
        "environments": ["asterix", "breakout"],
        "seeds": list(range(seeds)),
        "arms": arms,
        **more,
    }
    return Study.model_validate(content)


def rows(page: str, first: str) -> list[list[str]]:
    """The cells of every table row that begins with ``first``."""
    found = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith(f"| {first} |")]
    assert found, page
    return found


def test_below_five_seeds_the_points_are_shown() -> None:
    # Geometric means over the two games: sqrt(1 * 0.25) = 0.5, sqrt(1 * 1) = 1; over both seeds (0.25)^(1/4) = 0.7071.
    found = study("losses", 2, {"kl": {"scores": [[1.0, 0.25], [1.0, 1.0]], "parameters": 12345}})
    page = render({"losses": found})
    (row,) = rows(page, "kl")
    assert row == [
        "kl",
        "12,345",
        "**0.707 (0.500 · 1.000)**",
        "breakout 0.625",
        "1.000 (1.000 · 1.000)",
        "0.625 (0.250 · 1.000)",
    ]
    assert "IQM" not in page.partition("## Losses")[2].partition("##")[0]
    assert "2 seeds; in parentheses: each seed" in page


def test_from_five_seeds_on_intervals_and_the_interquartile_mean() -> None:
    # The middle half of 0.1 ... 1.0 (10 values, 2 cut off at each end): 0.3 ... 0.8, mean 0.55.
    scores = [[0.1 * (2 * s + 1), 0.1 * (2 * s + 2)] for s in range(5)]
    page = render({"losses": study("losses", 5, {"kl": {"scores": scores}})})
    head, row = rows(page, "")[0], rows(page, "kl")[0]
    cells = dict(zip(head, row[1:], strict=True))
    assert cells["IQM"].startswith("0.550 [")
    assert cells["asterix"].startswith("0.500 [")
    low, high = map(float, re.findall(r"\d\.\d+", cells["asterix"])[1:])
    assert 0.1 <= low < 0.5 < high <= 0.9
    assert cells["worst environment"] == "asterix 0.500"


def test_the_papers_figures_stand_beside() -> None:
    arm = {"scores": [[1.0, 1.0]]}
    page = render(
        {"compression": study("compression", 1, {"100 %": arm, "25 %": arm, "7 %": arm, "4 %": arm})}
    )
    assert [rows(page, name)[0][-3] for name in ("100 %", "25 %", "7 %", "4 %")] == [
        "–",
        "108.3 %",
        "101.7 %",
        "83.9 %",
    ]
    page = render({"multi_task": study("multi_task", 1, {"distilled": arm, "joint": arm})})
    assert rows(page, "joint")[0][-3] == "83.5 % (3 games)"
    teachers = study("teachers", 1, {"5M": {"returns": [[46.6, 17.2]]}})
    page = render({"teachers": teachers})
    assert rows(page, "5M") == [["5M", "46.6", "17.2"]]
    assert rows(page, "DQN, Young & Tian 2019 (5M)")[0][1:] == ["about 17", "about 10"]


def test_probability_of_improvement() -> None:
    # Asterix: 0.9 beats 0.5, 0.7 and loses to none: both pairs; 0.6 beats 0.5 only: 3 of 4. Breakout: a tie each: 0.5.
    arms = {
        "distilled": {"scores": [[0.9, 1.0], [0.6, 1.0]]},
        "joint": {"scores": [[0.5, 1.0], [0.7, 1.0]]},
        "single": {"scores": [[1.0], [1.0]], "environments": ["asterix"]},
    }
    page = render({"multi_task": study("multi_task", 2, arms)})
    assert f"Probability that distilled is better than joint: **{(3 / 4 + 1 / 2) / 2:.3f}**." in page
    assert "better than single" not in page  # other environments
    arms = {name: {"scores": [[score, score]] * 5} for name, score in (("distilled", 0.9), ("joint", 0.5))}
    assert "is better than joint: **1.000** [1.000, 1.000]." in render(
        {"multi_task": study("multi_task", 5, arms)}
    )


def test_updates_to_95_percent_of_the_teacher() -> None:
    arms = {
        "offline": {"scores": [[1.0, 1.0]] * 2, "extra": {"updates_to_95": [4000, 9000]}},
        "on_policy": {"scores": [[1.0, 1.0]] * 2, "extra": {"updates_to_95": [1000, 1000]}},
        "lost": {"scores": [[0.1, 0.1]] * 2, "extra": {"updates_to_95": [None, 1000]}},
    }
    page = render({"on_policy": study("on_policy", 2, arms)})
    # sqrt(4 * 9) = 6
    assert rows(page, "on_policy")[1] == ["on_policy", "1k", "1k · 1k", "6.00 (4.00 · 9.00) times"]
    assert rows(page, "offline")[1] == ["offline", "6.5k", "4k · 9k", "–"]
    assert rows(page, "lost")[1] == ["lost", "never", "never · 1k", "–"]


def test_numbers_of_an_arm_become_columns() -> None:
    arms = {
        "5": {
            "scores": [[1.0, 1.0]],
            "extra": {"env_steps": 25_000_000, "seconds_per_update": 0.0123, "list": [1]},
        },
        "20": {"scores": [[1.0]], "environments": ["freeway"], "extra": {"env_steps": 100_000_000}},
    }
    page = render({"scale": study("scale", 1, arms, order=["5", "20"])})
    section = page.partition("## Scale")[2]
    assert section.index("| 5 |") < section.index("| 20 |")
    head = next(line for line in section.splitlines() if line.startswith("|  |"))
    assert (
        head
        == "|  | geometric mean | worst environment | env steps | seconds per update | asterix | breakout | freeway |"
    )
    assert rows(section, "5")[0][3:] == ["25M", "0.0123", "1.000", "1.000", "–"]
    assert rows(section, "20")[0][3:] == ["100M", "–", "–", "–", "1.000"]


def test_an_environment_without_a_score_enters_no_mean() -> None:
    page = render({"losses": study("losses", 1, {"kl": {"scores": [[0.5, None]]}})})
    assert rows(page, "kl")[0][1:] == ["**0.500**", "asterix 0.500", "0.500", "–"]


def test_returns_and_origin() -> None:
    arms = {"kl": {"scores": [[0.5, 1.0]], "returns": [[5.0, -20.0]]}}
    reference = {"random": [[0.0, -40.0]], "teacher": [[10.0, -20.0]]}
    page = render({"losses": study("losses", 1, arms, reference=reference, notes=["A note."])})
    assert rows(page, "random") == [["random", "0.0", "−40.0"]]
    assert rows(page, "teacher") == [["teacher", "10.0", "−20.0"]]
    assert rows(page, "kl")[1] == ["kl", "5.0", "−20.0"]
    assert "- A note." in page
    for words in ("0123456789ab", "A Processor, 2 cores", "torch 2.13.0", f"`{PROVENANCE['command']}`"):
        assert words in page


def test_what_was_not_run_is_said_and_what_is_unknown_is_shown() -> None:
    page = render({})
    assert page.count("Not run yet: there is no `benchmarks/results/policy_distillation/") == len(SECTIONS)
    page = render({"wider_heads": study("wider_heads", 1, {"wide": {"scores": [[0.5, 0.5]]}})})
    assert "## Wider heads\n\nWhich is best?" in page
    assert page == render({"wider_heads": study("wider_heads", 1, {"wide": {"scores": [[0.5, 0.5]]}})})


ONLINE = {
    name: {"scores": [[0.9, 0.9]], "extra": {"env_steps": [0, 100, 200], "curve": [[0.0, 0.4, end]]}}
    for name, end in (("teacher", 1.0), ("student", 0.9))
}


def test_the_online_curve() -> None:
    svg = online_curve(study("online", 1, ONLINE))
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert svg.count('class="mean') == 2
    assert ">teacher</text>" in svg
    assert f"({ONLINE_CURVE.name})" in render({"online": study("online", 1, ONLINE)})
    with pytest.raises(StillhouseError, match=r"online\.json: arms\.teacher\.extra needs 'env_steps'"):
        online_curve(study("online", 1, {"student": ONLINE["student"]}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": {"kl": {"scores": [[1.0]]}}}, ["arms.kl", "1 seeds x 2 environments"]),
        ({"order": ["nll"]}, ["order", "kl, nll"]),
        ({"seeds": []}, ["seeds"]),
        ({"sedes": [0]}, ["sedes", "did you mean 'seeds'"]),
        ({"study": "other"}, ["losses.json", "'other'"]),
        (
            {
                "arms": {"kl": {"scores": [[0.5, 0.9]], "returns": [[5.0, 5.0]]}},
                "reference": {"random": [[0.0, 0.0]], "teacher": [[10.0, 10.0]]},
            },
            ["arms.kl", "(return - random) / (teacher - random)"],
        ),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    path = tmp_path / "losses.json"
    content = study("losses", 1, {"kl": {"scores": [[1.0, 1.0]]}}).model_dump(mode="json")
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(StillhouseError) as caught:
        read_study(path)
    said = str(caught.value)
    assert "\n" not in said
    assert all(word in said for word in words), said
    path.write_text("{")
    with pytest.raises(StillhouseError, match=r"losses\.json: cannot be read"):
        read_study(path)


def test_a_second_file_of_a_study_stands_in_its_section() -> None:
    studies = {
        name: study(name, 1, {"5M": {"returns": [[1.0, 2.0]]}}) for name in ("teachers", "teachers_long")
    }
    section = render(studies).partition("## Teachers")[2].partition("\n## ")[0]
    assert len(rows(section, "5M")) == 2
    assert section.count("Published figures are read off plots") == 1
    assert "## Teachers long" not in render(studies)


def test_what_other_benchmarks_measured_is_set_below() -> None:
    page = render({}, {"ppo": "# PPO\n\nFast.\n\n## Where\n\n| a |\n|---|\n"})
    assert page.endswith("\n## PPO\n\nFast.\n\n### Where\n\n| a |\n|---|\n")


def test_the_committed_page_is_that_of_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    found = map(Path, sorted(stage_entry("publish_results")["deps"]))
    deps = [path for path in found if path.parts[0] == "benchmarks"]
    studies = {path.stem: read_study(path) for path in deps if path.parent == FOLDER}
    measured = {path.stem: path.read_text() for path in deps if path.parent == FOLDER.parent}
    assert Path("docs/results/policy-distillation.md").read_text() == render(studies, measured)


def test_the_stage_writes_all_its_outs_twice_the_same(tmp_path: Path) -> None:
    deps = ["data/code/publish_results.json"]
    for name, arms in (("losses", {"kl": {"scores": [[1.0, 1.0]]}}), ("online", ONLINE)):
        path = tmp_path / FOLDER / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(study(name, 1, arms).model_dump_json())
        deps.append(str(FOLDER / f"{name}.json"))
    (tmp_path / "data/code").mkdir(parents=True)
    digest = {"environment": {"device": "cpu"}, "modules": dict.fromkeys(modules(), "")}
    (tmp_path / deps[0]).write_text(json.dumps(digest))
    (tmp_path / "params").mkdir()
    (tmp_path / "params/pipeline.yaml").write_text("{}\n")
    entry = {"cmd": "python -m tasks.publish_results", "deps": deps}
    YAML().dump({"stages": {"publish_results": entry}}, tmp_path / "dvc.yaml")
    written = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "tasks.publish_results"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        written.append({path.name: path.read_bytes() for path in (tmp_path / "docs/results").iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"policy-distillation.md", "online-distillation.svg"}
