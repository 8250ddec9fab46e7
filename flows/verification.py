"""``stillhouse verify``: hash again what was recorded; with ``--repair``, put back what is damaged or missing.

First the cache is made whole: from sound files of the workspace, from a remote, and by running the stage again, in a worktree
of its own. An object enters it only under the hash that it has. Then the workspace is filled from the cache. ``dvc.lock``
stays as it is, and a sound file where it is.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flows.graph import edges
from flows.workspace import PRIVATE, own_worktree, remove_worktree
from stillhouse.errors import StillhouseError
from tasks.cache import cache_in_use
from tasks.plan import Stage
from tasks.recorded import Entry, Out, is_in, object_path, read_recorded
from tasks.reproduce import fetch_missing, reproduce
from tasks.run_stage import call_dvc
from tasks.stage import cache_folder
from tasks.verify import Checked, Checker, objects_in


def verify(checkout: Path, commit: str) -> tuple[list[Checked], int]:
    """Every recorded file, and how many bytes were read; at a ``commit``, in the cache alone."""
    checker = Checker()
    entries = read_recorded(checkout, commit).values()
    checked = list(checker.check(None if commit else checkout, cache_folder(checkout), entries))
    return checked, checker.bytes


def repair(checkout: Path, commit: str, checked: list[Checked]) -> Iterator[str]:
    """Mend what :func:`verify` found; a line for each thing done, or that could not be."""
    with cache_in_use(checkout):  # what is put back must not be taken out again before all is
        yield from _repair(checkout, commit, checked)


def _repair(checkout: Path, commit: str, checked: list[Checked]) -> Iterator[str]:
    entries, cache = read_recorded(checkout, commit), cache_folder(checkout)
    for file in checked:
        if file.cache == "damaged":
            object_path(cache, file.md5).unlink(missing_ok=True)
    broken = [
        out for out in {file.out.path: file.out for file in checked if not file.sound}.values() if out.cached
    ]
    if not commit:
        added = sum(_put(checkout, objects_in(checkout / out.path, out, cache)) for out in broken)
        yield from (
            [f"put back into the cache from the workspace: {added} object{'s' * (added != 1)}"]
            if added
            else []
        )
    if lost := [out for out in broken if not is_in(cache, out)]:
        reason = fetch_missing(checkout, commit, "repair", lost)
        fetched = [out.path for out in lost if is_in(cache, out)]
        yield from [f"fetched from the remote: {', '.join(fetched)}"] if fetched else []
        yield from [reason] if reason else []
    for entry in _in_order(entries):
        if lost := [out for out in entry.outs.values() if out in broken and not is_in(cache, out)]:
            yield (
                _run_again(checkout, commit, entry, lost)
                if entry.command
                else f"lost: {', '.join(out.path for out in lost)}"
            )
    # Of an out whose files are not all in the cache, DVC would remove the sound ones too.
    if not commit and (whole := [out for out in broken if is_in(cache, out)]):
        # Looked at again: only now are the files of a folder known whose list was lost. DVC would take them for sound.
        for file in Checker().check(checkout, cache, entries.values()):
            if file.out in whole and file.workspace == "damaged" and (checkout / file.path).is_file():
                (checkout / file.path).unlink()
        call_dvc(checkout, "repair", "checkout", *(out.path for out in whole))


def _in_order(entries: dict[str, Entry]) -> Iterator[Entry]:
    """The entries, each after those that write what it reads."""
    parents = edges(
        Stage(entry.name, [], deps=[*entry.deps], outs=[*entry.outs]) for entry in entries.values()
    )
    done: set[str] = set()
    while ready := [name for name, needed in parents.items() if name not in done and needed <= done]:
        yield from (entries[name] for name in ready)
        done.update(ready)


def _run_again(checkout: Path, commit: str, entry: Entry, lost: list[Out]) -> str:
    name = f"repair-{entry.name}-{os.getpid()}"
    worktree = checkout / PRIVATE / "worktrees" / name
    try:
        with own_worktree(checkout, name, commit, share_cache=False):
            verdict = reproduce(checkout, worktree, commit, entry.name)
            for out in lost:
                _put(checkout, objects_in(worktree / out.path, out, cache_folder(checkout)))
    except StillhouseError as error:
        return f"{entry.name}: cannot be run again: {error}"
    finally:
        if worktree.exists():
            remove_worktree(checkout, worktree)
    if verdict["failed"]:
        return f"{entry.name}: failed: {verdict['failed']}"
    other = [out["path"] for out in verdict["outs"] if out["found"] != out["recorded"]]
    recorded = verdict["recorded_processor"] or "a processor that was not recorded"
    differs = f"; other than recorded (on {recorded}) came out {', '.join(other)}" if other else ""
    return f"{entry.name}: run again{differs}"


def _put(checkout: Path, objects: dict[str, Path | bytes]) -> int:
    """Add to the cache what it lacks of the objects; how many those were."""
    cache = cache_folder(checkout)
    missing = {md5: content for md5, content in objects.items() if not object_path(cache, md5).exists()}
    if missing:
        with tempfile.TemporaryDirectory(prefix="stillhouse-") as folder:
            rows = []
            for md5, content in missing.items():
                if isinstance(content, bytes):
                    (Path(folder) / md5).write_bytes(content)
                rows.append([str(Path(folder) / md5 if isinstance(content, bytes) else content), md5])
            (Path(folder) / "objects.json").write_text(json.dumps(rows))
            call_dvc(checkout, "put", "put", str(Path(folder) / "objects.json"))
    return len(missing)
