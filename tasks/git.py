"""Git, as a program."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from pathlib import Path

from stillhouse.errors import StillhouseError

REVISION = r"^[A-Za-z0-9_.][A-Za-z0-9_./~^@{}-]*$"


def git(folder: Path, *arguments: str, **variables: str) -> str:
    """What ``git`` prints, with environment ``variables`` besides.

    Raises:
        StillhouseError: git is missing, or refuses.
    """
    environment = {**os.environ, **variables}
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        if error.filename != "git":
            raise StillhouseError(f"{folder}: no such folder") from None
        raise StillhouseError("git is not installed, and a run of its own needs a git worktree") from None
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no reason given"]
        raise StillhouseError(f"git {arguments[0]}: {lines[-1]}")
    return result.stdout


def commit_of(folder: Path) -> str:
    """The commit checked out there, ``-dirty`` where the folder differs from it; empty outside git."""
    with contextlib.suppress(StillhouseError):
        commit = git(folder, "rev-parse", "--short=12", "HEAD").strip()
        return commit + (
            "-dirty" if git(folder, "status", "--porcelain", "--untracked-files=no").strip() else ""
        )
    return ""


def resolve(root: Path, revision: str) -> str:
    """The commit that a git revision, or the name of a DVC experiment, stands for.

    Raises:
        StillhouseError: it is neither.
    """
    if re.fullmatch(REVISION, revision):
        with contextlib.suppress(StillhouseError):
            return git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").strip()
        found = git(root, "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{revision}").split()
        if found:
            return found[-1]
    raise StillhouseError(
        f"revision: {revision!r} is neither a git revision nor a DVC experiment; `git log --oneline -- dvc.lock` lists "
        "the commits with results, `dvc exp list -A` the experiments"
    )


def commits(root: Path, path: str, *where: str) -> list[str]:
    """The commits in the history of ``where`` that changed ``path``, newest first; none outside git."""
    with contextlib.suppress(StillhouseError):
        return git(root, "log", "--format=%H", *where, "--", path).split()
    return []


def read(root: Path, path: str, commit: str = "") -> str | None:
    """The text of a file as it stands in the checkout, or in ``commit``; None where there is none."""
    with contextlib.suppress(StillhouseError, OSError, UnicodeDecodeError):
        return git(root, "show", f"{commit}:./{path}") if commit else (root / path).read_text()
    return None
