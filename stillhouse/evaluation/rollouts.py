"""Play episodes and keep their returns: fixed seeds, fixed quotas, nothing cut silently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from stillhouse.config import Config
from stillhouse.envs.make import EnvironmentConfig, make
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.exploration import epsilon_greedy
from stillhouse.networks.multi_task import MultiTaskNetwork
from stillhouse.seeding import generator
from stillhouse.types import Policy

STEP_CAP = 10_000  # env steps of an episode, where the environment has no time limit of its own


class EvaluationConfig(Config):
    """How agents are judged."""

    episodes: int = Field(default=100, ge=1, le=100_000, description="episodes per agent and environment")
    epsilon: float = Field(
        default=0.05, ge=0, le=1, description="share of random actions in the second, not greedy, evaluation"
    )
    num_envs: int = Field(default=32, ge=1, le=1024, description="copies of the environment stepped together")


@dataclass(frozen=True)
class Episodes:
    """Finished episodes, in an order that does not depend on their lengths.

    Attributes:
        returns: undiscounted, float64 [E].
        lengths: in env steps, int64 [E].
        capped: bool [E], True where the step cap ended the episode, not the environment.
    """

    returns: np.ndarray
    lengths: np.ndarray
    capped: np.ndarray

    def summary(self) -> dict[str, float | list[float]]:
        """What the results keep: the mean return, every return, the share that was capped."""
        return {
            "mean": float(self.returns.mean()),
            "returns": [float(value) for value in self.returns],
            "capped_share": float(self.capped.mean()),
        }


def evaluate(
    policy: Policy,
    environment: EnvironmentConfig,
    episodes: int,
    seed: int,
    epsilon: float = 0.0,
    num_envs: int = 32,
    stream: Literal["test", "validation", "promotion", "confirmation"] = "test",
) -> Episodes:
    """Play ``episodes`` episodes with the policy's best action, or a random one with probability ``epsilon``.

    Every copy of the environment has a quota of episodes, fixed beforehand, and what it plays beyond is not
    counted: taking the first ``episodes`` to finish would count short episodes too often.

    Args:
        policy: observations [B, ...] to one output per action [B, A]; not called where ``epsilon`` is 1.
        environment: what to play.
        episodes: how many episodes.
        seed: the stage's seed.
        epsilon: share of uniformly random actions; 1 is random play.
        num_envs: copies stepped together (never more than episodes).
        stream: the episodes' and the random actions' stream; no two streams share an episode, and none shares one
            with training.

    Raises:
        StillhouseError: the environment cannot be made, or the policy's outputs are not finite.
    """
    capped_here = _time_limit(environment) is None
    if capped_here:
        environment = environment.model_copy(update={"max_episode_steps": STEP_CAP})
    copies = min(num_envs, episodes)
    quota = np.full(copies, episodes // copies)
    quota[: episodes % copies] += 1
    first = np.cumsum(quota) - quota  # where each copy's episodes start in the results
    played = np.zeros(copies, np.int64)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    capped = np.zeros(episodes, np.bool_)
    random = generator(seed, "epsilon", stream)

    envs = VectorEnvironment(environment, copies, seed, stream)
    try:
        actions_count = envs.spec.actions
        observations, starts = envs.reset(), np.ones(copies, np.bool_)
        while (played < quota).any():
            if epsilon < 1:
                outputs = policy_outputs(policy, observations, starts)
                if not np.isfinite(outputs).all():
                    raise StillhouseError(
                        f"{environment.id}: the policy's outputs are not finite numbers, so it cannot be "
                        "evaluated; its training diverged: lower the learning rate or clip its gradients"
                    )
            else:
                outputs = np.zeros((copies, actions_count))
            step = envs.step(epsilon_greedy(outputs, epsilon, random))
            observations, starts = step.observations, step.starts
            if len(step.ended):
                counted = played[step.ended] < quota[step.ended]
                rows = step.ended[counted]
                slots = first[rows] + played[rows]
                returns[slots] = step.episode_returns[counted]
                lengths[slots] = step.episode_lengths[counted]
                capped[slots] = capped_here & step.truncated[rows] & (lengths[slots] >= STEP_CAP)
                played[rows] += 1
    finally:
        envs.close()
    return Episodes(returns, lengths, capped)


class MemoryPolicy:
    """A network with a memory as a policy: :func:`policy_outputs` tells it where episodes begin.

    Args:
        network: in evaluation mode.
        environment: the environment's name in the network.
        device: where the network is.
    """

    def __init__(self, network: MultiTaskNetwork, environment: str, device: str = "cpu") -> None:
        self._network, self._environment, self._device = network, environment, device
        self._state = network.initial_state(0)

    @torch.inference_mode()
    def step(self, observations: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The outputs [B, A] for observations [B, ...] that follow the last ones, or begin an episode where ``starts`` [B]."""
        if starts.all():  # perhaps of another number of copies
            self._state = self._network.initial_state(len(starts))
        given = torch.from_numpy(observations).to(self._device)
        begins = torch.from_numpy(starts).to(self._device)
        features, states = self._network.unroll(given[None], self._environment, self._state, begins[None])
        self._state = states[0]
        return self._network.head(features[0], self._environment).to("cpu", torch.float32).numpy()

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """Raises StillhouseError: for observations out of their order there are no outputs."""
        outputs: np.ndarray = self._network(torch.from_numpy(observations), self._environment)
        return outputs


def policy_outputs(policy: Policy, observations: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """What a policy, with a memory or without, gives as episodes are played, [B, A].

    Args:
        policy: asked once a step.
        observations: [B, ...].
        starts: bool [B], rows that begin an episode; all of them at first.
    """
    return policy.step(observations, starts) if isinstance(policy, MemoryPolicy) else policy(observations)


def network_policy(network: MultiTaskNetwork, environment: str, device: str = "cpu") -> Policy:
    """A network's outputs for one of its environments as a policy on arrays, without gradients.

    Args:
        network: called as ``network(observations, environment)``, gives [B, A]; one with a memory becomes a :class:`MemoryPolicy`.
        environment: the environment's name in the network.
        device: where the network is.
    """
    network.eval()
    if network.spec.size.recurrent != "none":
        return MemoryPolicy(network, environment, device)

    def policy(observations: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            outputs: torch.Tensor = network(torch.from_numpy(observations).to(device), environment)
            return outputs.to("cpu", torch.float32).numpy()

    return policy


def _time_limit(environment: EnvironmentConfig) -> int | None:
    """The environment's own time limit in env steps, or None."""
    if environment.max_episode_steps:
        return environment.max_episode_steps
    env = make(environment)
    try:
        return env.spec.max_episode_steps if env.spec is not None else None
    finally:
        env.close()
