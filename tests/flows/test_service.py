"""`stillhouse up`: a real Prefect server, worker and browser; runs triggered, cancelled and killed as people and machines do it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from clones import environment, make_clone, stillhouse
from services import chromium, postgresql_programs

from flows.service import SILENT_SECONDS, ask, state_of

pytestmark = pytest.mark.services

TINY = """
seeds: [0]
environments: {cartpole: {id: CartPole-v1}}
train_teacher: {cartpole: {algorithm: dqn, env_steps: 1000, learning_starts: 200}}
collect_dataset: {cartpole: {transitions: 1000}}
distill_student:
  small: {environments: [cartpole], updates: 40, evaluation_interval: 20, batch_size: 64, size: {features: 16, torso: [16]}}
fine_tune: {}
evaluate: {episodes: 8, num_envs: 8}
"""
LONG = TINY.replace("env_steps: 1000", "env_steps: 2000000")
# For what is promised no time: a machine may stand still for a minute, as CI's has.
PATIENCE = 240.0
BROWSER = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@dataclass
class Service:
    """A clone with its service up."""

    clone: Path
    port: int

    @property
    def ui(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Ask until there is an answer; no request here does more when it is made twice."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return ask(f"{self.ui}/api", method, path, body)
            except TimeoutError:  # it stands still
                print(self.stillness())
                if time.monotonic() > end:
                    raise
            except urllib.error.URLError as error:  # it is being started again
                if isinstance(error, urllib.error.HTTPError) or time.monotonic() > end:
                    raise
            time.sleep(0.5)

    def stillness(self) -> str:
        """What the server is doing, and how much of its time the machine waits, for whoever reads a failed test."""
        said = [self.logs()]
        spy = Path(sys.executable).parent / "py-spy"  # Ray brings it
        for process in self.processes("-m", "prefect", "server", "start") if spy.exists() else []:
            argv = [str(spy), "dump", "--nonblocking", "--pid", str(process)]
            with contextlib.suppress(subprocess.TimeoutExpired):
                dumped = subprocess.run(argv, capture_output=True, text=True, timeout=30)
                said.append(dumped.stdout + dumped.stderr)
        for waited in sorted(Path("/proc/pressure").glob("*")):
            said.append(f"{waited.name}: {waited.read_text()}")
        return "\n".join(said)

    def trigger(self, deployment: str = "distillation/distillation", **parameters: Any) -> str:
        found = self.ask("GET", f"/deployments/name/{deployment}")
        body = {
            "parameters": parameters,
            "state": {"type": "SCHEDULED"},
            "idempotency_key": str(uuid.uuid4()),
        }
        identifier: str = self.ask("POST", f"/deployments/{found['id']}/create_flow_run", body)["id"]
        return identifier

    def run(self, identifier: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/flow_runs/{identifier}")
        return found

    def wait(self, identifier: str, state: str, seconds: float = PATIENCE) -> dict[str, Any]:
        def reached() -> bool:
            now = self.run(identifier)
            assert now["state_name"] == state or now["state_type"] not in ENDS, (now["state"], self.logs())
            return now["state_name"] == state

        until(reached, seconds, lambda: f"{self.run(identifier)['state']}\n{self.logs()}")
        return self.run(identifier)

    def logs(self) -> str:
        folder = self.clone / ".stillhouse/service"
        return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in folder.glob("*.log"))

    def training(self, identifier: str) -> bool:
        """Whether a stage of the run has begun to train."""
        progress = f"*-{identifier[:6]}/.stillhouse/progress/train_teacher-*.json"
        return bool(list((self.clone / ".stillhouse/worktrees").glob(progress)))

    def processes(self, *words: str) -> list[int]:
        """Processes that run in the clone or a worktree of it and have all ``words`` in their command lines."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and (entry / "cwd").resolve().is_relative_to(self.clone):
                    command = (entry / "cmdline").read_bytes().decode(errors="replace")
                    if all(word in command for word in words):
                        found.append(int(entry.name))
            except OSError:
                continue  # it has just ended
        return found


ENDS = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def until(
    reached: Callable[[], Any],
    seconds: float = PATIENCE,
    otherwise: Callable[[], object] = lambda: "too late",
) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, otherwise()
        time.sleep(0.25)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    clone = make_clone(tmp_path_factory.mktemp("service") / "clone", "tiny", tiny=TINY, long=LONG)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    said = stillhouse(clone, "up", "--port", str(port))
    assert said.startswith(f"http://127.0.0.1:{port} ")
    service = Service(clone, port)
    try:
        yield service
    finally:
        stillhouse(clone, "down")
    assert state_of(clone) is None and not service.processes()


