"""Workers: which are refused, the exchange through a DVC remote, and GPU slots. Threads stand in for the workers here."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.exceptions import ParameterTypeError
from prefect.settings import PREFECT_API_URL, temporary_settings
from ruamel.yaml import YAML
from toy_pipeline import dvc, runs, toy_plan, toy_stage

import flows.graph
import flows.runners
from flows.distillation import distillation
from flows.graph import Outcome, run_graph
from flows.runners import ALLOWED, Cluster, Exchange, Runner, _threads
from stillhouse.errors import StillhouseError
from tasks.plan import Stage
from tasks.worker import CHECKOUT, write_local_config

GIT = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]


@pytest.mark.parametrize(
    "address",
    [
        "tcp://-oProxyCommand=x:1",
        "tcp://host",
        "tcp://host:8786/../x",
        "http://host:8786",
        "inproc://host:1",
        "host:1 other:2",
        "tcp://host:8786\n",
        "auto",
        "$(id):1",
        "ray://",
        "tcp://" + "a" * 300 + ":1",
    ],
)
def test_hostile_addresses_are_no_parameters(address):
    with pytest.raises(ParameterTypeError, match="address"):
        distillation.validate_parameters({"runner": "dask", "address": address})


@pytest.mark.parametrize(
    "address",
    ["", "tcp://10.0.0.1:8786", "tls://[fd00::1]:8786", "ray://head.example.org:10001", "head:6379"],
)
def test_addresses_of_either_kind_are_parameters(address):
    distillation.validate_parameters({"address": address})


def test_what_cannot_be_is_refused_in_one_line(monkeypatch):
    def refused(*settings: Any) -> str:
        with pytest.raises(StillhouseError) as caught:
            Cluster(*settings).check()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    Cluster().check()
    assert "runner is 'threads'" in refused(Runner.threads, "tcp://10.0.0.1:8786")
    assert "runner is 'threads'" in refused(Runner.threads, "", Exchange.remote)
    monkeypatch.setattr(flows.runners, "find_spec", lambda name: None)
    assert refused(Runner.dask).endswith("pip install 'stillhouse[dask]'")
    assert refused(Runner.ray).endswith("pip install 'stillhouse[ray]'")
    monkeypatch.setattr(flows.runners, "find_spec", lambda name: name)
    Cluster(Runner.dask).check()
    assert "but tcp://HOST:8786 is" in refused(Runner.dask, "ray://head:10001")
    assert "but ray://HOST:10001" in refused(Runner.ray, "tcp://head:8786")
    monkeypatch.setenv(ALLOWED, "tcp://10.0.0.1:8786 tcp://127.0.0.1:8786")
    assert f"set {ALLOWED} where the flow runs" in refused(Runner.dask, "tcp://10.0.0.9:8786")
    for api, reached in (("http://127.0.0.1:4200/api", False), ("http://10.0.0.2:4200/api", True)):
        with temporary_settings({PREFECT_API_URL: api}):
            Cluster(Runner.dask, "tcp://127.0.0.1:8786").check()
            with (
                contextlib.nullcontext() if reached else pytest.raises(StillhouseError, match="cannot reach")
            ):
                Cluster(Runner.dask, "tcp://10.0.0.1:8786").check()


@pytest.mark.parametrize(
    ("failures", "said", "begun"),
    [
        (2, "Starting Ray client server failed.", 3),
        (3, "Starting Ray client server failed.", 3),
        (1, "no", 1),
    ],
)
def test_a_ray_client_server_that_does_not_start_is_asked_again(monkeypatch, caplog, failures, said, begun):
    attempts = []
    monkeypatch.setattr(flows.runners, "get_logger", logging.getLogger)  # Prefect's own does not propagate

    class RayTaskRunner(contextlib.AbstractContextManager):
        def __init__(self, **settings: Any) -> None:
            assert settings["address"] == "local"

        def __enter__(self) -> None:
            attempts.append(self)
            if len(attempts) <= failures:
                raise ConnectionAbortedError(f"Initialization failure:\n{said}")

        def __exit__(self, *error: object) -> None: ...

    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 2.0})
    runners = SimpleNamespace(PrefectRayFuture=object)
    modules = {"ray": ray, "prefect_ray": SimpleNamespace(RayTaskRunner=RayTaskRunner)}
    for name, module in (modules | {"prefect_ray.task_runners": runners}).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flows.runners, "CONNECT_PAUSE", 0)
    starts = failures < begun
    with (
        contextlib.nullcontext()
        if starts
        else pytest.raises(StillhouseError, match=f"not start here: .*{said}"),
        flows.runners._ray("", 0) as pool,
    ):
        assert pool.slots == 2
    assert len(attempts) == begun
    assert caplog.text.count("asking again") == begun - 1


def run(plan: list[Stage], exchange: Exchange = Exchange.remote, **options: Any) -> Outcome:
    results: list[Outcome] = []
    selection: dict[str, Any] = {"only": [], "from_": [], "downstream": [], "force": [], **options}

    @flow(name="toy", persist_result=False)
    def toy_flow() -> None:
        cluster = Cluster(Runner.dask, "", exchange)
        results.append(run_graph(plan, Path.cwd(), cluster=cluster, **selection))

    toy_flow()
    return results[0]


def commit() -> None:
    subprocess.run(["git", "add", "--all"], check=True)
    subprocess.run([*GIT, "commit", "--quiet", "--message", "a commit"], check=True)


def entries(folder: Path) -> dict[str, Any]:
    return YAML(typ="safe").load(folder / "dvc.lock")["stages"]


@pytest.fixture
def project(toy, tmp_path_factory, monkeypatch, prefect_harness):
    """The toy with its plan, committed, its DVC remote, and a worker's clone of it; threads are the worker."""
    monkeypatch.setattr(flows.graph, "pool_of", lambda cluster, count: _threads("", count))
    Path(".gitignore").write_text("/.stillhouse/\n/logs/\n/count-*\n__pycache__/\n")
    plan = toy_plan(toy_stage("a"), toy_stage("b"), toy_stage("c", "a", "b"))
    dvc("remote", "add", "--default", "store", str(tmp_path_factory.mktemp("store")))
    commit()
    worker = tmp_path_factory.mktemp("worker") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(toy), str(worker)], check=True)
    monkeypatch.setenv(CHECKOUT, str(worker))
    return plan, worker


