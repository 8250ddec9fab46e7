"""Stage: distil teachers into one student, by the method that its parameters name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from stillhouse.checkpoint import load_checkpoint, save_checkpoint
from stillhouse.config import parse
from stillhouse.datasets.reader import Dataset
from stillhouse.distillation import METHODS
from stillhouse.files import write_json
from stillhouse.networks.multi_task import parameter_count
from stillhouse.processor import use_one_core
from tasks.curve import Curve
from tasks.production import FOLDER, student_path
from tasks.stage import RETRAINING, StageContext, main


def distill_student(context: StageContext) -> None:
    """Datasets, teachers or what makes teachers to a student's checkpoint, its learning curve and its agreement."""
    use_one_core()
    block = dict(context.block(f"distill_student.{context.name}"))
    # Sorted: the order of the names in a file must not change the student.
    environments = sorted(block.pop("environments"))
    block.pop("from_datasets", None)  # said by the deps
    initial = None
    if str(FOLDER) in context.deps:
        retraining = context.block(RETRAINING)
        initial = load_checkpoint(student_path(context.name), context.device).network
        block["updates"] = retraining["updates"]
    method = block["method"]
    # By name: this stage depends on the code of its own method only.
    module = importlib.import_module(f"stillhouse.distillation.{method}")
    distillation_class, config_class = (getattr(module, name) for name in METHODS[method])
    config = parse(config_class, block, f"distill_student.{context.name}")
    # The stage's deps say what this method reads.
    teachers = {
        name: load_checkpoint(Path(f"data/teachers/{name}-s{context.seed}"), context.device)
        for name in environments
        if f"data/teachers/{name}-s{context.seed}" in context.deps
    }
    digests = {name: teacher.digest for name, teacher in teachers.items()}
    datasets = {
        name: Dataset.open(Path(f"data/datasets/{name}-s{context.seed}"), digests.get(name, ""))
        for name in environments
        if f"data/datasets/{name}-s{context.seed}" in context.deps
    }
    digests |= {name: dataset.schema.teacher for name, dataset in datasets.items()}
    networks = {name: teacher.network for name, teacher in teachers.items()}
    run = (context.random_seed, context.device)
    if method == "offline":
        distillation = distillation_class(config, datasets, *run, networks, initial)
    elif method == "on_policy":
        acting = _environments(context, environments)
        distillation = distillation_class(config, networks, acting, *run, datasets)
    else:  # online: it trains its teachers itself
        settings = {name: context.block(f"train_teacher.{name}") for name in environments}
        distillation = distillation_class(config, settings, _environments(context, environments), *run)
    columns = {"eval/agreement": "agreement", "loss/distill": "loss"}
    columns |= {f"agreement/{name}": f"agreement_{name}" for name in environments}
    if method == "online":
        columns |= {
            f"{who}/{name}": f"{who}_{name}" for name in environments for who in ("teacher", "student")
        }
    curve = Curve(context, "env_steps" if method == "online" else "updates", columns)
    curve.follow(distillation)

    path = Path("data/students") / f"{context.name}-s{context.seed}"
    student = distillation.student()
    curve.write(path.with_name(f"{path.name}.csv"))
    best = distillation.best
    write_json(
        path.with_name(f"{path.name}.json"),
        {
            # Where no row is held out, none is measured.
            "agreement": best.get("eval/agreement"),
            "agreements": {
                name: best[f"agreement/{name}"] for name in environments if f"agreement/{name}" in best
            },
            "losses": {name: best[f"loss/{name}"] for name in environments},
            "updates": distillation.updates,
            "best_update": int(best["update"]),
            "env_steps": 0 if method == "offline" else distillation.env_steps,
            "parameters": parameter_count(student),
            "teacher_parameters": distillation.teacher_parameters,
            "output": student.spec.output,
        },
    )
    details = {
        "environments": {name: context.block(f"environments.{name}") for name in environments},
        "teachers": digests,
        "distillation": config.model_dump(mode="json"),
        "seed": context.seed,
    }
    save_checkpoint(path, student, details)


def _environments(context: StageContext, names: list[str]) -> dict[str, Any]:
    """The settings of the environments that a method acts in."""
    # By name too: a student that never acts does not depend on the environments' code. Who acts imports it anyway.
    config_class = importlib.import_module("stillhouse.envs.make").EnvironmentConfig
    return {name: parse(config_class, context.block(f"environments.{name}"), name) for name in names}


if __name__ == "__main__":
    main(distill_student)
