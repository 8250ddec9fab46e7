"""Running a whole suite as a user would, in a clone of HEAD, for what is measured of its results."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.machine import provenance
from benchmarks.quickstart import STILLHOUSE, clone
from tasks.report import BLOCKS, gather
from tasks.results import Results


def arguments(description: str | None) -> argparse.Namespace:
    """The command line of a benchmark that runs a suite: ``suite`` and ``work``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="the clone lies below it")
    return parser.parse_args()


def run_suite(suite: str, work: Path) -> tuple[Path, Results, dict[str, Any]]:
    """Run a suite in a clone of HEAD; one that was cut off goes on where it stopped, with the commit it began with.

    Returns:
        The clone, the suite's results, and their provenance.
    """
    folder = work / suite
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        clone(folder)
    subprocess.run([*STILLHOUSE, "run", suite, "--in-place"], cwd=folder, check=True)
    parameters = YAML(typ="safe").load((folder / "params/pipeline.yaml").read_text())
    # A clone from before a block was invented has none of it.
    results = gather({key: parameters.get(key, {}) for key in BLOCKS}, folder)
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    return folder, results, provenance() | {"commit": commit}
