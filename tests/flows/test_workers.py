"""A DVC remote on a real S3 server, and real Dask and Ray workers, with a shared folder or with nothing but remotes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clones import environment, make_clone, stillhouse
from services import Hosts, free_port, need_module, running, s3_server, three_hosts, until, until_answered

from tasks.stage import read_yaml
from tasks.worker import CHECKOUT

pytestmark = pytest.mark.services

TINY = """
seeds: [0]
environments:
  cartpole: &cartpole {id: CartPole-v1}
  again: *cartpole
train_teacher:
  cartpole: &teacher {algorithm: dqn, env_steps: 1000, learning_starts: 200}
  again: *teacher
collect_dataset: {cartpole: &dataset {transitions: 1000}, again: *dataset}
distill_student:
  small:
    {environments: [cartpole, again], updates: 40, evaluation_interval: 20, batch_size: 64, size: {features: 16, torso: [16]}}
fine_tune: {}
evaluate: {episodes: 8, num_envs: 8}
"""
STAGES = 8
FIVE = ("--only", "train_teacher", "--only", "collect_dataset", "--only", "distill_student")
LONG = ("--only", "train_teacher-cartpole-s0", "--set", "train_teacher.cartpole.env_steps=2000000")
KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
NO_KEYS = dict.fromkeys(KEYS, "") | {
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "a commit")


def clone_of(origin: Path, path: Path) -> Path:
    git(origin, "clone", "--quiet", str(origin), str(path))
    return path


def dvc(clone: Path, *arguments: str) -> None:
    argv = [sys.executable, "-m", "dvc", *arguments]
    subprocess.run(argv, cwd=clone, env=environment(), check=True, capture_output=True)


def set_remote(clone: Path, url: str, endpoint: str = "") -> None:
    """Give the clone a default remote, in a file that git does not keep."""
    dvc(clone, "remote", "add", "--local", "--force", "--default", "store", url)
    if endpoint:
        dvc(clone, "remote", "modify", "--local", "store", "endpointurl", endpoint)


def tree(folder: Path) -> dict[str, str]:
    """Every file below ``data/`` with its hash."""
    files = sorted(path for path in (folder / "data").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server("127.0.0.1", tmp_path_factory.mktemp("s3") / "moto.log") as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with the results of a run, committed."""
    clone = make_clone(tmp_path_factory.mktemp("made") / "clone", "tiny", tiny=TINY)
    assert f"{STAGES} ran, 0 cached" in stillhouse(clone, "run", "tiny", "--in-place")
    commit(clone)
    return clone


def test_a_fresh_clone_takes_everything_from_s3_and_runs_nothing(s3: str, made: Path, tmp_path: Path) -> None:
    set_remote(made, "s3://results/store", s3)
    said = stillhouse(made, "push", **KEYS)
    assert int(said.split(" files pushed")[0].split()[-1]) > STAGES

    fresh = clone_of(made, tmp_path / "fresh")
    set_remote(fresh, "s3://results/store", s3)
    assert not (fresh / "data/students").exists()
    assert "files pulled" in stillhouse(fresh, "pull", **KEYS)
    assert tree(fresh) == tree(made)
    assert f"0 ran, {STAGES} cached" in stillhouse(fresh, "run", "tiny", "--in-place")
    assert git(fresh, "status", "--porcelain") == ""

    # The run-cache has come along: what dvc.lock does not say is found by its inputs.
    lock = read_yaml(fresh / "dvc.lock")["stages"]
    (fresh / "dvc.lock").unlink()
    shutil.rmtree(fresh / "data/students")
    assert f"0 ran, {STAGES} cached" in stillhouse(fresh, "run", "tiny", "--in-place")
    assert read_yaml(fresh / "dvc.lock")["stages"] == lock
    assert tree(fresh) == tree(made)


