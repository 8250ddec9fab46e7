"""The page of transfer results: its numbers worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.transfer_page import render, targets_of

SEEDS = [0, 1]


def way(mode: str, source: str, curves: list[list[float]], **more: Any) -> dict[str, Any]:
    """A way whose curves have points at 0, 50 and 100 env steps."""
    runs = [
        {"env_steps": [0, 50, 100], "returns": curve, "test": curve[-1], "parameters": 10, **more}
        for curve in curves
    ]
    return {"mode": mode, "source": source, "runs": runs}


def result(**ways: dict[str, Any]) -> dict[str, Any]:
    target = {
        "id": "CartPole-v1",
        "options": {},
        "algorithm": "ppo",
        "env_steps": 100,
        "sources": ["old"],
        "threshold": 6.0,
        "random": [1.0, 1.0],
        "ways": {"scratch": way("scratch", "", [[1, 3, 5], [1, 3, 5]])} | ways,
    }
    provenance = {"command": "x", "commit": "c", "machine": {"cores": 2, "processor": "p"}}
    return {
        "suite": "s",
        "seeds": SEEDS,
        "teachers": {"old": [9.0, 9.0]},
        "targets": {"new": target},
        "provenance": provenance,
    }


def test_scores_are_areas_above_random_play_over_scratchs() -> None:
    # Scratch's area is 3, 2 above random play; 5, 4 above it; 2, 1 above it.
    (target,) = targets_of(result(**{"full-old": way("full", "old", [[5, 5, 5], [2, 2, 2]])}))
    assert target.has_ratio
    assert target.scores("full-old") == pytest.approx([2.0, 0.5])
    assert target.top("full-old", 1) == pytest.approx(2.0)


def test_where_scratch_is_at_random_play_areas_are_subtracted() -> None:
    found = result(**{"full-old": way("full", "old", [[5, 5, 5], [2, 2, 2]])})
    found["targets"]["new"]["random"] = [3.0, 1.0]
    (target,) = targets_of(found)
    assert not target.has_ratio
    assert target.scores("full-old") == pytest.approx([2.0, -1.0])
    assert "Δ 0.50" in render({"s": found})


def test_steps_are_medians_and_say_in_how_many_seeds() -> None:
    text = render({"s": result(**{"full-old": way("full", "old", [[1, 5, 9], [1, 1, 1]])})})
    row = next(line for line in text.splitlines() if line.startswith("| `full-old` | 1.0 "))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    # Scratch's final return, 5, after 50 env steps in one seed and never in the other; 6 after 62.5.
    assert cells[3] == "never (1 of 2)" and cells[4] == "never (1 of 2)"
    assert cells[2] == "1.00 (2.00 · 0.00)"


def test_retention_is_the_mean_over_a_sources_environments() -> None:
    kept = {
        "a": {"random": 0.0, "before": 10.0, "after": 5.0},
        "b": {"random": 0.0, "before": 10.0, "after": 10.0},
        "never above random play": {"random": 5.0, "before": 5.0, "after": 9.0},
    }
    (target,) = targets_of(result(**{"full-old": way("full", "old", [[1, 5, 9]] * 2, retention=kept)}))
    assert target.ways["full-old"].retention == [0.75, 0.75]
    assert target.ways["scratch"].retention == []


def test_the_soup_stands_beside_the_paper() -> None:
    ways = {
        "head_only-old": way("head_only", "old", [[1, 2, 3]] * 2),
        "full-old": way("full", "old", [[1, 5, 9]] * 2),
        "progressive_2-old": way("progressive_2", "old", [[1, 6, 11]] * 2),
        "progressive_3": way("progressive_3", "", [[1, 7, 13]] * 2),
        "progressive_random": way("progressive_random", "", [[1, 3, 5]] * 2),
    }
    text = render({"s": result(**ways)})
    rows = {
        line.split("|")[1].strip(): line
        for line in text.splitlines()
        if line.startswith("| B") or line.startswith("| prog")
    }
    assert "| 0.50 (0.50 · 0.50) | 0.50 | 0 of 1 | 0.50 | 35 / 7 |" in rows["B2, taken, output layer trained"]
    assert "| 2.00 (2.00 · 2.00) | 2.00 | 1 of 1 | 2.00 | 181 / 160 |" in rows["B3, taken, all trained"]
    assert "progressive, 2 columns, less B4, two columns, the first random and frozen: +1.50" in text


def test_the_same_bytes_twice() -> None:
    found = {"s": result(**{"full-old": way("full", "old", [[1, 5, 9], [1, 1, 1]])})}
    assert render(found) == render(found)
