"""How something comes into production: the bundle is made of what the pipeline has left, once it is seen to belong together."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stillhouse.checkpoint import SPEC
from stillhouse.datasets.schema import SCHEMA_FILE
from stillhouse.errors import StillhouseError
from stillhouse.files import MANIFEST, replace_folder, sha256, write_json
from tasks.production import ABOUT, FOLDER, PARTS, Production, part, student_path
from tasks.recorded import LOCK, Out, content_hash, read_recorded
from tasks.stage import PIPELINE, RETRAINING, lookup, read_yaml, stage_name


@dataclass(frozen=True)
class Pointer:
    """``data/production.dvc``, as it stands somewhere.

    Attributes:
        text: the file's.
        generation: that it puts into production.
        out: the bundle.
    """

    text: str
    generation: int
    out: Out


def parse_pointer(text: str, where: str) -> Pointer:
    """The content of ``data/production.dvc``.

    Raises:
        StillhouseError: it is damaged.
    """
    try:
        content = YAML(typ="safe").load(text)
        (out,) = content["outs"]
        found = Out(str(FOLDER), str(out["md5"]), int(out.get("size", 0)))
        return Pointer(text, int(content["meta"]["generation"]), found)
    except (YAMLError, KeyError, TypeError, ValueError, AttributeError):
        raise StillhouseError(
            f"{where}: damaged, so that nobody can say what is in production; `git log -p -- {FOLDER}.dvc` shows what it was"
        ) from None


def describe_student(root: Path, stem: str) -> dict[str, Any]:
    """What a student's checkpoint says of itself beside its network: ``environments``, ``teachers``, ...

    Raises:
        StillhouseError: it is damaged.
    """
    path = Path("data/students") / stem / SPEC
    return _details(root, path, "details")


def build(source: Path, target: Path, about: Production) -> None:
    """Make ``data/production`` in ``target`` from what the pipeline has left in ``source``; an old one is replaced in one step.

    Args:
        source: the checkout or worktree whose ``data/`` has the student, its teachers and datasets.
        target: where to make it; may be the same.
        about: what is promoted. Its ``params`` must be those that made the parts.

    Raises:
        StillhouseError: something is missing, is not what ``dvc.lock`` records, was made with other parameters, or by other teachers
            than those that are promoted with it.
    """
    student = f"data/students/{about.student}-s{about.seed}"
    makers = {student: ("distill_student", about.student)}
    wanted = {student: student_path(about.student)}
    for environment in about.environments:
        for kind in PARTS:
            path = f"data/{kind}/{environment}-s{about.seed}"
            wanted[path] = part(kind, environment)
            makers[path] = ("collect_dataset" if kind == "datasets" else "train_teacher", environment)
    recorded = read_recorded(source)
    for path, (verb, name) in makers.items():
        if not (source / path / MANIFEST).is_file():
            raise StillhouseError(f"{path}: missing or unfinished; `stillhouse run` makes it")
        entry = recorded.get(stage_name(verb, name, seed=about.seed))
        if entry is None or path not in entry.outs:
            raise StillhouseError(
                f"{path}: {LOCK} does not record how it was made, and what is in production must say so; `stillhouse run` records it"
            )
        if content_hash(source / path) != entry.outs[path].md5:
            raise StillhouseError(
                f"{path}: not what {LOCK} records; `stillhouse verify --repair` puts that back, or `stillhouse run` makes it anew"
            )
        for key, value in entry.params.items():
            if key != RETRAINING and value != _lookup(about.params, key):
                raise StillhouseError(
                    f"{path}: made with another {key} than {PIPELINE} has now; `stillhouse run` makes it anew, `stillhouse plan` with the "
                    "parameters of then puts those back"
                )
    _check_teachers(source, about)
    with replace_folder(target / FOLDER) as folder:
        for path, place in wanted.items():
            # Outs may be links into DVC's cache: a copy's permissions must not be theirs.
            shutil.copytree(source / path, folder / place.relative_to(FOLDER), copy_function=shutil.copyfile)
        write_json(folder / ABOUT, about.model_dump(mode="json"))


def read_params(root: Path) -> dict[str, Any]:
    """The active parameters of a checkout or worktree.

    Raises:
        StillhouseError: they are missing or damaged.
    """
    params = read_yaml(root / PIPELINE)
    if not isinstance(params, dict) or not isinstance(params.get("suite"), str):
        raise StillhouseError(
            f"{PIPELINE}: a mapping of parameters is needed; `stillhouse plan SUITE` writes it"
        )
    return params


def _check_teachers(source: Path, about: Production) -> None:
    """Raises StillhouseError where student, datasets and teachers do not belong together."""
    student = f"data/students/{about.student}-s{about.seed}"
    teachers = describe_student(source, f"{about.student}-s{about.seed}").get("teachers", {})
    for environment in about.environments:
        stem = f"{environment}-s{about.seed}"
        if environment not in teachers:
            raise StillhouseError(
                f"{student}: names no teacher of {environment} that was kept (an online student trains its own); a student of the "
                "methods offline and on_policy can be put into production"
            )
        teacher = sha256(source / "data/teachers" / stem / MANIFEST)
        played_by = _details(source, Path("data/datasets") / stem / SCHEMA_FILE, "teacher")
        for path, named in ((student, teachers[environment]), (f"data/datasets/{stem}", played_by)):
            if named != teacher:
                raise StillhouseError(
                    f"{path}: made from the teacher {str(named)[:12]} of {environment}, but data/teachers/ holds {teacher[:12]}; bring it "
                    "up to date first (`stillhouse run` does)"
                )


def _details(root: Path, path: Path, key: str) -> Any:
    try:
        return json.loads((root / path).read_text())[key]
    except (OSError, ValueError, KeyError, TypeError):
        raise StillhouseError(f"{path}: missing or damaged; `stillhouse run` makes it anew") from None


def _lookup(params: dict[str, Any], key: str) -> Any:
    try:
        return lookup(params, key)
    except KeyError:
        return None
