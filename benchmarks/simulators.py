"""MinAtar's simulators: env steps per second of our batched games and of the package's, one copy after another.

    python -m benchmarks.simulators

Five games, 32 and 128 copies, random actions, every ended episode begun anew; building the planes counts. Both take turns,
and the median of the rounds is kept. Seconds are of processor time, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import minatar
import numpy as np

from benchmarks.machine import RESULTS, provenance, save
from stillhouse.envs.minatar import MinAtarVectorEnv
from stillhouse.envs.minatar_batched import GAMES


def package_steps(game: str, num_envs: int, steps: int) -> Callable[[], float]:
    """Plays ``num_envs`` of the package's games in one loop; env steps per second."""
    games = [minatar.Environment(game) for _ in range(num_envs)]
    for seed, copy in enumerate(games):
        copy.seed(seed)
        copy.reset()
    generator = np.random.default_rng(0)

    def play() -> float:
        actions = generator.integers(6, size=(steps, num_envs))
        begun = time.process_time()
        for chosen in actions.tolist():
            observations = np.empty((num_envs, 10, 10, games[0].n_channels), np.bool_)
            rewards = np.zeros(num_envs, np.float32)
            for row, copy in enumerate(games):
                rewards[row], terminated = copy.act(chosen[row])
                if terminated:
                    copy.reset()
                observations[row] = copy.state()
        return steps * num_envs / (time.process_time() - begun)

    return play


def batched_steps(game: str, num_envs: int, steps: int) -> Callable[[], float]:
    """The same with ours."""
    envs = MinAtarVectorEnv(num_envs, game)
    envs.reset(seed=0)
    generator = np.random.default_rng(0)

    def play() -> float:
        actions = generator.integers(6, size=(steps, num_envs))
        begun = time.process_time()
        for chosen in actions:
            terminated = envs.step(chosen)[2]
            if terminated.any():
                envs.reset(options={"reset_mask": terminated})
        return steps * num_envs / (time.process_time() - begun)

    return play


def measure(game: str, num_envs: int, rounds: int, env_steps: int) -> dict[str, Any]:
    """Rates of both, by turns."""
    # The slower one gets a tenth of the steps, so that its rounds do not last ten times as long.
    package = package_steps(game, num_envs, max(1, env_steps // 10 // num_envs))
    batched = batched_steps(game, num_envs, env_steps // num_envs)
    pairs = [(package(), batched()) for _ in range(rounds + 1)][1:]  # the first warms up
    theirs, ours = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    return {
        "package_steps_per_s": round(theirs),
        "batched_steps_per_s": round(ours),
        "ratio": round(statistics.median(ours / theirs for theirs, ours in pairs), 2),
        "ratios": [round(ours / theirs, 2) for theirs, ours in pairs],
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| game | copies | package, steps/s | batched, steps/s | ratio |", "|---|---:|---:|---:|---:|"]
    for game, sizes in results["games"].items():
        for num_envs, row in sizes.items():
            lines.append(
                f"| {game} | {num_envs} | {row['package_steps_per_s']:,} | {row['batched_steps_per_s']:,} | {row['ratio']:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulators")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--env-steps", type=int, default=200_000, help="of ours, in each round")
    arguments = parser.parse_args()
    games: dict[str, Any] = {}
    for game in sorted(GAMES):
        games[game] = {}
        for num_envs in (32, 128):
            games[game][str(num_envs)] = measure(game, num_envs, arguments.rounds, arguments.env_steps)
            print(game, num_envs, games[game][str(num_envs)], flush=True)
    results = {"provenance": provenance(), "rounds": arguments.rounds, "games": games}
    save("simulators", results)
    machine = results["provenance"]["machine"]
    (RESULTS / "simulators.md").write_text(
        "# MinAtar's simulators\n\n"
        f"Env steps per second of processor time; random actions, resets and planes included; one process. Median of {arguments.rounds} rounds, by turns. "
        f"{machine['processor']}, {machine['cores']} cores; commit {results['provenance']['commit']}; "
        f"`{results['provenance']['command']}`.\n\n{table(results)}\n"
    )


if __name__ == "__main__":
    main()
