"""Kickstarting (Schmitt et al. 2018, arXiv:1803.03835): a fresh policy learns from its rewards and from a teacher at once.

    loss = loss_PPO + lambda(t) KL(pi_teacher(. | s) || pi(. | s)),   s of the student's own trajectories          (eq. 4)

lambda falls to 0, so that the student may surpass its teacher. The same term keeps a policy that was taken from a source near it
while it begins to learn.

Deviations from the paper:

1. lambda falls linearly over a part of the budget; the paper lets population-based training choose it.
2. The base is PPO, not IMPALA: the divergence is averaged over the minibatches of each rollout, the states of which are the student's.
3. The KL, not the cross-entropy: they differ by the teacher's entropy, which is constant in the student.
4. A teacher of Q-values is a policy through softmax(Q / tau), with tau from its mean action gap
   (:func:`stillhouse.losses.distillation.action_gap_temperature`); one of another action set is renormalised over the actions
   that correspond.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.losses.distillation import action_gap_temperature, teacher_log_policy
from stillhouse.networks.multi_task import MultiTaskNetwork
from stillhouse.transfer.initialisation import Correspondence, Source, channels, show
from stillhouse.types import EnvironmentSpec, OutputKind

GREEDY_ODDS = 2.0  # of the best action over the second best, where their Q-values are a mean action gap apart


class Guide:
    """A source's policy on the target's observations and actions, with a weight that decays.

    Args:
        source: with the environment whose policy it is.
        target: the target's spaces.
        correspondence: of the target's components and actions with the source's; both must correspond.
        temperature: that the source's outputs are divided by; 1 for logits.
        weight: lambda at the start.
        duration: env steps over which it falls to 0.
    """

    def __init__(
        self,
        source: Source,
        target: EnvironmentSpec,
        correspondence: Correspondence,
        temperature: float,
        weight: float,
        duration: float,
    ) -> None:
        assert correspondence.components is not None and correspondence.actions is not None
        self._network = source.network
        self._environment = source.environment
        self._temperature, self._weight, self._duration = temperature, weight, duration
        self._shown = inverse(correspondence.components, channels(source.spec.observation))
        self._seen, self._wanted = target.observation, source.spec.observation
        self._actions = torch.tensor([max(0, action) for action in correspondence.actions])
        self._known = torch.tensor([float(action >= 0) for action in correspondence.actions])

    def weight(self, env_steps: int) -> float:
        """lambda after so many env steps."""
        return self._weight * max(0.0, 1 - env_steps / self._duration) if self._duration else 0.0

    @torch.no_grad()
    def policy(self, observations: Tensor) -> Tensor:
        """Probabilities [B, A] of the target's actions for its raw observations [B, ...]."""
        shown = show(observations, self._shown, self._seen, self._wanted)
        outputs = self._network(shown, self._environment)
        policy = teacher_log_policy(outputs, self._temperature).exp()
        device = policy.device
        policy = policy[:, self._actions.to(device)] * self._known.to(device)
        return policy / policy.sum(1, keepdim=True).clamp(min=1e-12)


def inverse(numbers: Sequence[int], count: int) -> tuple[int, ...]:
    """For each of the source's ``count`` the target's number, -1 where it has none."""
    return tuple(numbers.index(i) if i in numbers else -1 for i in range(count))


@torch.no_grad()
def policy_temperature(
    network: MultiTaskNetwork, environment: str, observations: Tensor, output: OutputKind
) -> float:
    """At which a network's outputs are its policy: 1 for logits; for Q-values by their mean action gap.

    Args:
        network: it.
        environment: whose outputs.
        observations: raw, [N, ...].
        output: what they are; not always what the network's learner gives.
    """
    if output == "logits":
        return 1.0
    best = network(observations, environment).topk(2, 1).values
    return action_gap_temperature(max(1e-6, float((best[:, 0] - best[:, 1]).mean())), GREEDY_ODDS)
