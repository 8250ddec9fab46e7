"""Soft parameter sharing: a network for each environment, and a penalty that ties their weights.

With ``W_e`` environment e's tensor of one place in the network, ``m`` the environments' mean and ``lambda`` the strength, every
environment's learner descends its own loss plus the derivative of the sum, over all tied tensors, of

    l2_mean      lambda / 2 sum_e ||W_e - m||^2
    l2_pairs     lambda / 2 sum_{e < f} ||W_e - W_f||^2                  Duong et al. 2015, https://aclanthology.org/P15-2139
    trace_norm   lambda || [vec W_1, ..., vec W_E] ||_*                  Yang & Hospedales 2016, https://arxiv.org/abs/1606.04038

The trace (nuclear) norm is the sum of the singular values of the matrix with a row for each environment: a row space of few
dimensions is what they share. It is the paper's flattening along the last (task) axis, "LAF", tensor by tensor; its subgradient is
``U V^T`` of the thin singular value decomposition, without the singular values that are 0 (the paper's eq. 6).

Tied are the tensors of one place (an adapter's, a body's or the torso's) that have equal shape in all environments. Heads and
critics are each environment's own, as in hard sharing.

Deviations from the papers:

1. The penalty's gradient passes Adam and the clipping of the gradient's norm, as the loss's does.
2. The strength may change linearly over training (``strength_end``); it is constant in the papers.
3. Duong et al. tie two networks of which one is trained already; here all learn at once.
4. Yang & Hospedales start all networks from one that was trained on all tasks; here they start as they would alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from stillhouse.envs.make import EnvironmentConfig
from stillhouse.errors import StillhouseError
from stillhouse.multi_task.joint_training import (
    JointConfig,
    JointTraining,
    make_learners,
    parse_learner,
)
from stillhouse.networks.multi_task import NetworkSize
from stillhouse.types import Learner

# Singular values below 1e-3 of the largest count as 0: float32 tells no more of their squares.
_SMALLEST_SQUARE = 1e-6

Penalty = Literal["l2_mean", "l2_pairs", "trace_norm"]


class SoftSharingConfig(JointConfig):
    """Settings beside the learner's."""

    method: Literal["soft_sharing"] = Field(description="a network for each environment, tied by a penalty")
    penalty: Penalty = Field(default="l2_mean", description="what ties the environments' weights")
    strength: float = Field(default=1e-3, ge=0, le=1e6, description="of the penalty; 0 ties nothing")
    strength_end: float | None = Field(
        default=None, ge=0, le=1e6, description="what the strength changes to, linearly; null: it stays"
    )
    strength_fraction: float = Field(
        default=1.0, gt=0, le=1, description="share of the budget over which it changes"
    )
    network: NetworkSize = NetworkSize(
        conv_channels=16, features=128, torso=(128,), layer_norm=True, separate=True
    )

    @field_validator("network")
    @classmethod
    def _separate(cls, network: NetworkSize) -> NetworkSize:
        if not network.separate:
            raise ValueError(
                "every environment has a network of its own: separate must be true (hard_sharing is for one)"
            )
        return network


def soft_sharing(
    config: SoftSharingConfig,
    learner: Mapping[str, Any],
    environments: Mapping[str, EnvironmentConfig],
    seed: int,
    device: str = "cpu",
) -> JointTraining:
    """Joint training of a network for each environment.

    Args:
        config: settings.
        learner: the algorithm's settings, without ``network``; ``env_steps`` is each environment's.
        environments: where to act, by name.
        seed: the stage's seed.
        device: of the networks.

    Raises:
        StillhouseError: settings that do not fit each other, environments that no network takes, or networks with nothing of
            equal shape to tie.
    """
    settings = parse_learner(learner, config.network)
    network, learners = make_learners(settings, environments, config.reward_scales, seed, device)
    rule = TiedUpdate(config, learners, settings.env_steps, settings.max_gradient_norm)
    return JointTraining(network, learners, rule, settings.env_steps, config.when_diverging)


