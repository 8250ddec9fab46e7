"""The plan: ``Params -> stages -> dvc.yaml``. Each stage is declared here, once; DVC and Prefect both read this.

``python -m tasks.plan SUITE [--set key=value ...]`` writes ``params/pipeline.yaml`` and ``dvc.yaml`` and drops from ``dvc.lock``
what no longer exists; without SUITE it renders ``dvc.yaml`` from ``params/pipeline.yaml`` as it stands.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from stillhouse.config import near
from stillhouse.envs.families import FAMILIES
from stillhouse.errors import StillhouseError
from stillhouse.files import write_atomic
from tasks.digest_code import FOLDER as CODE
from tasks.digest_code import kind_of
from tasks.production import FOLDER as PRODUCTION
from tasks.stage import DVC_YAML, PIPELINE, RETRAINING, stage_name, transfer_runs, transfer_stem

if TYPE_CHECKING:
    from tasks.params import Params, TransferParams

DVC_LOCK = Path("dvc.lock")
STUDIES = Path("benchmarks/results/policy_distillation")  # of the committed results, one file each
TRANSFER = Path("benchmarks/results/transfer")  # the same of transfer, by suite
MULTI_TASK = Path("benchmarks/results/multi_task")  # the same of multi-task learning
META = Path("benchmarks/results/meta_learning")  # the same of meta-learning
# Other benchmarks whose tables stand on the page of published results.
MEASURED = ("distillation", "on_policy", "peers", "ppo", "pqn", "simulators")
DVC_HEADER = "# generated: edit params/ and run `stillhouse plan`\n"
PIPELINE_HEADER = (
    "# The active parameters, complete: written by `stillhouse plan SUITE` from params/suites/.\n"
)
_HASH_LINE = re.compile(r"# of this content: ([0-9a-f]{16})\n")

# What a student, or a teacher, must have in common with the one that it goes on from: the shape of its network, what its outputs
# mean, and, of a replay, what its rows are sums of.
_STUDENT = ("environments", "method", "size", "parameter_fraction", "loss")
_TEACHER = ("algorithm", "network", "critic", "gamma", "n_step", "reward_scale")

# Env steps (or updates) per second on one core, only to start what takes longest first.
SPEEDS = {"dqn": 2_500.0, "pqn": 20_000.0, "ppo": 15_000.0, "impala": 25_000.0, "unreal": 10_000.0}
COSTS = {"progressive_2": 2.0, "progressive_random": 2.0, "progressive_3": 3.0, "rehearsal": 1.5}
# What a meta-learner's curve is best drawn by, where it is not its loss.
META_CURVES = {
    "hypernetwork": "return",
    "maml_rl": "return_after",
    "reptile_rl": "return_after",
    "rl2": "return",
}

BY_FAMILY = ("maml_rl", "reptile_rl")  # methods that import their family of environments by name

# Ways of transfer that train what they take, head and all, and fit a head where the source's gives no Q-values.
FITTED = ("auto", "discriminative", "full", "gradual", "head_only", "l2_sp", "rehearsal")


@dataclass(frozen=True)
class Stage:
    """One row of ``dvc.yaml``, run by one Prefect task in one process.

    Attributes:
        name: by ``tasks.stage.stage_name``.
        argv: the command, run in the workspace's root.
        deps: every file and folder read, its code digest among them.
        params: keys of ``params/pipeline.yaml``.
        outs: files and folders written; ``metrics`` and ``plots`` (x and y column by file) are outs too.
        in_git: outs that git keeps, not DVC's cache.
        environments: names a user may select the stage by.
        cost: expected seconds.
        always_changed: run at every occasion.
    """

    name: str
    argv: list[str]
    deps: list[str] = field(default_factory=list)
    params: list[str] = field(default_factory=list)
    outs: list[str] = field(default_factory=list)
    in_git: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    plots: dict[str, dict[str, str]] = field(default_factory=dict)
    environments: list[str] = field(default_factory=list)
    cost: float = 1.0
    always_changed: bool = False

    @property
    def verb(self) -> str:
        """The stage's kind of work: its params block, module and out folder are called by it."""
        return self.name.partition("-")[0]

    @property
    def writes(self) -> list[str]:
        """Every out."""
        return [*self.outs, *self.in_git, *self.metrics, *self.plots]

    def row(self) -> dict[str, Any]:
        """The stage as DVC reads it."""
        row: dict[str, Any] = {"cmd": shlex.join(self.argv)}
        if self.deps:
            row["deps"] = sorted(self.deps)
        if self.params:
            row["params"] = [{str(PIPELINE): sorted(self.params)}]
        if self.outs or self.in_git:
            # Persistent: should the stage fail, the page that git has stays.
            kept = [{path: {"cache": False, "persist": True}} for path in sorted(self.in_git)]
            row["outs"] = [*sorted(self.outs), *kept]
        if self.metrics:
            row["metrics"] = sorted(self.metrics)
        if self.plots:
            row["plots"] = [{path: columns} for path, columns in sorted(self.plots.items())]
        if self.always_changed:
            row["always_changed"] = True
        return row


