"""What `stillhouse up` keeps running until `stillhouse down`: a Prefect server, a worker, the deployments of prefect.yaml.

A keeper (``python -m flows.service``) runs in a session of its own. Server and worker are its supervised children, started
again when they die, and gone when it is gone, however it died. It holds a lock for as long as it lives, which is how
others know that it does, and writes what they need to ``service.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from stillhouse.errors import StillhouseError
from stillhouse.files import write_atomic
from tasks.supervisor import Supervised

PRIVATE = Path(".stillhouse/service")
POOL = "stillhouse"
START_SECONDS = 300.0
STOP_SECONDS = 30.0
DATABASE_SECONDS = 60  # a server with a SQLite waits for its lock this long before it says that it is busy
ANSWER_SECONDS = DATABASE_SECONDS + 10.0
BUSY_SECONDS = 2 * ANSWER_SECONDS
AUTHENTICATION = "PREFECT_SERVER_API_AUTH_STRING"
DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
# A flow run that was killed says nothing any more; this long after its last word it is marked as crashed.
HEARTBEAT_SECONDS = 30
SILENT_SECONDS = 75


def state_of(checkout: Path) -> dict[str, Any] | None:
    """What the keeper has written about itself, or None where none lives."""
    folder = checkout / PRIVATE
    try:
        with open(folder / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        with contextlib.suppress(OSError, ValueError):
            state: dict[str, Any] = json.loads((folder / "service.json").read_text())
            return state
        return {}  # it has only just begun
    return None


def api_url(checkout: Path) -> str:
    """The API of the service that runs here; empty where none does."""
    state = state_of(checkout)
    return str(state["api"]) if state and state.get("ready") else ""


def up(checkout: Path, host: str, port: int, limit: int) -> dict[str, Any]:
    """Start the service, and wait until runs can be triggered from its UI.

    Args:
        checkout: the project.
        host: the address to listen on.
        port: of the UI and the API.
        limit: flow runs at a time.

    Raises:
        StillhouseError: it runs already, the address may not or cannot be used, or something did not start.
    """
    _check_address(host, port)
    if (state := state_of(checkout)) is not None:
        raise StillhouseError(
            f"the service is up already, at {state.get('ui', 'an address that it will tell soon')}; `stillhouse down` stops it"
        )
    folder = checkout / PRIVATE
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "keeper.log", "ab") as log:
        before = log.tell()
        keeper = subprocess.Popen(
            [sys.executable, "-m", "flows.service", host, str(port), str(limit)],
            cwd=checkout,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        return _wait_until_ready(checkout, keeper, before)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            keeper.terminate()
        keeper.wait(STOP_SECONDS)
        raise


def _wait_until_ready(checkout: Path, keeper: subprocess.Popen[bytes], before: int) -> dict[str, Any]:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if keeper.poll() is not None:
            log = (checkout / PRIVATE / "keeper.log").read_bytes()[before:]
            lines = log.decode(errors="replace").splitlines()
            said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            raise StillhouseError((said or lines or [f"it ended with exit code {keeper.returncode}"])[-1])
        state = state_of(checkout) or {}
        if state.get("pid") == keeper.pid and state["ready"]:
            return state
        time.sleep(0.1)
    raise StillhouseError(
        f"the service was not ready after {START_SECONDS:.0f} s; its logs are in {checkout / PRIVATE}"
    )


def down(checkout: Path) -> bool:
    """Stop the service and wait until it is gone; False where none runs.

    Raises:
        StillhouseError: it does not end.
    """
    state = state_of(checkout)
    if state is None:
        return False
    end = time.monotonic() + STOP_SECONDS
    asked = False
    while state is not None and time.monotonic() < end:
        if not asked and "pid" in state:
            with contextlib.suppress(ProcessLookupError):
                os.kill(state["pid"], signal.SIGTERM)
            asked = True
        time.sleep(0.1)
        state = state_of(checkout)
    if state is not None:
        raise StillhouseError(
            f"process {state.get('pid', 'of the keeper')} does not end; its logs are in {checkout / PRIVATE}"
        )
    return True


def _check_address(host: str, port: int) -> None:
    if not 1 <= port <= 65535:
        raise StillhouseError(f"--port: 1 to 65535 is allowed, but {port} was given")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise StillhouseError(
            f"--host: an IP address or localhost is allowed, but {host!r} was given"
        ) from None
    user, _, password = os.environ.get(AUTHENTICATION, "").partition(":")
    if not loopback and not (user and password):
        raise StillhouseError(
            f"--host {host}: whoever reaches the API can start any run, so that beyond loopback a secret is needed: set "
            f"{AUTHENTICATION}=user:password, or leave --host out"
        )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StillhouseError(
                f"{host}:{port} cannot be used ({error.strerror}); --port takes another one"
            ) from None


def environment_of(folder: Path, api: str) -> dict[str, str]:
    """Settings of server and worker: private to the checkout, silent towards the world."""
    secret = os.environ.get(AUTHENTICATION, "")
    return {
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": api,
        # SQLite in the checkout, unless the user's own environment names a PostgreSQL.
        DATABASE: os.environ.get(DATABASE, f"sqlite+aiosqlite:///{folder / 'prefect.db'}"),
        "PREFECT_SERVER_DATABASE_TIMEOUT": str(DATABASE_SECONDS),
        # On disk, or a server that is started again would crash the runs that hold one.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # No page of another site that a browser has open may read from the API, nor write to it.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": api.removesuffix("/api"),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_UI_API_URL": "/api",  # of whatever address the browser has reached the UI by
        "PREFECT_SERVER_UI_V2_ENABLED": "false",  # it calls an analytics host at every load
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_WORKER_HEARTBEAT_SECONDS": "10",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        **({"PREFECT_API_AUTH_STRING": secret} if secret else {}),
    }


def automation() -> dict[str, Any]:
    """The rule that marks runs as crashed whose process is gone: its heartbeats have stopped without an end."""
    # Events are named by a state's name, not its type.
    names = (
        "Completed",
        "Failed",
        "Cancelled",
        "Crashed",
        "Rejected",
        "Promoted",
        "Kept",
        "Identical",
        "Different",
    )
    ends = [f"prefect.flow-run.{name}" for name in names]
    return {
        "name": "stillhouse: mark dead runs as crashed",
        "description": f"No heartbeat for {SILENT_SECONDS} s and no end either: the run's process is gone.",
        "enabled": True,
        "trigger": {
            "type": "event",
            "posture": "Proactive",
            "after": ["prefect.flow-run.heartbeat"],
            "expect": ["prefect.flow-run.heartbeat", *ends],
            "match": {"prefect.resource.id": "prefect.flow-run.*"},
            "for_each": ["prefect.resource.id"],
            "threshold": 1,
            "within": SILENT_SECONDS,
        },
        "actions": [
            {
                "type": "change-flow-run-state",
                "state": "CRASHED",
                "message": "its process is gone: killed, or the machine went down. Run it again: long stages go on from their saved state.",
            }
        ],
    }


class Keeper:
    """The process behind `stillhouse up`."""

    def __init__(self, checkout: Path, host: str, port: int, limit: int) -> None:
        self._folder = checkout / PRIVATE
        self._checkout, self._host, self._port, self._limit = checkout, host, port, limit
        reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        address = f"[{reached}]" if ":" in reached else reached
        self._ui = f"http://{address}:{port}"
        self._environment = {
            **environment_of(self._folder, f"{self._ui}/api"),
            # The flows are those of this checkout, wherever another may be installed.
            "PWD": str(checkout),  # prefect.yaml asks for it; a child's own folder does not change it
            "PYTHONPATH": os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH", "")])),
        }
        self._stopping = False
        self._children: dict[str, Supervised] = {}

    def run(self) -> None:
        """Start everything, then start again what dies, until told to stop."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)
        try:
            self._write(ready=False)
            self._start("server")
            self._wait_for_server()
            self._configure()
            self._start("worker")
            self._deploy()
            self._write(ready=True)
            while not self._stopping:
                time.sleep(0.5)
                for name in ("server", "worker"):
                    code = self._children[name].wait(0)
                    if code is not None and not self._stopping:
                        print(f"{name} ended with exit code {code}; started again", flush=True)
                        time.sleep(1.0)
                        self._start(name)
        finally:
            # The worker first: it ends its runs, which tell the server how they ended.
            for name in ("worker", "server"):
                if name in self._children:
                    self._children[name].stop()

    def _stop(self, *_: object) -> None:
        if not self._stopping:
            self._stopping = True
            raise SystemExit(0)

    def _write(self, ready: bool) -> None:
        state = {
            "pid": os.getpid(),
            "ui": self._ui,
            "api": f"{self._ui}/api",
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "ready": ready,
        }
        write_atomic(self._folder / "service.json", json.dumps(state))

    def _start(self, name: str) -> None:
        arguments = {
            "server": ["server", "start", "--host", self._host, "--port", str(self._port)],
            "worker": [
                "worker",
                "start",
                "--pool",
                POOL,
                "--type",
                "process",
                "--name",
                socket.gethostname(),
            ],
        }[name]
        self._children[name] = Supervised(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=self._checkout,
            log=self._folder / f"{name}.log",
            environment=self._environment,
            grace=12 if name == "worker" else 5,  # a worker's runs save their stages' states first
        )

    def _wait_for_server(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._children["server"].wait(0.1) is None:
            with contextlib.suppress(OSError, urllib.error.URLError):
                self._ask("GET", "/health")
                return
        raise StillhouseError(f"the Prefect server did not start; its log is {self._folder / 'server.log'}")

    def _configure(self) -> None:
        """The work pool with its limit, and the automation."""
        pool = {
            "name": POOL,
            "type": "process",
            "concurrency_limit": self._limit,
            # Without the usual variables: who triggers a run chooses neither its command nor its environment.
            "base_job_template": {
                "job_configuration": {"stream_output": True},
                "variables": {"type": "object", "properties": {}, "additionalProperties": False},
            },
        }
        try:
            self._ask("POST", "/work_pools/", pool)
        except urllib.error.HTTPError as error:
            if error.code != 409:
                raise
            change = {name: pool[name] for name in ("concurrency_limit", "base_job_template")}
            self._ask("PATCH", f"/work_pools/{POOL}", change)
        # None of the pool's runs has outlived the last service; what a power cut left as running would fill the pool.
        pending = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
        query = {"flow_runs": pending, "work_pools": {"name": {"any_": [POOL]}}}
        for run in self._ask("POST", "/flow_runs/filter", query):
            state = {"type": "CRASHED", "message": "the service went down while it ran"}
            self._ask("POST", f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
        wanted = automation()
        for known in self._ask("POST", "/automations/filter", {}):
            if known["name"] == wanted["name"]:
                self._ask("DELETE", f"/automations/{known['id']}")
        self._ask("POST", "/automations/", wanted)

    def _deploy(self) -> None:
        """Every deployment of prefect.yaml; what was switched on or off in the UI stays as it was."""
        ours = {"work_pools": {"name": {"any_": [POOL]}}}
        before = {known["name"]: known for known in self._ask("POST", "/deployments/filter", ours)}
        triggers = {known["name"]: known["enabled"] for known in self._ask("POST", "/automations/filter", {})}
        log = self._folder / "deploy.log"
        argv = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        with Supervised(argv, cwd=self._checkout, log=log, environment=self._environment) as process:
            code = process.wait()
        if code:
            raise StillhouseError(f"prefect.yaml could not be deployed; what Prefect says is in {log}")
        for trigger in self._ask("POST", "/automations/filter", {}):
            if triggers.get(trigger["name"], trigger["enabled"]) != trigger["enabled"]:
                self._ask("PATCH", f"/automations/{trigger['id']}", {"enabled": triggers[trigger["name"]]})
        for deployment in self._ask("POST", "/deployments/filter", ours):
            # Without this, a parameter that a flow does not have is only noticed when its run has been started.
            schema = {**deployment["parameter_openapi_schema"], "additionalProperties": False}
            change: dict[str, Any] = {"parameter_openapi_schema": schema}
            if known := before.get(deployment["name"]):
                change["paused"] = known["paused"]
                switched = {_timing(each): each["active"] for each in known["schedules"]}
                for schedule in deployment["schedules"]:
                    if (active := switched.get(_timing(schedule))) not in (None, schedule["active"]):
                        path = f"/deployments/{deployment['id']}/schedules/{schedule['id']}"
                        self._ask("PATCH", path, {"active": active})
            self._ask("PATCH", f"/deployments/{deployment['id']}", change)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        return ask(f"{self._ui}/api", method, path, body)


_CLIENT = str(uuid.uuid4())


def _token(api: str) -> dict[str, str]:
    """What shows a server that a request was meant; nothing where it does not want to be shown."""
    try:
        token = ask(api, "GET", f"/csrf-token?client={_CLIENT}")["token"]
    except urllib.error.HTTPError:
        return {}
    return {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": _CLIENT}


def _timing(schedule: Mapping[str, Any]) -> str:
    """A schedule without its switch: what makes two of them the same."""
    return json.dumps(schedule["schedule"], sort_keys=True)


def ask(api: str, method: str, path: str, body: Any = None) -> Any:
    """One request to a Prefect API, without a proxy and again while its database is busy: its JSON answer, or None.

    Raises:
        urllib.error.URLError: nobody answers, or (``HTTPError``) the answer is an error.
        TimeoutError: somebody listens, and says nothing for longer than a server waits for its database.
    """
    headers = {"content-type": "application/json", **(_token(api) if method != "GET" else {})}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(api + path, method=method, data=data, headers=headers)
    if secret := os.environ.get(AUTHENTICATION) or os.environ.get("PREFECT_API_AUTH_STRING"):
        import base64

        request.add_header("authorization", f"Basic {base64.b64encode(secret.encode()).decode()}")
    # No proxy stands between a machine and itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            with opener.open(request, timeout=ANSWER_SECONDS) as answer:
                content = answer.read()
            return json.loads(content) if content else None
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > end:  # 503: its database is busy, nothing was done
                raise
        time.sleep(0.5)


def say_degraded(checkout: Path, reason: str) -> None:
    """Tell the configured Prefect server, else the service, that what is in production has become worse.

    The deployment `retraining` is triggered by it.

    Raises:
        StillhouseError: there is neither, or it does not take it.
    """
    from prefect.settings import PREFECT_API_URL

    api = PREFECT_API_URL.value() or api_url(checkout)
    if not api:
        raise StillhouseError("the service is down, so nobody would hear it; `stillhouse up` starts it")
    event = {
        "id": str(uuid.uuid4()),
        "occurred": datetime.datetime.now(datetime.UTC).isoformat(),
        "event": "stillhouse.metric.degraded",
        "resource": {"prefect.resource.id": "stillhouse.production"},
        "payload": {"reason": reason},
    }
    try:
        ask(api, "POST", "/events", [event])
    except OSError as error:
        raise StillhouseError(f"{api} does not take the event ({error})") from None


def overview(checkout: Path) -> list[str]:
    """What runs, in lines for a person."""
    state = state_of(checkout)
    if state is None:
        return ["the service is down; `stillhouse up` starts it"]
    if not state.get("ready"):
        return ["the service is starting"]
    api = state["api"]
    try:
        workers = ask(api, "POST", f"/work_pools/{POOL}/workers/filter", {})
        deployments = ask(api, "POST", "/deployments/filter", {})
        runs = ask(api, "POST", "/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 10})
    except urllib.error.HTTPError as error:
        raise StillhouseError(
            f"{api} answers {error.code}" + (f"; set {AUTHENTICATION}" if error.code == 401 else "")
        ) from None
    except (urllib.error.URLError, OSError):
        return [f"the server does not answer at {api}; the keeper (process {state['pid']}) starts it again"]
    online = [worker["name"] for worker in workers if worker["status"] == "ONLINE"]
    lines = [
        f"up since {state['since']}, {state['ui']}",
        f"worker{'s' * (len(online) > 1)} {', '.join(online) or 'none online'}",
    ]
    for deployment in sorted(deployments, key=lambda deployment: deployment["name"]):
        schedules = [
            f"{schedule['schedule'].get('cron') or schedule['schedule']}{'' if schedule['active'] else ' (off)'}"
            for schedule in deployment["schedules"]
        ]
        lines.append(
            f"deployment {deployment['name']}"
            + (f", schedule {', '.join(schedules)}" if schedules else "")
            + (", paused" if deployment["paused"] else "")
        )
    for run in runs:
        when = (run["start_time"] or run["expected_start_time"] or "")[:19].replace("T", " ")
        lines.append(f"run {run['name']}  {run['state_name']}  {when}")
    return lines


def main() -> NoReturn:
    """The keeper's own command line, in the checkout."""
    parser = argparse.ArgumentParser(prog="python -m flows.service", allow_abbrev=False)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("limit", type=int)
    arguments = parser.parse_args()
    checkout = Path.cwd()
    with open(checkout / PRIVATE / "lock", "a") as lock:
        for attempt in range(20):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (
                BlockingIOError
            ):  # by a keeper, or for an instant by somebody who looks whether there is one
                if attempt == 19:
                    print("error: the service is up already", flush=True)
                    sys.exit(2)
                time.sleep(0.05)
        for name in ("service.json", "server.log", "worker.log", "deploy.log"):
            (checkout / PRIVATE / name).unlink(missing_ok=True)
        try:
            Keeper(checkout, arguments.host, arguments.port, arguments.limit).run()
        except urllib.error.HTTPError as error:
            said = error.read()[:300].decode(errors="replace")
            print(f"error: {error.url} answers {error.code}: {said}", flush=True)
            sys.exit(2)
        except (StillhouseError, OSError) as error:
            print(f"error: {error}", flush=True)
            sys.exit(2)
    sys.exit(0)


if __name__ == "__main__":
    main()
