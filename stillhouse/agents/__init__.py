"""Agents: one file per algorithm, loaded by name so that a stage depends on the code of its own algorithm only."""

from __future__ import annotations

import importlib
from typing import Any

from stillhouse import seeding
from stillhouse.config import parse
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.networks.multi_task import (
    MultiTaskNetwork,
    NetworkSize,
    NetworkSpec,
    build_network,
    scale_head,
)
from stillhouse.types import EnvironmentSpec, Learner, OutputKind

ALGORITHMS = {
    "dqn": ("DQN", "DQNConfig"),
    "pqn": ("PQN", "PQNConfig"),
    "ppo": ("PPO", "PPOConfig"),
    "impala": ("IMPALA", "IMPALAConfig"),
    "unreal": ("UNREAL", "UNREALConfig"),
}
OUTPUTS: dict[str, OutputKind] = {
    "dqn": "q_values",
    "pqn": "q_values",
    "ppo": "logits",
    "impala": "logits",
    "unreal": "logits",
}

_FRESH_LOGITS = 0.01  # factor on a fresh policy head's weights: learning starts from a nearly uniform policy


def fresh_network(
    size: NetworkSize, name: str, environment: EnvironmentSpec, output: OutputKind, seed: int
) -> MultiTaskNetwork:
    """What a learner starts from: a network for one environment, its weights from the stage's ``seed``."""
    spec = NetworkSpec(size=size, environments={name: environment}, output=output)
    network = build_network(spec, seeding.derive(seed, "network"))
    make_fresh_head(network, name)
    return network


def make_fresh_head(network: MultiTaskNetwork, name: str) -> None:
    """Let a policy that has learnt nothing prefer nothing; Q-values stay as they were drawn."""
    if network.spec.output == "logits":
        scale_head(network, name, _FRESH_LOGITS)


def make_learner(
    settings: dict[str, Any],
    name: str,
    environment: EnvironmentConfig,
    seed: int,
    device: str = "cpu",
    network: MultiTaskNetwork | None = None,
) -> Learner:
    """A learner on an environment, from plain settings with their ``algorithm``.

    Args:
        settings: the algorithm's parameter block.
        name: the environment's name, which becomes the network's head.
        environment: where to act.
        seed: the stage's seed.
        device: of the network.
        network: to train on; a fresh one of the settings' size where none is given.

    Raises:
        StillhouseError: unknown algorithm or parameter, or spaces that it cannot handle.
    """
    algorithm = settings.get("algorithm")
    if algorithm not in ALGORITHMS:
        raise StillhouseError(f"algorithm: {algorithm!r} was given; allowed are {', '.join(ALGORITHMS)}")
    module = importlib.import_module(f"{__name__}.{algorithm}")
    learner_class, config_class = (getattr(module, part) for part in ALGORITHMS[algorithm])
    config = parse(config_class, settings, name)
    envs = VectorEnvironment(environment, config.num_envs, seed, "train")
    if network is None:
        network = fresh_network(config.network, name, envs.spec, OUTPUTS[algorithm], seed)
    learner: Learner = learner_class(config, network.to(device), name, envs, seed)
    return learner


# Of a training state: what was learnt; what it was learnt from is taken over row by row. Counters, which schedules follow,
# episodes and random streams are the new training's own.
_LEARNT = ("parameters", "popart", "target")


def continue_training(learner: Learner, state: dict[str, Any], algorithm: str, spec: NetworkSpec) -> None:
    """Let a fresh learner go on from another training's state: its weights, optimiser, target network and replay.

    Args:
        learner: of the same algorithm and network, that has not trained yet.
        state: what the other's ``get_state`` gave.
        algorithm: the other's.
        spec: of the other's network.

    Raises:
        StillhouseError: the two are not of one algorithm, or their networks not of one structure.
    """
    own_algorithm: str = learner.config.algorithm  # type: ignore[attr-defined] # every algorithm's settings name it
    if own_algorithm != algorithm:
        raise StillhouseError(
            f"{learner.environment}: a teacher trained by {algorithm} cannot be gone on with by {own_algorithm}; "
            f"give it algorithm {algorithm}, or start afresh"
        )
    if difference := _first_difference(learner.network.spec, spec):
        raise StillhouseError(
            f"{learner.environment}: the teacher to go on from is another network ({difference}); give it the same network and "
            "spaces, or start afresh"
        )
    own = learner.get_state()
    learner.set_state({**own, **{name: state[name] for name in _LEARNT if name in state}})
    if "replay" in state:
        learner.replay.take_over(state["replay"])  # type: ignore[attr-defined] # every learner with a replay has this one


def _first_difference(wanted: NetworkSpec, found: NetworkSpec) -> str:
    """What differs, in one phrase; empty where nothing does."""
    sides = [{**spec.size.model_dump(), **dict(spec)} for spec in (wanted, found)]
    names = [name for name in sides[0] if name != "size" and sides[0][name] != sides[1][name]]
    return f"{names[0]}: {sides[0][names[0]]!s} given, {sides[1][names[0]]!s} there" if names else ""


def continued_settings(
    settings: dict[str, Any], env_steps: int, learning_rate_factor: float
) -> dict[str, Any]:
    """An algorithm's settings for ``env_steps`` more: it explores as at its end, and learns at a share of its first rate."""
    algorithm = settings["algorithm"]
    module = importlib.import_module(f"{__name__}.{algorithm}")
    config = parse(getattr(module, ALGORITHMS[algorithm][1]), settings, algorithm).model_dump(mode="json")
    config |= {"env_steps": env_steps, "learning_rate": config["learning_rate"] * learning_rate_factor}
    if "epsilon_end" in config:
        config["epsilon_start"] = config["epsilon_end"]
    if "critic_warmup" in config:
        config["critic_warmup"] = 0.0  # its critic is no beginner
    return config
