"""What is in a dataset folder: ``schema.json``, the shards, and each observation's smallest exact form.

A shard is one safetensors file. Its rows are transitions, sorted by episode and in time order within an
episode; an episode may continue in later shards, under the same number. Every episode ends ``terminated`` or
``truncated`` (those still open when collection stopped are cut as truncations); the observation it ended in
stands once, in a table apart:

    observations [N, ...]  outputs float32 [N, A]  actions uint [N]  rewards float32 [N]
    terminated, truncated bool [N]  episodes uint32 [N]  final_episodes uint32 [K]  final_observations [K,
    ...]
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from stillhouse.config import Config
from stillhouse.types import EnvironmentSpec, ObservationSpec, OutputKind

SCHEMA_FILE = "schema.json"
DATASET_VERSION = 1


class DatasetSchema(Config):
    """``schema.json``: what the rows are and where they come from."""

    version: Literal[1] = 1
    environment_id: str = Field(description="Gymnasium id that was played")
    environment: EnvironmentSpec
    output: OutputKind = Field(description="what the teacher's outputs are")
    teacher: str = Field(description="SHA-256 of the teacher's manifest")
    teacher_parameters: int = Field(ge=0, description="number of the teacher's weights")
    epsilon: float | None = Field(
        ge=0, le=1, description="share of random actions in the teacher's play; null: a learner's replay"
    )
    shard_rows: list[int] = Field(description="transitions in each shard")
    episodes: int = Field(ge=0)
    mean_return: float | None = Field(
        description="over the episodes that ended by themselves; null without any"
    )
    mean_action_gap: float = Field(
        description="mean difference between the teacher's best and second best output"
    )

    @property
    def transitions(self) -> int:
        """Number of rows."""
        return sum(self.shard_rows)


def shard_path(folder: Path, index: int) -> Path:
    """The file of shard ``index``."""
    return folder / f"shard-{index:05d}.safetensors"


def column_forms(environment: EnvironmentSpec) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type and shape per row of every column of transitions."""
    return {
        "observations": _packed_form(environment.observation),
        "outputs": (np.dtype("float32"), (environment.actions,)),
        "actions": (smallest_unsigned(environment.actions), ()),
        "rewards": (np.dtype("float32"), ()),
        "terminated": (np.dtype("bool"), ()),
        "truncated": (np.dtype("bool"), ()),
        "episodes": (np.dtype("uint32"), ()),
    }


def row_bytes(environment: EnvironmentSpec) -> int:
    """Bytes of one transition."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in column_forms(environment).values())


def action_gaps(outputs: np.ndarray) -> np.ndarray:
    """Difference between the best and the second best output of each row of ``[B, A]``, float32 ``[B]``; 0 where
    there is a single action."""
    if outputs.shape[1] < 2:
        return np.zeros(len(outputs), np.float32)
    best = np.partition(outputs, -2, axis=1)[:, -2:]
    return best[:, 1] - best[:, 0]


def smallest_unsigned(count: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds 0..count-1."""
    return np.min_scalar_type(count - 1)


def pack(observations: np.ndarray, spec: ObservationSpec) -> np.ndarray:
    """Observations ``[B, ...]`` to the stored form: planes to bits, discrete to the smallest integers."""
    if spec.kind == "planes":
        return np.packbits(observations.reshape(len(observations), math.prod(spec.shape)), axis=1)
    return observations.astype(_packed_form(spec)[0], copy=False)


def unpack(packed: np.ndarray, spec: ObservationSpec) -> np.ndarray:
    """The inverse of :func:`pack`."""
    if spec.kind == "planes":
        bits = np.unpackbits(packed, axis=1, count=math.prod(spec.shape))
        return bits.view(np.bool_).reshape(len(packed), *spec.shape)
    return packed.astype(spec.dtype, copy=False)


def _packed_form(spec: ObservationSpec) -> tuple[np.dtype[Any], tuple[int, ...]]:
    if spec.kind == "planes":
        return np.dtype("uint8"), ((math.prod(spec.shape) + 7) // 8,)
    if spec.kind == "discrete":
        return smallest_unsigned(spec.shape[0]), ()
    return spec.dtype, spec.shape
