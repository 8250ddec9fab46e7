"""Stage: train one teacher on one environment."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stillhouse.agents import continue_training, continued_settings, make_learner
from stillhouse.checkpoint import load_checkpoint, load_state, save_checkpoint, save_state
from stillhouse.config import parse
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.files import write_json
from stillhouse.networks.multi_task import parameter_count, scale_head
from stillhouse.processor import use_one_core
from tasks.curve import LEARNER_COLUMNS, Curve
from tasks.production import FOLDER, part
from tasks.stage import RETRAINING, StageContext, main


def train_teacher(context: StageContext) -> None:
    """The environment and the algorithm's settings to a checkpoint, its training state and its learning curve."""
    use_one_core()
    environment = parse(EnvironmentConfig, context.block(f"environments.{context.name}"), context.name)
    settings = context.block(f"train_teacher.{context.name}")
    before = 0
    retraining = context.block(RETRAINING) if str(FOLDER) in context.deps else None
    if retraining:
        settings = continued_settings(settings, retraining["env_steps"], retraining["learning_rate_factor"])
    learner = make_learner(settings, context.name, environment, context.random_seed, context.device)
    if retraining:
        teacher = load_checkpoint(part("teachers", context.name))
        before = teacher.details["env_steps"]
        state = load_state(part("training_state", context.name))
        continue_training(learner, state, teacher.details["algorithm"], teacher.network.spec)
    columns = {"rollout/return": "mean_return"} | LEARNER_COLUMNS[learner.network.spec.output]
    curve = Curve(context, "env_steps", columns)
    curve.follow(learner)

    folder = Path("data/teachers")
    stem = f"{context.name}-s{context.seed}"
    state = learner.get_state()
    details = {
        "environments": {context.name: environment.model_dump(mode="json")},
        "algorithm": settings["algorithm"],
        "env_steps": before + learner.env_steps,
        "seed": context.seed,
    }
    save_state(Path("data/training_state") / stem, state)
    curve.write(folder / f"{stem}.csv")
    recent = state["recent_returns"]
    write_json(
        folder / f"{stem}.json",
        {
            "env_steps": before + learner.env_steps,
            "episodes": learner.episodes,
            "mean_return": float(np.mean(recent)) if recent else None,
            "parameters": parameter_count(learner.network),
            "algorithm": settings["algorithm"],
            # Episodes that an interruption cut because the environment could not be brought back exactly.
            "cut_episodes": learner.envs.cut_episodes,
        },
    )
    # The training state keeps the learner's own scale; a checkpoint's Q-values are in the environment's rewards.
    scale_head(learner.network, context.name, 1 / learner.reward_scale)
    save_checkpoint(folder / stem, learner.network, details)


if __name__ == "__main__":
    main(train_teacher)
