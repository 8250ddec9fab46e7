"""Stage: adapt what was meta-learnt to tasks of its family that are for testing, and judge it after every step of adaptation."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from stillhouse.checkpoint import load_state
from stillhouse.files import write_atomic, write_json
from stillhouse.processor import use_one_core
from tasks.meta_train import FOLDER as LEARNT
from tasks.meta_train import make_meta_learner
from tasks.stage import StageContext, main

FOLDER = Path("data/adaptation")


def meta_evaluate(context: StageContext) -> None:
    """What was learnt, and test tasks, to the mean after every step: of the method, and of what it is compared with."""
    use_one_core()
    where = f"meta_train.{context.name}"
    settings = context.block(where)
    judged = context.block("meta_evaluate")
    learner = make_meta_learner(settings, where, context.seed, context.device)
    learner.load(load_state(LEARNT / f"{context.name}-s{context.seed}"))
    # A family of a few members, such as two directions, is judged on all of them.
    family = getattr(learner, "family", None)
    members = family.members("test") if family else None
    tasks = judged["tasks"] if members is None else min(judged["tasks"], members)
    found = learner.evaluate(tasks, judged["steps"], context.seed)
    path = FOLDER / f"{context.name}-s{context.seed}"
    arms = {settings["method"]: found.values, **found.baselines}
    with np.errstate(invalid="ignore", over="ignore"):  # what diverges has no mean
        means = {name: _finite(values.mean(axis=0)) for name, values in arms.items()}
        errors = {
            name: _finite(values.std(axis=0, ddof=1) / np.sqrt(len(values))) for name, values in arms.items()
        }
    write_json(
        path.with_suffix(".json"),
        {
            "measure": found.measure,
            "unit": found.unit,
            "tasks": len(found.values),
            "unseen": family is None or family.splits,  # of two directions, say, both are trained on
            "steps": list(found.steps),
            # Means over the tasks and their standard errors; a single column stands for every step.
            "means": means,
            "standard_errors": errors,
        },
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["steps", *arms])
    for row, step in enumerate(found.steps):
        shown = [values[row if len(values) > 1 else 0] for values in means.values()]
        writer.writerow([step, *("" if mean is None else f"{mean:.6g}" for mean in shown)])
    write_atomic(path.with_suffix(".csv"), text.getvalue())


def _finite(values: np.ndarray) -> list[float | None]:
    """For JSON, which knows no other numbers."""
    return [float(value) if np.isfinite(value) else None for value in values]


if __name__ == "__main__":
    main(meta_evaluate)
