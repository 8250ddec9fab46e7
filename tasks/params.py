"""The pipeline's parameters: ``params/suites/<suite>.yaml`` and overrides, checked and with every default filled in.

Only the planner and the flows import this module; a stage reads its own block with its own config class.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stillhouse.agents import OUTPUTS
from stillhouse.agents.dqn import DQNConfig
from stillhouse.agents.impala import IMPALAConfig
from stillhouse.agents.ppo import PPOConfig
from stillhouse.agents.pqn import PQNConfig
from stillhouse.agents.unreal import UNREALConfig
from stillhouse.config import Config, near, parse
from stillhouse.datasets.collect import CollectConfig
from stillhouse.distillation.offline import DistillationConfig
from stillhouse.distillation.on_policy import OnPolicyConfig
from stillhouse.distillation.online import OnlineConfig
from stillhouse.envs.families import FAMILIES, PLAYED, FamilyConfig, make_family
from stillhouse.envs.make import EnvironmentConfig, describe
from stillhouse.envs.names import action_names, component_names
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import EvaluationConfig
from stillhouse.meta.aggregation import AggregationConfig
from stillhouse.meta.hypernetwork import HypernetworkConfig
from stillhouse.meta.learned_update import MetaSGDConfig
from stillhouse.meta.lstm_optimiser import LSTMOptimiserConfig
from stillhouse.meta.maml import MAMLConfig
from stillhouse.meta.maml_rl import MamlRlConfig
from stillhouse.meta.reptile import ReptileConfig
from stillhouse.meta.reptile_rl import ReptileRlConfig
from stillhouse.meta.rl2 import RL2Config
from stillhouse.multi_task.balancing import check_balancing
from stillhouse.multi_task.distral import DistralConfig, check_shareable, learner_settings
from stillhouse.multi_task.hard_sharing import HardSharingConfig
from stillhouse.multi_task.soft_sharing import SoftSharingConfig
from stillhouse.networks.multi_task import NetworkSize
from stillhouse.transfer.fine_tuning import FineTuneConfig, Mode
from stillhouse.transfer.initialisation import Labels, correspond
from stillhouse.types import EnvironmentSpec, environment_spec
from tasks.production import ABOUT, FOLDER, read_production
from tasks.stage import PIPELINE, read_yaml, transfer_runs

SUITES = Path("params/suites")
MODULES = Path("params/modules.txt")  # installed modules that environments may name, one a line
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def _slug(name: str) -> str:
    """Names become parts of stage names, files and keys: one rule, under which two names never meet."""
    if not NAME.fullmatch(name) or len(name) > 64:
        raise ValueError(
            "a name of lower-case letters, digits and single dashes between them, at most 64, is allowed"
        )
    return name


def _source(entry: str) -> str:
    name, dot, environment = entry.partition(".")
    _slug(name)
    if dot:
        _slug(environment)
    return entry


def _without_network(learner: Any) -> Any:
    if isinstance(learner, dict) and "network" in learner:
        raise ValueError("a learner without 'network' is allowed: the network is not its own")
    return learner


Name = Annotated[str, AfterValidator(_slug)]
Names = Annotated[list[Name], Field(min_length=1, max_length=1000)]


class AdoptedTeacher(Config):
    """A teacher that was not trained from nothing: what ``fine_tune`` left in its environment, by one way and source."""

    algorithm: Literal["fine_tuned"]
    mode: Literal[
        "auto",
        "discriminative",
        "full",
        "gradual",
        "head_only",
        "kickstart",
        "l2_sp",
        "rehearsal",
        "scratch",
    ] = Field(default="full", description="one of fine_tune's modes there")
    source: Name | Literal[""] = Field(
        default="", description="one of its sources, without an environment; none for auto and scratch"
    )


_TrainedTeacher = DQNConfig | PQNConfig | PPOConfig | IMPALAConfig | UNREALConfig
TeacherConfig = Annotated[_TrainedTeacher | AdoptedTeacher, Field(discriminator="algorithm")]
# An algorithm for a network that is given.
_NOT_ITS_OWN = BeforeValidator(_without_network)
_NOT_SHOWN = PlainSerializer(lambda learner: learner.model_dump(mode="json", exclude={"network"}))
LearnerConfig = Annotated[
    Annotated[_TrainedTeacher, Field(discriminator="algorithm")], _NOT_ITS_OWN, _NOT_SHOWN
]
TransferLearnerConfig = Annotated[
    Annotated[DQNConfig | PQNConfig | PPOConfig, Field(discriminator="algorithm")], _NOT_ITS_OWN, _NOT_SHOWN
]


class CollectParams(CollectConfig):
    """A dataset: of the teacher's play, or of what it saw while it learnt."""

    from_replay: bool = Field(
        default=False,
        description="dqn: keep the newest transitions of its replay, labelled by the final teacher",
    )


