"""Stage: make an agent that was moved to an environment the teacher there, so that students can be distilled from it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from stillhouse.checkpoint import load_checkpoint, save_checkpoint
from stillhouse.files import write_atomic, write_json
from stillhouse.networks.multi_task import parameter_count
from tasks.stage import StageContext, main, transfer_stem


def adopt_teacher(context: StageContext) -> None:
    """What ``fine_tune`` left of one way and source to a teacher's checkpoint, metrics and learning curve."""
    settings = context.block(f"train_teacher.{context.name}")
    stem = transfer_stem(context.name, settings["mode"], settings["source"], context.seed)
    source = Path("data/transfer") / stem
    moved, found = load_checkpoint(source), json.loads(source.with_name(f"{stem}.json").read_text())
    curve = source.with_name(f"{stem}.csv").read_text()
    *_, last = csv.DictReader(curve.splitlines())
    path = Path("data/teachers") / f"{context.name}-s{context.seed}"
    write_atomic(path.with_name(f"{path.name}.csv"), curve)
    write_json(
        path.with_name(f"{path.name}.json"),
        {
            "env_steps": found["env_steps"],
            "mean_return": float(last["mean_return"]),
            "parameters": parameter_count(moved.network),
            "algorithm": settings["algorithm"],
        },
    )
    details = {
        **moved.details,
        "algorithm": settings["algorithm"],
        "source": settings["source"],
        "env_steps": found["env_steps"],
        "adopted": moved.digest,
    }
    save_checkpoint(path, moved.network, details)


if __name__ == "__main__":
    main(adopt_teacher)
