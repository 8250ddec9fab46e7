"""Where a file comes from: its stage, the commit that first recorded it, and so back to the first env step."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillhouse.config import near
from stillhouse.errors import StillhouseError
from tasks import git
from tasks.digest_code import FOLDER as CODE
from tasks.machine import recorded_processor
from tasks.recorded import (
    LOCK,
    Entry,
    below,
    content_hash,
    files_of,
    folder_hash,
    object_path,
    owners,
    read_recorded,
    recorded_files,
)
from tasks.stage import cache_folder

SHORT = 8  # characters of a hash on the terminal


def trace(root: Path, path: str, commit: str = "") -> dict[str, Any]:
    """Everything that is known of how ``path`` came to be.

    Args:
        root: the project.
        path: a file or folder that the pipeline made, relative to ``root``.
        commit: whose records to read; empty: the checkout's.

    Returns:
        ``path``, ``md5``, ``on_disk``, ``made_by`` (keys of ``stages``) and ``stages``, each once, with its commit, command,
        parameters, seed, env steps, processor, code, inputs (their stage by its key) and outs.

    Raises:
        StillhouseError: nothing recorded has this path.
    """
    return _Tracer(root, commit).trace(path)


Records = dict[str, Entry]


class _Tracer:
    def __init__(self, root: Path, commit: str) -> None:
        self.root, self.commit, self.cache = root, commit, cache_folder(root)
        self.recorded = read_recorded(root, commit)
        # Of the history first; then of experiments and of other branches.
        self.commits = git.commits(root, LOCK, commit or "HEAD")
        self.others = [other for other in git.commits(root, LOCK, "--all") if other not in self.commits]
        self.keys: list[tuple[Entry, str]] = []
        self.stages: dict[str, Any] = {}

    def trace(self, path: str) -> dict[str, Any]:
        entry, md5, files = self.find(path)
        tracked = None
        if entry.command:
            made_by = [self.stage(entry, self.recorded)]
        else:  # kept by a .dvc file: what it holds was made by stages, and is known by its content
            tracked = {"file": entry.name, "commit": self.first_commit(entry)}
            made_by = sorted({self.stage(*origin) for origin in self.origins(files)})
        return {
            "path": path,
            "revision": self.commit,
            "md5": md5,
            "on_disk": self.on_disk(path, md5, files),
            "tracked_by": tracked,
            "made_by": made_by,
            "stages": self.stages,
        }

    def find(self, path: str) -> tuple[Entry, str, dict[str, str]]:
        """The entry that has ``path``, its hash, and its files."""
        known = []
        for out_path, entry in owners(self.recorded).items():
            out = entry.outs[out_path]
            files = recorded_files(self.cache, out)
            if path == out_path:
                return entry, out.md5, files or {}
            if path.startswith(f"{out_path}/"):
                if files is None:
                    raise StillhouseError(
                        f"{path}: {out_path} is recorded, but the cache has lost the list of its files; "
                        "`stillhouse verify --repair` brings it back"
                    )
                inner = path.removeprefix(f"{out_path}/")
                if inner in files:
                    return entry, files[inner], {"": files[inner]}
                if part := _folders(files).get(inner):
                    return entry, folder_hash(part), part
            known += [out_path, *(below(out_path, name) for name in files or {})]
        at = f" at {self.commit[:12]}" if self.commit else ""
        if held := sorted(name for name in owners(self.recorded) if name.startswith(f"{path}/")):
            shown = ", ".join(held[:6]) + (f", ... ({len(held)} in all)" if len(held) > 6 else "")
            raise StillhouseError(f"{path}: holds what several stages made{at}; name one of {shown}")
        raise StillhouseError(
            f"{path}: the pipeline has recorded nothing of this name{at}{near(path, known)}"
        )

    def on_disk(self, path: str, md5: str, files: dict[str, str]) -> str:
        """Whether the file or folder is what was recorded."""
        place = self.root / path
        found = content_hash(place)
        if not found:
            return "missing"
        if found == md5:
            return "as recorded"
        if place.is_dir() and files:
            here = files_of(place)
            changed = sorted(name for name in {*here, *files} if here.get(name) != files.get(name))
            return f"differs from what was recorded: {', '.join(changed)}"
        return f"differs from what was recorded: its md5 is {found}"

    def stage(self, entry: Entry, recorded: Records) -> str:
        """Add the stage, and all that it comes from, to what was found; its key there."""
        for known, key in self.keys:
            if known == entry:
                return key
        commit = self.first_commit(entry)
        # One name, two entries: an input was made before its stage ran again.
        other = f"{entry.name}@{commit['commit'][:SHORT] if commit else 'uncommitted'}"
        key = other if entry.name in self.stages else entry.name
        self.keys.append((entry, key))
        row = self.stages[key] = {
            "stage": entry.name,
            "commit": commit,
            "command": entry.command,
            "seed": next((int(seed) for seed in re.findall(r"--seed (\d+)", entry.command)), None),
            "env_steps": dict(_env_steps(entry.params)),
            "parameters": entry.params,
            "processor": recorded_processor(self.root, entry, self.commit),
            "outs": [{"path": out.path, "md5": out.md5, "size": out.size} for out in entry.outs.values()],
            "inputs": [],
        }
        for path, md5 in entry.deps.items():
            maker = self.maker(path, md5, recorded)
            row["inputs"].append({"path": path, "md5": md5, "stage": self.stage(*maker) if maker else None})
            if Path(path).parent == CODE:
                row["code"] = {"path": path, "md5": md5, **self.digest(md5)}
        return key

    def maker(self, path: str, md5: str, recorded: Records) -> tuple[Entry, Records] | None:
        """The stage that wrote ``path`` with this content, and the records that have it; None for a source."""
        if path not in owners(recorded):
            return None
        for records in (recorded, *self.all_records()):
            for entry in records.values():
                if path in entry.outs and entry.outs[path].md5 == md5:
                    return entry, records
        return None

    def all_records(self) -> Iterator[Records]:
        yield self.recorded
        for commit in [*self.commits, *self.others]:
            yield read_recorded(self.root, commit)

    def first_commit(self, entry: Entry) -> dict[str, str] | None:
        """The oldest commit that has exactly this entry; None where none has it yet."""
        source, histories = LOCK, [self.commits, self.others]
        if not entry.command:
            source, histories = entry.name, [git.commits(self.root, entry.name, self.commit or "HEAD")]
        hashes = [out.md5 for out in entry.outs.values()]
        for history in histories:
            for commit in reversed(history):
                text = git.read(self.root, source, commit) or ""
                # Reading a lock takes a while, searching it does not.
                if (
                    all(md5 in text for md5 in hashes)
                    and read_recorded(self.root, commit).get(entry.name) == entry
                ):
                    said = git.git(self.root, "log", "-1", "--format=%H%n%cs%n%s", commit)
                    return dict(zip(("commit", "date", "subject"), said.split("\n"), strict=False))
        return None

    def digest(self, md5: str) -> dict[str, Any]:
        """A code digest's versions and modules, where the cache has it."""
        try:
            return json.loads(object_path(self.cache, md5).read_bytes())
        except (OSError, ValueError):
            return {}

    def origins(self, files: dict[str, str]) -> Iterator[tuple[Entry, Records]]:
        """The stages that have made these files: whole folders where they are outs, else file by file."""
        for folder, held in sorted(_folders(files).items()):
            if maker := self.maker_of_content(folder_hash(held)):
                yield maker
                files = {name: md5 for name, md5 in files.items() if not f"{name}/".startswith(f"{folder}/")}
        for md5 in sorted(set(files.values())):
            if maker := self.maker_of_content(md5):
                yield maker

    def maker_of_content(self, md5: str) -> tuple[Entry, Records] | None:
        for records in self.all_records():
            for entry in records.values():
                for out in entry.outs.values() if entry.command else []:
                    if md5 == out.md5 or md5 in (recorded_files(self.cache, out) or {}).values():
                        return entry, records
        return None


