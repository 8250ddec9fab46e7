"""MAML for reinforcement learning: an initial policy from which one policy gradient step goes far on a new task.

Finn et al. 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks" (https://arxiv.org/abs/1703.03400, Algorithm 3), with TRPO
as the meta-optimiser. For tasks i = 1..N, with D_i the trajectories of pi_theta and D'_i those of the adapted policy:

    theta_i' = theta + alpha grad_theta J(theta; D_i)
    maximise over theta   mean_i mean_D'_i[ pi_theta_i' / mu A ]   s. t.   mean_i KL(pi_theta_i'(old) || pi_theta_i') <= delta

The meta-gradient passes through the inner steps: ``(I + alpha H_i) g_i'``, with H_i the Hessian of J, by forward over reverse differentiation. The
trust region's curvature is ``mean_i (I + alpha H_i) F_i' (I + alpha H_i)``, with F_i' the Fisher matrix of the adapted policy: the
exact Hessian of the constraint at the old parameters, since the KL's own gradient is 0 there. ``gradient: first_order`` leaves H_i out of both.

The estimator is the plain one through frozen samples: J is the likelihood-ratio surrogate whose gradient is the inner policy gradient
(``surrogate``, :mod:`stillhouse.meta.inner_update`). How theta changes what is sampled before the inner step has no term (E-MAML's).

Deviations, and choices:

1. ``surrogate: ratio`` (the low variance curvature of ProMP) is the default; the authors' code has ``log_probability``.
2. The last iterate is what was learnt; the paper takes the best of its iterations.
3. The curvature's Hessians and Fisher matrices are of a share of the trajectories (``curvature_share``), and damped. The line search uses all of them, so the
   bound on the KL holds for what was sampled whatever the curvature is worth.
4. The policy is the project's network (ReLU, 2 x 100 as in the paper; head 100 times smaller at first), its Gaussian in units of the action's range.
   Log standard deviations are adapted like all parameters.
5. ``outer: ppo`` puts Adam on the clipped surrogate in place of TRPO, a few steps on the same trajectories (as ProMP, without its KL penalty).
6. With ``inner_steps: 0`` nothing is adapted in training: TRPO on all tasks together, the paper's "pretrained" policy. ``pretrained`` trains
   one beside, on as many env steps, to be compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse import seeding
from stillhouse.envs.families import make_family
from stillhouse.errors import StillhouseError
from stillhouse.meta import Adaptation
from stillhouse.meta.inner_update import (
    PolicyGradientConfig,
    Surrogate,
    compare,
    inner_chain,
    pull_back,
    push_forward,
)
from stillhouse.meta.stochastic_policy import StochasticPolicy
from stillhouse.meta.trajectories import Batch, make_batch, play, some_of
from stillhouse.meta.trust_region import trust_region_step
from stillhouse.networks.multi_task import MultiTaskNetwork
from stillhouse.processor import exact_products
from stillhouse.types import Report


class MamlRlConfig(PolicyGradientConfig):
    """Settings; the defaults are the paper's 2D navigation."""

    method: Literal["maml_rl"] = "maml_rl"
    inner_steps: int = Field(
        default=1, ge=0, le=10, description="policy gradient steps on a task in training; 0: joint training"
    )
    gradient: Literal["second_order", "first_order"] = Field(
        default="second_order", description="whether the meta-gradient passes through the inner steps"
    )
    surrogate: Surrogate = Field(
        default="ratio", description="what the inner step ascends; its Hessian is the meta-gradient's"
    )
    outer: Literal["trpo", "ppo"] = Field(default="trpo", description="the meta-optimiser")
    max_kl: float = Field(
        default=0.01, gt=0, le=10, description="trpo: delta, mean KL of a meta-update at most (nats)"
    )
    conjugate_gradients: int = Field(
        default=10, ge=1, le=100, description="trpo: iterations for the direction"
    )
    curvature_share: float = Field(
        default=0.25, gt=0, le=1, description="trpo: share of the trajectories that the curvature is of"
    )
    damping: float = Field(default=1e-3, ge=0, le=10, description="trpo: added to the curvature's diagonal")
    ppo_steps: int = Field(default=5, ge=1, le=100, description="ppo: Adam's steps in a meta-update")
    clip_range: float = Field(default=0.2, gt=0, lt=1, description="ppo: epsilon")
    learning_rate: float = Field(default=1e-3, gt=0, le=1, description="ppo: Adam's")
    pretrained: bool = Field(
        default=False,
        description="train a policy of all tasks beside, on as many env steps, to compare with",
    )


def outer_objective(
    policy: StochasticPolicy, parameters: Tensor, batch: Batch, clip_range: float = 0.0
) -> Tensor:
    """The adapted policies' surrogate of each task, [N], for parameters [N, P]: TRPO's, or with a ``clip_range`` PPO's."""
    log_pi = policy.log_probability(policy.distribution(parameters, batch.observations), batch.actions)
    ratio = (log_pi - batch.log_mu).exp()
    objective = ratio * batch.advantages
    if clip_range:
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * batch.advantages
        objective = torch.minimum(objective, clipped)
    return (batch.weights * objective).sum(1)


