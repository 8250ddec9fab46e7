"""Whether what was recorded is still what lies there: every out hashed again, in the workspace and in DVC's cache.

DVC remembers a file's hash by its time, size and inode, and takes a write-protected object of its cache for sound: neither
`dvc status` nor `dvc checkout` notices that one was damaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tasks.recorded import (
    Entry,
    Out,
    below,
    files_of,
    folder_hash,
    list_of_files,
    md5_of,
    object_path,
    recorded_files,
)

Condition = Literal["sound", "damaged", "missing", "-"]


@dataclass(frozen=True)
class Checked:
    """One file of an out, or the cache's list of a folder's files (``path`` then ends in a slash).

    Attributes:
        entry: name of the stage, or of the ``.dvc`` file.
        out: what it belongs to.
        path: relative to the project's root.
        md5: as recorded.
        workspace: what lies in the workspace; "-" where that was not looked at, and for a list.
        cache: what lies in the cache; "-" for what git keeps.
    """

    entry: str
    out: Out
    path: str
    md5: str
    workspace: Condition
    cache: Condition

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong with it."""
        return {self.workspace, self.cache} <= {"sound", "-"}

    def __str__(self) -> str:
        found: dict[str, list[str]] = {}
        for where, condition in (("workspace", self.workspace), ("cache", self.cache)):
            if condition in ("damaged", "missing"):
                found.setdefault(condition, []).append(where)
        text = ", ".join(f"{condition} in {' and '.join(places)}" for condition, places in found.items())
        return f"{self.path}: {text or 'sound'} ({self.entry})"


class Checker:
    """Hashes each file once, however many names it has."""

    def __init__(self) -> None:
        self._hashes: dict[tuple[int, int], str] = {}
        self.bytes = 0

    def condition(self, path: Path, md5: str) -> Condition:
        """Whether the file's content is what its recorded hash says."""
        try:
            status = path.stat()
        except OSError:
            return "missing"
        inode = (status.st_dev, status.st_ino)
        if inode not in self._hashes:
            self._hashes[inode] = md5_of(path) if path.is_file() else ""
            self.bytes += status.st_size
        return "sound" if self._hashes[inode] == md5.removesuffix(".dir") else "damaged"

    def check(self, root: Path | None, cache: Path, entries: Iterable[Entry]) -> Iterator[Checked]:
        """Every file of every out; without ``root``, in the cache alone."""
        for entry in entries:
            for out in entry.outs.values():
                files = recorded_files(cache, out)
                if files is None and root:
                    # The cache has lost the list; a folder that is whole still shows what it says.
                    files = next(
                        (held for held in [files_of(root / out.path)] if _is_listed(out, held)), None
                    )
                if out.is_folder:
                    lost = self.condition(object_path(cache, out.md5), out.md5)
                    yield Checked(entry.name, out, f"{out.path}/", out.md5, "-", lost)
                for name, md5 in (files or {}).items():
                    path = below(out.path, name)
                    here = self.condition(root / path, md5) if root else "-"
                    there = self.condition(object_path(cache, md5), md5) if out.cached else "-"
                    yield Checked(entry.name, out, path, md5, here, there)


def objects_in(place: Path, out: Out, cache: Path) -> dict[str, Path | bytes]:
    """What the file or folder at ``place`` holds of an out, by hash: files that are sound, and the list of a whole folder."""
    if not out.is_folder:
        return {out.md5: place} if place.is_file() and md5_of(place) == out.md5 else {}
    held = files_of(place)
    found: dict[str, Path | bytes] = {out.md5: list_of_files(held)} if _is_listed(out, held) else {}
    recorded = held if found else recorded_files(cache, out) or {}
    return found | {md5: place / name for name, md5 in held.items() if recorded.get(name) == md5}


def _is_listed(out: Out, held: dict[str, str]) -> bool:
    return folder_hash(held) == out.md5
