"""What the stages of a run left behind, and the numbers that the report draws from it. Pure: no files here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stillhouse.evaluation.statistics import (
    SEEDS_FOR_INTERVALS,
    Aggregate,
    Estimate,
    aggregate,
    estimate,
    mean,
    normalised_score,
    probability_of_improvement,
)
from stillhouse.transfer.metrics import Curve, area_under_curve, compare

# Settings of a joint network that are given by environment.
_BY_ENVIRONMENT = ("weights", "reward_scales")

Run = dict[str, Any]
"""A stage's metrics (its JSON), with its learning curve's columns under ``curve``."""


@dataclass(frozen=True)
class Results:
    """Everything the report is made of.

    Attributes:
        title: the page's.
        suite: its name.
        seeds: of every stage.
        ids: environment name to Gymnasium id, sources and targets.
        teachers: environment, seed -> its run.
        datasets: environment, seed -> its metrics.
        students: student, seed -> its run: distilled, averaged, or Distral's distilled policy (then the joint network's).
        joint: joint network, seed -> its run.
        evaluations: environment, seed -> returns of random play, the teacher, the students and the joint networks.
        transfer: target, way (``scratch``, ``full-small``: with its source, where it has one), seed -> its run.
        meta: meta-learner, seed -> its run, with how it adapts under ``adaptation``.
        settings: the blocks ``train_teacher``, ``collect_dataset``, ``distill_student``, ``train_multi_task``, ``aggregate``, ``fine_tune``
            and ``meta_train``.
        environment: versions, and the device.
        inputs: path of every file read to its SHA-256.
    """

    title: str
    suite: str
    seeds: list[int]
    ids: dict[str, str]
    teachers: dict[str, dict[int, Run]]
    datasets: dict[str, dict[int, Run]]
    students: dict[str, dict[int, Run]]
    joint: dict[str, dict[int, Run]]
    evaluations: dict[str, dict[int, Run]]
    transfer: dict[str, dict[str, dict[int, Run]]]
    meta: dict[str, dict[int, Run]]
    settings: dict[str, dict[str, Any]]
    environment: dict[str, str]
    inputs: dict[str, str]

    def sources(self, name: str, joint: bool = False) -> list[str]:
        """The environments a student, or a joint network, learnt, sorted."""
        block, settings = (
            ("train_multi_task", self.settings["train_multi_task"][name]) if joint else self.made_by(name)
        )
        return (
            self.sources(settings["members"][0]) if block == "aggregate" else sorted(settings["environments"])
        )

    def made_by(self, student: str) -> tuple[str, dict[str, Any]]:
        """The block that a student's stage has, and its settings."""
        blocks = ("distill_student", "aggregate", "train_multi_task")
        return next(
            (block, self.settings[block][student]) for block in blocks if student in self.settings[block]
        )


@dataclass(frozen=True)
class Row:
    """One student, or joint network, on one environment; returns are means over episodes, one for each seed."""

    environment: str
    teacher: Estimate
    student: Estimate
    random: Estimate
    score: Estimate | None  # None: the teacher is no better than random play
    epsilon_score: Estimate | None
    agreement: Estimate | None  # None: not measured
    capped_share: float
    teacher_parameters: int


@dataclass(frozen=True)
class StudentSummary:
    """The table of a student, or of a joint network, and what it comes to."""

    rows: list[Row]
    overall: Aggregate
    better_than_teacher: (
        float | None
    )  # probability that a run beats its teacher, ties one half; from 5 seeds on
    parameters: int
    teacher_parameters: int

    @property
    def compression(self) -> float:
        """How many times smaller the student is than its teachers together."""
        return self.teacher_parameters / self.parameters


@dataclass(frozen=True)
class TransferRow:
    """One mode on one target, measured against scratch of the same seed."""

    mode: str
    initial: Estimate
    final: Estimate
    area: Estimate
    jumpstart: Estimate | None  # None, as what follows: there was no scratch to measure against
    score: Estimate | None
    score_kind: str
    steps_to_scratch: list[float]  # infinite where it never got there
    retention: (
        Estimate | None
    )  # of the sources' normalised score, mean over their environments; None: nothing of theirs moved


