"""Stage: meta-train on a family of tasks, by the method that its parameters name.

Where what is learnt is the initial policy of an ordinary network, that is a student too, ``data/students/<name>-s<seed>``: a source
of transfer.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillhouse.checkpoint import save_checkpoint, save_state
from stillhouse.config import parse
from stillhouse.envs.families import PLAYED
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.errors import StillhouseError
from stillhouse.files import write_json
from stillhouse.meta import METHODS, MetaLearner
from stillhouse.processor import use_one_core
from tasks.curve import Curve
from tasks.stage import StageContext, main

FOLDER = Path("data/meta")


def make_meta_learner(settings: dict[str, Any], where: str, seed: int, device: str) -> MetaLearner:
    """The meta-learner of a parameter block, untrained.

    Raises:
        StillhouseError: a parameter is unknown or out of bounds.
    """
    method = settings["method"]
    # By name: this stage depends on the code of its own method only.
    module = importlib.import_module(f"stillhouse.meta.{method}")
    make, config_class = (getattr(module, name) for name in METHODS[method])
    learner: MetaLearner = make(parse(config_class, settings, where), seed, device)
    return learner


def meta_train(context: StageContext) -> None:
    """A family's settings to what was learnt, and its learning curve."""
    use_one_core()
    where = f"meta_train.{context.name}"
    settings = context.block(where)
    learner = make_meta_learner(settings, where, context.seed, context.device)
    curve = Curve(context, "meta_updates", learner.columns)
    curve.follow(learner)
    learnt = _finite(learner.learnt(), where)
    path = FOLDER / f"{context.name}-s{context.seed}"
    curve.write(path.with_name(f"{path.name}.csv"))
    last = curve.rows[-1] if curve.rows else []
    write_json(
        path.with_name(f"{path.name}.json"),
        {
            "method": settings["method"],
            "env_steps": getattr(learner, "env_steps", 0),
            **dict(zip(["meta_updates", *learner.columns.values()], last, strict=False)),
        },
    )
    save_state(path, learnt)
    family = getattr(learner, "family", None)
    if family is not None and family.name in PLAYED:  # a policy like any student's
        environment = EnvironmentConfig(id=PLAYED[family.name])
        details = {
            "environments": {family.name: environment.model_dump(mode="json")},
            "algorithm": settings["method"],
            "seed": context.seed,
        }
        save_checkpoint(Path("data/students") / path.name, learner.network(), details)  # type: ignore[attr-defined]


def _finite(learnt: dict[str, Any], where: str) -> dict[str, Any]:
    """What was learnt, where every number of it is finite: a loss tells of the weights before the last step.

    Raises:
        StillhouseError: it is not.
    """
    todo: list[Any] = [learnt]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
        elif (
            isinstance(value, torch.Tensor | np.ndarray | float)
            and not torch.as_tensor(value).isfinite().all()
        ):
            raise StillhouseError(f"{where}: what was learnt is no longer finite; lower its learning rates")
    return learnt


if __name__ == "__main__":
    main(meta_train)
