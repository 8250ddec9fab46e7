"""Datasets on disk: round trips, splits by episode, damage, a full disk."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.datasets.reader import Dataset
from stillhouse.datasets.schema import SCHEMA_FILE, DatasetSchema, pack, row_bytes, smallest_unsigned, unpack
from stillhouse.datasets.writer import ShardWriter
from stillhouse.errors import StillhouseError
from stillhouse.files import replace_folder, write_json
from stillhouse.types import EnvironmentSpec, ObservationSpec

SPECS = {
    "vector": ObservationSpec(kind="vector", shape=(5,)),
    "discrete": ObservationSpec(kind="discrete", shape=(300,)),
    "planes": ObservationSpec(kind="planes", shape=(3, 5, 3)),
    "image": ObservationSpec(kind="image", shape=(4, 3, 2)),
}


def random_observations(spec: ObservationSpec, count: int, random: np.random.Generator) -> np.ndarray:
    if spec.kind == "vector":
        return random.normal(size=(count, *spec.shape)).astype(np.float32)
    high = {"discrete": spec.shape[0], "planes": 2, "image": 256}[spec.kind]
    return random.integers(high, size=(count, *spec.stored_shape)).astype(spec.dtype)


def write(path: Path, spec: ObservationSpec, steps: int, copies: int, shard_rows: int = 10**6, seed: int = 0):
    """Play that ends at random, written step by step; the columns as they went in, in time order."""
    random = np.random.default_rng(seed)
    environment = EnvironmentSpec(observation=spec, actions=3)
    episode, next_episode = np.arange(copies), copies
    columns: dict[str, list[np.ndarray]] = {}
    finals: dict[int, np.ndarray] = {}
    with replace_folder(path) as folder:
        writer = ShardWriter(folder, environment, steps * copies, shard_rows * row_bytes(environment))
        for step in range(steps):
            last = step == steps - 1
            terminated = random.random(copies) < 0.1
            truncated = ~terminated & ((random.random(copies) < 0.05) | last)
            row = {
                "observations": random_observations(spec, copies, random),
                "outputs": random.normal(size=(copies, 3)).astype(np.float32),
                "actions": random.integers(3, size=copies),
                "rewards": random.normal(size=copies).astype(np.float32),
                "terminated": terminated,
                "truncated": truncated,
                "episodes": episode.copy(),
            }
            writer.append(**row)
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
            ended = np.flatnonzero(terminated | truncated)
            final = random_observations(spec, len(ended), random)
            writer.append_final(episode[ended], final)
            finals |= dict(zip(episode[ended].tolist(), final))
            episode[ended] = next_episode + np.arange(len(ended))
            next_episode += len(ended)
        writer.close()
        schema = DatasetSchema(
            environment_id="test",
            environment=environment,
            output="q_values",
            teacher="0" * 64,
            teacher_parameters=1000,
            epsilon=0.05,
            shard_rows=writer.shard_rows,
            episodes=len(finals),
            mean_return=None,
            mean_action_gap=0.5,
        )
        write_json(folder / SCHEMA_FILE, schema.model_dump(mode="json"))
    return {name: np.concatenate(values) for name, values in columns.items()}, finals


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("shard_rows", [10**6, 50, 1])
def test_round_trip(tmp_path: Path, spec: ObservationSpec, shard_rows: int) -> None:
    written, finals = write(tmp_path / "data", spec, steps=40, copies=3, shard_rows=shard_rows)
    dataset = Dataset.open(tmp_path / "data")
    assert len(dataset) == 120
    assert len(dataset.schema.shard_rows) == {10**6: 1, 50: 3, 1: 120}[shard_rows]
    observations = dataset.observations(np.arange(120))
    assert observations.dtype == spec.dtype
    for episode in np.unique(written["episodes"]):
        before = np.flatnonzero(written["episodes"] == episode)
        rows = dataset.episode_rows(episode)
        np.testing.assert_array_equal(observations[rows], written["observations"][before])
        np.testing.assert_array_equal(dataset.outputs(rows), written["outputs"][before])
        for name in ("outputs", "actions", "rewards", "terminated", "truncated"):
            np.testing.assert_array_equal(dataset.column(name)[rows], written[name][before])
        # Only the last row of an episode ends it.
        ends = dataset.column("terminated")[rows] | dataset.column("truncated")[rows]
        assert ends.tolist() == [False] * (len(rows) - 1) + [True]
    episodes, final = dataset.final_observations()
    assert final.dtype == spec.dtype
    assert sorted(episodes.tolist()) == sorted(finals)
    for episode, observation in zip(episodes.tolist(), final):
        np.testing.assert_array_equal(observation, finals[episode])


@given(
    rows=st.lists(st.integers(0, 119), max_size=40),
    shard_rows=st.sampled_from([10**6, 50, 7]),
)
@settings(max_examples=30, deadline=None)
def test_a_gather_is_the_rows_one_by_one(rows: list[int], shard_rows: int, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / f"gather-{shard_rows}"
    if not path.exists():
        write(path, SPECS["planes"], steps=40, copies=3, shard_rows=shard_rows)
    dataset = Dataset.open(path)
    indices = np.array(rows, np.int64)
    everything = dataset.observations(np.arange(120))
    np.testing.assert_array_equal(dataset.observations(indices), everything[indices])
    np.testing.assert_array_equal(dataset.outputs(indices), dataset.column("outputs")[indices])


@given(
    seed=st.integers(0, 10**6),
    fraction=st.floats(0.001, 0.999),
    copies=st.integers(2, 5),
    steps=st.integers(1, 30),
)
@settings(max_examples=30, deadline=None)
def test_no_episode_is_on_both_sides_of_the_split(
    seed: int, fraction: float, copies: int, steps: int, tmp_path_factory
) -> None:
    path = tmp_path_factory.mktemp("split") / "data"
    write(path, SPECS["discrete"], steps, copies, shard_rows=20, seed=seed)
    dataset = Dataset.open(path)
    train, held = dataset.split(fraction, np.random.default_rng(seed))
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), np.arange(len(dataset)))
    assert not set(dataset.episodes[train]) & set(dataset.episodes[held])
    assert len(train)
    assert len(held)
    assert train.dtype == held.dtype == np.uint32
    # As many episodes as the share needs, unless only one is left to train on.
    assert len(held) >= fraction * len(dataset) or len(np.unique(dataset.episodes[train])) == 1
    again = dataset.split(fraction, np.random.default_rng(seed))
    np.testing.assert_array_equal(again[1], held)


def test_a_single_episode_cannot_be_split(tmp_path: Path) -> None:
    write(tmp_path / "data", SPECS["vector"], steps=1, copies=1)
    with pytest.raises(StillhouseError, match="only one episode"):
        Dataset.open(tmp_path / "data").split(0.1, np.random.default_rng(0))


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "data", SPECS["image"], steps=40, copies=3, shard_rows=50)
    shard = tmp_path / "data" / "shard-00001.safetensors"
    content = shard.read_bytes()
    if damage == "truncated":
        shard.write_bytes(content[:-10])
    elif damage == "changed":
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        shard.unlink()
    with pytest.raises(StillhouseError, match=r"shard-00001\.safetensors"):
        Dataset.open(tmp_path / "data")


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "data", SPECS["vector"], steps=0, copies=2)
    with pytest.raises(StillhouseError, match="empty"):
        Dataset.open(tmp_path / "data")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 2}, "version"), ({"surprise": 1}, "surprise"), ({"shard_rows": [39]}, "column")],
)
def test_a_schema_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    write(tmp_path / "data", SPECS["vector"], steps=20, copies=2)
    schema = json.loads((tmp_path / "data" / SCHEMA_FILE).read_text())
    with replace_folder(tmp_path / "other") as folder:
        (folder / "shard-00000.safetensors").write_bytes(
            (tmp_path / "data" / "shard-00000.safetensors").read_bytes()
        )
        write_json(folder / SCHEMA_FILE, {**schema, **change})
    with pytest.raises(StillhouseError, match=message):
        Dataset.open(tmp_path / "other")


def test_another_teachers_dataset_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "data", SPECS["vector"], steps=20, copies=2)
    Dataset.open(tmp_path / "data", teacher="0" * 64)
    with pytest.raises(StillhouseError, match=r"data: played by the teacher 0{12}, but .* named is a{12};"):
        Dataset.open(tmp_path / "data", teacher="a" * 64)


def test_a_folder_without_a_manifest_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(StillhouseError, match="manifest"):
        Dataset.open(tmp_path)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "data"
    write(path, SPECS["vector"], steps=4, copies=2)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StillhouseError, match="cannot be written"):
            write(path, SPECS["vector"], steps=3000, copies=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, SPECS["planes"], steps=40, copies=3, shard_rows=50)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("count", [0, 1, 9])
def test_pack_and_unpack(spec: ObservationSpec, count: int) -> None:
    observations = random_observations(spec, count, np.random.default_rng(0))
    unpacked = unpack(pack(observations, spec), spec)
    assert unpacked.dtype == observations.dtype
    np.testing.assert_array_equal(unpacked, observations)


def test_observations_take_their_smallest_form() -> None:
    # 45 planes' bits in 6 bytes; outputs 12, action 1, reward 4, two flags, episode 4.
    assert row_bytes(EnvironmentSpec(observation=SPECS["planes"], actions=3)) == 6 + 12 + 1 + 4 + 2 + 4
    assert [smallest_unsigned(count).name for count in (1, 256, 257, 65536, 65537)] == [
        "uint8",
        "uint8",
        "uint16",
        "uint16",
        "uint32",
    ]