class OfflineParams(DistillationConfig):
    """A student of datasets: which environments' teachers made them, and how it learns."""

    environments: Names


class OnPolicyParams(OnPolicyConfig):
    """A student that acts: whose teachers label what it meets, and how it learns."""

    environments: Names
    from_datasets: bool = Field(
        default=False,
        description="start with the teachers' datasets in the buffers, instead of with play of theirs",
    )


class OnlineParams(OnlineConfig):
    """A student that follows teachers: in which environments they learn, by their blocks of ``train_teacher``, and how it does."""

    environments: Names


STUDENTS: dict[str, type[Config]] = {
    "offline": OfflineParams,
    "on_policy": OnPolicyParams,
    "online": OnlineParams,
}
StudentParams = Annotated[OfflineParams | OnPolicyParams | OnlineParams, Field(discriminator="method")]


class HardSharingParams(HardSharingConfig):
    """A network that learns several environments at once, without teachers."""

    environments: Names
    learner: LearnerConfig


class SoftSharingParams(SoftSharingConfig):
    """Networks that learn an environment each, tied to each other."""

    environments: Names
    learner: LearnerConfig


def _distrals_own(learner: Any) -> Any:
    try:
        return learner_settings(learner) if isinstance(learner, dict) else learner
    except StillhouseError as error:
        raise ValueError(str(error).removeprefix("learner.")) from None


class DistralParams(DistralConfig):
    """A policy for each environment, drawn to a distilled one, which is a student of the same name."""

    environments: Names
    learner: Annotated[IMPALAConfig, BeforeValidator(_distrals_own), _NOT_ITS_OWN, _NOT_SHOWN]

    @model_validator(mode="after")
    def _no_lag_beside_a_second_column(self) -> DistralParams:
        if self.columns == 2 and self.learner.policy_lag:
            raise ValueError(
                f"learner.policy_lag: {self.learner.policy_lag} was given, but the distilled policy, a part of what acts, has no lag; with two "
                "columns 0 is allowed"
            )
        return self


MULTI_TASK: dict[str, type[Config]] = {
    "distral": DistralParams,
    "hard_sharing": HardSharingParams,
    "soft_sharing": SoftSharingParams,
}
MultiTaskParams = Annotated[
    HardSharingParams | SoftSharingParams | DistralParams, Field(discriminator="method")
]


MetaParams = Annotated[
    MAMLConfig
    | MamlRlConfig
    | ReptileConfig
    | ReptileRlConfig
    | MetaSGDConfig
    | LSTMOptimiserConfig
    | RL2Config
    | HypernetworkConfig,
    Field(discriminator="method"),
]
META_METHODS: dict[str, type[Config]] = {
    "maml": MAMLConfig,
    "maml_rl": MamlRlConfig,
    "reptile": ReptileConfig,
    "reptile_rl": ReptileRlConfig,
    "learned_update": MetaSGDConfig,
    "lstm_optimiser": LSTMOptimiserConfig,
    "rl2": RL2Config,
    "hypernetwork": HypernetworkConfig,
}
META_BUDGETS = ("meta_updates", "updates", "trajectories")  # what a method's budget is called


class AggregateParams(AggregationConfig):
    """One student from several: whose weights are averaged, and how."""

    members: list[Name] = Field(
        min_length=2,
        max_length=100,
        description="students of the same environments and of one structure, by their names",
    )


class Derived(Config):
    """What is a student without a block of ``distill_student``: a meta-learnt initial policy, whose head is named after the family
    that it was learnt on, or an aggregate of students."""

    environments: Names
    loss: str = "kl"


def initialises(learnt: Any) -> str:
    """The environment that a meta-learner's initial policy can play and start from; "" where it is no policy of such a network."""
    by_family = learnt.method in ("maml_rl", "reptile_rl")
    return learnt.family.name if by_family and FAMILIES[learnt.family.name][0] == "physics" else ""


class MetaEvaluationParams(Config):
    """How meta-learners are judged."""

    tasks: int = Field(default=100, ge=2, le=1_000_000, description="tasks for testing, for each seed")
    steps: int = Field(
        default=10, ge=1, le=100_000, description="of adaptation: updates, or episodes of a trial"
    )


SourceName = Annotated[str, AfterValidator(_source)]

# Ways in which a source is shown the target's observations.
SHOWN = ("features", "kickstart", "progressive_2", "progressive_3", "progressive_random")


