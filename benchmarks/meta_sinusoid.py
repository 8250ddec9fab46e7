"""Supervised meta-learning: few-shot regression of sinusoids, a learned optimiser, and how fast a meta-update is.

    nice -n 10 python -m benchmarks.meta_sinusoid                      # everything that is not done yet, then the results
    python -m benchmarks.meta_sinusoid --only MAML --seeds 100 101     # some arms, some seeds
    python -m benchmarks.meta_sinusoid --speed                         # the speed alone

Every arm and seed leaves a file in --work, so that a run that was stopped goes on. Settings were chosen on seed 0 and on validation tasks:
benchmarks/results/meta_learning/development.json has what was tried. The results are of seeds 100 to 104, each once, on 600 test tasks.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional

from benchmarks.machine import kept, load, provenance, save
from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.envs import sinusoid
from stillhouse.envs.optimisees import OptimiseeConfig
from stillhouse.envs.sinusoid import SinusoidConfig
from stillhouse.meta.few_shot import TaskBatch, TaskBatches, adaptation_errors
from stillhouse.meta.inner_loop import adapt_for_evaluation
from stillhouse.meta.learned_update import MetaSGD, MetaSGDConfig
from stillhouse.meta.lstm_optimiser import LSTMOptimiser, LSTMOptimiserConfig
from stillhouse.meta.maml import MAML, MAMLConfig, meta_losses
from stillhouse.meta.reptile import Reptile, ReptileConfig
from stillhouse.networks.batched import PerceptronSize, Weights, initial_weights, predict
from stillhouse.networks.parameters import FlatParameters
from stillhouse.processor import use_one_core

FOLDER = "meta_learning"
SEEDS = range(100, 105)
TASKS, SHOTS, STEPS = 600, (5, 10, 20), 10
SHOWN = (1, 5, 10)  # steps in the table
BUDGET, LONG = 20_000, 40_000  # meta-updates
FAMILY, NETWORK = SinusoidConfig(), PerceptronSize()
DIVERGED = 1e6  # a larger mean error is no number
MORE_STEPS = 32  # as many as Reptile's demonstration takes
RATES = tuple(10 ** (exponent / 4) for exponent in range(-16, -3))  # of fine-tuning: 1e-4 to 0.1

COMMON: dict[str, Any] = {
    "meta_updates": BUDGET,
    "meta_batch": 25,
    "meta_rate_decay": "cosine",
    "meta_rate": 2e-3,
}
MAML_USUAL, META_SGD, REPTILE = "MAML", "Meta-SGD", "Reptile (MAML's tasks and network)"
MAML_LONG, PRETRAINING, ORACLE = "MAML, trained with K = 5 and 3 steps", "pretraining", "oracle"
ARMS: dict[str, Config] = {
    MAML_LONG: MAMLConfig(
        meta_updates=LONG,
        meta_batch=25,
        shots=5,
        inner_steps=3,
        every_step=True,
        one_step_share=0.6,
        meta_rate=3e-3,
        meta_rate_decay="cosine",
    ),
    MAML_USUAL: MAMLConfig(**COMMON),
    "first-order MAML": MAMLConfig(**COMMON, first_order=True),
    META_SGD: MetaSGDConfig(**COMMON),
    REPTILE: ReptileConfig(
        meta_updates=BUDGET,
        meta_batch=25,
        family=FAMILY,
        network=NETWORK,
        points=40,
        minibatch=10,
        inner_steps=16,
        inner_rate=0.03,
        max_gradient_norm=15,
        outer_rate=1.0,
    ),
    "Reptile (its demonstration)": ReptileConfig(),
}
OPTIMISERS = {
    "quadratic": LSTMOptimiserConfig(trajectories=1000, batch=16, meta_rate=3e-3, meta_rate_decay="cosine"),
    "spirals": LSTMOptimiserConfig(
        optimisee=OptimiseeConfig(kind="spirals"),
        trajectories=1000,
        batch=16,
        meta_rate=3e-3,
        meta_rate_decay="cosine",
    ),
}
OPTIMISER_STEPS = 200


# --- few-shot regression --------------------------------------------------------------------------------------


def summary(errors: np.ndarray) -> dict[str, list[float | None]]:
    """Of errors [tasks, steps + 1]: mean, half of its 95 % interval over tasks, median, each by step; none where a task diverged."""
    with np.errstate(all="ignore"):
        half = 1.96 * errors.std(axis=0, ddof=1) / math.sqrt(len(errors))
        found = {"mean": errors.mean(0), "interval": half, "median": np.median(errors, axis=0)}
    return {
        name: [float(f"{value:.4g}") if np.isfinite(value) and value < DIVERGED else None for value in values]
        for name, values in found.items()
    }


def meta_train(config: Config, seed: int) -> dict[str, Any]:
    """Train one arm and seed; errors by K, the learning curve in tenths, CPU seconds."""
    learner: Any
    if isinstance(config, MAMLConfig):
        learner = MAML(config, seed)
    elif isinstance(config, MetaSGDConfig):
        learner = MetaSGD(config, seed)
    else:
        assert isinstance(config, ReptileConfig)
        learner = Reptile(config, seed)
    start = time.process_time()
    curve = [next(iter(report.metrics.values())) for report in learner.train()]
    seconds = time.process_time() - start
    steps = MORE_STEPS if isinstance(config, ReptileConfig) else STEPS
    found = {str(shots): learner.evaluate(TASKS, steps, seed, shots) for shots in SHOTS}
    return {
        "errors": {shots: summary(each.values) for shots, each in found.items()},
        "untrained": {
            shots: summary(each.baselines["untrained"])
            for shots, each in found.items()
            if "untrained" in each.baselines
        },
        "curve": [round(float(np.mean(part)), 4) for part in np.array_split(curve, min(10, len(curve)))],
        "cpu_seconds": round(seconds, 1),
    }


def joint_training(oracle: bool, seed: int) -> dict[str, Any]:
    """One network for all tasks: of x alone, then fine-tuned on a task; or of x, amplitude and phase."""
    weights: Weights = initial_weights(NETWORK, 3 if oracle else 1, 1, seed)
    module = nn.ParameterDict(weights)
    parameters = FlatParameters(module, 1e-3)
    held = dict(module.items())
    tasks, points = 25, 20
    start, curve, losses = time.process_time(), [], []
    for update in range(BUDGET):
        if update % 1000 == 0:
            random = seeding.generator(seed, "joint training", update // 1000)
            drawn = sinusoid.draw(FAMILY, "training", 1000 * tasks, random)
            x = sinusoid.draw_inputs(FAMILY, len(drawn), points, random)
            inputs, targets = (
                torch.from_numpy(array.astype(np.float32)).reshape(1000, 1, tasks * points, -1)
                for array in (with_task(x, drawn) if oracle else x[..., None], sinusoid.values(drawn, x))
            )
        parameters.zero_gradient()
        within = update % 1000
        loss = (predict(NETWORK, held, inputs[within]) - targets[within]).square().mean()
        loss.backward()
        parameters.step(1e-3 * 0.5 * (1 + math.cos(math.pi * update / BUDGET)))
        losses.append(loss.detach())
        if len(losses) == BUDGET // 10:
            curve.append(round(float(torch.stack(losses).mean()), 4))
            losses = []
    seconds = time.process_time() - start
    test = sinusoid.held_out(FAMILY, TASKS, seed)
    if oracle:
        x = np.broadcast_to(sinusoid.even_inputs(FAMILY, 100), (TASKS, 100))
        inputs = torch.from_numpy(with_task(x, test).astype(np.float32)).reshape(1, -1, 3)
        with torch.no_grad():
            outputs = predict(NETWORK, held, inputs).view(TASKS, 100).double().numpy()
        errors = np.square(outputs - sinusoid.values(test, x)).mean(1, keepdims=True)
        by_shots = {str(shots): summary(np.repeat(errors, STEPS + 1, axis=1)) for shots in SHOTS}
        return {"errors": by_shots, "curve": curve, "cpu_seconds": round(seconds, 1)}
    validation = sinusoid.held_out(FAMILY, TASKS, seed, "validation")
    found, rates = {}, {}
    for shots in SHOTS:
        ends = [fine_tuned(held, validation, rate, shots, seed)[:, -1].mean() for rate in RATES]
        rate = RATES[int(np.argmin(np.nan_to_num(ends, nan=np.inf)))]
        rates[str(shots)] = round(rate, 5)
        found[str(shots)] = summary(fine_tuned(held, test, rate, shots, seed))
    return {"errors": found, "rates": rates, "curve": curve, "cpu_seconds": round(seconds, 1)}


def with_task(inputs: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """(x, amplitude, phase), [N, K, 3]."""
    known = np.broadcast_to(tasks[:, None, :], (*inputs.shape, 2))
    return np.concatenate([inputs[..., None], known], axis=-1)


def fine_tuned(
    weights: Mapping[str, Tensor], tasks: np.ndarray, rate: float, shots: int, seed: int
) -> np.ndarray:
    """Errors after 0, 1, ... steps of gradient descent, [N, steps + 1]."""
    detached = {name: tensor.detach() for name, tensor in weights.items()}
    return adaptation_errors(
        NETWORK,
        detached,
        lambda losses, start, count: adapt_for_evaluation(losses, start, rate, count),
        FAMILY,
        tasks,
        shots,
        STEPS,
        seed,
    )


def sinusoid_study(results: Mapping[str, list[dict[str, Any]]], seeds: list[int]) -> dict[str, Any]:
    """The study's file."""
    columns = [f"K = {shots}, {steps} step{'s' * (steps > 1)}" for shots in SHOTS for steps in SHOWN]
    arms: dict[str, Any] = {}
    for name, runs in results.items():
        scores = [
            [run["errors"][str(shots)]["mean"][steps] for shots in SHOTS for steps in SHOWN] for run in runs
        ]
        extra: dict[str, Any] = {
            "meta_updates": getattr(ARMS.get(name), "meta_updates", BUDGET),
            "cpu_seconds": round(float(np.mean([run["cpu_seconds"] for run in runs])), 1),
            "curves": [run["curve"] for run in runs],
        }
        for shots in SHOTS:
            for statistic in ("mean", "interval", "median"):
                extra[f"{statistic}_by_step_{shots}_shot"] = [
                    run["errors"][str(shots)][statistic] for run in runs
                ]
        if "rates" in runs[0]:
            extra["rates"] = [list(run["rates"].values()) for run in runs]
        if name in ARMS:
            extra["settings"] = [json.dumps(ARMS[name].model_dump(mode="json", exclude={"family"}))]
        arms[name] = {"scores": scores, "extra": extra}
    return {
        "study": "sinusoid",
        "question": (
            f"How few gradient steps on K points does a sinusoid never seen take? The mean squared error of a network 1-40-40-1 over the whole "
            f"interval, on {TASKS} test tasks; smaller is better. Each arm is trained on 5 seeds for as many meta-updates as the table says, with 25 tasks each "
            "(Reptile's demonstration: its own constants, network and tasks, whose phases go to 2 pi)."
        ),
        "environments": columns,
        "seeds": seeds,
        "order": list(results),
        "arms": arms,
        "notes": sinusoid_notes(arms),
    }


