"""A learned optimiser: an LSTM that reads one gradient after another (Andrychowicz et al. 2016, https://arxiv.org/abs/1606.04474).

    (g_t, h_{t+1}) = LSTM_phi(grad f(theta_t), h_t),      theta_{t+1} = theta_t + scale g_t
    phi <- Adam(phi, grad_phi sum_t E_f f(theta_t))

The LSTM is coordinatewise: the same small network, with a state of its own for every coordinate of theta. No second derivatives: grad f(theta_t)
counts as a constant input, while the gradient with respect to phi flows through theta_{t+1} = theta_t + ... and through the state.
Backpropagation is truncated: after every ``unroll`` steps phi is updated, and theta and the state go on without their history.

Gradients enter as ``log_and_sign``, with k = 5 as in the authors' code (the paper's p is 10):

    (log|x| / k, sign(x))   where |x| >= exp(-k),   else (-1, exp(k) x)

Deviations:

1. The outer loss is the mean over the unroll's steps, not the sum, which under Adam differs by its epsilon alone.
2. The small network is trained on spirals, not on MNIST (:mod:`stillhouse.envs.optimisees`).
3. The gradient of phi is clipped to a norm of ``max_gradient_norm``; the paper does not clip.
4. The authors keep the best LSTM on validation problems; here the last one is kept.
5. The output layer's weights start at a tenth of torch's default, so that the first optimisers take small steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.envs.optimisees import OptimiseeConfig, Problems, held_out, problems
from stillhouse.errors import StillhouseError
from stillhouse.meta import Adaptation
from stillhouse.networks.batched import take_over
from stillhouse.networks.parameters import FlatParameters
from stillhouse.processor import exact_products
from stillhouse.types import Report

RATES = tuple(
    10 ** (exponent / 4) for exponent in range(-16, 5)
)  # 1e-4 to 10, what the baselines choose from
Rule = Literal["sgd", "rmsprop", "adam"]
State = list[tuple[Tensor, Tensor]]

_TUNING_PROBLEMS = 32


class LSTMOptimiserConfig(Config):
    """Settings; the defaults are those of the authors' code for quadratics, but for the preprocessing and the scale."""

    method: Literal["lstm_optimiser"] = "lstm_optimiser"
    optimisee: OptimiseeConfig = OptimiseeConfig()
    trajectories: int = Field(default=10_000, ge=1, le=10**8, description="budget: problems' batches")
    batch: int = Field(default=128, ge=1, le=4096, description="problems minimised at a time")
    optimisee_steps: int = Field(default=100, ge=1, le=10_000, description="of a trajectory")
    unroll: int = Field(default=20, ge=1, le=10_000, description="steps between two meta-updates")
    hidden: int = Field(default=20, ge=1, le=1000, description="width of each of the LSTM's two layers")
    preprocessing: Literal["log_and_sign", "none"] = "log_and_sign"
    preprocessing_k: float = Field(default=5.0, gt=0, le=100)
    output_scale: float = Field(default=0.1, gt=0, le=100, description="of the LSTM's steps")
    meta_rate: float = Field(default=1e-3, gt=0, le=1, description="Adam's learning rate")
    meta_rate_decay: Literal["none", "cosine"] = Field(default="none", description="cosine: to 0 at the end")
    max_gradient_norm: float = Field(default=1.0, ge=0, le=1e6, description="0 does not clip")

    @model_validator(mode="after")
    def _whole_unrolls(self) -> LSTMOptimiserConfig:
        if self.optimisee_steps % self.unroll:
            raise ValueError(
                f"optimisee_steps {self.optimisee_steps} are no whole number of unrolls of {self.unroll}; give a multiple of it"
            )
        return self


def log_and_sign(gradients: Tensor, k: float) -> Tensor:
    """Gradients [...] to two inputs of moderate size each, [..., 2]."""
    magnitude = (gradients.abs() + torch.finfo(gradients.dtype).tiny).log() / k
    return torch.stack(
        [magnitude.clamp(min=-1.0), (gradients * math.exp(k)).clamp(min=-1.0, max=1.0)], dim=-1
    )


