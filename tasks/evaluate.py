"""Stage: judge the teacher, random play and every student of a seed on one environment, on the same stream of episodes.

Where copies can be seeded one by one (all but Gymnasium's vectorised CartPole) these are the same episodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stillhouse.checkpoint import load_checkpoint
from stillhouse.config import parse
from stillhouse.envs.make import EnvironmentConfig
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
    # The students that include this environment are the stage's own deps; nothing is found by listing folders.
    students = [dep for dep in context.deps if dep.startswith("data/students/")]
    agents = {"teacher": f"data/teachers/{name}-s{seed}"}
    agents |= {Path(dep).name.removesuffix(f"-s{seed}"): dep for dep in students}

    def judge(path: str) -> dict[str, Any]:
        network = load_checkpoint(Path(path), context.device).network
        policy = network_policy(network, name, context.device)
        kinds = {"greedy": 0.0, "epsilon": config.epsilon}
        played = {
            kind: evaluate(policy, environment, config.episodes, seed, epsilon, config.num_envs).summary()
            for kind, epsilon in kinds.items()
        }
        return {**played, "parameters": parameter_count(network)}

    judged = {}
    for done, (agent, path) in enumerate(agents.items()):
        context.progress.update(done, len(agents) + 1, "agents")
        judged[agent] = judge(path)
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
            "teacher": judged.pop("teacher"),
            "students": judged,
        },
    )


if __name__ == "__main__":
    main(evaluate_environment)
