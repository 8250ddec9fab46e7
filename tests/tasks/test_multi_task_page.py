"""The page of multi-task results: environments by environments worked by hand, and what was not run."""

from __future__ import annotations

from typing import Any

from tasks.multi_task_page import MULTI_TASK
from tasks.results_page import render
from tasks.studies import Study


def study(arms: dict[str, Any]) -> Study:
    content = {
        "study": "multi_task_classic",
        "question": "Which is best?",
        "provenance": {"command": "python -m benchmarks.multi_task"},
        "environments": ["a", "b", "c"],
        "seeds": [100, 101],
        "arms": arms,
    }
    return Study.model_validate(content)


def test_two_at_a_time_is_a_table_of_environments_by_environments() -> None:
    page = render(
        MULTI_TASK,
        {
            "multi_task_classic": study(
                {
                    "all": {"scores": [[1.0, 0.5, 0.5], [1.0, 0.5, 0.5]]},
                    "ab": {"scores": [[1.0, 0.5], [0.5, 0.5]], "environments": ["a", "b"]},
                    "bc": {"scores": [[0.25, 0.5], [0.25, 1.0]], "environments": ["b", "c"]},
                }
            )
        },
    )
    assert "| a | – | 0.75 | – |" in page  # (1.0 + 0.5) / 2
    assert "| b | 0.50 | – | 0.25 |" in page
    assert "| c | – | 0.75 | – |" in page
    assert (
        "| all | **0.630 (0.630 · 0.630)**" in page
    )  # (1 * 1/2 * 1/2) ** (1/3); pairs are not in this table
    assert "| ab |" not in page.partition("Mean returns")[0]


def test_a_study_that_was_not_run_leaves_a_line() -> None:
    page = render(MULTI_TASK, {})
    assert page.count("Not run yet") == len(MULTI_TASK.sections)
    assert "Not run yet: there is no `benchmarks/results/multi_task/unreal_mazes.json`." in page
