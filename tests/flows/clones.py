"""A clone of this checkout, and the command line that users type, run in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from toy_pipeline import with_path

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """Without the Prefect of the tests."""
    names = {"PREFECT_API_URL", "PREFECT_TEST_MODE"}
    return {name: value for name, value in with_path().items() if name not in names}


def stillhouse(clone: Path, *arguments: str, code: int = 0, **variables: str) -> str:
    """Run the clone's own `stillhouse` and return what it printed."""
    argv = [sys.executable, "-m", "flows.cli", *arguments]
    result = subprocess.run(
        argv, cwd=clone, env={**environment(), **variables}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    return result.stdout + result.stderr


def make_clone(path: Path, suite: str, **suites: str) -> Path:
    """This checkout as it stands, edits included, in a repository of its own, with ``suites`` added and planned for ``suite``."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path / name)
    for name, content in suites.items():
        (path / "params/suites" / f"{name}.yaml").write_text(content)
    subprocess.run(["git", "init", "--quiet"], cwd=path, check=True)
    subprocess.run(["git", "config", "user.name", "test"], cwd=path, check=True)
    subprocess.run(["git", "config", "user.email", "test@example.org"], cwd=path, check=True)
    stillhouse(path, "plan", suite, "--overwrite")
    (path / "dvc.lock").unlink(missing_ok=True)
    subprocess.run(["git", "add", "--all"], cwd=path, check=True)
    subprocess.run(["git", "commit", "--quiet", "--message", "clone"], cwd=path, check=True)
    return path
