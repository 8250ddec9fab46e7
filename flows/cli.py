"""The ``stillhouse`` command. What is heavy (Prefect, torch) is imported by the command that needs it."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import webbrowser
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from stillhouse.errors import StillhouseError

EXAMPLES = """examples:
  stillhouse run quickstart                 the quickstart suite, here; again: everything is cached
  stillhouse run classic --seeds 5          another suite, in a worktree of its own, saved as a DVC experiment
  stillhouse run quickstart --set distill_student.temperature=0.1 --set train_teacher.cartpole.gamma=0.98
  stillhouse run quickstart --only evaluate --force evaluate
  stillhouse multi-task multi-task-classic --balancing pcgrad
  stillhouse meta-learning meta-learning --seeds 3
  stillhouse plan quickstart                write params/pipeline.yaml and dvc.yaml
  stillhouse play data/students/small-s0 --environment cartpole --output cartpole.gif
  stillhouse evaluate data/teachers/cartpole-s0 --episodes 200
  stillhouse lineage data/students/small-s0 where it comes from, back to the first env step
  stillhouse verify                         hash again all that is recorded; --repair mends what is broken
  stillhouse reproduce evaluate             run recorded stages again: the same bytes?
  stillhouse report                         where the report lies; --open shows it
  stillhouse up                             the Prefect UI with every deployment, until `stillhouse down`
  stillhouse push                           results and run-cache to the DVC remote; `stillhouse pull` brings them back
