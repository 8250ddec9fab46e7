"""What is in production: teachers with their training state, datasets and the student, in one folder that DVC tracks.

``data/production.dvc``, committed, says which: promoting is a commit of it, and so is rolling back. Retraining's stages read the
folder like any other input. How it comes to be is in ``tasks.promotion``, which no stage reads: an edit there reruns none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stillhouse.config import Config, parse
from stillhouse.errors import StillhouseError

FOLDER = Path("data/production")
POINTER = Path("data/production.dvc")
ABOUT = "production.json"
# What is kept of each environment: folder in data/, and in production.
PARTS = ("teachers", "training_state", "datasets")
_VERSION: Literal[2] = 2


class Production(Config):
    """``data/production/production.json``."""

    schema_version: Literal[2] = _VERSION
    generation: int = Field(ge=0, description="0: put there by hand; else the retraining that made it")
    suite: str
    student: str
    seed: int
    environments: list[str] = Field(min_length=1)
    params: dict[str, Any] = Field(description="of the pipeline that made it, complete")
    decision: dict[str, Any] = Field(
        default_factory=dict, description="the comparison that it was promoted by"
    )


def read_production(root: Path = Path()) -> Production:
    """What the folder says about itself.

    Raises:
        StillhouseError: nothing is in production, or its files are not here, damaged or of another version.
    """
    path = root / FOLDER / ABOUT
    if not path.is_file():
        if (root / POINTER).is_file():
            raise StillhouseError(
                f"{FOLDER}: not here; `dvc pull {POINTER}` or `dvc checkout {POINTER}` brings it"
            )
        raise StillhouseError(NOTHING)
    try:
        content = json.loads(path.read_text())
    except ValueError:  # not JSON, or not even text
        raise StillhouseError(
            f"{path}: damaged; `dvc checkout --force {POINTER}` brings what the cache has, `stillhouse verify` says whether that is sound"
        ) from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != _VERSION:
        raise StillhouseError(
            f"{path}: schema version {version}, but this stillhouse reads version {_VERSION}; `stillhouse promote STUDENT-sSEED` "
            "makes it anew"
        )
    return parse(Production, content, str(path))


NOTHING = (
    "nothing is in production yet: `stillhouse promote STUDENT-sSEED` puts a student there, with its teachers"
)


def part(kind: str, environment: str) -> Path:
    """Where production keeps a teacher, training state or dataset."""
    return FOLDER / kind / environment


def student_path(name: str) -> Path:
    """Where production keeps the student."""
    return FOLDER / "students" / name
