"""Scheduled retraining: train on what is in production, compare, and replace it only where that is surely an improvement.

No postponed annotations here: Prefect reads them to check parameters and to draw its form.
"""

import json
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.display import console
from flows.graph import run_graph
from flows.production import Standing, bring, next_generation, one_at_a_time, promote, standing
from flows.results import run_facts
from flows.run import run_id, save_experiment
from flows.workspace import PROMOTED, RunError, find_checkout, git, own_worktree, plan
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import STEP_CAP
from tasks.production import FOLDER, POINTER, Production, read_production
from tasks.promotion import read_params
from tasks.run_stage import call_dvc
from tasks.stage import RETRAINING

DECISION = Path("data/evaluation/promotion.json")
SETS, PLAYERS = ("promotion", "confirmation"), ("candidate", "production", "random")
# Parameters that a retraining has from what is in production, or counts itself, and why each cannot be set.
_FIXED = {
    "suite": "what is trained on is what is in production, with the parameters that made it",
    "seeds": "the seed is production's",
    "budget": "env_steps and updates say how much more is trained",
    "retraining": "set its parameters one by one, for example retraining.learning_rate_factor=0.2",
    "retraining.student": "the student is production's",
    "retraining.generation": "each attempt has a number of its own, which is counted",
}


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
        for override in set:
            _check_override(override)
        checkout = find_checkout(Path.cwd())
        with one_at_a_time(checkout):
            start = standing(checkout)
            start.in_production()
            generation = next_generation(checkout)
            given = {"env_steps": env_steps, "updates": updates, "episodes": episodes}
            overrides = [
                f"retraining.probability={probability}",
                f"retraining.floor={floor}",
                *(f"retraining.{name}={value}" for name, value in given.items() if value),
                *set,
                f"retraining.generation={generation}",
            ]
            name = run_id(str(flow_run.name), str(flow_run.id))
            with own_worktree(checkout, name, start.commit) as workspace:
                return _retrain(checkout, workspace, start, generation, overrides, workers, name)
    except RunError as error:
        return Failed(message=str(error))
    except StillhouseError as error:
        return Failed(name="Rejected", message=str(error))


def _check_override(override: str) -> None:
    """Raises StillhouseError where a parameter is not the user's to set here."""
    key = override.partition("=")[0].strip()
    for fixed in (key, key.partition(".")[0]):
        if fixed in _FIXED and (fixed == key or fixed != "retraining"):
            raise StillhouseError(f"{override!r}: {fixed} cannot be set in a retraining: {_FIXED[fixed]}")


def _retrain(
    checkout: Path,
    workspace: Path,
    start: Standing,
    generation: int,
    overrides: list[str],
    workers: int,
    name: str,
) -> Any:
    # Of the commit that the worktree is at: the checkout's own files may be of another.
    bring(workspace, start.in_production(), start.commit)
    call_dvc(workspace, "production", "checkout", str(POINTER))
    production = read_production(workspace)
    # These two are the planner's to check against, and last, so that nothing else decides them.
    own = [f"seeds=[{production.seed}]", f"retraining.student={production.student}"]
    stages = plan(workspace, "", [*overrides, *own], "--production")
    outcome = run_graph(stages, workspace, only=[], from_=[], downstream=[], force=[], workers=workers)
    kept = f"what it left is in {workspace.relative_to(checkout)} until `stillhouse prune`"
    if outcome.failed:
        reasons = "; ".join(f"{stage}: {reason}" for stage, reason in outcome.failed.items())
        return Failed(message=f"{reasons} ({kept}); production stays as it is")
    try:
        return _decide(checkout, workspace, start, production, generation, name)
    except StillhouseError as error:  # hours of work lie there: caught here, the worktree stays
        return Failed(message=f"{error} ({kept}); production stays as it is")


def _decide(
    checkout: Path, workspace: Path, start: Standing, production: Production, generation: int, name: str
) -> Any:
    decision = json.loads((workspace / DECISION).read_text())
    experiment = save_experiment(workspace, name)
    saved = f"; saved as experiment {name}" if experiment else ""
    if decision["promote"] and not experiment:
        raise StillhouseError(
            f"generation {generation} is better, but could not be saved as an experiment, and what is in production must have a lineage"
        )
    if decision["promote"]:
        # One-off settings of this attempt are not the next one's.
        made_with = read_params(workspace) | {RETRAINING: production.params[RETRAINING]}
        about = production.model_copy(
            update={"generation": generation, "decision": decision, "params": made_with}
        )
        # Experiments are pruned; this one has made what is in production.
        made = git(checkout, "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}").split()
        lineage = f"{PROMOTED}/{generation}"
        git(checkout, "update-ref", lineage, made[-1])
        try:
            commit = promote(checkout, start, workspace, workspace, about, _message(decision))
        except StillhouseError as error:
            git(checkout, "update-ref", "-d", lineage)
            raise StillhouseError(
                f"generation {generation} is better, but was not promoted: {error}{saved}"
            ) from error
        text = f"generation {generation} is in production (commit {commit})"
    else:
        text = f"generation {production.generation} stays in production: {'; '.join(decision['reasons'])}"
    create_markdown_artifact(
        _page(decision, text, run_facts(workspace)), key="promotion", description=text[:200]
    )
    console.print(text + saved)
    return Completed(name="Promoted" if decision["promote"] else "Kept", message=text + saved)


def _message(decision: dict[str, Any]) -> str:
    lines = []
    for stream in SETS:
        found = decision[stream]
        scores = ", ".join(f"{name} {score:.3f}" for name, score in found["scores"].items())
        lines.append(
            f"{stream}: better with probability {found['probability']:.3f}; against production {scores}{_capped(found)}"
        )
    return "\n".join(lines)


def _capped(found: dict[str, Any]) -> str:
    """Which episodes the evaluation has ended, not the environment: their returns are what they had by then."""
    cut = [
        f"{share:.0%} of {who} in {name}"
        for who in PLAYERS
        for name, share in found["capped_share"][who].items()
        if share
    ]
    return f"; episodes ended after {STEP_CAP:,} steps: {', '.join(cut)}" if cut else ""


def _page(decision: dict[str, Any], text: str, about: str) -> str:
    lines = [f"**{text}**", "", about, ""]
    for stream in SETS:
        found = decision[stream]
        lines += [
            f"### {stream.capitalize()}: better with probability {found['probability']:.3f}",
            "",
            "| environment | candidate | production | random | score |",
            "|---|---|---|---|---|",
        ]
        for name, score in found["scores"].items():
            returns = [f"{found['returns'][who][name]:.4g}" for who in PLAYERS]
            lines.append(
                f"| {name} | {' | '.join(returns)} | {'none' if score is None else f'{score:.3f}'} |"
            )
        lines += ["", _capped(found).removeprefix("; ").capitalize(), ""]
    return "\n".join([*lines, f"In production: `{FOLDER}`, by the commits of `{POINTER}`."])
