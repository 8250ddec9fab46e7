"""Stage: let a teacher play and keep what it saw and thought."""

from __future__ import annotations

import sys
from pathlib import Path

from stillhouse.checkpoint import load_checkpoint
from stillhouse.config import parse
from stillhouse.datasets.collect import CollectConfig, Teacher, collect
from stillhouse.datasets.reader import Dataset
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.evaluation.rollouts import evaluate, network_policy
from stillhouse.files import write_json
from stillhouse.networks.multi_task import parameter_count
from stillhouse.processor import use_one_core
from tasks.stage import StageContext, main

# Greedy episodes by which a teacher is judged before it is asked to play.
VALIDATION_EPISODES = 32


def collect_dataset(context: StageContext) -> None:
    """A teacher's checkpoint to a dataset of its play."""
    use_one_core()
    name, seed = context.name, context.seed
    environment = parse(EnvironmentConfig, context.block(f"environments.{name}"), f"environments.{name}")
    config = parse(CollectConfig, context.block(f"collect_dataset.{name}"), f"collect_dataset.{name}")
    checkpoint = load_checkpoint(Path("data/teachers") / f"{name}-s{seed}", context.device)
    policy = network_policy(checkpoint.network, name, context.device)
    judged = evaluate(policy, environment, VALIDATION_EPISODES, seed, stream="validation")
    teacher = Teacher(
        policy=policy,
        output=checkpoint.network.spec.output,
        digest=checkpoint.digest,
        parameters=parameter_count(checkpoint.network),
        mean_return=float(judged.returns.mean()),
    )
    path = Path("data/datasets") / f"{name}-s{seed}"
    for report in collect(teacher, environment, config, seed, path):
        if size := report.metrics.get("dataset/bytes"):
            print(f"{context.stage}: will take {size / 2**20:.1f} MiB", file=sys.stderr, flush=True)
        context.progress.update(report.done, report.total, "env steps", report.metrics)

    schema = Dataset.open(path).schema
    write_json(
        path.with_name(f"{path.name}.json"),
        {
            "transitions": schema.transitions,
            "episodes": schema.episodes,
            "mean_return": schema.mean_return,
            "mean_action_gap": schema.mean_action_gap,
            "teacher_greedy_return": teacher.mean_return,
            "bytes": sum(file.stat().st_size for file in path.iterdir()),
        },
    )


if __name__ == "__main__":
    main(collect_dataset)
