"""Distral on an actor-critic: every task's policy is drawn to a distilled one, which follows them all.

Teh et al. 2017, "Distral: Robust Multitask Reinforcement Learning" (https://arxiv.org/abs/1707.04175, sections 2.3 and 3). With
``alpha = c_KL / (c_KL + c_Ent)`` and ``beta = 1 / (c_KL + c_Ent)`` the task policies pi_i and the distilled policy pi_0 maximise

    J = sum_i E_pi_i [ sum_t gamma^t R_i(s_t, a_t) ],    R_i(s, a) = r_i(s, a) + alpha/beta log pi_0(a|s) - 1/beta log pi_i(a|s)

by the learner's policy gradient on the regularised rewards R_i, whose returns the critic of task i learns, and by distillation:

    d J / d theta_i = E [ sum_t d log pi_i(a_t|s_t) sum_{u >= t} gamma^(u-t) R_i(s_u, a_u) ]
    d J / d theta_0 = the same of theta_0, where pi_i depends on it, + alpha/beta sum_i E [ sum_t sum_a (pi_i(a|s_t) - pi_0(a|s_t)) d h_0(a|s_t) ]

The last term raises the log-likelihood of the task policies' actions under pi_0 = softmax(h_0).

    columns: 1    pi_i = softmax(g_i), a network of its own
    columns: 2    pi_i = softmax(alpha h_0 + beta f_i): what pi_0 learns is at once in every pi_i

**What acts in task i is pi_i.** pi_0 is a network of its own, saved as a student (``JointTraining.distilled``). The paper's arms: :data:`ARMS`. With
alpha = 0 the tasks learn by themselves, and pi_0 nothing. The paper's baselines are other methods here: A3C is a learner for each
environment, A3C_multitask hard sharing.

Deviations, and choices that the paper leaves open:

1. The learner is IMPALA (:mod:`stillhouse.agents.impala`, with deviations of its own) instead of A3C; R_i is computed with the policies as they are at the
   update. States are not weighted by gamma^t.
2. The second column's outputs are ``beta f_i``, not ``f_i``: a factor beta of 100 behind the network would make every one of Adam's steps
   in the logits 100 times longer. The policies that can be had are the same.
3. The distillation's expectation over actions is taken in full, from pi_i's whole distribution (as in the paper's eq. 10).
4. pi_0 steps once for a minibatch of every task, on the mean over the tasks, by an optimiser of its own, clipped as the learners' are.
5. The learner's own entropy bonus (``entropy_coefficient``), which sees the present step only, is 0 unless it is set: c_Ent is in the rewards.
6. ``entropy_from_uniform`` counts entropies from that of uniform play, ``log(A pi)`` in place of ``log pi``: else, with alpha < 1, a step of uniform
   play pays (1 - alpha)/beta log A, and so does staying away from the end of the episode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from stillhouse import seeding
from stillhouse.agents import OUTPUTS, make_fresh_head
from stillhouse.agents.impala import IMPALA, IMPALAConfig, Sequences
from stillhouse.envs.make import EnvironmentConfig, describe
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.losses.distral import cross_entropy, regularised_rewards
from stillhouse.multi_task.joint_training import (
    JointConfig,
    JointTraining,
    check_names,
    make_learners,
    parse_learner,
)
from stillhouse.networks.adapters import has_planes, height_width_channels
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize, NetworkSpec, build_network
from stillhouse.networks.parameters import FlatParameters
from stillhouse.networks.two_columns import join, join_columns
from stillhouse.types import EnvironmentSpec, Learner, environment_spec

ARMS: dict[str, dict[str, Any]] = {
    "KL_1col": {"alpha": 1.0, "columns": 1},
    "KL_2col": {"alpha": 1.0, "columns": 2},
    "KL+ent_1col": {"alpha": 0.5, "columns": 1},
    "KL+ent_2col": {"alpha": 0.5, "columns": 2},
}
"""The paper's names of its forms to their settings."""


class DistralConfig(JointConfig):
    """Settings beside the learner's."""

    method: Literal["distral"] = Field(description="a policy for each environment, drawn to a distilled one")
    alpha: float = Field(
        default=0.5, ge=0, le=1, description="c_KL / (c_KL + c_Ent); 1: KL alone, 0: every environment alone"
    )
    beta: float = Field(
        default=100.0, gt=0, le=1e6, description="1 / (c_KL + c_Ent), in 1 / units of the scaled rewards"
    )
    columns: Literal[1, 2] = Field(
        default=2, description="2: the distilled policy's logits are added to each environment's own"
    )
    entropy_from_uniform: bool = Field(
        default=False,
        description="count entropies from that of uniform play, so that staying away from an episode's end pays nothing",
    )

    @field_validator("network")
    @classmethod
    def _columns_of_one_size(cls, network: NetworkSize) -> NetworkSize:
        if network.separate:
            raise ValueError("it is every column's, and the distilled one is shared: separate must be false")
        if network.recurrent != "none":
            raise ValueError("the distilled policy has no memory: recurrent must be none")
        return network


