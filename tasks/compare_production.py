"""Stage: is the retrained student better than the one in production? Judged twice, on episodes that nobody has met before.

Both play greedily, the same episodes (where copies can be seeded one by one: all but Gymnasium's vectorised CartPole), whose
seeds are of this generation alone. Where an environment has no time limit, an episode is ended after 10,000 steps, and its return is what
it had by then; the share of such episodes is kept with the numbers. A score is (candidate - random) / (production - random) per environment. The candidate is better
where the geometric mean of the scores is above 1 in a large enough share of 10,000 resamples of the episodes, and no
environment's score is below the floor: on the first set of episodes, and again on a second.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from stillhouse.checkpoint import load_checkpoint
from stillhouse.config import Config, parse
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.evaluation.rollouts import Episodes, evaluate, network_policy
from stillhouse.evaluation.statistics import paired_improvement
from stillhouse.files import write_json
from stillhouse.processor import use_one_core
from tasks.production import read_production, student_path
from tasks.stage import StageContext, main

SETS: tuple[Literal["promotion", "confirmation"], ...] = ("promotion", "confirmation")
OUT = Path("data/evaluation/promotion.json")


class Thresholds(Config):
    """The part of the retraining block that this stage reads."""

    episodes: int
    probability: float
    floor: float


def compare_production(context: StageContext) -> None:
    """Two students to a decision, with the numbers that it rests on."""
    use_one_core()
    production = read_production()
    block = context.block("retraining")
    limits = parse(Thresholds, {name: block[name] for name in Thresholds.model_fields}, "retraining")
    networks = {
        "candidate": load_checkpoint(
            Path("data/students") / f"{context.name}-s{context.seed}", context.device
        ).network,
        "production": load_checkpoint(student_path(production.student), context.device).network,
    }

    def by_name(
        games: dict[str, list[Episodes]], values: Callable[[Episodes], np.ndarray]
    ) -> dict[str, dict[str, float]]:
        return {
            who: {
                name: float(values(played).mean())
                for name, played in zip(production.environments, each, strict=True)
            }
            for who, each in games.items()
        }

    found: dict[str, dict[str, Any]] = {}
    reasons = []
    for number, stream in enumerate(SETS):
        games: dict[str, list[Episodes]] = {who: [] for who in (*networks, "random")}
        for done, name in enumerate(production.environments):
            context.progress.update(
                number * len(production.environments) + done, 2 * len(production.environments), "environments"
            )
            environment = parse(EnvironmentConfig, context.block(f"environments.{name}"), name)
            for who, network in networks.items():
                policy = network_policy(network, name, context.device)
                played = evaluate(policy, environment, limits.episodes, context.random_seed, stream=stream)
                games[who].append(played)
            random = evaluate(_nothing, environment, limits.episodes, context.random_seed, 1.0, stream=stream)
            games["random"].append(random)
        matrices = {who: np.stack([played.returns for played in each], axis=1) for who, each in games.items()}
        probability, values = paired_improvement(
            matrices["candidate"], matrices["production"], matrices["random"], context.random_seed
        )
        # No score where production is no better than random play.
        scores = [float(value) if np.isfinite(value) else None for value in values]
        found[stream] = {
            "probability": probability,
            "scores": dict(zip(production.environments, scores, strict=True)),
            "returns": by_name(games, lambda played: played.returns),
            "capped_share": by_name(games, lambda played: played.capped),
        }
        if probability < limits.probability:
            reasons.append(
                f"{stream}: better with probability {probability:.3f}, needed {limits.probability:g}"
            )
        reasons += [
            f"{stream}: {name} at {'none' if score is None else f'{score:.3f}'} of production, the floor is {limits.floor:g}"
            for name, score in found[stream]["scores"].items()
            if score is None or score < limits.floor
        ]
    write_json(
        OUT,
        {
            "generation": block["generation"],
            "against": production.generation,
            "promote": not reasons,
            "reasons": reasons,
            "episodes": limits.episodes,
            **found,
        },
    )


def _nothing(_: np.ndarray) -> np.ndarray:
    """Outputs of no network: every action is the exploration's."""
    return torch.empty(0).numpy()


if __name__ == "__main__":
    main(compare_production)
