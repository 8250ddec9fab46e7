"""Aggregation: one network from several of one structure, by averaging their weights.

    interpolation      alpha theta_1 + (1 - alpha) theta_2
    weighted           sum_i w_i theta_i / sum_i w_i
    uniform_soup       1/n sum_i theta_i                                       Wortsman et al. 2022, https://arxiv.org/abs/2203.05482
    greedy_soup        in order of validation score, each network that does not lower the soup's score is kept (their recipe 1)

Networks that were trained from different initial weights number their hidden units differently, and their plain average computes
nothing of use. ``align`` first brings every network's units into the order of one of them
(:mod:`stillhouse.meta.weight_matching`). What was fine-tuned from one parent usually needs no alignment.

A validation score is the mean greedy return over ``episodes`` episodes of the validation stream, which is disjoint from training
and from test. For networks of several environments it is the mean over these of (x - random) / (best network - random), so that no
environment counts by its unit; environments in which no network is better than random play are left out.

Deviations from the papers:

1. Wortsman et al. score by accuracy on held-out images, here episodes are played; all candidates meet the same ones, so that much of
   the noise is common to them.
2. All networks are aligned to one reference, the greedy soup's best and otherwise the first; Git Re-Basin's algorithm 3 for several
   networks aligns to the mean of the others, again and again.
3. The average is computed in float64 and rounded once. A network of weight 0 takes no part, so that the end points of an
   interpolation are the sources, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.config import Config
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import evaluate, network_policy
from stillhouse.meta.weight_matching import match_weights
from stillhouse.networks.multi_task import MultiTaskNetwork

Score = Callable[[MultiTaskNetwork], float]
"""A network -> its validation score; larger is better."""


class AggregationConfig(Config):
    """How several networks become one."""

    method: Literal["interpolation", "weighted", "uniform_soup", "greedy_soup"] = Field(
        default="uniform_soup", description="which average of the weights"
    )
    alpha: float = Field(default=0.5, ge=0, le=1, description="interpolation: the first network's share")
    weights: dict[str, float] = Field(
        default_factory=dict, description="weighted: each network's share, by name; they need not sum to 1"
    )
    align: bool = Field(
        default=False, description="bring the hidden units into one order before averaging (weight matching)"
    )
    restarts: int = Field(
        default=3, ge=1, le=1000, description="align: orders of visiting the layers that are tried"
    )
    episodes: int = Field(
        default=100,
        ge=1,
        le=100_000,
        description="greedy_soup: validation episodes of each environment for every score",
    )
    num_envs: int = Field(default=32, ge=1, le=1024, description="copies of the environment in validation")

    @model_validator(mode="after")
    def _weights_belong_to_weighted(self) -> Self:
        if (self.method == "weighted") != bool(self.weights):
            raise ValueError(
                "weights are for method weighted, which needs them: give weights by name with method weighted, and none with another"
            )
        if any(weight < 0 for weight in self.weights.values()) or (
            self.weights and not sum(self.weights.values())
        ):
            raise ValueError("weights must be at least 0, and one of them above 0")
        return self


@dataclass(frozen=True)
class Aggregate:
    """What :func:`aggregate` made.

    Attributes:
        network: in evaluation mode.
        report: plain data: ``method``, ``align``, ``taken`` (names in their order), ``weights`` by name, ``scores`` (the networks' own,
            empty where none were needed), ``trials`` (of the greedy soup: candidate, score with it, score to keep, whether it was kept),
            ``matching`` by name (empty without ``align``).
    """

    network: MultiTaskNetwork
    report: dict[str, Any]


def aggregate(
    config: AggregationConfig,
    networks: Mapping[str, MultiTaskNetwork],
    environments: Mapping[str, EnvironmentConfig],
    seed: int,
    device: str = "cpu",
    score: Score | None = None,
) -> Aggregate:
    """One network from several of one structure.

    Args:
        config: how.
        networks: two or more, by names of the caller's; left as they are.
        environments: where the greedy soup is validated, by the names of the networks' heads; others need none.
        seed: of validation episodes and of the alignment's order.
        device: where the networks are.
        score: judges candidates in place of validation episodes.

    Raises:
        StillhouseError: fewer than two networks, networks of different structure (the first difference is named), a weight for an
            unknown network, or a greedy soup without its environments.
    """
    check_same_structure(networks)
    _check(config, networks, environments, score)
    names = list(networks)
    report: dict[str, Any] = {"method": config.method, "align": config.align, "scores": {}, "trials": []}
    if config.method == "greedy_soup":
        score = score or Validation(environments, networks, config.episodes, seed, config.num_envs, device)
        report["scores"] = {name: score(network) for name, network in networks.items()}
        # Sorting is stable: of equal scores the one named first.
        names.sort(key=lambda name: -report["scores"][name])
    aligned = dict(networks)
    report["matching"] = {}
    if config.align:
        for name in names[1:]:
            matching = match_weights(networks[names[0]], networks[name], seed, config.restarts)
            aligned[name] = matching.network
            report["matching"][name] = matching.report()
    if config.method == "greedy_soup":
        assert score is not None
        weights, report["trials"] = _greedy(aligned, names, report["scores"][names[0]], score)
    elif config.method == "interpolation":
        weights = dict(zip(names, (config.alpha, 1 - config.alpha), strict=True))
    elif config.method == "weighted":
        weights = {name: config.weights.get(name, 0.0) for name in names}
    else:
        weights = dict.fromkeys(names, 1.0)
    taken = [name for name in names if weights.get(name)]
    report["taken"] = taken
    report["weights"] = {name: weights[name] / sum(weights.values()) for name in taken}
    network = average([aligned[name] for name in taken], [weights[name] for name in taken])
    return Aggregate(network, report)


def average(networks: Sequence[MultiTaskNetwork], weights: Sequence[float] = ()) -> MultiTaskNetwork:
    """The weighted average of the networks' weights, a network of its own in evaluation mode.

    Args:
        networks: of one structure.
        weights: at least 0, need not sum to 1; none: all the same.
    """
    total = sum(weights) if weights else float(len(networks))
    shares = [weight / total for weight in weights] if weights else [1 / total] * len(networks)
    chosen = [(network, share) for network, share in zip(networks, shares, strict=True) if share]
    first = chosen[0][0]
    with torch.random.fork_rng(devices=[]):  # the weights it draws are overwritten
        averaged = MultiTaskNetwork(first.spec)
    tensors: dict[str, Tensor] = dict(first.state_dict())
    if len(chosen) > 1:
        states = [(network.state_dict(), share) for network, share in chosen]
        for name, tensor in tensors.items():
            mean = torch.zeros_like(tensor, dtype=torch.float64)
            for state, share in states:
                mean.add_(state[name].double(), alpha=share)
            tensors[name] = mean.to(tensor.dtype)
    averaged.load_state_dict(tensors)
    return averaged.to(next(first.parameters()).device).eval()


class Validation:
    """A :data:`Score` by greedy play on the validation stream.

    Args:
        environments: where, by the names of the networks' heads.
        networks: among which to choose; they set the scale where there are several environments.
        episodes: of each environment.
        seed: of the episodes; every network meets the same ones.
        num_envs: copies stepped together.
        device: where the networks are.

    Raises:
        StillhouseError: none of the networks is better than random play in any of several environments.
    """

    def __init__(
        self,
        environments: Mapping[str, EnvironmentConfig],
        networks: Mapping[str, MultiTaskNetwork],
        episodes: int,
        seed: int,
        num_envs: int = 32,
        device: str = "cpu",
    ) -> None:
        self._environments = dict(environments)
        self._episodes, self._seed, self._num_envs, self._device = episodes, seed, num_envs, device
        self._scale: dict[str, tuple[float, float]] = {}  # returns of random play and of the best network
        if len(environments) > 1:
            found = [self.returns(network) for network in networks.values()]
            random = self.returns(next(iter(networks.values())), epsilon=1.0)
            best = {name: max(returns[name] for returns in found) for name in environments}
            self._scale = {
                name: (random[name], best[name]) for name in environments if best[name] > random[name]
            }
            if not self._scale:
                raise StillhouseError(
                    f"no network is better than random play in {', '.join(environments)}, so none can be chosen; train them longer, or "
                    "take method uniform_soup"
                )

    def __call__(self, network: MultiTaskNetwork) -> float:
        """The mean return in one environment; of several the mean of (x - random) / (best - random)."""
        returns = self.returns(network)
        if not self._scale:
            return next(iter(returns.values()))
        shares = [(returns[name] - random) / (best - random) for name, (random, best) in self._scale.items()]
        return sum(shares) / len(shares)

    def returns(self, network: MultiTaskNetwork, epsilon: float = 0.0) -> dict[str, float]:
        """The mean return in every environment, with a share ``epsilon`` of random actions."""
        found = {}
        for name, environment in self._environments.items():
            policy = network_policy(network, name, self._device)
            episodes = evaluate(
                policy, environment, self._episodes, self._seed, epsilon, self._num_envs, "validation"
            )
            found[name] = float(episodes.returns.mean())
        return found


def _greedy(
    networks: Mapping[str, MultiTaskNetwork], names: Sequence[str], best: float, score: Score
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Recipe 1 over ``names``, best first with its score: those that are kept, weight 1 each, and what was tried."""
    kept, trials = [names[0]], []
    for name in names[1:]:
        found = score(average([networks[each] for each in [*kept, name]]))
        trials.append({"candidate": name, "score": found, "to_keep": best, "kept": found >= best})
        if found >= best:
            kept.append(name)
            best = found
    return dict.fromkeys(kept, 1.0), trials


