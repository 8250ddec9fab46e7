"""A private Prefect server for one run's duration, where no Prefect API is configured."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from stillhouse.errors import StillhouseError
from tasks.supervisor import Supervised

START_SECONDS = 120.0
PRIVATE = Path(".stillhouse/prefect")

# Services that a server for one run has no use for; the recorder of task runs and the events stay.
_IDLE = (
    "SCHEDULER",
    "LATE_RUNS",
    "FOREMAN",
    "CANCELLATION_CLEANUP",
    "PAUSE_EXPIRATIONS",
    "TRIGGERS",
    "REPOSSESSOR",
)


class PrivateServer:
    """Started at once, ready after :meth:`url`; ends with the ``with`` block, or with this process."""

    def __init__(self, checkout: Path) -> None:
        folder = checkout / PRIVATE
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        self._log = folder / "server.log"
        self._log.unlink(missing_ok=True)
        environment = {
            "PREFECT_HOME": str(folder),
            "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_UI_ENABLED": "false",
            "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
            **{f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in _IDLE},
        }
        argv = [
            sys.executable,
            "-m",
            "prefect",
            "server",
            "start",
            "--host",
            "127.0.0.1",
            "--port",
            str(self._port),
        ]
        self._process = Supervised(argv, cwd=folder, log=self._log, environment=environment, grace=5)

    def url(self) -> str:
        """The API's address, once it answers.

        Raises:
            StillhouseError: the server ended, or does not answer in time.
        """
        url = f"http://127.0.0.1:{self._port}/api"
        end = time.monotonic() + START_SECONDS
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() < end:
            if self._process.wait(0.1) is not None:
                break
            with (
                contextlib.suppress(OSError, urllib.error.URLError),
                opener.open(f"{url}/health", timeout=2) as answer,
            ):
                if answer.status == 200:
                    return url
        raise StillhouseError(f"the private Prefect server did not start; its log is {self._log}")

    def __enter__(self) -> PrivateServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()


def spare_loopback_the_proxy() -> None:
    """Requests to this machine must not go through a proxy that the environment names."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(
            [*hosts, *(host for host in ("127.0.0.1", "localhost") if host not in hosts)]
        )
