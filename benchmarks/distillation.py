"""Distillation: speed against a bare loop and `imitation`, memory and disk of large datasets, cost of many environments,
and what harm imbalanced teachers do.

    python -m benchmarks.distillation --part throughput --imitation-python VENV/bin/python
    python -m benchmarks.distillation --part scale
    python -m benchmarks.distillation --part environments
    python -m benchmarks.distillation --part imbalance

throughput    samples per second of processor time of a 4-32-32-2 network at batch 1024 on one thread: ours, bare torch loops, and behavioural cloning
              by `imitation` 1.0.1 in its own environment (`pip install torch==2.13.0`, then `imitation==1.0.1`)
scale         five datasets of 540,000 transitions of MinAtar's shapes: bytes on disk, anonymous memory while distilling
environments  processor time per update with 1, 5, 10 and 20 environments in one student
imbalance     the quickstart's three teachers with outputs scaled by 100, 1 and 0.01 and data cut to 2, 10 and 100 %

Everything is one process with one thread; processor time is what it would take alone on its core, whatever else runs beside it.
Each part keeps its figures in `results/distillation.json`; the tables in `results/distillation.md` are made from it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.machine import RESULTS, load, provenance, save
from stillhouse.agents import make_learner
from stillhouse.checkpoint import load_checkpoint, save_checkpoint
from stillhouse.datasets.collect import CollectConfig, Teacher, collect
from stillhouse.datasets.reader import Dataset
from stillhouse.datasets.schema import SCHEMA_FILE, DatasetSchema, action_gaps
from stillhouse.datasets.writer import ShardWriter
from stillhouse.distillation.buffer import LabelledBuffer
from stillhouse.distillation.offline import Distillation, DistillationConfig
from stillhouse.distillation.student import StudentConfig, StudentTraining
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.evaluation.rollouts import evaluate, network_policy
from stillhouse.evaluation.statistics import interquartile_mean
from stillhouse.files import replace_folder, write_json
from stillhouse.networks.multi_task import NetworkSize, parameter_count
from stillhouse.types import EnvironmentSpec, ObservationSpec

REPEATS = 5
SEEDS = 5
# Where teachers and their datasets are kept between runs; not committed.
SCRATCH = Path(".stillhouse/benchmarks/distillation")
# Planes of the MinAtar games, 10x10 each.
CHANNELS = {"asterix": 4, "breakout": 4, "freeway": 7, "seaquest": 10, "space_invaders": 6}


def minatar(channels: int) -> EnvironmentSpec:
    """Spaces of a MinAtar game."""
    return EnvironmentSpec(observation=ObservationSpec(kind="planes", shape=(10, 10, channels)), actions=6)


# --- throughput


def bare_loops(observations: Tensor, outputs: Tensor, batch_size: int) -> dict[str, Callable[[int], None]]:
    """The plainest reasonable loops of torch on tensors, by name; each trains for a number of updates."""
    rows = len(observations)
    greedy = outputs.argmax(1)

    def loop(loss_of: Callable[[nn.Module, Tensor], Tensor], fused: bool) -> Callable[[int], None]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
        optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=fused)

        def train(updates: int) -> None:
            for _ in range(updates):
                loss = loss_of(network, torch.randint(rows, (batch_size,)))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return train

    def cross_entropy(network: nn.Module, batch: Tensor) -> Tensor:
        return functional.cross_entropy(
            network(observations.index_select(0, batch)), greedy.index_select(0, batch)
        )

    def divergence(network: nn.Module, batch: Tensor) -> Tensor:
        teacher = functional.log_softmax(outputs.index_select(0, batch) / 0.01, 1)
        student = functional.log_softmax(network(observations.index_select(0, batch)), 1)
        return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)

    return {
        "torch, cross-entropy": loop(cross_entropy, fused=False),
        "torch, cross-entropy, fused Adam": loop(cross_entropy, fused=True),
        "torch, KL": loop(divergence, fused=False),
        "torch, KL, fused Adam": loop(divergence, fused=True),
    }


def throughput(imitation_python: str) -> dict[str, Any]:
    """Samples/s of everyone, interleaved."""
    rows, batch_size, updates = 100_000, 1024, 1000
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(rows, 4, generator=generator)
    outputs = torch.randn(rows, 2, generator=generator)
    contestants = bare_loops(observations, outputs, batch_size)
    spec = EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(4,)), actions=2)
    buffer = LabelledBuffer(spec, "q_values", 0, rows)
    buffer.append(observations.numpy(), outputs.numpy())
    for loss in ("nll", "kl"):
        config = StudentConfig(
            loss=loss,
            batch_size=batch_size,
            updates=10**7,
            size=NetworkSize(features=32, torso=(32,)),
        )
        training = StudentTraining(config, {"cartpole": buffer}, seed=0)
        assert parameter_count(training.network) == 4 * 32 + 32 + 32 * 32 + 32 + 32 * 2 + 2
        contestants[f"stillhouse, {loss}"] = training.update  # type: ignore[assignment]
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    child = (
        subprocess.Popen(
            [imitation_python, "benchmarks/imitation_cloning.py", str(rows), str(batch_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if imitation_python
        else None
    )

    def peer(count: int) -> float:
        assert child is not None and child.stdin is not None and child.stdout is not None
        print(count, file=child.stdin, flush=True)
        for line in child.stdout:
            if found := re.match(r"seconds (\S+)", line):
                return float(found[1])
        raise RuntimeError("imitation ended early")

    if child is not None:
        seconds["imitation 1.0.1"] = []
        peer(10)
    for train in contestants.values():
        train(50)
    for _ in range(REPEATS):
        for name, train in contestants.items():
            started = time.process_time()
            train(updates)
            seconds[name].append((time.process_time() - started) / updates)
        if child is not None:  # 20 times slower, so fewer updates
            seconds["imitation 1.0.1"].append(peer(updates // 10) / (updates // 10))
    if child is not None:
        child.kill()
    return {
        name: {
            "samples_per_second": round(batch_size / float(np.median(values))),
            "fastest": round(batch_size / min(values)),
            "slowest": round(batch_size / max(values)),
        }
        for name, values in seconds.items()
    }


def throughput_table(result: dict[str, Any]) -> list[str]:
    lines = [
        "## Throughput",
        "",
        f"Network 4-32-32-2, batch 1024, one thread, interleaved, samples per second of processor time: median of {REPEATS} "
        "[slowest, fastest]. `imitation` clones actions: its loss is our `nll`.",
        "",
        "| who | samples/s | ours with nll against it | ours with kl against it |",
        "|---|---|---|---|",
    ]
    nll, kl = (result[f"stillhouse, {loss}"]["samples_per_second"] for loss in ("nll", "kl"))
    for name in sorted(set(result) - {"provenance"}, key=lambda name: -result[name]["samples_per_second"]):
        one = result[name]
        lines.append(
            f"| {name} | {one['samples_per_second']:,} [{one['slowest']:,}, {one['fastest']:,}] | "
            f"{nll / one['samples_per_second']:.2f} | {kl / one['samples_per_second']:.2f} |"
        )
    return lines


# --- scale


def write_random_dataset(path: Path, channels: int, transitions: int, seed: int) -> None:
    """Random planes, 5 % of them set, in episodes of 20 to 600 steps played by 32 copies, a small shift to the rows'
    outputs as a teacher's would be."""
    random = np.random.default_rng(seed)
    environment = minatar(channels)
    copies = 32
    episode, next_episode = np.arange(copies), copies
    left = random.integers(20, 600, copies)
    steps = -(-transitions // copies)
    with replace_folder(path) as folder:
        writer = ShardWriter(folder, environment, steps * copies)
        gap = 0.0
        for step in range(steps):
            observations = random.random((copies, 10, 10, channels), np.float32) < 0.05
            outputs = (10 + random.normal(size=(copies, 6))).astype(np.float32)
            gap += float(action_gaps(outputs).mean())
            left -= 1
            ended = np.flatnonzero(left == 0)
            cut = np.flatnonzero(left > 0) if step == steps - 1 else np.zeros(0, np.int64)
            done = np.isin(np.arange(copies), np.concatenate([ended, cut]))
            writer.append(
                observations,
                outputs=outputs,
                actions=outputs.argmax(1),
                rewards=np.zeros(copies),
                terminated=left == 0,
                truncated=done & (left > 0),
                episodes=episode.copy(),
            )
            writer.append_final(episode[done], observations[done])
            episode[ended] = next_episode + np.arange(len(ended))
            next_episode += len(ended)
            left[ended] = random.integers(20, 600, len(ended))
        writer.close()
        schema = DatasetSchema(
            environment_id="random planes",
            environment=environment,
            output="q_values",
            teacher="0" * 64,
            teacher_parameters=135_000,
            epsilon=0.05,
            shard_rows=writer.shard_rows,
            episodes=next_episode,
            mean_return=None,
            mean_action_gap=gap / steps,
        )
        write_json(folder / SCHEMA_FILE, schema.model_dump(mode="json"))


def anonymous_memory() -> int:
    """RssAnon of this process, in bytes."""
    return int(re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024  # type: ignore[index]


def measure_memory(folder: Path) -> dict[str, Any]:
    """Distil what is in ``folder``, in a process that did nothing else; memory is sampled every 20 ms."""
    torch.set_num_threads(1)
    imported, peak, stop = anonymous_memory(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not stop.wait(0.02):
            peak = max(peak, anonymous_memory())

    thread = threading.Thread(target=sample)
    thread.start()
    started = time.process_time()
    datasets: dict[str, Any] = {path.name: Dataset.open(path) for path in sorted(folder.iterdir())}
    config = DistillationConfig(
        loss="kl",
        batch_size=256,
        updates=100,
        evaluation_interval=50,
        size=NetworkSize(conv_channels=16, features=128, layer_norm=True),
        parameter_fraction=1 / 15,
    )
    distillation = Distillation(config, datasets, seed=0)
    opened = time.process_time() - started
    started = time.process_time()
    *_, last = distillation.train()
    trained = time.process_time() - started
    stop.set()
    thread.join()
    return {
        "transitions": {name: len(dataset) for name, dataset in datasets.items()},
        "disk_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "anonymous_bytes_after_imports": imported,
        "anonymous_bytes_peak": peak,
        "seconds_to_open_and_split": opened,
        "milliseconds_per_update": trained / last.done * 1000,
        "parameters": parameter_count(distillation.student()),
    }


def scale() -> dict[str, Any]:
    """Write the five datasets, then distil them in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, channels) in enumerate(CHANNELS.items()):
            write_random_dataset(Path(folder) / name, channels, 540_000, seed)
            print(f"wrote {name}", flush=True)
        command = [sys.executable, "-m", "benchmarks.distillation", "--measure-memory", folder]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def scale_table(result: dict[str, Any]) -> list[str]:
    return [
        "## Five datasets of 540,000 transitions",
        "",
        f"Random planes of MinAtar's shapes ({', '.join(f'{name} 10x10x{count}' for name, count in CHANNELS.items())}), 6 actions, "
        f"a student of {result['parameters']:,} parameters, batch 256 an environment.",
        "",
        "| what | measured | to reach |",
        "|---|---|---|",
        f"| on disk, together | {result['disk_bytes'] / 1e6:.0f} MB | at most 400 MB |",
        f"| anonymous memory (RssAnon) while distilling, peak | {result['anonymous_bytes_peak'] / 1e6:.0f} MB, of which "
        f"{result['anonymous_bytes_after_imports'] / 1e6:.0f} MB after the imports | at most 500 MB |",
        f"| verifying (hashes), mapping and splitting, processor time | {result['seconds_to_open_and_split']:.1f} s |  |",
        f"| an update of 5 x 256 transitions, processor time | {result['milliseconds_per_update']:.1f} ms |  |",
    ]


# --- environments


def environments() -> dict[str, Any]:
    """Milliseconds per update as one student takes more environments."""
    counts, batch_size, rows = (1, 5, 10, 20), 128, 8192
    random = np.random.default_rng(0)
    trainings: dict[tuple[str, int], StudentTraining] = {}
    for kind in ("planes", "vector"):
        for count in counts:
            data = {}
            for index in range(count):
                if kind == "planes":
                    spec = minatar(list(CHANNELS.values())[index % len(CHANNELS)])
                    observations = random.random((rows, *spec.observation.shape)) < 0.05
                else:
                    spec = EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(4,)), actions=2)
                    observations = random.normal(size=(rows, 4)).astype(np.float32)
                buffer = LabelledBuffer(spec, "q_values", 0, rows)
                buffer.append(observations, random.normal(size=(rows, spec.actions)).astype(np.float32))
                data[f"environment{index}"] = buffer
            size = (
                NetworkSize(conv_channels=8, features=64, torso=(64,), layer_norm=True)
                if kind == "planes"
                else NetworkSize(features=64, torso=(64,))
            )
            config = StudentConfig(batch_size=batch_size, updates=10**7, size=size)
            trainings[kind, count] = StudentTraining(config, data, seed=0)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in trainings}
    for training in trainings.values():
        training.update(5)
    for _ in range(REPEATS):
        for (kind, count), training in trainings.items():
            updates = max(10, 200 // count)
            started = time.process_time()
            training.update(updates)
            seconds[kind, count].append((time.process_time() - started) / updates)
    result: dict[str, Any] = {"batch_size": batch_size}
    for (kind, count), values in seconds.items():
        result.setdefault(kind, {})[str(count)] = {
            "milliseconds_per_update": 1000 * float(np.median(values)),
            "samples_per_second": round(count * batch_size / float(np.median(values))),
            "parameters": parameter_count(trainings[kind, count].network),
        }
    return result


def environments_table(result: dict[str, Any]) -> list[str]:
    lines = [
        "## Cost of many environments in one student",
        "",
        f"KL, batch {result['batch_size']} an environment, processor time of one thread, median of {REPEATS}. Planes: the five MinAtar shapes in turn, "
        "equal shapes share an adapter; vectors: 4 numbers.",
        "",
        "| environments | planes: ms an update | ms an environment | parameters | vectors: ms an update | ms an environment |",
        "|---|---|---|---|---|---|",
    ]
    for count in sorted(result["planes"], key=int):
        planes = result["planes"][count]
        vector = result["vector"][count]
        lines.append(
            f"| {count} | {planes['milliseconds_per_update']:.2f} | {planes['milliseconds_per_update'] / int(count):.2f} | "
            f"{planes['parameters']:,} | {vector['milliseconds_per_update']:.2f} | "
            f"{vector['milliseconds_per_update'] / int(count):.2f} |"
        )
    return lines


# --- imbalance


class Unbalanced:
    """A dataset whose outputs are multiplied, and of whose episodes only a share is trained on.

    Args:
        dataset: the whole.
        factor: of the teacher's outputs, as another unit of reward would make them.
        share: of the training episodes; held-out ones stay.
    """

    def __init__(self, dataset: Dataset, factor: float, share: float) -> None:
        self.dataset = dataset
        self.factor = factor
        self.share = share
        whole = dataset.schema
        self.schema = whole.model_copy(update={"mean_action_gap": whole.mean_action_gap * factor})

    def __len__(self) -> int:
        return len(self.dataset)

    def observations(self, rows: np.ndarray) -> np.ndarray:
        return self.dataset.observations(rows)

    def outputs(self, rows: np.ndarray) -> np.ndarray:
        return self.dataset.outputs(rows) * np.float32(self.factor)

    def split(self, holdout_fraction: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        rows, held = self.dataset.split(holdout_fraction, generator)
        episodes = np.unique(self.dataset.episodes[rows])
        order = generator.permutation(episodes)
        lengths = np.bincount(self.dataset.episodes)[order]
        enough = int(np.searchsorted(np.cumsum(lengths), self.share * len(rows))) + 1
        return rows[np.isin(self.dataset.episodes[rows], order[:enough])], held


# Factor of the outputs, and share of the data: the largest outputs have the least data.
IMBALANCE = {"cartpole": (100.0, 0.02), "acrobot": (1.0, 0.1), "breakout": (0.01, 1.0)}
STUDENT: dict[str, Any] = {
    "batch_size": 128,
    "updates": 2000,
    "evaluation_interval": 200,
    "patience": 0,
    "size": NetworkSize(conv_channels=8, features=32, torso=(32,), layer_norm=True),
    "parameter_fraction": 0.1,
}
# name: whether outputs are scaled, whether data is cut, settings
ARMS: dict[str, tuple[bool, bool, dict[str, Any]]] = {
    "mse": (False, False, {"loss": "mse"}),
    "mse, scaled": (True, False, {"loss": "mse"}),
    "mse, scaled, normalised": (True, False, {"loss": "mse", "normalise_loss": True}),
    "mse, scaled and cut": (True, True, {"loss": "mse"}),
    "mse, scaled and cut, normalised": (True, True, {"loss": "mse", "normalise_loss": True}),
    "mse, scaled and cut, normalised, resting": (
        True,
        True,
        {"loss": "mse", "normalise_loss": True, "environment_patience": 2},
    ),
    "kl, tau 0.01": (False, False, {"loss": "kl", "temperature": 0.01}),
    "kl, scaled, tau 0.01": (True, False, {"loss": "kl", "temperature": 0.01}),
    "kl, scaled, tau from the action gap": (
        True,
        False,
        {"loss": "kl", "greedy_odds": 50.0},
    ),
    "kl, scaled and cut, tau from the action gap": (
        True,
        True,
        {"loss": "kl", "greedy_odds": 50.0},
    ),
    "kl, scaled and cut, tau from the action gap, normalised": (
        True,
        True,
        {"loss": "kl", "greedy_odds": 50.0, "normalise_loss": True},
    ),
    "kl, scaled and cut, tau from the action gap, resting": (
        True,
        True,
        {"loss": "kl", "greedy_odds": 50.0, "environment_patience": 2},
    ),
}


# Harm, then cure.
COMPARISONS = [
    ("mse", "mse, scaled"),
    ("mse, scaled", "mse, scaled, normalised"),
    ("mse, scaled and cut", "mse, scaled and cut, normalised"),
    ("kl, tau 0.01", "kl, scaled, tau 0.01"),
    ("kl, scaled, tau 0.01", "kl, scaled, tau from the action gap"),
    (
        "kl, scaled and cut, tau from the action gap",
        "kl, scaled and cut, tau from the action gap, normalised",
    ),
    ("mse, scaled and cut, normalised", "mse, scaled and cut, normalised, resting"),
    (
        "kl, scaled and cut, tau from the action gap",
        "kl, scaled and cut, tau from the action gap, resting",
    ),
]


def quickstart() -> Iterator[tuple[str, EnvironmentConfig, Path, Path]]:
    """The quickstart's source environments, their teachers and datasets: made where they are not there yet."""
    params = YAML(typ="safe").load(Path("params/suites/quickstart.yaml").read_text())
    for name in IMBALANCE:
        environment = EnvironmentConfig(**params["environments"][name])
        teacher_path, dataset_path = SCRATCH / "teachers" / name, SCRATCH / "datasets" / name
        if not teacher_path.exists():
            learner = make_learner(params["train_teacher"][name], name, environment, seed=0)
            for _ in learner.train():
                pass
            save_checkpoint(teacher_path, learner.network, {})
        if not dataset_path.exists():
            checkpoint = load_checkpoint(teacher_path)
            network = checkpoint.network
            teacher = Teacher(
                network_policy(network, name), "q_values", checkpoint.digest, parameter_count(network)
            )
            config = CollectConfig(transitions=params["collect_dataset"][name]["transitions"])
            for _ in collect(teacher, environment, config, 0, dataset_path):
                pass
        yield name, environment, teacher_path, dataset_path


def imbalance() -> dict[str, Any]:
    """Agreement and greedy return of every arm, seed and environment; kept as they come."""
    prepared = {name: paths for name, *paths in quickstart()}
    result: dict[str, Any] = load("distillation").get("imbalance", {})
    reference = result.setdefault("reference", {})
    for name, (environment, teacher_path, _) in prepared.items():
        if name not in reference:
            network = load_checkpoint(teacher_path).network
            actions = network.spec.environments[name].actions
            reference[name] = {
                "teacher": float(evaluate(network_policy(network, name), environment, 100, 0).returns.mean()),
                "random": float(
                    evaluate(
                        lambda o, a=actions: np.zeros((len(o), a)), environment, 100, 0, epsilon=1
                    ).returns.mean()  # type: ignore[misc]
                ),
            }
    for seed in range(SEEDS):
        for arm, (scaled, cut, settings) in ARMS.items():
            runs = result.setdefault("arms", {}).setdefault(arm, {})
            if str(seed) in runs:
                continue
            datasets = {
                name: Unbalanced(
                    Dataset.open(path),
                    IMBALANCE[name][0] if scaled else 1.0,
                    IMBALANCE[name][1] if cut else 1.0,
                )
                for name, (_, _, path) in prepared.items()
            }
            distillation = Distillation(DistillationConfig(**STUDENT, **settings), datasets, seed)
            for _ in distillation.train():
                pass
            student = distillation.student()
            runs[str(seed)] = {
                name: {
                    "agreement": distillation.best[f"agreement/{name}"],
                    "return": float(
                        evaluate(network_policy(student, name), environment, 32, seed).returns.mean()
                    ),
                }
                for name, (environment, _, _) in prepared.items()
            }
            print(arm, seed, json.dumps(runs[str(seed)]), flush=True)
            store("imbalance", result)
    return result


def imbalance_table(result: dict[str, Any]) -> list[str]:
    names = list(IMBALANCE)
    lines = [
        "## Imbalanced teachers",
        "",
        "The quickstart's teachers (one seed) into one student of a tenth of their parameters, "
        f"{STUDENT['updates']:,} updates of {STUDENT['batch_size']} transitions an environment, {SEEDS} student seeds. *Scaled*: outputs times "
        + ", ".join(f"{factor:g} ({name})" for name, (factor, _) in IMBALANCE.items())
        + ". *Cut*: training data cut to "
        + ", ".join(f"{share:.0%} ({name})" for name, (_, share) in IMBALANCE.items())
        + ". Held-out agreement / normalised greedy return (0 random, 1 teacher), interquartile means over the seeds.",
        "",
        "| arm | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for arm in ARMS:
        runs = result["arms"][arm]
        cells = []
        for name in names:
            one = result["reference"][name]
            agreements = np.array([run[name]["agreement"] for run in runs.values()])
            returns = np.array([run[name]["return"] for run in runs.values()])
            scores = (returns - one["random"]) / (one["teacher"] - one["random"])
            cells.append(f"{interquartile_mean(agreements):.3f} / {interquartile_mean(scores):.2f}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Seed by seed: mean difference of the agreement (in how many of {SEEDS} seeds it is higher).",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for before, after in COMPARISONS:
        cells = []
        for name in names:
            differences = [
                result["arms"][after][seed][name]["agreement"] - run[name]["agreement"]
                for seed, run in result["arms"][before].items()
            ]
            higher = sum(difference > 0 for difference in differences)
            cells.append(f"{np.mean(differences):+.3f} ({higher})")
        lines.append(f"| {before} → {after} | " + " | ".join(cells) + " |")
    return lines


# --- all of it

TABLES = {
    "throughput": throughput_table,
    "scale": scale_table,
    "environments": environments_table,
    "imbalance": imbalance_table,
}


def store(part: str, result: dict[str, Any]) -> None:
    """Keep a part's figures and make the tables anew."""
    results = load("distillation")
    results[part] = {**result, "provenance": provenance()}
    save("distillation", results)
    lines = [
        "# Distillation",
        "",
        "Made by `python -m benchmarks.distillation`; `distillation.json` has commit and machine.",
    ]
    for name, table in TABLES.items():
        if name in results:
            lines += ["", *table(results[name])]
    (RESULTS / "distillation.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=list(TABLES), action="append")
    parser.add_argument("--imitation-python", default="", help="of an environment with imitation 1.0.1")
    parser.add_argument("--measure-memory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure_memory:
        print(json.dumps(measure_memory(arguments.measure_memory)))
        return
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "throughput": lambda: throughput(arguments.imitation_python),
        "scale": scale,
        "environments": environments,
        "imbalance": imbalance,
    }
    for part in arguments.part or parts:
        store(part, parts[part]())
        print(f"{part}: done", flush=True)


if __name__ == "__main__":
    main()
