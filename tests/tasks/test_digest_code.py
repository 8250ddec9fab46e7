"""What reruns a stage, and what does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.errors import StillhouseError
from tasks.digest_code import (
    closure,
    digest,
    digest_source,
    import_graph,
    kind_of,
    resolve_device,
    roots_of,
)

ROOT = Path(__file__).parents[2]


def test_comments_docstrings_and_layout_do_not_count():
    plain = 'def f(x):\n    return x + 1\n\nclass A:\n    y = "text"\n'
    dressed = '"""Module."""\n# why\ndef f(x):\n    """Doc."""\n\n    return (x\n            + 1)  # note\nclass A:\n    "Doc."\n    y = \'text\'\n'
    assert digest_source(plain) == digest_source(dressed)
    for other in (
        plain.replace("+ 1", "+ 2"),
        plain.replace("text", "texts"),
        plain.replace("return x", "return -x"),
    ):
        assert digest_source(other) != digest_source(plain)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Packages of the same names and shape as ours."""
    files = {
        "stillhouse/__init__.py": "",
        "stillhouse/agents/__init__.py": "import stillhouse.shared",
        "stillhouse/agents/dqn.py": "import stillhouse.replay.uniform",
        "stillhouse/replay/__init__.py": "",
        "stillhouse/replay/uniform.py": "def f():\n    import stillhouse.lazy",
        "stillhouse/agents/pqn.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import stillhouse.losses",
        "stillhouse/lazy.py": "",
        "stillhouse/shared.py": "",
        "stillhouse/losses.py": "",
        "tasks/__init__.py": "",
        "tasks/train_teacher.py": "import stillhouse.agents",
        "stillhouse/distillation/__init__.py": "",
        "stillhouse/distillation/offline.py": "import stillhouse.losses",
        "stillhouse/distillation/online.py": "",
        "tasks/distill_student.py": "import stillhouse.distillation",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


OFFLINE, ONLINE = "distill_student-offline", "distill_student-online-dqn"
KINDS = ["train_teacher-dqn", "train_teacher-pqn", OFFLINE, ONLINE]


def digests(project: Path) -> dict[str, bytes]:
    code = (
        f"import sys; sys.path[:0] = [{str(project)!r}]; sys.argv = ['x', *{KINDS!r}]\n"
        f"import importlib.util as u; s = u.spec_from_file_location('d', {str(ROOT / 'tasks/digest_code.py')!r})\n"
        f"sys.path.append({str(ROOT)!r})\n"
        "import stillhouse, types\n"
        "for name in ('errors', 'files'):\n"
        f"    t = u.spec_from_file_location('stillhouse.' + name, {str(ROOT)!r} + f'/stillhouse/{{name}}.py')\n"
        "    m = u.module_from_spec(t); sys.modules['stillhouse.' + name] = m; t.loader.exec_module(m)\n"
        "m = u.module_from_spec(s); sys.modules['d'] = m; s.loader.exec_module(m); m.main()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=project, check=True, timeout=60)
    return {kind: (project / f"data/code/{kind}.json").read_bytes() for kind in KINDS}


def changed(project: Path, name: str, text: str) -> set[str]:
    before = digests(project)
    (project / name).write_text(text)
    after = digests(project)
    return {kind for kind in KINDS if before[kind] != after[kind]}


def test_an_edit_reruns_the_kinds_that_import_it_and_no_other(project):
    modules = json.loads(digests(project)["train_teacher-dqn"])["modules"]
    assert set(modules) == {
        "tasks",
        "tasks.train_teacher",
        "stillhouse",
        "stillhouse.agents",
        "stillhouse.shared",
        "stillhouse.agents.dqn",
        "stillhouse.replay",
        "stillhouse.replay.uniform",
        "stillhouse.lazy",
    }
    assert changed(project, "stillhouse/losses.py", "x = 1") == {OFFLINE}
    assert changed(project, "stillhouse/losses.py", "x = 1  # why") == set()
    assert changed(project, "stillhouse/distillation/online.py", "x = 1") == {ONLINE}
    # An online student trains its teachers itself.
    assert changed(project, "stillhouse/lazy.py", "x = 1") == {"train_teacher-dqn", ONLINE}
    assert changed(project, "stillhouse/agents/pqn.py", "x = 1") == {"train_teacher-pqn"}
    # A parent package's __init__ runs too, and so does what it imports.
    assert changed(project, "stillhouse/replay/__init__.py", "x = 1") == {"train_teacher-dqn", ONLINE}
    assert changed(project, "stillhouse/shared.py", "x = 1") == {
        "train_teacher-dqn",
        "train_teacher-pqn",
        ONLINE,
    }
    assert changed(project, "stillhouse/__init__.py", "x = 1") == set(KINDS)


def test_this_projects_own_closures():
    graph = import_graph()
    dqn, pqn = (closure(graph, roots_of(kind_of("train_teacher", name))) for name in ("dqn", "pqn"))
    student = closure(graph, roots_of(kind_of("distill_student", "offline")))
    assert "stillhouse.agents.dqn" in dqn - pqn
    assert "stillhouse.agents.pqn" in pqn - dqn
    assert "stillhouse.losses.distillation" in student - dqn
    # A student that never acts does not depend on the environments' code.
    acting = closure(graph, roots_of(kind_of("distill_student", "on_policy")))
    assert "stillhouse.distillation.on_policy" in acting - student
    assert "stillhouse.envs.make" in acting - student
    # A joint network depends on its own method and algorithm.
    joint = closure(graph, roots_of(kind_of("train_multi_task", "soft_sharing", "ppo")))
    assert {"stillhouse.multi_task.soft_sharing", "stillhouse.agents.ppo"} <= joint
    assert not {"stillhouse.multi_task.hard_sharing", "stillhouse.agents.pqn", "tasks.train_teacher"} & joint
    drawn = closure(graph, roots_of(kind_of("train_multi_task", "distral", "impala")))
    assert {"stillhouse.multi_task.distral", "stillhouse.losses.distral"} <= drawn - joint
    # What acts of a Distral is a network of its own kind, which every stage that loads checkpoints can build.
    assert "stillhouse.networks.two_columns" in closure(graph, roots_of("evaluate"))
    # What only a type checker imports does not count.
    report = closure(graph, roots_of("report"))
    assert "stillhouse.envs.minatar" not in report
    assert not {"stillhouse.agents.dqn", "stillhouse.agents.pqn"} & (student | report)
    for name in ("tasks.params", "tasks.plan", "tasks.dvc_stage", "tasks.run_stage"):
        assert name not in dqn | pqn | student


def test_what_cannot_be_digested_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(StillhouseError, match=r"tasks\.no_such_stage: no such module"):
        digest(["no_such_stage"], "cpu")


def test_the_device_is_resolved_as_torch_would():
    import torch

    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto") == expected
    assert resolve_device("cpu") == "cpu"
    if expected == "cpu":
        with pytest.raises(StillhouseError, match="no CUDA device"):
            resolve_device("cuda")
