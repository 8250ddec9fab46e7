"""What is in production: teachers with their training state, datasets and the student, in one folder that DVC tracks.

``data/production.dvc``, committed, says which: promoting is a commit of it, and so is rolling back. Retraining's stages read the
folder like any other input.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stillhouse.config import Config, parse
from stillhouse.errors import StillhouseError
from stillhouse.files import MANIFEST, replace_folder, write_json

FOLDER = Path("data/production")
POINTER = Path("data/production.dvc")
ABOUT = "production.json"
# What is kept of each environment: folder in data/, and in production.
PARTS = ("teachers", "training_state", "datasets")


class Production(Config):
    """``data/production/production.json``."""

    schema_version: Literal[1] = 1
    generation: int = Field(ge=0, description="0: put there by hand; else the retraining that made it")
    suite: str
    student: str
    seed: int
    environments: list[str] = Field(min_length=1)
    decision: dict[str, Any] = Field(
        default_factory=dict, description="the comparison that it was promoted by"
    )


def read_production(root: Path = Path()) -> Production:
    """What the folder says about itself.

    Raises:
        StillhouseError: nothing is in production, or its files are not here.
    """
    path = root / FOLDER / ABOUT
    if not path.is_file():
        if (root / POINTER).is_file():
            raise StillhouseError(
                f"{FOLDER}: not here; `dvc pull {POINTER}` or `dvc checkout {POINTER}` brings it"
            )
        raise StillhouseError(
            "nothing is in production yet: `stillhouse promote STUDENT-sSEED` puts a student there, with its teachers"
        )
    return parse(Production, json.loads(path.read_text()), str(path))


def part(kind: str, environment: str) -> Path:
    """Where production keeps a teacher, training state or dataset."""
    return FOLDER / kind / environment


def student_path(name: str) -> Path:
    """Where production keeps the student."""
    return FOLDER / "students" / name


def build(root: Path, about: Production) -> None:
    """Make ``data/production`` from what the pipeline has left in ``root``; the old one is replaced in one step.

    Raises:
        StillhouseError: something of it is missing.
    """
    wanted = {root / "data/students" / f"{about.student}-s{about.seed}": student_path(about.student)}
    for environment in about.environments:
        for kind in PARTS:
            wanted[root / "data" / kind / f"{environment}-s{about.seed}"] = part(kind, environment)
    for source in wanted:
        if not (source / MANIFEST).is_file():
            raise StillhouseError(
                f"{source.relative_to(root)}: missing or unfinished; `stillhouse run` makes it"
            )
    with replace_folder(root / FOLDER) as folder:
        for source, place in wanted.items():
            # Outs may be links into DVC's cache: a copy's permissions must not be theirs.
            shutil.copytree(source, folder / place.relative_to(FOLDER), copy_function=shutil.copyfile)
        write_json(folder / ABOUT, about.model_dump(mode="json"))