class CoordinatewiseLSTM(nn.Module):
    """The optimiser: two layers of LSTM and a linear output, the same for every coordinate.

    Args:
        config: its size and how gradients enter.
        seed: of its first weights; torch's global generator is left as it was.
    """

    def __init__(self, config: LSTMOptimiserConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        inputs = 2 if config.preprocessing == "log_and_sign" else 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.derive(seed, "optimiser"))
            self.layers = nn.ModuleList(
                [nn.LSTMCell(inputs, config.hidden), nn.LSTMCell(config.hidden, config.hidden)]
            )
            self.output = nn.Linear(config.hidden, 1)
        with torch.no_grad():
            self.output.weight.mul_(0.1)
            self.output.bias.zero_()

    def initial_state(self, coordinates: int) -> State:
        """Zeros [coordinates, hidden], two for each layer."""
        zeros = self.output.weight.new_zeros((coordinates, self.config.hidden))
        return [(zeros, zeros) for _ in self.layers]

    def forward(self, gradients: Tensor, state: State) -> tuple[Tensor, State]:
        """Gradients [M, n] to what is added to theta [M, n], and the state after."""
        config = self.config
        flat = gradients.reshape(-1)
        hidden = (
            log_and_sign(flat, config.preprocessing_k)
            if config.preprocessing == "log_and_sign"
            else flat.unsqueeze(1)
        )
        following = []
        for layer, before in zip(self.layers, state, strict=True):
            after = layer(hidden, before)
            hidden = after[0]
            following.append(after)
        return config.output_scale * self.output(hidden).view_as(gradients), following


def unroll(
    network: CoordinatewiseLSTM, functions: Problems, theta: Tensor, state: State, first: int, steps: int
) -> tuple[Tensor, Tensor, State]:
    """Minimise for some steps; what a truncated backpropagation goes through.

    Args:
        network: the optimiser.
        functions: M problems.
        theta: [M, n], and
        state: of step ``first``; their history is cut off.
        first: number of the first step.
        steps: how many.

    Returns:
        The losses after each of the steps [steps, M], theta and the state after the last, all with their graph.
    """
    theta = theta.detach().requires_grad_()
    state = [(hidden.detach(), cell.detach()) for hidden, cell in state]
    losses = []
    for step in range(first, first + steps):
        values = functions.losses(theta, step)
        if step > first:
            losses.append(values)
        # The optimisee's gradient is an input of the network, no function of phi: no second derivatives.
        (gradient,) = torch.autograd.grad(values.sum(), theta, retain_graph=step > first)
        update, state = network(gradient, state)
        theta = theta + update
    losses.append(functions.losses(theta, first + steps))
    return torch.stack(losses), theta, state