class TransferParams(FineTuneConfig):
    """A target environment: what is moved there, in which ways, and how it and a fresh network learn there."""

    sources: list[SourceName] = Field(
        min_length=1,
        max_length=100,
        description="teachers, by their environments, and students, by their names; student.environment: its head and adapter are taken "
        "too. A network from scratch has the size of the first",
    )
    modes: list[Mode] = Field(
        default=["full", "scratch"],
        min_length=1,
        description="ways of transfer; scratch is what they are judged against",
    )
    learner: TransferLearnerConfig


class RetrainingParams(Config):
    """How a student in production is trained on, and when it is replaced; used by the flow `retraining` alone."""

    generation: int = Field(
        default=0, ge=0, description="of this attempt, part of every seed; 0: no retraining"
    )
    student: Name | Literal[""] = Field(default="", description="the student in production")
    env_steps: int = Field(default=20_000, ge=1, le=10**10, description="more of each teacher's training")
    updates: int = Field(default=1000, ge=1, le=10**9, description="more of the student's training")
    learning_rate_factor: float = Field(
        default=0.5, gt=0, le=10, description="the teachers' learning rate begins at so much of its own"
    )
    episodes: int = Field(default=200, ge=2, le=100_000, description="in each of the two comparisons")
    probability: float = Field(default=0.95, ge=0, le=1, description="of being better, needed for promotion")
    floor: float = Field(
        default=0.95, ge=0, description="no environment's score relative to production's may be lower"
    )


class ReportParams(Config):
    """What the report says about itself."""

    title: str = Field(default="stillhouse: distillation report", max_length=200)