@dataclass(frozen=True)
class MetaSummary:
    """How what was meta-learnt adapts to tasks of its family.

    Attributes:
        measure: of the values: ``mse`` and ``loss`` are better when smaller, ``return`` when larger.
        unit: what ``steps`` counts.
        steps: of adaptation, [n].
        tasks: judged ones for each seed.
        unseen: whether they are others than those of training.
        arms: the method, then what it is compared with: a mean over the tasks after every step, one for each seed.
    """

    measure: str
    unit: str
    steps: list[int]
    tasks: int
    unseen: bool
    arms: dict[str, list[Estimate]]


@dataclass(frozen=True)
class Summary:
    """Every number of the report."""

    students: dict[str, StudentSummary]
    joint: dict[str, StudentSummary]
    transfer: dict[str, list[TransferRow]]
    meta: dict[str, MetaSummary]


def summarise(results: Results) -> Summary:
    """Normalised scores, aggregates and transfer measures of all results."""
    return Summary(
        students={name: _student(results, name) for name in sorted(results.students)},
        joint={name: _student(results, name, joint=True) for name in sorted(results.joint)},
        transfer={target: _transfer(results, target) for target in sorted(results.transfer)},
        meta={name: _meta(results, name) for name in sorted(results.meta)},
    )


def _meta(results: Results, name: str) -> MetaSummary:
    found = [results.meta[name][seed]["adaptation"] for seed in results.seeds]
    first = found[0]
    method = str(results.settings["meta_train"][name]["method"])
    arms = {}
    for arm in [method, *sorted(set(first["means"]) - {method})]:
        # A single column stands for every step.
        means = np.array(
            [np.broadcast_to(np.array(run["means"][arm], np.float64), len(first["steps"])) for run in found]
        )
        arms[arm] = [_over_seeds(column) for column in means.T]
    return MetaSummary(first["measure"], first["unit"], first["steps"], first["tasks"], first["unseen"], arms)


@dataclass(frozen=True)
class Interference:
    """What learning a second environment does to the first: networks of two environments, alike in all else.

    Attributes:
        networks: their names.
        environments: rows and columns, sorted.
        scores: (environment, what it was learnt together with) -> normalised score of the former; absent where no network has
            these two.
    """

    networks: list[str]
    environments: list[str]
    scores: dict[tuple[str, str], Estimate | None]


def interference(results: Results, summary: Summary) -> list[Interference]:
    """A table of environments by environments for each set of joint networks of two that differ in nothing but these."""
    alike: dict[str, list[str]] = {}
    for name, network in summary.joint.items():
        if len(network.rows) == 2:
            settings = results.settings["train_multi_task"][name]
            own = {key: settings[key] for key in settings if key not in ("environments", *_BY_ENVIRONMENT)}
            alike.setdefault(json.dumps(own, sort_keys=True), []).append(name)
    tables = []
    for names in alike.values():
        scores: dict[tuple[str, str], Estimate | None] = {}
        for name in names:
            one, other = summary.joint[name].rows
            scores[one.environment, other.environment] = one.score
            scores[other.environment, one.environment] = other.score
        tables.append(Interference(names, sorted({row for row, _ in scores}), scores))
    return tables


def _over_seeds(values: Sequence[float] | np.ndarray) -> Estimate:
    return estimate(mean, np.array(values, np.float64)[:, None], seed=0)


