"""Kills of a stage's processes at random moments of every phase of its life: does the next run end in the same bytes?

    python -m benchmarks.kills            # 50 kills, about ten minutes on two cores

It is the test `tests/flows/test_kills.py`, with more kills than every test run has, and its outcome written down.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, provenance, save

ROOT = Path(__file__).parent.parent


def measure(kills: int, seed: int) -> dict[str, Any]:
    """Run the test; what it counted.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        environment = {
            **os.environ,
            "STILLHOUSE_KILLS": str(kills),
            "STILLHOUSE_KILLS_SEED": str(seed),
            "STILLHOUSE_KILLS_RESULT": str(result),
        }
        argv = [sys.executable, "-m", "pytest", "tests/flows/test_kills.py", "-m", "services", "-q", "-s"]
        code = subprocess.run(argv, cwd=ROOT, env=environment, check=False).returncode
        if code:
            raise SystemExit(f"the test failed with exit code {code}")
        return json.loads(result.read_text())


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    where = result["provenance"]
    lines = [
        "# Kills",
        "",
        f"`{where['command']}`, commit {where['commit']}, {where['machine']['processor']}, {where['machine']['cores']} cores; "
        f"the moments are those of seed {result['seed']}.",
        "",
        "A stage is trained, and killed (SIGKILL) at a random moment of each phase of its life in turn: one of its processes, all of "
        "them at once, or the flow that started it. After every kill: no process is left, `dvc.lock` is whole, and a stage that stands "
        "in it has all of its files, hashed again, in the workspace and in the cache. The next run goes on from the saved state wherever "
        "there is one. When the stage is done, every out has the hash that it had without a kill.",
        "",
        "| phase | kills |",
        "|---|---|",
        *(f"| {phase} | {count} |" for phase, count in result["phases"].items()),
        f"| **together** | **{result['kills']}** |",
        "",
        "| | |",
        "|---|---|",
        f"| killed | {', '.join(f'{who} {count}' for who, count in result['killed'].items())} |",
        f"| stages | {', '.join(f'{stage} {count}' for stage, count in result['stages'].items())} |",
        f"| struck while held at the very operation; the others up to 5 ms later (in training: at any time between two saves) "
        f"| {result['held']} |",
        f"| runs that found a saved state, and went on from it | {result['resumed']} of {result['resumed']} |",
        f"| times a killed stage was brought to its end, and every out ({result['outs']} of the stages together) had the same hash "
        f"| {result['compared']} of {result['compared']} |",
        f"| seconds | {result['seconds']} |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    about = provenance()  # of the commit that is tested
    result = measure(arguments.kills, arguments.seed) | {"provenance": about}
    save("kills", result)
    (RESULTS / "kills.md").write_text(table(result))


if __name__ == "__main__":
    main()
