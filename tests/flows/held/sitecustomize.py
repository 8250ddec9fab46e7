"""Loaded by every Python that the kill test starts: holds the process at a chosen moment until the test has struck.

``STILLHOUSE_HOLD`` is ``PHASE|NUMBER|FILE``: at the NUMBER-th moment of the phase FILE appears, and the process goes on when it
is gone. With the number 0 nothing is held, and FILE gets a line for each moment, with its phase.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

MODULE = next((word for word in sys.orig_argv if word.startswith("tasks.")), "")
WRITES = ("open", "os.rename", "os.mkdir", "os.link", "shutil.rmtree")
LONGEST_SECONDS = 20.0  # should the test die, nobody waits for ever


def phase_of(event: str, arguments: tuple[object, ...]) -> str:
    """The phase of a stage's life that an operation, about to happen, is a moment of; empty: of none."""
    paths = [os.fsdecode(path) for path in arguments[:2] if isinstance(path, str | bytes | os.PathLike)]
    if event == "open":
        paths, mode = paths[:1], arguments[1]
        reads = isinstance(mode, str) and not set(mode) & set("wax+")
    else:
        reads = False
    if not paths:
        return ""
    if MODULE == "tasks.dvc_stage":
        if os.path.basename(paths[-1]).startswith("dvc.lock") and not reads:
            return "writing dvc.lock"
        # DVC's engine opens an out after the command has run to hash it, and links or renames it into the cache.
        ran = os.path.exists(os.environ.get("STILLHOUSE_MARKER", "/none"))
        data = any("/data/" in os.path.abspath(path) for path in paths)
        return "hashing" if ran and data and (reads or event in ("os.rename", "os.link")) else ""
    if any("/scratch/" in path and not path.endswith(".lock") for path in paths) and not reads:
        # The last thing that saving does: from here on the stage trains.
        done = event == "shutil.rmtree" and paths[0].endswith(f".{os.getpid()}.tmp")
        return "training" if done else "saving a segment"
    return "renaming" if event == "os.rename" and paths[-1].startswith("data/") else ""


def install(wanted: str, number: int, file: str) -> None:
    """Hold this process at the ``number``-th moment of the phase ``wanted``."""
    seen = 0
    busy = threading.local()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in WRITES or getattr(busy, "here", False):
            return
        busy.here = True  # what is done here is audited too
        try:
            phase = phase_of(event, arguments)
            if phase and not number:
                with open(file, "a") as moments:
                    moments.write(phase + "\n")
            elif phase == wanted:
                seen += 1
                if seen == number:
                    open(file, "w").close()
                    end = time.monotonic() + LONGEST_SECONDS
                    while os.path.exists(file) and time.monotonic() < end:
                        time.sleep(0.002)
        finally:
            busy.here = False

    sys.addaudithook(hook)


if MODULE:
    with contextlib.suppress(KeyError):
        phase, number, file = os.environ["STILLHOUSE_HOLD"].split("|")
        install(phase, int(number), file)