class TiedUpdate:
    """The rule of soft sharing: every learner steps its own parameters, after the penalty of all has been added.

    Args:
        config: settings.
        learners: by environment, each on parameters of its own.
        env_steps: each environment's budget.
        max_gradient_norm: of each environment's gradient, the penalty's part included; 0 does not clip.

    Raises:
        StillhouseError: nothing can be tied.
    """

    def __init__(
        self,
        config: SoftSharingConfig,
        learners: Mapping[str, Learner],
        env_steps: int,
        max_gradient_norm: float,
    ) -> None:
        self.config = config
        self.learners = dict(learners)
        self.strength = config.strength
        self._active = list(self.learners)
        self._env_steps = env_steps
        self._max_gradient_norm = max_gradient_norm
        self._penalty = 0.0
        self.tied = tied_places(self.learners)
        if not self.tied:
            raise StillhouseError(
                f"penalty: the networks of {', '.join(self.learners)} have no tensor of equal shape to tie; give the network a "
                "torso, whose layers have"
            )

    def begin(self, returns: Sequence[float | None]) -> None:
        config = self.config
        if config.strength_end is None:
            return
        done = min(self.learners[name].env_steps for name in self._active) / self._env_steps
        share = min(1.0, done / config.strength_fraction)
        self.strength = (1 - share) * config.strength + share * config.strength_end

    def backward(self, batches: Mapping[str, Any]) -> Tensor:
        losses = []
        for name, learner in self.learners.items():
            if name not in batches:
                losses.append(torch.zeros(()))
                continue
            learner.parameters.zero_gradient()
            loss = learner.backward(batches[name]).cpu()
            sound = torch.isfinite(learner.parameters.gradient.sum()).cpu()
            losses.append(torch.where(sound, loss, torch.nan))
        return torch.stack(losses)

    def step(self) -> None:
        self._penalty = self._add_penalty() if self.strength else 0.0
        for name in self._active:
            learner = self.learners[name]
            learner.parameters.step(learner.learning_rate, self._max_gradient_norm)

    def _add_penalty(self) -> float:
        """Add the penalty's gradients to the learners'; its value."""
        total = 0.0
        for places in self.tied.values():
            weights = torch.stack(
                [self.learners[name].parameters.values.data[places[name]] for name in self._active]
            )
            value, gradients = penalty(self.config.penalty, weights)
            for name, gradient in zip(self._active, gradients, strict=True):
                self.learners[name].parameters.gradient[places[name]].add_(gradient, alpha=self.strength)
            total += self.strength * value
        return total

    def leave_out(self, name: str) -> None:
        self._active.remove(name)

    def metrics(self) -> dict[str, float]:
        return {"sharing/penalty": self._penalty, "sharing/strength": self.strength}

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        pass


def tied_places(learners: Mapping[str, Learner]) -> dict[str, dict[str, slice]]:
    """What can be tied: by place in the network, where each environment's flat parameters hold it.

    A place is a parameter's name in the network without the observation's part: ``adapters.body.dense.weight``. Only those that all
    environments have in equal shape are there, and so no heads, which bear their environment's name.
    """
    found: dict[str, dict[str, slice]] = {}
    shapes: dict[str, set[torch.Size]] = {}
    for name, learner in learners.items():
        for key, parameter in learner.network.named_parameters():
            place = re.sub(r"^adapters\.[^.]+", "adapters", key)
            found.setdefault(place, {})[name] = learner.parameters.slices[key]
            shapes.setdefault(place, set()).add(parameter.shape)
    return {
        place: slices
        for place, slices in found.items()
        if len(slices) == len(learners) and len(shapes[place]) == 1
    }


def penalty(kind: Penalty, weights: Tensor) -> tuple[float, Tensor]:
    """A penalty of strength 1 on one place's tensors, and its (sub)gradient.

    Args:
        kind: which.
        weights: flattened, a row for each environment [E, n].

    Returns:
        The value, and the gradient [E, n].
    """
    if kind == "trace_norm":
        return _trace_norm(weights)
    apart = weights - weights.mean(0)
    if (
        kind == "l2_pairs"
    ):  # sum over pairs of squared differences = E times the sum of squares around the mean
        apart, scale = apart * len(weights), 1 / len(weights)
    else:
        scale = 1.0
    return scale * float(apart.square().sum()) / 2, apart


def _trace_norm(weights: Tensor) -> tuple[float, Tensor]:
    # From the eigenvectors of W W^T, [E, E]: with W = U S V^T it is U S^2 U^T, and U V^T = U S^-1 U^T W.
    squares, vectors = torch.linalg.eigh((weights @ weights.T).double())
    kept = squares > _SMALLEST_SQUARE * squares[-1]
    values = squares[kept].sqrt()
    vectors = vectors[:, kept]
    factors = (vectors / values) @ vectors.T
    return float(values.sum()), factors.to(weights.dtype) @ weights