"""


def main(argv: list[str] | None = None) -> NoReturn:
    """The command line: exit code 0 done, 1 the run failed, 2 a mistake in what was asked, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        sys.exit(arguments.command(arguments))
    except StillhouseError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing is left running; run the same command to go on", file=sys.stderr)
        sys.exit(130)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stillhouse",
        description=(
            "Distil and transfer reinforcement-learning agents. Every command acts on the checkout that it\n"
            "is called in, and in a run's worktree on the checkout around it: what such a run has recorded is\n"
            "asked for by the name of its experiment (`--rev`)."
        ),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, function: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog="examples:\n"
            + "\n".join(line for line in EXAMPLES.splitlines() if f" stillhouse {name} " in f"{line} "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(command=function)
        return sub

    run = command("run", _run, "run a suite: teachers, datasets, students, transfer, evaluation, report")
    _suite_arguments(run, "distillation", "quickstart")
    run.add_argument("--loss", default="suite", choices=["kl", "nll", "mse"], help="the students' loss")
    run.add_argument("--temperature", type=float, default=0.0, metavar="T", help="of the kl loss")
    run.add_argument(
        "--student-share", type=float, default=0.0, metavar="X", help="student's share of the parameters"
    )
    run.add_argument(
        "--transfer",
        default="suite",
        metavar="WAY",
        help="one way of transfer beside scratch: full, gradual, ...",
    )
    joint = command(
        "multi-task", _run, "run a suite of networks that learn many environments at once, beside experts"
    )
    _suite_arguments(joint, "multi_task", "multi-task-classic")
    joint.add_argument(
        "--method", default="suite", metavar="M", help="hard_sharing, soft_sharing or distral, in all of them"
    )
    joint.add_argument(
        "--balancing", default="suite", metavar="B", help="uniform, pcgrad, ..., in all of them"
    )

    meta = command(
        "meta-learning",
        _run,
        "run a suite of meta-learners: meta-training, adaptation to unseen tasks, report",
    )
    _suite_arguments(meta, "meta_learning", "meta-learning")

    plan = command("plan", _plan, "check the parameters; write params/pipeline.yaml and dvc.yaml")
    plan.add_argument(
        "suite", nargs="?", default="", help="a file of params/suites/; without it, the active parameters"
    )
    plan.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any parameter; may be repeated"
    )
    plan.add_argument(
        "--check", action="store_true", help="write nothing; fail where dvc.yaml is stale or was edited"
    )
    plan.add_argument(
        "--overwrite", action="store_true", help="write dvc.yaml anew though it was edited by hand"
    )

    for name, function, text in (
        ("play", _play, "record a teacher or student at play, as .gif or .mp4"),
        ("evaluate", _evaluate, "judge a checkpoint on an environment"),
    ):
        sub = command(name, function, text)
        sub.add_argument(
            "checkpoint", type=Path, help="a checkpoint's folder, for example data/students/small-s0"
        )
        sub.add_argument(
            "--environment", default="", metavar="NAME", help="which of its environments (default: the first)"
        )
        sub.add_argument("--seed", type=int, default=0, metavar="N")
        sub.add_argument("--episodes", type=int, default=1 if name == "play" else 100, metavar="N")
        if name == "play":
            sub.add_argument(
                "--output", type=Path, default=Path("play.gif"), metavar="FILE", help=".gif or .mp4"
            )

    up = command(
        "up", _up, "bring up the Prefect UI, a worker and all deployments; they run until `stillhouse down`"
    )
    up.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default: this machine only)"
    )
    up.add_argument("--port", type=int, default=4200, metavar="N", help="of the UI (default: 4200)")
    up.add_argument(
        "--runs", type=int, default=2, metavar="N", help="runs at a time; others wait (default: 2)"
    )
    prune = command(
        "prune", _prune, "give back what old runs have left: worktrees, experiments, saved states, cache"
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    prune.add_argument(
        "--keep-runs", type=int, default=5, metavar="N", help="newest worktrees to keep (default: 5)"
    )
    prune.add_argument(
        "--keep-experiments",
        type=int,
        default=50,
        metavar="N",
        help="newest experiments to keep (default: 50)",
    )
    prune.add_argument(
        "--keep-days", type=float, default=7.0, metavar="X", help="keep saved states so long (default: 7)"
    )
    put = command(
        "promote",
        _promote,
        "put a student into production, with its teachers: a commit of data/production.dvc",
    )
    put.add_argument("student", help="as in data/students/, for example small-s0")
    put.add_argument(
        "--run", default="", metavar="NAME", help="of a run whose worktree is kept (default: the checkout)"
    )
    again = command(
        "retrain",
        _retrain,
        "train on what is in production, and replace it where that is surely an improvement",
    )
    for name, kind, text in (
        ("env-steps", int, "more of each teacher's training (default: the suite's own)"),
        ("updates", int, "more of the student's training (default: the suite's own)"),
        ("episodes", int, "in each of the two comparisons (default: the suite's own)"),
        ("workers", int, "stages at a time (default: as many as cores)"),
        ("probability", float, "of being better, needed for promotion (default: 0.95)"),
        ("floor", float, "no environment may fall below so much of production's score (default: 0.95)"),
    ):
        default = 0.95 if kind is float else 0
        again.add_argument(
            f"--{name}", type=kind, default=default, metavar="N" if kind is int else "X", help=text
        )
    again.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any parameter; may be repeated"
    )
    worse = command("degraded", _degraded, "tell the service that production has become worse: it retrains")
    worse.add_argument("reason", help="for the record, for example 'return 420 over the last 100 episodes'")
    back = command(
        "rollback", _rollback, "put back what was in production before: a new commit of data/production.dvc"
    )
    back.add_argument(
        "--generation",
        type=int,
        default=-1,
        metavar="N",
        help="which (default: the one before the present one)",
    )
    command("down", _down, "stop what `stillhouse up` has started, runs in progress with it")
    command("status", _status, "what runs: server, workers, deployments, the latest runs")

    lineage = command("lineage", _lineage, "where a file comes from, back to the first env step")
    lineage.add_argument(
        "path",
        type=Path,
        help="what the pipeline made, for example data/students/small-s0/weights.safetensors",
    )
    lineage.add_argument("--json", action="store_true", help="everything, as JSON")
    verify = command(
        "verify", _verify, "hash again what dvc.lock records, in the workspace and in DVC's cache"
    )
    verify.add_argument(
        "--repair", action="store_true", help="put back what is damaged or missing; no sound file is touched"
    )
    reproduce = command("reproduce", _reproduce, "run a recorded stage again, and compare it file by file")
    reproduce.add_argument("stage", metavar="STAGE", help="a stage (* allowed), or a family (train_teacher)")
    reproduce.add_argument("--downstream", action="store_true", help="also all that depends on it")
    reproduce.add_argument(
        "--workers", type=int, default=0, metavar="N", help="stages at a time (default: as many as cores)"
    )
    for sub, revision in ((lineage, "the checkout"), (verify, "the checkout"), (reproduce, "HEAD")):
        sub.add_argument(
            "--rev",
            default="",
            metavar="REV",
            help=f"git revision, or DVC experiment, whose dvc.lock counts (default: {revision})",
        )
    for name, text in (
        ("push", "copy all results and the run-cache to the DVC remote"),
        ("pull", "copy all results and the run-cache from the DVC remote"),
    ):
        sub = command(name, _transfer, text)
        sub.add_argument(
            "--remote", default="", metavar="NAME", help="which one (default: the default remote)"
        )
        sub.set_defaults(direction=name)

    report = command("report", _report, "where the latest report lies")
    report.add_argument("--open", action="store_true", help="show it in the browser")
    return parser