class LSTMOptimiser:
    """The meta-learner: construct, then iterate :meth:`train`.

    Args:
        config: settings.
        seed: the stage's.
        device: where to compute.

    Attributes:
        network: the optimiser; trained in place.
        trajectories: done so far.
    """

    columns = {"loss/optimisee": "loss", "loss/optimisee_end": "final_loss"}

    def __init__(self, config: LSTMOptimiserConfig, seed: int, device: str = "cpu") -> None:
        self.config = config
        self.trajectories = 0
        self._device = device
        self._seed = seed
        self.network = CoordinatewiseLSTM(config, seed).to(device)
        self._parameters = FlatParameters(self.network, config.meta_rate)

    def train(self) -> Iterator[Report]:
        """Meta-train until the budget is spent; a report after every trajectory.

        Raises:
            StillhouseError: the loss is no longer finite.
        """
        config = self.config
        per_trajectory = config.optimisee_steps // config.unroll
        while self.trajectories < config.trajectories:
            with exact_products():
                losses = self._trajectory(self.trajectories)
            self.trajectories += 1
            metrics = {"loss/optimisee": float(losses.mean()), "loss/optimisee_end": float(losses[-1].mean())}
            if not all(map(math.isfinite, metrics.values())):
                raise StillhouseError(
                    f"the loss is not finite in trajectory {self.trajectories}; lower output_scale ({config.output_scale:g}) or meta_rate "
                    f"({config.meta_rate:g})"
                )
            yield Report(self.trajectories * per_trajectory, config.trajectories * per_trajectory, metrics)

    def _trajectory(self, index: int) -> Tensor:
        """Minimise batch number ``index``, updating phi on the way; the losses after every step [steps, M]."""
        config = self.config
        numbers = self._numbers(index)
        functions = problems(config.optimisee, "training", numbers, config.optimisee_steps, self._device)
        theta, state = functions.start, self.network.initial_state(functions.start.numel())
        share = index / config.trajectories
        decayed = 0.5 * (1 + math.cos(math.pi * share)) if config.meta_rate_decay == "cosine" else 1.0
        found = []
        for first in range(0, config.optimisee_steps, config.unroll):
            self._parameters.zero_gradient()
            losses, theta, state = unroll(self.network, functions, theta, state, first, config.unroll)
            losses.mean().backward()
            self._parameters.step(config.meta_rate * decayed, config.max_gradient_norm)
            found.append(losses.detach())
        return torch.cat(found)

    def _numbers(self, index: int) -> np.ndarray:
        """Which training problems batch number ``index`` has: others for every seed and batch."""
        start = seeding.derive(self._seed, "batches", index)
        return start + np.arange(self.config.batch, dtype=np.uint64)

    def evaluate(self, tasks: int, steps: int, seed: int) -> Adaptation:
        """Minimise so many test problems, drawn by ``seed``; the loss after 0, 1, ... ``steps`` steps.

        Beside it stand ``sgd``, ``rmsprop`` and ``adam`` on the same problems and minibatches, each with the learning rate of :data:`RATES` that
        leaves the smallest mean loss after ``optimisee_steps`` steps on 32 problems of neither split.

        Raises:
            StillhouseError: the test split has fewer problems than that.
        """
        config = self.config
        functions = problems(
            config.optimisee, "test", held_out(config.optimisee, tasks, seed), steps, self._device
        )
        state = self.network.initial_state(functions.start.numel())

        def learnt(gradient: Tensor, step: int) -> Tensor:
            nonlocal state
            update, state = self.network(gradient, state)
            return update

        baselines: dict[str, np.ndarray] = {
            rule: minimise(functions, by_rule(rule, rate), steps) for rule, rate in self.tuned_rates().items()
        }
        return Adaptation(
            "loss", "updates", list(range(steps + 1)), minimise(functions, learnt, steps), baselines
        )

    def tuned_rates(self) -> dict[Rule, float]:
        """The best learning rate of each baseline."""
        config = self.config
        numbers = np.arange(_TUNING_PROBLEMS)
        functions = problems(config.optimisee, "tuning", numbers, config.optimisee_steps, self._device)
        return {rule: tuned(functions, rule, config.optimisee_steps) for rule in ("sgd", "rmsprop", "adam")}

    def get_state(self) -> dict[str, Any]:
        """The whole training state, between two reports."""
        return {"parameters": self._parameters.get_state(), "trajectories": self.trajectories}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self._parameters.set_state(state["parameters"])
        self.trajectories = int(state["trajectories"])

    def learnt(self) -> dict[str, Any]:
        """The LSTM's weights."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.network.named_parameters()}

    def load(self, learnt: dict[str, Any]) -> None:
        """Take an LSTM's weights over.

        Raises:
            StillhouseError: it is of another size.
        """
        take_over(dict(self.network.named_parameters()), learnt)


@exact_products()
def minimise(functions: Problems, rule: Callable[[Tensor, int], Tensor], steps: int) -> np.ndarray:
    """The losses after 0, 1, ... steps, float64 [M, steps + 1].

    Args:
        functions: M problems.
        rule: gradient [M, n] and the step's number to what is added to theta.
        steps: how many.
    """
    theta, found = functions.start, []
    for step in range(steps + 1):
        theta = theta.detach().requires_grad_()
        values = functions.losses(theta, step)
        found.append(values.detach())
        if step < steps:
            (gradient,) = torch.autograd.grad(values.sum(), theta)
            with torch.no_grad():
                theta = theta + rule(gradient, step)
    return torch.stack(found, dim=1).double().cpu().numpy()


def by_rule(rule: Rule, rate: float) -> Callable[[Tensor, int], Tensor]:
    """An ordinary optimiser, for :func:`minimise`; the constants are torch's defaults."""
    mean, square = torch.zeros(()), torch.zeros(())

    def step_of(gradient: Tensor, step: int) -> Tensor:
        nonlocal mean, square
        if rule == "sgd":
            return -rate * gradient
        if rule == "rmsprop":
            square = 0.99 * square + 0.01 * gradient.square()
            return -rate * gradient / (square.sqrt() + 1e-8)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient.square()
        length = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        return -rate / (1 - 0.9 ** (step + 1)) * mean / length

    return step_of


def tuned(functions: Problems, rule: Rule, steps: int) -> float:
    """The rate of :data:`RATES` that leaves the smallest mean loss after so many steps."""
    ends = [minimise(functions, by_rule(rule, rate), steps)[:, -1].mean() for rate in RATES]
    return RATES[int(np.argmin(np.nan_to_num(ends, nan=np.inf, posinf=np.inf)))]