def _folders(files: dict[str, str]) -> dict[str, dict[str, str]]:
    """Every folder among the files, with what it holds."""
    found: dict[str, dict[str, str]] = {}
    for name, md5 in files.items():
        for parent in Path(name).parents:
            if parent != Path():
                found.setdefault(str(parent), {})[Path(name).relative_to(parent).as_posix()] = md5
    return found


def _env_steps(params: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Every ``env_steps`` in the parameters, by the block it stands in."""
    for key, value in params.items() if isinstance(params, dict) else []:
        if key == "env_steps":
            yield prefix, value
        else:
            yield from _env_steps(value, f"{prefix}.{key}" if prefix else key)


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What :func:`trace` found, as a tree: each stage once; all of it only where it made what was asked for."""
    yield f"{found['path']}  {found['md5'][:SHORT]}  {found['on_disk']}"
    if tracked := found["tracked_by"]:
        commit = tracked["commit"]
        since = (
            f"since commit {commit['commit'][:SHORT]} of {commit['date']}" if commit else "not committed yet"
        )
        yield f"tracked by {tracked['file']}, {since}"
    if not found["made_by"]:
        yield "no stage in the history of dvc.lock has made this content"
    shown: set[str] = set()
    for key in found["made_by"]:
        yield from _stage_lines(found["stages"], key, shown, first=True)


def _stage_lines(stages: dict[str, Any], key: str, shown: set[str], first: bool = False) -> Iterator[str]:
    row = stages[key]
    if key in shown:
        yield f"{key}, above"
        return
    shown.add(key)
    commit, code = row["commit"], row.get("code", {})
    facts = [f"commit {commit['commit'][:SHORT]}" if commit else "not committed yet"]
    facts += [f"code {code['md5'][:SHORT]}"] if code else []
    facts += [f"{number:,} env steps ({block})" for block, number in row["env_steps"].items()]
    facts += [f"seed {row['seed']}"] if row["seed"] is not None else []
    yield f"{key}: {', '.join(facts)}"
    inputs = [given for given in row["inputs"] if given["path"] != code.get("path")]
    bar = "│" if inputs else " "
    yield f"{bar}  $ {row['command']}"
    if first:
        yield f"{bar}  {commit['date']} {commit['subject']!r}" if commit else f"{bar}"
        yield f"{bar}  on {row['processor'] or 'a processor that was not recorded'}"
        yield f"{bar}  with {', '.join(f'{name} {version}' for name, version in code.get('environment', {}).items())}"
        for block, values in row["parameters"].items():
            yield f"{bar}  {block}: {json.dumps(values)}"
    for given in inputs:
        last = given is inputs[-1]
        yield f"{'└─' if last else '├─'} {given['path']}  {given['md5'][:SHORT]}"
        inner = (
            _stage_lines(stages, given["stage"], shown) if given["stage"] else ["no recorded stage made it"]
        )
        yield from (f"{' ' if last else '│'}  {line}" for line in inner)
