"""Joint training: a learner for each environment, in step; what hard sharing, soft sharing and Distral have in common.

In rounds, with ``E`` learners of one algorithm:

    every learner acts by its present policy for a rollout (DQN: until a block of updates is due)
    for one minibatch of each, as long as all have one: an update, by the rule of the method

A method is such a rule (:class:`Rule`): it takes the minibatches backward, and then steps. An environment whose loss, gradient or
returns are not finite is found before anything of it has reached a parameter, and named: either the training stops there, or
that environment is left out from then on and the others go on (``when_diverging``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from stillhouse import seeding
from stillhouse.agents import ALGORITHMS, OUTPUTS, fresh_network, make_fresh_head
from stillhouse.config import Config, parse
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
from stillhouse.networks.parameters import FlatParameters
from stillhouse.types import Learner, Report


class JointConfig(Config):
    """What every method of joint training has in common, beside the learner's own settings."""

    reward_scales: dict[str, float] = Field(
        default_factory=dict,
        description="an environment's reward_scale, by name, where it is not the learner's",
    )
    when_diverging: Literal["stop", "leave_out"] = Field(
        default="stop",
        description="an environment whose loss is not finite: stop the training, or go on without it",
    )
    network: NetworkSize = NetworkSize(conv_channels=16, features=128, torso=(128,), layer_norm=True)

    @field_validator("reward_scales")
    @classmethod
    def _positive(cls, values: dict[str, float]) -> dict[str, float]:
        if not all(value > 0 for value in values.values()):
            raise ValueError("numbers greater than 0 are allowed")
        return values


