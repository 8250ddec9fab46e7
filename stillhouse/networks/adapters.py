"""Adapters: from an environment's raw observations to features of one common width."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.types import ObservationSpec

# Larger images get the three convolutions of Mnih et al. 2015, smaller ones the single 3x3 of MinAtar.
_NATURE_MINIMUM_SIDE = 36


class VectorAdapter(nn.Module):
    """float32 [B, n] -> [B, features]; one dense layer."""

    def __init__(self, inputs: int, features: int, layer_norm: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, features)
        self.norm = nn.LayerNorm(features) if layer_norm else nn.Identity()

    def forward(self, observations: Tensor) -> Tensor:
        return functional.relu(self.norm(self.dense(observations)))


class DiscreteAdapter(VectorAdapter):
    """int64 [B] -> one-hot [B, n] -> [B, features]."""

    def __init__(self, inputs: int, features: int, layer_norm: bool) -> None:
        super().__init__(inputs, features, layer_norm)
        self.inputs = inputs

    def forward(self, observations: Tensor) -> Tensor:
        return super().forward(functional.one_hot(observations.long(), self.inputs).float())


class PlanesAdapter(nn.Module):
    """bool or uint8 [B, H, W, C] -> 3x3 convolution (no padding) -> dense -> [B, features].

    The convolution's maps are normalised over the channels of each position, as flax's LayerNorm does.
    """

    def __init__(
        self, observation: ObservationSpec, conv_channels: int, features: int, layer_norm: bool
    ) -> None:
        super().__init__()
        height, width, channels = _height_width_channels(observation)
        self.channels_first = observation.channels_first
        self.scale = 1 / 255 if observation.kind == "image" else 1.0
        self.convolution = nn.Conv2d(channels, conv_channels, 3)
        nn.init.kaiming_normal_(self.convolution.weight, nonlinearity="relu")
        self.convolution_norm = nn.LayerNorm(conv_channels) if layer_norm else nn.Identity()
        self.dense = nn.Linear((height - 2) * (width - 2) * conv_channels, features)
        self.norm = nn.LayerNorm(features) if layer_norm else nn.Identity()

    def forward(self, observations: Tensor) -> Tensor:
        if not self.channels_first:
            observations = observations.permute(0, 3, 1, 2)
        planes = observations.to(torch.float32)
        if self.scale != 1.0:
            planes = planes * self.scale
        maps = self.convolution(planes).permute(0, 2, 3, 1)
        maps = functional.relu(self.convolution_norm(maps))
        return functional.relu(self.norm(self.dense(maps.reshape(len(planes), -1))))


class ImageAdapter(nn.Module):
    """uint8 [B, H, W, C] with sides of at least 36 -> the three convolutions of Mnih et al. 2015 -> [B, features].

    ``conv_channels`` is the width of the first convolution; the next two have twice as many maps (32/64/64).
    """

    def __init__(
        self, observation: ObservationSpec, conv_channels: int, features: int, layer_norm: bool
    ) -> None:
        super().__init__()
        height, width, channels = _height_width_channels(observation)
        self.channels_first = observation.channels_first
        self.scale = 1 / 255 if observation.kind == "image" else 1.0
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, conv_channels, 8, 4),
            nn.ReLU(),
            nn.Conv2d(conv_channels, conv_channels * 2, 4, 2),
            nn.ReLU(),
            nn.Conv2d(conv_channels * 2, conv_channels * 2, 3, 1),
            nn.ReLU(),
            nn.Flatten(),
        )
        positions = math.prod(_after_convolutions(side) for side in (height, width))
        self.dense = nn.Linear(positions * conv_channels * 2, features)
        self.norm = nn.LayerNorm(features) if layer_norm else nn.Identity()

    def forward(self, observations: Tensor) -> Tensor:
        if not self.channels_first:
            observations = observations.permute(0, 3, 1, 2)
        images = observations.to(torch.float32) * self.scale
        return functional.relu(self.norm(self.dense(self.convolutions(images))))


def make_adapter(
    observation: ObservationSpec, conv_channels: int, features: int, layer_norm: bool
) -> nn.Module:
    """The adapter for an observation."""
    if observation.kind == "vector":
        return VectorAdapter(observation.shape[0], features, layer_norm)
    if observation.kind == "discrete":
        return DiscreteAdapter(observation.shape[0], features, layer_norm)
    height, width, _ = _height_width_channels(observation)
    kind = ImageAdapter if min(height, width) >= _NATURE_MINIMUM_SIDE else PlanesAdapter
    return kind(observation, conv_channels, features, layer_norm)


def _height_width_channels(observation: ObservationSpec) -> tuple[int, int, int]:
    first, second, third = observation.shape
    return (second, third, first) if observation.channels_first else (first, second, third)


def _after_convolutions(side: int) -> int:
    for kernel, stride in ((8, 4), (4, 2), (3, 1)):
        side = (side - kernel) // stride + 1
    return side