class MamlRl:
    """The meta-learner.

    Args:
        config: settings.
        seed: the stage's.
        device: of the policy.

    Attributes:
        initial: the parameters that are learnt, [P].
        updates: meta-updates so far.
        env_steps: really played in training, of all tasks.
    """

    columns = {
        "return/before": "return_before",
        "return/after": "return_after",
        "policy/kl": "kl",
        "policy/entropy": "entropy",
    }

    def __init__(self, config: MamlRlConfig, seed: int, device: str = "cpu") -> None:
        self.config = config
        self.seed = seed
        self.device = device
        self.family = make_family(config.family)
        self.policy = StochasticPolicy(self.family, config.hidden)
        self.initial = nn.Parameter(
            self.policy.initial(seed, config.initial_std).to(device), requires_grad=False
        )
        self.updates = 0
        self.env_steps = 0
        self._optimizer = torch.optim.Adam([self.initial], lr=config.learning_rate)
        self._rates = [config.rate(step) for step in range(config.inner_steps)]
        self.compared: MamlRl | None = None
        if config.pretrained and config.inner_steps:
            joint = config.model_copy(
                update={
                    "inner_steps": 0,
                    "pretrained": False,
                    "rollouts": config.rollouts * (config.inner_steps + 1),
                }
            )
            self.compared = MamlRl(joint, seeding.derive(seed, "pretrained"), device)

    def train(self) -> Iterator[Report]:
        """Meta-train until the budget is spent.

        Raises:
            StillhouseError: the policy is no longer finite.
        """
        while self.updates < self.config.meta_updates:
            metrics = self.update()
            if self.compared is not None:
                self.compared.update()
            yield Report(self.updates, self.config.meta_updates, metrics)

    @exact_products()
    def update(self) -> dict[str, float]:
        """One meta-update; its metrics."""
        config = self.config
        # A stream for every update: between two of them there is no other state than parameters and counters.
        random = seeding.generator(self.seed, "meta-train", self.updates)
        tasks = self.family.sample("train", config.tasks, random)
        batches: list[Batch] = []
        returns: list[float] = []
        chain = [self.initial.data.repeat(config.tasks, 1)]
        for step in range(config.inner_steps + 1):
            if step:
                chain = inner_chain(
                    self.policy, config.surrogate, chain[0], batches, self._rates[: len(batches)]
                )
            played = play(self.policy, self.family, chain[-1], tasks, config.rollouts, random)
            batches.append(make_batch(self.policy, played, config.discount, config.gae_lambda, self.device))
            returns.append(float(played.returns().mean()))
            self.env_steps += int(played.valid.sum())
        metrics = {"return/before": returns[0], "return/after": returns[-1]}
        metrics |= self._trpo(batches) if config.outer == "trpo" else self._ppo(batches)
        if not torch.isfinite(self.initial.data).all():
            raise StillhouseError(
                f"maml_rl: the policy is not finite after meta-update {self.updates + 1}; lower inner_rate "
                f"({config.inner_rate:g}) or, with ppo, learning_rate ({config.learning_rate:g})"
            )
        self.updates += 1
        last = batches[-1]
        metrics["policy/entropy"] = float(
            (last.weights * self.policy.entropy(last.distribution)).sum(1).mean()
        )
        metrics["rollout/env_steps"] = float(self.env_steps)
        return metrics

    def adapted(self, initial: Tensor, batches: list[Batch]) -> list[Tensor]:
        """The chain of parameters [N, P] from ``initial`` [P] through the inner steps on frozen trajectories."""
        start = initial.repeat(len(batches[0].weights), 1)
        return inner_chain(self.policy, self.config.surrogate, start, batches[:-1], self._rates)

    def meta_gradient(
        self, initial: Tensor, batches: list[Batch], clip_range: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The gradient [P] of the mean outer objective with respect to ``initial`` [P] on frozen trajectories, and the objective."""
        chain = self.adapted(initial, batches)
        gradients, objective = torch.func.grad_and_value(
            lambda each: outer_objective(self.policy, each, batches[-1], clip_range).sum()
        )(chain[-1])
        if self.config.gradient == "second_order":
            gradients = pull_back(
                self.policy, self.config.surrogate, chain, batches[:-1], self._rates, gradients
            )
        return gradients.mean(0), objective / len(gradients)

    def curvature_product(self, chain: list[Tensor], batches: list[Batch], vector: Tensor) -> Tensor:
        """The Hessian of the mean KL at the chain's start, times a vector [P]; see the module."""
        second = self.config.gradient == "second_order"
        inner = self.policy, self.config.surrogate, chain, batches[:-1], self._rates
        vectors = vector.repeat(len(chain[0]), 1)
        if second:
            vectors = push_forward(*inner, vectors)
        last = batches[-1]

        def distribution(parameters: Tensor) -> Tensor:
            return self.policy.distribution(parameters, last.observations)

        forward: Any = torch.func.jvp(distribution, (chain[-1],), (vectors,))
        found, tangent = forward
        cotangent = last.weights.unsqueeze(-1) * self.policy.fisher(found, tangent)
        products: Tensor = torch.func.vjp(distribution, chain[-1])[1](cotangent)[0]
        if second:
            products = pull_back(*inner, products)
        return products.mean(0)

    def _trpo(self, batches: list[Batch]) -> dict[str, float]:
        config = self.config
        initial = self.initial.data
        gradient, before = self.meta_gradient(initial, batches)
        some = [some_of(batch, config.curvature_share) for batch in batches]
        chain = self.adapted(initial, batches)  # where the KL is bounded
        last = batches[-1]

        def product(vector: Tensor) -> Tensor:
            return self.curvature_product(chain, some, vector) + config.damping * vector

        def evaluate(parameters: Tensor) -> tuple[float, float]:
            with torch.no_grad():
                after = self.adapted(parameters, batches)[-1]
                found = self.policy.distribution(after, last.observations)
                ratio = (self.policy.log_probability(found, last.actions) - last.log_mu).exp()
                divergence = self.policy.divergence(last.distribution, found)
                objective = (last.weights * ratio * last.advantages).sum(1).mean()
                return float(objective), float((last.weights * divergence).sum(1).mean())

        step = trust_region_step(
            initial,
            gradient,
            float(before),
            product,
            evaluate,
            config.max_kl,
            config.conjugate_gradients,
        )
        initial.copy_(step.parameters)
        return {
            "policy/kl": step.divergence,
            "policy/improvement": step.improvement,
            "policy/shrinkings": float(step.shrinkings),
        }

    def _ppo(self, batches: list[Batch]) -> dict[str, float]:
        config = self.config
        before = 0.0
        for step in range(config.ppo_steps):
            gradient, objective = self.meta_gradient(self.initial.data, batches, config.clip_range)
            before = float(objective) if step == 0 else before
            self.initial.grad = -gradient
            self._optimizer.step()
        last = batches[-1]
        after = self.adapted(self.initial.data, batches)[-1]
        divergence = self.policy.divergence(
            last.distribution, self.policy.distribution(after, last.observations)
        )
        improvement = outer_objective(self.policy, after, last).mean() - before
        return {
            "policy/kl": float((last.weights * divergence).sum(1).mean()),
            "policy/improvement": float(improvement),
        }

    def evaluate(self, tasks: int, steps: int, seed: int) -> Adaptation:
        """Returns of unseen tasks after 0 to ``steps`` updates, beside a fresh policy's, the pretrained one's and an oracle's.

        Raises:
            StillhouseError: the test split has fewer tasks than that.
        """
        initials = {"learnt": self.initial.data}
        if self.compared is not None:
            initials["pretrained"] = self.compared.initial.data
        return compare(self.config, self.policy, self.family, initials, tasks, steps, seed)

    def network(self) -> MultiTaskNetwork:
        """What was learnt as an ordinary network with a head named after the family: a source for a transfer.

        Raises:
            StillhouseError: the family's actions are vectors.
        """
        return self.policy.network(self.initial.data)

    def get_state(self) -> dict[str, Any]:
        moments = self._optimizer.state.get(self.initial, {})
        return {
            "initial": self.initial.data.cpu().numpy().copy(),
            "updates": self.updates,
            "env_steps": self.env_steps,
            "adam_step": int(moments["step"]) if moments else 0,
            "exp_avg": moments["exp_avg"].cpu().numpy().copy() if moments else None,
            "exp_avg_sq": moments["exp_avg_sq"].cpu().numpy().copy() if moments else None,
            "compared": self.compared.get_state() if self.compared is not None else None,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self.initial.data.copy_(self.policy.check(np.array(state["initial"])))
        self.updates, self.env_steps = state["updates"], state["env_steps"]
        self._optimizer.state.clear()
        if state["exp_avg"] is not None:
            self._optimizer.state[self.initial] = {
                "step": torch.tensor(float(state["adam_step"])),
                "exp_avg": torch.from_numpy(np.array(state["exp_avg"])).to(self.device),
                "exp_avg_sq": torch.from_numpy(np.array(state["exp_avg_sq"])).to(self.device),
            }
        if self.compared is not None:
            self.compared.set_state(state["compared"])

    def learnt(self) -> dict[str, Any]:
        """``initial`` [P], and ``pretrained`` [P] where there is one."""
        found: dict[str, Any] = {"initial": self.initial.data.cpu().clone()}
        if self.compared is not None:
            found["pretrained"] = self.compared.initial.data.cpu().clone()
        return found

    def load(self, learnt: dict[str, Any]) -> None:
        self.initial.data.copy_(self.policy.check(np.array(learnt["initial"])))
        if self.compared is not None:
            if "pretrained" not in learnt:
                raise StillhouseError(
                    "pretrained: what was learnt has no pretrained policy beside it; set pretrained to false, or meta-train with it"
                )
            self.compared.load({"initial": learnt["pretrained"]})
