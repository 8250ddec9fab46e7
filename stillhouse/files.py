"""Atomic files and folders with a manifest: what is there is whole, or it is not there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillhouse.errors import StillhouseError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write ``content`` beside ``path``, flush it to the disk and rename it into place.

    Raises:
        StillhouseError: the disk is full or not writable; ``path`` is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StillhouseError(_write_failed(path, error)) from error


def write_json(path: Path, value: Any) -> None:
    """``value`` as JSON with sorted keys, atomically; NaN and infinities are refused."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the block ends well.

    The manifest (schema version, size and SHA-256 of each file) is written last. Then the old folder is renamed aside,
    the new one into its place, and the old one deleted: a kill at any moment leaves one of the two whole, which
    :func:`check_folder` finds. When the block raises, the temporary folder is removed and ``path`` is as it was. One writer
    a path at a time is assumed; what a killed one left behind is removed.

    Raises:
        StillhouseError: the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside = _aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _restore(path)
        for left in path.parent.glob(f".{path.name}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        names = sorted(str(file.relative_to(temporary)) for file in temporary.rglob("*") if file.is_file())
        files = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)}
            for name in names
        }
        write_json(temporary / MANIFEST, {"schema_version": SCHEMA_VERSION, "files": files})
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
        os.replace(temporary, path)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise StillhouseError(_write_failed(path, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(path: Path) -> None:
    """Check that the folder is whole: its manifest is there and every file has the size and hash it names.

    Raises:
        StillhouseError: the folder or its manifest is missing, it has another schema version, or a file is missing,
            truncated or changed (named, with both hashes).
    """
    _restore(path)
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise StillhouseError(
            f"{path}: no {MANIFEST}, so nothing complete is there; rerun the stage that makes it"
        )
    try:
        manifest = json.loads(manifest_path.read_text())
        version, files = manifest["schema_version"], manifest["files"]
    except (ValueError, KeyError, TypeError):
        raise StillhouseError(f"{manifest_path}: not a manifest; rerun the stage that makes {path}") from None
    if version != SCHEMA_VERSION:
        raise StillhouseError(
            f"{path}: schema version {version}, but this stillhouse reads version {SCHEMA_VERSION}; rerun the stage "
            "that makes it, or use the release that wrote it"
        )
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise StillhouseError(
                f"{file}: missing, though the manifest lists it; rerun the stage that makes {path}"
            )
        found = file.stat().st_size
        if found != expected["bytes"]:
            raise StillhouseError(
                f"{file}: {found} bytes where the manifest says {expected['bytes']} (truncated or changed); rerun the "
                f"stage that makes {path}"
            )
        digest = sha256(file)
        if digest != expected["sha256"]:
            raise StillhouseError(
                f"{file}: hash {digest[:12]} where the manifest says {expected['sha256'][:12]}; rerun the stage that "
                f"makes {path}"
            )


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _restore(path: Path) -> None:
    """Bring back what :func:`replace_folder` had put aside when it was killed before the new folder was in place."""
    if not path.exists() and _aside(path).exists():
        os.replace(_aside(path), path)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_failed(path: Path, error: OSError) -> str:
    return f"{path}: cannot be written ({error.strerror or error}); nothing was changed; free space or check permissions"
