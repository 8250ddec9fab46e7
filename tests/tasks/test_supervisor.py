"""Processes are really started and really killed here; a survivor fails the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tasks.supervisor import Supervised

ROOT = Path(__file__).parents[2]

# A family of three: a shell-like parent, a child in its group, and a grandchild that left for a session of its own.
FAMILY = """
import os, subprocess, sys, time
code = "import os, pathlib, time; pathlib.Path({folder!r}, str(os.getpid())).touch(); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", code])
subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
exec(code)
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


def family(folder: Path, prefix: str = "") -> list[str]:
    folder.mkdir()
    return [sys.executable, "-c", prefix + FAMILY.replace("{folder!r}", repr(str(folder)))]


def wait_for(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def alive(folder: Path) -> list[int]:
    pids = [int(path.name) for path in folder.iterdir()]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in state(pid)]


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_exit_codes_and_output(tmp_path):
    for code in (0, 3):
        with Supervised(
            [sys.executable, "-c", f"print('hello'); exit({code})"], cwd=tmp_path, log=tmp_path / "log"
        ) as run:
            assert run.wait(20) == code
    assert (tmp_path / "log").read_text() == "hello\nhello\n"
    with Supervised(
        [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], cwd=tmp_path, log=tmp_path / "log"
    ) as run:
        assert run.wait(20) == 128 + 9
    with Supervised(["/no/such/program"], cwd=tmp_path, log=tmp_path / "log") as run:
        assert run.wait(20) == 127


@pytest.mark.parametrize("prefix", ["", STUBBORN])
def test_stop_ends_the_whole_family(tmp_path, prefix):
    people = tmp_path / "people"
    with Supervised(family(people, prefix), cwd=tmp_path, log=tmp_path / "log", grace=0.5) as run:
        assert wait_for(lambda: len(alive(people)) == 3)
        assert run.wait(0) is None
    assert alive(people) == []


def test_leftovers_of_a_finished_command_are_ended(tmp_path):
    people = tmp_path / "people"
    argv = family(people)
    argv[-1] = argv[-1].replace(
        "exec(code)", f"\nwhile len(os.listdir({str(people)!r})) < 2: time.sleep(0.01)"
    )
    with Supervised(argv, cwd=tmp_path, log=tmp_path / "log", grace=0.5) as run:
        assert run.wait(20) == 0
        assert len(list(people.iterdir())) == 2
        assert alive(people) == []


def test_a_command_may_use_the_grace_to_save(tmp_path):
    saver = """
    import pathlib, signal, sys, time
    def save(*_):
        time.sleep(0.5); pathlib.Path("saved").touch(); sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    pathlib.Path("ready").touch()
    time.sleep(60)
    """
    with Supervised(
        [sys.executable, "-c", textwrap.dedent(saver)], cwd=tmp_path, log=tmp_path / "log"
    ) as run:
        assert wait_for((tmp_path / "ready").exists)
        assert run.stop() == 143
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_program_that_asked(tmp_path, number):
    people = tmp_path / "people"
    program = f"""
    import pathlib, threading
    from tasks.supervisor import Supervised
    def work():
        with Supervised({family(people)!r}, cwd=pathlib.Path({str(tmp_path)!r}), log=pathlib.Path({str(tmp_path)!r}, "log"), grace=0.5) as run:
            run.wait()
    threading.Thread(target=work, daemon=True).start()
    threading.Event().wait()
    """
    asker = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        assert wait_for(lambda: len(alive(people)) == 3)
        asker.send_signal(number)
        asker.wait(20)
        assert wait_for(lambda: alive(people) == [])
    finally:
        asker.kill()


def test_a_killed_supervisor_takes_its_command_along(tmp_path):
    program = """
    import os, pathlib, subprocess, sys, time
    stage = "import pathlib, os, time; from tasks.supervisor import follow_supervisor; follow_supervisor(); " \\
        f"pathlib.Path({folder!r}, str(os.getpid())).touch(); time.sleep(60)"
    subprocess.Popen([sys.executable, "-c", stage]).wait()
    """
    people = tmp_path / "people"
    people.mkdir()
    argv = [sys.executable, "-c", textwrap.dedent(program).replace("{folder!r}", repr(str(people)))]
    with Supervised(argv, cwd=ROOT, log=tmp_path / "log") as run:
        assert wait_for(lambda: len(alive(people)) == 1)
        os.kill(run._process.pid, signal.SIGKILL)
        assert wait_for(lambda: alive(people) == [])
