"""What every stage body shares: its arguments, its parameters, progress, scratch, and how it ends.

A stage is ``python -m tasks.<verb> [name] [--mode M] [--seed N]``, run by DVC in the workspace's root. It knows nothing of
DVC: it reads its own entry of ``dvc.yaml``, its own blocks of ``params/pipeline.yaml`` and its code digest.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stillhouse.errors import StillhouseError
from stillhouse.files import MANIFEST, sha256, write_atomic
from stillhouse.seeding import derive
from tasks.supervisor import follow_supervisor

PIPELINE = Path("params/pipeline.yaml")
DVC_YAML = Path("dvc.yaml")
RETRAINING = "retraining"  # the block of a retraining's stages

# Set by whoever runs the stage; a stage run by a plain `dvc repro` has none of them.
PROGRESS_FILE = "STILLHOUSE_PROGRESS"  # where the latest progress is written as JSON
MARKER_FILE = "STILLHOUSE_MARKER"  # touched when the command really runs: neither up to date nor restored
SCRATCH_HELD = (
    "STILLHOUSE_SCRATCH_HELD"  # the runner holds the scratch's lock, and clears it once DVC has the outs
)
SAVE_SECONDS = "STILLHOUSE_SAVE_SECONDS"  # how often a long stage saves its state


class Interrupted(BaseException):
    """The stage was asked to stop, and has saved what it could."""


def stage_name(verb: str, name: str = "", mode: str = "", source: str = "", seed: int = -1) -> str:
    """The one rule for stage names: ``verb-name-mode-source-sSEED``, without the parts a stage does not have."""
    return "-".join(
        [part for part in (verb, name, mode, source) if part] + ([f"s{seed}"] if seed >= 0 else [])
    )


# Ways of transfer that start from, or read, one source, and are a stage for each; the others are one stage.
BY_SOURCE = (
    "discriminative",
    "features",
    "full",
    "gradual",
    "head_only",
    "kickstart",
    "l2_sp",
    "progressive_2",
    "rehearsal",
)


def transfer_runs(modes: Iterable[str], sources: Iterable[str]) -> list[tuple[str, str]]:
    """Way and source of each stage of a transfer; the source is "" where the way has no single one."""
    names = [entry.partition(".")[0] for entry in sources]
    return [(mode, name) for mode in sorted(modes) for name in (names if mode in BY_SOURCE else [""])]


def transfer_stem(target: str, mode: str, source: str, seed: int) -> str:
    """What the files of a transfer are called: the target, the way, the source where it has one."""
    return stage_name(target, mode, source=source, seed=seed)


def read_yaml(path: Path) -> Any:
    """The file's content as plain mappings, lists and scalars.

    Raises:
        StillhouseError: it is missing, or not YAML.
    """
    try:
        return YAML(typ="safe").load(path.read_text())
    except FileNotFoundError:
        raise StillhouseError(f"{path}: missing; run `stillhouse plan SUITE` first") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise StillhouseError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def write_yaml(path: Path, content: Any) -> None:
    """Write plain mappings, lists and scalars, in block style."""
    yaml = YAML()
    yaml.default_flow_style = False
    text = io.StringIO()
    yaml.dump(content, text)
    write_atomic(path, text.getvalue())


def lookup(data: Any, key: str) -> Any:
    """``data["a"]["b"]`` for ``"a.b"``; KeyError with the whole key where a part is missing."""
    for part in key.split("."):
        if not isinstance(data, dict) or part not in data:
            raise KeyError(key)
        data = data[part]
    return data


def stage_entry(name: str) -> dict[str, Any]:
    """The stage's row of ``dvc.yaml``."""
    entries = (read_yaml(DVC_YAML) or {}).get("stages", {})
    if name not in entries:
        raise StillhouseError(f"{name}: no such stage in {DVC_YAML}; run `stillhouse plan`")
    return entries[name]


def _keys(entry: dict[str, Any]) -> list[str]:
    """The parameters that a stage reads."""
    return [key for row in entry.get("params", []) for keys in row.values() for key in keys]


def inputs_key(entry: dict[str, Any]) -> str:
    """A hash of all that decides a stage's outs: its command, its parameters, and the content of its deps."""
    parameters = read_yaml(PIPELINE)
    keys = _keys(entry)
    deps = {}
    for dep in entry.get("deps", []):
        path = Path(dep)
        manifest = path / MANIFEST
        if not path.exists() or (path.is_dir() and not manifest.is_file()):
            raise StillhouseError(
                f"{dep}: missing; run the stage that makes it first (`stillhouse run` does)"
            )
        deps[dep] = sha256(manifest if path.is_dir() else path)
    inputs = {"cmd": entry["cmd"], "deps": deps, "params": {key: lookup(parameters, key) for key in keys}}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def cache_folder(root: Path = Path()) -> Path:
    """The DVC cache of the checkout at ``root``; its worktrees share it."""
    config = configparser.ConfigParser(interpolation=None)
    config.read([root / ".dvc" / "config", root / ".dvc" / "config.local"])
    return (root / ".dvc" / config.get("cache", "dir", fallback="cache").strip("'\"")).resolve()


