"""What the layers hand to each other: observation and action descriptions, policies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces

from stillhouse.config import Config
from stillhouse.errors import StillhouseError

if TYPE_CHECKING:
    from torch import Tensor

    from stillhouse.envs.vector import VectorEnvironment
    from stillhouse.networks.multi_task import MultiTaskNetwork
    from stillhouse.networks.parameters import FlatParameters

OutputKind = Literal["q_values", "logits"]

Policy = Callable[[np.ndarray], np.ndarray]
"""Observations [B, ...] in the environment's own type to one output per action, float32 [B, A]."""


class ObservationSpec(Config):
    """One observation, as networks and datasets see it.

    ``vector``: float32 [n]. ``discrete``: an integer in 0..n-1, shown to the network as one-hot. ``planes``: bool
    [H, W, C]. ``image``: uint8 [H, W, C]. Planes and images whose channels come first keep their order in memory;
    ``channels_first`` says so.
    """

    kind: Literal["vector", "discrete", "planes", "image"]
    shape: tuple[int, ...]
    channels_first: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type in which observations are kept."""
        return np.dtype(
            {"vector": "float32", "discrete": "int64", "planes": "bool", "image": "uint8"}[self.kind]
        )

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one stored observation: () for ``discrete``."""
        return () if self.kind == "discrete" else self.shape

    @property
    def key(self) -> str:
        """A name for everything of this shape, for example ``planes_10x10x4``: one adapter each."""
        order = "_first" if self.channels_first else ""
        return f"{self.kind}_{'x'.join(str(size) for size in self.shape)}{order}"


class EnvironmentSpec(Config):
    """What a network must know of an environment."""

    observation: ObservationSpec
    actions: int


def environment_spec(
    observation_space: gymnasium.Space[Any], action_space: gymnasium.Space[Any], where: str
) -> EnvironmentSpec:
    """Describe an environment's spaces.

    Raises:
        StillhouseError: a space that the algorithms cannot handle, naming it and what is supported.
    """
    if not isinstance(action_space, spaces.Discrete):
        raise StillhouseError(
            f"{where}: action space {action_space} is not supported: the algorithms choose among a finite set of actions, "
            "so the action space must be Discrete; discretise the actions in a wrapper of your own"
        )
    if action_space.start != 0:
        raise StillhouseError(
            f"{where}: action space {action_space} must start at 0; shift it in a wrapper of your own"
        )
    return EnvironmentSpec(
        observation=_observation_spec(observation_space, where), actions=int(action_space.n)
    )


def _observation_spec(space: gymnasium.Space[Any], where: str) -> ObservationSpec:
    if isinstance(space, spaces.Discrete) and space.start == 0:
        return ObservationSpec(kind="discrete", shape=(int(space.n),))
    if isinstance(space, spaces.Box):
        if len(space.shape) == 1:
            return ObservationSpec(kind="vector", shape=space.shape)
        if len(space.shape) == 3 and space.dtype in (np.bool_, np.uint8):
            kind: Literal["planes", "image"] = "planes" if space.dtype == np.bool_ else "image"
            first, second, third = space.shape
            # Square, or a handful of channels, with the odd axis in front: frame stacks such as (4, 84, 84).
            channels_first = first != second and (second == third or first <= 4 < third)
            if min((second, third) if channels_first else (first, second)) >= 3:
                return ObservationSpec(kind=kind, shape=space.shape, channels_first=channels_first)
    raise StillhouseError(
        f"{where}: observation space {space} is not supported: no adapter brings it to the features that a torso takes; there are adapters "
        "for Box with one axis (vectors), Box with three axes of bool or uint8 and sides of at least 3 (planes, images) and Discrete starting "
        f"at 0, so {_advice(space)}"
    )


def _advice(space: gymnasium.Space[Any]) -> str:
    """What to put between an environment and the network."""
    if isinstance(space, spaces.Discrete):
        return "subtract its start in a wrapper of your own"
    if isinstance(space, spaces.Box) and space.dtype in (np.bool_, np.uint8) and len(space.shape) == 2:
        height, width = space.shape
        return (
            f"give it an axis of channels: gymnasium.wrappers.ReshapeObservation(env, ({height}, {width}, 1))"
        )
    if isinstance(space, spaces.Box) and len(space.shape) == 3 and space.dtype not in (np.bool_, np.uint8):
        return "where its numbers are 0 to 255, make it uint8 with gymnasium.wrappers.DtypeObservation, else a vector with FlattenObservation"
    if space.is_np_flattenable:
        return "make it a vector with gymnasium.wrappers.FlattenObservation"
    return "give it observations of one fixed size in a wrapper of your own"


@dataclass(frozen=True)
class Report:
    """What a training loop yields as it goes on; between two of them its state may be saved.

    Attributes:
        done: env steps or updates so far.
        total: of how many.
        metrics: latest values by name; names of one glossary (``docs/glossary.md``).
    """

    done: int
    total: int
    metrics: dict[str, float]


class Learner(Protocol):
    """An agent that learns by acting: what training, transfer and the pipeline need of it.

    Alone it runs by :meth:`train`. From outside, several at a time on parameters that they share, it is driven in
    rounds: ``act()``, then for each of ``batches()`` a ``backward(batch)`` between ``parameters.zero_gradient()`` and
    ``parameters.step(learning_rate)``. That is all that ``train`` does.
    """

    network: MultiTaskNetwork
    environment: str
    reward_scale: float  # its outputs are of rewards times this; 1 for logits
    envs: VectorEnvironment
    parameters: FlatParameters  # its own, or shared with other learners
    learning_rate: float  # of the present round's updates
    env_steps: int
    episodes: int
    recent_returns: deque[float]  # of the last episodes

    def train(self) -> Iterator[Report]:
        """Act and learn until the budget is spent."""
        ...

    def act(self) -> None:
        """Begin a round: play with the present policy, and compute what to learn from it."""
        ...

    def batches(self) -> Iterator[Any]:
        """The round's minibatches, in their order; of a type of the learner's own."""
        ...

    def backward(self, batch: Any) -> Tensor:
        """Add the gradient of the minibatch's loss to ``parameters.gradient``; the loss, a scalar without a gradient."""
        ...

    def metrics(self) -> dict[str, float]:
        """Of the present round, by the glossary's names."""
        ...

    def outputs(self, observations: np.ndarray) -> np.ndarray:
        """Q-values or logits, float32 [B, A], for raw observations [B, ...]: a :data:`Policy`."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The whole training state, between two reports."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        ...