def test_what_runs_is_told_and_a_second_service_is_refused(service: Service) -> None:
    said = stillhouse(service.clone, "status")
    assert (
        f"up since 20{time.strftime('%y')}" in said
        and "deployment distillation\ndeployment meta_learning\ndeployment multi_task\n" in said
    )
    until(lambda: f"worker {socket.gethostname()}" in stillhouse(service.clone, "status"))
    said = stillhouse(service.clone, "up", code=2)
    assert said == f"error: the service is up already, at {service.ui}; `stillhouse down` stops it\n"


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"seeds": 101}, "101 is greater than the maximum of 100"),
        ({"loss": "hinge"}, "'hinge' is not one of"),
        ({"suite": "../../etc/passwd"}, "does not match"),
        ({"revision": "--upload-pack=x; rm"}, "does not match"),
        ({"set": ["x" * 1001]}, "is too long"),
        ({"in_place": True}, "Additional properties are not allowed ('in_place' was unexpected)"),
    ],
)
def test_no_run_exists_of_parameters_that_the_form_would_not_allow(
    service: Service, parameters: dict[str, Any], said: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        service.trigger(**parameters)
    assert refused.value.code in (409, 422)
    assert said in json.loads(refused.value.read())["detail"]


def test_what_no_form_can_know_is_said_by_the_run(service: Service) -> None:
    runs = {
        service.trigger(suite="tiny", revision="nosuch"): "nosuch",
        service.trigger(suite="tinny"): "unknown suite 'tinny' (did you mean 'tiny'?)",
        service.trigger(
            suite="tiny", set=["environments.cartpole.module=os"]
        ): "environments.cartpole.module",
        service.trigger(suite="tiny", only=["train_techer"]): "did you mean 'train_teacher'",
    }
    for identifier, said in runs.items():
        found = service.wait(identifier, "Rejected")
        assert said in found["state"]["message"] and "\n" not in found["state"]["message"]
    worktrees = service.clone / ".stillhouse/worktrees"
    assert not list(worktrees.glob("*")), "a refused run leaves nothing"


def test_two_runs_with_other_parameters_do_not_disturb_each_other(service: Service) -> None:
    runs = {loss: service.trigger(suite="tiny", loss=loss) for loss in ("nll", "mse")}
    names = {}
    for loss, identifier in runs.items():
        found = service.wait(identifier, "Completed")
        assert found["name"].startswith(f"tiny-{loss} ")
        names[loss] = f"{found['name'].replace(' ', '-')}-{identifier[:6]}"
        assert f"saved as experiment {names[loss]}" in found["state"]["message"], service.logs()
        artifacts = service.ask(
            "POST", "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [identifier]}}}
        )
        assert {"results", "learning-curves", "report", "report-summary"} <= {
            found["key"] for found in artifacts
        }
    listed = dvc(service.clone, "exp", "list", "--all-commits", "--name-only").split()
    assert set(names.values()) <= set(listed)
    shown = json.loads(dvc(service.clone, "exp", "show", "--json", "--all-commits"))
    assert {"nll", "mse"} <= {loss for loss in ("nll", "mse") if f'"loss": "{loss}"' in json.dumps(shown)}
    assert git(service.clone, "status", "--porcelain") == ""
    assert not (service.clone / "data/students").exists(), "the checkout has none of it"
    dvc(service.clone, "exp", "apply", names["mse"])
    assert "loss: mse" in (service.clone / "params/pipeline.yaml").read_text()
    assert (service.clone / "data/students/small-s0/manifest.json").exists()
    git(service.clone, "reset", "--quiet", "--hard")


def test_a_run_on_the_command_line_is_seen_in_the_ui(service: Service) -> None:
    said = stillhouse(service.clone, "run", "tiny", "--loss", "nll")
    assert "0 ran, 5 cached" in said, "another worktree shares the cache"
    newest = service.ask("POST", "/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})[0]
    assert newest["name"].startswith("tiny-nll ") and newest["state_name"] == "Completed"


killed: list[str] = []  # a run whose process was killed: judged further below, when its silence was noticed


def test_nothing_outlives_a_killed_run(service: Service) -> None:
    killed.append(service.trigger(suite="long"))
    until(lambda: service.training(killed[0]), otherwise=service.logs)
    (flow,) = service.processes("prefect.flow_engine") or service.processes("prefect.engine")
    os.kill(flow, signal.SIGKILL)
    until(lambda: not service.processes("tasks."), 15)


def test_cancelled_in_ten_seconds(service: Service) -> None:
    identifier = service.trigger(suite="long", seeds=2)
    until(lambda: service.training(identifier), otherwise=service.logs)
    started = time.monotonic()
    service.ask("POST", f"/flow_runs/{identifier}/set_state", {"state": {"type": "CANCELLING"}})
    until(lambda: not service.processes("tasks.") and not service.processes("flow_engine"), 10, service.logs)
    print(f"cancelled in {time.monotonic() - started:.1f} s")
    service.wait(identifier, "Cancelled")


def picture(page: Any, name: str) -> None:
    """For a person to look at, and for docs/images, where one is wanted: STILLHOUSE_PICTURES names the folder."""
    if folder := os.environ.get("STILLHOUSE_PICTURES"):
        page.screenshot(path=str(Path(folder, f"{name}.png")))


def test_a_form_is_filled_in_and_its_run_watched_to_the_table(service: Service) -> None:
    program = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=BROWSER)
        page = browser.new_page(viewport={"width": 1300, "height": 2200})
        page.set_default_timeout(PATIENCE * 1000 / 2)
        outside: list[str] = []
        page.on("request", lambda request: None if service.ui in request.url else outside.append(request.url))
        page.goto(f"{service.ui}/deployments")
        page.get_by_role("link", name="distillation", exact=True).first.click()
        page.get_by_role("button", name="Run", exact=True).click()
        page.get_by_text("Custom run").click()
        page.get_by_text("The students' loss.").wait_for()  # the help texts are there
        suite = page.locator("textarea").first
        suite.fill("tiny")
        page.get_by_text("suite", exact=True).last.scroll_into_view_if_needed()
        numbers = page.locator("input[type=number]")
        numbers.nth(1).fill("0.5")  # the budget
        picture(page, "ui-form")
        with page.expect_response(lambda response: response.url.endswith("/create_flow_run")) as created:
            page.get_by_role("button", name="Submit").click()
        identifier = created.value.json()["id"]
        found = service.run(identifier)
        assert found["parameters"]["suite"] == "tiny" and found["parameters"]["budget"] == 0.5
        page.goto(f"{service.ui}/runs/flow-run/{identifier}")
        service.wait(identifier, "Completed")
        page.get_by_text("Completed").first.wait_for()
        page.get_by_text("train_teacher-cartpole-s0").first.wait_for()
        picture(page, "ui-run")
        page.get_by_text("Artifacts", exact=True).first.click()
        page.get_by_text("results", exact=True).first.click()
        page.get_by_text("geometric mean").first.wait_for()
        picture(page, "ui-table")
        browser.close()
    assert not [url for url in outside if not url.startswith(("blob:", "data:"))]


def test_retraining_is_scheduled_paused_and_triggered(service: Service) -> None:
    program = chromium()
    from playwright.sync_api import sync_playwright

    found = service.ask("GET", "/deployments/name/retraining/retraining")
    assert [schedule["active"] for schedule in found["schedules"]] == [False]

    def runs(state: str) -> list[dict[str, Any]]:
        query = {
            "deployments": {"id": {"any_": [found["id"]]}},
            "flow_runs": {"state": {"name": {"any_": [state]}}},
        }
        listed: list[dict[str, Any]] = service.ask("POST", "/flow_runs/filter", query)
        return listed

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=BROWSER)
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        page.set_default_timeout(PATIENCE * 1000 / 2)
        page.goto(f"{service.ui}/deployments/deployment/{found['id']}")
        page.get_by_text("No runs found").wait_for()  # all has been drawn
        switch = page.locator(".deployment-schedule-card label[role=switch]")

        def switched(active: bool) -> bool:
            if service.ask("GET", f"/deployments/{found['id']}")["schedules"][0]["active"] == active:
                return True
            switch.click()  # while the page is being drawn, a click may be lost
            page.wait_for_timeout(5000)
            return False

        until(lambda: switched(True), otherwise=service.logs)
        until(lambda: runs("Scheduled"), otherwise=service.logs)
        assert {run["expected_start_time"][11:16] for run in runs("Scheduled")} == {"03:00"}
        picture(page, "ui-schedule")
        until(lambda: switched(False), otherwise=service.logs)
        until(lambda: not runs("Scheduled"))
        browser.close()
    stillhouse(service.clone, "degraded", "return 420 over the last 100 episodes")
    until(lambda: runs("Rejected"), otherwise=service.logs)
    assert "nothing is in production" in runs("Rejected")[0]["state"]["message"]


