"""Weight matching: bring one network's hidden units into the order of another's (Ainsworth, Hayase & Srinivasa 2022, "Git Re-Basin",
https://arxiv.org/abs/2209.04836, section 3.2 and algorithm 1).

Hidden units can be renumbered without changing what a network computes, so that two agents which learnt the same may still be
far apart in their weights. With ``P_l`` a permutation of the units of space l, layer by layer

    W_l -> P_l W_l P_{l-1}^T,    b_l -> P_l b_l        maximise    sum over all tensors of <theta_1, pi(theta_2)>

by coordinate descent: the spaces are visited in random order, each is a linear assignment problem given all others
(:func:`scipy.optimize.linear_sum_assignment`), until a whole sweep changes nothing. Maximising the inner product is minimising the
distance of the weights.

A space is a set of units that must be renumbered together: a convolution's maps, with all their positions in what reads them; a
dense layer's units, with their norm's scale and shift; all adapters that one torso (or one head) reads; a memory's hidden units, with
all their gates.

Deviations from the paper:

1. Biases, scales and shifts count in the inner product like all weights, with no weight of their own.
2. The paper's networks are chains; here environments' ways meet, and layers that feed the same layer share a permutation.
3. A memory's recurrent weights carry the same permutation on both sides, which makes a quadratic problem of it. It is linearised
   at the present order, and a step is taken only where the inner product really grows; so is every other step.
4. ``restarts`` orders of visiting are tried and the best is taken; the paper takes one.
5. Nothing is done about rescaled units: without a norm, ``relu(c x) = c relu(x)`` for c > 0 is a symmetry too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from stillhouse import seeding
from stillhouse.errors import StillhouseError
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSpec

_SWEEPS = 100  # every sweep but the last raises the inner product; some ten are the rule
_GATES = {"gru": 3, "lstm": 4, "none": 1}


class Axis(NamedTuple):
    """Where a space's units lie in a tensor: along ``dim``, as [blocks, units, the rest], flattened."""

    parameter: str
    dim: int
    blocks: int = 1  # a memory's gates


@dataclass(frozen=True)
class Space:
    """Units that are renumbered together.

    Attributes:
        size: how many.
        axes: every place where they are numbered.
    """

    size: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Matching:
    """What :func:`match_weights` found.

    Attributes:
        network: the same function as the one that was matched, its units in the reference's order.
        permutations: by space, int64 [units]: place i holds what was unit ``permutation[i]``.
        distance_before, distance_after: Euclidean, of all weights from the reference's.
        sweeps: over all spaces, in the best restart.
    """

    network: MultiTaskNetwork
    permutations: dict[str, np.ndarray]
    distance_before: float
    distance_after: float
    sweeps: int

    def report(self) -> dict[str, float | int]:
        """Plain data: the distances, and how many of the units moved."""
        moved = sum(int((order != np.arange(len(order))).sum()) for order in self.permutations.values())
        return {
            "distance_before": self.distance_before,
            "distance_after": self.distance_after,
            "units": sum(len(order) for order in self.permutations.values()),
            "units_moved": moved,
            "sweeps": self.sweeps,
        }


def permutation_spaces(network: MultiTaskNetwork) -> dict[str, Space]:
    """All of a network's spaces, by the name of the layer whose units they are.

    Raises:
        StillhouseError: a progressive network, whose frozen columns are numbered by others.
    """
    if type(network) is not MultiTaskNetwork:
        raise StillhouseError(
            f"{type(network).__name__}: its units cannot be renumbered; networks of teachers, students and joint training are allowed"
        )
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    blocks = _GATES[network.spec.size.recurrent]
    joined: dict[str, str] = {}  # what is one space, as a forest of names

    def root(name: str) -> str:
        while joined.setdefault(name, name) != name:
            name = joined[name]
        return name

    sizes: dict[str, int] = {}
    places: list[tuple[str, Axis]] = []
    for environment in network.spec.environments:
        before = ""
        *layers, head = _layers(network, environment)
        for names in layers:
            layer = _module(names[0])
            for name in names:
                gates = blocks if ".cell." in name else 1
                places.append((layer, Axis(name, 0, gates)))
                sizes[layer] = shapes[name][0] // gates
                if len(shapes[name]) > 1:  # a memory's recurrent weights read its own units
                    places.append((layer if "_hh_" in name else f"inputs of {layer}", Axis(name, 1)))
            _join(joined, root, before, f"inputs of {layer}")
            before = layer
        weight = next(name for name in head if len(shapes[name]) > 1)
        places.append((f"inputs of {_module(weight)}", Axis(weight, 1)))
        _join(joined, root, before, f"inputs of {_module(weight)}")
    spaces: dict[str, dict[Axis, None]] = {root(layer): {} for layer in sizes}
    for name, axis in places:
        if root(name) in spaces:  # all but those of the observations
            spaces[root(name)][axis] = None
    return {name: Space(sizes[name], tuple(axes)) for name, axes in spaces.items()}


def permute(network: MultiTaskNetwork, permutations: Mapping[str, np.ndarray]) -> MultiTaskNetwork:
    """A network of its own that computes the same, with other numbers for its units, in evaluation mode.

    Args:
        network: left as it is.
        permutations: by space, [units]; spaces that are not named stay as they are.

    Raises:
        StillhouseError: an unknown space, or no permutation of its units.
    """
    spaces = permutation_spaces(network)
    tensors = _tensors(network)
    for name, order in permutations.items():
        if name not in spaces:
            raise StillhouseError(f"space {name!r}: unknown; this network's are {', '.join(spaces)}")
        if not np.array_equal(np.sort(order), np.arange(spaces[name].size)):
            raise StillhouseError(
                f"space {name!r}: a permutation of its units 0..{spaces[name].size - 1} is needed"
            )
        _renumber(tensors, spaces[name], np.asarray(order))
    return _network(network.spec, tensors, next(network.parameters()).device)


