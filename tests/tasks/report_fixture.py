"""A run's results, as its stages write them: quickstart-like, for any number of seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

IDS = {
    "acrobot": "Acrobot-v1",
    "breakout": "MinAtar/Breakout-v1",
    "cartpole": "CartPole-v1",
    "cartpole-long": "stillhouse/CartPole-v1",
    "space-invaders": "MinAtar/SpaceInvaders-v1",
}
# random, teacher, student, env steps
RETURNS = {
    "acrobot": (-498.2, -79.4, -83.1, 500_000),
    "breakout": (0.51, 12.9, 12.2, 1_000_000),
    "cartpole": (22.1, 499.3, 498.0, 500_000),
}
SIZES = {"acrobot": 18_435, "breakout": 131_843, "cartpole": 17_666}
# random, scratch's end, budget
TARGETS = {"cartpole-long": (30.2, 411.0, 100_000), "space-invaders": (2.9, 31.0, 300_000)}


def modules() -> list[str]:
    """Every project module that a stage may import."""
    root = Path(__file__).parents[2]
    paths = [path for package in ("stillhouse", "tasks") for path in (root / package).rglob("*.py")]
    return [
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in paths
    ]


def blocks(seeds: int) -> dict[str, Any]:
    """The parameters that the report is given."""
    return {
        "suite": "quickstart",
        "seeds": list(range(seeds)),
        "environments": {name: {"id": value} for name, value in IDS.items()},
        "train_teacher": {name: {"algorithm": "pqn", "env_steps": RETURNS[name][3]} for name in RETURNS},
        "collect_dataset": {name: {"from_replay": False} for name in RETURNS},
        "distill_student": {
            "small": {"method": "offline", "environments": list(RETURNS), "loss": "kl", "updates": 8000}
        },
        "train_multi_task": {},
        "aggregate": {},
        "meta_train": {},
        "fine_tune": {
            "cartpole-long": {"sources": ["small.cartpole"], "modes": ["full", "gradual", "scratch"]},
            "space-invaders": {"sources": ["small"], "modes": ["full", "gradual", "scratch"]},
        },
        "report": {"title": "stillhouse: distillation report"},
    }


def write(root: Path, seeds: int) -> dict[str, Any]:
    """Write every file under ``root``; the parameter blocks."""

    def put(name: str, value: Any) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))

    def rise(random: np.random.Generator, low: float, high: float, points: int, rate: float) -> np.ndarray:
        t = np.linspace(0, 1, points)
        noise = np.convolve(random.normal(0, 0.05, points + 4), np.ones(5) / 5, "valid")
        return low + (high - low) * np.clip(
            1 / (1 + np.exp(-rate * (t - 0.35))) * 1.02 + noise * (t > 0), -0.05, 1.05
        )

    def table(head: str, *columns: np.ndarray) -> str:
        return (
            "\n".join([head, *(",".join(f"{v:.6g}" for v in row) for row in zip(*columns, strict=True))])
            + "\n"
        )

    put(
        "data/code/report.json",
        {
            "environment": {
                "device": "cpu",
                "python": "3.11",
                "torch": "2.13.0",
                "numpy": "2.4.6",
                "gymnasium": "1.4.0",
            },
            "modules": {},
        },
    )
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        agreement = {"acrobot": 0.91, "breakout": 0.88, "cartpole": 0.97}
        for name, (low, teacher, student, budget) in RETURNS.items():
            curve = rise(random, low, teacher * (0.97 if teacher > 0 else 1.05), 100, 14)
            put(
                f"data/teachers/{name}-s{seed}.csv",
                table("env_steps,mean_return", np.linspace(budget / 100, budget, 100), curve),
            )
            put(
                f"data/teachers/{name}-s{seed}.json",
                {"env_steps": budget, "episodes": 4000, "mean_return": curve[-1], "parameters": SIZES[name]},
            )
            put(f"data/datasets/{name}-s{seed}.json", {"transitions": 50_000})
            span = abs(teacher - low)

            def played(mean: float, capped: float = 0.0) -> dict[str, Any]:
                return {"mean": mean, "returns": [mean], "capped_share": capped}

            spot = student + 0.02 * span * random.normal()
            put(
                f"data/evaluation/{name}-s{seed}.json",
                {
                    "environment": name,
                    "seed": seed,
                    "episodes": 100,
                    "epsilon": 0.05,
                    "random": played(low + 0.004 * span * random.normal()),
                    "teacher": {
                        "greedy": played(teacher),
                        "epsilon": played(teacher - 0.05 * span),
                        "parameters": SIZES[name],
                    },
                    "students": {
                        "small": {
                            "greedy": played(spot),
                            "epsilon": played(spot - 0.06 * span),
                            "parameters": 11_198,
                        }
                    },
                },
            )
        updates = np.linspace(200, 8000, 40)
        curves = {
            name: np.clip(end - 0.45 * np.exp(-updates / 1500) + random.normal(0, 0.006, 40), 0, 1)
            for name, end in agreement.items()
        }
        losses = [np.exp(-updates / 2000)] * 3
        put(
            f"data/students/small-s{seed}.csv",
            table(
                "updates,"
                + ",".join(f"loss_{n}" for n in curves)
                + ","
                + ",".join(f"agreement_{n}" for n in curves),
                updates,
                *losses,
                *curves.values(),
            ),
        )
        put(
            f"data/students/small-s{seed}.json",
            {
                "updates": 8000,
                "parameters": 11_198,
                "teacher_parameters": sum(SIZES.values()),
                "best_update": 7800,
                "agreement": float(np.mean([values[-1] for values in curves.values()])),
                "agreements": {name: float(values[-1]) for name, values in curves.items()},
            },
        )
        for target, (low, end, budget) in TARGETS.items():
            same = target == "cartpole-long"
            for mode, way, start, rate in (
                ("full", "full-small", 0.7 if same else 0.02, 11),
                ("gradual", "gradual-small", 0.7 if same else 0.02, 8),
                ("scratch", "scratch", 0.0, 7),
            ):
                top = (
                    {"full": 1.12, "gradual": 1.0, "scratch": 1.0}[mode]
                    if same or mode != "gradual"
                    else 0.82
                )
                curve = rise(random, low + start * (end - low), low + top * (end - low), 11, rate)
                curve[0] = low + start * (end - low) + 0.01 * (end - low) * random.normal()
                put(
                    f"data/transfer/{target}-{way}-s{seed}.csv",
                    table("env_steps,mean_return", np.linspace(0, budget, 11), curve),
                )
                copied = ["torso.dense.0.weight", "torso.dense.0.bias"] + (
                    ["adapters.vector_4.dense.weight", "heads.cartpole.weight"] if same else []
                )
                new = (
                    []
                    if same
                    else [
                        "adapters.planes_10x10x6.first.convolution.weight",
                        "adapters.planes_10x10x6.body.dense.weight",
                        "heads.space-invaders.weight",
                    ]
                )
                put(
                    f"data/transfer/{target}-{way}-s{seed}.json",
                    {
                        "final_return": float(curve[-1]),
                        "initial_return": float(curve[0]),
                        "random_return": low,
                        "env_steps": budget,
                        "tensors": {
                            "copied": [] if mode == "scratch" else copied,
                            "sliced": [],
                            "padded": [],
                            "permuted": [],
                            "new": copied + new if mode == "scratch" else new,
                        },
                        # It keeps half of what it gained over random play in one environment, all in another.
                        "retention": None
                        if mode == "scratch"
                        else {
                            "cartpole": {"random": 20.0, "before": 500.0, "after": 260.0},
                            "acrobot": {"random": -500.0, "before": -80.0, "after": -80.0},
                        },
                        "head_variance_explained": None,
                        "parameters": 11_198,
                    },
                )
    return blocks(seeds)