def test_what_keeps_a_remote_from_use_is_one_line(s3: str, made: Path, tmp_path: Path) -> None:
    fresh = clone_of(made, tmp_path / "fresh")

    def refused(*arguments: str, **variables: str) -> str:
        said = stillhouse(fresh, *arguments, code=2, **{**KEYS, **variables})
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        print(line)
        return line

    for command in ("push", "pull"):
        assert "no DVC remote is configured: `dvc remote add --default NAME URL`" in refused(command)
    set_remote(fresh, "s3://results/empty", s3)
    for command in ("push", "pull"):
        assert "'nosuch' is not configured (store is)" in refused(command, "--remote", "nosuch")
    assert "the DVC remote lacks data/" in refused("pull")
    assert "locate credentials; set AWS_ACCESS_KEY_ID" in refused("pull", **NO_KEYS)
    # Without the extra.
    hidden = tmp_path / "hidden"
    (hidden / "dvc_s3").mkdir(parents=True)
    (hidden / "dvc_s3/__init__.py").write_text("raise ImportError('hidden')\n")
    path = f"{hidden}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    assert "pip install 'stillhouse[s3]'" in refused("pull", PYTHONPATH=path)
    set_remote(fresh, "s3://nosuch/store", s3)
    assert "The specified bucket does not exist" in refused("push")
    set_remote(fresh, "s3://results/store", f"http://127.0.0.1:{free_port()}")
    assert "Could not connect to the endpoint URL" in refused("pull")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with three_hosts(tmp_path_factory.mktemp("hosts")) as found:
        yield found


@pytest.fixture(scope="module")
def shared(hosts: Hosts, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """All that the hosts share, as environment variables: a git server, an S3 server and the Prefect API. The two have a clone each."""
    logs = tmp_path_factory.mktemp("logs")
    git_port, api_port = free_port(hosts.address), free_port(hosts.address)
    api = f"http://{hosts.address}:{api_port}/api"
    variables = {
        **KEYS,
        "PREFECT_API_URL": api,
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    listen = ["--reuseaddr", f"--listen={hosts.address}", f"--port={git_port}"]
    prefect = [
        sys.executable,
        "-m",
        "prefect",
        "server",
        "start",
        "--host",
        hosts.address,
        "--port",
        str(api_port),
    ]
    with (
        s3_server(hosts.address, logs / "s3.log") as endpoint,
        running(["git", "daemon", f"--base-path={hosts.flow}", "--export-all", *listen], logs / "git.log"),
        running(prefect, logs / "prefect.log", **variables, PREFECT_HOME=str(logs / "prefect")),
    ):
        hub = clone_of(made, hosts.flow / "hub")
        for arguments in (
            ("add", "--default", "store", "s3://results/workers"),
            ("modify", "store", "endpointurl", endpoint),
        ):
            dvc(hub, "remote", *arguments)
        (hub / "dvc.lock").unlink()
        commit(hub)
        for enter, folder in hosts.others:
            url = f"git://{hosts.address}:{git_port}/hub"
            argv = [*enter, "git", "clone", "--quiet", url, str(folder / "clone")]
            subprocess.run(argv, check=True, timeout=60)
        until_answered(urllib.request.Request(f"{api}/health"), logs / "prefect.log")
        # Ray asks for a token that all of its hosts have.
        yield variables | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}


@contextlib.contextmanager
def dask_cluster(hosts: Hosts, shared: dict[str, str], logs: Path) -> Iterator[str]:
    """A scheduler on the flow's host, and a worker on each other one; its address."""
    port = str(free_port(hosts.address))
    address = f"tcp://{hosts.address}:{port}"
    dask = [sys.executable, "-m", "dask"]
    scheduler = [*dask, "scheduler", "--host", hosts.address, "--port", port, "--no-dashboard"]
    worker = [*dask, "worker", address, "--nthreads", "1", "--nworkers", "1", "--no-dashboard"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(scheduler, logs / "scheduler.log"))
        for number, (enter, folder) in enumerate(hosts.others, 1):
            log = logs / f"worker{number}.log"
            stack.enter_context(
                running([*enter, *worker], log, folder / "clone", **of_worker(folder, shared))
            )
            until(lambda log=log: "Registered to" in log.read_text(), log)
        yield address


@contextlib.contextmanager
def ray_cluster(hosts: Hosts, shared: dict[str, str], logs: Path) -> Iterator[str]:
    """A head on the flow's host, which runs no stage, and a node on each other one; its address."""
    port, client = str(free_port(hosts.address)), str(free_port(hosts.address))
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
    short = tempfile.mkdtemp(prefix="ray-")  # the path of a socket has at most 107 bytes
    head = [*ray, "--head", f"--node-ip-address={hosts.address}", f"--port={port}", "--num-cpus=0"]
    head += [f"--ray-client-server-port={client}", "--include-dashboard=false", f"--temp-dir={short}"]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, short, ignore_errors=True)
        stack.enter_context(running(head, logs / "head.log", **shared))
        until(lambda: "Ray runtime started" in (logs / "head.log").read_text(), logs / "head.log")
        for number, (enter, folder) in enumerate(hosts.others, 1):
            log = logs / f"worker{number}.log"
            node = [*ray, f"--address={hosts.address}:{port}", "--num-cpus=1"]
            stack.enter_context(running([*enter, *node], log, folder / "clone", **of_worker(folder, shared)))
            until(lambda log=log: "Ray runtime started" in log.read_text(), log)
        try:
            yield f"ray://{hosts.address}:{client}"
        except BaseException:
            for log in sorted(Path(short).glob("session_latest/logs/ray_client_server*")):
                print(f"--- {log.name}", log.read_text(errors="replace")[-4000:], sep="\n")
            raise


