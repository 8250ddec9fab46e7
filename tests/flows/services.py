"""Services that tests marked ``services`` need, and hosts. `make services` installs them; nothing is expected to run."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from clones import environment

REQUIRED = "STILLHOUSE_SERVICES"


def need(there: object, what: str) -> None:
    """Skip the test where something is missing; fail it where everything has been installed."""
    if not there:
        said = f"{what} is not installed: `make services` installs it"
        if os.environ.get(REQUIRED) == "required":
            pytest.fail(said)
        pytest.skip(said)


def need_module(name: str) -> None:
    """The same for a Python package."""
    need(find_spec(name), f"the Python package {name}")


def postgresql_programs() -> Path:
    """Where Debian puts the newest PostgreSQL's programs, which are not on the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    need(found, "PostgreSQL (Debian's package postgresql)")
    return found[-1].parent


def chromium() -> str:
    """Debian's browser."""
    path = Path("/usr/bin/chromium")
    need(path.exists(), "Chromium (Debian's package chromium)")
    need_module("playwright")
    return str(path)


def free_port(host: str = "127.0.0.1") -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def until(reached: Callable[[], object], log: Path, seconds: float = 240) -> None:
    """Wait; where it is in vain, ``log`` says why."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)


def until_answered(request: urllib.request.Request, log: Path) -> None:
    """Ask a server, without a proxy, until it answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def answered() -> bool:
        with contextlib.suppress(OSError):
            opener.open(request, timeout=10).close()
            return True
        return False

    until(answered, log)


@contextlib.contextmanager
def running(argv: list[str], log: Path, cwd: Path | None = None, **variables: str) -> Iterator[None]:
    """A program for the block."""
    with open(log, "w") as output:
        process = subprocess.Popen(
            argv, cwd=cwd, env={**environment(), **variables}, stdout=output, stderr=output
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def s3_server(host: str, log: Path) -> Iterator[str]:
    """A real S3 server with an empty bucket ``results``; its address."""
    server = Path(f"{sys.prefix}-moto/bin/moto_server")
    need(server.exists(), "moto, an S3 server,")
    need_module("dvc_s3")
    port = free_port(host)
    with running([str(server), "-H", host, "-p", str(port)], log):
        endpoint = f"http://{host}:{port}"
        until_answered(urllib.request.Request(f"{endpoint}/results", method="PUT"), log)
        yield endpoint


@dataclass
class Hosts:
    """The flow's host, and two more.

    Attributes:
        address: of the flow's host, for the others.
        flow: a folder of the flow's host. The others find nothing there, where they are network namespaces.
        others: to begin a command with that is to run on another host, with that host's folder.
    """

    address: str
    flow: Path
    others: list[tuple[list[str], Path]]


def can_have_hosts() -> bool:
    """Whether this process may make network namespaces."""
    asked = ["unshare", "--net", "--mount", "--uts", "true"]
    return (
        shutil.which("ip") is not None
        and subprocess.run(asked, capture_output=True, check=False).returncode == 0
    )


@contextlib.contextmanager
def three_hosts(folder: Path) -> Iterator[Hosts]:
    """Network namespaces with mounts and a name of their own; where they are not allowed, this host three times."""
    names, net = ["worker1", "worker2"], f"10.78.{os.getpid() % 250}"
    for name in ("flow", *names):
        (folder / name).mkdir()
    if not can_have_hosts():
        yield Hosts("127.0.0.1", folder / "flow", [([], folder / name) for name in names])
        return
    mark = f"st{os.getpid()}"
    script = [
        f"ip link add {mark} type bridge",
        f"ip addr add {net}.1/24 dev {mark}",
        f"ip link set {mark} up",
    ]
    for number in (1, 2):
        one = f"{mark}-{number}"
        script += [
            f"ip netns add {one}",
            f"ip link add {one} type veth peer name eth0 netns {one}",
            f"ip link set {one} master {mark} up",
            f"ip -n {one} addr add {net}.{10 + number}/24 dev eth0",
            f"ip -n {one} link set eth0 up",
            f"ip -n {one} link set lo up",
        ]
    # What the flow's host has is hidden from the other: not even a path is shared.
    enter = 'mount -t tmpfs none "$1" && mount -t tmpfs none "$2" && hostname "$3" && shift 3 && exec "$@"'
    others = []
    for number, name in enumerate(names, 1):
        hidden = [str(folder / "flow"), str(folder / names[2 - number])]
        inside = ["unshare", "--mount", "--uts", "sh", "-ec", enter, "sh", *hidden, name]
        others.append((["ip", "netns", "exec", f"{mark}-{number}", *inside], folder / name))
    try:
        subprocess.run(["sh", "-ec", "\n".join(script)], check=True)
        yield Hosts(f"{net}.1", folder / "flow", others)
    finally:
        for number in (1, 2):
            subprocess.run(["ip", "netns", "delete", f"{mark}-{number}"], check=False)
        subprocess.run(["ip", "link", "delete", mark], check=False)
