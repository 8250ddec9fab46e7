"""Stage: train one network on several environments at once, without teachers: the joint baseline of distillation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stillhouse import seeding
from stillhouse.checkpoint import save_checkpoint
from stillhouse.config import parse
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.files import write_json
from stillhouse.multi_task.hard_sharing import HardSharing, HardSharingConfig
from stillhouse.networks.multi_task import NetworkSpec, build_network, parameter_count
from stillhouse.processor import use_one_core
from tasks.curve import Curve
from tasks.stage import StageContext, main


def train_multi_task(context: StageContext) -> None:
    """Environments and settings to a checkpoint and its learning curve, a column for each environment."""
    use_one_core()
    block = dict(context.block(f"train_multi_task.{context.name}"))
    # Sorted: the order of the names in a file must not change the network.
    names = sorted(block.pop("environments"))
    config = parse(HardSharingConfig, block, f"train_multi_task.{context.name}")
    environments = {
        name: parse(EnvironmentConfig, context.block(f"environments.{name}"), name) for name in names
    }
    envs = {
        name: VectorEnvironment(environment, config.num_envs, context.seed, "train")
        for name, environment in environments.items()
    }
    spec = NetworkSpec(
        size=config.network, environments={name: env.spec for name, env in envs.items()}, output="q_values"
    )
    network = build_network(spec, seeding.derive(context.seed, "network")).to(context.device)
    learner = HardSharing(config, network, envs, context.seed)
    columns = {f"return/{name}": f"return_{name}" for name in names}
    curve = Curve(context, "env_steps", columns | {"loss/td": "loss", "rollout/epsilon": "epsilon"})
    curve.follow(learner)

    path = Path("data/multi_task") / f"{context.name}-s{context.seed}"
    curve.write(path.with_name(f"{path.name}.csv"))
    write_json(
        path.with_name(f"{path.name}.json"),
        {
            "env_steps": learner.env_steps,
            "mean_returns": {
                name: float(np.mean(rollout.recent_returns)) if rollout.recent_returns else None
                for name, rollout in learner.rollouts.items()
            },
            "parameters": parameter_count(network),
            "algorithm": config.algorithm,
        },
    )
    learner.rescale_heads()  # to the environments' own rewards
    details = {
        "environments": {
            name: environment.model_dump(mode="json") for name, environment in environments.items()
        },
        "algorithm": config.algorithm,
        "env_steps": learner.env_steps,
        "seed": context.seed,
    }
    save_checkpoint(path, network, details)


if __name__ == "__main__":
    main(train_multi_task)