def sinusoid_notes(arms: Mapping[str, Any]) -> list[str]:
    """What the numbers say."""

    def mean(name: str, shots: int, steps: int) -> float:
        found = [row[steps] for row in arms[name]["extra"][f"mean_by_step_{shots}_shot"]]
        return float(np.mean([np.nan if value is None else value for value in found]))

    lines = []
    for name in (MAML_LONG, MAML_USUAL, PRETRAINING):
        if name in arms:
            means = [mean(name, 5, steps) for steps in SHOWN]
            found = "/".join("diverged" if math.isnan(each) else f"{each:.3f}" for each in means)
            paper = "2.41/2.23/2.19" if name == PRETRAINING else "0.67/0.38/0.35"
            lines.append(f"{name}: 5-shot error after 1/5/10 steps {found}; the paper's Table 2 has {paper}.")
    if {MAML_USUAL, META_SGD} <= set(arms):
        lines.append(
            f"10 shots, 1 step: {META_SGD} {mean(META_SGD, 10, 1):.3f}, MAML {mean(MAML_USUAL, 10, 1):.3f} (the same budget)."
        )
    if {MAML_USUAL, MAML_LONG, REPTILE} <= set(arms):
        own, other = mean(REPTILE, 10, STEPS), mean(MAML_LONG, 10, STEPS)
        after = [row[STEPS] for row in arms[MAML_USUAL]["extra"]["mean_by_step_10_shot"]]
        finite = [value for value in after if value is not None]
        lines.append(
            f"10 shots, {STEPS} steps: {REPTILE} {own:.3f}. {MAML_USUAL}, the same budget of meta-updates, has {np.mean(finite):.3f} on {len(finite)} of "
            f"{len(after)} seeds (a ratio of {own / np.mean(finite):.2f}) and diverges on the rest; {MAML_LONG}, twice the budget, {other:.3f} (a ratio of "
            f"{own / other:.2f}). After {MORE_STEPS} steps Reptile has {mean(REPTILE, 10, MORE_STEPS):.3f}."
        )
    return lines


