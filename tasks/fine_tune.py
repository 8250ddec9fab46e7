"""Stage: move what a student or teacher knows to a target environment, in one of the ways there are, or train there from scratch."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from stillhouse.agents import OUTPUTS, fresh_network, make_learner
from stillhouse.checkpoint import load_checkpoint, save_checkpoint
from stillhouse.config import parse
from stillhouse.datasets.reader import Dataset
from stillhouse.envs.make import EnvironmentConfig, describe
from stillhouse.envs.names import action_names, component_names
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import evaluate, network_policy
from stillhouse.files import write_atomic, write_json
from stillhouse.networks.multi_task import MultiTaskNetwork, build_network, scale_head
from stillhouse.processor import use_one_core
from stillhouse.seeding import derive
from stillhouse.transfer.feature_transfer import feature_network
from stillhouse.transfer.fine_tuning import (
    FineTuneConfig,
    FineTuning,
    Mode,
    OrderedDataset,
    Origin,
    Schedule,
    StartingPoint,
    fit_head,
    layer_paces,
)
from stillhouse.transfer.initialisation import (
    Correspondence,
    Labels,
    Source,
    TensorReport,
    channels,
    check_patterns,
    correspond,
    kept_name,
    kept_observations,
    target_network,
)
from stillhouse.transfer.kickstarting import Guide, inverse, policy_temperature
from stillhouse.transfer.progressive_networks import Column, ProgressiveNetwork, progressive_network
from stillhouse.transfer.rehearsal import Rehearsal
from stillhouse.transfer.sensitivity import sensitivities
from stillhouse.transfer.source_choice import SourceChoice
from stillhouse.types import environment_spec
from tasks.stage import StageContext, main, transfer_stem

# What they take from the source is trained; the others leave it alone.
MOVING = ("discriminative", "full", "gradual", "head_only", "l2_sp", "rehearsal")


class Transfer:
    """One stage's parameters, and the runs that it can make of them."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.name, self.seed = context.name, context.seed
        block = dict(context.block(f"fine_tune.{self.name}"))
        self.environment = self.environment_of(self.name)
        self.sources = context.sources
        self.learner_settings: dict[str, Any] = block.pop("learner")
        del block["sources"], block["modes"]
        self.config = parse(FineTuneConfig, block, f"fine_tune.{self.name}")
        self.spec = environment_spec(*describe(self.environment), self.name)
        self.output = OUTPUTS[self.learner_settings["algorithm"]]
        self.budget: int = self.learner_settings["env_steps"]

    def environment_of(self, name: str) -> EnvironmentConfig:
        return parse(EnvironmentConfig, self.context.block(f"environments.{name}"), name)

    def source(self, entry: str) -> Source:
        """A teacher, by its environment, or a student, by its name and perhaps one of its environments."""
        name, _, environment = entry.partition(".")
        student = Path("data/students") / f"{name}-s{self.seed}"
        if str(student) in self.context.deps:
            return Source(name, load_checkpoint(student).network, environment)
        return Source(name, load_checkpoint(Path("data/teachers") / f"{name}-s{self.seed}").network, name)

    def corresponding(self, source: Source) -> Correspondence | None:
        """Of the target's components and actions with the source's."""
        if not source.environment:
            return None
        ours, theirs = (
            Labels(component_names(config), action_names(config))
            for config in (self.environment, self.environment_of(source.environment))
        )
        return correspond(
            self.spec,
            source.spec,
            self.config.components,
            self.config.actions,
            (ours, theirs),
            where=f"fine_tune.{self.name}",
        )

    def _column(self, source: Source, random: bool = False) -> Column:
        """A source as a frozen column; ``random``: with fresh weights in place of its own."""
        network = source.network
        if random:
            network = build_network(network.spec, derive(self.seed, "random column"))
        return Column(network, source.environment, self._shown(source))

    def _shown(self, source: Source) -> tuple[int, ...]:
        """For each of the source's components the target's.

        Raises:
            StillhouseError: the source cannot be fed with the target's observations.
        """
        correspondence = self.corresponding(source)
        if correspondence is None:
            raise StillhouseError(
                f"fine_tune.{self.name}.sources: {source.name!r} is to be shown the target's observations, so one of its environments is "
                f"needed: {source.name}.{next(iter(source.network.spec.environments))}, for example"
            )
        if correspondence.components is None:
            raise StillhouseError(
                f"fine_tune.{self.name}.components: {source.environment!r} takes observations {source.spec.observation.key}, the target has "
                f"{self.spec.observation.key}; say which component is which (index, name, or target's to source's), or use a way that "
                "takes the torso alone (full, head_only, gradual)"
            )
        return inverse(correspondence.components, channels(source.spec.observation))

    def dataset(self, environment: str) -> Dataset:
        return Dataset.open(Path("data/datasets") / f"{environment}-s{self.seed}")

    def run(self, mode: Mode, entry: str, budget: int = 0) -> FineTuning:
        """A run in one way from one source (of ``progressive_3`` the first), with a budget other than the learner's where given."""
        config = self.config
        settings = {**self.learner_settings, "env_steps": budget or self.budget}
        source = self.source(entry)
        if mode in MOVING:
            correspondence = self.corresponding(source)
            network, tensors = target_network(
                source, self.name, self.spec, self.seed, self.output, correspondence, config.take
            )
            explained = self._fit_head(network, source, correspondence, tensors)
        else:
            network, correspondence, explained = self._own_network(mode, source), None, None
            tensors = TensorReport()
            for key, parameter in network.named_parameters():
                (tensors.new if parameter.requires_grad else tensors.copied).append(key)
        head_taken = f"heads.{self.name}.weight" in tensors.taken
        if self.output == "logits" and head_taken:
            # A fresh critic's errors would spoil the policy before it knows anything.
            settings["critic_warmup"] = config.critic_warmup
        elif head_taken or explained is not None:
            # It knows something of what its actions are worth; a learner with a fresh head must explore like scratch.
            settings["epsilon_start"] = config.epsilon_start
            scale_head(network, self.name, settings.get("reward_scale", 1.0))
        learner = make_learner(settings, self.name, self.environment, self.seed, self.context.device, network)
        parameters = learner.parameters
        layers = network.layer_names(self.name)
        # Only what was taken is worth keeping as it is: a fresh network learns whole.
        frozen = config.freeze if mode in MOVING else []
        always = check_patterns("freeze", frozen, list(parameters.slices))
        schedule = Schedule(mode, layers, tensors.taken, always, config.frozen_fraction)
        origin = Origin(source, correspondence, tensors, explained)
        rehearsal = None
        if mode == "kickstart" or (self.output == "logits" and head_taken):
            learner.guide = self._guide(source, settings["env_steps"])  # type: ignore[attr-defined] # such a learner is PPO
        if mode == "discriminative":
            parameters.set_pace(layer_paces(layers, tensors.taken, config.layer_decay))
        elif mode == "l2_sp":
            below = [key for key in tensors.taken if not key.startswith("heads.")]
            parameters.penalties.append(StartingPoint(parameters, below, config.l2_sp))
        elif mode == "rehearsal":
            rehearsal = self._rehearsal(network, origin, learner)
            parameters.penalties.append(rehearsal)
        return FineTuning(
            config, learner, self.environment, settings["env_steps"], schedule, self.seed, origin, rehearsal
        )

    def _own_network(self, mode: Mode, source: Source) -> MultiTaskNetwork:
        """A fresh network, with or without frozen columns."""
        if mode in ("scratch", "kickstart"):
            size = source.network.spec.size.model_copy(update={"share_head": False})
            return fresh_network(size, self.name, self.spec, self.output, self.seed)
        columns = [self._column(source, random=mode == "progressive_random")]
        if mode == "features":
            return feature_network(self.name, self.spec, self.output, columns[0], self.seed)
        if mode == "progressive_3":
            columns = [self._column(self.source(entry)) for entry in self.sources[:2]]
        scale = self.config.adapter_scale
        return progressive_network(self.name, self.spec, self.output, columns, self.seed, adapter_scale=scale)

    def _fit_head(
        self,
        network: MultiTaskNetwork,
        source: Source,
        correspondence: Correspondence | None,
        tensors: TensorReport,
    ) -> float | None:
        """Q-values for a learner that bootstraps, where the source has none but its dataset has."""
        path = f"data/datasets/{source.environment}-s{self.seed}"
        wanted = self.output == "q_values" and f"heads.{self.name}.weight" in tensors.new
        if not wanted or correspondence is None or path not in self.context.deps:
            return None
        dataset = self.dataset(source.environment)
        if dataset.schema.environment != self.spec or dataset.schema.output != "q_values":
            return None
        if not correspondence.one_to_one:
            return None
        ordered = OrderedDataset(dataset, correspondence, self.spec.observation)
        return fit_head(network, self.name, ordered, dataset.schema.output)

    def _guide(self, source: Source, budget: int) -> Guide:
        self._shown(source)
        correspondence = self.corresponding(source)
        assert correspondence is not None
        if correspondence.actions is None:
            raise StillhouseError(
                f"fine_tune.{self.name}.actions: {source.environment!r} has {source.spec.actions} actions, the target {self.spec.actions}; "
                "say which is which (index, name, or target's to source's)"
            )
        temperature = 1.0
        if source.network.spec.output == "q_values":
            dataset = self.dataset(source.environment)
            rows = torch.linspace(0, len(dataset) - 1, min(4096, len(dataset))).long().numpy()
            states = torch.from_numpy(dataset.observations(rows))
            temperature = policy_temperature(source.network, source.environment, states, "q_values")
        source.network.to(self.context.device)
        return Guide(
            source,
            self.spec,
            correspondence,
            temperature,
            self.config.guide_weight,
            self.config.guide_fraction * budget,
        )

    def _rehearsal(self, network: MultiTaskNetwork, origin: Origin, learner: Any) -> Rehearsal:
        kept = [each for each in network.spec.environments if each != self.name]
        if not kept:
            raise StillhouseError(
                f"fine_tune.{self.name}.components: the source's adapter is taken in part, so there is no way left on which its policy "
                "could be rehearsed; map every component, or leave rehearsal out"
            )
        needed = {key for each in kept for layer in network.layer_names(each) for key in layer}
        if fresh := sorted(needed.intersection(origin.tensors.new)):
            raise StillhouseError(
                f"fine_tune.{self.name}.take: leaves out {fresh[0]}, without which the source's policy is not there to be rehearsed; take "
                f"{', '.join(fresh)} too, or leave rehearsal out"
            )
        config, share = learner.config, self.config.rehearsal_share
        # The learner's own minibatch: DQN names it, the others cut a rollout up.
        rows = (
            getattr(config, "batch_size", 0) or config.num_envs * config.rollout_length // config.minibatches
        )
        return Rehearsal(
            network,
            self.name,
            {each: self.dataset(each.removeprefix(kept_name(""))) for each in kept},
            origin.source.network.spec.output,
            origin.correspondence,
            round(rows * share / (1 - share)),
            self.config.rehearsal_weight,
            self.seed,
        )

    def retention(self, run: FineTuning) -> dict[str, dict[str, float]] | None:
        """Mean returns in the source's environments, by their names: at random, before and after; None where nothing was moved."""
        source, network, device = run.origin.source, run.learner.network, self.context.device
        if isinstance(network, ProgressiveNetwork) or not run.origin.tensors.taken:
            return None
        found = {}
        for name in source.network.spec.environments:
            environment, kept = self.environment_of(name), kept_name(name)
            if kept not in network.spec.environments:
                continue

            def shown(observations: np.ndarray, kept: str = kept) -> np.ndarray:
                given = torch.from_numpy(observations)
                own = kept_observations(network, self.name, kept, run.origin.correspondence, given)
                return network_policy(network, kept, device)(own.numpy())

            before = network_policy(source.network.to(device), name, device)
            returns = {}
            for when, policy, epsilon in (
                ("random", before, 1.0),
                ("before", before, 0.0),
                ("after", shown, 0.0),
            ):
                episodes = evaluate(policy, environment, self.config.evaluation_episodes, self.seed, epsilon)
                returns[when] = float(episodes.returns.mean())
            found[name] = returns
        return found or None