def learner_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The learner's settings, with Distral's own default.

    Raises:
        StillhouseError: another algorithm than IMPALA.
    """
    algorithm = settings.get("algorithm")
    if algorithm != "impala":
        why = ", which learns Q-values" if OUTPUTS.get(str(algorithm)) == "q_values" else ""
        raise StillhouseError(
            f"learner.algorithm: {algorithm!r} was given{why}; Distral needs an actor-critic whose rewards it can regularise; allowed is impala"
        )
    return {"entropy_coefficient": 0.0, **settings}


def check_shareable(environments: Mapping[str, EnvironmentSpec], size: NetworkSize, where: str = "") -> None:
    """Whether one distilled policy can be had of all environments.

    Raises:
        StillhouseError: their observations or their actions differ; what can be done.
    """
    (first, wanted), *others = environments.items()
    for name, found in others:
        if not _one_body(wanted, found, size):
            keys = f"{first} has {wanted.observation.key}, {name} {found.observation.key}"
            planes = has_planes(wanted.observation) and has_planes(found.observation)
            advice = "set network.share_planes to true, or b" if planes else "b"
            raise StillhouseError(
                f"{where}environments: one distilled policy for all needs one observation space, but {keys}; {advice}ring them to one space in a "
                "wrapper of your own, or use hard_sharing"
            )
        if found.actions != wanted.actions and not size.share_head:
            raise StillhouseError(
                f"{where}environments: one distilled policy for all needs one set of actions, but {first} has {wanted.actions}, {name} {found.actions}; "
                "where action i is the same action in all of them set network.share_head to true (what an environment lacks is masked), else "
                "use hard_sharing"
            )


def _one_body(one: EnvironmentSpec, other: EnvironmentSpec, size: NetworkSize) -> bool:
    observed = one.observation, other.observation
    if observed[0] == observed[1]:
        return True
    if not (size.share_planes and all(has_planes(each) for each in observed)):
        return False
    sides = [height_width_channels(each)[:2] for each in observed]
    return sides[0] == sides[1]


def distral(
    config: DistralConfig,
    learner: Mapping[str, Any],
    environments: Mapping[str, EnvironmentConfig],
    seed: int,
    device: str = "cpu",
) -> JointTraining:
    """Joint training of a policy for each environment and of the distilled one, ``distilled``.

    Args:
        config: settings; the network's size is every column's.
        learner: IMPALA's settings, without ``network``; ``env_steps`` is each environment's.
        environments: where to act, by name.
        seed: the stage's seed.
        device: of the networks.

    Raises:
        StillhouseError: another algorithm, settings that do not fit each other, or environments of which no one policy can be had.
    """
    check_names("reward_scales", config.reward_scales, environments)
    own = config.network.model_copy(update={"separate": True, "share_planes": False, "share_head": False})
    settings: IMPALAConfig = parse_learner(learner_settings(learner), own)
    if settings.policy_lag and config.columns == 2:
        raise StillhouseError(
            f"learner.policy_lag: {settings.policy_lag} was given, but the distilled policy, a part of what acts, has no lag; with two columns 0 is "
            "allowed"
        )
    specs = {name: environment_spec(*describe(each), name) for name, each in environments.items()}
    check_shareable(specs, config.network)
    shared = config.network.model_copy(update={"share_head": True})
    spec = NetworkSpec(size=shared, environments=specs, output="logits")
    distilled = build_network(spec, seeding.derive(seed, "distilled"))
    make_fresh_head(distilled, next(iter(specs)))
    distilled.to(device)
    parameters = FlatParameters(distilled, settings.learning_rate, epsilon=1e-5)  # IMPALA's
    make = partial(TaskLearner, distral=config, distilled=distilled)
    network, learners = make_learners(settings, environments, config.reward_scales, seed, device, make)
    if config.columns == 2:
        network = join_columns(network, distilled, config.alpha)
    rule = DistilledUpdate(learners, distilled, parameters, settings.max_gradient_norm)
    return JointTraining(network, learners, rule, settings.env_steps, config.when_diverging, distilled)


class TaskLearner(IMPALA):
    """IMPALA on one task's regularised rewards: see :class:`stillhouse.agents.impala.IMPALA`.

    A minibatch's gradient goes to its own parameters, and to the distilled policy's.

    Args:
        config: IMPALA's settings.
        network: with ``columns`` 1 the task's policy, with 2 its own column.
        environment: name of the network's head and adapter.
        envs: the copies to act in.
        seed: of the learner.
        parameters: as IMPALA's.
        value_head: as IMPALA's.
        distral: Distral's settings.
        distilled: pi_0.
    """

    def __init__(
        self,
        config: IMPALAConfig,
        network: MultiTaskNetwork,
        environment: str,
        envs: VectorEnvironment,
        seed: int,
        parameters: FlatParameters | None = None,
        value_head: nn.Linear | None = None,
        *,
        distral: DistralConfig,
        distilled: MultiTaskNetwork,
    ) -> None:
        super().__init__(config, network, environment, envs, seed, parameters, value_head)
        self.distral = distral
        self.distilled = distilled
        self._from_uniform = math.log(envs.spec.actions) if distral.entropy_from_uniform else 0.0
        # Of the present minibatch, [T * b, A]: h_0, log pi_0 and log pi_i; the second with its graph.
        self._shared: Tensor | None = None
        self._log_distilled = self._log_policy = torch.empty(0)
        self._cost = torch.empty(0)  # [T * b]

    def _logits(self, observations: Tensor, features: Tensor) -> Tensor:
        """The logits of pi_i [N, A]."""
        own = super()._logits(observations, features)
        if self.distral.columns == 1:
            return own
        shared = self.distilled(observations, self.environment) if self._shared is None else self._shared
        return join(own, shared, self.distral.alpha)

    def _rewards(self, batch: Sequences, log_policy: Tensor) -> Tensor:
        """The regularised rewards [T, b]."""
        actions = batch.actions.unsqueeze(2)
        self._log_policy = log_policy.flatten(0, 1)
        log_distilled = self._log_distilled.detach().view_as(log_policy)
        rewards = regularised_rewards(
            batch.rewards,
            log_policy.gather(2, actions).squeeze(2),
            log_distilled.gather(2, actions).squeeze(2),
            self.distral.alpha,
            self.distral.beta,
            self._from_uniform,
        )
        self._cost = (batch.rewards - rewards).flatten()
        return rewards

    def _loss(self, batch: Sequences) -> Tensor:
        shared = self.distilled(batch.observations.flatten(0, 1), self.environment)
        self._log_distilled = torch.log_softmax(shared, 1)
        self._shared = shared
        total = super()._loss(batch)
        self._shared = None
        valid = batch.valid.flatten()
        likelihood = cross_entropy(self._log_distilled, self._log_policy)
        weights = valid / valid.sum().clamp(min=1)
        log_policy = self._log_policy[valid]
        apart = log_policy - self._log_distilled.detach()[valid]
        self._parts[-1] |= {
            "distral/cross_entropy": likelihood.detach()[valid],
            "distral/kl": (log_policy.exp() * apart).sum(1),
            "distral/cost": self._cost[valid],
        }
        return total + self.distral.alpha / self.distral.beta * (weights @ likelihood)


class DistilledUpdate:
    """The rule of Distral: every learner steps its own parameters, and the distilled policy on the mean of what all gave it.

    Args:
        learners: by environment, each on parameters of its own.
        distilled: pi_0.
        parameters: its own.
        max_gradient_norm: of each gradient by itself; 0 does not clip.
    """

    def __init__(
        self,
        learners: Mapping[str, Learner],
        distilled: MultiTaskNetwork,
        parameters: FlatParameters,
        max_gradient_norm: float,
    ) -> None:
        self.learners = dict(learners)
        self.distilled = distilled
        self.parameters = parameters
        self._active = list(self.learners)
        self._max_gradient_norm = max_gradient_norm
        # Of pi_0's parameters, by task: what diverges is found before it has reached the others'.
        self._gradients = parameters.gradient.new_zeros(len(self.learners), len(parameters.gradient))

    def begin(self, returns: Sequence[float | None]) -> None:
        pass

    def backward(self, batches: Mapping[str, Any]) -> Tensor:
        losses = []
        for index, (name, learner) in enumerate(self.learners.items()):
            if name not in batches:
                losses.append(torch.zeros(()))
                continue
            learner.parameters.zero_gradient()
            self.parameters.zero_gradient()
            loss = learner.backward(batches[name]).cpu()
            self._gradients[index] = self.parameters.gradient
            sums = learner.parameters.gradient.sum() + self.parameters.gradient.sum()
            losses.append(torch.where(torch.isfinite(sums).cpu(), loss, torch.nan))
        return torch.stack(losses)

    def step(self) -> None:
        for name in self._active:
            learner = self.learners[name]
            learner.parameters.step(learner.learning_rate, self._max_gradient_norm)
        torch.div(self._gradients.sum(0), len(self._active), out=self.parameters.gradient)
        learning_rate = max(self.learners[name].learning_rate for name in self._active)
        self.parameters.step(learning_rate, self._max_gradient_norm)

    def leave_out(self, name: str) -> None:
        self._active.remove(name)
        self._gradients[list(self.learners).index(name)] = 0
        trained = {
            key for other in self._active for layer in self.distilled.layer_names(other) for key in layer
        }
        # Adam's averages would go on moving what nobody trains any more.
        self.parameters.set_pace(dict.fromkeys(self.parameters.slices.keys() - trained, 0.0))

    def metrics(self) -> dict[str, float]:
        return {}

    def get_state(self) -> dict[str, Any]:
        return {"distilled": self.parameters.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.parameters.set_state(state["distilled"])
