"""Stage: move a student to a target environment, or train the same network there from scratch."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import cast

from stillhouse.agents import OUTPUTS, make_learner
from stillhouse.checkpoint import load_checkpoint, save_checkpoint
from stillhouse.config import parse
from stillhouse.datasets.reader import Dataset
from stillhouse.envs.make import EnvironmentConfig, describe
from stillhouse.evaluation.rollouts import evaluate
from stillhouse.files import write_atomic, write_json
from stillhouse.networks.multi_task import parameter_count, scale_head
from stillhouse.processor import use_one_core
from stillhouse.transfer.fine_tuning import FineTuneConfig, FineTuning, Mode, fit_head, target_network
from stillhouse.types import environment_spec
from tasks.stage import StageContext, main


def fine_tune(context: StageContext) -> None:
    """A student and a target environment to a checkpoint, its learning curve and what was taken from the student."""
    use_one_core()
    name, mode, seed = context.name, cast(Mode, context.mode), context.seed
    block = dict(context.block(f"fine_tune.{name}"))
    environment = parse(EnvironmentConfig, context.block(f"environments.{name}"), name)
    student_name, source, learner_settings = block.pop("student"), block.pop("source"), block.pop("learner")
    block.pop("modes")
    config = parse(FineTuneConfig, block, f"fine_tune.{name}")
    student = load_checkpoint(Path("data/students") / f"{student_name}-s{seed}").network
    output = OUTPUTS[learner_settings["algorithm"]]
    network, tensors = target_network(
        student, name, environment_spec(*describe(environment), name), source, seed, mode, output
    )
    explained = None
    if output == "q_values" and mode != "scratch" and source and student.spec.output == "logits":
        dataset = Dataset.open(Path("data/datasets") / f"{source}-s{seed}")
        if dataset.schema.environment == network.spec.environments[name]:
            explained = fit_head(network, name, dataset, dataset.schema.output)
    head_taken = f"heads.{name}.weight" not in tensors.new
    if output == "logits" and head_taken:
        # A fresh critic's errors would spoil the policy before it knows anything.
        learner_settings = {**learner_settings, "critic_warmup": config.critic_warmup}
    elif output == "q_values" and (head_taken or explained is not None):
        # It knows something of what its actions are worth; a learner with a fresh head must explore like scratch.
        learner_settings = {**learner_settings, "epsilon_start": config.epsilon_start}
        scale_head(network, name, learner_settings.get("reward_scale", 1.0))
    learner = make_learner(learner_settings, name, environment, seed, context.device, network)
    frozen = [key for key in tensors.kept if not key.startswith("heads.")] if mode == "frozen" else []
    run = FineTuning(config, learner, environment, learner_settings["env_steps"], frozen, seed)
    if saved := context.scratch.load():
        run.set_state(saved)
    for report in run.train():
        context.progress.update(report.done, report.total, "env steps", report.metrics)
        if context.scratch.due():
            context.scratch.save(run.get_state())

    folder = Path("data/transfer")
    stem = f"{name}-{mode}-s{seed}"
    test = evaluate(learner.outputs, environment, config.evaluation_episodes, seed)
    random = evaluate(
        learner.outputs, environment, config.evaluation_episodes, seed, epsilon=1.0, stream="validation"
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["env_steps", "mean_return"])
    writer.writerows((env_steps, f"{value:.6g}") for env_steps, value in run.curve)
    write_atomic(folder / f"{stem}.csv", text.getvalue())
    write_json(
        folder / f"{stem}.json",
        {
            "env_steps": learner.env_steps,
            "initial_return": run.curve[0][1],
            "final_return": run.curve[-1][1],
            "random_return": float(random.returns.mean()),
            "test": test.summary(),
            "head_variance_explained": explained,
            "parameters": parameter_count(network),
            "tensors": asdict(tensors),
        },
    )
    details = {"environments": {name: environment.model_dump(mode="json")}, "mode": mode, "seed": seed}
    scale_head(learner.network, name, 1 / learner.reward_scale)
    save_checkpoint(folder / stem, learner.network, details)


if __name__ == "__main__":
    main(fine_tune)