def stages_of(params: Params) -> list[Stage]:
    """Every stage of the pipeline, each after those it reads from."""
    stages: list[Stage] = []
    seeds = sorted(params.seeds)

    def python(verb: str, *arguments: str) -> list[str]:
        return ["python", "-m", f"tasks.{verb}", *arguments]

    def code(verb: str, *imported: str) -> str:
        return str(CODE / f"{kind_of(verb, *imported)}.json")

    def training_seconds(teacher: Any) -> float:
        if teacher.algorithm == "fine_tuned":
            return 1.0
        return teacher.env_steps / SPEEDS[teacher.algorithm]

    def module_files(environment: str) -> list[str]:
        return user_module_files(params.environments[environment].module)

    for name, teacher in sorted(params.train_teacher.items()):
        collect = params.collect_dataset[name]
        for seed in seeds:
            base = f"data/teachers/{name}-s{seed}"
            curve = {f"{base}.csv": {"x": "env_steps", "y": "mean_return"}}
            if teacher.algorithm == "fine_tuned":
                left = f"data/transfer/{transfer_stem(name, teacher.mode, teacher.source, seed)}"
                stages.append(
                    Stage(
                        name=stage_name("adopt_teacher", name, seed=seed),
                        argv=python("adopt_teacher", name, "--seed", str(seed)),
                        deps=[code("adopt_teacher"), left, f"{left}.json", f"{left}.csv"],
                        params=[f"train_teacher.{name}"],
                        outs=[base],
                        metrics=[f"{base}.json"],
                        plots=curve,
                        environments=[name],
                    )
                )
            else:
                stages.append(
                    Stage(
                        name=stage_name("train_teacher", name, seed=seed),
                        argv=python("train_teacher", name, "--seed", str(seed)),
                        deps=[code("train_teacher", teacher.algorithm), *module_files(name)],
                        params=[f"environments.{name}", f"train_teacher.{name}"],
                        outs=[base, f"data/training_state/{name}-s{seed}"],
                        metrics=[f"{base}.json"],
                        plots=curve,
                        environments=[name],
                        cost=training_seconds(teacher),
                    )
                )
            dataset = f"data/datasets/{name}-s{seed}"
            stages.append(
                Stage(
                    name=stage_name("collect_dataset", name, seed=seed),
                    argv=python("collect_dataset", name, "--seed", str(seed)),
                    deps=[
                        code("collect_dataset"),
                        base,
                        *([f"data/training_state/{name}-s{seed}"] if collect.from_replay else []),
                        *module_files(name),
                    ],
                    params=[f"environments.{name}", f"collect_dataset.{name}"],
                    outs=[dataset],
                    metrics=[f"{dataset}.json"],
                    environments=[name],
                    cost=collect.transitions / 10_000,
                )
            )
    for name, student in sorted(params.distill_student.items()):
        sources = sorted(student.environments)
        from_datasets = student.method == "on_policy" and student.from_datasets
        read = ["datasets"] if student.method == "offline" or from_datasets else []
        read += ["teachers"] if student.method == "on_policy" or student.feature_weight else []
        blocks, algorithms = ["environments"], []
        if student.method == "online":  # it trains its teachers itself
            blocks.append("train_teacher")
            algorithms = sorted({params.train_teacher[source].algorithm for source in sources})
        x = "env_steps" if student.method == "online" else "updates"
        for seed in seeds:
            base = f"data/students/{name}-s{seed}"
            stages.append(
                Stage(
                    name=stage_name("distill_student", name, seed=seed),
                    argv=python("distill_student", name, "--seed", str(seed)),
                    deps=[code("distill_student", student.method, *algorithms)]
                    + [f"data/{folder}/{source}-s{seed}" for source in sources for folder in read]
                    + [path for source in sources for path in module_files(source)],
                    params=[
                        f"distill_student.{name}",
                        *(f"{block}.{source}" for source in sources for block in blocks),
                    ],
                    outs=[base],
                    metrics=[f"{base}.json"],
                    plots={f"{base}.csv": {"x": x, "y": "agreement"}},
                    environments=sources,
                    cost=student.updates / 200
                    + sum(training_seconds(params.train_teacher[source]) for source in sources if algorithms),
                )
            )
    for name, joint in sorted(params.train_multi_task.items()):
        for seed in seeds:
            base = f"data/multi_task/{name}-s{seed}"
            sources = sorted(joint.environments)
            stages.append(
                Stage(
                    name=stage_name("train_multi_task", name, seed=seed),
                    argv=python("train_multi_task", name, "--seed", str(seed)),
                    deps=[
                        code("train_multi_task", joint.method, joint.learner.algorithm),
                        *(path for source in sources for path in module_files(source)),
                    ],
                    params=[f"train_multi_task.{name}", *(f"environments.{source}" for source in sources)],
                    outs=[base, *([f"data/students/{name}-s{seed}"] if joint.method == "distral" else [])],
                    metrics=[f"{base}.json"],
                    plots={f"{base}.csv": {"x": "env_steps", "y": f"return_{sources[0]}"}},
                    environments=sources,
                    cost=len(sources) * training_seconds(joint.learner),
                )
            )
    for name, learnt in sorted(params.meta_train.items()):
        for seed in seeds:
            base, adapted = f"data/meta/{name}-s{seed}", f"data/adaptation/{name}-s{seed}"
            imported = [learnt.method, *_family_module(learnt)]
            stages.append(
                Stage(
                    name=stage_name("meta_train", name, seed=seed),
                    argv=python("meta_train", name, "--seed", str(seed)),
                    deps=[code("meta_train", *imported)],
                    params=[f"meta_train.{name}"],
                    outs=[base, *([f"data/students/{name}-s{seed}"] if name in params.students else [])],
                    metrics=[f"{base}.json"],
                    plots={f"{base}.csv": {"x": "meta_updates", "y": META_CURVES.get(learnt.method, "loss")}},
                    environments=[name],
                    cost=300.0,
                )
            )
            stages.append(
                Stage(
                    name=stage_name("meta_evaluate", name, seed=seed),
                    argv=python("meta_evaluate", name, "--seed", str(seed)),
                    deps=[code("meta_evaluate", *imported), base],
                    params=[f"meta_train.{name}", "meta_evaluate"],
                    metrics=[f"{adapted}.json"],
                    plots={f"{adapted}.csv": {"x": "steps", "y": learnt.method}},
                    environments=[name],
                    cost=20.0,
                )
            )
    for name, block in sorted(params.aggregate.items()):
        sources = sorted(params.students[name].environments)
        for seed in seeds:
            base = f"data/students/{name}-s{seed}"
            stages.append(
                Stage(
                    name=stage_name("aggregate", name, seed=seed),
                    argv=python("aggregate", name, "--seed", str(seed)),
                    deps=[
                        code("aggregate"),
                        *(f"data/students/{member}-s{seed}" for member in block.members),
                        *(path for source in sources for path in module_files(source)),
                    ],
                    params=[f"aggregate.{name}", *(f"environments.{source}" for source in sources)],
                    outs=[base],
                    metrics=[f"{base}.json"],
                    environments=sources,
                    cost=5.0 * len(block.members) * len(sources) if block.method == "greedy_soup" else 5.0,
                )
            )
    for name, transfer in sorted(params.fine_tune.items()):
        for mode, one in transfer_runs(transfer.modes, transfer.sources):
            entries = {entry.partition(".")[0]: entry for entry in transfer.sources}
            if mode == "progressive_3":
                read = transfer.sources[:2]
            elif mode == "auto":
                read = transfer.sources
            else:
                read = [entries.get(one, transfer.sources[0])]
            # Environments where what is left of a source is measured, or whose components are the target's.
            known = {
                environment
                for entry in read
                for environment in (
                    _environments(params, entry) if mode in FITTED else [_of_head(params, entry)]
                )
                if environment and mode != "scratch"
            }
            for seed in seeds:
                base = f"data/transfer/{transfer_stem(name, mode, one, seed)}"
                stages.append(
                    Stage(
                        name=stage_name("fine_tune", name, mode, one, seed),
                        argv=python(
                            "fine_tune", name, "--mode", mode, "--seed", str(seed), "--sources", *read
                        ),
                        deps=[
                            code("fine_tune", transfer.learner.algorithm),
                            *(
                                f"data/{_kind(params, entry)}/{entry.partition('.')[0]}-s{seed}"
                                for entry in read
                            ),
                            *(
                                f"data/datasets/{environment}-s{seed}"
                                for environment in _datasets(params, transfer, mode, read)
                            ),
                            *sorted({path for each in {name, *known} for path in module_files(each)}),
                        ],
                        params=[
                            *(f"fine_tune.{name}.{field}" for field in _transfer_fields(transfer, mode)),
                            *(f"environments.{each}" for each in sorted({name, *known})),
                        ],
                        outs=[base],
                        metrics=[f"{base}.json"],
                        plots={f"{base}.csv": {"x": "env_steps", "y": "mean_return"}},
                        environments=[name],
                        cost=training_seconds(transfer.learner) * COSTS.get(mode, 1.0),
                    )
                )
    for name in sorted(params.train_teacher):
        networks = [
            f"data/students/{student}"
            for student, block in sorted(params.students.items())
            if name in block.environments
        ]
        networks += [
            f"data/multi_task/{network}"
            for network, joint in sorted(params.train_multi_task.items())
            if name in joint.environments
        ]
        for seed in seeds:
            stages.append(
                Stage(
                    name=stage_name("evaluate", name, seed=seed),
                    argv=python("evaluate", name, "--seed", str(seed)),
                    deps=[
                        code("evaluate"),
                        f"data/teachers/{name}-s{seed}",
                        *(f"{network}-s{seed}" for network in networks),
                        *module_files(name),
                    ],
                    params=[f"environments.{name}", "evaluate"],
                    metrics=[f"data/evaluation/{name}-s{seed}.json"],
                    environments=[name],
                    cost=5.0 * (2 + len(networks)),
                )
            )
    results = [path for stage in stages for path in [*stage.metrics, *stage.plots]]
    stages.append(
        Stage(
            name="report",
            argv=python("report"),
            deps=[code("report"), *results],
            params=[
                "suite",
                "seeds",
                "environments",
                "train_teacher",
                "collect_dataset",
                "distill_student",
                "train_multi_task",
                "aggregate",
                "fine_tune",
                "meta_train",
                "report",
            ],
            outs=["data/evaluation/report.html", "data/evaluation/learning_curves.png"],
            metrics=["data/evaluation/results.json"],
            plots={"data/evaluation/comparison.csv": {"x": "environment", "y": "normalised_score"}},
            cost=5.0,
        )
    )
    if params.publish_results:
        studies = sorted(map(str, STUDIES.glob("*.json")))
        measured = [str(path) for name in MEASURED if (path := STUDIES.parent / f"{name}.md").is_file()]
        curves = ["docs/results/online-distillation.svg"] if str(STUDIES / "online.json") in studies else []
        moved = sorted(map(str, TRANSFER.glob("*.json")))
        shared = sorted(map(str, MULTI_TASK.glob("*.json")))
        pages = ["docs/results/transfer.md"] if moved else []
        pages += ["docs/results/multi-task.md"] if shared else []
        meta = sorted(map(str, META.glob("*.json")))
        pages += ["docs/results/meta-learning.md"] if meta else []
        stages.append(
            Stage(
                name="publish_results",
                argv=python("publish_results"),
                deps=[code("publish_results"), *studies, *moved, *shared, *meta, *measured],
                in_git=["docs/results/policy-distillation.md", *curves, *pages],
                cost=3.0,
            )
        )
    if params.retraining.generation:
        stages = _retraining(params, stages)
    digests = sorted({dep for stage in stages for dep in stage.deps if dep.startswith(f"{CODE}/")})
    digest_code = Stage(
        name="digest_code",
        argv=python("digest_code", "--device", params.device, *(Path(path).stem for path in digests)),
        outs=digests,
        always_changed=True,
    )
    _check_unique(stages)
    return [digest_code, *_in_order(stages)]


