"""Stage: one small file per stage kind that changes when, and only when, the code or the versions behind it do.

``python -m tasks.digest_code --device auto train_teacher-dqn collect_dataset ...`` writes ``data/code/<kind>.json``. A kind is
a stage's verb, plus what the stage imports by name (an algorithm, a method). Modules are hashed over their syntax tree, without
docstrings and comments: an edit to ``losses/distillation.py`` reruns students and not teachers, a comment reruns nothing.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import os
import runpy
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grimp

from stillhouse.errors import StillhouseError
from stillhouse.files import write_json

FOLDER = Path("data/code")
PACKAGES = ("stillhouse", "tasks")
VERSIONS = ("torch", "numpy", "scipy", "gymnasium", "minatar", "safetensors", "matplotlib")
SIMULATORS = ("ale-py", "box2d", "mujoco", "envpool")  # only where they are installed


# The package of what a stage imports by name first; everything after that, and everywhere else, is an algorithm.
_PACKAGES = {
    "distill_student": "stillhouse.distillation",
    "train_multi_task": "stillhouse.multi_task",
    "meta_train": "stillhouse.meta",
    "meta_evaluate": "stillhouse.meta",
}
_ALGORITHMS = "stillhouse.agents"
_FAMILIES = "stillhouse.envs"  # what comes after a method of meta-learning


def kind_of(verb: str, *imported: str) -> str:
    """``train_teacher-dqn``, ``distill_student-online-dqn-pqn``, or the verb alone."""
    return "-".join([verb, *imported])


def roots_of(kind: str) -> list[str]:
    """The modules where a kind's imports begin: its stage, and what the stage imports by name."""
    verb, *imported = kind.split("-")
    after = _FAMILIES if verb.startswith("meta_") else _ALGORITHMS
    packages = [_PACKAGES.get(verb, _ALGORITHMS), *[after] * len(imported)]
    return [
        f"tasks.{verb}",
        *(f"{package}.{name}" for package, name in zip(packages, imported, strict=False)),
    ]


def import_graph() -> grimp.ImportGraph:
    """Which project module imports which, when it runs: what only a type checker imports changes nothing."""
    # Read from the files, so that nothing is imported; the cache would outlive a worktree.
    return grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)


def closure(graph: grimp.ImportGraph, roots: list[str]) -> set[str]:
    """Every project module that importing ``roots`` runs: parent packages too, which grimp's closure leaves out.

    Raises:
        StillhouseError: a root does not exist.
    """
    found: set[str] = set()
    todo = set(roots)
    while todo:
        module = todo.pop()
        if module not in graph.modules:
            raise StillhouseError(f"{module}: no such module, so its stage cannot be planned")
        found.add(module)
        reached = graph.find_modules_directly_imported_by(module)
        if parent := module.rpartition(".")[0]:
            reached = reached | {parent}
        todo |= reached - found
    return found


def digest_source(source: str) -> str:
    """A hash of the code's meaning: comments, docstrings, blank lines and quoting do not enter it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:32]


def source_of(module: str) -> Path:
    """The module's file, relative to the workspace's root."""
    base = Path(*module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def resolve_device(device: str) -> str:
    """``auto`` as the device that stages will use; without importing torch where its build knows no CUDA."""
    specification = find_spec("torch")
    if specification is None or specification.origin is None:
        raise StillhouseError("torch is not installed; run `make run`, or install requirements.lock")
    has_cuda = runpy.run_path(str(Path(specification.origin).with_name("version.py")))["cuda"] is not None
    if has_cuda and device != "cpu":
        import torch

        has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise StillhouseError(
            "device: 'cuda' was asked for, but torch finds no CUDA device here; use 'auto' or 'cpu'"
        )
    return "cuda" if has_cuda and device != "cpu" else "cpu"


def environment(device: str) -> dict[str, str]:
    """Versions of what computes, and the resolved device: inputs of every stage."""
    found = {"device": resolve_device(device), "python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    for name in SIMULATORS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def digest(kinds: list[str], device: str) -> None:
    """Write the digest file of every kind, as they are now, and of no other."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    graph = import_graph()
    closures = {kind: closure(graph, roots_of(kind)) for kind in kinds}
    hashes = {
        module: digest_source(source_of(module).read_text())
        for module in sorted(set().union(*closures.values()))
    }
    versions: dict[str, Any] = environment(device)
    for kind, modules in closures.items():
        content = {"environment": versions, "modules": {module: hashes[module] for module in sorted(modules)}}
        write_json(FOLDER / f"{kind}.json", content)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tasks.digest_code", allow_abbrev=False)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("kinds", nargs="+")
    arguments = parser.parse_args()
    try:
        digest(arguments.kinds, arguments.device)
    except (StillhouseError, SyntaxError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
