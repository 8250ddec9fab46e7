"""Writing a dataset: rows of many copies go in step by step, shards sorted by episode come out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save

from stillhouse.datasets.schema import column_forms, pack, row_bytes, shard_path
from stillhouse.types import EnvironmentSpec

SHARD_BYTES = 64 * 2**20


class ShardWriter:
    """Collects transitions in preallocated memory and writes a shard whenever it is full.

    The folder is the caller's, made with :func:`stillhouse.files.replace_folder`, so that a failure leaves
    nothing.

    Args:
        folder: where the shards go.
        environment: observation and actions.
        rows: expected number of transitions; a small dataset takes little memory and one shard.
        shard_bytes: size of a full shard.
    """

    def __init__(
        self, folder: Path, environment: EnvironmentSpec, rows: int, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.folder = folder
        self.observation = environment.observation
        self.capacity = max(1, min(rows, shard_bytes // row_bytes(environment)))
        self.columns = {
            name: np.zeros((self.capacity, *shape), dtype)
            for name, (dtype, shape) in column_forms(environment).items()
        }
        self.shard_rows: list[int] = []
        self._filled = 0
        self._final: list[tuple[np.ndarray, np.ndarray]] = []

    def append(self, observations: np.ndarray, **columns: np.ndarray) -> None:
        """Add B transitions.

        Args:
            observations: ``[B, ...]`` in the environment's type.
            columns: outputs ``[B, A]``, actions, rewards, terminated, truncated, episodes ``[B]``.

        Raises:
            OSError: the shard cannot be written.
        """
        columns["observations"] = pack(observations, self.observation)
        taken, rows = 0, len(observations)
        while taken < rows:
            # A shard is written when the next row needs the space: final observations of its last rows come
            # in between.
            if self._filled == self.capacity:
                self._write()
            count = min(rows - taken, self.capacity - self._filled)
            for name, column in self.columns.items():
                column[self._filled : self._filled + count] = columns[name][taken : taken + count]
            self._filled += count
            taken += count

    def append_final(self, episodes: np.ndarray, observations: np.ndarray) -> None:
        """Add the final observations ``[K, ...]`` of ``episodes`` ``[K]`` that ended in the last
        :meth:`append`."""
        if len(episodes):
            self._final.append((episodes.astype(np.uint32), pack(observations, self.observation)))

    def close(self) -> None:
        """Write what is left.

        Raises:
            OSError: the shard cannot be written.
        """
        if self._filled:
            self._write()

    def _write(self) -> None:
        columns = {name: column[: self._filled] for name, column in self.columns.items()}
        # Stable: rows of an episode keep their order in time.
        order = np.argsort(columns["episodes"], kind="stable")
        tensors = {name: column[order] for name, column in columns.items()}
        if self._final:
            tensors["final_episodes"] = np.concatenate([episodes for episodes, _ in self._final])
            tensors["final_observations"] = np.concatenate([packed for _, packed in self._final])
        else:
            tensors["final_episodes"] = np.zeros(0, np.uint32)
            tensors["final_observations"] = columns["observations"][:0]
        # safetensors' own file writer does not raise OSError on a full disk.
        with open(shard_path(self.folder, len(self.shard_rows)), "wb") as file:
            file.write(save(tensors))
        self.shard_rows.append(self._filled)
        self._filled = 0
        self._final = []