def _in_order(stages: list[Stage]) -> list[Stage]:
    """The stages, each after those it reads from, otherwise as they stand.

    Raises:
        StillhouseError: some of them wait for each other.
    """
    makers = {path: stage.name for stage in stages for path in stage.writes}
    waiting = {stage.name: {makers[dep] for dep in stage.deps if dep in makers} for stage in stages}
    try:
        TopologicalSorter(waiting).prepare()
    except CycleError as error:
        raise StillhouseError(
            f"these stages wait for each other: {', then '.join(error.args[1])}; take another source or teacher"
        ) from None
    ordered: dict[str, Stage] = {}
    while len(ordered) < len(stages):  # the sorter's own order would mix what stands together
        for stage in stages:
            if waiting[stage.name] <= ordered.keys():
                ordered.setdefault(stage.name, stage)
    return list(ordered.values())


# What each way reads of its target's block, beside what all read.
_FIELDS = {
    "gradual": ("frozen_fraction",),
    "discriminative": ("layer_decay",),
    "l2_sp": ("l2_sp",),
    "rehearsal": ("rehearsal_share", "rehearsal_weight"),
    "auto": ("probe_fraction",),
    "features": ("sensitivity_episodes",),
    "progressive_2": ("adapter_scale", "sensitivity_episodes"),
    "progressive_3": ("adapter_scale", "sensitivity_episodes"),
    "progressive_random": ("adapter_scale", "sensitivity_episodes"),
}


