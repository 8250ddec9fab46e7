"""Adapters: from an environment's raw observations to features of one common width."""

from __future__ import annotations

import math
from typing import Any

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


class _Convolution3x3(torch.autograd.Function):
    """A 3x3 convolution without padding whose weights' gradient is computed channels-last.

    Forward is fastest with channels first, the gradient of the weights with channels last (2.5 times at batch 128);
    PyTorch would take one layout for both.
    """

    @staticmethod
    def forward(ctx: Any, planes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(planes, weight)
        return functional.conv2d(planes, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        planes, weight = ctx.saved_tensors
        last = torch.channels_last
        of_planes, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient.contiguous(memory_format=last),
            planes.contiguous(memory_format=last),
            weight,
            [len(weight)],
            [1, 1],
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            1,
            [ctx.needs_input_grad[0], True, True],
        )
        return of_planes, of_weight, of_bias


class PlanesConvolution(nn.Module):
    """bool or uint8 [B, H, W, C] -> 3x3 convolution (no padding) -> [B, conv_channels * (H - 2) * (W - 2)].

    With ``layer_norm`` each sample's maps are normalised together, with a scale and a shift per channel.
    """

    def __init__(self, observation: ObservationSpec, conv_channels: int, layer_norm: bool) -> None:
        super().__init__()
        height, width, channels = height_width_channels(observation)
        self.maps = conv_channels
        self.outputs = conv_channels * (height - 2) * (width - 2)
        self.channels_first = observation.channels_first
        self.scale = 1 / 255 if observation.kind == "image" else 1.0
        self.convolution = nn.Conv2d(channels, conv_channels, 3)
        nn.init.kaiming_normal_(self.convolution.weight, nonlinearity="relu")
        self.norm = nn.GroupNorm(1, conv_channels) if layer_norm else nn.Identity()

    def forward(self, observations: Tensor) -> Tensor:
        if not self.channels_first:
            observations = observations.permute(0, 3, 1, 2)
        planes = observations.to(torch.float32, memory_format=torch.contiguous_format)
        if self.scale != 1.0:
            planes = planes * self.scale
        bias = self.convolution.bias
        maps: Tensor = _Convolution3x3.apply(planes, self.convolution.weight, bias)
        return functional.relu(self.norm(maps)).flatten(1)


class ImageConvolutions(nn.Module):
    """uint8 [B, H, W, C] with sides of at least 36 -> the three convolutions of Mnih et al. 2015 -> [B, outputs].

    ``conv_channels`` is the width of the first convolution; the next two have twice as many maps (32/64/64).
    """

    def __init__(self, observation: ObservationSpec, conv_channels: int) -> None:
        super().__init__()
        height, width, channels = height_width_channels(observation)
        self.maps = conv_channels * 2
        self.outputs = self.maps * math.prod(_after_convolutions(side) for side in (height, width))
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

    def forward(self, observations: Tensor) -> Tensor:
        if not self.channels_first:
            observations = observations.permute(0, 3, 1, 2)
        maps: Tensor = self.convolutions(observations.to(torch.float32) * self.scale)
        return maps


class ConvolutionalAdapter(nn.Module):
    """[B, H, W, C] -> ``first``, convolutions -> ``body``, dense -> [B, features]."""

    def __init__(
        self, observation: ObservationSpec, conv_channels: int, features: int, layer_norm: bool
    ) -> None:
        super().__init__()
        self.first = (
            PlanesConvolution(observation, conv_channels, layer_norm)
            if has_planes(observation)
            else ImageConvolutions(observation, conv_channels)
        )
        self.body = VectorAdapter(self.first.outputs, features, layer_norm)

    def forward(self, observations: Tensor) -> Tensor:
        features: Tensor = self.body(self.first(observations))
        return features


def has_planes(observation: ObservationSpec) -> bool:
    """Whether one 3x3 convolution is for it: three axes, and smaller than :class:`ImageConvolutions` takes."""
    return observation.kind in ("planes", "image") and (
        min(height_width_channels(observation)[:2]) < _NATURE_MINIMUM_SIDE
    )


def make_adapter(
    observation: ObservationSpec, conv_channels: int, features: int, layer_norm: bool
) -> nn.Module:
    """The adapter for an observation."""
    if observation.kind == "vector":
        return VectorAdapter(observation.shape[0], features, layer_norm)
    if observation.kind == "discrete":
        return DiscreteAdapter(observation.shape[0], features, layer_norm)
    return ConvolutionalAdapter(observation, conv_channels, features, layer_norm)


def height_width_channels(observation: ObservationSpec) -> tuple[int, int, int]:
    """Sides and channels of planes or an image, in whichever order it keeps them."""
    first, second, third = observation.shape
    return (second, third, first) if observation.channels_first else (first, second, third)


def _after_convolutions(side: int) -> int:
    for kernel, stride in ((8, 4), (4, 2), (3, 1)):
        side = (side - kernel) // stride + 1
    return side
