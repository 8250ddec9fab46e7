"""Peers in an environment of their own, so that what they need never meets what this project needs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

TORCH = "torch==2.13.0"


def make_peer(folder: Path, requirements: Iterable[str]) -> Path:
    """A virtual environment in ``folder`` with PyTorch and ``requirements``; its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    # torch first and pinned, or a dependency's plain `torch` could bring another build.
    for requirement in (TORCH, *requirements):
        subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True)
    return python


def one_thread() -> dict[str, str]:
    """The environment of a process that shall compute on one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
