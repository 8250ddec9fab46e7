"""Run a command so that no process of it outlives the program that asked for it.

``Supervised`` starts ``python -m tasks.supervisor`` in a session of its own, and that starts the command. The supervisor
ends the command's whole family when it is told to (SIGTERM), and when the program that started it is gone, however
that died: it holds the other end of the supervisor's standard input, which then reads end-of-file. It is the family's
subreaper, so that a process whose parent died, even one in another session, comes back to it. Should the supervisor itself
be killed, the kernel kills the command (``PR_SET_PDEATHSIG``), and a stage watches the supervisor (``follow_supervisor``).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

GRACE_SECONDS = 8.0  # between TERM and KILL: long enough for a stage to save its state
SUPERVISOR_PID = "STILLHOUSE_SUPERVISOR_PID"

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Supervised:
    """A command under a supervisor. Leaving the ``with`` block ends the command and all that it started."""

    def __init__(
        self,
        argv: list[str],
        *,
        cwd: Path,
        log: Path,
        environment: dict[str, str] | None = None,
        grace: float = GRACE_SECONDS,
    ) -> None:
        """Start ``argv`` in ``cwd``, with its standard output and error appended to ``log``."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).resolve()), str(grace), *argv],
                cwd=cwd,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._grace = grace

    def wait(self, seconds: float | None = None) -> int | None:
        """The command's exit code (128 + n after signal n), or None when it still runs after ``seconds``."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> int:
        """End the command: TERM to all of it, KILL to what is left after the grace. Returns its exit code."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(self._grace + 5)
            except subprocess.TimeoutExpired:
                self._process.kill()  # takes the command with it, by PR_SET_PDEATHSIG
        return self._process.wait()

    def __enter__(self) -> Supervised:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._process.stdin:
            self._process.stdin.close()


def follow_supervisor() -> None:
    """End this process in good order when its supervisor dies, even where a shell stands between the two."""
    pid = os.environ.get(SUPERVISOR_PID)
    if not pid or not hasattr(os, "pidfd_open"):
        return

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            select.select([os.pidfd_open(int(pid))], [], [])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="follow-supervisor").start()


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _children() -> list[int]:
    """Processes whose parent is this one; orphans of the family are among them, this being their subreaper."""
    own, found = str(os.getpid()), []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                if fields[1] == own:
                    found.append(int(entry))
    return found


def _signal_family(leader: int, number: int) -> None:
    """Signal the command's process group, and every child of ours that has left it (with its own group)."""
    for pid in {leader, *_children()}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, number)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(pid) != leader:
                os.kill(pid, number)


def supervise(argv: list[str], grace: float) -> int:
    """Run ``argv`` and return its exit code when nothing of it is left."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    asked_to_stop = False

    def stop(*_: object) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # only to wake the loop below
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def before_exec() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)

    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            env={**os.environ, SUPERVISOR_PID: str(os.getpid())},
            start_new_session=True,
            preexec_fn=before_exec,
        )
    except OSError as error:
        print(f"{argv[0]}: cannot be started ({error.strerror})", file=sys.stderr)
        return 127

    leader, code, kill_at = process.pid, None, 0.0
    watched = [0, wake_read]
    while True:
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == leader:
                    code = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            break  # the whole family is gone
        if not kill_at and (asked_to_stop or code is not None):
            _signal_family(leader, signal.SIGTERM)
            kill_at = time.monotonic() + grace
        elif kill_at and time.monotonic() >= kill_at:
            _signal_family(leader, signal.SIGKILL)
            kill_at = time.monotonic() + 0.2  # again, for what was forked meanwhile
        timeout = max(0.0, kill_at - time.monotonic()) if kill_at else None
        ready, _, _ = select.select(watched, [], [], timeout)
        if wake_read in ready:
            os.read(wake_read, 4096)
        if 0 in ready and not os.read(0, 4096):
            asked_to_stop = True
            watched = [wake_read]
    assert code is not None
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[2:], float(sys.argv[1])))