def _transfer_fields(transfer: TransferParams, mode: str) -> list[str]:
    """The settings that a way reads: another's, or another way beside it, do not run it again."""
    fields = ["evaluations", "evaluation_episodes", "learner", *_FIELDS.get(mode, ())]
    if mode != "scratch":
        fields += ["components", "actions"]
    if mode in FITTED:
        fields += ["take", "freeze"]
        fields += ["critic_warmup"] if transfer.learner.algorithm == "ppo" else ["epsilon_start"]
    if transfer.learner.algorithm == "ppo" and mode in ("kickstart", *FITTED):
        fields += ["guide_weight", "guide_fraction"]
    return sorted(fields)


def _family_module(learnt: Any) -> list[str]:
    """The module that a method of meta-learning imports by name."""
    return [FAMILIES[learnt.family.name][0]] if learnt.method in BY_FAMILY else []


def _kind(params: Params, entry: str) -> str:
    return "students" if entry.partition(".")[0] in params.students else "teachers"


def _environments(params: Params, entry: str) -> list[str]:
    """What a source of transfer has learnt."""
    name = entry.partition(".")[0]
    return sorted(params.students[name].environments) if _kind(params, entry) == "students" else [name]


def _of_head(params: Params, entry: str) -> str:
    """The environment whose head and adapter a source gives; "" where it gives its torso alone."""
    name, _, environment = entry.partition(".")
    return environment if _kind(params, entry) == "students" else name