# Fields of a form that not every flow that runs a suite has.
_FORMS = ("loss", "temperature", "student_share", "transfer", "method", "balancing")


def _suite_arguments(command: argparse.ArgumentParser, flow: str, suite: str) -> None:
    """What every flow that runs a suite is told."""
    command.set_defaults(flow=flow)
    command.add_argument(
        "suite", nargs="?", default=suite, help=f"a file of params/suites/ (default: {suite})"
    )
    command.add_argument(
        "--seeds", type=int, default=0, metavar="N", help="number of seeds (default: the suite's own)"
    )
    command.add_argument(
        "--budget", type=float, default=1.0, metavar="X", help="factor on every step and update budget"
    )
    command.add_argument("--device", default="suite", choices=["auto", "cpu", "cuda"], help="what computes")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any parameter; may be repeated"
    )
    for name, text in (
        ("only", "run these alone"),
        ("from", "run these, and all that depends on them"),
        ("downstream", "run what depends on these, without them"),
        ("force", "run these even where they are up to date"),
    ):
        text += ": a stage (* allowed), a family (train_teacher) or an environment; may be repeated"
        command.add_argument(
            f"--{name}", action="append", default=[], metavar="STAGE", help=text, dest=f"{name}_"
        )
    command.add_argument(
        "--workers", type=int, default=0, metavar="N", help="stages at a time (default: as many as cores)"
    )
    command.add_argument(
        "--runner",
        default="threads",
        choices=["threads", "dask", "ray"],
        help="what runs the stages (default: threads)",
    )
    command.add_argument(
        "--address",
        default="",
        metavar="ADDRESS",
        help="Dask scheduler or Ray cluster (default: one on this machine)",
    )
    command.add_argument(
        "--exchange",
        default="shared",
        choices=["shared", "remote"],
        help="workers share this host's folders, or only a git remote and a DVC remote (default: shared)",
    )
    command.add_argument(
        "--in-place", action="store_true", help="run in the checkout itself, not in a worktree of its own"
    )
    command.add_argument(
        "--revision", default="", metavar="REV", help="git revision to run (default: the checkout as it is)"
    )


def _run(arguments: argparse.Namespace) -> int:
    from flows.workspace import find_checkout, hold, plan, plan_ahead

    checkout = find_checkout(Path.cwd())

    def check() -> None:
        overrides = _overrides(arguments)
        if _in_place(arguments) and not arguments.revision:
            with hold(checkout):
                plan_ahead(checkout, arguments.suite, overrides, "--in-place-run")
        elif not arguments.revision:
            plan(checkout, arguments.suite, overrides, "--dry-run")

    # Prefect takes longer to import than the planner's process takes to plan.
    with ThreadPoolExecutor(1) as beside:
        checked = beside.submit(check)
        return _with_prefect(checkout, lambda: _run_flow(arguments), checked.result)


