"""Hard parameter sharing: one network learns all environments, by any of the algorithms.

Caruana 1997, "Multitask Learning" (https://doi.org/10.1023/A:1007379606734): a body shared by all tasks, a head for each.
With ``L_e`` the learner's loss on a minibatch of environment e, each update descends

    sum_e w_e L_e

on the network's and all critics' parameters together, with weights, or gradients, balanced by a method of
:mod:`stillhouse.multi_task.balancing`; uniform: ``w_e = 1/E``.

This is the baseline of multi-task distillation: the same network with as many env steps, but without teachers (Multi-DQN of
Rusu et al. 2015, https://arxiv.org/abs/1511.06295, with ``algorithm: dqn``).

Deviations from the papers:

1. Every update takes a minibatch of every environment; Multi-DQN's come from one game at a time.
2. What is shared is decided by the network's size: with ``share_planes`` all but the first convolution and the heads. Critics are
   each environment's own, on shared features where the learner's are.
3. A pass through the network and a gradient is made for each environment, whatever balances them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from stillhouse.agents import OUTPUTS
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.multi_task.balancing import Balancer, BalancingConfig, make_balancer
from stillhouse.multi_task.joint_training import (
    JointConfig,
    JointTraining,
    check_names,
    make_learners,
    parse_learner,
)
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize
from stillhouse.types import Learner


class HardSharingConfig(JointConfig, BalancingConfig):
    """Settings beside the learner's."""

    method: Literal["hard_sharing"] = Field(
        default="hard_sharing", description="all environments share a body"
    )

    @field_validator("network")
    @classmethod
    def _shared(cls, network: NetworkSize) -> NetworkSize:
        if network.separate:
            raise ValueError(
                "one network is shared: separate must be false (soft_sharing is for separate ones)"
            )
        return network


def hard_sharing(
    config: HardSharingConfig,
    learner: Mapping[str, Any],
    environments: Mapping[str, EnvironmentConfig],
    seed: int,
    device: str = "cpu",
) -> JointTraining:
    """Joint training of one network.

    Args:
        config: settings.
        learner: the algorithm's settings, without ``network``; ``env_steps`` is each environment's.
        environments: where to act, by name.
        seed: the stage's seed.
        device: of the network.

    Raises:
        StillhouseError: settings that do not fit each other, or environments that no network takes.
    """
    for where in ("weights", "reference_returns"):
        check_names(where, getattr(config, where), environments)
    settings = parse_learner(learner, config.network)
    network, learners = make_learners(settings, environments, config.reward_scales, seed, device)
    shared = shared_places(network, learners)
    output = OUTPUTS[settings.algorithm]
    balancer = make_balancer(config, list(environments), shared, output, seed, device)
    rule = SharedUpdate(network, learners, balancer, settings.max_gradient_norm)
    return JointTraining(network, learners, rule, settings.env_steps, config.when_diverging)


def shared_places(network: MultiTaskNetwork, learners: Mapping[str, Learner]) -> list[slice]:
    """Where, in the flat parameters, what two or more environments' ways have in common lies; neighbours merged."""
    ways = [{key for layer in network.layer_names(name) for key in layer} for name in learners]
    places: list[slice] = []
    for key, place in next(iter(learners.values())).parameters.slices.items():
        if sum(key in way for way in ways) < 2:
            continue
        if places and places[-1].stop == place.start:
            places[-1] = slice(places[-1].start, place.stop)
        else:
            places.append(place)
    return places


class SharedUpdate:
    """The rule of hard sharing: one gradient of all, on parameters that all learners have.

    Args:
        network: of all environments.
        learners: by environment, all on the same parameters.
        balancer: makes one gradient of theirs.
        max_gradient_norm: of the combined gradient; 0 does not clip.
    """

    def __init__(
        self,
        network: MultiTaskNetwork,
        learners: Mapping[str, Learner],
        balancer: Balancer,
        max_gradient_norm: float,
    ) -> None:
        self.network = network
        self.learners = dict(learners)
        self.balancer = balancer
        self.parameters = next(iter(self.learners.values())).parameters
        self._max_gradient_norm = max_gradient_norm
        self._left_out: set[str] = set()
        flat = self.parameters.gradient
        self._gradients = flat.new_zeros(len(self.learners), len(flat))
        self._losses = flat.new_zeros(len(self.learners))

    def begin(self, returns: Sequence[float | None]) -> None:
        self.balancer.begin(returns)

    def backward(self, batches: Mapping[str, Any]) -> Tensor:
        for index, name in enumerate(self.learners):
            if name in batches:
                self.parameters.zero_gradient()
                self._losses[index] = self.learners[name].backward(batches[name])
                self._gradients[index] = self.parameters.gradient
        # One sum of a row is not finite where any of it is not.
        return torch.where(torch.isfinite(self._gradients.sum(1)), self._losses, torch.nan)

    def step(self) -> None:
        self.parameters.gradient.copy_(self.balancer.combine(self._gradients, self._losses))
        learning_rate = max(
            learner.learning_rate for name, learner in self.learners.items() if name not in self._left_out
        )
        self.parameters.step(learning_rate, self._max_gradient_norm)

    def leave_out(self, name: str) -> None:
        index = list(self.learners).index(name)
        self._left_out.add(name)
        self._gradients[index] = 0
        self._losses[index] = 0
        self.balancer.leave_out(index)
        trained = {
            key
            for other in self.learners
            if other not in self._left_out
            for key in self.parameters.slices
            if key.startswith(f"critic.{other}.")
            or any(key in layer for layer in self.network.layer_names(other))
        }
        # Adam's averages would go on moving what nobody trains any more.
        self.parameters.set_pace(dict.fromkeys(self.parameters.slices.keys() - trained, 0.0))

    def metrics(self) -> dict[str, float]:
        weights = zip(self.learners, self.balancer.weights.tolist(), strict=True)
        return {f"weight/{name}": weight for name, weight in weights} | self.balancer.metrics()

    def get_state(self) -> dict[str, Any]:
        return {"balancer": self.balancer.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.balancer.set_state(state["balancer"])
