"""Stage: adapt what was meta-learnt to unseen tasks of its family, and judge it after every step of adaptation."""

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
    found = learner.evaluate(judged["tasks"], judged["steps"], context.seed)
    path = FOLDER / f"{context.name}-s{context.seed}"
    arms = {settings["method"]: found.values, **found.baselines}
    write_json(
        path.with_suffix(".json"),
        {
            "measure": found.measure,
            "unit": found.unit,
            "tasks": len(found.values),
            "steps": list(found.steps),
            # Means over the tasks and their standard errors; a single column stands for every step.
            "means": {name: [float(mean) for mean in values.mean(axis=0)] for name, values in arms.items()},
            "standard_errors": {
                name: [float(error) for error in values.std(axis=0, ddof=1) / np.sqrt(len(values))]
                for name, values in arms.items()
            },
        },
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["steps", *arms])
    for row, step in enumerate(found.steps):
        means = [values.mean(axis=0)[row if values.shape[1] > 1 else 0] for values in arms.values()]
        writer.writerow([step, *(f"{mean:.6g}" for mean in means)])
    write_atomic(path.with_suffix(".csv"), text.getvalue())


if __name__ == "__main__":
    main(meta_evaluate)
