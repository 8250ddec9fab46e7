"""A policy of two columns: a network that all environments share, and one of its own for each, whose logits are added.

    logits_e(s) = alpha h_0(s) + own_e(s)

Distral's task policies (:mod:`stillhouse.multi_task.distral`) as one network, which is saved, loaded, judged and shown like any other.
"""

from __future__ import annotations

from typing import NoReturn, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.errors import StillhouseError
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSpec


class TwoColumnSpec(NetworkSpec):
    """The environments' own columns (``size.separate``), and the one beside them."""

    shared_column: NetworkSpec
    alpha: float = Field(ge=0, le=1, description="factor on the shared column's logits")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.size.separate:
            raise ValueError(
                "the environments' own columns are separate networks: size.separate must be true"
            )
        if self.shared_column.environments != self.environments or self.output != "logits":
            raise ValueError("both columns must give logits, for the same environments")
        return self


class TwoColumnNetwork(MultiTaskNetwork):
    """Raw observations of a named environment -> the sum of both columns' logits.

    Attributes:
        shared_column: ``h_0``, for all environments.
    """

    spec: TwoColumnSpec

    def __init__(self, spec: TwoColumnSpec) -> None:
        super().__init__(spec)
        self.shared_column = MultiTaskNetwork(spec.shared_column)

    @property
    def feature_count(self) -> int:
        """Width of what :meth:`features` gives."""
        return self._own_count + self.shared_column.feature_count

    @property
    def _own_count(self) -> int:
        return super().of(next(iter(self.spec.environments))).feature_count

    def of(self, environment: str) -> NoReturn:
        """Raises StillhouseError: no network by itself is the environment's policy."""
        raise StillhouseError(
            f"{environment}: its policy is the sum of two columns, of which none can be taken alone; take the distilled policy, a network "
            "of its own, which Distral saves as a student"
        )

    def initial_state(self, batch: int) -> Tensor:
        """What the memory, which there is not, holds: [B, 0]."""
        return next(self.parameters()).new_zeros(batch, 0)

    def encode(self, observations: Tensor, environment: str) -> Tensor:
        """Both columns' adapters' outputs, side by side: [B, n], for raw observations [B, ...]."""
        own = super().of(environment)
        return torch.cat(
            [column.encode(observations, environment) for column in (own, self.shared_column)], 1
        )

    def features(self, observations: Tensor, environment: str) -> Tensor:
        """Both columns' torsos' outputs, the environment's own first: [B, feature_count], for raw observations [B, ...]."""
        own = super().of(environment)
        return torch.cat(
            [column.features(observations, environment) for column in (own, self.shared_column)], 1
        )

    def head(self, features: Tensor, environment: str) -> Tensor:
        """The logits [B, A] for both columns' features [B, feature_count]."""
        own, shared = features.split([self._own_count, self.shared_column.feature_count], 1)
        return join(
            super().of(environment).head(own, environment),
            self.shared_column.head(shared, environment),
            self.spec.alpha,
        )

    def unroll(
        self, observations: Tensor, environment: str, state: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`MultiTaskNetwork.unroll` does without a memory."""
        features = self.features(observations.flatten(0, 1), environment).unflatten(0, starts.shape)
        return features, state.expand(len(starts), *state.shape)


def join(own: Tensor, shared: Tensor, alpha: float) -> Tensor:
    """``alpha h_0 + own``, [B, A] of [B, A] each."""
    return torch.add(own, shared, alpha=alpha)


def join_columns(own: MultiTaskNetwork, shared: MultiTaskNetwork, alpha: float) -> TwoColumnNetwork:
    """Two networks as one; their parameters stay the same tensors, and are trained on as before.

    Args:
        own: of separate networks.
        shared: of the same environments.
        alpha: factor on the latter's logits.
    """
    spec = TwoColumnSpec(**dict(own.spec), shared_column=shared.spec, alpha=alpha)
    with torch.random.fork_rng(devices=[]):
        network = TwoColumnNetwork(spec)
    network.networks, network.shared_column = own.networks, shared
    return network
