"""Stage: judge the teacher, random play and every student and joint network of a seed on one environment, on the same stream
of episodes.

Where copies can be seeded one by one (all but Gymnasium's vectorised CartPole) these are the same episodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stillhouse.checkpoint import Checkpoint, load_checkpoint
from stillhouse.config import parse
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import EvaluationConfig, evaluate, network_policy
from stillhouse.files import write_json
from stillhouse.networks.multi_task import parameter_count
from stillhouse.processor import use_one_core
from tasks.stage import StageContext, main


def evaluate_environment(context: StageContext) -> None:
    """Checkpoints to returns, greedy and with a little noise, on the test stream's episodes."""
    use_one_core()
    name, seed = context.name, context.seed
    environment = parse(EnvironmentConfig, context.block(f"environments.{name}"), name)
    config = parse(EvaluationConfig, context.block("evaluate"), "evaluate")
    # The networks that know this environment are the stage's own deps; nothing is found by listing folders.
    paths = [
        dep
        for dep in context.deps
        if dep.startswith(("data/teachers/", "data/students/", "data/multi_task/"))
    ]
    networks = {path: load_checkpoint(Path(path), context.device) for path in paths}
    teacher = f"data/teachers/{name}-s{seed}"
    for path, checkpoint in networks.items():
        check_teacher(path, checkpoint, name, networks[teacher].digest)

    judged: dict[str, dict[str, Any]] = {}
    for path, checkpoint in networks.items():
        context.progress.update(len(judged), len(networks) + 1, "agents")
        policy = network_policy(checkpoint.network, name, context.device)
        kinds = {"greedy": 0.0, "epsilon": config.epsilon}
        played = {
            kind: evaluate(policy, environment, config.episodes, seed, epsilon, config.num_envs).summary()
            for kind, epsilon in kinds.items()
        }
        judged[path] = {**played, "parameters": parameter_count(checkpoint.network)}

    def below(folder: str) -> dict[str, dict[str, Any]]:
        return {
            Path(path).name.removesuffix(f"-s{seed}"): judged[path]
            for path in paths
            if path.startswith(folder)
        }

    # Random play needs outputs of no network: every action is the exploration's.
    random = evaluate(
        lambda _: torch.empty(0).numpy(), environment, config.episodes, seed, 1.0, config.num_envs
    )
    write_json(
        Path("data/evaluation") / f"{name}-s{seed}.json",
        {
            "environment": name,
            "seed": seed,
            "episodes": config.episodes,
            "epsilon": config.epsilon,
            "random": random.summary(),
            "teacher": judged[teacher],
            "students": below("data/students/"),
            "joint": below("data/multi_task/"),
        },
    )


def check_teacher(path: str, student: Checkpoint, environment: str, teacher: str) -> None:
    """Raises StillhouseError where ``student`` names another teacher of ``environment`` than the one with this digest."""
    learnt_from = student.details.get("teachers", {}).get(environment, teacher)
    if learnt_from != teacher:
        raise StillhouseError(
            f"{path}: learnt {environment} from the teacher {learnt_from[:12]}, but data/teachers/ holds {teacher[:12]}, and a "
            "score against another teacher means nothing; bring the student up to date first (`stillhouse run` does)"
        )


if __name__ == "__main__":
    main(evaluate_environment)