def scratch_root() -> Path:
    """Where the saved states of long stages lie: beside the DVC cache."""
    return cache_folder().with_name("scratch")


@contextlib.contextmanager
def hold_scratch(key: str) -> Iterator[Path]:
    """The scratch folder of the stage with these inputs, locked against any other run; waits for its turn."""
    root = scratch_root()
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{key}.lock"
    while True:
        with open(path, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(
                    "waiting: another run works on the same stage with the same inputs",
                    file=sys.stderr,
                    flush=True,
                )
                fcntl.flock(lock, fcntl.LOCK_EX)
            # Pruned in between, the file is another one by now, which somebody else may hold.
            if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                continue
            yield root / key
            return


def clear_scratch(folder: Path) -> None:
    """Forget the saved state. The empty lock file stays, until it is pruned."""
    shutil.rmtree(folder, ignore_errors=True)


class Scratch:
    """The saved state of a long stage: what lets it go on after an interruption, to the same bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._interval = float(os.environ.get(SAVE_SECONDS, "30"))
        self._saved_at = time.monotonic()
        self.polled = False
        self.interrupted = False

    def load(self) -> dict[str, Any] | None:
        """The state saved by an interrupted run of this stage with these inputs, or None."""
        from stillhouse.checkpoint import load_state

        if not self._folder.exists():
            return None
        try:
            state = load_state(self._folder)
            print("resumed from the saved state", file=sys.stderr, flush=True)
            return state
        except StillhouseError as error:
            print(f"starting afresh: the saved state cannot be used: {error}", file=sys.stderr, flush=True)
            return None

    def due(self) -> bool:
        """Whether to save now: the interval has passed, or the stage was asked to stop."""
        self.polled = True
        return self.interrupted or time.monotonic() - self._saved_at >= self._interval

    def save(self, state: dict[str, Any]) -> None:
        """Keep ``state`` (replacing an older one in one step).

        Raises:
            Interrupted: the stage was asked to stop, and may, now that its state is kept.
        """
        from stillhouse.checkpoint import save_state

        save_state(self._folder, state)
        self._saved_at = time.monotonic()
        if self.interrupted:
            raise Interrupted

    def clear(self) -> None:
        """Forget the saved state."""
        clear_scratch(self._folder)


class Progress:
    """Says how far a stage is: as JSON to whoever runs it, else as a line on standard error now and then."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._file = os.environ.get(PROGRESS_FILE)
        self._started = time.monotonic()
        self._first_done: float | None = None
        self._next = 0.0
        self._scalars = _scalar_writer(name)

    def update(
        self,
        done: float,
        total: float,
        unit: str = "steps",
        latest: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Report ``done`` of ``total`` units and the latest values by name, for example ``rollout/return``.

        The values also go to TensorBoard, under ``logs/tensorboard/``.
        """
        now = time.monotonic()
        if self._first_done is None:
            self._first_done = done  # a resumed stage starts in the middle; the rate must not count that
        if now < self._next and done < total:
            return
        rate = (done - self._first_done) / max(now - self._started, 1e-9)
        values = {name: float(value) for name, value in latest.items() if math.isfinite(value)}
        if self._file:
            self._next = now + 0.5
            content = {"done": done, "total": total, "unit": unit, "rate": rate, "latest": values}
            write_atomic(Path(self._file), json.dumps(content))
        else:
            self._next = now + 10.0
            print(
                f"{self._name}: {progress_line(done, total, unit, rate, values)}", file=sys.stderr, flush=True
            )
        self._scalars(int(done), values)


def progress_line(done: float, total: float, unit: str, rate: float, latest: dict[str, float]) -> str:
    """``12,000 of 50,000 env steps (24 %), 3,100/s, 12 s left, return 103.2``."""
    percent = 100 * done / total if total else 100
    parts = [f"{done:,.0f} of {total:,.0f} {unit} ({percent:.0f} %)"]
    if rate > 0:
        parts += [f"{rate:,.0f}/s", f"{max(total - done, 0) / rate:,.0f} s left"]
    shown = list(latest.items())[:3]
    return ", ".join(
        parts + [f"{name.replace('_', ' ').replace('/', ' ')} {value:.4g}" for name, value in shown]
    )


def _scalar_writer(name: str) -> Callable[[int, dict[str, float]], None]:
    """Writes TensorBoard scalars under ``logs/tensorboard/``; ``STILLHOUSE_TENSORBOARD=0`` turns it off."""
    if os.environ.get("STILLHOUSE_TENSORBOARD") == "0":
        return lambda step, values: None
    writer: Any = None

    def write(step: int, values: dict[str, float]) -> None:
        nonlocal writer
        if not values:
            return  # a short stage without values never pays for the import
        if writer is None:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(Path("logs", "tensorboard", name)))
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return write


class StageContext:
    """What a stage body is given."""

    def __init__(self, verb: str, name: str, mode: str, sources: Sequence[str], seed: int) -> None:
        self.verb, self.name, self.mode, self.sources, self.seed = verb, name, mode, list(sources), seed
        # The source that the names of a transfer's stage and files hold.
        self.source = sources[0].partition(".")[0] if mode in BY_SOURCE else ""
        self.stage = stage_name(verb, name, mode, self.source, seed)
        entry = stage_entry(self.stage)
        self._parameters = read_yaml(PIPELINE)
        self.deps: list[str] = entry.get("deps", [])
        digest_path = next((Path(dep) for dep in self.deps if dep.startswith("data/code/")), None)
        if digest_path is None or not digest_path.is_file():
            raise StillhouseError(
                f"{digest_path or self.stage}: no code digest; run `dvc repro digest_code` first"
            )
        digest = json.loads(digest_path.read_text())
        self.device: str = digest["environment"]["device"]
        self._closure: set[str] = set(digest["modules"])
        # What names are made of, and what randomness is made of: each generation of retraining has its own.
        generation = lookup(self._parameters, "retraining.generation") if RETRAINING in _keys(entry) else 0
        self.random_seed = derive(seed, "generation", generation) if generation else seed
        self.key = inputs_key(entry)
        self.progress = Progress(self.stage)
        self.scratch = Scratch(scratch_root() / self.key)

    def block(self, key: str) -> dict[str, Any]:
        """This stage's parameters under ``key``, for example ``train_teacher.cartpole``."""
        try:
            return lookup(self._parameters, key)
        except KeyError:
            raise StillhouseError(f"{key}: not in {PIPELINE}; run `stillhouse plan`") from None

    def check_closure(self) -> None:
        """Fail if a project module was imported whose edits would not rerun this stage."""
        loaded = {name for name in sys.modules if name.split(".")[0] in ("stillhouse", "tasks", "flows")}
        if missing := sorted(loaded - self._closure):
            raise StillhouseError(
                f"{self.stage}: imported {', '.join(missing)}, which its code digest does not cover, so an edit there "
                "would go unnoticed; import it where a static reading of the imports can see it"
            )


def _arguments(argv: list[str] | None) -> tuple[str, argparse.Namespace]:
    specification = sys.modules["__main__"].__spec__
    verb = specification.name.rpartition(".")[2] if specification else Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(prog=f"python -m tasks.{verb}", allow_abbrev=False)
    if verb not in ("report", "publish_results"):
        parser.add_argument("name", help="environment, student or target, as named in params/pipeline.yaml")
        if verb == "fine_tune":
            parser.add_argument("--mode", required=True)
            parser.add_argument("--sources", nargs="+", required=True)
        parser.add_argument("--seed", type=int, required=True)
    return verb, parser.parse_args(argv)


def main(body: Callable[[StageContext], None], argv: list[str] | None = None) -> None:
    """Run a stage body and exit: 0 done, 2 a mistake of the user (one line on standard error), 143 interrupted."""
    verb, arguments = _arguments(argv)
    follow_supervisor()
    scratch: Scratch | None = None

    def stop(*_: object) -> None:
        # A body that asks `scratch.due()` gets to save first; any other, or a second request, ends at once.
        if scratch is None or not scratch.polled or scratch.interrupted:
            raise Interrupted
        scratch.interrupted = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if marker := os.environ.get(MARKER_FILE):
        Path(marker).touch()
    try:
        context = StageContext(
            verb,
            getattr(arguments, "name", ""),
            getattr(arguments, "mode", ""),
            getattr(arguments, "sources", []),
            getattr(arguments, "seed", -1),
        )
        held = bool(os.environ.get(SCRATCH_HELD))
        with contextlib.nullcontext() if held else hold_scratch(context.key):
            scratch = context.scratch
            body(context)
            context.check_closure()
            if not held:
                clear_scratch(scratch_root() / context.key)
    except StillhouseError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except (
        OSError
    ) as error:  # a full disk, a missing permission: the user's to mend, and nothing half-written is left
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except MemoryError:
        print(f"error: {verb}: out of memory; lower the replay or batch size", file=sys.stderr, flush=True)
        sys.exit(2)
    except Interrupted:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGTERM)