# --- the learned optimiser ------------------------------------------------------------------------------------


def learn_to_optimise(kind: str, seed: int) -> dict[str, Any]:
    """Train the LSTM on one kind of problem; losses of all optimisers on 128 test problems."""
    learner = LSTMOptimiser(OPTIMISERS[kind], seed)
    start = time.process_time()
    curve = [report.metrics["loss/optimisee_end"] for report in learner.train()]
    seconds = time.process_time() - start
    found = learner.evaluate(128, OPTIMISER_STEPS, seed)
    at = [0, 10, 20, 50, 100, 150, 200]
    return {
        "losses": {
            name: {
                "mean": [float(f"{value:.4g}") for value in values.mean(0)[at]],
                "log10": [round(float(value), 3) for value in np.log10(values + 1e-12).mean(0)[at]],
            }
            for name, values in {"LSTM": found.values, **found.baselines}.items()
        },
        "steps": at,
        "rates": {name: round(rate, 5) for name, rate in learner.tuned_rates().items()},
        "curve": [float(f"{np.mean(part):.4g}") for part in np.array_split(curve, min(10, len(curve)))],
        "cpu_seconds": round(seconds, 1),
    }


def optimiser_study(results: Mapping[str, list[dict[str, Any]]], seeds: list[int]) -> dict[str, Any]:
    """The study's file."""
    kinds = list(results)
    arms: dict[str, Any] = {}
    for name in ("LSTM", "adam", "rmsprop", "sgd"):
        at = [results[kind][0]["steps"].index(100) for kind in kinds]
        scores = [
            [results[kind][row]["losses"][name]["mean"][index] for kind, index in zip(kinds, at, strict=True)]
            for row in range(len(seeds))
        ]
        extra: dict[str, Any] = {}
        for kind in kinds:
            runs = results[kind]
            extra[f"{kind}_steps"] = runs[0]["steps"]
            extra[f"{kind}_mean_loss"] = [run["losses"][name]["mean"] for run in runs]
            extra[f"{kind}_log10_loss"] = [run["losses"][name]["log10"] for run in runs]
            if name == "LSTM":
                extra[f"{kind}_cpu_seconds"] = round(float(np.mean([run["cpu_seconds"] for run in runs])), 1)
                extra[f"{kind}_curves"] = [run["curve"] for run in runs]
                extra[f"{kind}_settings"] = [json.dumps(OPTIMISERS[kind].model_dump(mode="json"))]
            else:
                extra[f"{kind}_rate"] = runs[0]["rates"][name]
        arms[name] = {"scores": scores, "extra": extra}
    return {
        "study": "learned_optimiser",
        "question": (
            "Does a learned optimiser leave a smaller loss after 100 steps than ordinary ones with their best learning rate (of a grid from 1e-4 to 10, four "
            "to a decade, by the mean loss after 100 steps on other problems)? Mean loss of 128 test problems; smaller is better. Seeds are the LSTM's; "
            "each also draws its own test problems."
        ),
        "environments": kinds,
        "seeds": seeds,
        "order": list(arms),
        "arms": arms,
        "notes": [],
    }


