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


# Of a training state: what was learnt, and what it was learnt from. Counters, which schedules follow, episodes and random
# streams are the new training's own.
_LEARNT = ("parameters", "target", "replay")


def continue_training(learner: Learner, state: dict[str, Any]) -> None:
    """Let a fresh learner go on from another training's state: its weights, optimiser, target network and replay.

    Args:
        learner: of the same algorithm and network, that has not trained yet.
        state: what the other's ``get_state`` gave.
    """
    own = learner.get_state()
    learner.set_state({**own, **{name: state[name] for name in _LEARNT if name in state}})
    if "replay" in state:
        learner.replay.drop_open()  # type: ignore[attr-defined] # the other's episodes are not gone on with


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
