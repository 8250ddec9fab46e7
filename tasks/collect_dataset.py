"""Stage: let a teacher play and keep what it saw and thought; or keep what it saw while it learnt."""

from __future__ import annotations

import sys
from pathlib import Path

from stillhouse.checkpoint import load_checkpoint, load_state
from stillhouse.config import parse
from stillhouse.datasets.collect import CollectConfig, Teacher, check_size, collect
from stillhouse.datasets.from_replay import write_replay
from stillhouse.datasets.reader import Dataset
from stillhouse.datasets.schema import row_bytes
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.evaluation.rollouts import evaluate, network_policy
from stillhouse.files import write_json
from stillhouse.networks.multi_task import parameter_count
from stillhouse.processor import use_one_core
from tasks.stage import StageContext, main

# Greedy episodes by which a teacher is judged before it is asked to play.
VALIDATION_EPISODES = 32


def collect_dataset(context: StageContext) -> None:
    """A teacher's checkpoint to a dataset of its play, or its training state's replay to one with its final outputs."""
    use_one_core()
    name, seed, random_seed = context.name, context.seed, context.random_seed
    environment = parse(EnvironmentConfig, context.block(f"environments.{name}"), f"environments.{name}")
    block = dict(context.block(f"collect_dataset.{name}"))
    from_replay = block.pop("from_replay")
    config = parse(CollectConfig, block, f"collect_dataset.{name}")
    checkpoint = load_checkpoint(Path("data/teachers") / f"{name}-s{seed}", context.device)
    spec = checkpoint.network.spec.environments[name]
    path = Path("data/datasets") / f"{name}-s{seed}"
    size = row_bytes(spec) * config.transitions
    most = "at most " if from_replay else ""
    print(f"{context.stage}: will take {most}{size / 2**20:.1f} MiB", file=sys.stderr, flush=True)
    if not from_replay:  # before the teacher is judged, which takes longer than to say no
        check_size(spec, config.transitions, config.maximum_bytes, path)
    policy = network_policy(checkpoint.network, name, context.device)
    judged = evaluate(policy, environment, VALIDATION_EPISODES, random_seed, stream="validation")
    teacher = Teacher(
        policy=policy,
        output=checkpoint.network.spec.output,
        digest=checkpoint.digest,
        parameters=parameter_count(checkpoint.network),
        mean_return=float(judged.returns.mean()),
    )
    if from_replay:
        replay = load_state(Path("data/training_state") / f"{name}-s{seed}")["replay"]
        reports = write_replay(replay, teacher, environment.id, spec, config, path)
    else:
        reports = collect(teacher, environment, config, random_seed, path)
    for report in reports:
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
