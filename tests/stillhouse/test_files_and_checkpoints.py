"""Atomic files, manifests, checkpoints, training states, strict parameter blocks and seeding."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import Field

from stillhouse import files, seeding
from stillhouse.checkpoint import WEIGHTS, load_checkpoint, load_state, save_checkpoint, save_state
from stillhouse.config import Config, parse
from stillhouse.errors import StillhouseError
from stillhouse.files import check_folder, replace_folder, write_atomic, write_json
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize, NetworkSpec, build_network
from stillhouse.types import EnvironmentSpec, ObservationSpec


@pytest.fixture
def network() -> MultiTaskNetwork:
    observation = ObservationSpec(kind="planes", shape=(5, 5, 2))
    spec = NetworkSpec(
        size=NetworkSize(conv_channels=2, features=4, torso=(3,)),
        environments={"a": EnvironmentSpec(observation=observation, actions=3)},
        output="logits",
    )
    return build_network(spec, 0)


def refuses(path: Path) -> str:
    with pytest.raises(StillhouseError) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_checkpoint_round_trip(network: MultiTaskNetwork, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", network, {"seed": 3})
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded.network.spec == network.spec and loaded.details == {"seed": 3}
    observations = torch.ones(2, 5, 5, 2, dtype=torch.bool)
    torch.testing.assert_close(loaded.network(observations, "a"), network(observations, "a"))
    first = {file.name: file.read_bytes() for file in (tmp_path / "c").iterdir()}
    save_checkpoint(tmp_path / "c", network, {"seed": 3})
    assert first == {file.name: file.read_bytes() for file in (tmp_path / "c").iterdir()}
    assert set(first) == {"weights.safetensors", "spec.json", "manifest.json"}


def test_a_damaged_truncated_or_missing_file_is_named(network: MultiTaskNetwork, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", network, {})
    weights = tmp_path / "c" / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert WEIGHTS in refuses(tmp_path / "c") and "hash" in refuses(tmp_path / "c")
    weights.write_bytes(whole[:-9])
    assert "truncated" in refuses(tmp_path / "c")
    weights.unlink()
    assert "missing" in refuses(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").unlink()
    assert "nothing complete" in refuses(tmp_path / "c")


def test_another_schema_version_is_refused(
    network: MultiTaskNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillhouse.files.SCHEMA_VERSION", 99)
    monkeypatch.setattr("stillhouse.checkpoint.SCHEMA_VERSION", 99)
    save_checkpoint(tmp_path / "c", network, {})
    monkeypatch.undo()
    assert "schema version 99" in refuses(tmp_path / "c")


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_in_any_slot_is_never_opened(
    network: MultiTaskNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("weights.safetensors", "spec.json", "manifest.json"):
        folder = tmp_path / name.replace(".", "_")
        save_checkpoint(folder, network, {})
        (folder / name).write_bytes(pickle.dumps(_Bomb()))
        if name != "manifest.json":  # an attacker would write a fitting manifest as well
            manifest = json.loads((folder / "manifest.json").read_text())
            file = folder / name
            manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": files.sha256(file)}
            (folder / "manifest.json").write_text(json.dumps(manifest))
        refuses(folder)
    assert not Path("exploded").exists()


def test_a_weight_that_is_not_finite_is_not_saved(network: MultiTaskNetwork, tmp_path: Path) -> None:
    network.heads["a"].bias.data[0] = float("nan")
    with pytest.raises(StillhouseError, match="heads.a.bias"):
        save_checkpoint(tmp_path / "c", network, {})
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("writer", ["file", "folder"])
def test_a_full_disk_leaves_what_was_there(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(text: str) -> None:
        if writer == "file":
            write_atomic(tmp_path / "x", text)
        else:
            with replace_folder(tmp_path / "x") as folder:
                (folder / "data").write_text(text)

    save("before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StillhouseError, match="No space left on device"):
        save("after")
    monkeypatch.undo()
    if writer == "file":
        assert (tmp_path / "x").read_text() == "before"
    else:
        check_folder(tmp_path / "x")
        assert (tmp_path / "x" / "data").read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]  # nothing half-written beside it


arrays = hnp.arrays(
    st.sampled_from([np.float32, np.int64, np.bool_, np.uint8]), hnp.array_shapes(max_dims=3, max_side=4)
)
plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
nested = st.recursive(
    plain | arrays,
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text("ab_", min_size=1), children, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text("abc", min_size=1), nested, max_size=4))
def test_state_round_trip(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    def same(left: Any, right: Any) -> bool:
        if isinstance(left, np.ndarray):
            return (
                isinstance(right, np.ndarray)
                and left.dtype == right.dtype
                and left.tobytes() == right.tobytes()
            )
        if isinstance(left, dict):
            return set(left) == set(right) and all(same(left[key], right[key]) for key in left)
        if isinstance(left, list):
            return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
        return bool(left == right)

    path = tmp_path_factory.mktemp("state") / "s"
    save_state(path, state)
    assert same(state, load_state(path))


def test_state_refuses_what_it_cannot_give_back(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="set cannot be saved"):
        save_state(tmp_path / "s", {"a": {1}})
    assert not (tmp_path / "s").exists()


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()


class Inner(Config):
    rate: float = Field(gt=0, le=1)


class Outer(Config):
    name: str = "x"
    inner: Inner = Inner(rate=0.5)


def message(data: Any) -> str:
    with pytest.raises(StillhouseError) as caught:
        parse(Outer, data, "stage")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_parameters_are_one_line_with_field_value_and_what_is_allowed() -> None:
    text = message({"inner": {"rate": 3}})
    assert "stage.inner.rate" in text and "less than or equal to 1" in text and "3" in text
    text = message({"inner": {"rat": 0.1, "rate": 0.1}})
    assert "stage.inner.rat" in text and "'rate'" in text and "allowed" in text
    assert "required" in message({"inner": {}})
    assert "nan" in message({"inner": {"rate": float("nan")}})


def test_seeding_names_streams() -> None:
    assert seeding.derive(0, "a") == seeding.derive(0, "a") < 2**63
    numbers = {
        seeding.derive(*args)
        for args in ((0, "a"), (1, "a"), (0, "b"), (0, "a", "b"), (0, "ab"), (0, "a", 0))
    }
    assert len(numbers) == 6
    assert seeding.generator(0, "a").random() == seeding.generator(0, "a").random()


@pytest.mark.parametrize("moment", [0, 1])
def test_a_kill_between_the_renames_loses_nothing(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(text: str) -> None:
        with replace_folder(tmp_path / "x") as folder:
            (folder / "data").write_text(text)

    save("before")
    replace, calls = os.replace, []

    def killed(source: Path, destination: Path) -> None:
        if Path(source).suffix == ".tmp" and Path(source).is_dir() and not moment:
            raise KeyboardInterrupt  # after the old folder went aside, before the new one came
        calls.append(source)
        replace(source, destination)

    monkeypatch.setattr("os.replace", killed)
    if moment:
        save("after")
    else:
        with pytest.raises(KeyboardInterrupt):
            save("after")
    monkeypatch.undo()
    check_folder(tmp_path / "x")
    assert (tmp_path / "x" / "data").read_text() == ("after" if moment else "before")
    save("later")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StillhouseError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "x", "text")
    with pytest.raises(StillhouseError, match="cannot be written"), replace_folder(tmp_path / "file" / "x"):
        pass
