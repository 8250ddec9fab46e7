"""The inner step of policy-gradient meta-learning, its derivative, and adaptation to unseen tasks.

    theta' = theta + alpha grad J(theta; D),   D: trajectories of one task under pi_theta

J is a surrogate on D, with advantages A and the log-probabilities log mu that the actions had when they were drawn:

    ratio             J = mean[ exp(log pi_theta - log mu) A ]
    log_probability   J = mean[ log pi_theta A ]

Where pi_theta = mu both have the same gradient, the policy gradient, and so theta' is the same. Their Hessians differ by
``mean[ grad log pi grad log pi^T A ]``, and so does what the meta-gradient sees through the step: that of ``ratio`` is the "low variance
curvature" estimator (Rothfuss et al. 2019, ProMP, https://arxiv.org/abs/1810.06784, section 5), that of ``log_probability`` is of the 2017
code, which lacks this term and is biased. Neither has the term by which theta changes D itself (E-MAML's, Stadie et al. 2018,
https://arxiv.org/abs/1803.01118).

Everything is of N tasks at once: row i of [N, P] is task i's parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.envs.families import Family, FamilyConfig
from stillhouse.errors import StillhouseError
from stillhouse.meta import Adaptation
from stillhouse.meta.stochastic_policy import StochasticPolicy
from stillhouse.meta.trajectories import Batch, make_batch, play
from stillhouse.processor import exact_products

Surrogate = Literal["ratio", "log_probability"]


class PolicyGradientConfig(Config):
    """What all methods with a policy gradient inside have in common."""

    family: FamilyConfig = FamilyConfig()
    hidden: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        default=(100, 100), min_length=1, max_length=8, description="widths of the policy's hidden layers"
    )
    initial_std: float = Field(
        default=1.0,
        gt=0,
        le=10,
        description="standard deviation of action vectors at first; actions reach from -1 to 1",
    )
    meta_updates: int = Field(default=500, ge=1, le=10**6, description="budget in meta-updates")
    tasks: int = Field(default=20, ge=1, le=1000, description="tasks of a meta-update")
    rollouts: int = Field(
        default=20, ge=1, le=1000, description="episodes of a task for each update, in training"
    )
    inner_rate: float = Field(default=0.1, gt=0, le=100, description="alpha: step size of the inner updates")
    later_rate_factor: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="alpha of every update of a task after its first, as a share of alpha",
    )
    discount: float = Field(default=0.99, ge=0, le=1, description="gamma")
    gae_lambda: float = Field(default=1.0, ge=0, le=1, description="lambda of the advantage estimates")
    test_rollouts: int = Field(
        default=40, ge=1, le=1000, description="episodes of a task for each update, in evaluation"
    )

    def rate(self, step: int) -> float:
        """Alpha of a task's update number ``step``, from 0."""
        return self.inner_rate * (self.later_rate_factor if step else 1.0)


def surrogate(policy: StochasticPolicy, kind: Surrogate, parameters: Tensor, batch: Batch) -> Tensor:
    """J of each task, [N], for parameters [N, P]; see above."""
    log_pi = policy.log_probability(policy.distribution(parameters, batch.observations), batch.actions)
    factor = log_pi if kind == "log_probability" else (log_pi - batch.log_mu).exp()
    return (batch.weights * factor * batch.advantages).sum(1)


def inner_gradient(policy: StochasticPolicy, kind: Surrogate, parameters: Tensor, batch: Batch) -> Tensor:
    """grad J of each task, [N, P]."""
    # No task's parameters have a part in another's surrogate, so the gradient of the sum is every row's own.
    found: Tensor = torch.func.grad(lambda each: surrogate(policy, kind, each, batch).sum())(parameters)
    return found


def hessian_product(
    policy: StochasticPolicy, kind: Surrogate, parameters: Tensor, batch: Batch, vectors: Tensor
) -> Tensor:
    """The Hessian of J of each task times its row of ``vectors``, [N, P]: the gradient's derivative along it."""
    found: Tensor = torch.func.jvp(
        lambda each: inner_gradient(policy, kind, each, batch), (parameters,), (vectors,)
    )[1]
    return found


