"""Stages of the toy pipeline, and DVC's own command line."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from tasks.plan import DVC_YAML, Stage, render


def toy_stage(
    name: str, *parents: str, script: str = "", cost: float = 1.0, environments: tuple[str, ...] = ()
) -> Stage:
    """A stage that writes its name and what its parents wrote, after ``script``; ``count-NAME`` counts its runs."""
    code = (
        "import os, pathlib, sys, time\n"
        f"name, parents = {name!r}, {parents!r}\n"
        "marker = os.environ.get('STILLHOUSE_MARKER')\n"
        "marker and pathlib.Path(marker).touch()\n"
        f"with open(f'count-{{name}}', 'a') as file: file.write('x')\n"
        f"{script}\n"
        "text = name + ''.join('<' + pathlib.Path('data', parent).read_text() + '>' for parent in parents)\n"
        "pathlib.Path('data', name).write_text(text)\n"
    )
    script_path = Path(f"stage_{name}.py")
    script_path.write_text(code)
    return Stage(
        name=name,
        argv=["python", str(script_path)],
        deps=[str(script_path), *(f"data/{parent}" for parent in parents)],
        outs=[f"data/{name}"],
        environments=list(environments),
        cost=cost,
    )


def toy_plan(*stages: Stage) -> list[Stage]:
    """Write the toy's ``dvc.yaml``."""
    digest = Stage(name="digest_code", argv=["python", "-c", "pass"], always_changed=True)
    plan = [digest, *stages]
    DVC_YAML.write_text(render(plan))
    return plan


def runs(name: str) -> int:
    """How often the stage's command ran."""
    path = Path(f"count-{name}")
    return len(path.read_text()) if path.exists() else 0


def with_path() -> dict[str, str]:
    """The environment in which `python` is this one."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "SHELL": "/bin/sh",
    }


def dvc(*arguments: str) -> str:
    """DVC's own command line."""
    argv = [sys.executable, "-m", "dvc", *arguments]
    result = subprocess.run(argv, env=with_path(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"{shlex.join(argv)}\n{result.stdout}\n{result.stderr}"
    return result.stdout