def _student(results: Results, name: str, joint: bool = False) -> StudentSummary:
    sources, seeds = results.sources(name, joint), results.seeds
    kind, own = ("joint", results.joint) if joint else ("students", results.students)
    rows = []
    scores = np.zeros((len(seeds), len(sources)))
    for column, environment in enumerate(sources):
        runs = [results.evaluations[environment][seed] for seed in seeds]
        random = np.array([run["random"]["mean"] for run in runs])
        teacher = np.array([run["teacher"]["greedy"]["mean"] for run in runs])
        student = np.array([run[kind][name]["greedy"]["mean"] for run in runs])
        scores[:, column] = normalised_score(student, random, teacher)
        epsilon = normalised_score(
            np.array([run[kind][name]["epsilon"]["mean"] for run in runs]),
            random,
            np.array([run["teacher"]["epsilon"]["mean"] for run in runs]),
        )
        rows.append(
            Row(
                environment=environment,
                teacher=_over_seeds(teacher),
                student=_over_seeds(student),
                random=_over_seeds(random),
                score=None if np.isnan(scores[:, column]).any() else _over_seeds(scores[:, column]),
                epsilon_score=None if np.isnan(epsilon).any() else _over_seeds(epsilon),
                agreement=_agreement([own[name][seed].get("agreements", {}) for seed in seeds], environment),
                capped_share=float(
                    np.mean([run[kind][name]["greedy"].get("capped_share", 0.0) for run in runs])
                ),
                teacher_parameters=runs[0]["teacher"]["parameters"],
            )
        )
    # A teacher's own score is 1 by definition. Below 5 seeds a probability would say more than is known.
    known = ~np.isnan(scores).any(axis=0)
    better = None
    if len(seeds) >= SEEDS_FOR_INTERVALS and known.any():
        better = float(probability_of_improvement(scores[:, known], np.ones_like(scores[:, known])))
    return StudentSummary(
        rows=rows,
        overall=aggregate(scores, sources),
        better_than_teacher=better,
        parameters=results.evaluations[sources[0]][seeds[0]][kind][name]["parameters"],
        teacher_parameters=sum(row.teacher_parameters for row in rows),
    )


def _agreement(measured: list[dict[str, float]], environment: str) -> Estimate | None:
    if not all(environment in agreements for agreements in measured):
        return None
    return _over_seeds([agreements[environment] for agreements in measured])


def curve_of(run: Run) -> Curve:
    """A transfer run's learning curve."""
    return Curve(np.array(run["curve"]["env_steps"]), np.array(run["curve"]["mean_return"]))


def _knows_actions(run: Run) -> bool:
    """Whether the run began with a head that was taken from the student or fitted to a dataset."""
    fresh = any(key.startswith("heads.") for key in run["tensors"]["new"])
    return not fresh or run.get("head_variance_explained") is not None


def _transfer(results: Results, target: str) -> list[TransferRow]:
    modes, seeds = results.transfer[target], results.seeds
    rows = []
    for mode in sorted(modes, key=lambda mode: (mode == "scratch", mode)):
        runs = [modes[mode][seed] for seed in seeds]
        pairs = [
            compare(curve_of(run), curve_of(scratch), scratch["random_return"])
            for run, scratch in zip(runs, modes.get("scratch", {}).values(), strict=False)
        ]
        kept = [retention(run["retention"]) for run in runs if run["retention"]]
        # One scale for all seeds: a mean of ratios and differences would mean nothing.
        ratio = all(pair.score_kind == "ratio" for pair in pairs)
        rows.append(
            TransferRow(
                mode=mode,
                initial=_over_seeds([run["initial_return"] for run in runs]),
                final=_over_seeds([run["final_return"] for run in runs]),
                area=_over_seeds([area_under_curve(curve_of(run)) for run in runs]),
                # A fresh head prefers no action yet: what it plays before training says nothing of what was transferred.
                jumpstart=_over_seeds([pair.jumpstart for pair in pairs])
                if pairs and all(_knows_actions(run) for run in runs)
                else None,
                score=_over_seeds([pair.score if ratio else pair.area - pair.scratch_area for pair in pairs])
                if pairs
                else None,
                score_kind="ratio" if ratio else "difference",
                steps_to_scratch=[pair.steps_to_scratch for pair in pairs],
                retention=_over_seeds(kept) if len(kept) == len(runs) and np.isfinite(kept).all() else None,
            )
        )
    return rows


