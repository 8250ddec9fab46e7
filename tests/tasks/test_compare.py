"""In what two files differ, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tasks.compare import LIMIT, differences


@pytest.fixture
def files(tmp_path: Path) -> Any:
    def write(suffix: str, first: Any, second: Any) -> list[str]:
        paths = [tmp_path / f"{name}{suffix}" for name in ("recorded", "found")]
        for path, content in zip(paths, (first, second), strict=True):
            if suffix == ".safetensors" and isinstance(content, dict):
                save_file(content, path)
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return differences(*paths)

    return write


def test_tensors_by_how_much(files):
    same = np.arange(6, dtype=np.float32)
    old = {
        "same": same,
        "weight": np.array([[1.0, -4.0], [0.5, 2.0]], np.float32),
        "gone": same,
        "kind": same,
    }
    new = {**old, "weight": np.array([[1.0, -4.5], [0.5, 2.25]], np.float32), "come": same, "kind": same[:3]}
    del new["gone"]
    assert files(".safetensors", old, new) == [
        "tensor come: only here",
        "tensor gone: only in the recorded file",
        "tensor kind: float32[6] was recorded, here is float32[3]",
        "tensor weight: 2 of 4 values differ, by at most 0.5, 0.125 of the largest value",
    ]


def test_tensors_of_other_kinds(files):
    nan, inf = np.nan, np.inf
    old = {
        "bits": np.array([1, 255], np.uint8),
        "flags": np.array([True, False]),
        "nan": np.array([nan, nan, 1.0]),
    }
    new = {
        "bits": np.array([255, 255], np.uint8),
        "flags": np.array([True, True]),
        "nan": np.array([nan, 0.0, inf]),
    }
    found = files(".safetensors", old, new)
    assert found[0] == "tensor bits: 1 of 2 values differ, by at most 254, 0.996 of the largest value"
    assert found[1] == "tensor flags: 1 of 2 values differ, by at most 1, 1 of the largest value"
    assert found[2].startswith("tensor nan: 2 of 3 values differ, by at most ")
    empty = {"a": np.zeros(0, np.float32), "b": np.zeros(2)}
    assert files(".safetensors", empty, {**empty, "b": np.full(2, -0.0)}) == [
        "tensor b: 0 of 2 values differ, by at most 0"  # the sign of a zero
    ]


def test_json_keys(files):
    old = '{"a": {"b": 1, "list": [1, 2]}, "same": 0, "gone": null, "empty": {}}'
    new = '{"a": {"b": 2, "list": [1, 3]}, "same": 0, "come": "x", "empty": []}'
    assert files(".json", old, new) == [
        "key a.b: 1 was recorded, here is 2",
        "key a.list.1: 2 was recorded, here is 3",
        "key come: only here",
        "key empty: {} was recorded, here is []",
        "key gone: only in the recorded file",
    ]
    assert files(".json", '{"a": 1}', '{ "a": 1}') == ["from byte 1 on; 8 bytes were recorded, here are 9"]


def test_csv_columns(files):
    old = "step,return,name\n1,2.0,a\n2,3.0,b\n"
    assert files(".csv", old, "step,return,name\n1,2.0,a\n2,3.5,c\n") == [
        "column name: 1 rows differ",
        "column return: 1 rows differ, by at most 0.5",
    ]
    assert files(".csv", old, "step,score\n1,2.0\n") == [
        "2 rows were recorded, here are 1",
        "column name: only in the recorded file",
        "column return: only in the recorded file",
        "column score: only here",
    ]


def test_anything_else_and_what_cannot_be_read(files):
    assert files(".png", b"abc", b"abcd") == ["from byte 3 on; 3 bytes were recorded, here are 4"]
    for suffix, content in ((".json", b"{"), (".safetensors", b"no"), (".csv", b"\xff")):
        (line,) = files(suffix, b"x" if suffix == ".csv" else b"{}", content)
        assert line.startswith(f"not readable as {suffix}: ")
    (line,) = files(".csv", "a,b\n1,2\n", "a,b\n1\n")
    assert line == "column b: 1 rows differ"


def test_many_differences_are_counted(files):
    old = str({f"k{n:02}": 0 for n in range(30)}).replace("'", '"')
    found = files(".json", old, old.replace("0,", "1,"))
    assert len(found) == LIMIT + 1
    assert found[-1] == "and 9 more"