CLUSTERS = {"dask": dask_cluster, "ray": ray_cluster}


def of_worker(folder: Path, shared: dict[str, str]) -> dict[str, str]:
    return {
        **shared,
        CHECKOUT: str(folder / "clone"),
        "PYTHONPATH": str(folder / "clone"),
        "HOME": str(folder),
    }


def begun_anew(hosts: Hosts, name: str) -> Path:
    """A clone on the flow's host; it and the others have no results, and a DVC remote that has none."""
    here = clone_of(hosts.flow / "hub", hosts.flow / name)
    for clone in (here, *(folder / "clone" for _, folder in hosts.others)):
        dvc(clone, "remote", "modify", "--local", "store", "url", f"s3://results/{name}")
        for left in (".dvc/cache", ".dvc/scratch", ".dvc/tmp"):
            shutil.rmtree(clone / left, ignore_errors=True)
    return here


@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_two_hosts_with_nothing_but_remotes_make_the_same(
    runner: str, hosts: Hosts, shared: dict[str, str], made: Path, tmp_path: Path
) -> None:
    need_module(f"prefect_{runner}")
    here = begun_anew(hosts, runner)
    with CLUSTERS[runner](hosts, shared, tmp_path) as address:
        remotely = ("--runner", runner, "--address", address, "--exchange", "remote")
        said = stillhouse(here, "run", "tiny", "--in-place", *FIVE, *remotely, **shared)
    print(said)
    assert "5 ran, 0 cached" in said
    alone = read_yaml(made / "dvc.lock")["stages"]
    assert read_yaml(here / "dvc.lock")["stages"].items() <= alone.items()
    for _, folder in hosts.others:
        assert list((folder / "clone/.stillhouse/workers/0/logs").glob("*")), "a worker had nothing to do"
        assert not (folder / "clone/data/students").exists(), "a worker's own checkout stays as it is"


