"""The one network of this project: adapters, a shared torso, which may have a memory, a head per environment.

A teacher is the case of one environment. Equal observation shapes share an adapter; with ``share_planes`` all planes of
equal sides share everything but the first convolution. With ``share_head`` there is one head, as wide as the largest
action set, of which every environment reads its first actions; the others are masked out of it. With ``separate`` nothing is
shared: every environment has a whole network of its own, and the one around them keeps them together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.config import Config
from stillhouse.errors import StillhouseError
from stillhouse.networks.adapters import (
    ConvolutionalAdapter,
    ImageConvolutions,
    PlanesConvolution,
    VectorAdapter,
    has_planes,
    height_width_channels,
    make_adapter,
)
from stillhouse.networks.recurrent import Memory
from stillhouse.types import EnvironmentSpec, OutputKind

# The key of the head that all environments share.
SHARED_HEAD = "shared_head"


class NetworkSize(Config):
    """Widths of a network."""

    conv_channels: int = Field(default=16, ge=1, le=1024, description="maps of the first convolution")
    share_planes: bool = Field(
        default=False,
        description="planes of equal sides share all but the first convolution, of which every environment has its own",
    )
    features: int = Field(default=128, ge=1, le=8192, description="width of every adapter's output")
    share_head: bool = Field(
        default=False,
        description="one head for all environments: action i is the same action everywhere, and what an environment lacks is masked",
    )
    torso: tuple[int, ...] = Field(default=(), max_length=16, description="widths of the shared dense layers")
    layer_norm: bool = Field(default=False, description="normalise after every layer but the heads")
    recurrent: Literal["none", "gru", "lstm"] = Field(
        default="none",
        description="a memory after the torso, as wide as its output; learnt by impala and unreal",
    )
    separate: bool = Field(
        default=False, description="a network of its own for every environment: they share nothing"
    )

    @model_validator(mode="after")
    def _separate_shares_nothing(self) -> Self:
        if self.separate and (self.share_planes or self.share_head):
            raise ValueError("separate networks share nothing: share_planes and share_head must be false")
        return self


class NetworkSpec(Config):
    """Everything needed to build a network: structure, not weights."""

    size: NetworkSize
    environments: dict[str, EnvironmentSpec]
    output: OutputKind


class Torso(nn.Module):
    """Shared dense layers, [B, features] -> [B, last width]."""

    def __init__(self, inputs: int, widths: tuple[int, ...], layer_norm: bool) -> None:
        super().__init__()
        sizes = (inputs, *widths)
        self.dense = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.norm = nn.ModuleList(nn.LayerNorm(b) if layer_norm else nn.Identity() for b in widths)
        self.outputs = sizes[-1]

    def layer(self, index: int, features: Tensor) -> Tensor:
        """One of the dense layers."""
        return functional.relu(self.norm[index](self.dense[index](features)))

    def forward(self, features: Tensor) -> Tensor:
        for index in range(len(self.dense)):
            features = self.layer(index, features)
        return features


class _Route(NamedTuple):
    """An environment's way through the network: keys of its modules; ``body`` may be ""."""

    adapter: str
    body: str
    head: str


