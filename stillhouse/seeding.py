"""One seed, named streams: every random number of a stage comes from here.

A stream is addressed by a seed and a path of names, hashed with SHA-256. Streams with different names are independent,
so that training, validation and test never share an episode, and adding a consumer never shifts another's numbers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit integer that depends on ``seed`` and on each of ``names`` and their order."""
    text = "\x1f".join([str(seed), *(str(name) for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator on the stream ``names`` of ``seed``."""
    return np.random.Generator(np.random.PCG64(derive(seed, *names)))


def torch_generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU torch generator on the stream ``names`` of ``seed``."""
    import torch  # a second of import, which the planner and DVC's processes need not pay

    return torch.Generator().manual_seed(derive(seed, *names))
