"""Feature transfer: a new network whose head also reads a frozen source's features (Yosinski et al. 2014, arXiv:1411.1792, for what
is transferable in them).

    q(s) = W [h(s); h_source(s)] + b,   h_source frozen

It is the progressive network with the one lateral connection at its top, and no adapter there: the cheapest way to use what a
source sees without touching it.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.transfer.progressive_networks import Column, ProgressiveNetwork, progressive_network
from stillhouse.types import EnvironmentSpec, OutputKind


def feature_network(
    name: str, environment: EnvironmentSpec, output: OutputKind, source: Column, seed: int
) -> ProgressiveNetwork:
    """A new network of the source's size whose head reads the source's features too.

    Args:
        name: the target environment's.
        environment: its spaces.
        output: what the network gives.
        source: whose features are read.
        seed: of the fresh weights, those of the same network from scratch.
    """
    sources: Sequence[Column] = [source]
    return progressive_network(name, environment, output, sources, seed, laterals="features")
