"""Stage: everything a run found, as one self-contained page and as numbers for DVC.

Reads, for the environments of ``train_teacher``, the students of ``distill_student`` and of ``aggregate``, the networks of
``train_multi_task``, the targets, modes and sources of ``fine_tune``, the meta-learners of ``meta_train`` and all ``seeds`` (paths follow from these blocks; no folder is listed):

    data/code/report.json
    data/teachers/<env>-s<seed>.json       data/teachers/<env>-s<seed>.csv
    data/datasets/<env>-s<seed>.json
    data/students/<student>-s<seed>.json   data/students/<student>-s<seed>.csv (none of an aggregate)
    data/multi_task/<name>-s<seed>.json    data/multi_task/<name>-s<seed>.csv
    data/transfer/<target>-<mode>[-<source>]-s<seed>.json   and .csv
    data/evaluation/<env>-s<seed>.json
    data/meta/<name>-s<seed>.json          data/meta/<name>-s<seed>.csv
    data/adaptation/<name>-s<seed>.json

Writes ``report.html``, ``results.json``, ``comparison.csv`` and ``learning_curves.png`` in ``data/evaluation/``.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from stillhouse.errors import StillhouseError
from stillhouse.files import sha256, write_atomic, write_json
from tasks.report_page import render
from tasks.results import Results, Run, Summary, metrics, summarise
from tasks.stage import StageContext, main, stage_name, transfer_runs, transfer_stem

OUTPUT = Path("data/evaluation")


def report(context: StageContext) -> None:
    """The results of all stages to the page, the metrics, the comparison and the picture."""
    results = gather({key: context.block(key) for key in BLOCKS}, Path())
    summary = summarise(results)
    write_atomic(OUTPUT / "report.html", render(results, summary))
    write_atomic(OUTPUT / "comparison.csv", comparison(summary))
    write_atomic(OUTPUT / "learning_curves.png", learning_curves(results))
    write_json(OUTPUT / "results.json", metrics(results, summary))


SETTINGS = (
    "train_teacher",
    "collect_dataset",
    "distill_student",
    "train_multi_task",
    "aggregate",
    "fine_tune",
    "meta_train",
)
BLOCKS = ("suite", "seeds", "environments", *SETTINGS, "report")


def gather(blocks: dict[str, Any], root: Path) -> Results:
    """Read what the stages of these parameter blocks wrote under ``root``.

    Raises:
        StillhouseError: a file is missing or cannot be read, naming it.
    """
    inputs: dict[str, str] = {}
    seeds = sorted(blocks["seeds"])

    def read(name: str) -> Run:
        content: Run = _read(root / name, json.loads)
        inputs[name] = sha256(root / name)
        return content

    def run(stem: str) -> Run:
        columns = _read(root / f"{stem}.csv", _columns)
        inputs[f"{stem}.csv"] = sha256(root / f"{stem}.csv")
        return {**read(f"{stem}.json"), "curve": columns}

    sources = sorted(blocks["train_teacher"])
    transfer = {
        target: {
            stage_name(mode, source=source): {
                seed: run(f"data/transfer/{transfer_stem(target, mode, source, seed)}") for seed in seeds
            }
            for mode, source in transfer_runs(block["modes"], block["sources"])
        }
        for target, block in sorted(blocks["fine_tune"].items())
    }
    joint = {
        name: {seed: run(f"data/multi_task/{name}-s{seed}") for seed in seeds}
        for name in sorted(blocks["train_multi_task"])
    }
    students = {
        name: {seed: run(f"data/students/{name}-s{seed}") for seed in seeds}
        for name in sorted(blocks["distill_student"])
    }
    students |= {
        name: {seed: read(f"data/students/{name}-s{seed}.json") for seed in seeds}
        for name in sorted(blocks["aggregate"])
    }
    # Distral's distilled policy is a by-product of a joint network.
    students |= {
        name: joint[name] for name in joint if blocks["train_multi_task"][name].get("method") == "distral"
    }
    return Results(
        title=str(blocks["report"]["title"]),
        suite=str(blocks["suite"]),
        seeds=seeds,
        ids={name: block["id"] for name, block in sorted(blocks["environments"].items())},
        teachers={name: {seed: run(f"data/teachers/{name}-s{seed}") for seed in seeds} for name in sources},
        datasets={
            name: {seed: read(f"data/datasets/{name}-s{seed}.json") for seed in seeds} for name in sources
        },
        students=students,
        joint=joint,
        evaluations={
            name: {seed: read(f"data/evaluation/{name}-s{seed}.json") for seed in seeds} for name in sources
        },
        transfer=transfer,
        meta={
            name: {
                seed: run(f"data/meta/{name}-s{seed}")
                | {"adaptation": read(f"data/adaptation/{name}-s{seed}.json")}
                for seed in seeds
            }
            for name in sorted(blocks["meta_train"])
        },
        settings={key: blocks[key] for key in SETTINGS},
        environment=read("data/code/report.json")["environment"],
        inputs=inputs,
    )


def _read(path: Path, decode: Any) -> Any:
    try:
        return decode(path.read_text())
    except FileNotFoundError:
        raise StillhouseError(
            f"{path}: missing; run the stage that writes it first (`stillhouse run` does)"
        ) from None
    except ValueError as error:
        raise StillhouseError(f"{path}: cannot be read ({error}); rerun the stage that writes it") from None


def _columns(text: str) -> dict[str, list[float]]:
    """A CSV's columns; an empty field is NaN."""
    header, *rows = csv.reader(io.StringIO(text))
    return {name: [float(row[i]) if row[i] else math.nan for row in rows] for i, name in enumerate(header)}


def comparison(summary: Summary) -> str:
    """Students and joint networks against teachers as CSV, a row for each and environment: what ``dvc plots`` shows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["environment", "student", "teacher_return", "student_return", "random_return", "normalised_score"]
    )
    networks = summary.students | {f"joint {name}": network for name, network in summary.joint.items()}
    for name, student in networks.items():
        for row in student.rows:
            label = row.environment if len(networks) == 1 else f"{row.environment} ({name})"
            values = (row.teacher.value, row.student.value, row.random.value)
            score = "" if row.score is None else f"{row.score.value:.6g}"
            writer.writerow([label, name, *(f"{value:.6g}" for value in values), score])
    return text.getvalue()


def learning_curves(results: Results) -> bytes:
    """The teachers' learning curves, an axes for each environment, as PNG; the same bytes for the same results."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()  # the user's own settings would change the picture
    columns = max(1, min(3, len(results.teachers)))
    rows = max(1, -(-len(results.teachers) // columns))
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), dpi=110, layout="constrained")
    for i, (name, runs) in enumerate(results.teachers.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for run in runs.values():
            axes.plot(
                run["curve"]["env_steps"], run["curve"]["mean_return"], color="#b4532a", alpha=0.75, lw=1.5
            )
        random = sum(run["random"]["mean"] for run in results.evaluations[name].values()) / len(runs)
        axes.axhline(random, color="#7a7f87", lw=1, ls=(0, (4, 3)))
        axes.annotate(
            "random",
            (1, random),
            (-2, 3),
            ("axes fraction", "data"),
            "offset points",
            ha="right",
            color="#7a7f87",
            fontsize=8,
        )
        axes.set_title(results.ids[name], loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("env steps", fontsize=9)
        axes.set_ylabel("mean return", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.locator_params(axis="x", nbins=4)
    picture = io.BytesIO()
    # Matplotlib's own version would enter the file.
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


if __name__ == "__main__":
    main(report)