# --- speed ----------------------------------------------------------------------------------------------------


def task_loss(weights: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    """Of one task's network 1-40-40-1, as one writes it: weights [in, out], biases [out]."""
    hidden = inputs
    for index in range(3):
        hidden = hidden @ weights[f"weight_{index}"] + weights[f"bias_{index}"]
        hidden = torch.relu(hidden) if index < 2 else hidden
    return functional.mse_loss(hidden, targets)


def by_loop(weights: Weights, batch: TaskBatch, rate: float) -> Tensor:
    """Task after task."""
    total = torch.zeros(())
    for support_inputs, support_targets, query_inputs, query_targets in zip(*batch, strict=True):
        loss = task_loss(weights, support_inputs, support_targets)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        adapted = {
            name: tensor - rate * gradient
            for (name, tensor), gradient in zip(weights.items(), gradients, strict=True)
        }
        total = total + task_loss(adapted, query_inputs, query_targets)
    return total / len(batch.support_inputs)


def by_func(weights: Weights, batch: TaskBatch, rate: float) -> Tensor:
    """``torch.func``: vmap of a task's query loss, its step by grad."""

    def one(
        support_inputs: Tensor, support_targets: Tensor, query_inputs: Tensor, query_targets: Tensor
    ) -> Tensor:
        gradients = grad(task_loss)(weights, support_inputs, support_targets)
        adapted = {name: tensor - rate * gradients[name] for name, tensor in weights.items()}
        return task_loss(adapted, query_inputs, query_targets)

    losses: Tensor = vmap(one)(*batch)
    return losses.mean()


def speed(rounds: int = 15) -> dict[str, Any]:
    """CPU time of a whole meta-update by three programs, in turn; all end with the same weights."""
    rate, ours, loop, func = (
        0.01,
        "ours: one product for all tasks",
        "Python loop over tasks",
        "torch.func: vmap of grad",
    )
    batches = TaskBatches(FAMILY, 0, tasks=25, support=10, query=10)

    def program(loss_of: Callable[[Weights, TaskBatch, float], Tensor] | None) -> Callable[[int], float]:
        weights = initial_weights(NETWORK, 1, 1, 0)
        if loss_of:
            weights = {name: each[0] if name[0] == "w" else each[0, 0] for name, each in weights.items()}
        module = nn.ParameterDict(weights)
        parameters, held = FlatParameters(module, 1e-3), dict(module.items())

        def update(index: int) -> float:
            parameters.zero_gradient()
            batch = batches.batch(index)
            loss = (
                loss_of(held, batch, rate) if loss_of else meta_losses(NETWORK, held, batch, rate, 1).mean()
            )
            loss.backward()
            parameters.step(1e-3)
            return float(loss.detach())

        return update

    torch.set_float32_matmul_precision("highest")  # as the learners have it; the fastest for all three
    programs = {ours: program(None), loop: program(by_loop), func: program(by_func)}
    repeats = {ours: 20, loop: 2, func: 10}
    for update in programs.values():  # warm up
        update(0)
    losses = {name: [update(index) for index in range(1, 4)] for name, update in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, update in programs.items():
            start = time.process_time()
            for index in range(repeats[name]):
                update(index)
            times[name].append(1e3 * (time.process_time() - start) / repeats[name])
    ratios = {name: np.array(times[name]) / np.array(times[ours]) for name in (loop, func)}
    return {
        "study": "vmap",
        "question": "CPU milliseconds of a second-order MAML meta-update: 25 tasks, 10 + 10 points, network 1-40-40-1, Adam included; one thread, the three programs in turn.",
        "provenance": provenance(),
        "milliseconds": {name: round(float(np.median(values)), 3) for name, values in times.items()},
        "times_ours": {
            name: {
                "median": round(float(np.median(values)), 2),
                "quartiles": [round(float(value), 2) for value in np.percentile(values, [25, 75])],
            }
            for name, values in ratios.items()
        },
        "rounds": rounds,
        "losses_after_1_to_3_updates": {
            name: [round(value, 5) for value in values] for name, values in losses.items()
        },
    }


# --- all of it ------------------------------------------------------------------------------------------------


def jobs() -> dict[str, Callable[[int], dict[str, Any]]]:
    """What there is to run for each seed, by name."""
    found: dict[str, Callable[[int], dict[str, Any]]] = {}
    for name, config in ARMS.items():
        found[name] = lambda seed, config=config: meta_train(config, seed)
    found[PRETRAINING] = lambda seed: joint_training(False, seed)
    found[ORACLE] = lambda seed: joint_training(True, seed)
    for kind in OPTIMISERS:
        found[f"learned optimiser, {kind}"] = lambda seed, kind=kind: learn_to_optimise(kind, seed)
    return found


def settings_of(name: str) -> dict[str, Any]:
    """What a job's result is of, beside its seed."""
    if kind := name.partition("learned optimiser, ")[2]:
        return {"config": OPTIMISERS[kind].model_dump(mode="json"), "steps": OPTIMISER_STEPS}
    judged = {"tasks": TASKS, "shots": SHOTS, "steps": STEPS}
    if name in ARMS:
        return {"config": ARMS[name].model_dump(mode="json"), **judged}
    family, network = FAMILY.model_dump(mode="json"), NETWORK.model_dump(mode="json")
    return {"family": family, "network": network, "updates": BUDGET, "rates": RATES, **judged}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path(".stillhouse/meta_sinusoid"), help="a file per arm and seed"
    )
    parser.add_argument("--only", nargs="*", default=list(jobs()), choices=list(jobs()), metavar="ARM")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--speed", action="store_true", help="the speed alone")
    arguments = parser.parse_args()
    use_one_core()
    if arguments.speed or not load(f"{FOLDER}/vmap"):
        save(f"{FOLDER}/vmap", speed())
    if arguments.speed:
        return
    arguments.work.mkdir(parents=True, exist_ok=True)

    def path(name: str, seed: int) -> Path:
        return arguments.work / f"{''.join(each if each.isalnum() else '_' for each in name)}-{seed}.json"

    def result(name: str, seed: int) -> dict[str, Any]:
        found: dict[str, Any] = kept(path(name, seed), settings_of(name), lambda: jobs()[name](seed))
        return found

    for name in jobs():  # before hours are spent on others
        for seed in arguments.seeds:
            if path(name, seed).is_file():
                result(name, seed)
    for seed in arguments.seeds:
        for name in arguments.only:
            print(time.strftime("%H:%M:%S"), name, seed, flush=True)
            result(name, seed)
    done = {
        name: [result(name, seed) for seed in arguments.seeds]
        for name in jobs()
        if all(path(name, seed).is_file() for seed in arguments.seeds)
    }
    about = {"provenance": provenance()}  # before anything is written
    if regression := {name: runs for name, runs in done.items() if not name.startswith("learned optimiser")}:
        save(f"{FOLDER}/sinusoid", sinusoid_study(regression, arguments.seeds) | about)
    optimisers = {
        kind: done[f"learned optimiser, {kind}"]
        for kind in OPTIMISERS
        if f"learned optimiser, {kind}" in done
    }
    if optimisers:
        save(f"{FOLDER}/learned_optimiser", optimiser_study(optimisers, arguments.seeds) | about)


if __name__ == "__main__":
    main()
