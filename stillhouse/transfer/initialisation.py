"""Initialisation: a network for a target environment, with what can be taken from a trained one.

What is taken, tensor by tensor: the torso and, where the target's observations are a mapping of the source's, the adapter; the
head, where the source's outputs are what the learner's are. A mapping says, for each component of the target's observations
(an entry of a vector, a channel of planes or an image) and each of its actions, which of the source's it is:

    W_target[:, i] = W_source[:, map(i)], or 0 where the target's component i is none of the source's       (first layer)
    W_target[a, :] = W_source[map(a), :], or fresh where the target's action a is none of the source's      (head)

so that before any training the target's network does on the components and actions that both have what the source's does. The
source's own heads, and adapters that the target does not share, come along: the network can still act in the environments it was
taken from, which is how retention is measured, and rehearsed. Left out is an environment whose adapter the target shares and takes in
part only: its way would be another.

A policy-gradient learner takes a KL or NLL student's logits as they are. For a value-based learner such a student's outputs
are no Q-values: bootstrapping from them destroys the network, so a fresh Q head is fitted to a source dataset's Q-values first
(:func:`stillhouse.transfer.fine_tuning.fit_head`). Where no head can be taken it starts at zero: it bootstraps from 0, not from noise; as a policy, uniform.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from stillhouse.agents import fresh_network
from stillhouse.config import near
from stillhouse.errors import StillhouseError
from stillhouse.networks.adapters import has_planes, height_width_channels
from stillhouse.networks.multi_task import (
    SHARED_HEAD,
    MultiTaskNetwork,
    NetworkSize,
    NetworkSpec,
    build_network,
)
from stillhouse.types import EnvironmentSpec, ObservationSpec, OutputKind

Declared = Literal["same", "index", "name"] | Mapping[str, str]
"""How components, or actions, correspond: only where both have the same number, in order; in order as far as both go; those of
one name; or target's to source's, each a name or a number."""


@dataclass(frozen=True)
class Source:
    """A trained network to start from.

    Attributes:
        name: of the student, or of the teacher's environment.
        network: it.
        environment: whose adapter and head become the target's; "": neither, the torso alone is taken, and an adapter that the target's
            observations share.

    Raises:
        StillhouseError: its environments' networks are separate, and none of them was named.
    """

    name: str
    network: MultiTaskNetwork
    environment: str

    def __post_init__(self) -> None:
        if not self.network.spec.size.separate:
            return
        if not self.environment:
            raise StillhouseError(
                f"{self.name}: its environments have separate networks and no common torso, so one of them is needed: "
                f"{self.name}.{next(iter(self.network.spec.environments))}, for example"
            )
        object.__setattr__(self, "network", self.network.of(self.environment))

    @property
    def spec(self) -> EnvironmentSpec:
        """Of ``environment``."""
        return self.network.spec.environments[self.environment]


@dataclass(frozen=True)
class Labels:
    """Names of an environment's observation components and actions; empty where they have none."""

    components: Sequence[str] = ()
    actions: Sequence[str] = ()


@dataclass(frozen=True)
class Correspondence:
    """Of each of the target's components and actions the source's number, -1 for none; None: nothing corresponds."""

    components: tuple[int, ...] | None
    actions: tuple[int, ...] | None

    @property
    def one_to_one(self) -> bool:
        """Whether each of the target's components and actions is one of the source's, and no two are the same."""
        return all(
            numbers is not None and min(numbers) >= 0 and len(set(numbers)) == len(numbers)
            for numbers in (self.components, self.actions)
        )


@dataclass(frozen=True)
class TensorReport:
    """Where the tensors on the target's way through its network come from.

    Attributes:
        copied: taken whole.
        sliced: taken in part, for the target has fewer components or actions.
        padded: taken, and more: the target has components or actions that the source has not.
        permuted: taken in another order.
        new: fresh.
    """

    copied: list[str] = field(default_factory=list)
    sliced: list[str] = field(default_factory=list)
    padded: list[str] = field(default_factory=list)
    permuted: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    @property
    def taken(self) -> list[str]:
        """All but the new."""
        return [*self.copied, *self.sliced, *self.padded, *self.permuted]


def channels(observation: ObservationSpec) -> int:
    """How many components an observation has: entries, channels, or values."""
    if observation.kind in ("planes", "image"):
        return height_width_channels(observation)[2]
    return observation.shape[0]


def channel_axis(observation: ObservationSpec) -> int:
    """The axis of raw observations [B, ...] along which the components lie."""
    return -3 if observation.channels_first else -1


def show(
    observations: Tensor, numbers: Sequence[int], given: ObservationSpec, wanted: ObservationSpec
) -> Tensor:
    """Raw observations [B, ...] of one kind as another environment would give them.

    Args:
        observations: those that there are.
        numbers: for each component that is wanted the given one's number, -1 for zeros.
        given, wanted: what the observations are, and are to be; discrete ones are one value, and stay as they are.
    """
    if given.kind == "discrete":
        return observations
    axis = channel_axis(given)
    if list(numbers) != list(range(observations.shape[axis])):
        chosen = torch.tensor([max(0, number) for number in numbers], device=observations.device)
        observations = observations.index_select(axis, chosen)
        for index, number in enumerate(numbers):
            if number < 0:
                observations.select(axis, index).zero_()
    return observations.movedim(axis, channel_axis(wanted))