def _datasets(params: Params, transfer: TransferParams, mode: str, read: list[str]) -> list[str]:
    """Environments whose datasets a transfer reads: for a Q head, a guide's temperature, or rehearsal."""
    wanted: set[str] = set()
    value_based = transfer.learner.algorithm != "ppo"
    for entry in read:
        student = params.students.get(entry.partition(".")[0])
        head = _of_head(params, entry)
        logits = (
            getattr(student, "loss", "kl") != "mse"  # a distilled policy's are
            if student
            else params.algorithm_of(head) in ("impala", "ppo", "unreal")
        )
        if mode == "rehearsal":
            wanted |= set(_environments(params, entry))
        if head and mode in FITTED and value_based and logits:
            wanted.add(head)
        if head and mode == "kickstart" and not logits:
            wanted.add(head)
    return sorted(wanted)


def _retraining(params: Params, stages: list[Stage]) -> list[Stage]:
    """The stages that train on what is in production, of those that made it, and the one that compares.

    Raises:
        StillhouseError: the student is not of this suite, or does not learn from datasets.
    """
    name, seed = params.retraining.student, params.seeds[0]
    student = params.distill_student.get(name)
    if student is None:
        raise StillhouseError(
            f"retraining.student: {name!r} is not among the students of suite {params.suite}"
            f"{near(name, list(params.distill_student))}; there are {', '.join(params.distill_student) or 'none'}"
        )
    if student.method != "offline":
        raise StillhouseError(
            f"retraining.student: {name!r} learns by method {student.method}; a student that is trained on learns offline"
        )
    if adopted := [
        each for each in student.environments if params.train_teacher[each].algorithm == "fine_tuned"
    ]:
        raise StillhouseError(
            f"retraining.student: the teacher of {adopted[0]} is adopted from fine_tune and is not trained on; a student of teachers of their own "
            "can be retrained"
        )
    production = str(PRODUCTION)
    wanted = {stage_name("distill_student", name, seed=seed): [production]}
    for environment in student.environments:
        wanted[stage_name("train_teacher", environment, seed=seed)] = [production]
        wanted[stage_name("collect_dataset", environment, seed=seed)] = []
    chosen = [
        replace(stage, deps=[*stage.deps, *wanted[stage.name]], params=[*stage.params, RETRAINING])
        for stage in stages
        if stage.name in wanted
    ]
    environments = sorted(student.environments)
    modules = [path for each in environments for path in user_module_files(params.environments[each].module)]
    compare = Stage(
        name=stage_name("compare_production", name, seed=seed),
        argv=["python", "-m", "tasks.compare_production", name, "--seed", str(seed)],
        deps=[
            str(CODE / f"{kind_of('compare_production')}.json"),
            f"data/students/{name}-s{seed}",
            production,
            *modules,
        ],
        params=[RETRAINING, *(f"environments.{environment}" for environment in environments)],
        metrics=["data/evaluation/promotion.json"],
        environments=environments,
        cost=20.0,
    )
    return [*chosen, compare]