def inner_chain(
    policy: StochasticPolicy,
    kind: Surrogate,
    parameters: Tensor,
    batches: Sequence[Batch],
    rates: Sequence[float],
) -> list[Tensor]:
    """Parameters before and after each inner step, [N, P] each; one step for each batch."""
    chain = [parameters]
    for batch, rate in zip(batches, rates, strict=True):
        chain.append(chain[-1] + rate * inner_gradient(policy, kind, chain[-1], batch))
    return chain


def push_forward(
    policy: StochasticPolicy,
    kind: Surrogate,
    chain: Sequence[Tensor],
    batches: Sequence[Batch],
    rates: Sequence[float],
    vectors: Tensor,
) -> Tensor:
    """How the adapted parameters change when the initial ones move along ``vectors`` [N, P]: ``(I + alpha H) v`` through every step."""
    for parameters, batch, rate in zip(chain, batches, rates, strict=False):
        vectors = vectors + rate * hessian_product(policy, kind, parameters, batch, vectors)
    return vectors


def pull_back(
    policy: StochasticPolicy,
    kind: Surrogate,
    chain: Sequence[Tensor],
    batches: Sequence[Batch],
    rates: Sequence[float],
    gradients: Tensor,
) -> Tensor:
    """Gradients [N, P] with respect to the adapted parameters, brought to the initial ones; Hessians are symmetric."""
    for step in reversed(range(len(batches))):
        curved = hessian_product(policy, kind, chain[step], batches[step], gradients)
        gradients = gradients + rates[step] * curved
    return gradients


@exact_products()
def adapt(
    config: PolicyGradientConfig,
    policy: StochasticPolicy,
    family: Family,
    initial: Tensor,
    tasks: np.ndarray,
    steps: int,
    seed: int,
) -> np.ndarray:
    """Learn every task from the same initial parameters by up to so many policy-gradient steps.

    Args:
        config: step sizes, discount, and how many episodes each step takes.
        policy: its form.
        family: whose tasks.
        initial: parameters [P].
        tasks: [N, d].
        steps: updates.
        seed: of the episodes.

    Returns:
        Mean returns after 0 to ``steps`` updates, float64 [N, steps + 1]: each of the episodes that the next update learns from.
    """
    parameters = initial.repeat(len(tasks), 1)
    returns = np.empty((len(tasks), steps + 1))
    for step in range(steps + 1):
        random = seeding.generator(seed, "adaptation", step)
        played = play(policy, family, parameters, tasks, config.test_rollouts, random)
        returns[:, step] = played.returns().mean(axis=1)
        if step < steps:
            batch = make_batch(policy, played, config.discount, config.gae_lambda, str(initial.device))
            gradient = inner_gradient(policy, "log_probability", parameters, batch)
            parameters = parameters + config.rate(step) * gradient
    return returns


def compare(
    config: PolicyGradientConfig,
    policy: StochasticPolicy,
    family: Family,
    initials: Mapping[str, Tensor],
    count: int,
    steps: int,
    seed: int,
) -> Adaptation:
    """Adapt to unseen tasks from each of several initial parameters.

    Args:
        config: as in :func:`adapt`.
        policy: its form.
        family: whose tasks.
        initials: parameters [P] by name; ``learnt`` are those that are judged, the others are baselines.
        count: tasks of the test split, all different.
        steps: updates.
        seed: of tasks and episodes, the same for all of them.

    Returns:
        Returns after 0 to ``steps`` updates; among the baselines a fresh policy, and an oracle where there is one.

    Raises:
        StillhouseError: the test split has fewer tasks than that.
    """
    members = family.members("test")
    if members is not None and count > members:
        raise StillhouseError(
            f"tasks: {count} test tasks were asked for, but {family.name} has {members}; ask for at most {members}"
        )
    tasks = family.sample("test", count, seeding.generator(seed, "test tasks"))
    fresh = policy.initial(seeding.derive(seed, "fresh"), config.initial_std).to(initials["learnt"].device)
    found = {
        name: adapt(config, policy, family, initial, tasks, steps, seed)
        for name, initial in {**initials, "random_initialisation": fresh}.items()
    }
    values = found.pop("learnt")
    oracle = family.oracle_return(tasks)
    if oracle is not None:
        found["oracle"] = oracle[:, None]
    return Adaptation("return", "updates", list(range(steps + 1)), values, found)