def fine_tune(context: StageContext) -> None:
    """Sources and a target environment to a checkpoint, its learning curve, and what was taken and kept of the sources."""
    use_one_core()
    transfer = Transfer(context)
    mode, name, seed = cast(Mode, context.mode), context.name, context.seed
    run = _choice(transfer) if mode == "auto" else transfer.run(mode, transfer.sources[0])
    if saved := context.scratch.load():
        run.set_state(saved)
    for report in run.train():
        context.progress.update(report.done, report.total, "env steps", report.metrics)
        if context.scratch.due():
            context.scratch.save(run.get_state())
    chosen = run.run if isinstance(run, SourceChoice) else run
    learner, config = chosen.learner, transfer.config
    network = learner.network
    folder, stem = Path("data/transfer"), transfer_stem(name, mode, context.source, seed)
    test = evaluate(learner.outputs, transfer.environment, config.evaluation_episodes, seed)
    random = evaluate(
        learner.outputs,
        transfer.environment,
        config.evaluation_episodes,
        seed,
        epsilon=1.0,
        stream="validation",
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["env_steps", "mean_return"])
    writer.writerows((env_steps, f"{value:.6g}") for env_steps, value in run.curve)
    write_atomic(folder / f"{stem}.csv", text.getvalue())
    found: dict[str, Any] = {
        "env_steps": learner.env_steps + (run.spent if isinstance(run, SourceChoice) else 0),
        "initial_return": run.curve[0][1],
        "final_return": run.curve[-1][1],
        "random_return": float(random.returns.mean()),
        "test": test.summary(),
        "head_variance_explained": chosen.origin.head_variance_explained,
        "parameters": sum(tensor.numel() for tensor in network.parameters() if tensor.requires_grad),
        "tensors": asdict(chosen.origin.tensors),
        "retention": transfer.retention(chosen),
    }
    if isinstance(run, SourceChoice):
        found["choice"] = {"chosen": run.chosen, "scores": run.scores}
    if isinstance(network, ProgressiveNetwork) and config.sensitivity_episodes:
        found["sensitivity"] = sensitivities(
            network, name, transfer.environment, config.sensitivity_episodes, seed
        )
    write_json(folder / f"{stem}.json", found)
    details = {
        "environments": {name: transfer.environment.model_dump(mode="json")},
        "mode": mode,
        "seed": seed,
    }
    scale_head(network, name, 1 / learner.reward_scale)
    save_checkpoint(folder / stem, network, details)


def _choice(transfer: Transfer) -> SourceChoice:
    """Every source fine-tuned in full, and scratch."""
    probe = max(1, int(transfer.config.probe_fraction * transfer.budget))
    rest = transfer.budget - probe * len(transfer.sources)

    def candidate(mode: Mode, entry: str) -> Callable[[], FineTuning]:
        return lambda: transfer.run(mode, entry, rest)

    candidates = {entry.partition(".")[0]: candidate("full", entry) for entry in transfer.sources}
    return SourceChoice(
        {**candidates, "scratch": candidate("scratch", transfer.sources[0])}, transfer.budget, probe
    )


if __name__ == "__main__":
    main(fine_tune)
