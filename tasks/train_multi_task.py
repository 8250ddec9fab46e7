"""Stage: train one network on several environments at once, without teachers, by the method that its parameters name.

``data/multi_task/<name>-s<seed>`` is what acts and is judged in each environment. Where the method distils one policy of all of them on
the way (Distral), that is a student: ``data/students/<name>-s<seed>``.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from stillhouse.checkpoint import save_checkpoint
from stillhouse.config import parse
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.files import write_json
from stillhouse.multi_task import METHODS
from stillhouse.networks.multi_task import parameter_count
from stillhouse.processor import use_one_core
from tasks.curve import LEARNER_COLUMNS, Curve
from tasks.stage import StageContext, main


def train_multi_task(context: StageContext) -> None:
    """Environments and settings to a checkpoint and its learning curve, a column for each environment."""
    use_one_core()
    where = f"train_multi_task.{context.name}"
    block = dict(context.block(where))
    # Sorted: the order of the names in a file must not change the network.
    names = sorted(block.pop("environments"))
    learner = block.pop("learner")
    method = block["method"]
    # By name: this stage depends on the code of its own method only.
    module = importlib.import_module(f"stillhouse.multi_task.{method}")
    make_training, config_class = (getattr(module, name) for name in METHODS[method])
    config = parse(config_class, block, where)
    environments = {
        name: parse(EnvironmentConfig, context.block(f"environments.{name}"), name) for name in names
    }
    training = make_training(config, learner, environments, context.seed, context.device)
    columns = {f"return/{name}": f"return_{name}" for name in names}
    curve = Curve(context, "env_steps", columns | LEARNER_COLUMNS[training.network.spec.output])
    curve.follow(training)

    path = Path("data/multi_task") / f"{context.name}-s{context.seed}"
    curve.write(path.with_name(f"{path.name}.csv"))
    weights = {f"weight/{name}": name for name in names}
    write_json(
        path.with_name(f"{path.name}.json"),
        {
            "env_steps": training.env_steps,
            "env_steps_each": {name: training.env_steps_of(name) for name in names},
            "mean_returns": {name: training.mean_return(name) for name in names},
            # Of the environments' gradients at the end, where they are balanced.
            "weights": {
                weights[key]: value for key, value in training.rule.metrics().items() if key in weights
            },
            "diverged": training.diverged,
            "parameters": parameter_count(training.network),
            "algorithm": learner["algorithm"],
            "method": method,
        },
    )
    training.rescale_heads()  # to the environments' own rewards
    details = {
        "environments": {
            name: environment.model_dump(mode="json") for name, environment in environments.items()
        },
        "algorithm": learner["algorithm"],
        "method": method,
        "env_steps": training.env_steps,
        "seed": context.seed,
    }
    save_checkpoint(path, training.network, details)
    if training.distilled is not None:
        save_checkpoint(Path("data/students") / path.name, training.distilled, details)


if __name__ == "__main__":
    main(train_multi_task)
