"""What a result was measured on and by what: commit, command, processor, versions. Where results and their parts are kept."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stillhouse.files import write_json

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, Any]:
    """The run's circumstances, as plain data."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return {
        "command": "python -m "
        + " ".join([(sys.modules["__main__"].__spec__ or _Unnamed).name, *sys.argv[1:]]),
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "machine": {"processor": model, "cores": os.cpu_count(), "system": platform.system()},
        "versions": {
            name: version(name) for name in ("torch", "numpy", "gymnasium", "prefect", "dvc", "minatar")
        },
        "python": platform.python_version(),
    }


class _Unnamed:
    name = "benchmarks"


def kept(path: Path, settings: dict[str, Any], make: Callable[[], Any]) -> Any:
    """A part of a study: what lies in a file, or is made now and laid there.

    Raises:
        SystemExit: what lies there was made with other settings.
    """
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        write_json(path, {"settings": settings, "found": make()})
    there = json.loads(path.read_text())
    if there.get("settings") != settings:
        raise SystemExit(f"{path} is of other settings; remove it")
    return there["found"]


def save(name: str, result: dict[str, Any]) -> None:
    """Write ``benchmarks/results/<name>.json``, lists of numbers on one line each; a name may have a folder."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, sort_keys=True)
    text = re.sub(r"\[[-+.,\deE\s]*\]", lambda found: " ".join(found[0].split()), text)
    path.write_text(text.replace("[ ", "[").replace(" ]", "]") + "\n")


def load(name: str) -> dict[str, Any]:
    """What ``save`` wrote, or nothing."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}
