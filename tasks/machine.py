"""Which kind of processor made the outs that ``dvc.lock`` records: ``machines.json``, committed beside it.

Floating-point results may differ between kinds of processors, so the kind belongs to a result; but it must not be in an
out, which would then differ itself. A file in git goes where the lock goes: into commits, clones, experiments and merges
(git notes are left behind by a clone). An entry names the outs it is about, so that one which a plain `dvc repro` has
overtaken says nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

from stillhouse.files import write_json
from tasks import git
from tasks.recorded import Entry

MACHINES = Path("machines.json")

# Libraries choose their kernels by these; the widest decides how sums are rounded.
_WIDEST = ("amx_tile", "avx512f", "avx2", "avx", "asimd")


def processor() -> str:
    """The kind of this machine's processor, for example ``AMD EPYC (x86_64, avx512f)``."""
    name, flags = "", set[str]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags |= set(value.split())
    widest = [flag for flag in _WIDEST if flag in flags][:1]
    return f"{name or platform.processor() or 'processor'} ({', '.join([platform.machine(), *widest])})"


def record(entry: Entry, stages: set[str], made_on: str = "") -> None:
    """Note in the current folder that this machine, or one with another processor, has made the entry's outs.

    Stages that are not in ``stages`` are forgotten.
    """
    known = _parse(MACHINES.read_text() if MACHINES.exists() else None)
    kept = {name: row for name, row in known.items() if name in stages}
    new = {**kept, entry.name: {"outs": _identity(entry), "processor": made_on or processor()}}
    if new != known:
        write_json(MACHINES, new)


def recorded_processor(root: Path, entry: Entry, commit: str = "") -> str:
    """The kind of processor that made the entry's outs; empty where nobody has noted it."""
    for sha in [commit, *git.commits(root, str(MACHINES), "--all")]:
        row = (_at_commit(root, sha) if sha else _parse(git.read(root, str(MACHINES)))).get(entry.name, {})
        if row.get("outs") == _identity(entry):
            return str(row.get("processor", ""))
    return ""


def _identity(entry: Entry) -> str:
    hashes = {path: out.md5 for path, out in sorted(entry.outs.items())}
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]


@lru_cache(maxsize=64)
def _at_commit(root: Path, commit: str) -> dict[str, dict[str, Any]]:
    return _parse(git.read(root, str(MACHINES), commit))


def _parse(text: str | None) -> dict[str, dict[str, Any]]:
    with contextlib.suppress(ValueError):
        rows = json.loads(text or "{}")
        return (
            {name: row for name, row in rows.items() if isinstance(row, dict)}
            if isinstance(rows, dict)
            else {}
        )
    return {}