def _check_continues(params: Params, made: Params) -> None:
    """Raises StillhouseError where a teacher or the student could not go on from what ``made`` has made."""
    name = params.retraining.student
    needed: dict[str, tuple[str, ...]] = {f"distill_student.{name}": _STUDENT}
    student = made.distill_student.get(name)
    needed |= {f"train_teacher.{each}": _TEACHER for each in (student.environments if student else [])}
    sides = [each.model_dump(mode="json") for each in (params, made)]
    for block, names in needed.items():
        verb, _, key = block.partition(".")
        given, before = (side[verb].get(key) for side in sides)
        if given is None or before is None:
            continue  # who is not there is refused when the stages are chosen
        for each in names:
            if given.get(each) != before.get(each):  # not every algorithm has every one of them
                raise StillhouseError(
                    f"{block}.{each}: {given.get(each)} was given, but what is in production was made with {before.get(each)}, and to "
                    "go on from it needs the same; leave it as it was, or start afresh: `stillhouse run`, then `stillhouse promote`"
                )


def user_module_files(module: str) -> list[str]:
    """The files of the user's own environment module, where it lies in the workspace; an installed one has none."""
    if not module:
        return []
    base = Path(*module.split("."))
    candidates = [base.with_suffix(".py"), base / "__init__.py"]
    parents = [parent / "__init__.py" for parent in base.parents if parent != Path()]
    if not any(path.is_file() for path in candidates):
        return []
    if candidates[1].is_file():  # a package: any file of it may matter
        candidates = sorted(base.rglob("*.py"))
    return sorted({str(path) for path in [*candidates, *parents] if path.is_file()})