class Rule(Protocol):
    """How a minibatch of every environment becomes an update."""

    def begin(self, returns: Sequence[float | None]) -> None:
        """A round begins: every learner has acted, with these mean returns so far; None before one is known."""
        ...

    def backward(self, batches: Mapping[str, Any]) -> Tensor:
        """Losses [E], of the environments that ``batches`` names (0 elsewhere); not finite where a gradient is not."""
        ...

    def step(self) -> None:
        """Apply the gradients of the last :meth:`backward`."""
        ...

    def leave_out(self, name: str) -> None:
        """Forget the environment's last gradient, and take nothing of it any more."""
        ...

    def metrics(self) -> dict[str, float]:
        """Of the last update, by the glossary's names."""
        ...

    def get_state(self) -> dict[str, Any]:
        """What the rule goes on from, besides the learners' parameters."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        ...


class JointTraining:
    """Trains several learners in step; iterate :meth:`train`.

    Args:
        network: of all environments.
        learners: one for each, by its name in the network: :func:`make_learners`.
        rule: of the method.
        env_steps: budget of each environment.
        when_diverging: as in :class:`JointConfig`.
        distilled: a network that the method distils from the learners' policies, beside the one they act by; the rule trains it.

    Attributes:
        diverged: environments that were left out, and after how many env steps of theirs.

    An environment's learner is not asked any more once it was left out: its state may hold what is not finite.
    """

    def __init__(
        self,
        network: MultiTaskNetwork,
        learners: Mapping[str, Learner],
        rule: Rule,
        env_steps: int,
        when_diverging: Literal["stop", "leave_out"],
        distilled: MultiTaskNetwork | None = None,
    ) -> None:
        self.network = network
        self.distilled = distilled
        self.learners = dict(learners)
        self.rule = rule
        self.budget = env_steps
        self.when_diverging = when_diverging
        self.diverged: dict[str, int] = {}
        self._last_returns: dict[str, float | None] = {}  # of those
        self._losses = torch.zeros(len(self.learners))  # sums over the last round's updates
        self._updates = 0

    @property
    def env_steps(self) -> int:
        """Taken so far, all environments together."""
        return sum(self.env_steps_of(name) for name in self.learners)

    def env_steps_of(self, name: str) -> int:
        """Taken so far in an environment that is learnt from."""
        return self.diverged.get(name, self.learners[name].env_steps)

    def mean_return(self, name: str) -> float | None:
        """Over an environment's last episodes; None before one has finished."""
        if name in self.diverged:
            return self._last_returns[name]
        found = self.learners[name].recent_returns
        return float(np.mean(found)) if found else None

    @property
    def active(self) -> list[str]:
        """The environments that are still trained."""
        return [name for name in self.learners if name not in self.diverged]

    def train(self) -> Iterator[Report]:
        """Act and learn until every environment's budget is spent; a report per round, in env steps of all together.

        Raises:
            StillhouseError: a loss is not finite, and training is to stop then, or no other environment is left.
        """
        while min(self.learners[name].env_steps for name in self.active) < self.budget:
            for name in self.active:
                self.learners[name].act()
                if not np.isfinite(found := self.mean_return(name) or 0.0):
                    self._leave_out(name, "a return", found)
            names = self.active
            self.rule.begin([self.mean_return(name) for name in self.learners])
            self._losses.zero_()
            self._updates = 0
            # Copies with many reset rows (autoreset NEXT_STEP) may have fewer minibatches: the fewest count.
            for batches in zip(*(self.learners[name].batches() for name in names), strict=False):
                self._update(dict(zip(names, batches, strict=True)))
            total = sum(self.diverged.values()) + self.budget * len(self.active)
            yield Report(min(self.env_steps, total), total, self.metrics())

    def _update(self, batches: dict[str, Any]) -> None:
        losses = self.rule.backward({name: batches[name] for name in batches if name not in self.diverged})
        if not torch.isfinite(losses).all():
            for name, loss in zip(self.learners, losses.tolist(), strict=True):
                if not np.isfinite(loss):
                    self._leave_out(name, "the loss or its gradient", loss)
            losses = losses.nan_to_num(0.0, 0.0, 0.0)
        self.rule.step()
        self._losses += losses.cpu()
        self._updates += 1

    def _leave_out(self, name: str, what: str, value: float) -> None:
        learner = self.learners[name]
        reason = f"{name}: {what} became {value} after {learner.env_steps} env steps of {name}"
        advice = f"lower the learning rate or {name}'s reward scale, or check its rewards and observations"
        if self.when_diverging == "stop":
            raise StillhouseError(
                f"{reason}; the training has stopped, with the other environments as they were before; {advice}, or set "
                "when_diverging to leave_out"
            )
        if len(self.active) == 1:
            raise StillhouseError(
                f"{reason}, and no other environment is left; no result is written; {advice}"
            )
        sound = [found for found in learner.recent_returns if np.isfinite(found)]
        self._last_returns[name] = float(np.mean(sound)) if sound else None
        self.diverged[name] = learner.env_steps
        self.rule.leave_out(name)

    def metrics(self) -> dict[str, float]:
        """Of the last round: means of the learners' own over the environments, and each one's loss and return."""
        own = [self.learners[name].metrics() for name in self.active]
        metrics = {
            key: float(np.mean([each[key] for each in own]))
            for key in own[0]
            if key != "rollout/return" and all(key in each for each in own)
        }
        metrics["rollout/episodes"] = float(sum(self.learners[name].episodes for name in self.active))
        losses = (self._losses / max(1, self._updates)).tolist()
        for name, loss in zip(self.learners, losses, strict=True):
            if name not in self.diverged:
                metrics[f"loss/{name}"] = loss
            if (found := self.mean_return(name)) is not None:
                metrics[f"return/{name}"] = found
        return metrics | self.rule.metrics()

    def rescale_heads(self) -> None:
        """Bring the heads to the environments' own rewards: at the end, for a checkpoint."""
        for name in one_for_each_head(self.network):
            if (scale := self.learners[name].reward_scale) != 1:
                scale_head(self.network, name, 1 / scale)

    def get_state(self) -> dict[str, Any]:
        """The whole training state, between two reports."""
        learners = {name: self.learners[name].get_state() for name in self.active}
        for state in learners.values():
            del state["parameters"]
        return {
            "parameters": {name: found.get_state() for name, found in self._parameters().items()},
            "learners": learners,
            "rule": self.rule.get_state(),
            "diverged": dict(self.diverged),
            "last_returns": dict(self._last_returns),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self.diverged, self._last_returns = dict(state["diverged"]), dict(state["last_returns"])
        for name, parameters in self._parameters().items():
            parameters.set_state(state["parameters"][name])
        for name in self.active:
            learner = self.learners[name]
            learner.set_state({**state["learners"][name], "parameters": learner.parameters.get_state()})
        self.rule.set_state(state["rule"])
        for name in self.diverged:
            self.rule.leave_out(name)

    def _parameters(self) -> dict[str, FlatParameters]:
        """The learners', each once, by the first that has them."""
        found: dict[str, FlatParameters] = {}
        for name, learner in self.learners.items():
            if all(learner.parameters is not other for other in found.values()):
                found[name] = learner.parameters
        return found


def check_names(where: str, values: Mapping[str, Any], environments: Mapping[str, Any]) -> None:
    """Raises StillhouseError where a setting names an environment that there is not."""
    if unknown := sorted(set(values) - set(environments)):
        raise StillhouseError(
            f"{where}: {', '.join(unknown)} is not among the environments; allowed are {', '.join(environments)}"
        )


def one_for_each_head(network: MultiTaskNetwork) -> list[str]:
    """The environments, or one of them where all share a head."""
    return list(network.spec.environments)[: 1 if network.spec.size.share_head else None]


def parse_learner(settings: Mapping[str, Any], size: NetworkSize, where: str = "learner") -> Any:
    """An algorithm's settings, checked, with the joint network's size.

    Args:
        settings: with their ``algorithm``, without ``network``.
        size: of the joint network.
        where: how errors call the block.

    Raises:
        StillhouseError: unknown algorithm or parameter, or a value out of bounds.
    """
    algorithm = settings.get("algorithm")
    if algorithm not in ALGORITHMS:
        raise StillhouseError(
            f"{where}.algorithm: {algorithm!r} was given; allowed are {', '.join(ALGORITHMS)}"
        )
    if "network" in settings:
        raise StillhouseError(
            f"{where}.network: a learner without 'network' is allowed: the network is the joint one"
        )
    module = importlib.import_module(f"stillhouse.agents.{algorithm}")
    return parse(getattr(module, ALGORITHMS[algorithm][1]), {**settings, "network": size}, where)


def make_learners(
    learner: Any,
    environments: Mapping[str, EnvironmentConfig],
    reward_scales: Mapping[str, float],
    seed: int,
    device: str = "cpu",
    make: Callable[..., Any] | None = None,
) -> tuple[MultiTaskNetwork, dict[str, Learner]]:
    """One network for all environments, and a learner on each.

    With ``network.separate`` every learner has its own network and parameters, and is what
    :func:`stillhouse.agents.make_learner` makes with the seed ``derive(seed, name)``; else all learners train the same
    parameters, critics among them.

    Args:
        learner: settings: :func:`parse_learner`.
        environments: by their names, in the network's order.
        reward_scales: of some of them, in place of the learner's.
        seed: the stage's seed.
        device: of the network.
        make: called in place of the algorithm's class, with separate networks.

    Raises:
        StillhouseError: an unknown environment, spaces that no network takes, or several reward scales and one head.
    """
    check_names("reward_scales", reward_scales, environments)
    size: NetworkSize = learner.network
    scales = {name: reward_scales.get(name, learner.reward_scale) for name in environments}
    output = OUTPUTS[learner.algorithm]
    if size.share_head and len(set(scales.values())) > 1 and output == "q_values":
        raise StillhouseError(
            "network.share_head: one head cannot give Q-values on several reward scales; set share_head to false, or "
            "the same reward scale for all environments"
        )
    seeds = {name: seeding.derive(seed, name) for name in environments}
    configs = {name: learner.model_copy(update={"reward_scale": scale}) for name, scale in scales.items()}
    envs = {
        name: VectorEnvironment(environment, learner.num_envs, seeds[name], "train")
        for name, environment in environments.items()
    }
    spec = NetworkSpec(
        size=size, environments={name: each.spec for name, each in envs.items()}, output=output
    )
    network = build_network(spec, seeding.derive(seed, "network"))
    module = importlib.import_module(f"stillhouse.agents.{learner.algorithm}")
    learner_class = getattr(module, ALGORITHMS[learner.algorithm][0])
    if size.separate:
        alone = size.model_copy(update={"separate": False})
        for name, each in envs.items():
            fresh = fresh_network(alone, name, each.spec, output, seeds[name])
            network.of(name).load_state_dict(fresh.state_dict())
        network.to(device)
        make = make or learner_class
        return network, {
            name: make(configs[name], network.of(name), name, envs[name], seeds[name]) for name in envs
        }
    for name in one_for_each_head(network):
        make_fresh_head(network, name)
    network.to(device)
    given: dict[str, list[Any]]  # what else each learner gets
    if output == "q_values":
        parameters = module.build_parameters(learner, network)
        given = {name: [parameters] for name in envs}
    else:
        critics = {name: module.build_critic(learner, network, name, seeds[name]) for name in envs}
        beside = {f"critic.{name}": critic for name, critic in critics.items()}
        parameters = module.build_parameters(learner, network, beside)
        given = {name: [parameters, critics[name]] for name in envs}
    return network, {
        name: learner_class(configs[name], network, name, envs[name], seeds[name], *given[name])
        for name in envs
    }