def test_server_and_worker_are_started_again(service: Service) -> None:
    for name, words in (
        ("worker", ("prefect", "worker", "start")),
        ("server", ("prefect", "server", "start")),
    ):
        before = service.processes(*words)
        for process in before:
            if "tasks/supervisor" not in Path(f"/proc/{process}/cmdline").read_text():
                os.kill(process, signal.SIGKILL)
        until(lambda: set(service.processes(*words)) - set(before), otherwise=service.logs)  # noqa: B023 - called at once
        assert f"{name} ended with exit code 137; started again" in service.logs()
    service.wait(service.trigger(suite="tiny", loss="nll"), "Completed")


def test_a_killed_run_is_marked(service: Service) -> None:
    service.wait(killed[0], "Crashed", SILENT_SECONDS + PATIENCE)


def test_all_is_gone_when_the_keeper_is_killed_and_the_next_takes_over(tmp_path: Path) -> None:
    clone = make_clone(tmp_path / "clone", "tiny", tiny=TINY, long=LONG)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    stillhouse(clone, "up", "--port", str(port))
    service = Service(clone, port)
    found = service.ask("GET", "/deployments/name/retraining/retraining")
    schedule = f"/deployments/{found['id']}/schedules/{found['schedules'][0]['id']}"
    service.ask("PATCH", schedule, {"active": True})
    (trigger,) = (
        known for known in service.ask("POST", "/automations/filter", {}) if "retrain" in known["name"]
    )
    service.ask("PATCH", f"/automations/{trigger['id']}", {"enabled": False})
    running = service.trigger(suite="long")
    until(lambda: service.training(running), otherwise=service.logs)

    os.kill(state_of(clone)["pid"], signal.SIGKILL)  # type: ignore[index]
    until(lambda: not service.processes(), 30, lambda: service.processes())
    assert stillhouse(clone, "status") == "the service is down; `stillhouse up` starts it\n"
    assert stillhouse(clone, "down") == "nothing to stop: the service is down\n"

    stillhouse(clone, "up", "--port", str(port))
    try:
        assert service.run(running)["state"]["message"] == "the service went down while it ran"
        found = service.ask("GET", "/deployments/name/retraining/retraining")
        assert [each["active"] for each in found["schedules"]] == [True]
        switched = {
            known["name"]: known["enabled"] for known in service.ask("POST", "/automations/filter", {})
        }
        assert switched == {trigger["name"]: False, "stillhouse: mark dead runs as crashed": True}
    finally:
        stillhouse(clone, "down")