def _with_prefect(checkout: Path, start: Callable[[], int], check: Callable[[], object]) -> int:
    """Start a flow in ``checkout`` with the configured Prefect server, else with a private one for its duration."""
    from flows.server import PrivateServer, spare_loopback_the_proxy

    os.chdir(checkout)
    spare_loopback_the_proxy()
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # As often as the service expects it, or it would take a long run for dead.
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    if secret := os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        os.environ.setdefault("PREFECT_API_AUTH_STRING", secret)
    # The run speaks for itself here; Prefect's own log goes to the API.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from prefect.logging.handlers import APILogHandler
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.service import api_url

    if url := PREFECT_API_URL.value() or api_url(checkout):
        with temporary_settings({PREFECT_API_URL: url}):
            _check_server(url)
            check()
            return start()
    with PrivateServer(checkout) as server:
        check()  # a mistake in the parameters shows while the server starts, and before anything is done
        with temporary_settings({PREFECT_API_URL: server.url()}):
            try:
                return start()
            finally:
                APILogHandler().flush()  # while there is a server to send them to


def _overrides(arguments: argparse.Namespace) -> list[str]:
    from flows.form import flat_overrides

    return [
        *flat_overrides(arguments.seeds, arguments.budget, **_form(arguments), device=arguments.device),
        *arguments.set,
    ]


