"""A dataset of a learner's replay: what DQN saw while it learnt, with the outputs of the teacher that it became.

Rows of an episode are put back in their order; the replay's sums of rewards and observations n steps ahead become single
rewards and the next row's observation. An episode of which only a part is in the replay is cut, as a truncation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.datasets.collect import CollectConfig, Teacher, check_return, check_size
from stillhouse.datasets.schema import SCHEMA_FILE, DatasetSchema, action_gaps, row_bytes, unpack
from stillhouse.datasets.writer import ShardWriter
from stillhouse.errors import StillhouseError
from stillhouse.files import replace_folder, write_json
from stillhouse.types import EnvironmentSpec, Report

_ROWS = 4096  # labelled and written at a time


@dataclass(frozen=True)
class _Played:
    """Which rows of a replay are transitions, by episode and step; each array [N], or [K] of the episodes.

    Attributes:
        rows: in the replay.
        episodes: numbered from 0.
        ends: where an episode ends, as indices into ``rows``.
        over: of these, whether the environment ended it; its final observation is the row's successor then.
        following: of these, the row of the replay whose observation is the final one otherwise.
        whole: of these, whether the episode is here from its first step to the environment's end.
    """

    rows: np.ndarray
    episodes: np.ndarray
    ends: np.ndarray
    over: np.ndarray
    following: np.ndarray
    whole: np.ndarray


def _played(state: Mapping[str, Any], most: int) -> _Played:
    """The newest ``most`` rows in order; what is only in part there is cut, and its last row is its final observation."""
    size, places = state["size"], np.asarray(state["places_in_episodes"])
    newest = (state["next"] - 1 - np.arange(min(most, size))) % size
    episode, step, to_end = places[newest].astype(np.int64).T
    order = np.lexsort((step, episode))
    rows, episode, step, to_end = newest[order], episode[order], step[order], to_end[order]
    first = np.ones(len(rows), np.bool_)
    first[1:] = (episode[1:] != episode[:-1]) | (step[1:] != step[:-1] + 1)
    last = np.append(first[1:], True)
    over = last & (to_end == 1)
    kept = ~last | over
    ends = over | np.append(~kept[1:] & ~first[1:], False)  # or the next row is the dropped one
    chains = np.cumsum(first)
    begun = chains[first & (step == 0)]
    at = np.flatnonzero(ends)
    return _Played(
        rows=rows[kept],
        episodes=np.cumsum(ends[kept]) - ends[kept],
        ends=np.flatnonzero(ends[kept]),
        over=over[at],
        following=rows[np.minimum(at + 1, len(rows) - 1)],
        whole=over[at] & np.isin(chains[at], begun),
    )


def write_replay(
    state: Mapping[str, Any],
    teacher: Teacher,
    environment_id: str,
    environment: EnvironmentSpec,
    config: CollectConfig,
    path: Path,
) -> Iterator[Report]:
    """Write the newest ``config.transitions`` of a replay to ``path``; fewer where it has fewer.

    Args:
        state: of a :class:`stillhouse.replay.uniform.UniformReplay`.
        teacher: who labels it.
        environment_id: the Gymnasium id that was played.
        environment: its spaces.
        config: how much, and how good the teacher must be.
        path: the dataset's folder, replaced when all is well and untouched otherwise.

    Yields:
        As :func:`stillhouse.datasets.collect.collect` does.

    Raises:
        StillhouseError: a weak teacher, an empty replay, outputs that are not finite, a dataset of more than
            ``maximum_bytes``, or too little space on the disk.
    """
    played = _played(state, config.transitions) if state["size"] else None
    if played is None or not len(played.rows):
        raise StillhouseError(f"{path}: the replay holds no whole transition; train the teacher longer")
    total = len(played.rows)
    yield Report(0, total, {"dataset/bytes": float(row_bytes(environment) * total)})
    check_size(environment, total, config.maximum_bytes, path)
    if teacher.mean_return is not None:
        check_return(teacher.mean_return, "its greedy validation episodes", config)

    def observations(rows: np.ndarray, column: str = "observations") -> np.ndarray:
        return unpack(np.asarray(state[column])[rows], environment.observation)

    rewards = np.asarray(state["rewards"])[played.rows]
    terminated, truncated = np.zeros(total, np.bool_), np.zeros(total, np.bool_)
    terminated[played.ends] = played.over & (np.asarray(state["discounts"])[played.rows[played.ends]] == 0)
    truncated[played.ends] = ~terminated[played.ends]
    returns = np.bincount(played.episodes, rewards)[played.whole]
    gap_sum = 0.0
    with replace_folder(path) as folder:
        writer = ShardWriter(folder, environment, total)
        for start in range(0, total, _ROWS):
            part = slice(start, start + _ROWS)
            rows = played.rows[part]
            seen = observations(rows)
            outputs = teacher.policy(seen)
            if not np.isfinite(outputs).all():
                raise StillhouseError(
                    f"the teacher's outputs for {environment_id} are not finite; its training diverged: train it again with "
                    "a lower learning rate"
                )
            writer.append(
                seen,
                outputs=outputs,
                actions=np.asarray(state["actions"])[rows],
                rewards=rewards[part],
                terminated=terminated[part],
                truncated=truncated[part],
                episodes=played.episodes[part],
            )
            here = (played.ends >= start) & (played.ends < start + _ROWS)
            ended, over = played.ends[here], played.over[here]
            final = observations(played.following[here])
            final[over] = observations(played.rows[ended[over]], "successors")
            writer.append_final(played.episodes[ended], final)
            gap_sum += float(action_gaps(outputs).sum(dtype=np.float64))
            yield Report(min(start + _ROWS, total), total, {})
        writer.close()
        schema = DatasetSchema(
            environment_id=environment_id,
            environment=environment,
            output=teacher.output,
            teacher=teacher.digest,
            teacher_parameters=teacher.parameters,
            epsilon=None,
            shard_rows=writer.shard_rows,
            episodes=len(played.ends),
            mean_return=float(returns.mean()) if len(returns) else None,
            mean_action_gap=gap_sum / total,
        )
        write_json(folder / SCHEMA_FILE, schema.model_dump(mode="json"))
