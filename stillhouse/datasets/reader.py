"""Reading a dataset: memory-mapped shards, batches by index gathers, a held-out split by episode."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

from stillhouse.config import parse
from stillhouse.datasets.schema import SCHEMA_FILE, DatasetSchema, column_forms, shard_path, unpack
from stillhouse.errors import StillhouseError
from stillhouse.files import check_folder


class Dataset:
    """A verified dataset; rows are numbered 0..N-1 over all shards. Open one with :meth:`open`.

    Attributes:
        schema: what the rows are.
        episodes: uint32 [N], each row's episode.
    """

    def __init__(self, path: Path, schema: DatasetSchema) -> None:
        self.path = path
        self.schema = schema
        self._shards = [_map_shard(shard_path(path, index)) for index in range(len(schema.shard_rows))]
        self._starts = np.cumsum([0, *schema.shard_rows])
        for shard, rows in zip(self._shards, schema.shard_rows, strict=True):
            for name, (dtype, shape) in column_forms(schema.environment).items():
                column = shard.get(name)
                if column is None or column.dtype != dtype or column.shape != (rows, *shape):
                    raise StillhouseError(
                        f"{path}: column {name!r} is not what {SCHEMA_FILE} says; collect the dataset again"
                    )
        self.episodes = np.concatenate([shard["episodes"] for shard in self._shards])

    @classmethod
    def open(cls, path: Path, teacher: str = "") -> Dataset:
        """Verify a dataset folder and map it.

        Args:
            path: the folder.
            teacher: digest of the checkpoint whose play it must hold; "" accepts any teacher's.

        Raises:
            StillhouseError: a file is missing, truncated or changed (named), another version's schema, no
                transition, or another teacher's.
        """
        check_folder(path)
        try:
            data = json.loads((path / SCHEMA_FILE).read_text())
        except (OSError, ValueError):
            raise StillhouseError(
                f"{path / SCHEMA_FILE}: missing or no JSON, so {path} is no dataset"
            ) from None
        schema = parse(DatasetSchema, data, where=str(path / SCHEMA_FILE))
        if schema.transitions == 0:
            raise StillhouseError(
                f"{path}: the dataset is empty (0 transitions); collect at least one episode"
            )
        if teacher and schema.teacher != teacher:
            raise StillhouseError(
                f"{path}: played by the teacher {schema.teacher[:12]}, but the checkpoint named is {teacher[:12]}; collect "
                f"the dataset again, or name the checkpoint it was collected from"
            )
        return cls(path, schema)

    def __len__(self) -> int:
        return self.schema.transitions

    def observations(self, rows: np.ndarray) -> np.ndarray:
        """Observations ``[B, ...]`` of ``rows`` ``[B]``, in the environment's own type."""
        return unpack(self._gather("observations", rows), self.schema.environment.observation)

    def outputs(self, rows: np.ndarray) -> np.ndarray:
        """The teacher's outputs of ``rows``, float32 ``[B, A]``."""
        return self._gather("outputs", rows)

    def column(self, name: str) -> np.ndarray:
        """A whole column, ``[N, ...]``: outputs, actions, rewards, terminated or truncated."""
        return np.concatenate([shard[name] for shard in self._shards])

    def final_observations(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers ``[K]`` of all episodes and the observations ``[K, ...]`` they ended in, in the order they
        ended."""
        episodes = np.concatenate([shard["final_episodes"] for shard in self._shards])
        packed = np.concatenate([shard["final_observations"] for shard in self._shards])
        return episodes, unpack(packed, self.schema.environment.observation)

    def episode_rows(self, episode: int) -> np.ndarray:
        """The rows of an episode, in time order."""
        return np.flatnonzero(self.episodes == episode)

    def split(self, holdout_fraction: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rows for training and rows held out, uint32; no episode has rows in both.

        Whole episodes are held out in random order until they hold at least ``holdout_fraction`` of the rows;
        one is always held out and one always left.

        Raises:
            StillhouseError: the dataset has a single episode.
        """
        lengths = np.bincount(self.episodes)  # by episode, 0 where a number is not used
        numbers = np.flatnonzero(lengths)
        if len(numbers) < 2:
            raise StillhouseError(
                f"{self.path}: only one episode, and held-out data is held out by episode; collect more "
                f"transitions"
            )
        order = generator.permutation(len(numbers))
        enough = np.searchsorted(np.cumsum(lengths[numbers[order]]), holdout_fraction * len(self)) + 1
        held = np.zeros(len(lengths), np.bool_)
        held[numbers[order[: min(int(enough), len(numbers) - 1)]]] = True
        held_rows = held[self.episodes]
        return np.flatnonzero(~held_rows).astype(np.uint32), np.flatnonzero(held_rows).astype(np.uint32)

    def _gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        if len(self._shards) == 1:
            return self._shards[0][name].take(rows, axis=0)
        first = self._shards[0][name]
        gathered = np.empty((len(rows), *first.shape[1:]), first.dtype)
        shard_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        for index in np.unique(shard_of_row):
            chosen = shard_of_row == index
            gathered[chosen] = self._shards[index][name].take(rows[chosen] - self._starts[index], axis=0)
        return gathered


def _map_shard(path: Path) -> dict[str, np.ndarray]:
    # Through torch, because safetensors maps a file into memory for torch and reads it whole for NumPy.
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 - no mapping