@pytest.fixture
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server from Debian's package; its address."""
    programs = postgresql_programs()
    folder = Path(tempfile.mkdtemp(prefix="stillhouse-postgresql-"))  # where another user may go
    # It does not run as root.
    other = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if other:
        shutil.chown(folder, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    data = str(folder / "data")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    subprocess.run(
        [*other, programs / "initdb", "-D", data, "-U", "prefect", "-A", "trust"],
        check=True,
        capture_output=True,
    )
    start = [*other, programs / "pg_ctl", "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start"]
    subprocess.run(start, check=True, stdout=subprocess.DEVNULL)
    try:
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run(
            [*other, programs / "pg_ctl", "-D", data, "-m", "fast", "stop"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        shutil.rmtree(folder, ignore_errors=True)


def test_the_same_on_postgresql(postgresql: str, tmp_path: Path) -> None:
    clone = make_clone(tmp_path / "clone", "tiny", tiny=TINY)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    stillhouse(clone, "up", "--port", str(port), PREFECT_SERVER_DATABASE_CONNECTION_URL=postgresql)
    try:
        service = Service(clone, port)
        service.wait(service.trigger(suite="tiny", only=["train_teacher"]), "Completed")
        assert not (clone / ".stillhouse/service/prefect.db").exists()
        address = postgresql.replace("+asyncpg", "")
        asked = [
            "psql",
            address,
            "-Atc",
            "select count(*) from task_run where name = 'train_teacher-cartpole-s0'",
        ]
        assert subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip() == "1"
    finally:
        stillhouse(clone, "down")


@pytest.mark.parametrize(
    ("secret", "arguments", "said"),
    [
        ("", ("--host", "0.0.0.0"), "set PREFECT_SERVER_API_AUTH_STRING=user:password"),
        (":", ("--host", "0.0.0.0"), "set PREFECT_SERVER_API_AUTH_STRING=user:password"),
        ("", ("--host", "example"), "--host: an IP address or localhost is allowed"),
        ("", ("--port", "0"), "--port: 1 to 65535 is allowed"),
        ("", ("--runs", "0"), "--runs: 1 to 100 is allowed"),
    ],
)
def test_an_address_that_may_not_be_used_is_refused(
    service: Service, secret: str, arguments: tuple[str, ...], said: str
) -> None:
    assert said in stillhouse(service.clone, "up", *arguments, code=2, PREFECT_SERVER_API_AUTH_STRING=secret)


def test_a_port_in_use_is_refused(service: Service, tmp_path: Path) -> None:
    clone = make_clone(tmp_path / "clone", "tiny", tiny=TINY)
    said = stillhouse(clone, "up", "--port", str(service.port), code=2)
    assert (
        f"127.0.0.1:{service.port} cannot be used (Address already in use); --port takes another one" in said
    )


def dvc(clone: Path, *arguments: str) -> str:
    argv = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(
        argv, cwd=clone, env=environment(), check=True, capture_output=True, text=True
    ).stdout


def git(clone: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=clone, check=True, capture_output=True, text=True).stdout