class MultiTaskNetwork(nn.Module):
    """Raw observations of a named environment -> one output per action."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        size = spec.size
        self.adapters = nn.ModuleDict()
        self.bodies = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.networks = nn.ModuleDict()
        self._routes: dict[str, _Route] = {}
        if size.separate:
            alone = size.model_copy(update={"separate": False})
            for name, environment in spec.environments.items():
                own = NetworkSpec(size=alone, environments={name: environment}, output=spec.output)
                self.networks[name] = MultiTaskNetwork(own)
            return
        widths = (size.conv_channels, size.features, size.layer_norm)
        for name, environment in spec.environments.items():
            observation = environment.observation
            head = SHARED_HEAD if size.share_head else name
            if size.share_planes and has_planes(observation):
                height, width, _ = height_width_channels(observation)
                body = f"planes_{height}x{width}"
                self._routes[name] = _Route(name, body, head)
                first = PlanesConvolution(observation, size.conv_channels, size.layer_norm)
                self.adapters[name] = first
                if body not in self.bodies:
                    self.bodies[body] = VectorAdapter(first.outputs, size.features, size.layer_norm)
            else:
                self._routes[name] = _Route(observation.key, "", head)
                if observation.key not in self.adapters:
                    self.adapters[observation.key] = make_adapter(observation, *widths)
        self.torso = Torso(size.features, size.torso, size.layer_norm)
        self.memory = None if size.recurrent == "none" else Memory(size.recurrent, self.torso.outputs)
        widest = max(environment.actions for environment in spec.environments.values())
        for name, environment in spec.environments.items():
            if (key := self._routes[name].head) not in self.heads:
                self.heads[key] = nn.Linear(
                    self.torso.outputs, widest if size.share_head else environment.actions
                )

    def of(self, environment: str) -> MultiTaskNetwork:
        """The network on an environment's way: with ``separate`` its own, else this one."""
        return cast(MultiTaskNetwork, self.networks[environment]) if self.spec.size.separate else self

    @property
    def feature_count(self) -> int:
        """Width of what :meth:`features` gives."""
        if self.spec.size.separate:
            return self.of(next(iter(self.spec.environments))).feature_count
        return self.torso.outputs

    def initial_state(self, batch: int) -> Tensor:
        """What the memory holds before anything was seen, [B, state width]; of width 0 without a memory."""
        memory = self.of(next(iter(self.spec.environments))).memory
        return next(self.parameters()).new_zeros(batch, memory.state_width if memory else 0)

    def layers(self, environment: str) -> list[Callable[[Tensor], Tensor]]:
        """The way to the features, layer by layer: the first takes raw observations, each gives [B, n].

        Raises:
            StillhouseError: the network has a memory.
        """
        self.check_memoryless(environment)
        if self.spec.size.separate:
            return self.of(environment).layers(environment)
        torso = [partial(self.torso.layer, index) for index in range(len(self.torso.dense))]
        return [*self._way_in(environment).values(), *torso]

    def layer_forms(self, environment: str) -> list[tuple[int, int]]:
        """Of each layer, the maps and the positions of each; a dense layer's units are maps of one position."""
        if self.spec.size.separate:
            return self.of(environment).layer_forms(environment)
        forms = [
            (part.maps, part.outputs // part.maps)
            for part in self._way_in(environment).values()
            if isinstance(part, PlanesConvolution | ImageConvolutions)
        ]
        return [*forms, *((width, 1) for width in (self.spec.size.features, *self.spec.size.torso))]

    def layer_names(self, environment: str) -> list[list[str]]:
        """The parameters on an environment's way, layer by layer from the observations to the head."""
        if self.spec.size.separate:
            own = self.of(environment).layer_names(environment)
            return [[f"networks.{environment}.{name}" for name in layer] for layer in own]
        groups: list[tuple[str, ...]] = [(f"{prefix}.",) for prefix in self._way_in(environment)]
        groups += [(f"torso.dense.{i}.", f"torso.norm.{i}.") for i in range(len(self.torso.dense))]
        groups += [("memory.",)] if self.memory else []
        groups.append((f"heads.{self._routes[environment].head}.",))
        names = [name for name, _ in self.named_parameters()]
        return [[name for name in names if name.startswith(group)] for group in groups]

    def _way_in(self, environment: str) -> dict[str, nn.Module]:
        """The modules between an environment's observations and the torso, one a layer, by their names."""
        route = self._routes[environment]
        adapter = self.adapters[route.adapter]
        name = f"adapters.{route.adapter}"
        if isinstance(adapter, ConvolutionalAdapter):
            return {f"{name}.first": adapter.first, f"{name}.body": adapter.body}
        return {name: adapter} | ({f"bodies.{route.body}": self.bodies[route.body]} if route.body else {})

    def encode(self, observations: Tensor, environment: str) -> Tensor:
        """The adapter's output, before the torso: [B, ``size.features``], for raw observations [B, ...]."""
        if self.spec.size.separate:
            return self.of(environment).encode(observations, environment)
        route = self._routes[environment]
        adapted: Tensor = self.adapters[route.adapter](observations)
        if route.body:
            adapted = self.bodies[route.body](adapted)
        return adapted

    def features(self, observations: Tensor, environment: str) -> Tensor:
        """The torso's output, before any memory, [B, last width], for raw observations [B, ...]."""
        if self.spec.size.separate:
            return self.of(environment).features(observations, environment)
        features: Tensor = self.torso(self.encode(observations, environment))
        return features

    def head(self, features: Tensor, environment: str) -> Tensor:
        """The outputs [B, A] for the torso's features [B, last width]."""
        if self.spec.size.separate:
            return self.of(environment).head(features, environment)
        outputs: Tensor = self.heads[self._routes[environment].head](features)
        if self.spec.size.share_head:
            outputs = outputs[:, : self.spec.environments[environment].actions]
        return outputs

    def unroll(
        self, observations: Tensor, environment: str, state: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The features of whole sequences, for :meth:`head`; one step of acting is a sequence of length 1.

        Args:
            observations: raw, [T, B, ...].
            environment: whose they are.
            state: of the memory before them, [B, state width]: :meth:`initial_state`, or what an earlier call gave.
            starts: bool [T, B], rows that begin an episode, and so with the initial state.

        Returns:
            Features [T, B, last width] and states [T, B, state width]; see :class:`Memory` for which of these to go on from. Without a
            memory the features are those of :meth:`features`, and states are of width 0.
        """
        features = self.features(observations.flatten(0, 1), environment).unflatten(0, starts.shape)
        memory = self.of(environment).memory
        if memory is None:
            return features, state.expand(len(starts), *state.shape)
        found: tuple[Tensor, Tensor] = memory(features, state, starts)
        return found

    def forward(self, observations: Tensor, environment: str) -> Tensor:
        """Q-values or logits (``spec.output``), float32 [B, A], for raw observations [B, ...].

        Raises:
            StillhouseError: the network has a memory.
        """
        self.check_memoryless(environment)
        return self.head(self.features(observations, environment), environment)

    def check_memoryless(self, environment: str) -> None:
        """Raises StillhouseError where the outputs for an environment are no function of one observation."""
        if self.spec.size.recurrent != "none":
            raise StillhouseError(
                f"{environment}: network.recurrent is {self.spec.size.recurrent}, and a network with a memory is no function of one "
                "observation, as is needed here; set recurrent to none (impala, unreal, evaluation, datasets and videos take either)"
            )


def scale_head(network: MultiTaskNetwork, environment: str, factor: float) -> None:
    """Multiply the outputs for ``environment`` by ``factor``, in its head's weights; a shared head's are everyone's."""
    head = network.of(environment).heads[SHARED_HEAD if network.spec.size.share_head else environment]
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(factor)


def build_network(spec: NetworkSpec, seed: int) -> MultiTaskNetwork:
    """A network with initial weights that depend on ``seed`` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MultiTaskNetwork(spec)


def parameter_count(network: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(parameter.numel() for parameter in network.parameters())