def _check_unique(stages: list[Stage]) -> None:
    """Two stages of one name, or one out of two stages, would each hide the other."""
    for what, names in (
        ("stage name", [stage.name for stage in stages]),
        ("out", [path for stage in stages for path in stage.writes]),
    ):
        if double := {name for name in names if names.count(name) > 1}:
            raise StillhouseError(
                f"two stages have the same {what} {min(double)!r}; rename an environment or a student"
            )


def top_level_plots(stages: Iterable[Stage]) -> list[dict[str, Any]]:
    """Curves of many stages in one picture, for ``dvc plots show``."""
    titles = {
        ("train_teacher", "env_steps"): "Teachers",
        ("adopt_teacher", "env_steps"): "Adopted teachers",
        ("distill_student", "updates"): "Students",
        ("distill_student", "env_steps"): "Online students",
        ("train_multi_task", "env_steps"): "Joint networks",
        ("fine_tune", "env_steps"): "Transfer",
        ("meta_train", "meta_updates"): "Meta-training",
        ("meta_evaluate", "steps"): "Adaptation",
        ("report", "environment"): "Evaluation",
    }
    plots = []
    pictures: dict[tuple[str, str], dict[str, str]] = {}
    for stage in stages:
        for path, columns in stage.plots.items():
            pictures.setdefault((stage.verb, columns["x"]), {})[path] = columns["y"]
    for (verb, x), title in titles.items():
        if curves := pictures.get((verb, x)):
            definition: dict[str, Any] = {"x": x, "y": {path: curves[path] for path in sorted(curves)}}
            if verb == "report":
                definition["template"] = "bar_horizontal"
                definition["x"] = next(iter(curves.values()))
                definition["y"] = dict.fromkeys(sorted(curves), x)
            plots.append({title: definition})
    return plots


def render(stages: list[Stage]) -> str:
    """The text of ``dvc.yaml``: the same bytes for the same stages."""
    content: dict[str, Any] = {"stages": {stage.name: stage.row() for stage in stages}}
    if plots := top_level_plots(stages):
        content["plots"] = plots
    return sealed(DVC_HEADER, to_yaml(content))


def to_yaml(content: Any) -> str:
    """Plain data as YAML, keys in their given order."""
    writer = YAML()
    writer.default_flow_style = False
    writer.width = 4096
    writer.representer.ignore_aliases = lambda *_: True
    text = io.StringIO()
    writer.dump(content, text)
    return text.getvalue()


def sealed(header: str, body: str) -> str:
    """``body`` under ``header`` and a line with its hash, by which a later edit is noticed."""
    return f"{header}# of this content: {hashlib.sha256(body.encode()).hexdigest()[:16]}\n{body}"


def edited_by_hand(path: Path) -> bool:
    """Whether the file is there and its content is not what its seal says."""
    if not path.exists():
        return False
    text = path.read_text()
    seal = _HASH_LINE.search(text)
    return seal is None or hashlib.sha256(text[seal.end() :].encode()).hexdigest()[:16] != seal[1]


def refuse_hand_edit() -> None:
    """Raises StillhouseError where ``dvc.yaml`` was edited by hand."""
    if edited_by_hand(DVC_YAML):
        raise StillhouseError(
            f"{DVC_YAML} was edited by hand, but it is generated: make the change under params/, then run "
            "`stillhouse plan --overwrite` to write it anew"
        )


