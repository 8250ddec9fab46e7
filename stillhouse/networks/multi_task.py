"""The one network of this project: adapters, a shared torso, a head per environment.

A teacher is the case of one environment. Equal observation shapes share an adapter; with ``share_planes`` all planes of
equal sides share everything but the first convolution. With ``share_head`` there is one head, as wide as the largest
action set, of which every environment reads its first actions; the others are masked out of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.config import Config
from stillhouse.networks.adapters import (
    ConvolutionalAdapter,
    ImageConvolutions,
    PlanesConvolution,
    VectorAdapter,
    has_planes,
    height_width_channels,
    make_adapter,
)
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
        self._routes: dict[str, _Route] = {}
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
        widest = max(environment.actions for environment in spec.environments.values())
        for name, environment in spec.environments.items():
            if (key := self._routes[name].head) not in self.heads:
                self.heads[key] = nn.Linear(
                    self.torso.outputs, widest if size.share_head else environment.actions
                )

    @property
    def feature_count(self) -> int:
        """Width of what :meth:`features` gives."""
        return self.torso.outputs

    def layers(self, environment: str) -> list[Callable[[Tensor], Tensor]]:
        """The way to the features, layer by layer: the first takes raw observations, each gives [B, n]."""
        torso = [partial(self.torso.layer, index) for index in range(len(self.torso.dense))]
        return [*self._way_in(environment).values(), *torso]

    def layer_forms(self, environment: str) -> list[tuple[int, int]]:
        """Of each layer, the maps and the positions of each; a dense layer's units are maps of one position."""
        forms = [
            (part.maps, part.outputs // part.maps)
            for part in self._way_in(environment).values()
            if isinstance(part, PlanesConvolution | ImageConvolutions)
        ]
        return [*forms, *((width, 1) for width in (self.spec.size.features, *self.spec.size.torso))]

    def layer_names(self, environment: str) -> list[list[str]]:
        """The parameters on an environment's way, layer by layer from the observations to the head."""
        groups: list[tuple[str, ...]] = [(f"{prefix}.",) for prefix in self._way_in(environment)]
        groups += [(f"torso.dense.{i}.", f"torso.norm.{i}.") for i in range(len(self.torso.dense))]
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
        route = self._routes[environment]
        adapted: Tensor = self.adapters[route.adapter](observations)
        if route.body:
            adapted = self.bodies[route.body](adapted)
        return adapted

    def features(self, observations: Tensor, environment: str) -> Tensor:
        """The torso's output, [B, last width], for raw observations [B, ...]."""
        features: Tensor = self.torso(self.encode(observations, environment))
        return features

    def head(self, features: Tensor, environment: str) -> Tensor:
        """The outputs [B, A] for the torso's features [B, last width]."""
        outputs: Tensor = self.heads[self._routes[environment].head](features)
        if self.spec.size.share_head:
            outputs = outputs[:, : self.spec.environments[environment].actions]
        return outputs

    def forward(self, observations: Tensor, environment: str) -> Tensor:
        """Q-values or logits (``spec.output``), float32 [B, A], for raw observations [B, ...]."""
        return self.head(self.features(observations, environment), environment)


def scale_head(network: MultiTaskNetwork, environment: str, factor: float) -> None:
    """Multiply the outputs for ``environment`` by ``factor``, in its head's weights; a shared head's are everyone's."""
    head = network.heads[SHARED_HEAD if network.spec.size.share_head else environment]
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