def correspond(
    target: EnvironmentSpec,
    source: EnvironmentSpec,
    components: Declared,
    actions: Declared,
    labels: tuple[Labels, Labels] = (Labels(), Labels()),
    where: str = "",
) -> Correspondence:
    """Which of the source's components and actions the target's are.

    Args:
        target, source: their spaces.
        components, actions: what was declared.
        labels: of the target's and the source's, where there are any.
        where: what an error names.

    Raises:
        StillhouseError: the observations are of different kinds or sides, a declared component or action does not exist, or names
            are needed that are not known.
    """
    shapes = [_sides(spec.observation) for spec in (target, source)]
    found = None
    if shapes[0] == shapes[1]:
        counts = channels(target.observation), channels(source.observation)
        found = _mapped(components, counts, labels[0].components, labels[1].components, f"{where}.components")
        if target.observation.kind == "discrete" and components != "same":
            raise StillhouseError(
                f"{where}.components: same is allowed for discrete observations, which are one value"
            )
    else:
        raise StillhouseError(
            f"{where}: {target.observation.key} and {source.observation.key} are observations of different kinds or sides, between which "
            "no component corresponds; choose another source, or of a student name no environment, to take its torso alone"
        )
    return Correspondence(
        components=found,
        actions=_mapped(
            actions,
            (target.actions, source.actions),
            labels[0].actions,
            labels[1].actions,
            f"{where}.actions",
        ),
    )


def _sides(observation: ObservationSpec) -> tuple[object, ...]:
    """What two observations must have in common for their components to correspond."""
    if observation.kind in ("planes", "image"):
        return ("channels", observation.kind, *height_width_channels(observation)[:2])
    return (observation.kind,)


def _mapped(
    declared: Declared, counts: tuple[int, int], target: Sequence[str], source: Sequence[str], where: str
) -> tuple[int, ...] | None:
    own, theirs = counts
    if declared == "same":
        return tuple(range(own)) if own == theirs else None
    if declared == "index":
        return tuple(i if i < theirs else -1 for i in range(own))
    if declared == "name":
        if not target or not source:
            which = "target" if not target else "source"
            raise StillhouseError(
                f"{where}: name was given, but the {which}'s have no names; declare them in the environment's metadata, or "
                "map them by index"
            )
        found = [source.index(name) if name in source else -1 for name in target]
    else:
        found = [-1] * own
        for mine, yours in declared.items():
            found[_number(mine, own, target, f"{where}: the target")] = _number(
                yours, theirs, source, f"{where}: the source"
            )
    return tuple(found) if max(found) >= 0 else None


def _number(given: str, count: int, names: Sequence[str], where: str) -> int:
    if given in names:
        return list(names).index(given)
    if given.isdecimal() and int(given) < count:
        return int(given)
    known = ", ".join(names) or "no names"
    raise StillhouseError(
        f"{where} has no {given!r}{near(given, list(names))}; numbers 0 to {count - 1} are allowed, and {known}"
    )


def kept_name(environment: str) -> str:
    """What a source's environment is called in the target's network."""
    return f"source-{environment}"


def target_network(
    source: Source,
    name: str,
    environment: EnvironmentSpec,
    seed: int,
    output: OutputKind = "q_values",
    correspondence: Correspondence | None = None,
    take: Sequence[str] = ("*",),
) -> tuple[MultiTaskNetwork, TensorReport]:
    """A network of the source's size for the target environment, with what can be taken from the source.

    Args:
        source: the network to take from.
        name: the target environment's name: the new network's head.
        environment: the target's spaces.
        seed: of the fresh tensors, the same whatever is taken.
        output: what the learner's network gives.
        correspondence: of components and actions with those of the source's environment; None: nothing but the torso, and what has the
            target's own name or shape, is taken.
        take: patterns of the names of tensors that may be taken, as in ``fnmatch``.

    Raises:
        StillhouseError: nothing can be taken, or a pattern matches nothing that can.
    """
    size = source.network.spec.size.model_copy(
        update={"share_head": False}
    )  # alone, it has a head of its own
    fresh = fresh_network(size, name, environment, output, seed)
    theirs = source.network.spec.environments
    environments = {name: environment} | {
        kept_name(each): spec
        for each, spec in theirs.items()
        if not _shares_adapter(size, environment, spec)
        or _adapter_is_kept(source, environment, correspondence)
    }
    network = build_network(NetworkSpec(size=size, environments=environments, output=output), seed)
    given = dict(source.network.named_parameters())
    own = dict(network.named_parameters())
    report = TensorReport()
    possible: list[str] = []
    with torch.no_grad():
        for key, tensor in own.items():  # the source as it is
            kind, part, *rest = key.split(".")
            part = part.removeprefix(kept_name(""))
            shared = ".".join([kind, SHARED_HEAD, *rest])
            whole = given.get(".".join([kind, part, *rest]), given.get(shared))
            if whole is not None and not key.startswith((f"heads.{name}.", f"adapters.{name}.")):
                tensor.copy_(whole[: len(tensor)])
        for key, tensor in fresh.named_parameters():
            kind, value = _taken(key, tensor, name, source, output, correspondence)
            if kind != "new":
                possible.append(key)
                if not any(fnmatchcase(key, pattern) for pattern in take):
                    kind, value = "new", tensor
            if kind == "new" and key.startswith("heads."):
                value = torch.zeros_like(tensor)
            getattr(report, kind).append(key)
            own[key].copy_(value)
    if not possible:
        raise StillhouseError(
            f"{name}: nothing of {source.name!r} fits the target: it has no torso, and its adapters take other observations than "
            f"{environment.observation.key}; say in components which is which, or choose another source"
        )
    check_patterns("take", take, possible)
    return network, report


