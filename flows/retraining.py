"""Scheduled retraining: train on what is in production, compare, and replace it only where that is surely an improvement.

No postponed annotations here: Prefect reads them to check parameters and to draw its form.
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.display import console
from flows.distillation import run_id, save_experiment
from flows.graph import run_graph
from flows.production import next_generation, promote
from flows.results import run_facts
from flows.workspace import PRIVATE, PROMOTED, find_checkout, git, own_worktree, plan
from stillhouse.errors import StillhouseError
from tasks.production import FOLDER, POINTER, Production, read_production
from tasks.run_stage import call_dvc

DECISION = Path("data/evaluation/promotion.json")


def run_name() -> str:
    """``retraining``, before the name that the user gave or Prefect made up."""
    given = str(flow_run.name or "")
    return given if given.startswith("retraining") else f"retraining {given}"


@flow(
    name="retraining",
    flow_run_name=run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=256),  # type: ignore[arg-type] # run_graph limits what runs at once
    persist_result=False,
)
def retraining(
    env_steps: Annotated[int, Field(ge=0, le=10**10)] = 0,
    updates: Annotated[int, Field(ge=0, le=10**9)] = 0,
    episodes: Annotated[int, Field(ge=0, le=100_000)] = 0,
    probability: Annotated[float, Field(ge=0, le=1)] = 0.95,
    floor: Annotated[float, Field(ge=0, le=100)] = 0.95,
    set: Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=200)] = [],  # noqa: B006 - Prefect's form wants a plain default; it is not changed
    workers: Annotated[int, Field(ge=0, le=256)] = 0,
) -> Any:
    """Train production's teachers and student on, and promote the student if it is better.

    The teachers go on from their training states, collect fresh datasets, and the student goes on from production's. Both
    students then play the same fresh episodes, twice. A better one is promoted by a commit of data/production.dvc on the
    branch that is checked out; else production stays, and the run says why. `stillhouse rollback` undoes a promotion.

    Args:
        env_steps: More of each teacher's training. With 0: the suite's own.
        updates: More of the student's training. With 0: the suite's own.
        episodes: In each of the two comparisons. With 0: the suite's own.
        probability: Of being better, needed for promotion, on both sets of episodes.
        floor: No environment's score relative to production's may be lower.
        set: Any other parameter, as key=value, for example retraining.learning_rate_factor=0.2
        workers: Stages at a time. With 0: as many as there are cores.
    """
    try:
        checkout = find_checkout(Path.cwd())
        with one_at_a_time(checkout):
            production = read_production(checkout)
            generation = next_generation(checkout)
            given = {"env_steps": env_steps, "updates": updates, "episodes": episodes}
            overrides = [
                f"seeds=[{production.seed}]",
                f"retraining.student={production.student}",
                f"retraining.probability={probability}",
                f"retraining.floor={floor}",
                *(f"retraining.{name}={value}" for name, value in given.items() if value),
                *set,
                f"retraining.generation={generation}",  # last: it is nobody's to choose
            ]
            name = run_id(str(flow_run.name), str(flow_run.id))
            with own_worktree(checkout, name, "HEAD") as workspace:
                return _retrain(checkout, workspace, production, generation, overrides, workers, name)
    except StillhouseError as error:
        return Failed(name="Rejected", message=str(error))


def _retrain(
    checkout: Path,
    workspace: Path,
    production: Production,
    generation: int,
    overrides: list[str],
    workers: int,
    name: str,
) -> Any:
    stages = plan(workspace, production.suite, overrides)
    call_dvc(workspace, "production", "checkout", str(POINTER))
    outcome = run_graph(stages, workspace, only=[], from_=[], downstream=[], force=[], workers=workers)
    if outcome.failed:
        reasons = "; ".join(f"{stage}: {reason}" for stage, reason in outcome.failed.items())
        kept = workspace.relative_to(checkout)
        return Failed(
            message=f"{reasons} (what it left is in {kept} until `stillhouse prune`); production stays as it is"
        )
    decision = json.loads((workspace / DECISION).read_text())
    experiment = save_experiment(workspace, name)
    saved = f"; saved as experiment {name}" if experiment else ""
    if decision["promote"] and not experiment:
        kept = workspace.relative_to(checkout)
        return Failed(
            message=f"generation {generation} is better, but could not be saved as an experiment, and what is in production must have "
            f"a lineage; production stays as it is, and {kept} is kept until `stillhouse prune`"
        )
    if decision["promote"]:
        # Experiments are pruned; this one has made what is in production.
        made = git(checkout, "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}").split()
        git(checkout, "update-ref", f"{PROMOTED}/{generation}", made[-1])
        about = production.model_copy(update={"generation": generation, "decision": decision})
        commit = promote(checkout, workspace, about, _message(decision))
        text = f"generation {generation} is in production (commit {commit})"
    else:
        text = f"generation {production.generation} stays in production: {'; '.join(decision['reasons'])}"
    create_markdown_artifact(
        _page(decision, text, run_facts(workspace)), key="promotion", description=text[:200]
    )
    console.print(text + saved)
    return Completed(name="Promoted" if decision["promote"] else "Kept", message=text + saved)


@contextlib.contextmanager
def one_at_a_time(checkout: Path) -> Iterator[None]:
    """Two schedulers may meet; only one of them retrains.

    Raises:
        StillhouseError: the other does.
    """
    path = checkout / PRIVATE / "retraining.lock"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StillhouseError("another retraining is in progress here; let it end first") from None
        yield


def _message(decision: dict[str, Any]) -> str:
    lines = []
    for stream in ("promotion", "confirmation"):
        found = decision[stream]
        scores = ", ".join(f"{name} {score:.3f}" for name, score in found["scores"].items())
        lines.append(
            f"{stream}: better with probability {found['probability']:.3f}; against production {scores}"
        )
    return "\n".join(lines)


def _page(decision: dict[str, Any], text: str, about: str) -> str:
    lines = [f"**{text}**", "", about, ""]
    for stream in ("promotion", "confirmation"):
        found = decision[stream]
        lines += [
            f"### {stream.capitalize()}: better with probability {found['probability']:.3f}",
            "",
            "| environment | candidate | production | random | score |",
            "|---|---|---|---|---|",
        ]
        for name, score in found["scores"].items():
            returns = [f"{found['returns'][who][name]:.4g}" for who in ("candidate", "production", "random")]
            lines.append(
                f"| {name} | {' | '.join(returns)} | {'none' if score is None else f'{score:.3f}'} |"
            )
        lines.append("")
    return "\n".join([*lines, f"In production: `{FOLDER}`, by the commits of `{POINTER}`."])