def match_weights(
    reference: MultiTaskNetwork, network: MultiTaskNetwork, seed: int, restarts: int = 3
) -> Matching:
    """Renumber a network's units so that its weights are near the reference's.

    Args:
        reference: of the same structure; left as it is.
        network: left as it is.
        seed: of the orders in which spaces are visited.
        restarts: orders tried.

    Raises:
        StillhouseError: a network whose units cannot be renumbered.
    """
    spaces = permutation_spaces(network)
    # float64: near ties are then broken the same way whatever kernel multiplies.
    wanted = {name: tensor.double() for name, tensor in _tensors(reference).items()}
    given = {name: tensor.double() for name, tensor in _tensors(network).items()}
    best: tuple[float, dict[str, np.ndarray], int] | None = None
    for restart in range(restarts):
        random = seeding.generator(seed, "weight matching", restart)
        found = _descend(wanted, dict(given), spaces, random)
        if best is None or found[0] > best[0]:
            best = found
    assert best is not None
    _, permutations, sweeps = best
    matched = permute(network, permutations)
    return Matching(
        network=matched,
        permutations=permutations,
        distance_before=_distance(reference, network),
        distance_after=_distance(reference, matched),
        sweeps=sweeps,
    )


def _descend(
    wanted: dict[str, Tensor],
    tensors: dict[str, Tensor],
    spaces: dict[str, Space],
    random: np.random.Generator,
) -> tuple[float, dict[str, np.ndarray], int]:
    """One run of coordinate descent: the inner product, the permutations, the sweeps."""
    orders = {name: np.arange(space.size) for name, space in spaces.items()}
    names = list(spaces)
    similarity = _inner_product(wanted, tensors, wanted)
    sweeps, changed = 0, True
    while changed and sweeps < _SWEEPS:
        sweeps, changed = sweeps + 1, False
        for index in random.permutation(len(names)):
            space = spaces[names[index]]
            gain = sum(_rows(wanted, axis, space) @ _rows(tensors, axis, space).T for axis in space.axes)
            _, order = linear_sum_assignment(torch.as_tensor(gain).numpy(), maximize=True)
            touched = {axis.parameter for axis in space.axes}
            tried = {name: tensors[name] for name in touched}
            _renumber(tried, space, order)
            growth = _inner_product(wanted, tried, touched) - _inner_product(wanted, tensors, touched)
            if growth > 1e-9 * max(1.0, abs(similarity)):
                tensors |= tried
                similarity += growth
                orders[names[index]] = orders[names[index]][order]
                changed = True
    return similarity, orders, sweeps


def _rows(tensors: Mapping[str, Tensor], axis: Axis, space: Space) -> Tensor:
    """A tensor as a row for each unit, [units, n]."""
    return _unfolded(tensors[axis.parameter], axis, space).movedim(axis.dim + 1, 0).reshape(space.size, -1)


def _unfolded(tensor: Tensor, axis: Axis, space: Space) -> Tensor:
    return tensor.unflatten(axis.dim, (axis.blocks, space.size, -1))


def _renumber(tensors: dict[str, Tensor], space: Space, order: np.ndarray) -> None:
    """Replace the tensors of a space by renumbered ones."""
    index = torch.from_numpy(order)
    for axis in space.axes:
        moved = _unfolded(tensors[axis.parameter], axis, space).index_select(axis.dim + 1, index)
        tensors[axis.parameter] = moved.flatten(axis.dim, axis.dim + 2)


def _inner_product(first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Iterable[str]) -> float:
    # In one order: sets have none.
    return sum(float((first[name] * second[name]).sum()) for name in sorted(names))


def _distance(first: MultiTaskNetwork, second: MultiTaskNetwork) -> float:
    one, other = _tensors(first), _tensors(second)
    squares = sum(float((one[name].double() - other[name].double()).square().sum()) for name in one)
    return squares**0.5


def _tensors(network: MultiTaskNetwork) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu() for name, parameter in network.named_parameters()}


def _network(spec: NetworkSpec, tensors: dict[str, Tensor], device: torch.device) -> MultiTaskNetwork:
    with torch.random.fork_rng(devices=[]):  # the weights it draws are overwritten
        network = MultiTaskNetwork(spec)
    network.load_state_dict(tensors)
    return network.to(device).eval()


def _layers(network: MultiTaskNetwork, environment: str) -> list[list[str]]:
    """The parameters on an environment's way, layer by layer; an image's three convolutions are three layers."""
    layers: list[list[str]] = []
    for names in network.layer_names(environment):
        parts: dict[str, list[str]] = {}
        for name in names:
            found = re.search(r"\.convolutions\.\d+", name)
            parts.setdefault(found[0] if found else "", []).append(name)
        layers += parts.values()
    return layers


def _module(parameter: str) -> str:
    """The layer's name: that of its first parameter without the parameter's own."""
    return parameter.rpartition(".")[0]


def _join(joined: dict[str, str], root: Callable[[str], str], earlier: str, later: str) -> None:
    """Make one space of two, under the name that was there first."""
    if not earlier:
        return
    known = later in joined
    first, second = (root(later), root(earlier)) if known else (root(earlier), root(later))
    joined[second] = first