def worker_runs(worker: Path, name: str) -> int:
    """How often the stage ran in the worktree that the worker used last."""
    path = worker / ".stillhouse/workers/0" / f"count-{name}"
    return len(path.read_text()) if path.exists() else 0


def test_stages_run_in_the_workers_clone_and_dvc_restores_them_here(project, tmp_path_factory, monkeypatch):
    plan, worker = project
    outcome = run(plan)
    assert outcome.failed == {}
    assert sorted(outcome.executed) == ["a", "b", "c"]
    assert Path("data/c").read_text() == "c<a><b>"
    assert [runs(name) for name in "abc"] == [0, 0, 0], "a stage ran here"
    assert worker_runs(worker, "c") == 1
    lock, here = entries(Path.cwd()), Path.cwd()
    assert set(json.loads(Path("machines.json").read_text())) == {"a", "b", "c"}

    # The same entries as without workers.
    alone = tmp_path_factory.mktemp("alone") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(here), str(alone)], check=True)
    monkeypatch.chdir(alone)
    dvc("repro")
    assert entries(alone) == lock

    # Somebody else's clone, which has nothing but the remote: all of it is restored from there.
    other = tmp_path_factory.mktemp("other") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(here), str(other)], check=True)
    monkeypatch.chdir(other)
    monkeypatch.setenv(CHECKOUT, "nowhere: no worker is needed")
    outcome = run(plan)
    assert sorted(outcome.cached) == ["a", "b", "c"]
    assert Path("data/c").read_text() == "c<a><b>"
    assert entries(other) == lock


def test_a_forced_stage_runs_anew_on_the_worker_and_its_new_outs_come_back(project):
    plan, _ = project
    # What it writes differs from run to run, as on a GPU it may.
    toy_stage("a", script="name = f'a{time.time_ns()}'")
    Path("stage_a.py").write_text(
        Path("stage_a.py").read_text().replace("Path('data', name)", "Path('data', 'a')")
    )
    commit()
    run(plan, only=["a"])
    first = Path("data/a").read_text()
    outcome = run(plan, only=["a"])
    assert outcome.cached == ["a"]
    outcome = run(plan, only=["a"], force=["a"])
    assert outcome.executed == ["a"]
    assert Path("data/a").read_text() != first
    assert entries(Path.cwd())["a"]["outs"][0]["size"] == len(Path("data/a").read_text())


