"""A run's results: the table at its end, and the artifacts in Prefect."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from flows.display import console
from tasks.git import commit_of
from tasks.machine import processor

RESULTS = Path("data/evaluation/results.json")
REPORT = Path("data/evaluation/report.html")
CURVES = Path("data/evaluation/learning_curves.png")
COLUMNS = ("environment", "teacher", "student", "random", "score", "parameters")
META_COLUMNS = ("meta-learner", "arm", "measure", "before", "after")
TRANSFER_COLUMNS = ("target", "mode", "first return", "last return", "area against scratch")


def _value(number: dict[str, float] | None) -> str:
    """An estimate: its value, with its interval where there is one."""
    if number is None:
        return "none"
    text = f"{number['value']:.4g}"
    return f"{text} [{number['low']:.4g}, {number['high']:.4g}]" if "low" in number else text


def networks(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Students and joint networks, by what they are called."""
    kinds = (("student", "students"), ("joint", "joint"))
    return {f"{kind} {name}": found for kind, key in kinds for name, found in results[key].items()}


def rows(student: dict[str, Any]) -> list[list[str]]:
    """``COLUMNS`` for each environment of a student or joint network, and for it as a whole."""
    table = [
        [
            environment,
            _value(found["teacher"]),
            _value(found["student"]),
            _value(found["random"]),
            _value(found["normalised_score"]),
            f"{found['teacher_parameters']:,}",
        ]
        for environment, found in student["environments"].items()
    ]
    score, times = _value(student["geometric_mean"]), f"{student['compression']:.1f}"
    table.append(["geometric mean", "", "", "", score, f"{student['parameters']:,} (teachers / {times})"])
    return table


def transfer_rows(results: dict[str, Any]) -> list[list[str]]:
    """Target, mode, first and last return, and the area under the curve against scratch."""
    table = []
    for target, modes in results["transfer"].items():
        for mode, found in modes.items():
            kind = next((kind for kind in ("ratio", "difference") if f"transfer_{kind}" in found), "")
            score = f"{_value(found[f'transfer_{kind}'])} ({kind})" if kind and mode != "scratch" else ""
            table.append(
                [target, mode, _value(found["initial_return"]), _value(found["final_return"]), score]
            )
    return table


def meta_rows(results: dict[str, Any]) -> list[list[str]]:
    """Meta-learner, arm, measure, and its value on tasks for testing before and after all adaptation."""
    table = []
    for name, found in results.get("meta", {}).items():  # an older revision's have none
        for arm, values in found["arms"].items():
            first, *_, last = values if len(values) > 1 else [*values] * 2
            table.append([name, arm, found["measure"], _value(values[first]), _value(values[last])])
    return table


def _read(workspace: Path) -> dict[str, Any] | None:
    try:
        return json.loads((workspace / RESULTS).read_text())
    except (OSError, ValueError):
        return None


def show(workspace: Path, checkout: Path) -> None:
    """Print the tables and where the report lies."""
    results = _read(workspace)
    if results is None:
        return
    for title, network in networks(results).items():
        _print_table(title, COLUMNS, rows(network))
    if transfer := transfer_rows(results):
        _print_table("transfer", TRANSFER_COLUMNS, transfer)
    if meta := meta_rows(results):
        _print_table("meta-learning", META_COLUMNS, meta)
    report = workspace / REPORT
    if report.exists():
        shown = report.relative_to(checkout) if report.is_relative_to(checkout) else report
        console.print(f"\nreport {escape(str(shown))}")


def _print_table(title: str, columns: tuple[str, ...], content: list[list[str]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or column == "mode" else "right")
    for row in content:
        table.add_row(*map(escape, row), style="bold" if row[0] == "geometric mean" else "")
    console.print(f"\n[bold]{title}[/]")
    console.print(table)


def run_facts(workspace: Path) -> str:
    """What stands with the run and in no out, which must not change with it: commit, time and processor."""
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return f"commit {commit_of(workspace) or 'unknown'}, {now}, {processor()}"


def publish(workspace: Path) -> None:
    """The result table, the learning curves and the report as artifacts, with the facts of the run."""
    from prefect.artifacts import (
        create_image_artifact,
        create_link_artifact,
        create_markdown_artifact,
        create_table_artifact,
    )

    results = _read(workspace)
    if results is None:
        return
    about = run_facts(workspace)
    table = [
        {"network": title, **dict(zip(COLUMNS, row, strict=True))}
        for title, network in networks(results).items()
        for row in rows(network)
    ]
    create_table_artifact(table, key="results", description=about)
    with contextlib.suppress(OSError):
        picture = base64.b64encode((workspace / CURVES).read_bytes()).decode()
        create_image_artifact(f"data:image/png;base64,{picture}", key="learning-curves", description=about)
    report = workspace / REPORT
    if report.exists():
        create_link_artifact(
            report.resolve().as_uri(), link_text=str(REPORT), key="report", description=about
        )
        create_markdown_artifact(_markdown(results, about, report), key="report-summary", description=about)


def _markdown(results: dict[str, Any], about: str, report: Path) -> str:
    def table(columns: tuple[str, ...], content: list[list[str]]) -> list[str]:
        body = ["| " + " | ".join(row) + " |" for row in content]
        return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *body, ""]

    lines = [f"{about}. Full report: `{report}`", ""]
    for title, network in networks(results).items():
        lines += [f"### {title.capitalize()}", "", *table(COLUMNS, rows(network))]
    if transfer := transfer_rows(results):
        lines += ["### Transfer", "", *table(TRANSFER_COLUMNS, transfer)]
    if meta := meta_rows(results):
        lines += ["### Meta-learning", "", *table(META_COLUMNS, meta)]
    return "\n".join(lines)
