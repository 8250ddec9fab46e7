"""Expected entropy-regularised distillation: the student plays and descends its divergence from the teacher, on all that follows.

Czarnecki et al. 2019, "Distilling Policy Distillation" (https://arxiv.org/abs/1902.02186). On-policy distillation is not the
gradient of anything, because the states depend on the student. This update is: with student S and teacher T, of
``E_S sum_t gamma^t KL(S || T)(o_t)``. On rollouts of S it descends

    KL(S || T)(o_t) - c log S(a_t | o_t) A_t                   A_t of the rewards -KL(S || T)(o_{t+1})
    T = (1 - floor) softmax(q_t / tau) + floor / |A|           so that log T >= log(floor / |A|)

where A_t are generalised advantage estimates of a critic, a linear layer on the student's features for each environment.

Deviations from the paper:

1. The loss is KL(S || T), where the paper's is Hx(S || T), whose minimum is the teacher's best action and not its policy; the
   reward is its expectation at o_{t+1}, not the sample log T(a_{t+1}).
2. The weight c (``correction``) is below 1 by default, which trusts the noisy part less; only c = 1 is the gradient.
3. States are not weighted by gamma^t, as is usual. A rollout's minibatches are taken one after the other, each once, without
   correcting for the student's change meanwhile. No gradient of the critic reaches the student.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse import seeding
from stillhouse.config import Config
from stillhouse.distillation.student import StudentTraining
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.losses.distillation import floored_log_policy, reverse_kl
from stillhouse.networks.parameters import FlatParameters
from stillhouse.returns import generalized_advantages
from stillhouse.types import Policy

# Observations passed at once through a network.
_CHUNK = 4096


class ExpectedEntropyConfig(Config):
    """Of the objective ``expected_entropy`` only."""

    rollout_length: int = Field(
        default=32, ge=2, le=4096, description="env steps of each copy between updates"
    )
    gamma: float = Field(default=0.9, ge=0, lt=1, description="discount of later divergences, per env step")
    trace: float = Field(default=0.95, ge=0, le=1, description="lambda of the advantage estimates")
    floor: float = Field(
        default=0.01, gt=0, lt=1, description="share of uniform actions mixed into the teacher's policy"
    )
    correction: float = Field(
        default=0.1,
        ge=0,
        le=1000,
        description="weight of the policy gradient; 1 is the gradient of the objective, 0 leaves the loss alone",
    )


@dataclass(frozen=True)
class Batch:
    """Transitions to learn from.

    Attributes:
        observations: ``[N, ...]``.
        log_teacher: log T, with the floor, ``[N, A]``.
        actions: the student's, int64 ``[N]``.
        advantages: ``[N]``.
        values: what the critic is fitted to, ``[N]``.
    """

    observations: Tensor
    log_teacher: Tensor
    actions: Tensor
    advantages: Tensor
    values: Tensor


@dataclass(frozen=True)
class Rollout:
    """What the student met in T steps of B copies.

    Attributes:
        observations: acted in, ``[T, B, ...]``.
        labels: the teacher's outputs there, ``[T, B, A]``.
        following: observations to act on next, ``[B, ...]``.
        episode_returns: of the episodes that ended, ``[K]``.
        batch: the transitions of the copies to learn from.
    """

    observations: np.ndarray
    labels: np.ndarray
    following: np.ndarray
    episode_returns: np.ndarray
    batch: Batch


class ExpectedEntropy:
    """The update, for a student in training.

    Args:
        config: settings.
        training: the student.
        learning_rate: of the critics.
        environments: names of the student's heads.
        seed: the stage's seed.
    """

    def __init__(
        self,
        config: ExpectedEntropyConfig,
        training: StudentTraining,
        learning_rate: float,
        environments: list[str],
        seed: int,
    ) -> None:
        self.config = config
        self.training = training
        self.learning_rate = learning_rate
        width = training.network.feature_count
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.derive(seed, "distillation", "critics"))
            self._critics = nn.ModuleDict({name: nn.Linear(width, 1) for name in environments})
        self._critics.to(training.device)
        self._parameters = FlatParameters(self._critics, learning_rate)

    def play(
        self,
        name: str,
        envs: VectorEnvironment,
        observations: np.ndarray,
        student: Policy,
        teacher: Policy,
        learning: np.ndarray,
        random: np.random.Generator,
    ) -> Rollout:
        """Play ``rollout_length`` steps with the student's sampled actions.

        Args:
            name: of the environment.
            envs: its B copies.
            observations: to act on first, ``[B, ...]``.
            student: its logits.
            teacher: its outputs.
            learning: bool ``[B]``, the copies to learn from.
            random: for the actions.
        """
        config, copies, device = self.config, envs.num_envs, self.training.device
        steps = config.rollout_length
        # argmax(logits + Gumbel noise) is a sample of softmax(logits).
        noise = random.gumbel(size=(steps, copies, envs.spec.actions))
        met, actions, returns = [observations], [], []
        terminated, truncated, valid = (np.zeros((steps, copies), np.bool_) for _ in range(3))
        cut: list[tuple[int, np.ndarray, np.ndarray]] = []
        for t in range(steps):
            actions.append((student(met[-1]) + noise[t]).argmax(axis=1))
            step = envs.step(actions[-1])
            terminated[t], truncated[t], valid[t] = step.terminated, step.truncated, step.valid
            at_limit = step.truncated[step.ended]
            if at_limit.any():
                cut.append((t, step.ended[at_limit], step.final_observations[at_limit]))
            met.append(step.observations)
            returns.append(step.episode_returns)

        acted = np.stack(met[:-1])  # [T, B, ...]
        flat = acted.reshape(-1, *acted.shape[2:])
        labels = _in_chunks(teacher, flat)
        log_teacher, divergence, value = self._look(name, flat, labels)
        divergence, value = divergence.view(steps, copies), value.view(steps, copies)
        _, last_divergence, last_value = self._look(name, met[-1], teacher(met[-1]))
        next_divergence = torch.cat([divergence[1:], last_divergence.unsqueeze(0)])
        next_value = torch.cat([value[1:], last_value.unsqueeze(0)])
        for t, rows, final in cut:
            _, next_divergence[t, rows], next_value[t, rows] = self._look(name, final, teacher(final))
        going_on = torch.from_numpy(~terminated).to(device, torch.float32)
        inside = torch.from_numpy(~(terminated | truncated)).to(device, torch.float32)
        advantages = generalized_advantages(
            -next_divergence * going_on, config.gamma * going_on, config.trace * inside, value, next_value
        )
        rows = np.flatnonzero(valid & learning)
        chosen = torch.from_numpy(rows).to(device)
        batch = Batch(
            observations=torch.from_numpy(flat[rows]).to(device),
            log_teacher=log_teacher[chosen],
            actions=torch.from_numpy(np.concatenate(actions)[rows]).to(device),
            advantages=advantages.flatten()[chosen],
            values=(advantages + value).flatten()[chosen],
        )
        return Rollout(acted, labels.reshape(steps, copies, -1), met[-1], np.concatenate(returns), batch)

    def split(self, batch: Batch, count: int, random: np.random.Generator) -> list[Batch]:
        """``count`` minibatches in random order, of equal size up to one row."""
        order = torch.from_numpy(random.permutation(len(batch.actions))).to(self.training.device)
        columns = [column[order].tensor_split(count) for column in vars(batch).values()]
        return [Batch(*parts) for parts in zip(*columns, strict=True)]

    def update(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """One update of the student and of the critics; the mean divergences, without a gradient."""
        losses, critic_losses, divergences = {}, [], {}
        for name, batch in batches.items():
            features = self.training.network.features(batch.observations, name)
            logits = self.training.network.head(features, name)
            divergence = reverse_kl(logits, batch.log_teacher).mean()
            chosen = torch.log_softmax(logits, 1).gather(1, batch.actions.unsqueeze(1)).squeeze(1)
            losses[name] = divergence - self.config.correction * (chosen * batch.advantages).mean()
            # In units of a mean divergence, as the layer gives it.
            error = (self._value(name, features.detach()) - batch.values) * (1 - self.config.gamma)
            critic_losses.append(error.square().mean())
            divergences[name] = divergence.detach()
        self.training.descend(losses)
        self._parameters.zero_gradient()
        torch.autograd.backward(critic_losses)
        self._parameters.step(self.learning_rate)
        return divergences

    @torch.inference_mode()
    def _look(self, name: str, observations: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """log T ``[N, A]``, KL(S || T) and the critic's value ``[N]`` at ``[N, ...]``."""
        outputs = torch.from_numpy(labels).to(self.training.device)
        log_teacher = floored_log_policy(outputs, self.training.temperature(name), self.config.floor)
        parts = torch.from_numpy(observations).split(_CHUNK)
        network = self.training.network
        features = torch.cat([network.features(part.to(self.training.device), name) for part in parts])
        return (
            log_teacher,
            reverse_kl(network.head(features, name), log_teacher),
            self._value(name, features),
        )

    def _value(self, name: str, features: Tensor) -> Tensor:
        """Minus the discounted divergences to come, ``[N]``; the layer gives their mean, which is of the size of one."""
        mean: Tensor = self._critics[name](features).squeeze(1)
        return mean / (1 - self.config.gamma)

    def get_state(self) -> dict[str, Any]:
        """The critics and their optimiser."""
        return self._parameters.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get_state`."""
        self._parameters.set_state(state)


def _in_chunks(policy: Policy, observations: np.ndarray) -> np.ndarray:
    starts = range(0, len(observations), _CHUNK)
    return np.concatenate([policy(observations[start : start + _CHUNK]) for start in starts])
