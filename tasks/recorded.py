"""What was recorded, read without DVC: ``dvc.lock`` and ``.dvc`` files, in the checkout or at a commit, and the DVC cache."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stillhouse.errors import StillhouseError
from tasks import git

LOCK = "dvc.lock"
KEPT_LOCK = Path(".dvc/tmp/dvc.lock.kept")  # the copy that a cut-off dvc.lock is restored from
IGNORED = ".gitignore"  # by .dvcignore: no part of a folder's content
# As lock files name a cache object; quoted where it looks like a number.
_OBJECT = re.compile(r"md5: '?([0-9a-f]{32}(?:\.dir)?)\b")


@dataclass(frozen=True)
class Out:
    """A file or folder that a stage wrote.

    Attributes:
        path: relative to the project's root.
        md5: of the file; of a folder, ``.dir`` appended, that of the list of its files.
        size: bytes.
        cached: git keeps it where DVC's cache does not.
    """

    path: str
    md5: str
    size: int
    cached: bool = field(default=True, compare=False)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.md5.endswith(".dir")


@dataclass(frozen=True)
class Entry:
    """A stage as ``dvc.lock`` has it, or a ``.dvc`` file: outs without a command."""

    name: str
    command: str
    deps: dict[str, str]  # path to md5
    params: dict[str, Any]
    outs: dict[str, Out]


def read_recorded(root: Path, commit: str = "") -> dict[str, Entry]:
    """Every entry of ``dvc.lock`` and every ``.dvc`` file, by name; at ``commit``, or as the checkout stands.

    Raises:
        StillhouseError: there is no ``dvc.lock``, or it cannot be read.
    """
    return _at_commit(root, commit) if commit else _read(root, "")


@lru_cache(maxsize=64)
def _at_commit(root: Path, commit: str) -> dict[str, Entry]:
    return _read(root, commit)


def _read(root: Path, commit: str) -> dict[str, Entry]:
    at = f" at {commit[:12]}" if commit else ""
    text = git.read(root, LOCK, commit)
    if text is None:
        raise StillhouseError(
            f"{LOCK}: there is none{at}, so nothing is recorded; `stillhouse run` records what it makes"
        )
    rows = (_yaml(git.read(root, "dvc.yaml", commit) or "", f"dvc.yaml{at}") or {}).get("stages") or {}
    in_git = {
        path
        for row in rows.values()
        for out in row.get("outs", [])
        if isinstance(out, dict)
        for path, options in out.items()
        if not (options or {}).get("cache", True)
    }
    found = {}
    try:
        for name, row in ((_yaml(text, f"{LOCK}{at}") or {}).get("stages") or {}).items():
            params = {key: value for keys in row.get("params", {}).values() for key, value in keys.items()}
            deps = {dep["path"]: dep["md5"] for dep in row.get("deps", [])}
            found[name] = Entry(name, row["cmd"], deps, params, _outs(row, Path(), in_git))
        for file in _dvc_files(root, commit):
            row = _yaml(git.read(root, file, commit) or "", f"{file}{at}") or {}
            found[file] = Entry(file, "", {}, {}, _outs(row, Path(file).parent, set()))
    except (KeyError, TypeError, AttributeError) as error:
        raise StillhouseError(
            f"{LOCK}{at}: not as DVC 3 writes it ({error!r}); `dvc repro` writes it anew"
        ) from None
    return found


def _outs(row: dict[str, Any], folder: Path, in_git: set[str]) -> dict[str, Out]:
    outs = {}
    for out in row.get("outs", []):
        if "md5" not in out:  # declared, and not made yet
            continue
        path = str(folder / out["path"])
        outs[path] = Out(path, out["md5"], out.get("size", 0), path not in in_git)
    return outs


def _dvc_files(root: Path, commit: str) -> list[str]:
    list_them = ["ls-tree", "-r", "-z", "--name-only", commit] if commit else ["ls-files", "-z", "*.dvc"]
    try:
        return [name for name in git.git(root, *list_them).split("\0") if name.endswith(".dvc")]
    except StillhouseError:
        return []  # no git here


def _yaml(text: str, what: str) -> Any:
    try:
        return YAML(typ="safe").load(text)
    except YAMLError as error:
        raise StillhouseError(f"{what}: not YAML: {' '.join(str(error).split())}") from None


def is_whole(text: str) -> bool:
    """Whether this is a whole ``dvc.lock``. DVC ends it with a line's end; cut off anywhere else it may still be YAML."""
    try:
        content = _yaml(text, LOCK)
    except StillhouseError:
        return False
    return isinstance(content, dict) and "schema" in content and text.endswith("\n")


def objects_named(text: str) -> set[str]:
    """The cache objects that a ``dvc.lock`` or ``.dvc`` file names. Read without a parser, which takes seconds for a long one: for
    the whole history of them, and for what is not whole."""
    return set(_OBJECT.findall(text))


def owners(recorded: dict[str, Entry]) -> dict[str, Entry]:
    """The entry that writes each out."""
    return {path: entry for entry in recorded.values() for path in entry.outs}


def object_path(cache: Path, md5: str) -> Path:
    """Where the cache keeps the content with this hash."""
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def all_objects(cache: Path) -> Iterator[tuple[str, Path]]:
    """Every object of the cache, by its hash, and where it lies."""
    for path in (cache / "files" / "md5").glob("[0-9a-f][0-9a-f]/*"):
        if path.is_file():
            yield f"{path.parent.name}{path.name}", path


def md5_of(path: Path) -> str:
    """The file's MD5 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def files_of(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` and its MD5."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != IGNORED)
    return {path.relative_to(folder).as_posix(): md5_of(path) for path in files}


def list_of_files(files: dict[str, str]) -> bytes:
    """What DVC's cache keeps of a folder beside its files."""
    rows = [{"md5": md5, "relpath": name} for name, md5 in sorted(files.items())]
    return json.dumps(rows, sort_keys=True).encode()


def content_hash(path: Path) -> str:
    """The hash that DVC would record for a file or folder; empty where there is none."""
    if path.is_dir():
        return folder_hash(files_of(path))
    return md5_of(path) if path.is_file() else ""


def folder_hash(files: dict[str, str]) -> str:
    """The hash that DVC would record for a folder of these files."""
    return f"{hashlib.md5(list_of_files(files)).hexdigest()}.dir"


def recorded_files(cache: Path, out: Out) -> dict[str, str] | None:
    """The files of an out and their MD5, ``""`` for the one of a file; None where the cache has lost a folder's list."""
    if not out.is_folder:
        return {"": out.md5}
    try:
        content = object_path(cache, out.md5).read_bytes()
        if f"{hashlib.md5(content).hexdigest()}.dir" != out.md5:
            return None
        return {row["relpath"]: row["md5"] for row in json.loads(content)}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_in(cache: Path, out: Out) -> bool:
    """Whether the cache has an object for every file of the out."""
    files = recorded_files(cache, out)
    return files is not None and all(object_path(cache, md5).exists() for md5 in files.values())


def below(path: str, name: str) -> str:
    """The path of a file of an out."""
    return f"{path}/{name}" if name else path