def _form(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of the flow's own form."""
    return {name: getattr(arguments, name) for name in _FORMS if hasattr(arguments, name)}


def _in_place(arguments: argparse.Namespace) -> bool:
    """Whether it is asked for, or this is the committed quickstart as it is."""
    changed = arguments.suite != "quickstart" or arguments.revision or _overrides(arguments)
    return arguments.in_place or not changed


def _check_server(url: str) -> None:
    """Ask the configured Prefect server once whether it is there.

    Raises:
        StillhouseError: it is not.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    if error:
        raise StillhouseError(
            f"PREFECT_API_URL is {url}, but no Prefect server answers there ({' '.join(str(error).split())}): start it "
            "with `prefect server start`, or unset PREFECT_API_URL (also `prefect config unset PREFECT_API_URL`) for a "
            "private one"
        )


def _run_flow(arguments: argparse.Namespace) -> int:
    from flows.runners import ALLOWED
    from flows.workspace import in_place

    flow = getattr(importlib.import_module(f"flows.{arguments.flow}"), arguments.flow)
    in_place.set(_in_place(arguments))
    if arguments.address:
        os.environ[ALLOWED] = arguments.address  # whoever sits at this terminal decides what it trusts
    common = ["suite", "seeds", "budget", "device", "set"]
    common += ["workers", "runner", "address", "exchange", "revision"]
    parameters = {name: getattr(arguments, name) for name in common} | _form(arguments)
    parameters |= {
        "only": arguments.only_,
        "from_": arguments.from_,
        "downstream": arguments.downstream_,
        "force": arguments.force_,
    }
    return _finish(flow, parameters)


def _finish(flow: Any, parameters: dict[str, Any]) -> int:
    """Check the parameters, run the flow, and turn its end into an exit code."""
    from prefect import tags
    from prefect.client.schemas.objects import State
    from prefect.exceptions import ParameterTypeError

    try:
        flow.validate_parameters(parameters)
    except ParameterTypeError as error:
        raise StillhouseError(_first_problem(str(error))) from None
    with tags(flow.name, "command line"):
        state: State[Any] = flow(**parameters, return_state=True)
    if state.is_completed():
        return 0
    print(f"error: {' '.join((state.message or state.name or 'the run failed').split())}", file=sys.stderr)
    if state.name == "Rejected":
        return 2
    return 130 if state.is_crashed() or state.is_cancelled() else 1


def _first_problem(text: str) -> str:
    """Prefect's list of parameter problems as one line."""
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    return ": ".join(lines[1:3]) if len(lines) > 2 else " ".join(lines)


def _plan(arguments: argparse.Namespace) -> int:
    from flows.workspace import call_planner, find_checkout, hold

    checkout = find_checkout(Path.cwd())
    argv = ([arguments.suite] if arguments.suite else []) + [
        f"--set={override}" for override in arguments.set
    ]
    argv += ["--check"] * arguments.check + ["--overwrite"] * arguments.overwrite
    with contextlib.nullcontext() if arguments.check else hold(checkout):
        print(call_planner(checkout, *argv), end="")
    return 0


def _up(arguments: argparse.Namespace) -> int:
    from flows.service import up
    from flows.workspace import find_checkout

    if not 1 <= arguments.runs <= 100:
        raise StillhouseError(f"--runs: 1 to 100 is allowed, but {arguments.runs} was given")
    state = up(find_checkout(Path.cwd()), arguments.host, arguments.port, arguments.runs)
    print(f"{state['ui']}  (`stillhouse status` says what runs, `stillhouse down` stops it)")
    return 0


def _down(arguments: argparse.Namespace) -> int:
    from flows.service import down
    from flows.workspace import find_checkout

    print("stopped" if down(find_checkout(Path.cwd())) else "nothing to stop: the service is down")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    from flows.prune import Kept, prune
    from flows.workspace import find_checkout

    kept = Kept(arguments.keep_runs, arguments.keep_experiments, arguments.keep_days)
    for line in prune(find_checkout(Path.cwd()), kept, arguments.dry_run):
        print(line)
    return 0


def _promote(arguments: argparse.Namespace) -> int:
    from flows.production import promote_by_hand
    from flows.workspace import find_checkout, in_checkout

    checkout = find_checkout(Path.cwd())
    with in_checkout(checkout):
        commit = promote_by_hand(checkout, arguments.student, arguments.run)
    print(f"{arguments.student} is in production: commit {commit}")
    return 0


def _retrain(arguments: argparse.Namespace) -> int:
    from flows.production import standing
    from flows.workspace import find_checkout

    checkout = find_checkout(Path.cwd())

    def start() -> int:
        from flows.retraining import retraining

        form = ("env_steps", "updates", "episodes", "probability", "floor", "set", "workers")
        return _finish(retraining, {name: getattr(arguments, name) for name in form})

    return _with_prefect(checkout, start, lambda: standing(checkout).in_production())


def _degraded(arguments: argparse.Namespace) -> int:
    from flows.service import say_degraded
    from flows.workspace import find_checkout

    say_degraded(find_checkout(Path.cwd()), arguments.reason)
    print("said; `stillhouse status` shows the run that it triggers")
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    from flows.production import rollback
    from flows.workspace import find_checkout, in_checkout

    checkout = find_checkout(Path.cwd())
    with in_checkout(checkout):
        generation, commit = rollback(checkout, arguments.generation)
    print(f"generation {generation} is in production: commit {commit}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from flows.service import overview
    from flows.workspace import find_checkout

    print("\n".join(overview(find_checkout(Path.cwd()))))
    return 0


def _lineage(arguments: argparse.Namespace) -> int:
    from flows.workspace import find_checkout
    from tasks.git import resolve
    from tasks.lineage import lines, trace

    path = Path(os.path.abspath(arguments.path))
    path = path.parent.resolve() / path.name  # the last part may be a link into the cache
    checkout = find_checkout(path.parent)
    commit = resolve(checkout, arguments.rev) if arguments.rev else ""
    found = trace(checkout, path.relative_to(checkout).as_posix(), commit)
    print(json.dumps(found, indent=1) if arguments.json else "\n".join(lines(found)))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from flows.verification import repair, verify
    from flows.workspace import find_checkout, in_checkout
    from tasks.git import resolve

    checkout = find_checkout(Path.cwd())
    commit = resolve(checkout, arguments.rev) if arguments.rev else ""
    # A run in the checkout replaces files; at a revision only the cache is looked at.
    with contextlib.nullcontext() if commit else in_checkout(checkout):
        checked, size = verify(checkout, commit)
        broken = [file for file in checked if not file.sound]
        for file in broken:
            print(file, flush=True)
        if broken and arguments.repair:
            for line in repair(checkout, commit, checked):
                print(line, flush=True)
            checked, size = verify(checkout, commit)
            broken = [file for file in checked if not file.sound]
            for file in broken:
                print(f"still {file}")
    outs = len({file.out.path for file in checked})
    where = f"in the cache, of {commit[:12]}" if commit else "in the workspace and the cache"
    print(f"{outs} outs, {len(checked)} files, {size / 1e6:,.1f} MB {where}: ", end="")
    print(f"{len(broken)} damaged or missing" if broken else "sound")
    return 1 if broken else 0


def _reproduce(arguments: argparse.Namespace) -> int:
    from flows.workspace import find_checkout

    def start() -> int:
        from flows.reproduction import reproduction

        parameters = {
            "stage": arguments.stage,
            "revision": arguments.rev or "HEAD",
            "downstream": arguments.downstream,
            "workers": arguments.workers,
        }
        return _finish(reproduction, parameters)

    return _with_prefect(find_checkout(Path.cwd()), start, lambda: None)


def _subject(arguments: argparse.Namespace) -> tuple[Any, Any, str]:
    """The checkpoint's policy, the environment's config, and the environment's name.

    Raises:
        StillhouseError: no such checkpoint, or it does not know the environment.
    """
    from stillhouse.checkpoint import load_checkpoint
    from stillhouse.config import near, parse
    from stillhouse.envs.make import EnvironmentConfig
    from stillhouse.evaluation.rollouts import network_policy

    checkpoint = load_checkpoint(arguments.checkpoint)
    known = checkpoint.details.get("environments", {})
    name = arguments.environment or next(iter(known), "")
    if name not in known:
        raise StillhouseError(
            f"{arguments.checkpoint}: no environment {name!r}{near(name, list(known))}; it knows {', '.join(known) or 'none'}"
        )
    if arguments.episodes < 1:
        raise StillhouseError(f"--episodes: at least 1 is allowed, but {arguments.episodes} was given")
    sys.path.append(os.getcwd())  # the user's own environment module
    return network_policy(checkpoint.network, name), parse(EnvironmentConfig, known[name], name), name


def _play(arguments: argparse.Namespace) -> int:
    from stillhouse.evaluation.video import record

    os.environ.setdefault(
        "SDL_VIDEODRIVER", "dummy"
    )  # pictures are drawn in memory; SDL need not look for a screen
    policy, environment, name = _subject(arguments)
    returns = record(policy, environment, arguments.output, arguments.seed, arguments.episodes)
    print(
        f"{arguments.output}: {name}, return{'s' * (len(returns) > 1)} {', '.join(f'{value:g}' for value in returns)}"
    )
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from stillhouse.evaluation.rollouts import evaluate

    policy, environment, name = _subject(arguments)
    for label, epsilon in (("greedy", 0.0), ("epsilon 0.05", 0.05), ("random", 1.0)):
        returns = evaluate(policy, environment, arguments.episodes, arguments.seed, epsilon).returns
        print(
            f"{name}  {label:<13} mean {returns.mean():9.2f}   median {float(sorted(returns)[len(returns) // 2]):9.2f}   "
            f"lowest {returns.min():9.2f}   highest {returns.max():9.2f}   {len(returns)} episodes"
        )
    return 0


def _transfer(arguments: argparse.Namespace) -> int:
    from flows.workspace import find_checkout

    with tempfile.TemporaryDirectory(prefix="stillhouse-") as folder:
        answer = Path(folder, "answer.json")
        argv = [sys.executable, "-m", "tasks.dvc_stage", "--answer", str(answer)]
        argv += [arguments.direction, f"--remote={arguments.remote}"]
        # An empty PYTHONSAFEPATH is none: modules must be found in the current folder.
        environment = {**os.environ, "PYTHONSAFEPATH": ""}
        done = subprocess.run(argv, cwd=find_checkout(Path.cwd()), env=environment, check=False)
        if done.returncode == 0:
            print(f"{json.loads(answer.read_text())['files']} files {arguments.direction}ed")
    return done.returncode


def _report(arguments: argparse.Namespace) -> int:
    from flows.workspace import find_checkout

    checkout = find_checkout(Path.cwd())
    name = "data/evaluation/report.html"
    found = [checkout / name, *(checkout / ".stillhouse" / "worktrees").glob(f"*/{name}")]
    existing = sorted((path for path in found if path.exists()), key=lambda path: path.stat().st_mtime)
    if not existing:
        raise StillhouseError("no report yet: `stillhouse run quickstart` makes one")
    print(existing[-1])
    if arguments.open:
        webbrowser.open(existing[-1].as_uri())
    return 0


if __name__ == "__main__":
    main()
