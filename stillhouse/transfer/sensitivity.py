"""What a progressive network reads of which column: average Fisher and perturbation sensitivity (Rusu et al. 2016,
arXiv:1606.04671, section 3 and their appendix).

    F_i^k = E_s,a~pi [ sum_m (d log pi(a | s) / d h_i^k(m))^2 var(h_i^k(m)) ],    AFS(i, k) = F_i^k / sum_k F_i^k
    Lambda_i^k = 1 / sigma^2,                                                     APS(i, k) = Lambda_i^k / sum_k Lambda_i^k

of layer i and column k; ``m`` runs over units, or maps with their positions. ``sigma`` is the standard deviation of Gaussian noise,
in those of the activations, that costs half of the return above random play.

Deviations from the paper:

1. F is summed over the units before columns are compared, so that columns may have other widths; the paper compares unit m with unit
   m.
2. A Q-network's policy is softmax(Q / tau), tau by its mean action gap.
3. ``sigma`` is found by bisection between 1/64 and 64; a layer that never costs half is reported at 64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse import seeding
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.evaluation.rollouts import evaluate
from stillhouse.transfer.kickstarting import policy_temperature
from stillhouse.transfer.progressive_networks import ProgressiveNetwork
from stillhouse.types import Policy

_STEPS, _COPIES = 32, 32  # of play, for the states
_LIMIT = 6.0  # noise between 2^-6 and 2^6
_HALVINGS = 6


def sensitivities(
    network: ProgressiveNetwork, name: str, environment: EnvironmentConfig, episodes: int, seed: int
) -> dict[str, Any]:
    """Both analyses of a trained network.

    Args:
        network: it.
        name: the target environment's.
        environment: where to play.
        episodes: for each noise level.
        seed: of states, episodes and noise.

    Returns:
        ``fisher`` and ``perturbation``, shares [layers][columns], the new column last; ``noise``, the sigmas [layers][columns]. The
        latter two are empty where the policy is no better than random play: noise has nothing to cost it.
    """
    observations = _states(network, name, environment, seed)
    spreads, fisher = _fisher(network, name, observations)
    random = _mean(network_policy(network, name), environment, episodes, seed, epsilon=1.0)
    if _mean(network_policy(network, name), environment, episodes, seed) <= random:
        return {"fisher": shares(fisher).tolist(), "perturbation": [], "noise": []}
    noise = np.zeros_like(fisher)
    for layer, column in np.ndindex(*fisher.shape):
        spread = spreads[column, layer]

        def noisy(sigma: float, place: tuple[int, int] = (column, layer), spread: Tensor = spread) -> float:
            generator = seeding.torch_generator(seed, "noise")

            def edit(at: int, number: int, hidden: Tensor) -> Tensor:
                if (at, number) != place:
                    return hidden
                drawn = torch.randn(hidden.shape, generator=generator).to(hidden.device)
                return hidden + sigma * spread * drawn

            return _mean(network_policy(network, name, edit), environment, episodes, seed)

        noise[layer, column] = half_life(noisy, random)
    precision = 1 / noise**2
    return {
        "fisher": shares(fisher).tolist(),
        "perturbation": shares(precision).tolist(),
        "noise": noise.tolist(),
    }


def shares(values: np.ndarray) -> np.ndarray:
    """Of each row's sum, [layers, columns]; equal ones where it is 0: the policy reads nothing of that layer."""
    total = values.sum(1, keepdims=True)
    equal = np.full_like(values, 1 / values.shape[1])
    return np.divide(values, total, out=equal, where=total > 0)


def half_life(score: Callable[[float], float], random: float) -> float:
    """The noise at which a score, which falls with it, is half way down to ``random``."""
    half = (score(0.0) + random) / 2
    low, high = -_LIMIT, _LIMIT
    if score(2.0**high) > half:
        return 2.0**high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if score(2.0**middle) > half else (low, middle)
    return float(2.0 ** ((low + high) / 2))


def network_policy(
    network: ProgressiveNetwork, name: str, edit: Callable[[int, int, Tensor], Tensor] | None = None
) -> Policy:
    """The network's outputs, with activations edited on the way."""

    device = next(network.parameters()).device

    @torch.inference_mode()
    def policy(observations: np.ndarray) -> np.ndarray:
        features = network.features(torch.from_numpy(observations).to(device), name, edit)
        return network.head(features, name).cpu().numpy()

    return policy


def _mean(
    policy: Policy, environment: EnvironmentConfig, episodes: int, seed: int, epsilon: float = 0.0
) -> float:
    return float(evaluate(policy, environment, episodes, seed, epsilon, stream="validation").returns.mean())


def _states(network: ProgressiveNetwork, name: str, environment: EnvironmentConfig, seed: int) -> Tensor:
    """States that the network meets in greedy play, from episodes' starts on, [N, ...]."""
    envs = VectorEnvironment(environment, _COPIES, seed, "validation")
    try:
        policy = network_policy(network, name)
        found = [envs.reset().copy()]
        for _ in range(_STEPS * 4 - 1):
            found.append(envs.step(policy(found[-1]).argmax(1)).observations.copy())
    finally:
        envs.close()
    return torch.from_numpy(np.concatenate(found[::4])).to(next(network.parameters()).device)


def _fisher(
    network: ProgressiveNetwork, name: str, observations: Tensor
) -> tuple[dict[tuple[int, int], Tensor], np.ndarray]:
    """Standard deviations [n] of the activations of every column and layer, and the summed Fisher information [layers, columns]."""
    probes: dict[tuple[int, int], Tensor] = {}
    spreads: dict[tuple[int, int], Tensor] = {}

    def edit(column: int, layer: int, hidden: Tensor) -> Tensor:
        spreads[column, layer] = hidden.detach().std(0, correction=0)
        probes[column, layer] = torch.zeros_like(hidden, requires_grad=True)
        return hidden + probes[column, layer]

    outputs = network.head(network.features(observations, name, edit), name)
    with torch.no_grad():
        temperature = policy_temperature(network, name, observations, network.spec.output)
    log_policy = torch.log_softmax(outputs / temperature, 1)
    columns = len(network.columns) + 1
    found = np.zeros((len(probes) // columns, columns))
    for action in range(log_policy.shape[1]):
        gradients = torch.autograd.grad(log_policy[:, action].sum(), list(probes.values()), retain_graph=True)
        for (column, layer), gradient in zip(probes, gradients, strict=True):
            squared = (gradient * spreads[column, layer]).square().sum(1)
            found[layer, column] += float((log_policy[:, action].detach().exp() * squared).mean())
    return spreads, found
