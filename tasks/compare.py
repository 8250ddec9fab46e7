"""In what two files differ: which tensors and by how much, which JSON keys, which CSV columns."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

LIMIT = 20  # lines of detail


def differences(recorded: Path, found: Path) -> list[str]:
    """What differs in ``found``, a line each, the first ``LIMIT`` of them; the bytes differ already."""
    first, second = recorded.read_bytes(), found.read_bytes()
    compare = _BY_SUFFIX.get(found.suffix)
    try:
        lines = list(compare(first, second)) if compare else []
    except (ValueError, SafetensorError, TypeError) as error:
        return [f"not readable as {found.suffix}: {' '.join(str(error).split())}"]
    if not lines:
        same = next(
            (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
            min(len(first), len(second)),
        )
        lines = [f"from byte {same:,} on; {len(first):,} bytes were recorded, here are {len(second):,}"]
    return lines[:LIMIT] + ([f"and {len(lines) - LIMIT} more"] if len(lines) > LIMIT else [])


def _tensors(first: bytes, second: bytes) -> Iterator[str]:
    old, new = load(first), load(second)
    for name in sorted({*old, *new}):
        if name not in old or name not in new:
            yield f"tensor {name}: only {'here' if name in new else 'in the recorded file'}"
        elif old[name].shape != new[name].shape or old[name].dtype != new[name].dtype:
            yield (
                f"tensor {name}: {old[name].dtype}{list(old[name].shape)} was recorded, here is "
                f"{new[name].dtype}{list(new[name].shape)}"
            )
        elif old[name].tobytes() != new[name].tobytes():
            yield f"tensor {name}: {_by_how_much(old[name], new[name])}"


def _by_how_much(old: np.ndarray[Any, Any], new: np.ndarray[Any, Any]) -> str:
    a, b = old.astype(np.float64), new.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    size = float(np.nanmax(np.abs(a), initial=0.0))
    largest = float(np.max(apart, initial=0.0))
    relative = f", {largest / size:.3g} of the largest value" if size and np.isfinite(largest / size) else ""
    return f"{np.count_nonzero(apart):,} of {a.size:,} values differ, by at most {largest:.3g}{relative}"


def _json(first: bytes, second: bytes) -> Iterator[str]:
    old, new = dict(_flat(json.loads(first))), dict(_flat(json.loads(second)))
    for key in sorted({*old, *new}):
        if key not in old or key not in new:
            yield f"key {key}: only {'here' if key in new else 'in the recorded file'}"
        elif old[key] != new[key]:
            yield f"key {key}: {_short(old[key])} was recorded, here is {_short(new[key])}"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not value or not isinstance(value, dict | list):
        yield prefix, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _flat(part, f"{prefix}.{key}" if prefix else str(key))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _columns(first: bytes, second: bytes) -> Iterator[str]:
    tables = [csv.DictReader(io.StringIO(data.decode())) for data in (first, second)]
    old, new = (list(table) for table in tables)
    if len(old) != len(new):
        yield f"{len(old):,} rows were recorded, here are {len(new):,}"
    before, now = (table.fieldnames or [] for table in tables)
    for name in sorted({*before, *now}):
        if name not in before or name not in now:
            yield f"column {name}: only {'here' if name in now else 'in the recorded file'}"
            continue
        pairs = [(a[name], b[name]) for a, b in zip(old, new, strict=False) if a[name] != b[name]]
        if pairs:
            yield f"column {name}: {len(pairs):,} rows differ{_apart(pairs)}"


def _apart(pairs: list[tuple[str, str]]) -> str:
    try:
        return f", by at most {max(abs(float(a) - float(b)) for a, b in pairs):.3g}"
    except (ValueError, TypeError):  # words, or a row that is too short
        return ""


_BY_SUFFIX: dict[str, Callable[[bytes, bytes], Iterator[str]]] = {
    ".safetensors": _tensors,
    ".json": _json,
    ".csv": _columns,
}