class Params(Config):
    """Everything the pipeline can be told."""

    suite: Name
    seeds: list[Annotated[int, Field(ge=0, le=1_000_000)]] = Field(min_length=1, max_length=100)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    environments: dict[Name, EnvironmentConfig] = Field(default_factory=dict)
    train_teacher: dict[Name, TeacherConfig] = Field(default_factory=dict)
    collect_dataset: dict[Name, CollectParams] = Field(default_factory=dict)
    distill_student: dict[Name, StudentParams] = Field(default_factory=dict)
    train_multi_task: dict[Name, MultiTaskParams] = Field(default_factory=dict)
    aggregate: dict[Name, AggregateParams] = Field(default_factory=dict)
    fine_tune: dict[Name, TransferParams] = Field(default_factory=dict)
    meta_train: dict[Name, MetaParams] = Field(default_factory=dict)
    meta_evaluate: MetaEvaluationParams = MetaEvaluationParams()
    evaluate: EvaluationConfig = EvaluationConfig()
    report: ReportParams = ReportParams()
    retraining: RetrainingParams = RetrainingParams()
    publish_results: bool = Field(
        default=False, description="draw docs/results/ from the committed studies too"
    )

    @property
    def students(self) -> dict[str, Any]:
        """Blocks of what lies under ``data/students/``: distilled from teachers, or by Distral from its own task policies, or
        meta-learnt: an initial policy; or averaged from other students."""
        found = self._single_students
        averaged = {
            name: Derived(
                environments=list(found[block.members[0]].environments),
                loss=getattr(found[block.members[0]], "loss", "kl"),
            )
            for name, block in self.aggregate.items()
        }
        return {**found, **averaged}

    def algorithm_of(self, environment: str) -> str:
        """What trained the teacher there; where it was adopted, what trained it when it was moved."""
        teacher = self.train_teacher[environment]
        return (
            teacher.algorithm
            if teacher.algorithm != "fine_tuned"
            else self.fine_tune[environment].learner.algorithm
        )

    @property
    def _single_students(self) -> dict[str, Any]:
        """All but the averaged."""
        distral = {name: joint for name, joint in self.train_multi_task.items() if joint.method == "distral"}
        initial = {
            name: Derived(environments=[environment])
            for name, learnt in self.meta_train.items()
            if (environment := initialises(learnt))
        }
        return {**self.distill_student, **distral, **initial}

    @model_validator(mode="after")
    def _names_exist(self) -> Params:
        def check(name: str, known: list[str], where: str, what: str) -> None:
            if name not in known:
                raise ValueError(
                    f"{where} names {name!r}, which is no {what}{near(name, known)}; there are {', '.join(known) or 'none'}"
                )

        environments, teachers = list(self.environments), list(self.train_teacher)
        if not teachers and not self.meta_train:
            raise ValueError("at least one teacher (train_teacher) or meta-learner (meta_train) is needed")
        for name in self.train_teacher:
            check(name, environments, "train_teacher", "environment")
        for name in self.collect_dataset:
            check(name, teachers, "collect_dataset", "environment with a teacher")
            algorithm = self.train_teacher[name].algorithm
            if algorithm == "fine_tuned":
                self._check_adopted(name)
            if self.collect_dataset[name].from_replay and algorithm != "dqn":
                raise ValueError(
                    f"collect_dataset.{name}.from_replay: a dqn teacher is allowed, which keeps a replay; {name}'s is {algorithm}"
                )
        for name, student in self.distill_student.items():
            for source in student.environments:
                check(source, teachers, f"distill_student.{name}.environments", "environment with a teacher")
                if student.method == "online" and self.train_teacher[source].algorithm == "fine_tuned":
                    raise ValueError(
                        f"distill_student.{name}.method: online trains its teachers itself, and that of {source} is adopted from fine_tune; "
                        "offline and on_policy are allowed"
                    )
            for field in ("weights", "batch_shares"):
                where = f"distill_student.{name}.{field}"
                for source in getattr(student, field):
                    check(source, student.environments, where, "environment of this student")
        for name, joint in self.train_multi_task.items():
            for source in joint.environments:
                check(source, teachers, f"train_multi_task.{name}.environments", "environment with a teacher")
            for field in ("weights", "reward_scales", "reference_returns"):
                where = f"train_multi_task.{name}.{field}"
                for source in getattr(joint, field, {}):  # soft sharing balances nothing
                    check(source, joint.environments, where, "environment of this network")
            if joint.method == "distral" and name in self.distill_student:
                raise ValueError(
                    f"train_multi_task.{name}: its distilled policy is a student of the same name, but distill_student has {name!r} too; rename "
                    "one of them"
                )
        for name in self.meta_train:
            if name in self.distill_student or name in self.train_multi_task:
                raise ValueError(
                    f"meta_train.{name}: what it learns may be a student of that name, but there is another network {name!r}; rename one of them"
                )
        for name, average in self.aggregate.items():
            for member in average.members:
                check(member, list(self._single_students), f"aggregate.{name}.members", "student")
            self._check_aggregate(name, average)
        students = self.students
        for name, transfer in self.fine_tune.items():
            check(name, environments, "fine_tune", "environment")
            where = f"fine_tune.{name}"
            for entry in transfer.sources:
                source, dot, environment = entry.partition(".")
                check(
                    source,
                    [*students, *teachers],
                    f"{where}.sources",
                    "student and no environment with a teacher",
                )
                if source in students and source in teachers:
                    raise ValueError(
                        f"{where}.sources: {source!r} is a student and a teacher's environment; rename the student"
                    )
                if dot and source not in students:
                    raise ValueError(
                        f"{where}.sources: {entry!r}: a teacher has one environment, so {source!r} is enough"
                    )
                if dot:
                    known = list(students[source].environments)
                    check(environment, known, f"{where}.sources", "environment of that student")
                if source in self.meta_train:  # measured, and compared with the target, there
                    check(
                        initialises(self.meta_train[source]), environments, f"{where}.sources", "environment"
                    )
            self._check_modes(where, transfer)
            for entry in transfer.sources:
                shown = _shown_in(transfer, entry)
                if shown and "." not in entry and entry in students:
                    known = list(students[entry].environments)
                    raise ValueError(
                        f"{where}.sources: {shown[0]} shows the target's observations to {entry!r}, so one of its environments is needed: "
                        f"{entry}.{known[0]}, for example; there are {', '.join(known)}"
                    )
        lists: dict[str, list[Any]] = {"seeds": list(self.seeds)}
        for block, networks in (
            ("distill_student", self.distill_student),
            ("train_multi_task", self.train_multi_task),
        ):
            lists |= {f"{block}.{name}.environments": list(x.environments) for name, x in networks.items()}
        lists |= {f"aggregate.{name}.members": list(x.members) for name, x in self.aggregate.items()}
        for name, transfer in self.fine_tune.items():
            lists[f"fine_tune.{name}.sources"] = [entry.partition(".")[0] for entry in transfer.sources]
            lists[f"fine_tune.{name}.modes"] = list(transfer.modes)
        for where, values in lists.items():
            if len(set(values)) != len(values):
                raise ValueError(f"{where}: each may stand once only")
        return self

    def _check_adopted(self, name: str) -> None:
        """Raises ValueError where no stage leaves what is to be adopted."""
        teacher = self.train_teacher[name]
        assert isinstance(teacher, AdoptedTeacher)
        where = f"train_teacher.{name}"
        if name not in self.fine_tune:
            raise ValueError(
                f"{where}: a teacher that is fine_tuned is what fine_tune.{name} leaves, which there is not; add it, or name an algorithm"
            )
        there = transfer_runs(self.fine_tune[name].modes, self.fine_tune[name].sources)
        if (teacher.mode, teacher.source) not in there:
            known = ", ".join(f"{mode} from {source}" if source else mode for mode, source in there)
            given = (
                f"{teacher.mode} from {teacher.source}"
                if teacher.source
                else f"{teacher.mode} without a source"
            )
            raise ValueError(
                f"{where}: {given} was given, but fine_tune.{name} makes {known}; name one of them"
            )

    def _check_aggregate(self, name: str, block: AggregateParams) -> None:
        """Raises ValueError where the members cannot be averaged, or the name is another network's."""
        where, (first, *others) = f"aggregate.{name}", block.members
        if name in self._single_students or name in self.train_multi_task or name in self.meta_train:
            raise ValueError(f"{where}: there is another network {name!r}; rename one of them")
        known = self._single_students
        for environment in known[first].environments:
            if environment not in self.environments:
                raise ValueError(
                    f"{where}.members: {first!r} knows {environment!r}, which is no environment of this suite; add it to environments"
                )
        for other in others:
            sides = [_structure(known[each]) for each in (first, other)]
            for field in sides[0]:
                if sides[0][field] != sides[1].get(field, sides[0][field]):
                    raise ValueError(
                        f"{where}.members: {first!r} and {other!r} differ in {field} ({sides[0][field]}, {sides[1][field]}), and only networks of "
                        "one structure can be averaged; name students that are alike in it"
                    )
        for weighted in block.weights:
            if weighted not in block.members:
                raise ValueError(
                    f"{where}.weights: {weighted!r} is no member; there are {', '.join(block.members)}"
                )
        if block.method == "interpolation" and others[1:]:
            raise ValueError(
                f"{where}.members: interpolation is for 2 students, and {len(block.members)} are named; take weighted or uniform_soup"
            )

    @model_validator(mode="after")
    def _memories_are_learnt_and_played_only(self) -> Params:
        memories: dict[str, str] = {}  # of teachers with one
        for name, teacher in self.train_teacher.items():
            if isinstance(teacher, AdoptedTeacher):
                continue
            where = f"train_teacher.{name}.network.recurrent"
            if _check_memory(where, teacher.network, teacher.algorithm):
                memories[name] = f"the teacher of {name} has a memory ({where}: {teacher.network.recurrent})"
        for name, joint in self.train_multi_task.items():
            _check_memory(
                f"train_multi_task.{name}.network.recurrent", joint.network, joint.learner.algorithm
            )
        for name, student in self.distill_student.items():
            _check_memory(f"distill_student.{name}.size.recurrent", student.size, "distillation")
            for source in student.environments:
                if source in memories and student.method != "offline":
                    raise ValueError(
                        f"distill_student.{name}.method: {memories[source]}, which {student.method} cannot ask for single "
                        "observations; offline is allowed"
                    )
        for name, transfer in self.fine_tune.items():
            for entry in transfer.sources:
                if entry in memories:
                    raise ValueError(
                        f"fine_tune.{name}.sources: {memories[entry]}; sources without one are allowed"
                    )
        return self

    def _check_modes(self, where: str, transfer: TransferParams) -> None:
        algorithm = transfer.learner.algorithm
        if "kickstart" in transfer.modes and algorithm != "ppo":
            raise ValueError(
                f"{where}.modes: kickstart needs a learner with a policy, ppo; {algorithm} was given"
            )
        if "auto" in transfer.modes and any(
            entry.partition(".")[0] == "scratch" for entry in transfer.sources
        ):
            raise ValueError(
                f"{where}.sources: auto tries scratch beside the sources; rename the source 'scratch'"
            )
        if "progressive_3" in transfer.modes and len(transfer.sources) < 2:
            raise ValueError(
                f"{where}.modes: progressive_3 has a column for each of two sources and a new one, but there is one source "
                f"({transfer.sources[0]}); name another, or use progressive_2"
            )
        probed = (len(transfer.sources) + 1) * transfer.probe_fraction
        if "auto" in transfer.modes and probed >= 1:
            raise ValueError(
                f"{where}.probe_fraction: {transfer.probe_fraction} of the budget for each of {len(transfer.sources)} sources and scratch "
                "leaves nothing to train with; lower it, or name fewer sources"
            )


