"""The studies behind ``docs/results/policy-distillation.md``: MinAtar teachers, students, what they are compared with.

    python -m benchmarks.policy_distillation --work FOLDER              # everything that has no result yet
    python -m benchmarks.policy_distillation --work FOLDER --only compression
    python -m benchmarks.policy_distillation --work FOLDER --assemble   # only write the score matrices

Every job leaves one JSON file (and a checkpoint or dataset) in FOLDER and is skipped when it is there, so the whole can be
stopped and gone on with. Two jobs at a time, one thread each. Settings were chosen on seeds 0 to 4; everything here is
judged on seeds from 100 up, on the last weights, over 100 greedy episodes of the test stream.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.agents import make_learner
from stillhouse.checkpoint import load_checkpoint, save_checkpoint
from stillhouse.datasets.collect import CollectConfig, Teacher, collect
from stillhouse.datasets.reader import Dataset
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.evaluation.rollouts import evaluate, network_policy
from stillhouse.files import write_json
from stillhouse.networks.multi_task import MultiTaskNetwork, parameter_count
from stillhouse.processor import use_one_core

GAMES = {
    "asterix": "MinAtar/Asterix-v0",
    "breakout": "MinAtar/Breakout-v0",
    "freeway": "MinAtar/Freeway-v0",
    "seaquest": "MinAtar/Seaquest-v0",
    "space-invaders": "MinAtar/SpaceInvaders-v0",
}
SEEDS = (100, 101, 102, 103, 104)
TEACHER_STEPS, LONG_STEPS = 1_500_000, 5_000_000
TRANSITIONS = 100_000  # a dataset's
EPISODES = 100


@dataclass(frozen=True)
class Job:
    """One result: ``function(folder, **arguments)`` gives the content of ``folder/<phase>/<name>.json``."""

    phase: str
    name: str
    function: Callable[..., dict[str, Any]]
    arguments: dict[str, Any]

    def path(self, folder: Path) -> Path:
        """Where the result is kept."""
        return folder / self.phase / f"{self.name}.json"


def environment(game: str) -> EnvironmentConfig:
    """The game by the original rules."""
    return EnvironmentConfig(id=GAMES[game])


def judge(network: MultiTaskNetwork, game: str, seed: int) -> float:
    """Mean greedy return on the test stream."""
    policy = network_policy(network, game)
    return float(evaluate(policy, environment(game), EPISODES, seed, num_envs=EPISODES).returns.mean())


def teacher(folder: Path, game: str, env_steps: int, seed: int) -> dict[str, Any]:
    """Train a PQN teacher; its checkpoint, its greedy return and that of random play."""
    settings = {"algorithm": "pqn", "env_steps": env_steps}
    learner = make_learner(settings, game, environment(game), seed)
    started = time.perf_counter()
    for _ in learner.train():
        pass
    seconds = time.perf_counter() - started
    details = {"environments": {game: environment(game).model_dump(mode="json")}}
    save_checkpoint(folder / "teachers" / f"{game}-{env_steps}-s{seed}", learner.network, details)
    nothing = network_policy(learner.network, game)
    random = evaluate(nothing, environment(game), EPISODES, seed, epsilon=1.0, num_envs=EPISODES)
    return {
        "return": judge(learner.network, game, seed),
        "random": float(random.returns.mean()),
        "parameters": parameter_count(learner.network),
        "env_steps": learner.env_steps,
        "seconds": seconds,
    }


def teacher_network(folder: Path, game: str, seed: int) -> MultiTaskNetwork:
    """The network of a teacher trained before."""
    return load_checkpoint(folder / "teachers" / f"{game}-{TEACHER_STEPS}-s{seed}", "cpu").network


def dataset(folder: Path, game: str, seed: int) -> dict[str, Any]:
    """A teacher's play."""
    checkpoint = load_checkpoint(folder / "teachers" / f"{game}-{TEACHER_STEPS}-s{seed}", "cpu")
    network = checkpoint.network
    player = Teacher(
        network_policy(network, game), network.spec.output, checkpoint.digest, parameter_count(network)
    )
    path = folder / "datasets" / f"{game}-s{seed}"
    for _ in collect(
        player, environment(game), CollectConfig(transitions=TRANSITIONS, num_envs=64), seed, path
    ):
        pass
    schema = Dataset.open(path).schema
    return {
        "transitions": schema.transitions,
        "mean_return": schema.mean_return,
        "mean_action_gap": schema.mean_action_gap,
    }


def teacher_jobs() -> Iterator[Job]:
    """Teachers of 1.5M env steps for everything else; of 5M, three seeds, for the table of teachers."""
    for steps, seeds in ((TEACHER_STEPS, SEEDS), (LONG_STEPS, SEEDS[:3])):
        for seed in seeds:
            for game in GAMES:
                arguments = {"game": game, "env_steps": steps, "seed": seed}
                yield Job("teachers", f"{game}-{steps}-s{seed}", teacher, arguments)


def dataset_jobs() -> Iterator[Job]:
    """A dataset of every teacher."""
    for seed in SEEDS:
        for game in GAMES:
            yield Job("datasets", f"{game}-s{seed}", dataset, {"game": game, "seed": seed})


PHASES: dict[str, Callable[[], Iterator[Job]]] = {"teachers": teacher_jobs, "datasets": dataset_jobs}


def run_job(folder: Path, job: Job) -> tuple[str, float]:
    """In a process of its own: the result, written at the end in one rename."""
    use_one_core()
    started = time.perf_counter()
    result = job.function(folder, **job.arguments)
    job.path(folder).parent.mkdir(parents=True, exist_ok=True)
    write_json(job.path(folder), {**result, "job_seconds": time.perf_counter() - started})
    return job.name, time.perf_counter() - started


def run(folder: Path, phases: list[str], workers: int, match: str) -> None:
    """Every job that has no result yet, phase after phase."""
    for phase in phases:
        jobs = [job for job in PHASES[phase]() if not job.path(folder).is_file() and match in job.name]
        print(f"{phase}: {len(jobs)} jobs to do", flush=True)
        context = multiprocessing.get_context("spawn")
        # A process a job: what one leaves in memory is not the next one's.
        with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
            running = {pool.submit(run_job, folder, job): job for job in jobs}
            for done in as_completed(running):
                name, seconds = done.result()
                print(f"  {phase}/{name}  {seconds:.0f} s", flush=True)


def main() -> None:
    """Run or assemble."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of intermediate results")
    parser.add_argument("--only", default=",".join(PHASES), help="phases, separated by commas")
    parser.add_argument("--match", default="", help="only jobs whose names contain this")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    phases = arguments.only.split(",")
    if unknown := set(phases) - set(PHASES):
        parser.error(f"unknown phases {', '.join(sorted(unknown))}; there are {', '.join(PHASES)}")
    run(arguments.work, phases, arguments.workers, arguments.match)


if __name__ == "__main__":
    main()
