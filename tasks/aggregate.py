"""Stage: make one student of several of one structure, by averaging their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillhouse.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from stillhouse.config import parse
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.errors import StillhouseError
from stillhouse.files import write_json
from stillhouse.meta.aggregation import AggregationConfig, aggregate
from stillhouse.networks.multi_task import parameter_count
from stillhouse.processor import use_one_core
from tasks.stage import StageContext, main


def aggregate_students(context: StageContext) -> None:
    """Students' checkpoints to one, and to the report of what was taken of each."""
    use_one_core()
    where = f"aggregate.{context.name}"
    block = dict(context.block(where))
    members = {
        name: load_checkpoint(Path(f"data/students/{name}-s{context.seed}"), context.device)
        for name in block.pop("members")
    }
    teachers = _teachers(members)
    config = parse(AggregationConfig, block, where)
    networks = {name: member.network for name, member in members.items()}
    names = sorted(next(iter(networks.values())).spec.environments)
    environments = {
        name: parse(EnvironmentConfig, context.block(f"environments.{name}"), name) for name in names
    }
    found = aggregate(config, networks, environments, context.seed, context.device)

    path = Path("data/students") / f"{context.name}-s{context.seed}"
    write_json(
        path.with_name(f"{path.name}.json"),
        {
            **found.report,
            "parameters": parameter_count(found.network),
            "output": found.network.spec.output,
        },
    )
    details = {
        "environments": {name: made.model_dump(mode="json") for name, made in environments.items()},
        "teachers": teachers,
        "members": {name: member.digest for name, member in members.items()},
        "aggregation": config.model_dump(mode="json"),
        "seed": context.seed,
    }
    save_checkpoint(path, found.network, details)


def _teachers(members: dict[str, Checkpoint]) -> dict[str, Any]:
    """The digest of the teacher of each environment that the members name.

    Raises:
        StillhouseError: two members learnt an environment from different teachers.
    """
    found: dict[str, Any] = {}
    for name, member in members.items():
        for environment, digest in member.details.get("teachers", {}).items():
            if found.setdefault(environment, digest) != digest:
                raise StillhouseError(
                    f"{name}: learnt {environment} from the teacher {digest[:12]}, but another member from {found[environment][:12]}, and no "
                    "score against two teachers means anything; bring the students up to date first (`stillhouse run` does)"
                )
    return found


if __name__ == "__main__":
    main(aggregate_students)