def test_what_keeps_a_worker_from_its_work_is_one_line(project, monkeypatch):
    plan, _ = project

    def reason(name: str = "a") -> str:
        outcome = run(plan, only=[name])
        assert list(outcome.failed) == [name]
        assert "\n" not in outcome.failed[name]
        return outcome.failed[name]

    with monkeypatch.context() as patch:
        patch.delenv(CHECKOUT)
        assert f"{CHECKOUT} is not set" in reason()
    toy_stage("a", script="print('error: the teacher is too weak', file=sys.stderr); sys.exit(2)")
    commit()
    with monkeypatch.context() as patch:
        patch.setenv("GIT_ALLOW_PROTOCOL", "none")
        assert "is neither in" in reason()
    assert reason().startswith("the teacher is too weak (on ")
    assert "the teacher is too weak" in Path("logs/a.log").read_text()  # the worker's log, here

    # A worker with other versions.
    digest = Path("data/code/a.json")
    digest.parent.mkdir()
    code = "import json; print(json.dumps({'environment': {'device': 'cpu', 'torch': '1.0'}, 'modules': {}}))"
    plan = toy_plan(
        Stage(
            "digest_code",
            ["sh", "-c", f'python -c "{code}" > {digest}'],
            outs=[str(digest)],
            always_changed=True,
        ),
        Stage("a", ["sh", "-c", "echo a > data/a"], deps=[str(digest)], outs=["data/a"]),
    )[1:]
    commit()
    assert "on this worker" in (said := reason())
    assert "install requirements.lock on both" in said
    assert "is absent" in said or "and absent where" in said or "torch" in said


def test_what_is_not_committed_cannot_be_sent_nor_anything_without_a_remote(project):
    plan, _ = project
    Path("my_world.py").write_text("x = 1\n")
    with pytest.raises(StillhouseError, match=r"my_world\.py is not committed; commit it"):
        run(plan)
    commit()
    dvc("remote", "remove", "store")
    commit()
    with pytest.raises(StillhouseError, match="no DVC remote is configured: `dvc remote add"):
        run(plan)


def test_what_git_keeps_is_made_here(project):
    plan, worker = project
    page = Stage(
        "page",
        ["sh", "-c", "touch $STILLHOUSE_MARKER; cat data/a > page.txt"],
        deps=["data/a"],
        in_git=["page.txt"],
    )
    plan = toy_plan(*plan[1:], page)
    Path("page.txt").write_text("before\n")
    commit()
    outcome = run(plan, only=["a", "page"])
    assert sorted(outcome.executed) == ["a", "page"]
    assert Path("page.txt").read_text() == "a"
    assert (worker / ".stillhouse/workers/0/page.txt").read_text() == "before\n"
    assert run(plan, only=["a", "page"]).failed == {}  # though the page differs from the commit now


def test_a_worktree_has_the_checkouts_cache_and_remotes(tmp_path):
    for name in ("checkout", "tree"):
        (tmp_path / name / ".dvc").mkdir(parents=True)
    (tmp_path / "checkout/.dvc/config").write_text(
        "[core]\n    remote = near\n['remote \"near\"']\n    url = ../../store\n['remote \"far\"']\n    url = s3://bucket/store\n"
    )
    (tmp_path / "checkout/.dvc/config.local").write_text("['remote \"far\"']\n    access_key_id = key%1\n")
    write_local_config(tmp_path / "checkout", tmp_path / "tree", Path("/the/cache"))
    local = tmp_path / "tree/.dvc/config.local"
    assert local.stat().st_mode & 0o077 == 0  # credentials are in it
    text = local.read_text()
    assert "dir = /the/cache" in text
    assert f"url = {tmp_path}/store" in text
    assert "url = s3://bucket/store" in text
    assert "access_key_id = key%1" in text


def test_stages_on_a_gpu_share_its_slots(toy, prefect_harness):
    code = Path("data/code/x.json")
    code.parent.mkdir()
    code.write_text(json.dumps({"environment": {"device": "cuda"}, "modules": {}}))
    record = "pathlib.Path(f'time-{name}').write_text(f'{time.time()} '); time.sleep(1.5)\nopen(f'time-{name}', 'a').write(str(time.time()))"
    plan = toy_plan(toy_stage("a", script=record), toy_stage("b", script=record))

    def together() -> bool:
        outcome = run(plan, Exchange.shared, workers=2)
        assert sorted(outcome.executed) == ["a", "b"]
        first, second = sorted(tuple(map(float, Path(f"time-{name}").read_text().split())) for name in "ab")
        for path in (*Path("data").glob("[ab]"), Path("dvc.lock")):
            path.unlink()
        shutil.rmtree(".dvc/cache")
        return second[0] < first[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flows.graph, "pool_of", lambda cluster, count: _threads("", count))
        assert together()  # the server has no limit `gpu`
        with get_client(sync_client=True) as client:
            client.upsert_global_concurrency_limit_by_name("gpu", 1)
        try:
            assert not together()
        finally:
            with get_client(sync_client=True) as client:
                client.delete_global_concurrency_limit_by_name("gpu")