def stages_in(*folders: Path) -> list[str]:
    """Command lines of the stages' processes whose current folder is in one of ``folders``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                here = Path(os.readlink(entry / "cwd"))
                if "tasks." in command and any(here.is_relative_to(folder) for folder in folders):
                    found.append(command)
    return found


def begin_long(
    clone: Path, reached: Callable[[], object], log: Path, *options: str, **variables: str
) -> subprocess.Popen[bytes]:
    """Start a run of one long stage, and wait until it is so far."""
    argv = [sys.executable, "-m", "flows.cli", "run", "tiny", "--in-place", *LONG, *options]
    variables |= {"STILLHOUSE_SAVE_SECONDS": "1"}
    with open(log, "w") as output:
        process = subprocess.Popen(
            argv, cwd=clone, env={**environment(), **variables}, stdout=output, stderr=output
        )
    try:
        until(lambda: reached() or process.poll() is not None, log, 300)
        assert process.poll() is None, log.read_text()
    except BaseException:
        process.kill()
        raise
    return process


def test_a_worker_ends_its_stage_when_the_run_that_asked_is_gone(
    hosts: Hosts, shared: dict[str, str], tmp_path: Path
) -> None:
    need_module("prefect_dask")
    here = begun_anew(hosts, "gone")
    clones = [folder / "clone" for _, folder in hosts.others]

    def saved() -> bool:
        return any(list(clone.glob(".dvc/scratch/*/manifest.json")) for clone in clones)

    quick = shared | {"STILLHOUSE_SAVE_SECONDS": "1"}
    with dask_cluster(hosts, quick, tmp_path) as address:
        remotely = ("--runner", "dask", "--address", address, "--exchange", "remote")
        for number in (signal.SIGINT, signal.SIGKILL):
            for clone in clones:
                shutil.rmtree(clone / ".dvc/scratch", ignore_errors=True)
            log = tmp_path / "run.log"
            process = begin_long(here, saved, log, *remotely, **shared)
            assert stages_in(*clones)
            process.send_signal(number)
            process.wait(90)
            until(lambda: not stages_in(*clones), log, 60)
            assert saved(), "what it had done is lost"
            assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_local_workers_do_what_threads_do(runner: str, made: Path, tmp_path: Path) -> None:
    need_module(f"prefect_{runner}")
    here = clone_of(made, tmp_path / "here")
    (here / "dvc.lock").unlink()
    two = ("--only", "train_teacher", "--runner", runner)
    assert "2 ran, 0 cached" in stillhouse(here, "run", "tiny", "--in-place", *two)
    alone = read_yaml(made / "dvc.lock")["stages"]
    assert read_yaml(here / "dvc.lock")["stages"].items() <= alone.items()
    one = ("--only", "collect_dataset-again-s0", "--runner", runner)
    failing = ("--set", "collect_dataset.again.minimum_return=1e6")
    said = stillhouse(here, "run", "tiny", "--in-place", *one, *failing, code=1)
    assert "error: collect_dataset-again-s0: weak teacher" in said


@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_an_interrupted_run_on_local_workers_leaves_nothing_and_goes_on(
    runner: str, made: Path, tmp_path: Path
) -> None:
    need_module(f"prefect_{runner}")
    here = clone_of(made, tmp_path / "here")
    said, stage = tmp_path / "run.log", here / "logs/train_teacher-cartpole-s0.log"

    def saved() -> list[Path]:
        return list(here.glob(".dvc/scratch/*/manifest.json"))

    process = begin_long(here, saved, said, "--runner", runner)
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 130, said.read_text()
    assert "Traceback" not in said.read_text()
    assert saved() and not stages_in(here)

    # Gone on with, and killed: its stage ends by itself.
    def resumed() -> bool:
        return stage.exists() and "resumed from the saved state" in stage.read_text()

    process = begin_long(here, resumed, said, "--runner", runner)
    process.kill()
    process.wait()
    until(lambda: not stages_in(here), said, 60)


@pytest.mark.parametrize(("runner", "scheme"), [("dask", "tcp://"), ("ray", "ray://")])
def test_a_cluster_that_is_not_there_is_one_line(
    runner: str, scheme: str, made: Path, tmp_path: Path
) -> None:
    need_module(f"prefect_{runner}")
    here = clone_of(made, tmp_path / "here")
    (here / "dvc.lock").unlink()  # or nothing is to be done, and no cluster asked
    where = ("--runner", runner, "--address", f"{scheme}127.0.0.1:{free_port()}")
    said = stillhouse(here, "run", "tiny", "--in-place", "--only", "train_teacher", *where, code=2)
    assert f"error: address: no {runner.capitalize()} " in said.strip().splitlines()[-1]
