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

ALGORITHMS = {"dqn": ("DQN", "DQNConfig"), "pqn": ("PQN", "PQNConfig"), "ppo": ("PPO", "PPOConfig")}
OUTPUTS: dict[str, OutputKind] = {"dqn": "q_values", "pqn": "q_values", "ppo": "logits"}

_FRESH_LOGITS = 0.01  # factor on a fresh policy head's weights: learning starts from a nearly uniform policy


def fresh_network(
    size: NetworkSize, name: str, environment: EnvironmentSpec, output: OutputKind, seed: int
) -> MultiTaskNetwork:
    """What a learner starts from: a network for one environment, its weights from the stage's ``seed``."""
    spec = NetworkSpec(size=size, environments={name: environment}, output=output)
    network = build_network(spec, seeding.derive(seed, "network"))
    if output == "logits":
        scale_head(network, name, _FRESH_LOGITS)
    return network


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