def pruned_lock(text: str, names: set[str]) -> str:
    """``dvc.lock`` without the entries of stages that are not in ``names``; all else byte for byte as it was."""
    kept, keep, inside = [], True, False
    for line in text.splitlines(keepends=True):
        if not line.startswith(" "):
            inside, keep = line.rstrip() == "stages:", True
        elif inside and (entry := re.fullmatch(r"  ([^\s:]+):\s*", line)):
            keep = entry[1] in names
        if keep:
            kept.append(line)
    return "".join(kept)


def make_plan(
    suite: str,
    overrides: list[str],
    *,
    overwrite: bool = False,
    in_place_run: bool = False,
    production: bool = False,
) -> list[Stage]:
    """Plan: check the parameters, write ``params/pipeline.yaml`` and ``dvc.yaml``, prune ``dvc.lock``.

    Args:
        suite: name under ``params/suites/``; empty: ``params/pipeline.yaml`` as it stands.
        overrides: ``key=value`` each.
        overwrite: write ``dvc.yaml`` anew even where it was edited by hand.
        in_place_run: refuse to replace parameters that were edited by hand.
        production: instead of a suite, take the parameters that made what is in production, to train on.

    Raises:
        StillhouseError: one line: what is wrong with the parameters, or which file was edited by hand.
    """
    from tasks.params import check_environments, load_pipeline, load_production, load_suite

    if production:
        params, made = load_production(overrides)
        _check_continues(params, made)
    else:
        params = load_suite(suite, overrides) if suite else load_pipeline()
    check_environments(params)
    stages = stages_of(params)
    if not overwrite:
        refuse_hand_edit()
    if suite or production:
        if in_place_run and edited_by_hand(PIPELINE):
            raise StillhouseError(
                f"{PIPELINE} was edited by hand: keep the edit as params/suites/NAME.yaml and run that, or undo it with "
                f"`stillhouse plan {suite}`"
            )
        _write_if_changed(PIPELINE, sealed(PIPELINE_HEADER, to_yaml(params.model_dump(mode="json"))))
    _write_if_changed(DVC_YAML, render(stages))
    if DVC_LOCK.exists():
        _write_if_changed(DVC_LOCK, pruned_lock(DVC_LOCK.read_text(), {stage.name for stage in stages}))
    return stages


def check_plan() -> None:
    """Raises StillhouseError where ``dvc.yaml`` is not what ``params/pipeline.yaml`` makes of it."""
    from tasks.params import load_pipeline

    refuse_hand_edit()
    if not DVC_YAML.exists() or DVC_YAML.read_text() != render(stages_of(load_pipeline())):
        raise StillhouseError(f"{DVC_YAML} is stale: run `stillhouse plan`")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        write_atomic(path, text)


def read_plan(text: str) -> list[Stage]:
    """Stages from the JSON that ``--json`` prints."""
    return [Stage(**row) for row in json.loads(text)]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tasks.plan", allow_abbrev=False)
    parser.add_argument(
        "suite", nargs="?", default="", help="name under params/suites/; without it, the active parameters"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where dvc.yaml is stale or edited"
    )
    parser.add_argument("--dry-run", action="store_true", help="check the parameters and write nothing")
    parser.add_argument(
        "--overwrite", action="store_true", help="write dvc.yaml anew though it was edited by hand"
    )
    parser.add_argument("--in-place-run", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--production", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print the stages as JSON")
    arguments = parser.parse_args(argv)
    try:
        if arguments.overrides and not (arguments.suite or arguments.production):
            raise StillhouseError(
                "--set: name the suite it applies to, for example `stillhouse plan quickstart --set ...`"
            )
        if arguments.check:
            check_plan()
            return
        if arguments.dry_run:
            from tasks.params import check_environments, load_suite

            params = load_suite(arguments.suite, arguments.overrides)
            check_environments(params)
            stages = stages_of(params)
        else:
            stages = make_plan(
                arguments.suite,
                arguments.overrides,
                overwrite=arguments.overwrite,
                in_place_run=arguments.in_place_run,
                production=arguments.production,
            )
        if arguments.json:
            print(json.dumps([asdict(stage) for stage in stages]))
        else:
            print(f"{len(stages)} stages in {DVC_YAML}")
    except StillhouseError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
