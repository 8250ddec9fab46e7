"""Promoting and rolling back: commits of ``data/production.dvc``, the one file that says what is in production."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from flows.workspace import git
from stillhouse.config import near
from stillhouse.errors import StillhouseError
from tasks.production import FOLDER, POINTER, Production, build, read_production
from tasks.run_stage import call_dvc
from tasks.stage import cache_folder, read_yaml


def promote(checkout: Path, workspace: Path, about: Production, why: str) -> str:
    """Put what ``workspace`` has made into production: track it, bring it to the checkout, commit the pointer there.

    Args:
        checkout: where the commit is made, on whatever branch is checked out; nothing else of it is touched.
        workspace: the checkout itself or a worktree of it, whose ``data/`` has the student, its teachers and datasets.
        about: what is promoted.
        why: the rest of the commit's message.

    Returns:
        The commit.

    Raises:
        StillhouseError: something is missing, or the pointer has changes that are not committed.
    """
    if git(checkout, "status", "--porcelain", "--", str(POINTER)).strip():
        raise StillhouseError(f"{POINTER} has changes that are not committed; commit or undo them first")
    build(workspace, about)
    meta = {
        "generation": about.generation,
        "student": about.student,
        "seed": about.seed,
        "suite": about.suite,
    }
    call_dvc(workspace, "promote", "add", str(FOLDER), json.dumps(meta))
    if workspace != checkout:
        (checkout / POINTER).parent.mkdir(exist_ok=True)
        shutil.copyfile(workspace / POINTER, checkout / POINTER)
        _bring(checkout)
    return _commit(checkout, f"Promote {about.student} of generation {about.generation}\n\n{why}")


def rollback(checkout: Path, generation: int = -1) -> tuple[int, str]:
    """Put back what was in production before, or a certain generation: a new commit of the old pointer.

    Returns:
        The generation, and the commit.

    Raises:
        StillhouseError: there is none to go back to, or the pointer has changes that are not committed.
    """
    if git(checkout, "status", "--porcelain", "--", str(POINTER)).strip():
        raise StillhouseError(f"{POINTER} has changes that are not committed; commit or undo them first")
    now = _generation(checkout, "HEAD")
    if now is None:
        raise StillhouseError("nothing is in production yet, so there is nothing to roll back")
    known: dict[int, str] = {}
    for commit in git(checkout, "log", "--format=%H", "--", str(POINTER)).split():
        if (found := _generation(checkout, commit)) is not None:
            known.setdefault(found, commit)
    earlier = [each for each in known if each < now]
    if generation < 0 and not earlier:
        raise StillhouseError(
            f"generation {now} is the first that was in production; there is none to go back to"
        )
    wanted = generation if generation >= 0 else max(earlier)
    if wanted not in known or wanted == now:
        others = ", ".join(str(each) for each in sorted(known) if each != now) or "none"
        raise StillhouseError(
            f"generation {wanted} cannot be put back; there are {others} beside the present one, {now}"
        )
    (checkout / POINTER).write_text(git(checkout, "show", f"{known[wanted]}:{POINTER}"))
    try:
        _bring(checkout)
    except StillhouseError:
        git(checkout, "checkout", "--quiet", "HEAD", "--", str(POINTER))
        raise
    return wanted, _commit(checkout, f"Roll production back from generation {now} to {wanted}")


def promote_by_hand(checkout: Path, name: str) -> str:
    """Put a student of the checkout's own ``data/`` into production, with its teachers: generation 0, or the next.

    Returns:
        The commit.

    Raises:
        StillhouseError: no such student, or something of it is missing.
    """
    students = sorted(path.name for path in (checkout / "data/students").glob("*-s*") if path.is_dir())
    if name not in students:
        raise StillhouseError(
            f"{name!r} is no student here{near(name, students)}; there are {', '.join(students) or 'none: `stillhouse run` makes some'}"
        )
    student, _, seed = name.rpartition("-s")
    spec = json.loads((checkout / "data/students" / name / "spec.json").read_text())
    suite = read_yaml(checkout / "params/pipeline.yaml")["suite"]
    about = Production(
        generation=next_generation(checkout) if (checkout / POINTER).exists() else 0,
        suite=suite,
        student=student,
        seed=int(seed),
        environments=sorted(spec["details"]["environments"]),
    )
    return promote(checkout, checkout, about, "By hand.")


def next_generation(checkout: Path) -> int:
    """A number that no attempt here has had: it is taken by asking.

    A rejected attempt's results are in the cache; with its number again, and so its seeds, they would be found there for ever.
    """
    taken = git(
        checkout, "for-each-ref", "--format=%(refname:lstrip=3)", "refs/stillhouse/generation"
    ).split()
    number = max([_generation(checkout, "HEAD") or 0, *map(int, taken)]) + 1
    git(checkout, "update-ref", f"refs/stillhouse/generation/{number}", "HEAD", "")
    return number


def _generation(checkout: Path, revision: str) -> int | None:
    """Which one was in production at a commit."""
    try:
        text = git(checkout, "show", f"{revision}:{POINTER}")
    except StillhouseError:
        return None
    pointer: dict[str, Any] = read_yaml_text(text)
    return int(pointer["meta"]["generation"])


def read_yaml_text(text: str) -> dict[str, Any]:
    """A small YAML document."""
    from ruamel.yaml import YAML

    content: dict[str, Any] = YAML(typ="safe").load(text)
    return content


def _bring(checkout: Path) -> None:
    """The files that the pointer names, from the cache or else from the remote."""
    _, answer, _ = call_dvc(checkout, "production", "fetch", str(POINTER))
    # DVC would remove the folder before it notices that the files of the other one are nowhere.
    if lost := _missing(checkout):
        raise StillhouseError(
            f"{lost} of the files of {POINTER} are not in the cache, and cannot be fetched ({answer['reason']})"
        )
    call_dvc(checkout, "production", "checkout", str(POINTER))
    read_production(checkout)


def _missing(checkout: Path) -> int:
    """How many of the pointer's files the cache lacks."""
    objects = cache_folder(checkout) / "files" / "md5"
    (out,) = read_yaml(checkout / POINTER)["outs"]
    listed = objects / out["md5"][:2] / out["md5"][2:]
    if not listed.is_file():
        return int(out.get("nfiles", 1))
    names = [entry["md5"] for entry in json.loads(listed.read_text())]
    return sum(not (objects / name[:2] / name[2:]).is_file() for name in names)


def _commit(checkout: Path, message: str) -> str:
    name = ["-c", "user.name=stillhouse", "-c", "user.email=stillhouse@localhost"]
    known = all(_has(checkout, key) for key in ("user.name", "user.email"))
    git(checkout, "add", "--", str(POINTER))
    # Of this file alone: what else is edited or staged stays as it is.
    git(
        checkout,
        *([] if known else name),
        "commit",
        "--quiet",
        "--no-verify",
        "--message",
        message,
        "--only",
        "--",
        str(POINTER),
    )
    return git(checkout, "rev-parse", "--short=12", "HEAD").strip()


def _has(checkout: Path, key: str) -> bool:
    try:
        return bool(git(checkout, "config", key).strip())
    except StillhouseError:
        return False
