"""The one network of this project: adapters, a shared torso, a head per environment.

A teacher is the case of one environment. Equal observation shapes share an adapter; with ``share_planes`` all planes of
equal sides share everything but the first convolution.
"""

from __future__ import annotations

import itertools

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.config import Config
from stillhouse.networks.adapters import (
    PlanesConvolution,
    VectorAdapter,
    has_planes,
    height_width_channels,
    make_adapter,
)
from stillhouse.types import EnvironmentSpec, OutputKind


class NetworkSize(Config):
    """Widths of a network."""

    conv_channels: int = Field(default=16, ge=1, le=1024, description="maps of the first convolution")
    share_planes: bool = Field(
        default=False,
        description="planes of equal sides share all but the first convolution, of which every environment has its own",
    )
    features: int = Field(default=128, ge=1, le=8192, description="width of every adapter's output")
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

    def forward(self, features: Tensor) -> Tensor:
        for dense, norm in zip(self.dense, self.norm, strict=True):
            features = functional.relu(norm(dense(features)))
        return features


class MultiTaskNetwork(nn.Module):
    """Raw observations of a named environment -> one output per action."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        size = spec.size
        self.adapters = nn.ModuleDict()
        self.bodies = nn.ModuleDict()
        self._routes: dict[str, tuple[str, str]] = {}  # environment -> its adapter, and its body or ""
        widths = (size.conv_channels, size.features, size.layer_norm)
        for name, environment in spec.environments.items():
            observation = environment.observation
            if size.share_planes and has_planes(observation):
                height, width, _ = height_width_channels(observation)
                body = f"planes_{height}x{width}"
                self._routes[name] = (name, body)
                first = PlanesConvolution(observation, size.conv_channels, size.layer_norm)
                self.adapters[name] = first
                if body not in self.bodies:
                    self.bodies[body] = VectorAdapter(first.outputs, size.features, size.layer_norm)
            else:
                self._routes[name] = (observation.key, "")
                if observation.key not in self.adapters:
                    self.adapters[observation.key] = make_adapter(observation, *widths)
        self.torso = Torso(size.features, size.torso, size.layer_norm)
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(self.torso.outputs, environment.actions)
                for name, environment in spec.environments.items()
            }
        )

    def features(self, observations: Tensor, environment: str) -> Tensor:
        """The torso's output, [B, last width], for raw observations [B, ...]."""
        adapter, body = self._routes[environment]
        adapted = self.adapters[adapter](observations)
        if body:
            adapted = self.bodies[body](adapted)
        features: Tensor = self.torso(adapted)
        return features

    def forward(self, observations: Tensor, environment: str) -> Tensor:
        """Q-values or logits (``spec.output``), float32 [B, A], for raw observations [B, ...]."""
        outputs: Tensor = self.heads[environment](self.features(observations, environment))
        return outputs


def scale_head(network: MultiTaskNetwork, environment: str, factor: float) -> None:
    """Multiply the outputs for ``environment`` by ``factor``, in its head's weights."""
    head = network.heads[environment]
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