def check_same_structure(networks: Mapping[str, MultiTaskNetwork]) -> None:
    """Raises StillhouseError where there are fewer than two, or two differ: which, the first field, and both values."""
    if len(networks) < 2:
        raise StillhouseError(
            f"aggregation needs two networks or more, and {len(networks)} was given; name more checkpoints"
        )
    (first, reference), *others = networks.items()
    for name, network in networks.items():
        if type(network) is not MultiTaskNetwork:
            raise StillhouseError(
                f"{name}: a {type(network).__name__} cannot be averaged, because its frozen columns are others' networks; give "
                "networks of teachers, students or joint training"
            )
    for name, network in others:
        sides = [_flat(each.spec.model_dump(mode="json")) for each in (reference, network)]
        fields = sorted({*sides[0], *sides[1]}, key=_importance)
        for field in fields:
            values = [side.get(field, "none") for side in sides]
            if values[0] != values[1]:
                raise StillhouseError(
                    f"{first!r} and {name!r} differ in {field}: {values[0]} and {values[1]}; only networks of one structure can be averaged: "
                    "train them with the same settings, or combine them as an ensemble (of the same spaces) and distil that"
                )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested plain data as dotted names to values."""
    if isinstance(value, dict):
        return {
            key: each for part, inner in value.items() for key, each in _flat(inner, f"{name}.{part}").items()
        }
    return {name.removeprefix("."): value}


def _importance(field: str) -> tuple[int, str]:
    """Output kind first, then spaces, then sizes: what cannot be mended comes first."""
    parts = ("output", "environments", "size")
    return parts.index(field.partition(".")[0]), field


def _check(
    config: AggregationConfig,
    networks: Mapping[str, MultiTaskNetwork],
    environments: Mapping[str, EnvironmentConfig],
    score: Score | None,
) -> None:
    if config.method == "interpolation" and len(networks) != 2:
        raise StillhouseError(
            f"method interpolation is for 2 networks, and {len(networks)} were given ({', '.join(networks)}); take weighted or uniform_soup"
        )
    if unknown := sorted(set(config.weights) - set(networks)):
        raise StillhouseError(
            f"weights: {', '.join(unknown)} is no network; allowed are {', '.join(networks)}"
        )
    if config.weights and not any(config.weights.get(name) for name in networks):
        raise StillhouseError("weights: all networks have weight 0; one above 0 is needed")
    wanted = next(iter(networks.values())).spec.environments
    if config.method == "greedy_soup" and score is None and set(wanted) != set(environments):
        raise StillhouseError(
            f"method greedy_soup plays validation episodes in all of {', '.join(wanted)}, and environments were given for "
            f"{', '.join(environments) or 'none'}; give one for each head"
        )
