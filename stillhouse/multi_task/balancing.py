"""Balancing: how the gradients of several environments' losses become one, so that none takes the shared parameters for itself.

With ``g_e`` the gradient of environment e's loss ``L_e`` with respect to all parameters, ``E`` environments and ``S`` the
parameters that two or more of them share:

    uniform, fixed   g = sum_e w_e g_e / sum_e w_e
    uncertainty      g = 1/E sum_e exp(-s_e) / 2 g_e;  s_e descends 1/E sum_e [ exp(-s_e) / 2 L_e + s_e / 2 ], s_e = log sigma_e^2
                     Kendall et al. 2018, https://arxiv.org/abs/1705.07115, section 3: L / (2 sigma^2) + log sigma
    gradnorm         g = 1/E sum_e w_e g_e;  w_e descends sum_e | G_e - mean(G) r_e^alpha |, G_e = w_e ||g_e|| on S,
                     r_e = (L_e / L_e(0)) / mean(L / L(0)), the target held constant; sum_e w_e = E
                     Chen et al. 2018, https://arxiv.org/abs/1711.02257, algorithm 1
    pcgrad           on S: g = 1/E sum_e g_e', g_e' = g_e, and for every other j in a random order, where g_e' . g_j < 0:
                     g_e' <- g_e' - (g_e' . g_j) / ||g_j||^2 g_j
                     Yu et al. 2020, https://arxiv.org/abs/2001.06782, algorithm 1
    by_return        as fixed, with w_e = 1/5 + d_e, d_e in [0, 1] what the environment's mean return lacks of its reference

Deviations from the papers:

1. Means over the environments in place of sums, so that clipping the gradient means the same for few and many.
2. uncertainty: ``s_e`` has an Adam of its own. A policy's loss may be negative, so that sigma^2, which tends to the loss, does
   not exist: refused.
3. gradnorm: S is all that is shared, not the last shared layer alone. It is ``log w_e`` that descends, and the loss is divided by
   mean(G): weights stay positive, and a step does not change with the rewards' scale. The r_e^alpha are scaled to a mean of 1, as
   the G_e / mean(G) have: else no weights meet all targets. A policy's loss has no rate of training: refused unless alpha
   is 0, which makes the norms equal.
4. pcgrad: what one environment has alone (heads, critics, adapters) is no matter of conflict and takes the mean.
5. by_return: the field samples environments in proportion to w_e; here every update has a pass for each anyway, so
   each gets the weight that it would have on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.errors import StillhouseError
from stillhouse.networks.parameters import FlatParameters
from stillhouse.types import OutputKind

_LEAST_WEIGHT = 0.2  # by_return: of an environment that lacks nothing, against 1.2 of one that lacks all


class BalancingConfig(Config):
    """Which way, and its settings."""

    balancing: Literal["uniform", "fixed", "uncertainty", "gradnorm", "pcgrad", "by_return"] = Field(
        default="uniform", description="how the environments' gradients become one"
    )
    weights: dict[str, float] = Field(
        default_factory=dict,
        description="fixed: weight of an environment's loss, by name; 1 where none is given",
    )
    balancing_learning_rate: float = Field(
        default=0.025, gt=0, le=1, description="uncertainty, gradnorm: of the weights"
    )
    gradnorm_alpha: float = Field(
        default=1.5, ge=0, le=10, description="gradnorm: how much slow environments are favoured; 0: not"
    )
    reference_returns: dict[str, float] = Field(
        default_factory=dict,
        description="by_return: what an environment should reach, by name; its own best so far where none is given",
    )

    @field_validator("weights")
    @classmethod
    def _positive(cls, values: dict[str, float]) -> dict[str, float]:
        if not all(value > 0 for value in values.values()):
            raise ValueError("numbers greater than 0 are allowed")
        return values

    @model_validator(mode="after")
    def _settings_of_the_chosen_way(self) -> BalancingConfig:
        for name, way in (("weights", "fixed"), ("reference_returns", "by_return")):
            if getattr(self, name) and self.balancing != way:
                raise ValueError(f"{name} are allowed with balancing {way}, not with {self.balancing}")
        return self


class Balancer(Protocol):
    """Combines the gradients of E environments; a row of zeros takes no part.

    Attributes:
        weights: of each environment's gradient in the last combination [E].
    """

    weights: Tensor

    def begin(self, returns: Sequence[float | None]) -> None:
        """A round begins, with the environments' mean returns so far; None before one is known."""
        ...

    def combine(self, gradients: Tensor, losses: Tensor) -> Tensor:
        """One gradient [P] of the environments' [E, P], whose losses are [E]."""
        ...

    def leave_out(self, index: int) -> None:
        """An environment takes part no more; its row is all zeros from now on."""
        ...

    def metrics(self) -> dict[str, float]:
        """What there is to say besides the weights, by the glossary's names."""
        ...

    def get_state(self) -> dict[str, Any]:
        """What combining goes on from; who was left out is the caller's to keep."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        ...


def check_balancing(
    config: BalancingConfig, names: Sequence[str], output: OutputKind, where: str = ""
) -> None:
    """Raises StillhouseError where one environment leaves nothing to balance, or the method needs other losses.

    Args:
        config: settings.
        names: of the environments.
        output: what the networks give: a policy's loss may be negative.
        where: prefix of the field's name in an error.
    """
    method = config.balancing
    if len(names) == 1 and method != "uniform":
        raise StillhouseError(
            f"{where}balancing: {method} was given, but there is one environment ({names[0]}) and nothing to balance; use uniform, or "
            "name more environments"
        )
    if output == "logits" and (method == "uncertainty" or (method == "gradnorm" and config.gradnorm_alpha)):
        raise StillhouseError(
            f"{where}balancing: {method} needs losses that are never negative, dqn's or pqn's; with a policy's loss uniform, fixed, pcgrad, "
            "by_return, and gradnorm with gradnorm_alpha 0 are allowed"
        )


def make_balancer(
    config: BalancingConfig,
    names: Sequence[str],
    shared: Sequence[slice],
    output: OutputKind,
    seed: int,
    device: str = "cpu",
) -> Balancer:
    """The balancer that the settings name.

    Args:
        config: settings.
        names: of the environments, in the gradients' order.
        shared: places of the flat gradient that two or more environments share.
        output: what the networks give: a policy's loss may be negative.
        seed: the stage's seed.
        device: where the gradients are.

    Raises:
        StillhouseError: as :func:`check_balancing`.
    """
    check_balancing(config, names, output)
    method, count = config.balancing, len(names)
    if method == "uncertainty":
        return Uncertainty(count, config.balancing_learning_rate, device)
    if method == "gradnorm":
        return GradNorm(count, shared, config.balancing_learning_rate, config.gradnorm_alpha, device)
    if method == "pcgrad":
        return PCGrad(count, shared, seeding.generator(seed, "pcgrad"), device)
    if method == "by_return":
        return ByReturn([config.reference_returns.get(name) for name in names], device)
    return FixedWeights([config.weights.get(name, 1.0) for name in names], device)


class FixedWeights:
    """A weighted mean; with equal weights the uniform one.

    Args:
        weights: of the environments, above 0.
        device: of the gradients.
    """

    def __init__(self, weights: Sequence[float], device: str = "cpu") -> None:
        given = torch.tensor(weights, dtype=torch.float32, device=device)
        self.weights = given / given.sum()

    def begin(self, returns: Sequence[float | None]) -> None:
        pass

    def combine(self, gradients: Tensor, losses: Tensor) -> Tensor:
        return self.weights @ gradients

    def leave_out(self, index: int) -> None:
        self.weights[index] = 0
        self.weights /= self.weights.sum()

    def metrics(self) -> dict[str, float]:
        return {}

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        pass


class Uncertainty:
    """Kendall's weights 1 / (2 sigma^2): at rest sigma^2 is the loss, so all losses weigh alike.

    Args:
        count: of the environments.
        learning_rate: of ``s = log sigma^2``, which starts at 0.
        device: of the gradients.
    """

    def __init__(self, count: int, learning_rate: float, device: str = "cpu") -> None:
        self.log_variances = nn.Parameter(torch.zeros(count, device=device))
        self._parameters = FlatParameters(nn.ParameterList([self.log_variances]), learning_rate)
        self._learning_rate = learning_rate
        self._active = torch.ones(count, device=device)
        self.weights = self._weights()

    def _weights(self) -> Tensor:
        return self._active * torch.exp(-self.log_variances.detach()) / (2 * self._active.sum())

    def begin(self, returns: Sequence[float | None]) -> None:
        pass

    def combine(self, gradients: Tensor, losses: Tensor) -> Tensor:
        combined = self.weights @ gradients
        # d [exp(-s) / 2 L + s / 2] / ds, divided by the number of environments
        share = self._active / (2 * self._active.sum())
        self._parameters.gradient.copy_(share - self.weights * losses)
        self._parameters.step(self._learning_rate)
        self.weights = self._weights()
        return combined

    def leave_out(self, index: int) -> None:
        self._active[index] = 0
        self.weights = self._weights()

    def metrics(self) -> dict[str, float]:
        return {}

    def get_state(self) -> dict[str, Any]:
        return {"log_variances": self._parameters.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parameters.set_state(state["log_variances"])
        self.weights = self._weights()


class GradNorm:
    """Weights under which the gradients' norms on the shared parameters follow the rates of training; with alpha 0 are equal.

    Args:
        count: of the environments.
        shared: places of the flat gradient that are shared.
        learning_rate: of the weights' logarithms.
        alpha: exponent of the relative inverse rate of training.
        device: of the gradients.
    """

    def __init__(
        self, count: int, shared: Sequence[slice], learning_rate: float, alpha: float, device: str = "cpu"
    ) -> None:
        self._shared = list(shared)
        self._learning_rate = learning_rate
        self._alpha = alpha
        self._active = torch.ones(count, device=device)
        self._logarithms = torch.zeros(count, device=device)
        self._first: Tensor | None = None  # losses at the first update [E]
        self.weights = self._active / count

    def begin(self, returns: Sequence[float | None]) -> None:
        pass

    def combine(self, gradients: Tensor, losses: Tensor) -> Tensor:
        combined = self.weights @ gradients
        count = self._active.sum()
        norms = gram(gradients, self._shared).diagonal().sqrt() * self.weights * count
        mean = norms.sum() / count
        target = mean
        if self._alpha:
            if self._first is None:
                self._first = losses.clamp(min=1e-12).clone()
            rates = self._active * (losses / self._first) ** self._alpha
            target = mean * rates * count / rates.sum().clamp(min=1e-12)
        if mean > 0:  # before any reward all gradients may be 0
            self._logarithms -= self._learning_rate * torch.sign(norms - target) * norms / mean
        self._set_weights()
        return combined

    def _set_weights(self) -> None:
        self.weights = self._active * torch.softmax(
            self._logarithms.masked_fill(self._active == 0, -torch.inf), 0
        )
        # Only differences count; kept near 0.
        self._logarithms -= (self._logarithms * self._active).sum() / self._active.sum()

    def leave_out(self, index: int) -> None:
        self._active[index] = 0
        self._set_weights()

    def metrics(self) -> dict[str, float]:
        return {}

    def get_state(self) -> dict[str, Any]:
        return {"logarithms": self._logarithms.clone(), "first": self._first}

    def set_state(self, state: dict[str, Any]) -> None:
        self._logarithms.copy_(torch.from_numpy(np.array(state["logarithms"])))
        if state["first"] is not None:
            self._first = torch.from_numpy(np.array(state["first"])).to(self._logarithms)
        self._set_weights()


class PCGrad:
    """Projects conflicting gradients onto each other's normal planes.

    All projected gradients are sums of the given ones, so it is their coefficients that are projected, by the matrix of
    the given ones' inner products.

    Args:
        count: of the environments.
        shared: places of the flat gradient that are shared.
        random: the orders are drawn from it.
        device: of the gradients.
    """

    def __init__(
        self, count: int, shared: Sequence[slice], random: np.random.Generator, device: str = "cpu"
    ) -> None:
        self._shared = list(shared)
        self._random = random
        self._active = np.ones(count, np.bool_)
        self._conflicts = 0.0
        self.weights = torch.full((count,), 1 / count, device=device)

    def begin(self, returns: Sequence[float | None]) -> None:
        pass

    def combine(self, gradients: Tensor, losses: Tensor) -> Tensor:
        rows = np.flatnonzero(self._active)
        products = gram(gradients, self._shared).double().cpu().numpy()
        coefficients = projected(
            products, [self._random.permutation(rows[rows != row]) for row in rows], rows
        )
        pairs = products[np.ix_(rows, rows)][np.triu_indices(len(rows), 1)]
        self._conflicts = float((pairs < 0).mean()) if len(pairs) else 0.0
        combined = gradients.sum(0).div_(len(rows))
        self.weights = torch.from_numpy((coefficients.sum(0) / len(rows)).astype(np.float32)).to(gradients)
        for place in self._shared:
            combined[place] = self.weights @ gradients[:, place]
        return combined

    def leave_out(self, index: int) -> None:
        self._active[index] = False

    def metrics(self) -> dict[str, float]:
        return {"balancing/conflicts": self._conflicts}

    def get_state(self) -> dict[str, Any]:
        return {
            "random": self._random.bit_generator.state,
            "weights": self.weights,
            "conflicts": self._conflicts,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._random.bit_generator.state = state["random"]
        self.weights = torch.from_numpy(np.array(state["weights"])).to(self.weights)
        self._conflicts = state["conflicts"]


class ByReturn:
    """Weights by what the environments' returns lack: of their references, or of their own best so far.

    What the first round finds, random play, lacks all; the reference lacks nothing.

    Args:
        references: what each should reach; None: its own best so far.
        device: of the gradients.
    """

    def __init__(self, references: Sequence[float | None], device: str = "cpu") -> None:
        self._references = list(references)
        self._first: list[float | None] = [None] * len(references)
        self._best: list[float | None] = [None] * len(references)
        self._lacking = [1.0] * len(references)
        self._active = torch.ones(len(references), device=device)
        self.weights = self._active / len(references)

    def begin(self, returns: Sequence[float | None]) -> None:
        for index, found in enumerate(returns):
            if found is None:
                continue
            first, best = self._first[index], self._best[index]
            self._first[index] = first = found if first is None else first
            self._best[index] = best = found if best is None else max(best, found)
            reference = self._references[index]
            span = (best if reference is None else reference) - first
            self._lacking[index] = 1 - min(max((found - first) / span, 0.0), 1.0) if span > 0 else 1.0
        self._set_weights()

    def _set_weights(self) -> None:
        given = self._active * (torch.tensor(self._lacking).to(self._active) + _LEAST_WEIGHT)
        self.weights = given / given.sum()

    def combine(self, gradients: Tensor, losses: Tensor) -> Tensor:
        return self.weights @ gradients

    def leave_out(self, index: int) -> None:
        self._active[index] = 0
        self._set_weights()

    def metrics(self) -> dict[str, float]:
        return {}

    def get_state(self) -> dict[str, Any]:
        return {"first": self._first, "best": self._best, "lacking": self._lacking}

    def set_state(self, state: dict[str, Any]) -> None:
        self._first, self._best = list(state["first"]), list(state["best"])
        self._lacking = list(state["lacking"])
        self._set_weights()


def gram(gradients: Tensor, places: Sequence[slice]) -> Tensor:
    """Inner products [E, E] of gradients [E, P] over some of their places."""
    products = gradients.new_zeros(len(gradients), len(gradients))
    for place in places:
        products.addmm_(gradients[:, place], gradients[:, place].T)
    return products


def projected(
    products: np.ndarray, orders: Sequence[np.ndarray], rows: Sequence[int] | np.ndarray
) -> np.ndarray:
    """PCGrad's projected gradients of ``rows``, as coefficients [len(rows), E] of the given ones.

    Args:
        products: inner products [E, E] of the given gradients.
        orders: for each of ``rows``, the other gradients in the order in which it is projected.
        rows: the gradients that are projected.
    """
    coefficients = np.eye(len(products))[rows]
    for own, order in zip(coefficients, orders, strict=True):
        for other in order:
            conflict = own @ products[:, other]
            if conflict < 0:
                own[other] -= conflict / products[other, other]
    return coefficients