def retention(environments: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over a source's environments of the score after, where before is 1 and random play 0; what was never above random
    play is left out.

    Args:
        environments: of each the mean returns ``random``, ``before`` and ``after``.
    """
    scores = [
        (found["after"] - found["random"]) / (found["before"] - found["random"])
        for found in environments.values()
        if found["before"] > found["random"]
    ]
    return float(np.mean(scores)) if scores else math.nan


def experience(results: Results, name: str, joint: bool = False) -> float:
    """Env steps behind a student, its teachers' training and what was collected from them included, or behind a joint network;
    mean over the seeds."""
    spent = _spent(results, name, joint)
    return float(np.mean(np.sum([list(steps) for steps in spent.values()], axis=0)))


def _spent(results: Results, name: str, joint: bool = False) -> dict[str, list[float]]:
    """What env steps were taken for, one number for each seed. Students that are averaged may have teachers in common."""
    runs = results.joint[name] if joint else results.students[name]
    block, settings = ("train_multi_task", {}) if joint else results.made_by(name)
    if block == "aggregate":
        members = [_spent(results, member) for member in settings["members"]]
        return {what: steps for spent in members for what, steps in spent.items()}
    spent = {f"{block} {name}": [float(run.get("env_steps", 0)) for run in runs.values()]}
    if block == "distill_student" and settings["method"] in ("offline", "on_policy"):
        for environment in results.sources(name):
            spent |= _of_teacher(results, environment)
            collected = not results.settings["collect_dataset"][environment]["from_replay"]
            if settings["method"] == "offline" and collected:
                of_dataset = results.datasets[environment]
                spent[f"dataset {environment}"] = [float(of_dataset[seed]["transitions"]) for seed in runs]
    return spent


def _of_teacher(results: Results, environment: str) -> dict[str, list[float]]:
    """Of a teacher's training; where it was adopted, what its source had cost too, as far as its stages count env steps."""
    settings = results.settings["train_teacher"][environment]
    spent = {
        f"teacher {environment}": [float(run["env_steps"]) for run in results.teachers[environment].values()]
    }
    source = settings.get("source", "")
    if source in results.students:
        spent |= _spent(results, source)
    elif source in results.teachers:
        spent |= _of_teacher(results, source)
    elif source in results.meta:
        spent[f"meta_train {source}"] = [
            float(run.get("env_steps", 0)) for run in results.meta[source].values()
        ]
    return spent


def metrics(results: Results, summary: Summary) -> dict[str, Any]:
    """The numbers for ``dvc metrics``: plain, finite, seeds by name."""

    def number(value: Estimate | None) -> dict[str, float] | None:
        if value is None or not np.isfinite(value.value):
            return None
        found = {"value": value.value}
        if value.interval is None:
            found |= {f"s{seed}": point for seed, point in zip(results.seeds, value.points, strict=True)}
        else:
            found |= {"low": value.interval[0], "high": value.interval[1]}
        return {key: round(item, 6) for key, item in found.items()}

    def network(student: StudentSummary) -> dict[str, Any]:
        overall = student.overall
        return {
            "geometric_mean": number(overall.geometric_mean),
            "interquartile_mean": number(overall.interquartile_mean),
            "optimality_gap": number(overall.optimality_gap),
            "probability_of_improvement_over_teacher": student.better_than_teacher,
            "worst_environment": overall.worst,
            "worst_score": number(overall.environments[overall.worst] if overall.worst else None),
            "parameters": student.parameters,
            "teacher_parameters": student.teacher_parameters,
            "compression": round(student.compression, 3),
            "environments": {
                row.environment: {
                    "teacher": number(row.teacher),
                    "student": number(row.student),
                    "random": number(row.random),
                    "normalised_score": number(row.score),
                    "normalised_score_epsilon": number(row.epsilon_score),
                    "agreement": number(row.agreement),
                    "capped_share": row.capped_share,
                    "teacher_parameters": row.teacher_parameters,
                }
                for row in student.rows
            },
        }

    transfer = {
        target: {
            row.mode: {
                "jumpstart": number(row.jumpstart),
                "area_under_curve": number(row.area),
                f"transfer_{row.score_kind}": number(row.score),
                "retention": number(row.retention),
                "initial_return": number(row.initial),
                "final_return": number(row.final),
                "env_steps_to_scratch": {
                    f"s{seed}": round(steps, 1) if np.isfinite(steps) else None
                    for seed, steps in zip(results.seeds, row.steps_to_scratch, strict=False)
                },
            }
            for row in rows
        }
        for target, rows in summary.transfer.items()
    }
    networks = {
        kind: {name: network(found) for name, found in of.items()}
        for kind, of in (("students", summary.students), ("joint", summary.joint))
    }
    meta = {
        name: {
            "measure": found.measure,
            "arms": {
                arm: {f"after_{step}": number(value) for step, value in zip(found.steps, values, strict=True)}
                for arm, values in found.arms.items()
            },
        }
        for name, found in summary.meta.items()
    }
    return {**networks, "transfer": transfer, "meta": meta}