def _structure(student: Any) -> dict[str, Any]:
    """What of a student's network its block decides."""
    found = {"environments": ", ".join(sorted(student.environments))}
    if hasattr(student, "loss"):
        found["outputs"] = "Q-values" if student.loss == "mse" else "logits"
    for field in ("parameter_fraction", "size"):
        if hasattr(student, field):
            found[field] = str(getattr(student, field))
    return found


def _check_memory(where: str, size: NetworkSize, algorithm: str) -> bool:
    """Whether the network has a memory; raises ValueError where the algorithm learns none."""
    if size.recurrent != "none" and algorithm not in ("impala", "unreal"):
        raise ValueError(f"{where}: {algorithm} takes none; {size.recurrent} is learnt by impala and unreal")
    return size.recurrent != "none"


def _shown_in(transfer: TransferParams, entry: str) -> list[str]:
    """The ways in which this source is shown the target's observations."""
    first = {"progressive_random": 1, "progressive_3": 2}  # of the sources; the others are made with each
    position = transfer.sources.index(entry)
    return [
        mode for mode in transfer.modes if mode in SHOWN and position < first.get(mode, len(transfer.sources))
    ]


def suite_names() -> list[str]:
    """The suites there are."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suite(suite: str, overrides: list[str]) -> Params:
    """The suite with ``key=value`` overrides, complete.

    Raises:
        StillhouseError: unknown suite or parameter (near names are given), or a value out of bounds.
    """
    known = suite_names()
    if suite not in known:
        raise StillhouseError(
            f"unknown suite {suite!r}{near(suite, known)}; there are {', '.join(known) or 'none'}"
        )
    data = read_yaml(SUITES / f"{suite}.yaml")
    if not isinstance(data, dict):
        raise StillhouseError(f"{SUITES / suite}.yaml: a mapping of parameters is needed")
    if data.setdefault("suite", suite) != suite:
        raise StillhouseError(
            f"{SUITES / suite}.yaml: says suite: {data['suite']}, which is not its file's name"
        )
    return _overridden(parse(Params, _completed(data), str(SUITES / f"{suite}.yaml")), overrides)


def load_production(overrides: list[str]) -> tuple[Params, Params]:
    """The parameters that made what is in production, with ``key=value`` overrides, and as they were.

    Raises:
        StillhouseError: nothing is in production, its parameters are not this release's, or as in :func:`load_suite`.
    """
    made = parse(Params, read_production().params, f"{FOLDER / ABOUT}: params")
    return _overridden(made, overrides), made


def _overridden(params: Params, overrides: list[str]) -> Params:
    if not overrides:
        return params
    data = params.model_dump(mode="json")
    budget = 1.0
    # A joint network's algorithm before its method, which may not take the one that was there.
    pairs = sorted(map(parse_override, overrides), key=lambda pair: not _is_joint_algorithm(pair[0]))
    for key, value in pairs:
        if key == "budget":
            budget *= _budget(value)
        else:
            apply_override(data, key, value)
            # What comes next may be a field that only the other has; averages all have the same.
            if key.rpartition(".")[2] in SWITCHES and not key.startswith("aggregate."):
                data = parse(Params, data, "").model_dump(mode="json")
    return parse(Params, _scaled(data, budget), "")


def _is_joint_algorithm(key: str) -> bool:
    return key.startswith("train_multi_task.") and key.endswith(".learner.algorithm")


def load_pipeline() -> Params:
    """The active parameters, as they stand in ``params/pipeline.yaml``."""
    data = read_yaml(PIPELINE)
    if not isinstance(data, dict):
        raise StillhouseError(f"{PIPELINE}: a mapping of parameters is needed")
    return parse(Params, _completed(data), str(PIPELINE))


def _completed(data: dict[str, Any]) -> dict[str, Any]:
    """Every teacher has a dataset block: an absent one is one of defaults. Students are distilled offline, and joint networks share
    hard, by default.
    """
    teachers, collect = data.get("train_teacher"), data.get("collect_dataset") or {}
    if isinstance(teachers, dict) and isinstance(collect, dict):
        data = {**data, "collect_dataset": {**{name: {} for name in teachers}, **collect}}
    for verb, method in (("distill_student", "offline"), ("train_multi_task", "hard_sharing")):
        found = data.get(verb)
        if isinstance(found, dict) and all(isinstance(block, dict) for block in found.values()):
            data = {**data, verb: {name: {"method": method, **block} for name, block in found.items()}}
    return data


def parse_override(text: str) -> tuple[str, Any]:
    """``distill_student.temperature=0.1`` to its key and its value, read as YAML.

    Raises:
        StillhouseError: it has not that form.
    """
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[a-z0-9_-]+(\.[A-Za-z0-9_-]+)*", key.strip()):
        raise StillhouseError(f"{text!r}: key=value is needed, for example distill_student.temperature=0.1")
    try:
        return key.strip(), YAML(typ="safe").load(value) if value.strip() else ""
    except YAMLError:
        raise StillhouseError(
            f"{text!r}: the value cannot be read; a number, a word or [a, list] is allowed"
        ) from None


SWITCHES = ("algorithm", "family", "method")  # fields that decide which other fields there are
BY_NAME = (
    "environments",
    "train_teacher",
    "collect_dataset",
    "distill_student",
    "train_multi_task",
    "aggregate",
    "fine_tune",
    "meta_train",
)


def apply_override(data: dict[str, Any], key: str, value: Any) -> None:
    """Set ``key`` in ``data``; a key without the name (``distill_student.loss``) is set for every name.

    Raises:
        StillhouseError: no such parameter.
    """
    first, *rest = key.split(".")
    if first not in data:
        raise StillhouseError(
            f"{key}: unknown parameter{near(first, [*data, 'budget'])}; there are {', '.join(data)}"
        )
    if first in BY_NAME and rest and rest[0] not in data[first]:
        if not data[first]:
            raise StillhouseError(f"{key}: this suite has no {first}")
        fields = {field for block in data[first].values() for field in block}
        if rest[0] not in fields:
            known = sorted(fields | set(data[first]))
            raise StillhouseError(
                f"{key}: unknown parameter{near(rest[0], known)}; there are {', '.join(known)}"
            )
        # A field that only some blocks have (DQN's replay, say) is set where it exists.
        blocks = [(block, rest, name) for name, block in data[first].items() if rest[0] in block]
    else:
        blocks = [(data, [first, *rest], "")]
    for block, path, _ in blocks:
        for part in path[:-1]:
            if not isinstance(block.get(part), dict):
                raise StillhouseError(
                    f"{key}: unknown parameter{near(part, list(block))}; there are {', '.join(block)}"
                )
            block = block[part]
        before = block.get(path[-1])
        if path[-1] in SWITCHES and isinstance(before, str) and before != value:
            for field in set(block) - _kept(first, path[-1], before, value):
                del block[field]
            if first == "train_multi_task" and value == "distral":  # whose rewards have the entropy in them
                block["learner"].pop("entropy_coefficient", None)
        block[path[-1]] = value


def _kept(verb: str, switch: str, before: str, value: Any) -> set[str]:
    """Fields that stay when a block's algorithm, method or family changes. The rest are the new one's own defaults, not the old one's
    settings; the budget, or what the student is, both have.
    """
    known: dict[str, dict[str, type[Config]]] = {
        "distill_student": STUDENTS,
        "train_multi_task": MULTI_TASK,
        "meta_train": META_METHODS,
    }
    if switch == "family":
        return set()
    if switch != "method" or (
        verb != "aggregate" and (not isinstance(value, str) or value not in known.get(verb, {}))
    ):
        return {"env_steps", "gamma"} if switch == "algorithm" else set()
    if verb == "train_multi_task":
        return {"environments", "learner", "reward_scales", "when_diverging"}
    if verb == "aggregate":
        return set(AggregateParams.model_fields) - ({"weights"} if before == "weighted" else set())
    if verb == "meta_train":
        old, new = META_METHODS[before].model_fields, META_METHODS[value].model_fields
        same = {"family"} if "family" in old and "family" in new else set()
        same = {field for field in same if old[field].annotation == new[field].annotation}
        return same | (set(META_BUDGETS) & set(new))
    kept = {"environments", "loss", "temperature", "updates", "size", "parameter_fraction"}
    return kept & set(STUDENTS[value].model_fields)


def _budget(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1000:
        raise StillhouseError(
            f"budget: a number above 0 and at most 1000 is allowed, but {value!r} was given"
        )
    return float(value)


def _scaled(data: dict[str, Any], budget: float) -> dict[str, Any]:
    """Every teacher's and learner's env steps, every student's updates and every meta-learner's budget, times ``budget``."""
    if budget != 1.0:
        learners = [
            *data["train_teacher"].values(),
            *(
                block["learner"]
                for verb in ("train_multi_task", "fine_tune")
                for block in data[verb].values()
            ),
        ]
        for block, field in [(x, "env_steps") for x in learners] + [
            (x, "updates") for x in data["distill_student"].values()
        ]:
            if isinstance(block.get(field), int):
                block[field] = max(1, round(block[field] * budget))
        for block in data["meta_train"].values():
            for field in META_BUDGETS:
                if field in block:
                    block[field] = max(1, round(block[field] * budget))
    return data


def _check_module(name: str, module: str) -> None:
    """A module that a parameter names is imported, and parameters may come from anyone who can trigger a run: it must lie in
    the project, or be named in a file of the project.
    """
    allowed = MODULES.read_text().split() if MODULES.is_file() else []
    path = Path(*module.split("."))
    if module and module not in allowed and not (path.with_suffix(".py").is_file() or path.is_dir()):
        raise StillhouseError(
            f"environments.{name}.module: {module!r} is allowed if it lies in this folder ({path.with_suffix('.py')}), or is "
            f"named in {MODULES}, where it is installed"
        )


def check_environments(params: Params) -> None:
    """Make each environment once, before any work.

    Raises:
        StillhouseError: unknown id, a module that is not allowed or does not import, unsupported spaces, or a transfer to other spaces
            where a source with the same spaces is claimed.
    """
    for name, config in params.environments.items():
        _check_module(name, config.module)
    meta_sources = {
        initialises(params.meta_train[source])
        for transfer in params.fine_tune.values()
        for source in (entry.partition(".")[0] for entry in transfer.sources)
        if source in params.meta_train
    }
    specs = {
        name: environment_spec(*describe(params.environments[name]), name)
        for name in sorted({*params.train_teacher, *params.fine_tune, *meta_sources})
    }
    for name, learnt in params.meta_train.items():
        where = f"meta_train.{name}"
        if isinstance(family := getattr(learnt, "family", None), FamilyConfig):
            try:
                make_family(family)
            except StillhouseError as error:
                said = str(error)
                raise StillhouseError(
                    f"{where}.{said}" if said.startswith("family.") else f"{where}.family: {said}"
                ) from None
        environment = initialises(learnt)
        if environment in meta_sources or environment in params.train_teacher:
            given, trained = params.environments[environment], EnvironmentConfig(id=PLAYED[environment])
            if specs[environment] != environment_spec(*describe(trained), environment):
                raise StillhouseError(
                    f"environments.{environment}: {given.id} was given, but {where} learns a policy of that name for {trained.id}, with other "
                    "observations or actions; rename the environment"
                )
    _check_datasets(params)
    for name, joint in params.train_multi_task.items():
        if joint.method == "hard_sharing":
            output = OUTPUTS[joint.learner.algorithm]
            check_balancing(joint, joint.environments, output, f"train_multi_task.{name}.")
        if joint.method == "distral":
            found = {each: specs[each] for each in sorted(joint.environments)}
            check_shareable(found, joint.network, f"train_multi_task.{name}.")
    for name, transfer in params.fine_tune.items():
        target = params.environments[name]
        for entry in transfer.sources:
            source, _, environment = entry.partition(".")
            environment = environment or ("" if source in params.students else source)
            if environment:
                configs = [target, params.environments[environment]]
                _check_correspondence(name, transfer, specs, environment, configs, _shown_in(transfer, entry))


def _check_datasets(params: Params) -> None:
    """Raises StillhouseError where a way of transfer reads the dataset of an environment that has no teacher to make one."""
    for name, transfer in params.fine_tune.items():
        value_based = transfer.learner.algorithm != "ppo"
        for entry in transfer.sources:
            source = entry.partition(".")[0]
            if source not in params.meta_train:
                continue
            environment = initialises(params.meta_train[source])
            needing = [
                mode
                for mode in transfer.modes
                if mode == "rehearsal" or (value_based and mode not in (*SHOWN, "scratch"))
            ]
            if needing and environment not in params.train_teacher:
                raise StillhouseError(
                    f"fine_tune.{name}.modes: {needing[0]} reads a dataset of {environment!r}, which only a teacher there makes; add "
                    f"train_teacher.{environment}, or take a way and a learner that need none (ppo with full, for example)"
                )


def _check_correspondence(
    name: str,
    transfer: TransferParams,
    specs: dict[str, EnvironmentSpec],
    environment: str,
    configs: list[EnvironmentConfig],
    shown: list[str],
) -> None:
    target, source = (Labels(component_names(config), action_names(config)) for config in configs)
    found = correspond(
        specs[name],
        specs[environment],
        transfer.components,
        transfer.actions,
        (target, source),
        where=f"fine_tune.{name}",
    )
    if found.components is None and shown:
        raise StillhouseError(
            f"fine_tune.{name}.modes: {shown[0]} shows the target's observations to its source, but {environment!r} takes "
            f"{specs[environment].observation.key} and the target has {specs[name].observation.key}; say in components which is which, or use "
            "a way that takes the torso alone (full, head_only, gradual)"
        )
    if found.actions is None and "kickstart" in shown:
        raise StillhouseError(
            f"fine_tune.{name}.actions: kickstart follows its source's policy, but none of the target's {specs[name].actions} actions is one "
            f"of {environment!r}'s {specs[environment].actions}; say which is which (index, name, or target's to source's)"
        )
