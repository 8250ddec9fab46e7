"""Run a recorded stage's command once more, on its recorded inputs, and compare what comes out with what was recorded.

It happens in a worktree that has the revision's code and parameters, and a cache of its own: nothing is restored, no saved
state is taken up, and no record is written.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from stillhouse.errors import StillhouseError
from tasks.compare import differences
from tasks.digest_code import FOLDER as CODE
from tasks.machine import processor, recorded_processor
from tasks.recorded import (
    Entry,
    Out,
    below,
    content_hash,
    files_of,
    is_in,
    md5_of,
    object_path,
    owners,
    read_recorded,
    recorded_files,
)
from tasks.run_stage import LOGS, call_dvc, reason_of, stop_all, supervise
from tasks.stage import DVC_YAML, PIPELINE, cache_folder, lookup, read_yaml

SHELL = "/bin/sh"
IDENTICAL = "identical"


def reproduce(checkout: Path, worktree: Path, commit: str, name: str) -> dict[str, Any]:
    """Run the stage in ``worktree``, which was made for it and has a cache of its own.

    Args:
        checkout: whose cache and remotes have the inputs.
        worktree: at ``commit``; empty: the checkout as it stands.
        commit: whose records count.
        name: the stage.

    Returns:
        ``stage``; ``processor``, here and as ``recorded_processor``; ``failed``, why the command did (then there is nothing
        more); ``outs``, each with its ``path``, ``verdict``, hashes ``recorded`` and ``found``, and ``files``: those that differ,
        with lines that say in what.

    Raises:
        StillhouseError: what was recorded cannot be run again here: other versions, another code than the recorded one, a lost
            or damaged input; or it was stopped.
    """
    entries = read_recorded(worktree)
    entry, cache = entries[name], cache_folder(checkout)
    outs = owners(entries)
    hashes = entry.deps | {path: out.md5 for path, out in entry.outs.items()}
    if digests := {path: md5 for path, md5 in hashes.items() if Path(path).parent == CODE}:
        _check_code(checkout, worktree, commit, entries, digests)
    inputs = [
        path for path in entry.deps if path in outs and outs[path].outs[path].cached and path not in digests
    ]
    if inputs:
        reason = fetch_missing(checkout, commit, name, [outs[path].outs[path] for path in inputs])
        if reason:
            raise StillhouseError(f"{reason}; `stillhouse verify --repair` can make it again")
        call_dvc(checkout, f"inputs-{name}", "checkout", "--into", str(worktree), *inputs)
    _check_inputs(worktree, entry)
    for path in entry.outs:
        place = worktree / path
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    code, _ = supervise(worktree, name, [SHELL, "-c", entry.command], lambda elapsed: None)
    if stop_all.is_set():
        raise StillhouseError("stopped")
    here, there = processor(), recorded_processor(checkout, entry, commit)
    result: dict[str, Any] = {
        "stage": name,
        "processor": here,
        "recorded_processor": there,
        "failed": "",
        "outs": [],
    }
    if code:
        return {**result, "failed": reason_of(worktree / LOGS / f"{name}.log", code)}
    different = (
        "different, and the recorded machine class is not known"
        if not there
        else "different on the same machine class"
        if here == there
        else "different, other machine class"
    )
    for path, out in entry.outs.items():
        found, verdict, files = content_hash(worktree / path), IDENTICAL, dict[str, list[str]]()
        if found != out.md5:
            fetch_missing(checkout, commit, name, [out])
            verdict, files = different, _compare(worktree / path, path, recorded_files(cache, out), cache)
        result["outs"].append(
            {"path": path, "verdict": verdict, "recorded": out.md5, "found": found, "files": files}
        )
    return result


def fetch_missing(checkout: Path, commit: str, name: str, wanted: list[Out]) -> str:
    """Fetch from a remote what the cache lacks of these outs; says what is still lacking, and why, or nothing."""
    cache = cache_folder(checkout)

    def lacking() -> list[str]:
        return [out.path for out in wanted if out.cached and not is_in(cache, out)]

    def objects() -> dict[str, Path]:
        hashes = {md5 for out in wanted for md5 in (out.md5, *(recorded_files(cache, out) or {}).values())}
        return {md5: path for md5 in hashes if (path := object_path(cache, md5)).exists()}

    if not (paths := lacking()):
        return ""
    before = objects()
    revision = ["--revision", commit] if commit else []
    _, answer, _ = call_dvc(checkout, f"fetch-{name}", "fetch", *revision, *paths)
    reason = answer["reason"] or "the remote does not have it"
    for md5, path in objects().items():  # DVC does not look into what it fetches
        if md5 not in before and md5_of(path) != md5.removesuffix(".dir"):
            path.unlink()
            reason = "what the remote has is damaged"
    return f"{', '.join(paths)}: not in the cache, and {reason}" if (paths := lacking()) else ""


def _check_code(
    checkout: Path, worktree: Path, commit: str, entries: dict[str, Entry], digests: dict[str, str]
) -> None:
    """Digest the worktree's code, and hold it against what was recorded.

    Raises:
        StillhouseError: other versions are installed, or the code is not the recorded one.
    """
    if (source := entries.get("digest_code")) is None:
        raise StillhouseError("dvc.lock does not say which code made it: digest_code is not in it")
    code, _ = supervise(worktree, "digest_code", [SHELL, "-c", source.command], lambda elapsed: None)
    if code:
        raise StillhouseError(reason_of(worktree / LOGS / "digest_code.log", code))
    at = commit[:12] or "HEAD"
    for path, md5 in digests.items():
        if content_hash(worktree / path) == md5:
            continue
        fetch_missing(
            checkout, commit, source.name, [out for out in source.outs.values() if out.path == path]
        )
        then, now = _digest(object_path(cache_folder(checkout), md5)), _digest(worktree / path)
        if other := _changed(then, now, "environment"):
            pairs = [
                (key, then["environment"].get(key, "absent"), now["environment"].get(key, "absent"))
                for key in other
            ]
            raise StillhouseError(
                f"recorded with {', '.join(f'{key} {value}' for key, value, _ in pairs)}, but here are "
                f"{', '.join(f'{key} {value}' for key, _, value in pairs)}; build that revision's environment from its "
                f"requirements.lock: `git worktree add ../at-{at} {at} && make -C ../at-{at} VENV=.venv .venv/.installed`, "
                f"and use it from here: `../at-{at}/.venv/bin/python -m flows.cli reproduce ...`"
            )
        raise StillhouseError(
            f"the code at {at} is not the code that made it ({', '.join(_changed(then, now, 'modules')) or path} changed); "
            "choose a commit that recorded its own results (`git log -- dvc.lock`), or run the stage and commit dvc.lock"
        )


def _digest(path: Path) -> dict[str, dict[str, str]]:
    try:
        content = json.loads(path.read_bytes())
        return {part: dict(content[part]) for part in ("environment", "modules")}
    except (OSError, ValueError, KeyError, TypeError):
        return {"environment": {}, "modules": {}}


def _changed(then: dict[str, dict[str, str]], now: dict[str, dict[str, str]], part: str) -> list[str]:
    """Names in one part of a digest whose value is another; none where one of the two digests is lost."""
    keys = sorted({*then[part], *now[part]}) if then[part] and now[part] else []
    return [key for key in keys if then[part].get(key) != now[part].get(key)]


def _check_inputs(worktree: Path, entry: Entry) -> None:
    """Raises StillhouseError where the worktree's command, parameters or inputs are not the recorded ones."""
    row = (read_yaml(worktree / DVC_YAML) or {}).get("stages", {}).get(entry.name, {})
    parameters = read_yaml(worktree / PIPELINE)
    changed = [] if row.get("cmd") == entry.command else ["the command"]
    for key, value in entry.params.items():
        try:
            changed += [] if lookup(parameters, key) == value else [f"parameter {key}"]
        except KeyError:
            changed.append(f"parameter {key}")
    changed += [path for path, md5 in entry.deps.items() if content_hash(worktree / path) != md5]
    if changed:
        raise StillhouseError(
            f"{', '.join(changed)}: not as recorded in dvc.lock, so the same outs cannot be expected; for a damaged file, "
            "`stillhouse verify --repair`; for a record that is older than what it was made from, another commit"
        )


def _compare(place: Path, path: str, recorded: dict[str, str] | None, cache: Path) -> dict[str, list[str]]:
    """The files of an out that differ, each with in what."""
    if recorded is None:
        return {path: ["the list of the recorded files is lost, so they cannot be compared one by one"]}
    here = files_of(place) if place.is_dir() else {"": md5_of(place)} if place.is_file() else {}
    found = {}
    for name in sorted({*recorded, *here}):
        if recorded.get(name) == here.get(name):
            continue
        then = object_path(cache, recorded.get(name, "none"))
        if name not in here or name not in recorded:
            lines = [f"only {'here' if name in here else 'in what was recorded'}"]
        elif not then.is_file() or md5_of(then) != recorded[name]:
            lines = ["the recorded file is not in the cache, so they cannot be compared"]
        else:
            lines = differences(then, place / name if name else place)
        found[below(path, name)] = lines
    return found
