"""The lock on the DVC cache: who needs what lies in it shares it, and who takes something out wants it alone.

Every process of DVC's engine shares it, wherever it runs, and so does a run for as long as it lasts: what one stage has put into
the cache may stand in no lock file that pruning reads before the next one has it.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from tasks.stage import cache_folder


@contextlib.contextmanager
def cache_in_use(checkout: Path, exclusive: bool = False) -> Iterator[bool]:
    """Say that what lies in the cache is needed, or, exclusively, that things are taken out of it.

    Yields:
        Whether the lock was had: who needs the cache waits for it, who wants it alone does not.
    """
    path = (
        cache_folder(checkout).with_name("scratch") / "cache-in-use"
    )  # beside the cache: whoever shares that shares this
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        except BlockingIOError:
            yield False
            return
        yield True