def _shares_adapter(size: NetworkSize, target: EnvironmentSpec, kept: EnvironmentSpec) -> bool:
    """Whether the target's way and a kept environment's begin with the same adapter."""
    own = target.observation
    return own.key == kept.observation.key and not (size.share_planes and has_planes(own))


def _adapter_is_kept(source: Source, target: EnvironmentSpec, correspondence: Correspondence | None) -> bool:
    """Whether an adapter that the target shares still is, up to the order of its components, what it was in the source."""
    if not source.environment or correspondence is None:
        return True
    same = source.spec.observation.key == target.observation.key
    if correspondence.components is None:
        return not same
    return same and sorted(correspondence.components) == list(range(channels(target.observation)))


def kept_observations(
    network: MultiTaskNetwork,
    target: str,
    kept: str,
    correspondence: Correspondence | None,
    observations: Tensor,
) -> Tensor:
    """A source's observations [B, ...] as the target's network takes them, for its kept environment ``kept``.

    Where both share an adapter, its components are in the target's order.
    """
    if correspondence is None or correspondence.components is None:
        return observations
    own, theirs = (network.spec.environments[name] for name in (target, kept))
    if not _shares_adapter(network.spec.size, own, theirs):
        return observations
    return show(observations, correspondence.components, theirs.observation, own.observation)


def check_patterns(what: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that some pattern matches, as in ``fnmatch``.

    Raises:
        StillhouseError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise StillhouseError(
                f"{what}: {pattern!r} matches no tensor; there are {', '.join(names) or 'none'}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


# Weights [units, components, ...] that read observations.
_FIRST_LAYER = re.compile(r"adapters\.[^.]+\.(dense|(first\.)?convolution|first\.convolutions\.0)\.weight")


def _taken(
    key: str,
    fresh: Tensor,
    name: str,
    source: Source,
    output: OutputKind,
    correspondence: Correspondence | None,
) -> tuple[str, Tensor]:
    """How a tensor of the target is taken (an attribute of :class:`TensorReport`), and its value."""
    given = dict(source.network.named_parameters())
    if key.startswith("heads."):
        if not source.environment or source.network.spec.output != output or correspondence is None:
            return "new", fresh
        if correspondence.components is None or correspondence.actions is None:
            return "new", fresh  # what does not see what the source saw has no use for its head
        head = SHARED_HEAD if source.network.spec.size.share_head else source.environment
        whole = given[key.replace(f"heads.{name}.", f"heads.{head}.", 1)][: source.spec.actions]
        return _mapped_tensor(whole, correspondence.actions, 0, fresh)
    if not key.startswith("adapters."):
        return ("copied", given[key]) if key in given else ("new", fresh)
    if source.environment and correspondence is not None:
        if correspondence.components is None:
            other = key in given and not key.startswith(f"adapters.{source.spec.observation.key}.")
            return ("copied", given[key]) if other else ("new", fresh)
        parts = key.split(".")
        # One for each environment where planes share a body, else one for each shape.
        shape = source.environment if parts[1] == name else source.spec.observation.key
        whole = given[".".join([parts[0], shape, *parts[2:]])]
        if _FIRST_LAYER.fullmatch(key):
            return _mapped_tensor(whole, correspondence.components, 1, torch.zeros_like(fresh))
        return "copied", whole
    return ("copied", given[key]) if key in given else ("new", fresh)


def _mapped_tensor(whole: Tensor, numbers: Sequence[int], axis: int, otherwise: Tensor) -> tuple[str, Tensor]:
    """Slices of ``whole`` along ``axis`` in the order of ``numbers``; where one is -1, that of ``otherwise``."""
    value = otherwise.clone()
    for index, number in enumerate(numbers):
        if number >= 0:
            value.select(axis, index).copy_(whole.select(axis, number))
    if min(numbers) < 0:
        return "padded", value
    if list(numbers) != list(range(len(numbers))):
        return "permuted", value
    return ("copied" if len(numbers) == whole.shape[axis] else "sliced"), value
