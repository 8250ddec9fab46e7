"""Stage: distil teachers into one student, by the method that its parameters name."""

from __future__ import annotations

import importlib
from pathlib import Path

from stillhouse.checkpoint import load_checkpoint, save_checkpoint
from stillhouse.config import parse
from stillhouse.datasets.reader import Dataset
from stillhouse.distillation import METHODS
from stillhouse.files import write_json
from stillhouse.networks.multi_task import parameter_count
from stillhouse.processor import use_one_core
from tasks.curve import Curve
from tasks.stage import StageContext, main


def distill_student(context: StageContext) -> None:
    """Datasets to a student's checkpoint, its learning curve and its agreement with each teacher."""
    use_one_core()
    block = dict(context.block(f"distill_student.{context.name}"))
    # Sorted: the order of the names in a file must not change the student.
    environments = sorted(block.pop("environments"))
    # By name: this stage depends on the code of its own method only.
    module = importlib.import_module(f"stillhouse.distillation.{block['method']}")
    distillation_class, config_class = (getattr(module, name) for name in METHODS[block["method"]])
    config = parse(config_class, block, f"distill_student.{context.name}")
    paths = {name: f"data/teachers/{name}-s{context.seed}" for name in environments}
    # The stage's deps say which of them this method reads.
    teachers = {
        name: load_checkpoint(Path(path), context.device)
        for name, path in paths.items()
        if path in context.deps
    }
    datasets = {
        name: Dataset.open(
            Path(f"data/datasets/{name}-s{context.seed}"), teachers[name].digest if name in teachers else ""
        )
        for name in environments
    }
    networks = {name: teacher.network for name, teacher in teachers.items()}
    distillation = distillation_class(config, datasets, context.seed, context.device, networks)
    columns = {"eval/agreement": "agreement", "loss/distill": "loss"}
    columns |= {f"agreement/{name}": f"agreement_{name}" for name in environments}
    curve = Curve(context, "updates", columns)
    if saved := context.scratch.load():
        distillation.set_state(saved["distillation"])
        curve.set_state(saved["curve"])
    for report in distillation.train():
        curve.record(report)
        if context.scratch.due():
            context.scratch.save({"distillation": distillation.get_state(), "curve": curve.get_state()})

    path = Path("data/students") / f"{context.name}-s{context.seed}"
    student = distillation.student()
    curve.write(path.with_name(f"{path.name}.csv"))
    write_json(
        path.with_name(f"{path.name}.json"),
        {
            "agreement": distillation.best["eval/agreement"],
            "agreements": {name: distillation.best[f"agreement/{name}"] for name in environments},
            "losses": {name: distillation.best[f"loss/{name}"] for name in environments},
            "updates": distillation.updates,
            "best_update": int(distillation.best["update"]),
            "parameters": parameter_count(student),
            "teacher_parameters": distillation.teacher_parameters,
            "output": student.spec.output,
        },
    )
    details = {
        "environments": {name: context.block(f"environments.{name}") for name in environments},
        "teachers": {name: dataset.schema.teacher for name, dataset in datasets.items()},
        "distillation": config.model_dump(mode="json"),
        "seed": context.seed,
    }
    save_checkpoint(path, student, details)


if __name__ == "__main__":
    main(distill_student)
