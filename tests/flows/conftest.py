"""A toy pipeline under real DVC and real Prefect, and one Prefect for the whole session."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def prefect_harness() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(autouse=True)
def nothing_is_stopped() -> Iterator[None]:
    """A process runs one flow; tests run many in theirs, and one that was stopped must not stop the next one's stages."""
    yield
    if module := sys.modules.get("tasks.run_stage"):
        module.stop_all.clear()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git and DVC repository without stages."""
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text((ROOT / ".dvc/config").read_text())
    (tmp_path / ".dvc/.gitignore").write_text((ROOT / ".dvc/.gitignore").read_text())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/.gitignore").write_text("*\n!.gitignore\n")
    (tmp_path / "params").mkdir()
    (tmp_path / "params/pipeline.yaml").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path
